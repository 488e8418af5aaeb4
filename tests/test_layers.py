"""The layers: their values against plain loops, their gradients two ways.

Finite differences are tinyddpm's own check. The second way shares nothing with it: the complex
step. f(x + i h u) = f(x) + i h f'(x) u + O(h^2), so with h = 1e-30 the imaginary part over h is
the directional derivative, without cancellation, to the last digits of float64.
"""
import copy
import math
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import tinyddpm as td
from common import close

pytestmark = pytest.mark.skipif(td.xp is not np, reason="these run with TINYDDPM_BACKEND=numpy")
SOURCE = Path(td.__file__)


# ------------------------------------------------------------------- every layer in one form

class Shape(NamedTuple):
    B: int = 2
    H: int = 3
    W: int = 4
    C: int = 4
    D: int = 6
    heads: int = 2


def shapes(*largest):
    """Shapes of sizes from 1 to the largest given, and the defaults for the rest."""
    return st.tuples(*[st.integers(1, n) for n in largest]).map(lambda sizes: Shape(*sizes))


SHAPES = shapes(3, 4, 4, 5, 4, 3)


def free(layer, *options):
    """A layer without parameters, called as if it had some."""
    return lambda p, *inputs: layer(*inputs, *options)


def moved(layer, back, factor=1.0):
    """A layer that only moves numbers, whose back is another of them, but for a factor."""
    return lambda p, x: (layer(x), lambda dy: factor * back(dy))


def halve(h):
    """Stands in for dropout: not random, and not nothing."""
    return h / 2, lambda dy: dy / 2


def block(p, x, emb, heads=1):
    """res_block with the embedding's gradient handed back, and not added to."""
    demb = np.zeros_like(emb)
    y, back = td.res_block(p, x, emb, demb, halve, heads)

    def back_both(dy):
        demb[:] = 0
        return back(dy), demb.copy()
    return y, back_both


def embed_of(s):
    t, labels = 100 * np.arange(1, s.B + 1), np.arange(s.B)[::-1]
    layout = {"time1": td.product_layout(4, s.D), "time2": td.product_layout(s.D, s.D),
              "label": ((s.B, s.D), 1)}
    return lambda p: td.embed(p, t, labels), layout, []


# name: for a Shape, layer(p, *inputs) -> y, back(dy); its layout; the shapes of its inputs
CASES = {
    "silu": lambda s: (free(td.silu), {}, [(s.B, s.H, s.W, s.C)]),
    "linear": lambda s: (td.linear, td.product_layout(s.C, s.D), [(s.B, s.H, s.W, s.C)]),
    "linear, rows": lambda s: (td.linear, td.product_layout(s.C, s.D), [(s.B, s.C)]),
    "conv3x3": lambda s: (td.conv3x3, td.product_layout(3, 3, s.C, s.D),
                          [(s.B, s.H, s.W, s.C)]),
    "group_norm": lambda s: (free(td.group_norm, 2), {},
                             [(s.B, s.H, s.W, 2 * s.C), (s.B, 2 * s.C), (s.B, 2 * s.C)]),
    "norm": lambda s: (td.norm, td.norm_layout(2 * s.C), [(s.B, s.H, s.W, 2 * s.C)]),
    "dropout": lambda s: (free(td.dropout, 0.3, 1), {}, [(s.B, s.H, s.W, s.C)]),
    "space_to_depth": lambda s: (moved(td.space_to_depth, td.depth_to_space), {},
                                 [(s.B, 2 * s.H, 2 * s.W, s.C)]),
    "depth_to_space": lambda s: (moved(td.depth_to_space, td.space_to_depth), {},
                                 [(s.B, s.H, s.W, 4 * s.C)]),
    "average_pool": lambda s: (moved(td.average_pool, td.upsample, 0.25), {},
                               [(s.B, 2 * s.H, 2 * s.W, s.C)]),
    "upsample": lambda s: (moved(td.upsample, td.average_pool, 4), {},
                           [(s.B, s.H, s.W, s.C)]),
    "attention": lambda s: (lambda p, x: td.attention(p, x, s.heads),
                            td.attention_layout(2 * s.C * s.heads),
                            [(s.B, s.H, s.W, 2 * s.C * s.heads)]),
    "sequential": lambda s: (
        lambda p, x: td.sequential(x, [partial(td.linear, p.one), td.silu, td.silu,
                                       partial(td.linear, p.two)]),
        {"one": td.product_layout(s.C, s.D), "two": td.product_layout(s.D, 3)},
        [(s.B, s.C)]),
    "embed": embed_of,
    "res_block": lambda s: (block, td.res_block_layout(2 * s.C, 2 * s.D, 3, attended=True),
                            [(s.B, s.H, s.W, 2 * s.C), (s.B, 3)]),
}
every_layer = pytest.mark.parametrize("name", CASES)


