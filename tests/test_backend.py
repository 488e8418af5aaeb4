"""Which array module is chosen; that CuPy has all that is asked of it; that a GPU computes the
same as NumPy.

Run as a script, `python test_backend.py FILE`, this file writes what its backend computes. The
GPU tests run it so with TINYDDPM_BACKEND=numpy, and compare.
"""
import ast
import inspect
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import tinyddpm as td
from test_layers import CASES, build, run_back

SOURCE = Path(td.__file__)


# -------------------------------------------------------------- what both backends compute

def everything():
    """Names and host arrays of all that a GPU could get wrong. Noise comes from the host."""
    found = {}
    for name in CASES:
        for dtype in (np.float32, np.float64):
            layer, p, inputs, g = build(name, dtype=dtype)
            y, back = layer(p, *inputs)
            gradients = run_back(back, td.normal(np.random.default_rng(1), y.shape, dtype), g)
            for part, a in zip(("y", "g", "dx", "dx2", "dx3"), (y, g.flat, *gradients)):
                found[f"{np.dtype(dtype)} {name} {part}"] = a

    diffusion, rng = td.Diffusion(td.cosine_betas(20)), np.random.default_rng(2)
    net = td.UNet(image=(5, 6, 2), channels=(8, 16), classes=3, attention=(1,), dropout=0.1,
                  fold=True, dtype=np.float64)
    images = td.asnumpy(td.xp.clip(td.normal(rng, (7, 5, 6, 2), np.float64), -1, 1))
    for state in td.train(net, diffusion, images, np.arange(7) % 3, steps=3, batch=8, chunk=8,
                          weighting="min_snr"):
        found[f"loss {state.step}"] = td.xp.asarray(state.loss)
    found |= {"params": net.params.flat, "ema": state.ema.flat, "m": state.adam.m}

    net.params.flat[:] = 0.2 * td.normal(rng, net.params.flat.shape, np.float64)
    start = td.normal(rng, (2, 5, 6, 2), np.float64)
    model = td.guided(net, np.array([0, 2]), net.null, w=2.0, rescale=0.7)
    options = dict(kind="v", clip=td.dynamic_threshold)
    for variance in ("small", "large"):
        found[f"ddpm {variance}"] = td.sample(td.ddpm(
            model, diffusion, start, np.random.default_rng(3), variance=variance, **options))
    for eta in (0.0, 0.5):
        found[f"ddim {eta}"] = td.sample(
            td.ddim(model, diffusion, start, np.random.default_rng(3), 7, eta, **options))
    x0 = td.xp.round(td.xp.clip(start, -1, 1) * 127.5 - 0.5) / 127.5 + 1 / 255
    bits = diffusion.bits_per_dim(net, x0, np.random.default_rng(4), kind="v")
    found |= {f"bits {name}": td.xp.asarray(value) for name, value in bits.items()}
    return {name: td.asnumpy(a) for name, a in found.items()}


# ------------------------------------------------------------------------------- the choice

class FakeArray:
    """What a backend's ones((2, 2)) gives: its product with itself sums to `total` or fails."""

    def __init__(self, total):
        self.total = total

    def __matmul__(self, other):
        if isinstance(self.total, Exception):
            raise self.total
        return self

    def sum(self):
        return self.total


def fake_cupy(total):
    module = types.ModuleType("cupy")
    module.ones = lambda shape, dtype: FakeArray(total)
    return module


UNUSABLE = {     # what stands for cupy, and what the reason has to say
    "not installed": (None, "ModuleNotFoundError|ImportError"),
    "no driver": (fake_cupy(RuntimeError("cudaErrorNoDevice: no device\nand more")),
                  "RuntimeError: cudaErrorNoDevice: no device"),
    "no libraries": (fake_cupy(ImportError("libcublas.so.12: cannot open")), "libcublas.so.12"),
    "an error without words": (fake_cupy(OSError()), "OSError"),
    "a wrong answer": (fake_cupy(7.0), "wrong"),
    "no answer": (fake_cupy(float("nan")), "wrong"),
}


