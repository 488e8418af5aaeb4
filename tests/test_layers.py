"""The layers: each is its plain loop (loops.py), and each back its derivative's adjoint.

The derivatives come of the complex step: f(x + i h u) = f(x) + i h f'(x) u + O(h^2), so with
h = 1e-30 the imaginary part over h is the slope along u to the last digits of float64, with no
difference of near numbers. It shares nothing with tinyddpm's own check, by finite differences.
"""
import copy
import math
import pickle
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import loops
import tinyddpm as td
from common import close, refused

pytestmark = pytest.mark.skipif(td.xp is not np, reason="these run with TINYDDPM_BACKEND=numpy")


# ------------------------------------------------------------------- every layer in one form

class Shape(NamedTuple):
    B: int = 2
    H: int = 3
    W: int = 4
    C: int = 4
    D: int = 6
    heads: int = 2


SHAPES = st.builds(Shape, *[st.integers(1, n) for n in (3, 4, 4, 5, 4, 3)])
LABELS = {"time1": td.product_layout(4, 5), "time2": td.product_layout(5, 5),
          "label": ((3, 5), 1)}


def moved(layer, back, factor=1):
    """A layer that only moves numbers, whose back is another of them but for a factor."""
    return lambda x: (layer(x), lambda dy: factor * back(dy))


def halve(h):
    """Stands in for dropout: not random, and not nothing."""
    return h / 2, lambda dy: dy / 2


def res_block(p, x, emb):
    """With the embedding's gradient handed back, and not added to."""
    demb = np.zeros_like(emb)
    y, back = td.res_block(p, x, emb, demb, halve, heads=2)

    def back_both(dy):
        demb[:] = 0
        return back(dy), demb.copy()
    return y, back_both


def cases(s):
    """name: a layer(p, *inputs), its loop, the layout of p, the shapes of the inputs. Without
    a layout, neither takes a p."""
    x, wide, widest = ((s.B, s.H, s.W, C) for C in (s.C, 2 * s.C, 2 * s.C * s.heads))
    large, t, y = (s.B, 2 * s.H, 2 * s.W, s.C), 99 * np.arange(s.B), np.arange(s.B)[::-1] % 3
    product, two = td.product_layout(s.C, s.D), td.product_layout(s.D, 3)
    return {
        "silu": (td.silu, loops.silu, {}, [x]),
        "linear": (td.linear, loops.linear, product, [x]),
        "linear, rows": (td.linear, loops.linear, product, [(s.B, s.C)]),
        "conv3x3": (td.conv3x3, loops.conv3x3, td.product_layout(3, 3, s.C, s.D), [x]),
        "group_norm": (partial(td.group_norm, groups=2), partial(loops.group_norm, groups=2),
                       {}, [wide, (s.B, 2 * s.C), (s.B, 2 * s.C)]),
        "norm": (td.norm, loops.norm, td.norm_layout(2 * s.C), [wide]),
        "dropout": (partial(td.dropout, rate=0.3, rng=1), None, {}, [x]),
        "attention": (partial(td.attention, heads=s.heads),
                      partial(loops.attention, heads=s.heads),
                      td.attention_layout(2 * s.C * s.heads), [widest]),
        "space_to_depth": (moved(td.space_to_depth, td.depth_to_space), loops.space_to_depth,
                           {}, [large]),
        "depth_to_space": (moved(td.depth_to_space, td.space_to_depth), loops.depth_to_space,
                           {}, [(*x[:3], 4 * s.C)]),
        "average_pool": (moved(td.average_pool, td.upsample, 0.25), loops.average_pool, {},
                         [large]),
        "upsample": (moved(td.upsample, td.average_pool, 4), loops.upsample, {}, [x]),
        "embed": (partial(td.embed, t=t, y=y), partial(loops.embed, t=t, y=y), LABELS, []),
        "sequential": (
            lambda p, x: td.sequential(x, [partial(td.linear, q) for q in p.one] + [td.silu]),
            lambda p, x: loops.silu(loops.linear(p.one[1], loops.linear(p.one[0], x))),
            {"one": [product, two]}, [(s.B, s.C)]),
        "res_block": (res_block, partial(loops.res_block, drop=lambda h: h / 2, heads=2),
                      td.res_block_layout(2 * s.C, 2 * s.D, 3, True), [wide, (s.B, 3)]),
    }