def random_params(layout, rng, dtype=np.float64):
    flat = np.concatenate([rng.standard_normal(math.prod(shape)).astype(dtype)
                           for _, shape, _ in td.leaves(layout)] or [np.zeros(0, dtype)])
    return td.Params(layout, flat, np.zeros_like(flat))


def build(name, shape=Shape(), dtype=np.float64):
    """A layer with random parameters and inputs: layer, p, inputs."""
    rng = np.random.default_rng(0)
    layer, layout, sizes = CASES[name](shape)
    p = random_params(layout, rng, dtype)
    return layer, p, [td.normal(rng, size, dtype) for size in sizes]


def run_back(back, dy):
    """The gradients of the inputs as a tuple, however many there are."""
    dinputs = back(dy)
    return dinputs if isinstance(dinputs, tuple) else () if dinputs is None else (dinputs,)


# -------------------------------------------------------------- the layers again, as loops

def slow_linear(p, x):
    y = np.zeros((*x.shape[:-1], p.w.shape[1]))
    for place in np.ndindex(x.shape[:-1]):
        for d in range(p.w.shape[1]):
            y[*place, d] = sum(x[*place, c] * p.w[c, d] for c in range(x.shape[-1])) + p.b[d]
    return y


def slow_conv(p, x):
    B, H, W, C = x.shape
    y = np.zeros((B, H, W, p.w.shape[3])) + p.b
    for b in range(B):
        for i in range(H):
            for j in range(W):
                for di in range(3):
                    for dj in range(3):
                        for c in range(C):
                            u, v = i + di - 1, j + dj - 1
                            if 0 <= u < H and 0 <= v < W:
                                y[b, i, j] += x[b, u, v, c] * p.w[di, dj, c]
    return y


def slow_group_norm(x, scale, shift, groups):
    groups = groups if x[0, :, :, 0].size > 1 else 1        # a single pixel is one group
    y, size = np.zeros_like(x), x.shape[3] // groups
    for b in range(len(x)):
        for part in (slice(k * size, (k + 1) * size) for k in range(groups)):
            group = x[b, :, :, part]
            y[b, :, :, part] = (group - group.mean()) / (group.var() + 1e-5) ** 0.5
    return y * (1 + scale[:, None, None]) + shift[:, None, None]


def slow_norm(p, x):
    one = np.ones((len(x), 1))
    return slow_group_norm(x, one * p.scale, one * p.shift, math.gcd(8, x.shape[3]))


def slow_silu(x):
    return x / (1 + np.exp(-x))


def slow_attention(p, x, heads):
    """Columns of qkv: all of q, then of k, then of v; in each, head after head."""
    B, H, W, C = x.shape
    size, y = C // heads, np.zeros((B, H * W, C))
    qkv = slow_linear(p.qkv, slow_norm(p.norm, x)).reshape(B, H * W, 3 * C)
    for b in range(B):
        for head in range(heads):
            mine = np.arange(head * size, (head + 1) * size)
            q, k, v = (qkv[b][:, part * C + mine] for part in range(3))
            for i in range(H * W):
                weight = np.array([math.exp(q[i] @ k[j] / size ** 0.5) for j in range(H * W)])
                y[b, i, mine] = weight / weight.sum() @ v
    return x + slow_linear(p.out, y.reshape(x.shape))


def slow_res_block(p, x, emb):
    h = slow_conv(p.conv1, slow_silu(slow_norm(p.norm1, x)))
    scale, shift = np.split(slow_linear(p.scale_shift, emb), 2, axis=1)
    h = slow_group_norm(h, scale, shift, math.gcd(8, h.shape[3]))
    h = slow_conv(p.conv2, halve(slow_silu(h))[0])
    y = h + (slow_linear(p.skip, x) if hasattr(p, "skip") else x)
    return slow_attention(p.attention, y, 1) if hasattr(p, "attention") else y