@pytest.mark.parametrize("module, reason", UNUSABLE.values(), ids=UNUSABLE)
def test_cupy_that_does_not_work(module, reason, monkeypatch):
    """An import alone proves nothing. Left to itself the choice is numpy; asked for by name,
    cupy is an error that says why in one line."""
    monkeypatch.setitem(sys.modules, "cupy", module)
    assert td.choose_backend() is np
    with pytest.raises(RuntimeError, match=reason) as caught:
        td.choose_backend("cupy")
    assert "\n" not in str(caught.value) and "TINYDDPM_BACKEND" in str(caught.value)


def test_cupy_that_works(monkeypatch):
    module = fake_cupy(8.0)
    monkeypatch.setitem(sys.modules, "cupy", module)
    assert td.choose_backend() is td.choose_backend("") is td.choose_backend("cupy") is module
    assert td.choose_backend("numpy") is np


def test_numpy_by_name_does_not_touch_cupy(monkeypatch):
    """Where cupy hangs or crashes, this is the way around it."""
    class Trap:
        def find_spec(self, name, *_):
            assert name != "cupy"
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Trap(), *sys.meta_path])
    assert td.choose_backend("numpy") is np


@pytest.mark.parametrize("choice", ["torch", "NumPy", None, 1])
def test_an_unknown_backend(choice):
    with pytest.raises(ValueError, match=r"TINYDDPM_BACKEND is .*'numpy', 'cupy'"):
        td.choose_backend(choice)


def run_python(*arguments, **variables):
    path = os.pathsep.join([str(SOURCE.parent), str(Path(__file__).parent)])
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True,
                          env=os.environ | dict(PYTHONPATH=path) | variables)


def test_the_environment_variable_chooses():
    ran = run_python("-c", "import tinyddpm; print(tinyddpm.xp.__name__)",
                     TINYDDPM_BACKEND="numpy")
    assert ran.stdout == "numpy\n", ran.stderr
    ran = run_python("-c", "import tinyddpm", TINYDDPM_BACKEND="abacus")
    assert ran.returncode and "ValueError: TINYDDPM_BACKEND is 'abacus'" in ran.stderr


def test_asnumpy():
    """A CuPy array has .get(); whatever else is there goes through np.asarray."""
    a = np.arange(3)
    assert td.asnumpy(a) is a
    assert td.asnumpy(types.SimpleNamespace(get=lambda: a)) is a
    for value in ([1, 2], 5, np.float32(2)):
        assert isinstance(td.asnumpy(value), np.ndarray)
        assert np.array_equal(td.asnumpy(value), value)


def test_normal_is_the_generator_s():
    one, same = (np.random.default_rng(0) for _ in range(2))
    for dtype in (np.float32, np.float64):
        drawn = td.asnumpy(td.normal(one, (2, 3), dtype))
        assert drawn.dtype == dtype
        assert np.array_equal(drawn, same.standard_normal((2, 3), dtype=dtype))


# ------------------------------------------------------------------------- names in CuPy

