"""The CuPy path without a GPU: tinyddpm on strict.xp, a stand-in that is as strict as CuPy.

First the stand-in itself: each rule is shown to be one, and the installed CuPy is asked about
it as far as it answers without a GPU (all the way where there is one). Then all of tinyddpm
runs through it: the results have to be NumPy's, and nothing may wait for the device that need
not.
"""
import contextlib
import functools
import io
import itertools
import operator
import pickle
import warnings

import numpy as np
import pytest

import tinyddpm as td
from common import KINDS

try:
    import cupy
except Exception as error:      # its libraries can be missing in many ways
    pytest.skip("the stand-in takes names and keywords from CuPy, which does not import: "
                f"{type(error).__name__}: {error}", allow_module_level=True)

import strict
import test_backend

# ------------------------------------------------------------- what CuPy refuses and accepts
# Functions of xp, d and h: the module, an array on the device, the same on the host.


class Int(int):
    pass


REFUSED = {
    "d + h": lambda xp, d, h: d + h,
    "h + d": lambda xp, d, h: h + d,
    "d += h": lambda xp, d, h: operator.iadd(d, h),
    "h += d": lambda xp, d, h: operator.iadd(h, d),
    "d < h": lambda xp, d, h: d < h,
    "d == h": lambda xp, d, h: d == h,
    "d ** h": lambda xp, d, h: d ** h,
    "d @ h": lambda xp, d, h: d @ h,
    "h @ d": lambda xp, d, h: h @ d,
    "d @ 2": lambda xp, d, h: d @ 2,
    "d + list": lambda xp, d, h: d + [1.0] * 6,
    "d + 0-d host array": lambda xp, d, h: d + np.array(2.0),
    "d + a subclass of int": lambda xp, d, h: d + Int(2),
    "d + None": lambda xp, d, h: d + None,
    "ufunc": lambda xp, d, h: xp.add(d, h),
    "ufunc of host arrays": lambda xp, d, h: xp.sqrt(h),
    "ufunc of a list": lambda xp, d, h: xp.maximum(d, [1.0] * 6),
    "ufunc, out=h": lambda xp, d, h: xp.add(d, d, out=h),
    "ufunc, out h by position": lambda xp, d, h: xp.exp(d, h),
    "ufunc, out of another kind": lambda xp, d, h: xp.add(d, d, out=xp.zeros(6, int)),
    "NumPy's ufunc": lambda xp, d, h: np.add(h, d),
    "NumPy's ufunc, out=h": lambda xp, d, h: np.sqrt(d, out=h),
    "NumPy's ufunc, out=d": lambda xp, d, h: np.add(h, h, out=d),
    "matmul, out=h": lambda xp, d, h: xp.matmul(d.reshape(2, 3), d.reshape(3, 2),
                                                out=np.empty((2, 2))),
    "concatenate": lambda xp, d, h: xp.concatenate([d, h]),
    "NumPy's concatenate": lambda xp, d, h: np.concatenate([h, d]),
    "stack": lambda xp, d, h: xp.stack([d, h]),
    "where": lambda xp, d, h: xp.where(d > 0, d, h),
    "where by a host mask": lambda xp, d, h: xp.where(h > 0, d, d),
    "clip": lambda xp, d, h: xp.clip(d, h, 2),
    "dot": lambda xp, d, h: d.dot(h),
    "sum, out=h": lambda xp, d, h: d.sum(0, out=np.empty(())),
    "sum of a list": lambda xp, d, h: xp.sum([1.0, 2.0]),
    "as_strided": lambda xp, d, h: xp.lib.stride_tricks.as_strided(h, (3,), (8,)),
    "repeat": lambda xp, d, h: xp.repeat(d, np.arange(6)),
    "asarray of both": lambda xp, d, h: xp.asarray([d, 1.0]),
    "asarray of words": lambda xp, d, h: xp.asarray(["a"]),
    "d[:] = h": lambda xp, d, h: operator.setitem(d, slice(None), h),
    "d[:2] = h[:2]": lambda xp, d, h: operator.setitem(d, slice(2), h[:2]),
    "d[:2] = list": lambda xp, d, h: operator.setitem(d, slice(2), [1.0, 2.0]),
    "fill": lambda xp, d, h: d.fill(h),
    "set of another type": lambda xp, d, h: d.set(h.astype(np.float32)),
    "get, out of another type": lambda xp, d, h: d.get(out=h.astype(np.float32)),
    "np.asarray": lambda xp, d, h: np.asarray(d),
    "np.array of a list": lambda xp, d, h: np.array([d, d]),
    "np.ascontiguousarray": lambda xp, d, h: np.ascontiguousarray(d),
    "np.frompyfunc": lambda xp, d, h: np.frompyfunc(abs, 1, 1)(d),
    "h[:] = d": lambda xp, d, h: operator.setitem(h, slice(None), d),
    "h[d]": lambda xp, d, h: h[d],
    "range": lambda xp, d, h: range(d[0]),
    "an index of a list": lambda xp, d, h: [1, 2][d[0]],
    "a slice": lambda xp, d, h: d[d[0]:],
    "a shape": lambda xp, d, h: xp.zeros(d[0]),
    "round": lambda xp, d, h: round(d[0]),
    "iter of 0-d": lambda xp, d, h: iter(d[0]),
    "len of 0-d": lambda xp, d, h: len(d[0]),
    "hash": lambda xp, d, h: hash(d),
    "truth of many": lambda xp, d, h: bool(d),
    "item of many": lambda xp, d, h: d.item(),
    "item(0)": lambda xp, d, h: d.item(0),
    "an attribute": lambda xp, d, h: setattr(d, "note", 1),
    "an index out of bounds": lambda xp, d, h: d[6],
    "ufunc, where=": lambda xp, d, h: xp.add(d, d, where=True),
    "ufunc, order=": lambda xp, d, h: xp.exp(d, order="C"),
    "matmul, subok=": lambda xp, d, h: xp.matmul(d, d, subok=True),
    "sum, where=": lambda xp, d, h: d.sum(where=True),
    "mean, where=": lambda xp, d, h: xp.mean(d, where=True),
    "max, initial=": lambda xp, d, h: d.max(initial=0),
    "amax, initial=": lambda xp, d, h: xp.max(d, initial=0),
    "np.sum, where=": lambda xp, d, h: np.sum(d, where=True),
    "as_strided, writeable=": lambda xp, d, h: xp.lib.stride_tricks.as_strided(
        d, (3,), (8,), writeable=False),
    "astype, casting=": lambda xp, d, h: d.astype(np.float32, casting="unsafe"),
    "pad, another keyword": lambda xp, d, h: xp.pad(d, 1, fill=2),
    "maximum.reduce": lambda xp, d, h: xp.maximum.reduce(d),
    "NumPy's maximum.reduce": lambda xp, d, h: np.maximum.reduce(d),
    "frompyfunc": lambda xp, d, h: xp.frompyfunc,
    "nditer": lambda xp, d, h: xp.nditer,
    "tostring": lambda xp, d, h: d.tostring,
    "itemset": lambda xp, d, h: d.itemset,
}
# A refusal is a TypeError, or:
OTHER = dict.fromkeys(["asarray of words", "d[:] = h", "d[:2] = h[:2]", "d[:2] = list", "fill",
                       "truth of many", "item of many"], ValueError)