SLOW = {"silu": lambda p, x: slow_silu(x), "linear": slow_linear, "linear, rows": slow_linear,
        "conv3x3": slow_conv, "norm": slow_norm, "res_block": slow_res_block,
        "group_norm": lambda p, *inputs: slow_group_norm(*inputs, 2)}


# ------------------------------------------------------------------------------------ values

@pytest.mark.parametrize("name", SLOW)
@settings(max_examples=15)
@given(shape=SHAPES)
def test_value_is_that_of_the_loop(name, shape):
    layer, p, inputs = build(name, shape)
    close(layer(p, *inputs)[0], SLOW[name](p, *inputs))


@settings(max_examples=15)
@given(shape=SHAPES)
def test_attention_is_a_weighted_mean_in_each_head(shape):
    layer, p, (x,) = build("attention", shape)
    close(layer(p, x)[0], slow_attention(p, x, shape.heads))


@given(shape=shapes(5, 4, 4, 3), few=st.integers(1, 6))
def test_im2col(shape, few):
    """Every pixel's 3x3 pixels, zero beyond the edge; so many whole images at a time as the
    budget has room for, but at least one, in the order of the batch."""
    B, H, W, C = shape[:4]
    x, size = np.random.default_rng(0).standard_normal(shape[:4]), 9 * C * H * W
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    wanted = [padded[b, i:i + 3, j:j + 3].ravel() for b, i, j in np.ndindex(B, H, W)]
    for budget in (few * size, few * size + size - 1):
        found = list(td.im2col(x, budget))
        assert [(rows.start, rows.stop) for rows, _ in found] == [
            (i * H * W, min(i + few, B) * H * W) for i in range(0, B, few)]
        assert np.array_equal(np.concatenate([around for _, around in found]), wanted)
    assert len(list(td.im2col(x, 0))) == B


def test_conv3x3_takes_a_few_images_at_a_time():
    """What it does in portions, for the cache, is what it does image by image. Five images of
    this size are more than one portion, and not a whole number of them."""
    layer, p, (x,) = build("conv3x3", Shape(5, 16, 16, 32, 32))
    assert 1 < sum(1 for _ in td.im2col(x)) < 5
    y, back = layer(p, x)
    dx, whole = back(y), p.grad.flat.copy()
    p.grad.flat = 0
    for i in range(5):
        yi, back = layer(p, x[i:i + 1])
        close(yi, y[i:i + 1])
        close(back(y[i:i + 1]), dx[i:i + 1], 1e-9)
    close(p.grad.flat, whole, 1e-9)         # each image added its part


def test_attention_weights_survive_large_logits():
    """exp(1000) overflows; the softmax must not."""
    layer, p, (x,) = build("attention")
    p.qkv.w *= 1000
    with np.errstate(over="raise", invalid="raise"):
        assert np.isfinite(layer(p, x)[0]).all()


def test_silu_does_not_overflow():
    with np.errstate(over="raise", invalid="raise"):
        y, back = td.silu(np.array([-1e4, 0.0, 1e4]))
        close(y, [0, 0, 1e4])
        close(back(np.ones(3)), [0, 0.5, 1])


@pytest.mark.parametrize("C, groups", [(1, 1), (4, 4), (6, 2), (8, 8), (12, 4), (24, 8)])
def test_group_norm_takes_the_greatest_common_divisor(C, groups):
    """Eight groups where eight divides the channels, else the most that do of 8's divisors."""
    x, zero = np.random.default_rng(0).standard_normal((2, 3, 3, C)), np.zeros((2, C))
    close(td.group_norm(x, zero, zero)[0], slow_group_norm(x, zero, zero, groups))


@given(shape=SHAPES)
def test_space_to_depth_puts_four_pixels_into_one(shape):
    """Channels of the new picture: upper left, upper right, lower left, lower right."""
    _, _, (x,) = build("space_to_depth", shape)
    y, C = td.space_to_depth(x), shape.C
    for i, j in np.ndindex(2, 2):
        k = 2 * i + j
        assert np.array_equal(y[..., k * C:(k + 1) * C], x[:, i::2, j::2])
    assert np.array_equal(td.depth_to_space(y), x)