NAMES = list(cases(Shape()))
every_layer = pytest.mark.parametrize("name", NAMES)


def build(name, shape=Shape(), dtype=np.float64):
    """layer(p, *inputs), its loop alike, a p of which no number is 0, and inputs."""
    layer, loop, layout, sizes = cases(shape)[name]
    rng, n = np.random.default_rng(0), sum(math.prod(size) for _, size, _ in td.leaves(layout))
    p = td.Params(layout, td.normal(rng, n, dtype), np.zeros(n, dtype))
    if not layout:
        layer, loop = (lambda p, *a, f=f: f(*a) for f in (layer, loop))
    return layer, loop, p, [td.normal(rng, size, dtype) for size in sizes]


def gradients(back, dy):
    """Those of the inputs as a list, however many there are."""
    dx = back(dy)
    return list(dx) if isinstance(dx, tuple) else [] if dx is None else [dx]


# ------------------------------------------------------------------------------------ values

@pytest.mark.parametrize("name", [name for name in NAMES if name != "dropout"])
@settings(max_examples=15)
@given(shape=SHAPES)
def test_a_layer_is_its_loop(name, shape):
    layer, loop, p, inputs = build(name, shape)
    close(layer(p, *inputs)[0], loop(p, *inputs))


@given(shape=SHAPES, few=st.integers(1, 6))
def test_im2col_takes_as_many_images_as_its_budget_has_room_for(shape, few):
    """Every pixel's 3x3 pixels, zero beyond the edge, in the order of the batch; whole images,
    and at least one at a time."""
    B, H, W, C = shape[:4]
    x, size = np.random.default_rng(0).standard_normal(shape[:4]), 9 * C * H * W
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = [padded[b, i:i + 3, j:j + 3].ravel() for b, i, j in np.ndindex(B, H, W)]
    for budget in (few * size, few * size + size - 1):
        found = list(td.im2col(x, budget))
        assert [(rows.start, rows.stop) for rows, _ in found] == [
            (i * H * W, min(i + few, B) * H * W) for i in range(0, B, few)]
        assert np.array_equal(np.concatenate([around for _, around in found]), windows)
    assert len(list(td.im2col(x, 0))) == B


@pytest.mark.parametrize("few", [1, 2, 3])
def test_conv3x3_in_portions_is_conv3x3(few, monkeypatch):
    layer, _, p, (x,) = build("conv3x3", Shape(B=5))
    y, back = layer(p, x)
    whole = [y, back(y), p.grad.flat.copy()]
    p.grad.flat = 0
    monkeypatch.setattr(td, "im2col", partial(td.im2col, budget=few * 9 * 4 * 12))
    y, back = layer(p, x)
    for a, b in zip([y, back(y), p.grad.flat], whole):
        close(a, b)


def test_large_numbers_do_not_overflow():
    """exp(1000) does; silu and the softmax of attention do not."""
    layer, _, p, (x,) = build("attention")
    p.qkv.w *= 1000
    with np.errstate(over="raise", invalid="raise"):
        assert np.isfinite(layer(p, x)[0]).all()
        y, back = td.silu(np.array([-1e4, 0.0, 1e4]))
        close([y, back(np.ones(3))], [[0, 0, 1e4], [0, 0.5, 1]])


@pytest.mark.parametrize("C, groups", [(1, 1), (4, 4), (6, 2), (8, 8), (12, 4), (24, 8)])
def test_group_norm_takes_the_greatest_common_divisor(C, groups):
    """Each of so many groups, and no smaller part, comes to mean 0 and variance 1."""
    x = 5 + np.random.default_rng(0).standard_normal((2, 3, 3, C))
    y = td.group_norm(x, np.zeros(C), np.zeros(C))[0].reshape(2, 9, groups, -1)
    close(y.mean((1, 3)), 0)
    close(y.var((1, 3)), 1, 1e-4)
    assert C == groups or abs(y.mean(1)).min() > 1e-4


def test_group_norm_at_a_single_pixel_is_not_blind():
    """A group of one value is 0 whatever it was: so all are one group; one alone is refused."""
    x, zero = np.random.default_rng(0).standard_normal((2, 1, 1, 8)), np.zeros(8)
    y, back = td.group_norm(x, zero, zero)
    close(y, loops.group_norm(x, zero, zero, 1))
    assert np.all(y) and np.all(back(x ** 2)[0])
    refused((2, 1, 1, 1), td.group_norm, x[..., :1], zero[:1], zero[:1])


