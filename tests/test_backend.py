"""The array module: which one is chosen, and that all of tinyddpm computes the same on another
as on NumPy: on a strict stand-in for CuPy everywhere (tests/strict.py), on a GPU where there is
one (pytest -m gpu).
"""
import ast
import copy
import os
import re
import subprocess
import sys
import types
from inspect import signature
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

import strict
import tinyddpm as td

SOURCE = Path(td.__file__)


def everything(folder):
    """Names and host arrays of all that a device could get wrong. Inputs are of the host."""
    found, rng = {}, np.random.default_rng(2)

    def device(*shape):
        return td.xp.asarray(rng.standard_normal(shape))

    for predicts, betas in (("v", td.cosine_betas(12)), ("flow", td.flow_betas(12))):
        diffusion = td.Diffusion(betas, predicts)
        x0, eps, t = device(3, 4, 4, 2), device(3, 4, 4, 2), np.array([1, 7, 12])
        xt = diffusion.q_sample(x0, t, eps)
        found |= {f"{predicts} xt": xt, f"{predicts} step": diffusion.q_step(x0, t, eps),
                  f"{predicts} score": diffusion.score(xt, t, x0),
                  f"{predicts} var": diffusion.q_posterior(x0, xt, t)[1],
                  f"{predicts} x0": diffusion.to_x0(xt, t, eps, (-1, 1))}
    options = dict(image=(5, 6, 2), channels=(8, 16), classes=3, attention=(1,), heads=2,
                   dropout=0.1, dtype=np.float64)
    for fold in (False, True):
        net = td.UNet(**options, space_to_depth=fold)
        net.params.flat = 0.3 * device(net.params.flat.size)
        x, y = device(3, 5, 6, 2), np.array([0, 2, 3])
        out, back = net.forward(x, td.xp.asarray([1, 500, 999]), y, 1)
        found |= {f"out {fold}": out, f"dx {fold}": back(x), f"grads {fold}": net.grads.flat}
    images = np.clip(rng.standard_normal((7, 5, 6, 2)), -1, 1)
    for optimizer, loss in (("adamw", "l2"), ("muon", "huber"), ("muon", "l1")):
        net = td.UNet(**options)
        for state in td.train(net, diffusion, images, np.arange(7) % 3, steps=3, batch=8,
                              loss=loss, weighting="min_snr", optimizer=optimizer, lr=1e-3):
            found[f"{optimizer} {loss} {state.step}"] = np.array(state.loss)
        found |= {f"{optimizer} {loss} params": net.params.flat, f"{loss} ema": state.ema.flat}
    td.save(folder / "a.npz", net, diffusion, state)
    again, diffusion, state, _ = td.load(folder / "a.npz")
    found |= {"loaded": again.params.flat, "loaded m": state.optimizer.m}
    found["copied"] = copy.deepcopy(net).params.flat
    net.params.flat = 0.2 * device(net.params.flat.size)
    start = device(2, 5, 6, 2)
    model = td.guided(net, np.array([0, 2]), net.null, 2.0, rescale=0.7, interval=(2, 9))
    for name, options in (("ddpm", {}), ("ddpm", dict(variance="large")), ("ddim", {}),
                          ("ddim", dict(eta=0.5)), ("dpm_solver", {}), ("heun", {})):
        sampler = getattr(td, name)(model, diffusion, start, rng=3, steps=5,
                                    clip=td.dynamic_threshold, **options)
        found[f"{name} {options}"] = td.sample(sampler)
    bits = diffusion.bits_per_dim(model, td.xp.asarray(images[:2]), 4)
    found |= {f"bits {name}": np.array(value) for name, value in bits.items()}
    found["gradients"] = np.array([error < 1e-6 for _, error in islice(td.gradient_table(), 3)])
    return {name: td.asnumpy(a) for name, a in found.items()}