OTHER |= dict.fromkeys(["an attribute", "frompyfunc", "nditer", "tostring", "itemset"],
                       AttributeError)
OTHER |= dict.fromkeys(["maximum.reduce", "NumPy's maximum.reduce"], NotImplementedError)
OTHER |= {"an index out of bounds": IndexError,
          "sum of a list": (TypeError, AttributeError),         # of CuPy's, by accident
          "pad, another keyword": (TypeError, ValueError)}
ACCEPTED = {
    "numbers": lambda xp, d, h: 2 * d - 1.0 + True,
    "NumPy's numbers": lambda xp, d, h: np.float32(2) * d / np.float64(3) + np.int64(1),
    "float32 stays": lambda xp, d, h: 2.0 * d.astype(np.float32) ** 2,
    "powers": lambda xp, d, h: [d ** 2, d ** 2.0, d ** 0.5, (d + 1) ** -1.0, d ** 3, 2 ** d],
    "unary": lambda xp, d, h: [-d, +d, abs(d), ~(d > 1)],
    "comparison with a 0-d host array": lambda xp, d, h: d < np.array(2.0),
    "divmod": lambda xp, d, h: divmod(d, 2),
    "in place": lambda xp, d, h: operator.imul(d, d[:, None].sum()),
    "out=": lambda xp, d, h: xp.add(d, 1, out=d),
    "out= by position": lambda xp, d, h: xp.exp(d, d),
    "out= of another type": lambda xp, d, h: xp.add(d, 1, out=xp.empty(6, np.float32)),
    "out= that overlaps": lambda xp, d, h: xp.add(d[:-1], d[1:], out=d[1:]),
    "dtype=": lambda xp, d, h: xp.multiply(d, 2, dtype=np.float32),
    "matmul, out=": lambda xp, d, h: xp.matmul(d.reshape(2, 3), d.reshape(3, 2),
                                               out=xp.empty((2, 2))),
    "matmul of stacks, out=": lambda xp, d, h: xp.matmul(
        xp.ones((1, 3)), d.reshape(2, 3, 1), out=xp.empty((2, 1, 1))),
    "matmul of vectors": lambda xp, d, h: d @ d,
    "NumPy's ufunc": lambda xp, d, h: np.sqrt(d),
    "NumPy's ufunc, out=": lambda xp, d, h: np.add(d, 1, out=d),
    "NumPy's functions": lambda xp, d, h: [np.sum(d), np.concatenate([d, d]), np.clip(d, 0, 2)],
    "reductions": lambda xp, d, h: [d.sum(), d.mean(0), d.max(), d.std((0,), keepdims=True),
                                    d.argmax(), d.any(), xp.sum(d, axis=0), xp.linalg.norm(d)],
    "reductions, out=": lambda xp, d, h: d.reshape(2, 3).sum(0, out=xp.empty(3)),
    "add.reduce": lambda xp, d, h: xp.add.reduce(d),
    "outer": lambda xp, d, h: xp.multiply.outer(d, d),
    "an index": lambda xp, d, h: [d[0], d[-1], d[np.int64(2)], d[..., 1], d[None, ::-2]],
    "an index of host integers": lambda xp, d, h: [d[np.array([4, 1])], d[[4, 1]],
                                                   d[np.array(2)]],
    "an index of device integers": lambda xp, d, h: d[xp.asarray(np.array([4, 1]))],
    "assignment": lambda xp, d, h: [operator.setitem(d, slice(2), 7), d][1],
    "assignment of a 0-d host array": lambda xp, d, h: [operator.setitem(d, 0, h[3:4].sum()),
                                                        d][1],
    "assignment at host integers": lambda xp, d, h: [operator.setitem(d, [3, 1], h[:2]), d][1],
    "fill": lambda xp, d, h: [d.fill(3), d][1],
    "asarray": lambda xp, d, h: [xp.asarray(h), xp.asarray(d, np.float32), xp.asarray(2)],
    "asarray of arrays": lambda xp, d, h: xp.asarray([d, d]),
    "functions": lambda xp, d, h: [
        xp.concatenate([d, d]), xp.stack([d, d], 1), xp.where(d > 1, d, 0), xp.clip(d, 1, d),
        xp.maximum(1, d), xp.minimum(d, 2.5), xp.pad(d, [(1, 2)]), xp.repeat(d, 2, 0),
        xp.quantile(d, 0.7, axis=0), xp.broadcast_to(d, (2, 6)), xp.full_like(d, 2),
        xp.arange(4), xp.full(3, 1.5), xp.sign(d - 1), xp.ones_like(d), xp.zeros(2, np.int32)],
    "parts": lambda xp, d, h: [*xp.split(d, 2), *xp.array_split(d, 4), *d.reshape(2, 3)],
    "methods": lambda xp, d, h: [
        d.reshape(2, -1).transpose(1, 0), d.reshape((3, 2)).T, d.copy(), d.ravel(), d.cumsum(),
        d.reshape(2, 3).swapaxes(0, 1), d.astype(np.float32), d.clip(0, 1), d.take([1, 1])],
    "as_strided": lambda xp, d, h: xp.lib.stride_tricks.as_strided(d, (4, 3), (8, 8)),
    "add.at": lambda xp, d, h: [xp.add.at(d, xp.asarray([1, 1, 2]), 1.0), d][1],
    "einsum": lambda xp, d, h: xp.einsum("i,i->", d, d),
    "types": lambda xp, d, h: [xp.zeros(2, xp.result_type(d, np.float32)),
                               xp.asarray([xp.ndim(d), xp.size(d), xp.pi])],
}
WAITS = {
    "float": lambda xp, d, h: float(d[0]),
    "int": lambda xp, d, h: int(d[0]),
    "complex": lambda xp, d, h: complex(d[0]),
    "if": lambda xp, d, h: bool(d[0]),
    "in": lambda xp, d, h: 0.0 in d,
    "max": lambda xp, d, h: max(*d[:2]),
    "str": lambda xp, d, h: str(d),
    "repr": lambda xp, d, h: repr(d),
    "format": lambda xp, d, h: f"{d[0]:.2f}",
    "get": lambda xp, d, h: d.get(),
    "item": lambda xp, d, h: d[0].item(),
    "tolist": lambda xp, d, h: d.tolist(),
    "tobytes": lambda xp, d, h: d.tobytes(),
    "asnumpy": lambda xp, d, h: xp.asnumpy(d),
    "pickle": lambda xp, d, h: pickle.dumps(d),
    "np.float64": lambda xp, d, h: np.float64(d[0]),
    "np.savez": lambda xp, d, h: np.savez(io.BytesIO(), d=d),
    "nonzero": lambda xp, d, h: d.nonzero(),
    "argwhere": lambda xp, d, h: xp.argwhere(d),
    "flatnonzero": lambda xp, d, h: xp.flatnonzero(d),
    "where": lambda xp, d, h: xp.where(d > 1),
    "unique": lambda xp, d, h: xp.unique(d),
    "NumPy's unique": lambda xp, d, h: np.unique(d),
    "d[mask]": lambda xp, d, h: d[d > 1],
    "d[host mask]": lambda xp, d, h: d[h > 1],
    "d[mask] = 0": lambda xp, d, h: operator.setitem(d, d > 1, 0),
    "compress": lambda xp, d, h: d.compress(d > 1),
    "extract": lambda xp, d, h: xp.extract(d > 1, d),
    "repeat": lambda xp, d, h: xp.repeat(d, d.astype(int)),
    "bincount": lambda xp, d, h: xp.bincount(d.astype(int)),
}