@given(shape=SHAPES)
def test_average_pool_and_upsample(shape):
    _, _, (x,) = build("average_pool", shape)
    y = td.average_pool(x)
    for b, i, j, c in np.ndindex(y.shape):
        close(y[b, i, j, c], x[b, 2 * i:2 * i + 2, 2 * j:2 * j + 2, c].mean())
    assert np.array_equal(td.upsample(y), y.repeat(2, axis=1).repeat(2, axis=2))


@pytest.mark.parametrize("E", [4, 6, 32])
def test_timestep_embedding(E):
    """First a sine of the step itself, at last a cosine of a ten-thousandth of it."""
    t = np.array([0, 1, 17, 1000])
    y, half = td.timestep_embedding(t, E), E // 2
    assert y.shape == (4, E)
    for i, step in enumerate(t):
        for k in range(half):
            angle = step / 10000 ** (k / (half - 1))
            close([y[i, k], y[i, half + k]], [math.sin(angle), math.cos(angle)])


def test_embed():
    """silu(linear(silu(linear(sinusoids))) + the label's row); where there is no table of
    labels, no row, whatever they are."""
    rng, t, labels = np.random.default_rng(0), np.array([1, 50, 999]), np.array([2, 0, 2])
    layout = embed_of(Shape(B=3, D=5))[1]
    p = random_params(layout, rng)
    h = slow_linear(p.time2, slow_silu(slow_linear(p.time1, td.timestep_embedding(t, 4))))
    close(td.embed(p, t, labels)[0], slow_silu(h + p.label[labels]))
    del layout["label"]
    p = td.Params(layout, p.flat[:-15])
    for y in (labels, None):
        close(td.embed(p, t, y)[0], slow_silu(h))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_zeroes_its_share_and_scales_the_rest(rate):
    n = 100_000
    y, back = td.dropout(np.ones((n, 1)), rate, np.random.default_rng(0))
    assert set(np.unique(y)) == {0, 1 / (1 - rate)}
    assert abs((y == 0).mean() - rate) < 5 * (rate * (1 - rate) / n) ** 0.5     # 5 deviations
    assert np.array_equal(back(np.ones((n, 1))), y)     # the same ones come back, scaled alike


@pytest.mark.parametrize("rate", [0.125, 0.5, 0.875])
def test_dropout_zeroes_exactly_its_share_of_even_draws(rate):
    """Generators draw from [0, 1), 0 included and 1 not: the edge belongs to what stays."""
    class Even(np.random.Generator):
        def random(self, shape, dtype):
            n = math.prod(shape)
            return (np.arange(n) / n).astype(dtype).reshape(shape)
    y, _ = td.dropout(np.ones((8, 1)), rate, Even(np.random.PCG64(0)))
    assert (y == 0).mean() == rate


@pytest.mark.parametrize("rate, rng", [(0.5, None), (0, np.random.default_rng(0))])
def test_dropout_off(rate, rng):
    x = np.random.default_rng(0).standard_normal((2, 3))
    y, back = td.dropout(x, rate, rng)
    assert np.array_equal(y, x) and np.array_equal(back(x), x)


# --------------------------------------------------------------------------------- gradients

def complex_step(layer, p, inputs, dp, dinputs, h=1e-30):
    """How the layer's value changes along (dp, dinputs)."""
    shifted = td.Params(p.layout, p.flat + 1j * h * dp)
    return layer(shifted, *[x + 1j * h * dx for x, dx in zip(inputs, dinputs)])[0].imag / h


@every_layer
@settings(max_examples=20)
@given(shape=SHAPES)
def test_back_is_the_adjoint_of_the_derivative(name, shape):
    """<c, J u> = <J^T c, u> for random c and u: J u by the complex step, J^T c by back."""
    layer, p, inputs = build(name, shape)
    rng = np.random.default_rng(1)
    y, back = layer(p, *inputs)
    c, dp = rng.standard_normal(y.shape), rng.standard_normal(p.flat.shape)
    dinputs = [rng.standard_normal(x.shape) for x in inputs]
    forward = c * complex_step(layer, p, inputs, dp, dinputs)
    gradients = run_back(back, c)
    backward = p.grad.flat @ dp + sum((dx * a).sum() for dx, a in zip(gradients, dinputs))
    assert abs(forward.sum() - backward) <= 1e-12 * (1000 + abs(forward).sum())