def dotted(node):
    """lib.stride_tricks.as_strided of xp.lib.stride_tricks.as_strided; None of all else."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    is_xp = isinstance(node, ast.Name) and node.id == "xp"
    return ".".join(reversed(names)) if is_xp and names else None


NODES = list(ast.walk(ast.parse(SOURCE.read_text())))
CALLS = {}                                      # each name, and every keyword given to it
for node in NODES:
    if isinstance(node, ast.Attribute) and dotted(node):
        CALLS.setdefault(dotted(node), set())
for node in NODES:
    if isinstance(node, ast.Call) and dotted(node.func):
        CALLS[dotted(node.func)] |= {keyword.arg for keyword in node.keywords}
INNER = {name.rsplit(".", 1)[0] for name in CALLS if "." in name}       # lib, lib.stride_tricks


def test_the_names_are_found():
    """The search itself, so that the tests below are not about nothing."""
    assert {"asarray", "zeros_like", "lib.stride_tricks.as_strided"} <= CALLS.keys()
    assert "axis" in CALLS["quantile"] and len(CALLS) > 15


@pytest.mark.parametrize("name", CALLS)
def test_cupy_has_it(name):
    """The installed CuPy has every xp.name, and takes the keywords where it shows which."""
    found = pytest.importorskip("cupy")
    for part in name.split("."):
        assert hasattr(found, part), f"cupy has no {name}"
        found = getattr(found, part)
    if name in INNER or not CALLS[name]:
        return
    try:
        parameters = inspect.signature(found).parameters
    except (TypeError, ValueError):
        pytest.skip(f"cupy.{name} does not show its keywords")
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    assert open_ended or CALLS[name] <= parameters.keys()


# ------------------------------------------------------------------------------- on a GPU

def test_the_script_writes_what_numpy_computes(tmp_path):
    """The GPU test's other half, which needs no GPU: its numbers are finite and of one type."""
    ran = run_python(__file__, str(tmp_path / "host.npz"), TINYDDPM_BACKEND="numpy")
    assert ran.returncode == 0, ran.stderr
    with np.load(tmp_path / "host.npz") as file:
        found = dict(file)
    assert len(found) > 6 * len(CASES)
    assert all(np.isfinite(a).all() for a in found.values())
    assert all(a.any() for a in found.values() if a.size)
    assert {a.dtype.name for a in found.values()} == {"float32", "float64"}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What the GPU computes, and what NumPy does in a process of its own."""
    path = tmp_path_factory.mktemp("parity") / "host.npz"
    ran = run_python(__file__, str(path), TINYDDPM_BACKEND="numpy")
    assert ran.returncode == 0, ran.stderr
    with np.load(path) as file:
        return everything(), dict(file)


@pytest.mark.gpu
def test_a_gpu_computes_the_same(both):
    """Every layer and its gradients in both types; three steps of training; the samplers."""
    device, host = both
    assert device.keys() == host.keys()
    wrong = []
    for name, a in host.items():
        b, tolerance = device[name], 1e-4 if a.dtype == np.float32 else 1e-7
        if a.dtype != b.dtype or not np.allclose(a, b, rtol=tolerance, atol=tolerance):
            wrong.append(f"{name}: {a.dtype} {b.dtype}, {abs(a - b).max():.1e} apart")
    assert not wrong, "\n".join(wrong)


@pytest.mark.gpu
def test_results_stay_on_the_gpu():
    """A sampler, a network and a training step give device arrays, also with a device's rng."""
    net = td.UNet(image=(4, 4, 1), channels=(4,), classes=2)
    images = np.zeros((3, 4, 4, 1), np.float32)
    diffusion = td.Diffusion(td.linear_betas(5))
    state = next(td.train(net, diffusion, images, np.array([0, 1, 1]), steps=1, batch=4))
    start = td.normal(td.xp.random.default_rng(0), images.shape)
    made = td.sample(td.ddpm(net, diffusion, start, td.xp.random.default_rng(1)))
    for a in (net.params.flat, state.ema.flat, start, made, net(start, 1)):
        assert isinstance(a, td.xp.ndarray)


@pytest.mark.gpu
def test_a_checkpoint_crosses_over(tmp_path):
    """Saved from the GPU, read by NumPy: the same network."""
    net = td.UNet(image=(4, 4, 1), channels=(4,), classes=0)
    td.save(tmp_path / "a.npz", net)
    ran = run_python("-c", "import sys, tinyddpm as td; n = td.load(sys.argv[1])[0];"
                     "assert td.xp.__name__ == 'numpy'; print(n.params.flat.tobytes().hex())",
                     str(tmp_path / "a.npz"), TINYDDPM_BACKEND="numpy")
    assert ran.stdout.strip() == td.asnumpy(net.params.flat).tobytes().hex(), ran.stderr


if __name__ == "__main__":
    np.savez(sys.argv[1], **everything())