def pair(xp=strict.xp):
    host = np.arange(6.0)
    return xp.asarray(host), host


@pytest.mark.parametrize("name", REFUSED)
def test_the_stand_in_refuses(name):
    with pytest.raises(OTHER.get(name, TypeError)):
        REFUSED[name](strict.xp, *pair())


def flat(value):
    return list(strict.leaves(value))


@pytest.mark.parametrize("name", ACCEPTED)
def test_the_stand_in_accepts(name):
    """Device arrays come out, also of reductions and of single elements, with NumPy's numbers
    and types; and nothing waits for them."""
    with strict.syncs() as seen:
        found = flat(ACCEPTED[name](strict.xp, *pair()))
    assert not seen
    expected = flat(ACCEPTED[name](np, np.arange(6.0), np.arange(6.0)))
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        assert type(a) is strict.xp.ndarray and a.dtype == b.dtype and a.shape == b.shape
        assert np.array_equal(a.get(), b)


@pytest.mark.parametrize("name", WAITS)
def test_the_stand_in_knows_what_waits(name):
    with strict.syncs() as seen:
        WAITS[name](strict.xp, *pair())
    assert seen and all("in test_strict.py:" in one for one in seen)


HAS_GPU = td.choose_backend() is not np
if HAS_GPU:
    NO_GPU = ()