@pytest.mark.parametrize("mean", [0, 3000])
def test_group_statistics_keep_their_digits(mean):
    """In float32, far from 0, E[x^2] - E[x]^2 would have none left."""
    x = (mean + np.random.default_rng(0).standard_normal((2, 8, 8, 16))).astype(np.float32)
    y, exact = (td.group_norm(a, np.zeros(16, a.dtype), np.zeros(16, a.dtype))[0]
                for a in (x, x.astype(np.float64)))
    close(y, exact, 2e-3)


@pytest.mark.parametrize("rate", [0.1, 0.9])
def test_dropout_zeroes_its_share_and_scales_the_rest(rate):
    """Each number on its own: no image, row, column or channel goes as one."""
    y, back = td.dropout(np.ones((20, 20, 20, 20)), rate, np.random.default_rng(0))
    assert set(np.unique(y)) == {0, 1 / (1 - rate)}
    assert abs((y == 0).mean() - rate) < 5 * (rate * (1 - rate) / y.size) ** 0.5    # deviations
    for axis in range(4):       # along it most cells have both kinds, at least 1 - .9^20
        assert (y.min(axis) < y.max(axis)).mean() > 0.8
    assert np.array_equal(back(np.ones_like(y)), y)     # the same ones come back, scaled alike


@pytest.mark.parametrize("rate", [0.125, 0.5, 0.875])
def test_dropout_zeroes_exactly_its_share_of_even_draws(rate):
    """Generators draw from [0, 1), 0 included and 1 not: the edge belongs to what stays."""
    class Even(np.random.Generator):
        def random(self, shape, dtype):
            return (np.arange(8) / 8).astype(dtype).reshape(shape)
    y, _ = td.dropout(np.ones((8, 1)), rate, Even(np.random.PCG64(0)))
    assert (y == 0).mean() == rate


@pytest.mark.parametrize("rate, rng", [(0.5, None), (0, 0), (0.0, np.random.default_rng(0))])
def test_dropout_off(rate, rng):
    x = np.random.default_rng(0).standard_normal((2, 3))
    y, back = td.dropout(x, rate, rng)
    assert np.array_equal(y, x) and np.array_equal(back(x), x)


def test_only_a_layer_with_a_table_of_labels_looks_at_them():
    layout, t = {name: LABELS[name] for name in ("time1", "time2")}, np.array([1, 50, 999])
    p = td.initial(layout, 0, np.float64)
    for y in (None, np.array([7, 8, 9])):
        close(td.embed(p, t, y)[0], loops.embed(p, t, None))


# --------------------------------------------------------------------------------- gradients

def slopes(layer, p, inputs, dp, dinputs, h=1e-30):
    """How the layer's value changes along (dp, dinputs), by the complex step."""
    shifted = td.Params(p.layout, p.flat + 1j * h * dp)
    return layer(shifted, *[x + 1j * h * dx for x, dx in zip(inputs, dinputs)])[0].imag / h


@every_layer
@settings(max_examples=20)
@given(shape=SHAPES, seed=st.integers(0, 1000))
def test_back_is_the_adjoint_of_the_derivative(name, shape, seed):
    """<c, J u> = <J^T c, u> for random c and u: J u by the complex step, J^T c by back."""
    layer, _, p, inputs = build(name, shape)
    rng = np.random.default_rng(seed)
    y, back = layer(p, *inputs)
    c, dp = rng.standard_normal(y.shape), rng.standard_normal(p.flat.shape)
    dinputs = [rng.standard_normal(x.shape) for x in inputs]
    forward = c * slopes(layer, p, inputs, dp, dinputs)
    backward = sum((dx * u).sum() for dx, u in zip(gradients(back, c), dinputs, strict=True))
    assert abs(forward.sum() - backward - p.grad.flat @ dp) <= 1e-11 * (9 + abs(forward).sum())


@every_layer
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_layers_are_pure_and_keep_their_type(name, dtype):
    """No layer changes its inputs, its parameters or the dy it is given; called again, back
    returns the same once more and adds the same once more."""
    layer, _, p, inputs = build(name, dtype=dtype)
    y, back = layer(p, *inputs)
    dy = td.normal(2, y.shape, dtype)
    held = [p.flat, *inputs, y, dy]
    before = [a.copy() for a in held]
    first, once = [a.copy() for a in gradients(back, dy)], p.grad.flat.copy()
    again = gradients(back, dy)
    for a, b in zip([*held, *again], [*before, *first], strict=True):
        assert np.array_equal(a, b) and a.dtype == dtype
    assert [a.shape for a in again] == [a.shape for a in inputs]
    close(p.grad.flat, 2 * once, 1e-5)