@every_layer
@pytest.mark.parametrize("shape", [Shape(), Shape(1, 5, 1, 3, 2, 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_finite_differences(name, shape, dtype):
    """In float64 whatever it is given; and what it is given stays as it was."""
    layer, p, inputs = build(name, shape, dtype)
    before = p.flat.copy()
    errors = dict(td.gradient_errors(layer, p, inputs))
    assert len(errors) == len(inputs) + len(list(td.leaves(p.layout)))      # each has its row
    assert all(error <= 1e-6 for error in errors.values()), errors
    assert np.array_equal(p.flat, before) and p.flat.dtype == dtype


def test_the_check_walks_lists_and_takes_layers_without_parameters():
    layout = {"parts": [td.product_layout(3, 3), {"inner": [td.product_layout(3, 3)]}]}
    p = random_params(layout, np.random.default_rng(0), np.float32)

    def layer(p, x):
        return td.sequential(x, [partial(td.linear, p.parts[0]), td.silu,
                                 partial(td.linear, p.parts[1].inner[0])])
    x = np.random.default_rng(1).standard_normal((2, 3))
    errors = dict(td.gradient_errors(layer, p, [x]))
    assert set(errors) == {"input 1", "parts.0.w", "parts.0.b", "parts.1.inner.0.w",
                           "parts.1.inner.0.b"}
    assert max(errors.values()) < 1e-6
    assert max(dict(td.gradient_errors(td.silu, None, [x])).values()) < 1e-6


def test_the_gradient_table_is_of_every_parameter_of_every_layer():
    errors = dict(td.gradient_table())
    for part in ("time1.w", "label", "stem.b", "top.down.0.conv1.w", "top.match.w",
                 "top.inner.up.1.attention.qkv.w", "top.inner.down.0.skip.w",
                 "top.up.1.scale_shift.b", "top.up.0.norm1.scale", "out.w", "input 1"):
        assert part in errors
    assert max(errors.values()) <= 1e-6


def wrong_input(p, x):
    y, back = td.linear(p, x)
    return y, lambda dy: -back(dy)


def wrong_weight(p, x):
    y, back = td.linear(p, x)

    def half(dy):
        dx = back(dy)
        p.grad.w /= 2
        return dx
    return y, half


def nothing_added(p, x):
    y, back = td.linear(td.Params(p.layout, p.flat, p.grad.flat.copy()), x)
    return y, back


def not_a_number(p, x):
    y, back = td.linear(p, x)
    return y, lambda dy: np.nan * back(dy)


@pytest.mark.parametrize("layer, wrong", [
    (wrong_input, {"input 1"}), (wrong_weight, {"w"}), (nothing_added, {"w", "b"}),
    (not_a_number, {"input 1"})])
def test_the_check_finds_a_wrong_back(layer, wrong):
    """And it names the gradient that is wrong, and no other."""
    _, p, inputs = build("linear")
    errors = dict(td.gradient_errors(layer, p, inputs))
    assert {name for name, e in errors.items() if not e <= 1e-3} == wrong


BROKEN = """
def silu(x, right=silu):
    y, back = right(x)
    return y, lambda dy: {} * back(dy)

if __name__ == "__main__":"""


@pytest.mark.parametrize("factor, passes",
                         [("1", True), ("1.0001", False), ("math.nan", False)])
def test_the_script_fails_where_a_layer_is_wrong(factor, passes, tmp_path):
    """`python tinyddpm.py`, in a copy where silu's gradient is off by a factor."""
    start = '\nif __name__ == "__main__":'
    text = SOURCE.read_text()
    assert text.count(start) == 1
    copy = tmp_path / "broken.py"
    copy.write_text(text.replace(start, BROKEN.format(factor)))
    ran = subprocess.run([sys.executable, copy], capture_output=True, text=True)
    assert (ran.returncode == 0) is passes, ran.stderr
    assert ("WRONG" in ran.stdout) is not passes


# ---------------------------------------------------------------------------- good manners

@every_layer
def test_layers_are_pure_and_add_to_grad(name):
    """No layer changes its inputs, its parameters or the dy it is given; called again, back
    returns the same once more and adds the same once more."""
    layer, p, inputs = build(name)
    y, back = layer(p, *inputs)
    dy = np.random.default_rng(2).standard_normal(y.shape)
    held = [p.flat, *inputs, y, dy]
    before = [a.copy() for a in held]
    first = run_back(back, dy)
    once = p.grad.flat.copy()
    again = run_back(back, dy)
    for a, b in zip([*held, *again], [*before, *first]):
        assert np.array_equal(a, b)
    close(p.grad.flat, 2 * once)


def test_res_block_adds_to_demb():
    """The embedding feeds every block, so each adds its part."""
    _, p, (x, emb) = build("res_block")
    fresh, used = np.zeros_like(emb), np.ones_like(emb)
    for demb in (fresh, used):
        y, back = td.res_block(p, x, emb, demb, halve)
        back(y)
    assert np.all(fresh)
    close(used, 1 + fresh)


def test_res_block_drops_out_before_its_last_product():
    """With everything dropped but conv2's bias, what is left is the bias beside x."""
    layout = td.res_block_layout(6, 6, 3)
    p, rng = random_params(layout, np.random.default_rng(0)), np.random.default_rng(1)
    x, emb = rng.standard_normal((2, 3, 4, 6)), rng.standard_normal((2, 3))
    y, back = td.res_block(p, x, emb, np.zeros_like(emb), lambda h: (0 * h, lambda dy: 0 * dy))
    close(y, x + p.conv2.b)
    assert np.array_equal(back(y), y)                   # nothing but the way past is left


@every_layer
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_type_in_is_type_out(name, dtype):
    layer, p, inputs = build(name, dtype=dtype)
    y, back = layer(p, *inputs)
    gradients = run_back(back, np.ones_like(y))
    assert {a.dtype for a in (y, p.grad.flat, *gradients)} == {np.dtype(dtype)}
    assert [a.shape for a in gradients] == [a.shape for a in inputs]


@pytest.mark.parametrize("mean", [0, 3000])
def test_group_statistics_keep_their_digits(mean):
    """In float32, far from 0: E[x^2] - E[x]^2 would have none left."""
    x = mean + np.random.default_rng(0).standard_normal((2, 8, 8, 16))
    zero = np.zeros(16, np.float32)
    y = td.group_norm(x.astype(np.float32), zero, zero)[0]
    exact = td.group_norm(x.astype(np.float32).astype(np.float64), zero, zero)[0]
    close(y, exact, 2e-3)


@pytest.mark.parametrize("C", [2, 8, 12])
def test_group_norm_at_a_single_pixel_is_not_blind(C):
    """A group of one value is 0 whatever it was; so all channels are one group there."""
    x, zero = np.random.default_rng(0).standard_normal((2, 1, 1, C)), np.zeros((2, C))
    y, back = td.group_norm(x, zero, zero)
    close(y, slow_group_norm(x, zero, zero, 1))
    assert np.all(y) and np.all(back(np.arange(2.0 * C).reshape(x.shape) ** 2)[0]) or C == 2
    with pytest.raises(ValueError):
        td.group_norm(x[..., :1], zero[:, :1], zero[:, :1])


# ---------------------------------------------------------------------------------- Params

LAYOUT = {"a": ((2, 3), 1), "b": [td.product_layout(3, 2), {"c": ((4,), 2)}], "d": ((), 0)}


def test_names_and_buffer_are_one_memory_in_order():
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
def test_no_assignment_and_no_copy_can_part_them(copied):
    p = copied(td.Params(LAYOUT, np.arange(19.0), np.zeros(19)))
    p.flat = np.full(19, 3.0)
    assert np.all(p.a == 3) and np.all(p.b[1].c == 3)
    p.b[0].w = np.ones((3, 2))
    p.b[0].w *= 5
    p.grad.flat = 2
    assert p.flat.sum() == 13 * 3 + 6 * 5 and np.all(p.b[0].grad.w == 2)
    for name, value in (("flat", np.ones(18)), ("a", np.ones((3, 2))), ("nonsense", 1)):
        with pytest.raises((ValueError, AttributeError)):
            setattr(p, name, value)


@pytest.mark.parametrize("wrong", [18, 20, (19, 1)])
def test_a_buffer_of_another_size_is_refused(wrong):
    with pytest.raises(ValueError, match="19"):
        td.Params(LAYOUT, np.zeros(wrong))


def test_initial_deviations():
    p = td.initial({"a": ((100, 100), 2.0), "b": ((50,), 0)}, 0)
    assert abs(p.a.std() / 2 - 1) < 0.05 and not p.b.any() and not p.grad.flat.any()
    assert p.flat.dtype == np.float32 and np.array_equal(p.a, td.initial(p.layout, 0).a)