else:
    from cupy_backends.cuda.api.runtime import CUDARuntimeError
    NO_GPU = (CUDARuntimeError, ImportError)    # it went on to the driver, or to cuBLAS


def on_cupy(a):
    """A host array as one of CuPy's; without a GPU, one that claims this memory for a GPU's."""
    if HAS_GPU:
        return cupy.asarray(a)
    low, high = np.lib.array_utils.byte_bounds(a)
    memory = cupy.cuda.UnownedMemory(low, high - low, a, device_id=0)
    start = cupy.cuda.MemoryPointer(memory, a.ctypes.data - low)
    return cupy.ndarray(a.shape, a.dtype, start, a.strides)


@pytest.mark.parametrize("name", REFUSED)
def test_cupy_refuses(name):
    host, error = np.arange(6.0), OTHER.get(name, TypeError)
    with pytest.raises((*(error if isinstance(error, tuple) else (error,)), *NO_GPU)):
        REFUSED[name](cupy, on_cupy(host), host.copy())


@pytest.mark.parametrize("name", ACCEPTED)
def test_cupy_accepts(name):
    device, host = on_cupy(np.arange(6.0)), np.arange(6.0)
    with contextlib.suppress(*NO_GPU):
        found = flat(ACCEPTED[name](cupy, device, host))
        for a, b in zip(found, flat(ACCEPTED[name](np, host.copy(), host))):
            assert type(a) is cupy.ndarray and a.dtype == b.dtype and a.shape == b.shape
            assert not HAS_GPU or np.allclose(a.get(), b)