# -------------------------------------------------------------------------- Params, layouts

LAYOUT = {"a": ((2, 3), 1), "b": [td.product_layout(3, 2), {"c": ((4,), 2)}], "d": ((), 0)}


def test_names_are_views_of_the_flat_buffer_in_the_layout_s_order():
    flat = np.arange(19.0)
    p = td.Params(LAYOUT, flat, np.zeros(19))
    parts = [p.a, p.b[0].w, p.b[0].b, p.b[1].c, p.d]
    assert [part.shape for part in parts] == [(2, 3), (3, 2), (2,), (4,), ()]
    assert np.array_equal(np.concatenate([part.ravel() for part in parts]), flat)
    assert [name for name, _, _ in td.leaves(LAYOUT)] == ["a", "b.0.w", "b.0.b", "b.1.c", "d"]
    p.b[1].c[1] = 7
    p.b[0].grad.w += 1
    p.grad.b[0].w += 1
    assert flat[15] == 7 and p.grad.flat.sum() == 12 and p.b[0].flat.size == 8


@pytest.mark.parametrize("copied", [lambda p: p, copy.copy, copy.deepcopy,
                                    lambda p: pickle.loads(pickle.dumps(p))])
def test_no_assignment_and_no_copy_parts_names_from_the_buffer(copied):
    p = copied(td.Params(LAYOUT, np.arange(19.0), np.arange(19.0)))
    assert np.array_equal(p.flat, np.arange(19)) and np.array_equal(p.grad.flat, p.flat)
    p.flat = np.full(19, 3.0)
    assert np.all(p.a == 3) and np.all(p.b[1].c == 3)
    p.b[0].w = np.ones((3, 2))
    p.b[0].w *= 5
    p.grad.flat = 2
    assert p.flat.sum() == 13 * 3 + 6 * 5 and np.all(p.b[0].grad.w == 2)


@pytest.mark.parametrize("name, shape", [("flat", (18,)), ("flat", (19, 19)), ("a", (3, 2))])
def test_a_value_of_another_shape_is_refused(name, shape):
    p = td.Params(LAYOUT, np.zeros(19))
    with pytest.raises(ValueError):
        setattr(p, name, np.ones(shape))
    with pytest.raises(AttributeError):
        p.misspelt = np.ones(shape)
    assert not p.flat.any()


@pytest.mark.parametrize("shape", [(18,), (20,), (19, 1)])
def test_a_buffer_of_another_size_is_refused(shape):
    refused(shape, td.Params, LAYOUT, np.zeros(shape))


def test_initial_draws_each_parameter_by_its_deviation():
    layout = {"a": ((99, 99), 2.0), "b": ((50,), 0), "c": [((9, 999), 0.5)]}
    p = td.initial(layout, 0)
    assert abs(p.a.std() - 2) < 0.05 and abs(p.c[0].std() - 0.5) < 0.02 and not p.b.any()
    assert p.flat.dtype == p.grad.flat.dtype == np.float32 and not p.grad.flat.any()
    again, other = td.initial(layout, np.random.default_rng(0)), td.initial(layout, 1)
    assert np.array_equal(p.flat, again.flat) and not np.array_equal(p.flat, other.flat)


def test_deviations_that_layouts_ask_for():
    """C^-1/2 for a product and (9 C)^-1/2 for a convolution keep the variance of what comes in;
    what attention adds to x starts at 0, and so do biases, scales and shifts."""
    assert td.product_layout(4, 9) == {"w": ((4, 9), 1 / 2), "b": ((9,), 0)}
    assert td.product_layout(3, 3, 4, 9, gain=2) == {"w": ((3, 3, 4, 9), 1 / 3), "b": ((9,), 0)}
    assert list(td.leaves(td.attention_layout(9))) == [
        ("norm.scale", (9,), 0), ("norm.shift", (9,), 0), ("qkv.w", (9, 27), 1 / 3),
        ("qkv.b", (27,), 0), ("out.w", (9, 9), 0), ("out.b", (9,), 0)]