def assert_alike(found, expected):
    assert found.keys() == expected.keys()
    for name, a in expected.items():
        assert found[name].dtype == a.dtype, name
        np.testing.assert_allclose(found[name], a, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """NumPy's, in a process of its own where this one computes on a GPU."""
    folder = tmp_path_factory.mktemp("expected")
    if td.xp is np:
        return everything(folder)
    ran = run_python(__file__, str(folder), TINYDDPM_BACKEND="numpy")
    assert ran.returncode == 0, ran.stderr
    with np.load(folder / "all.npz") as file:
        return dict(file)


@pytest.fixture
def device(monkeypatch):
    """The stand-in, as tinyddpm's xp."""
    if td.xp is not np:
        pytest.skip("a real CuPy is here")
    monkeypatch.setattr(td, "xp", strict.xp)


def test_no_host_array_strays_among_the_device_s(expected, device, tmp_path):
    """All of tinyddpm on the stand-in; and nothing comes back but by asnumpy and float."""
    assert_alike(everything(tmp_path), expected)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm_solver", "heun"])
def test_drawing_never_waits_for_the_device(sampler, device):
    """The host hands the GPU one product after the other; whatever it reads back stops it."""
    net, start = td.UNet((4, 4, 1), (8,)), td.normal(0, (2, 4, 4, 1))
    model = td.guided(net, np.array([1, 2]), net.null, 1.5, rescale=0.5, interval=(2, 9))
    strict.WAITS.clear()
    walk = getattr(td, sampler)(model, td.Diffusion(td.cosine_betas(10)), start, rng=1, steps=5)
    td.sample(walk)
    assert not strict.WAITS


def test_a_step_of_training_waits_for_two_numbers(device):
    """The loss of each batch and the gradient's norm, by which it is clipped."""
    net, images = td.UNet((4, 4, 1), (8,), classes=0), np.zeros((2, 4, 4, 1)) - 0.5
    training = td.train(net, td.Diffusion(td.cosine_betas(10)), images, steps=4, batch=4,
                        accumulate=3)
    strict.WAITS.clear()
    for state in training:
        assert strict.WAITS == {"float": (3 + 1) * state.step}


REFUSED = [
    lambda xp, d, h: d + h, lambda xp, d, h: h @ d, lambda xp, d, h: d @ h,
    lambda xp, d, h: d + np.array(2.0), lambda xp, d, h: np.add(h, d),
    lambda xp, d, h: np.add(d, d, where=d > 0), lambda xp, d, h: d.sum(where=d > 0),
    lambda xp, d, h: xp.concatenate([d, h]), lambda xp, d, h: xp.where(h > 0, d, d),
    lambda xp, d, h: xp.full(3, 1.0, device="cpu"), lambda xp, d, h: xp.errstate,
    lambda xp, d, h: d.__setitem__(slice(None), h), lambda xp, d, h: np.asarray(d),
    lambda xp, d, h: h.__setitem__(slice(None), d), lambda xp, d, h: d.itemset]


def assert_refused(call, xp):
    with pytest.raises((TypeError, ValueError, AttributeError)):
        call(xp, xp.asarray(np.ones((3, 3))), np.ones((3, 3)))


@pytest.mark.parametrize("call", REFUSED)
def test_the_stand_in_is_as_strict_as_cupy(call):
    assert_refused(call, strict.xp)


@pytest.mark.gpu
def test_a_gpu_computes_the_same_and_refuses_the_same(expected, tmp_path):
    """CuPy 14 on a GPU."""
    assert_alike(everything(tmp_path), expected)
    for call in REFUSED:
        assert_refused(call, td.xp)


def test_the_tables_are_what_the_source_asks_for_and_cupy_has():
    """So that the stand-in, which allows only these, says the same without CuPy."""
    asked = {node.attr for node in ast.walk(ast.parse(SOURCE.read_text()))
             if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
             and node.value.id == "xp"}
    assert asked == strict.FUNCTIONS.keys() | {"lib"}
    cupy = pytest.importorskip("cupy", exc_type=ImportError)
    for owner, table in (cupy, strict.FUNCTIONS), (cupy.ndarray, strict.METHODS):
        for name, keywords in table.items():
            function = getattr(owner, name)
            try:
                takes = str(signature(function))
            except ValueError:          # compiled: the docstring's first line says it
                takes = function.__doc__.splitlines()[0]
            assert all(re.search(rf" {keyword}[:=]", takes) for keyword in keywords), name
    assert all(hasattr(cupy.ndarray, name) for name in strict.ATTRIBUTES)
    assert hasattr(cupy.lib.stride_tricks, "as_strided")


# ------------------------------------------------------------------------------- the choice

def run_python(*arguments, **variables):
    path = os.pathsep.join([str(SOURCE.parent), str(Path(__file__).parent)])
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True,
                          env=os.environ | dict(PYTHONPATH=path) | variables)


CUPY = {    # what stands for the package, and the backend chosen where none is asked for
    "works": ("import numpy\nclass A:\n    __matmul__ = get = lambda *_: A()\n"
              "ones = lambda shape: A()", "cupy"),
    "no driver": ("def ones(shape): raise RuntimeError('cudaErrorNoDevice')", "numpy"),
    "no libraries": ("raise ImportError('libcublas.so.12')", "numpy"),
}


@pytest.mark.parametrize("package, chosen", CUPY.values(), ids=CUPY)
def test_the_choice(package, chosen, tmp_path):
    """An import alone proves nothing. Left to itself the choice is what works; asked for by
    name, a CuPy that does not work is an error that says why."""
    (tmp_path / "cupy.py").write_text(package)
    code = (f"import sys; sys.path[:0] = [{str(tmp_path)!r}]\n"
            "import tinyddpm; print(tinyddpm.xp.__name__)")
    assert run_python("-c", code, TINYDDPM_BACKEND="").stdout == f"{chosen}\n"
    assert run_python("-c", code, TINYDDPM_BACKEND="numpy").stdout == "numpy\n"
    ran = run_python("-c", code, TINYDDPM_BACKEND="cupy")
    if chosen == "cupy":
        assert ran.stdout == "cupy\n"
    else:
        assert ran.returncode and package.split("'")[1] in ran.stderr.splitlines()[-1]


def test_an_unknown_backend():
    ran = run_python("-c", "import tinyddpm", TINYDDPM_BACKEND="abacus")
    assert ran.returncode and "'abacus'" in ran.stderr


def test_asnumpy_and_normal():
    """A CuPy array has .get(); whatever else is there goes through np.asarray. Noise is the
    Generator's."""
    a = np.arange(3)
    assert td.asnumpy(a) is a and td.asnumpy(types.SimpleNamespace(get=lambda: a)) is a
    assert np.array_equal(td.asnumpy([1, 2]), [1, 2])
    for dtype in (np.float32, np.float64):
        drawn = td.asnumpy(td.normal(7, (2, 3), dtype))
        assert drawn.dtype == dtype
        assert np.array_equal(drawn, np.random.default_rng(7).standard_normal((2, 3), dtype))


if __name__ == "__main__":
    np.savez(Path(sys.argv[1]) / "all.npz", **everything(Path(sys.argv[1])))