@pytest.mark.gpu
def test_cupy_waits():
    import cupyx
    silent = []
    with warnings.catch_warnings(action="ignore"), cupyx.allow_synchronize(False):
        for name, ask in WAITS.items():
            with contextlib.suppress(cupyx.DeviceSynchronized, TypeError):      # np.float64
                ask(cupy, *pair(cupy))
                silent.append(name)
    assert not silent


def test_cupy_decides_much_without_a_gpu():
    """So that the tests above are about something: CuPy refuses a good part by itself."""
    host, decided = np.arange(6.0), 0
    for ask in REFUSED.values():
        try:
            ask(cupy, on_cupy(host), host.copy())
        except NO_GPU:
            pass
        except Exception:
            decided += 1
    assert decided > 30


def test_all_names_are_cupy_s():
    """What NumPy has and CuPy has not is an AttributeError, in the module and on an array."""
    lacking = [name for name in dir(np) if not hasattr(cupy, name) and name[0] != "_"]
    assert len(lacking) > 30
    assert not [name for name in lacking if hasattr(strict.xp, name)]
    d, _ = pair()
    public = {name for name in dir(d) if name[0] != "_"}
    assert public == {name for name in dir(cupy.ndarray) if name[0] != "_"}
    with pytest.raises(NotImplementedError):    # CuPy has it, and there is no stand-in
        strict.xp.RawKernel


def test_memory():
    """Slices, elements, reshapes, strides and halves are views; empty memory is not zeros."""
    xp, (d, host) = strict.xp, pair()
    views = [d[1:], d.reshape(2, 3)[1], d[3], d[None].T, xp.split(d, 2)[1], d.view(), d[::-1],
             xp.lib.stride_tricks.as_strided(d, (2, 3), (8, 8))]
    d[...] = 9
    assert all((view == 9).all() for view in views)
    views[2][...] = 3
    assert (d.get() == [9, 9, 9, 3, 9, 9]).all()
    assert xp.asarray(host).get()[0] == 0 and xp.asarray(d) is d
    assert xp.add(d, 1, out=d) is d and operator.iadd(d, 1) is d
    square = d.reshape(2, 3)[:, :2]
    assert operator.imatmul(square, square) is not square       # there is none in CuPy
    d[:] = 0
    assert xp.array(d) is not d and (host == np.arange(6)).all()
    for empty in (xp.empty(3), xp.empty_like(d), xp.ndarray((2, 2), np.float32)):
        assert xp.isnan(empty).all()
    assert d.flags.c_contiguous and not d[::2].flags.c_contiguous
    assert not hasattr(d.flags, "writeable")


def test_a_device_generator():
    drawn = strict.xp.random.default_rng(0).standard_normal((2, 3), dtype=np.float32)
    same = np.random.default_rng(0).standard_normal((2, 3), dtype=np.float32)
    assert type(drawn) is strict.xp.ndarray and np.array_equal(drawn.get(), same)
    with pytest.raises(TypeError):
        strict.xp.random.default_rng(0).standard_normal(shape=2)


def test_pickle_comes_back():
    d, host = pair()
    assert np.array_equal(pickle.loads(pickle.dumps(d)).get(), host)


# ---------------------------------------------------------------- tinyddpm on the stand-in

@contextlib.contextmanager
def backend(module):
    before, td.xp = td.xp, module
    try:
        yield
    finally:
        td.xp = before


def same_on_both(run, tolerance=1e-12):
    """run() gives names and arrays: on the stand-in they have to be device arrays, and equal
    to NumPy's. Returns what waited for the device."""
    with backend(np):
        expected = run()
    with backend(strict.xp), strict.syncs() as seen:
        found = run()
    assert found.keys() == expected.keys()
    for name, b in expected.items():
        a = found[name]
        assert type(a) is strict.xp.ndarray, f"{name} is a {type(a)}"
        assert a.dtype == b.dtype and np.isfinite(b).all(), name
        np.testing.assert_allclose(a.get(), b, rtol=tolerance, atol=tolerance, err_msg=name)
    return seen


def witnessed(monkeypatch, calls, problems):
    """Let the installed CuPy see every call that the stand-in gets, once for each shape."""
    def as_cupy(value):
        if isinstance(value, (list, tuple)):
            return type(value)(map(as_cupy, value))
        return on_cupy(value._host) if isinstance(value, strict.Array) else value

    def layout(value):
        array = isinstance(value, (strict.Array, cupy.ndarray))
        # How far apart, where there are several.
        return ((value.shape, value.dtype, [s for s, n in zip(value.strides, value.shape)
                                            if n > 1 and value.size]) if array else value)

    def watch(name, real, call):
        @functools.wraps(call)
        def watched(*args, **kwargs):
            key = f"{name} {[layout(a) for a in flat([*args, *kwargs.items()])]}"
            result = call(*args, **dict(kwargs))
            if key not in calls:
                calls.add(key)
                try:
                    answer = real(*as_cupy(args), **{k: as_cupy(v) for k, v in kwargs.items()})
                    if [layout(a) for a in flat(answer)] != [layout(a) for a in flat(result)]:
                        problems.append(f"{key}: another layout")
                except NO_GPU:
                    pass
                except Exception as error:
                    problems.append(f"{key}: {type(error).__name__}: {error}")
            return result
        return watched

    function, ufunc = strict.function, strict.Ufunc.__call__
    monkeypatch.setattr(strict, "function", lambda path, real, host: watch(
        path, real, function(path, real, host)))
    monkeypatch.setattr(strict.Ufunc, "__call__", lambda self, *args, **kwargs: watch(
        self.__name__, self.real, functools.partial(ufunc, self))(*args, **kwargs))
    for name in ("__getitem__", "__setitem__", *(n for n in dir(cupy.ndarray) if n[0] != "_")):
        real = getattr(cupy.ndarray, name)
        if callable(real) and name != "get":
            monkeypatch.setattr(strict.Array, name,
                                watch(name, real, getattr(strict.Array, name)))
    monkeypatch.setattr(strict, "xp", strict.Module(cupy, np))


def test_everything(monkeypatch):
    """All that test_backend.py computes: layers, training, samplers, bits per dimension. The
    installed CuPy sees every call, and does all but the computing."""
    with backend(np):
        expected = test_backend.everything()
    calls, problems = set(), []
    if not HAS_GPU:             # else test_backend.py computes there
        witnessed(monkeypatch, calls, problems)
    with backend(strict.xp):
        found = test_backend.everything()
    assert found.keys() == expected.keys()
    for name, b in expected.items():
        tolerance = 1e-12 if b.dtype == np.float64 else 1e-5
        np.testing.assert_allclose(found[name], b, rtol=tolerance, atol=tolerance, err_msg=name)
    assert HAS_GPU or len(calls) > 300
    assert not problems, "\n".join(problems[:20])


def test_the_gradient_table():
    with backend(np):
        expected = list(td.gradient_table())
    with backend(strict.xp):
        found = list(td.gradient_table())
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    assert all(error < 1e-6 for *_, error in found)


NETS = {
    "attention": dict(image=(4, 4, 2), attention=(0, 1), classes=0),
    "labels": dict(image=(4, 4, 1), classes=3),
    "odd": dict(image=(5, 3, 1), classes=0),
    "odd, folded": dict(image=(5, 7, 2), fold=True, dropout=0.2, classes=3),
    "three levels": dict(image=(7, 6, 1), channels=(4, 8, 4), blocks=(1, 2, 1), dropout=0.2,
                         attention=(2,), classes=3),
}


def network(dtype=np.float64, **options):
    net = td.UNet(**dict(channels=(4, 8), heads=2, dtype=dtype) | options)
    net.params.flat[:] = 0.3 * td.normal(np.random.default_rng(5), net.params.flat.shape, dtype)
    return net


def noise(seed, shape):
    return td.normal(np.random.default_rng(seed), shape, np.float64)


@pytest.mark.parametrize("name", NETS)
def test_the_network(name):
    """Forward and backward, t and labels from the host or, as a sampler gives them, not."""
    def run(where=np):
        net = network(**NETS[name])
        x, t = noise(1, (3, *net.image)), getattr(td, where).asarray([1, 7, 20])
        y = getattr(td, where).asarray([0, 2, 3]) if net.classes else None
        out, back = net.forward(x, t, y, np.random.default_rng(3))
        return {"out": out, "dx": back(noise(2, x.shape)), "g": net.grads.flat,
                "no labels, no dropout": net(x, t)}
    for where in ("np", "xp"):
        assert not same_on_both(functools.partial(run, where))


def pictures(n=7, image=(4, 4, 1)):
    return np.clip(np.random.default_rng(0).standard_normal((n, *image)), -1, 1)


def training(steps, waits=None, net=None, stop=None, dropout=0.1, **options):
    """Train a small network, up to a step; what waited in each step goes to `waits`. The
    network and the last State."""
    net = net or network(image=(4, 4, 1), classes=3, attention=(1,), dropout=dropout)
    options = dict(labels=np.arange(7) % 3, steps=steps, batch=4, ema=0.9) | options
    states = td.train(net, td.Diffusion(td.cosine_betas(20)), pictures(), **options)
    for _ in range(options["state"].step if "state" in options else 0, stop or steps):
        with strict.syncs() as seen:
            state = next(states)
        if waits is not None:
            waits.append(seen)
    return net, state


def results(net, state):
    return {"params": net.params.flat, "ema": state.ema.flat, "m": state.adam.m,
            "v": state.adam.v, "loss": td.xp.asarray(state.loss)}


@pytest.mark.parametrize("loss, kind, weighting",
                         list(itertools.product(td.LOSSES, KINDS, td.WEIGHTINGS)))
def test_training(loss, kind, weighting):
    """The first step looks at the images and at the loss; the next ones look at nothing."""
    waits = []

    def run():
        waits.clear()
        return results(*training(3, waits, loss=loss, kind=kind, weighting=weighting))
    same_on_both(run, 1e-11)
    assert len(waits) == 3 and waits[0] and not waits[1] + waits[2], waits


@pytest.mark.parametrize("options", [
    dict(optimizer="muon", decay=0.1), dict(accumulate=2, decay=0.1, clip=1e-3, warmup=0),
    dict(batch=5, threads=2, chunk=2, dropout=0),       # one at a time draws other dropout
    dict(rng=np.random.PCG64(3), label_drop=1.0)],
    ids=["muon", "accumulate", "threads", "generator"])
def test_training_options(options):
    waits = []

    def run():
        waits.clear()
        rng = np.random.Generator(type(options["rng"])(3)) if "rng" in options else 0
        return results(*training(2, waits, **options | {"rng": rng}))
    same_on_both(run, 1e-11)
    assert waits[0] and not waits[1], waits


def test_the_loss_is_looked_at_every_50_steps():
    """A GPU would have to be waited for; so a loss that is not finite is found at step 51."""
    waits = []
    with backend(strict.xp):
        training(60, waits, network(image=(4, 4, 1), channels=(4,), classes=3), batch=2)
        assert [i for i, seen in enumerate(waits) if seen] == [0, 50], waits
        net = network(image=(4, 4, 1), channels=(4,), classes=3)
        states = td.train(net, td.Diffusion(td.cosine_betas(20)), pictures(),
                          np.zeros(7, int), steps=60, batch=2)
        for state in states:
            net.params.flat[:] = np.nan
            if state.step == 50:
                break
        with pytest.raises(FloatingPointError, match="the loss is nan .* at step 51"):
            next(states)


def test_adam_and_ema():
    def run():
        p = noise(1, 12)
        adam, ema = td.Adam(p), td.EMA(p)
        for i in range(4):
            adam.step(p, noise(i, 12), 0.1, decay=0.2)
            ema.step(p)
        return {"p": p, "m": adam.m, "v": adam.v, "ema": ema.flat}
    assert not same_on_both(run)


def test_a_checkpoint(tmp_path):
    """Saved and loaded on the device, training goes on as if never stopped; and NumPy reads
    the same from the file."""
    with backend(strict.xp):
        td.save(tmp_path / "2.npz", *training(4, stop=2), note="half")
        net, state, settings = td.load(tmp_path / "2.npz")
        assert settings == {"note": "half"} and state.step == 2
        assert all(type(a) is strict.xp.ndarray for name, a in results(net, state).items()
                   if name != "loss")
        halves = results(*training(4, net=net, state=state))
        whole = results(*training(4))
        assert all(np.array_equal(whole[name].get(), a.get()) for name, a in halves.items())
    with backend(np):
        net, state = training(4, stop=2)
        again, loaded, _ = td.load(tmp_path / "2.npz")
        for name, a in results(net, state).items():
            np.testing.assert_allclose(results(again, loaded)[name], a, 1e-11, 1e-11)


SAMPLERS = {
    "ddpm, small": lambda *a: td.ddpm(*a, variance="small"),
    "ddpm, large": lambda *a: td.ddpm(*a, variance="large", kind="v", steps=5),
    "ddpm, not clipped": lambda *a: td.ddpm(*a, clip=None, kind="x0"),
    "ddpm, dynamic threshold": lambda *a: td.ddpm(*a, clip=td.dynamic_threshold),
    "ddim": lambda *a: td.ddim(*a, 5),
    "ddim, eta": lambda *a: td.ddim(*a, 5, 0.5, kind="v", spacing="leading"),
    "dpm_solver": lambda *a: td.dpm_solver(*a, steps=5, kind="v"),
    "heun": lambda *a: td.heun(*a, steps=5),
    "ddim, dynamic threshold": lambda *a: td.ddim(*a, 5, clip=td.dynamic_threshold, kind="x0"),
}
GUIDED = {
    "the network": lambda net, y: net,
    "guided": lambda net, y: td.guided(net, y, net.null, w=2.0),
    "rescaled": lambda net, y: td.guided(net, y, net.null, w=3.0, rescale=0.7),
    "in an interval": lambda net, y: td.guided(net, y, net.null, w=2, rescale=0.5,
                                               interval=(4, 12)),
    "of NumPy's steps": lambda net, y: td.guided(net, y, net.null, w=2.0,
                                                 interval=tuple(np.array([4, 12]))),
    "conditional": lambda net, y: td.guided(net, y, net.null, w=1),
    "unconditional": lambda net, y: td.guided(net, y, net.null, w=0),
}


def sampling(sampler, model, rng=np.random.default_rng):
    net = network(image=(4, 4, 1), classes=3)
    start, labels = noise(4, (2, *net.image)), np.array([0, 2])
    return {"x": td.sample(sampler(model(net, labels), td.Diffusion(td.cosine_betas(12)), start,
                                   rng(7)))}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers(name):
    """No sampler waits for the device at all."""
    assert not same_on_both(lambda: sampling(SAMPLERS[name], GUIDED["rescaled"]))


@pytest.mark.parametrize("name", GUIDED)
def test_guidance(name):
    assert not same_on_both(lambda: sampling(SAMPLERS["ddim, eta"], GUIDED[name]))


def test_a_sampler_s_noise_from_the_device():
    assert not same_on_both(lambda: sampling(SAMPLERS["ddpm, small"], GUIDED["guided"],
                                             td.xp.random.default_rng))


def test_parallel():
    def run():
        net = network(image=(4, 4, 1), classes=0)
        return {"out": td.parallel(net, 2, 2)(noise(1, (5, *net.image)), td.xp.full(5, 3))}
    same_on_both(run)


def test_the_forward_process():
    """All of Diffusion that gives arrays, for one t and for several, these on the device."""
    diffusion = td.Diffusion(td.cosine_betas(12))

    def run(t):
        t = t if isinstance(t, int) else td.xp.asarray(t)
        x0, eps, found = noise(1, (3, 2, 2, 1)), noise(2, (3, 2, 2, 1)), {}
        xt = found["xt"] = diffusion.q_sample(x0, t, eps)
        found["step"] = diffusion.q_step(x0, t, eps)
        found["posterior"] = diffusion.q_posterior(x0, xt, t)[0]
        found["score"] = diffusion.score(xt, t, eps)
        for kind in KINDS:
            out = found[f"target {kind}"] = diffusion.target(x0, eps, t, kind)
            found[f"x0 {kind}"] = diffusion.to_x0(xt, t, out, kind)
            found[f"eps {kind}"] = diffusion.to_eps(xt, t, out, kind)
        return found
    assert not same_on_both(lambda: run(3))
    assert same_on_both(lambda: run([1, 5, 12]))        # t is checked on the host


def test_bits_per_dim():
    def run():
        net = network(image=(4, 4, 1), classes=0)
        x0 = td.xp.asarray(np.round(127.5 * (pictures(2) + 1)) / 127.5 - 1)
        bits = td.Diffusion(td.cosine_betas(8)).bits_per_dim(net, x0, np.random.default_rng(1))
        return {name: td.xp.asarray(value) for name, value in bits.items()}
    same_on_both(run)
