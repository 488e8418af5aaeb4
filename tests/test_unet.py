"""The network: it is its drawing, as plain loops have it; what its answer depends on, its
gradient, its copies, and what it refuses."""
import copy
import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import tinyddpm as td
from common import close, refused

pytestmark = pytest.mark.skipif(td.xp is not np, reason="these run with TINYDDPM_BACKEND=numpy")
SMALL = dict(image=(5, 6, 2), channels=(4, 8), classes=3, attention=(1,), dtype=np.float64)


def small(**changes):
    """A small network, none of whose parameters is 0, so that nothing hides behind a zero."""
    net = td.UNet(**SMALL | changes)
    net.params.flat[:] = 0.3 * np.random.default_rng(1).standard_normal(net.params.flat.size)
    return net


def batch(net, B=3):
    """Images, steps and labels for it; None for labels where the network has no classes."""
    rng = np.random.default_rng(2)
    x, t = rng.standard_normal((B, *net.image)), rng.integers(1, 1000, B)
    return x, t, rng.integers(0, net.classes, B) if net.classes else None


# ------------------------------------------------------------------------- the drawing, slowly

def linear(p, x):
    return np.einsum("...c,cd->...d", x, p.w) + p.b


def silu(x):
    return x / (1 + np.exp(-x))


def conv(p, x):
    """Of one picture (H, W, C), pixel by pixel."""
    H, W, _ = x.shape
    y = np.zeros((H, W, p.w.shape[3])) + p.b
    for i, j, di, dj in np.ndindex(H, W, 3, 3):
        if 0 <= i + di - 1 < H and 0 <= j + dj - 1 < W:
            y[i, j] += x[i + di - 1, j + dj - 1] @ p.w[di, dj]
    return y


def norm(x, scale, shift):
    C = x.shape[2]
    groups = math.gcd(8, C) if x[..., 0].size > 1 else 1
    y = np.zeros_like(x)
    for part in np.split(np.arange(C), groups):
        group = x[:, :, part]
        y[:, :, part] = (group - group.mean()) / np.sqrt(group.var() + 1e-5)
    return y * (1 + scale) + shift


def attention(p, x, heads):
    H, W, C = x.shape
    q, k, v = np.split(linear(p.qkv, norm(x, p.norm.scale, p.norm.shift)).reshape(H * W, 3 * C),
                       3, axis=1)
    y = np.zeros((H * W, C))
    for part in np.split(np.arange(C), heads):
        for i in range(H * W):
            weights = np.exp([q[i, part] @ k[j, part] / len(part) ** 0.5 for j in range(H * W)])
            y[i, part] = weights @ v[:, part] / weights.sum()
    return x + linear(p.out, y.reshape(H, W, C))


def res_block(p, x, emb, heads, drop):
    h = conv(p.conv1, silu(norm(x, p.norm1.scale, p.norm1.shift)))
    scale, shift = np.split(linear(p.scale_shift, emb), 2)
    h = conv(p.conv2, drop(silu(norm(h, scale, shift))))
    h = h + (x if x.shape == h.shape else linear(p.skip, x))
    return attention(p.attention, h, heads) if hasattr(p, "attention") else h


def level(p, depth, x, emb, net, drop):
    """One level and what is below it, as the drawing in tinyddpm.py has them."""
    for q in p.down:
        assert hasattr(q, "attention") == (depth in net.attention)
        x = res_block(q, x, emb, net.heads, drop)
    if depth + 1 < len(net.channels):
        H, W, C = x.shape
        half = np.zeros((H // 2, W // 2, C))
        for i, j in np.ndindex(H // 2, W // 2):
            half[i, j] = x[2 * i:2 * i + 2, 2 * j:2 * j + 2].mean((0, 1))
        answer = linear(p.match, level(p.inner, depth + 1, half, emb, net, drop))
        x = x + np.array([[answer[i // 2, j // 2] for j in range(W)] for i in range(H)])
    for q in p.up:
        x = res_block(q, x, emb, net.heads, drop)
    return x


def drawn(net, x, t, y, drop=lambda h: h):
    """The answer for one picture x, one step t and one label y."""
    p, (H, W, C), c = net.params, x.shape, net.channels[0]
    angles = [t / 10000 ** (k / (c // 2 - 1)) for k in range(c // 2)]
    emb = linear(p.time2, silu(linear(p.time1, np.array([*np.sin(angles), *np.cos(angles)]))))
    emb = silu(emb + (p.label[y] if net.classes else 0))
    fold = 2 if net.space_to_depth else 1
    side = fold * 2 ** (len(net.channels) - 1)
    h = np.zeros((-(-H // side) * side, -(-W // side) * side, C))
    h[:H, :W] = x
    if fold == 2:
        h = np.concatenate([h[i::2, j::2] for i in (0, 1) for j in (0, 1)], 2)
    h = level(p.top, 0, conv(p.stem, h), emb, net, drop)
    h = conv(p.out, silu(norm(h, p.norm.scale, p.norm.shift)))
    if fold == 2:
        whole = np.zeros((2 * len(h), 2 * len(h[0]), C))
        for k, (i, j) in enumerate(np.ndindex(2, 2)):
            whole[i::2, j::2] = h[:, :, k * C:(k + 1) * C]
        h = whole
    return h[:H, :W]


@pytest.mark.parametrize("options", [
    dict(), dict(classes=0), dict(space_to_depth=True), dict(attention=(0, 1), heads=2),
    dict(channels=(4,), attention=()),
    dict(channels=(8, 4, 6), blocks=(1, 2, 1), attention=(2,), heads=3),
    dict(image=(7, 3, 3), channels=(4, 6), blocks=2, space_to_depth=True, attention=(0,)),
    dict(image=(1, 1, 1), channels=(4, 8)), dict(channels=(16, 24), attention=(1,), heads=1)],
    ids=str)
def test_the_network_is_its_drawing(options):
    """For each picture of a batch, with each its own step and label, to rounding."""
    net = small(**options)
    x, t, y = batch(net)
    t[0] = 1000
    answer = net(x, t, y)
    for i in range(len(x)):
        close(answer[i], drawn(net, x[i], t[i], net.null if y is None else y[i]), 1e-9)


def test_dropout_is_in_every_block_before_its_second_convolution(monkeypatch):
    """With a dropout that halves in the place of the random one."""
    monkeypatch.setattr(td, "dropout", lambda x, rate, rng: (x * rate, lambda dy: dy * rate))
    net = small(channels=(4, 6), blocks=2, dropout=0.5, heads=2)
    x, t, y = batch(net)
    close(net(x, t, y)[0], drawn(net, x[0], t[0], y[0], lambda h: h / 2), 1e-9)


def test_dropout_reaches_every_level_and_no_axis_shares_a_mask(monkeypatch):
    """Each block draws for itself; pictures, rows, columns and channels have masks of their
    own, also when the rng is a seed."""
    masks, right = [], td.dropout

    def noted(x, rate, rng):
        y, back = right(x, rate, rng)
        masks.append(back(np.ones_like(x)) > 0)
        return y, back
    monkeypatch.setattr(td, "dropout", noted)
    net = small(image=(8, 8, 1), channels=(8, 8, 8), attention=(), dropout=0.5, blocks=2)
    net.forward(*batch(net), rng=0)
    assert [mask.shape[1] for mask in masks] == [8] * 2 + [4] * 2 + [2] * 4 + [4] * 2 + [8] * 2
    for mask in masks:
        for axis in range(4):
            assert mask.any(axis).all() or mask.std(axis).any()
            assert not (mask == mask.take([0], axis)).all()
    first, second = masks[:2]
    assert (first != second).any()


# ------------------------------------------------------------------------------ the answer

@pytest.mark.parametrize("changes", [
    {}, {"space_to_depth": True}, {"classes": 0}, {"blocks": 2}])
def test_first_answer_is_0_and_first_loss_the_noise_s_variance(changes):
    net = td.UNet(**SMALL | changes)
    x, t, y = batch(net)
    assert not net(x, t, y).any()
    images, labels = np.zeros((4, *net.image)), None if y is None else np.zeros(4, int)
    images[0] = -1e-9                                   # not all from 0 up, which would warn
    run = td.train(net, td.Diffusion(td.linear_betas(10)), images, labels, steps=1)
    assert abs(next(run).loss - 1) < 5 * (2 / (64 * images[0].size)) ** 0.5     # 5 deviations


def test_answer_depends_on_step_label_and_image():
    net = small()
    x, t, y = batch(net)
    out = net(x, t, y)
    for other in (net(x, t + 1, y), net(x, t, (y + 1) % 3), net(x + 0.1, t, y)):
        assert (abs(other - out) > 1e-6).any(axis=(1, 2, 3)).all()      # in every image


def test_answer_does_not_depend_on_the_place_in_the_batch():
    net, order = small(), [2, 0, 1]
    x, t, y = batch(net)
    out = net(x, t, y)
    close(net(x[order], t[order], y[order]), out[order])
    for i in range(3):
        close(net(x[i:i + 1], t[i:i + 1], y[i:i + 1]), out[i:i + 1])


def test_one_step_and_one_label_stand_for_all():
    """t may be one integer; no label is the null label, which is the number of classes."""
    net = small()
    x, _, _ = batch(net)
    out = net(x, np.array([7, 7, 7]), np.array([3, 3, 3]))
    assert net.null == 3
    for other in (net(x, 7), net(x, 7, None), net(x, np.array([7, 7, 7]))):
        assert np.array_equal(other, out)


def test_dropout_needs_an_rng():
    """A call without one is for sampling: every time the same."""
    net = small(dropout=0.5)
    x, t, y = batch(net)
    assert np.array_equal(net(x, t, y), net(x, t, y))
    one, again, other = (net.forward(x, t, y, np.random.default_rng(seed))[0]
                         for seed in (0, 0, 1))
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    assert not np.array_equal(one, net(x, t, y))


@given(H=st.integers(1, 9), W=st.integers(1, 9), C=st.integers(1, 3),
       levels=st.integers(1, 3), fold=st.booleans())
def test_any_picture_size_will_do(H, W, C, levels, fold):
    """Also a single pixel; and the answer depends on x and on t, whatever the size."""
    net = small(image=(H, W, C), channels=(4, 6, 8)[:levels], attention=(levels - 1,), heads=2,
                space_to_depth=fold)
    x, t, y = batch(net, 2)
    out, back = net.forward(x, t, y)
    assert (net(x + 0.1, t, y) != out).any() and (net(x, t + 1, y) != out).any()
    assert out.shape == x.shape == back(out).shape
    assert np.isfinite(out).all() and np.isfinite(net.grads.flat).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_type_of_answer_and_gradients(dtype):
    net = small(dtype=dtype, dropout=0.2)
    x, t, y = batch(net)
    out, back = net.forward(x.astype(dtype), t, y, np.random.default_rng(0))
    found = net.params.flat, net.grads.flat, out, back(out)
    assert {a.dtype for a in found} == {np.dtype(dtype)}


# ----------------------------------------------------------------------------- its parameters

def test_unless_told_it_is_a_network_for_digits():
    """Of 28x28 pixels in ten classes; its parameters are float32, the same every time."""
    net = td.UNet()
    assert (net.image, net.channels, net.classes, net.blocks, net.attention, net.heads) == (
        (28, 28, 1), (32, 64), 10, 1, (), 4)
    assert net.dropout == 0 and not net.space_to_depth and net.null == 10
    assert net.params.label.shape == (11, 128)          # the null label's row is the last
    assert net.params.flat.dtype == np.float32
    assert np.array_equal(net.params.flat, td.UNet(rng=0).params.flat)


@pytest.mark.parametrize("changes", [
    {}, dict(channels=(4, 8, 6), blocks=(1, 2, 1)), dict(classes=0),
    dict(space_to_depth=True, blocks=2)])
def test_every_parameter_has_its_part_in_the_gradient(changes):
    net = small(**changes)
    x, t, y = batch(net)
    net.forward(x, t, y)[1](x)
    end = 0
    for name, shape, _ in td.leaves(net.params.layout):
        start, end = end, end + math.prod(shape)
        assert net.grads.flat[start:end].any(), name
    assert end == net.params.flat.size


def test_deviations_at_the_start():
    """(9 C)^-1/2 for a kernel, C^-1/2 for a product, 1 for the labels' table; 0 for biases and
    last products."""
    net = td.UNet(channels=(32, 64), attention=(1,))
    p = net.params.top.inner.down[0]
    for a, fan in [(p.conv1.w, 9 * 32), (p.scale_shift.w, 128), (p.attention.qkv.w, 64),
                   (p.skip.w, 32), (net.params.label, 1)]:
        assert abs(a.std() * fan ** 0.5 - 1) < 0.05
    zero = [p.conv2.w, p.attention.out.w, net.params.out.w]
    zero += [p.conv1.b, p.norm1.scale, p.norm1.shift, net.params.norm.scale, net.params.time1.b]
    assert not any(a.any() for a in zero)


def test_same_seed_same_network():
    one, same, other = (td.UNet(**SMALL, rng=rng).params.flat for rng in (0, 0, 1))
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    drawn = td.UNet(**SMALL, rng=np.random.default_rng(0)).params.flat
    assert np.array_equal(one, drawn)                   # a seed is short for its Generator


def test_a_network_on_other_parameters_follows_them():
    """with_params: the buffer is not copied, the gradients are its own."""
    net = small()
    x, t, y = batch(net)
    same, moved = net.with_params(net.params.flat), net.with_params(net.params.flat + 1)
    same.forward(x, t, y)[1](x)
    assert same.grads.flat.any() and not net.grads.flat.any()
    net.params.flat *= 2
    assert np.array_equal(same(x, t, y), net(x, t, y))
    assert not np.array_equal(moved(x, t, y), net(x, t, y))
    refused(9, net.with_params, np.zeros(9))


@pytest.mark.parametrize("copied", [copy.deepcopy,
                                    lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_are_whole(copied):
    """Parameters and gradients of their own, names and buffer one memory."""
    net = small()
    x, t, y = batch(net)
    other, out = copied(net), net(x, t, y)
    assert np.array_equal(other(x, t, y), out)
    other.params.flat *= 2
    assert not np.allclose(other(x, t, y), out) and np.array_equal(net(x, t, y), out)
    other.forward(x, t, y)[1](x)
    assert other.grads.flat.any() and not net.grads.flat.any()
    assert np.shares_memory(other.grads.flat, other.params.stem.grad.w)


def test_assignments_write_into_the_buffer():
    net = small()
    net.params.stem.w = np.ones(net.params.stem.w.shape)
    net.params.flat = net.params.flat + 1
    assert np.all(net.params.stem.w == 2)
    assert (net.params.flat == 2).sum() == net.params.stem.w.size


def test_computing_is_in_the_parameters_type():
    """A float64 picture does not make a float32 network one of float64."""
    net = small(dtype=np.float32)
    x, t, y = batch(net)
    out, back = net.forward(x, t, y)
    assert out.dtype == back(out).dtype == np.float32
    refused("float16", td.UNet, dtype=np.float16)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32, np.uint64])
def test_labels_of_any_integer_type(dtype):
    net = small(classes=255 if dtype != np.int8 else 127)
    x, t, _ = batch(net)
    y = np.array([0, 5, net.classes], dtype)
    assert np.array_equal(net(x, t, y), net(x, t, y.astype(int)))


# -------------------------------------------------------------------------------- gradient

def test_gradients_add_up():
    """Two calls of back add twice; two halves of a batch add up to the whole."""
    net = small()
    x, t, y = batch(net, 4)
    net.forward(x, t, y)[1](x)
    once = net.grads.flat.copy()
    net.forward(x, t, y)[1](x)
    assert np.array_equal(net.grads.flat, 2 * once)
    net.grads.flat[:] = 0
    for half in (slice(0, 2), slice(2, 4)):
        net.forward(x[half], t[half], y[half])[1](x[half])
    close(net.grads.flat, once)


CONFIGURATIONS = st.fixed_dictionaries(dict(
    image=st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3)),
    channels=st.sampled_from([(4,), (8,), (4, 8), (8, 4), (4, 6, 10)]),
    classes=st.sampled_from([0, 1, 3]), blocks=st.integers(1, 2),
    attention=st.sampled_from([(), (0,)]), heads=st.sampled_from([1, 2, 4]),
    dropout=st.sampled_from([0.0, 0.4]), space_to_depth=st.booleans()))


def derivative(net, run, dp, dx, x, h=1e-30):
    """How run(net, x) changes along (dp, dx), by the complex step: see test_layers."""
    return run(net.with_params(net.params.flat + 1j * h * dp), x + 1j * h * dx)[0].imag / h


@settings(max_examples=40)
@given(configuration=CONFIGURATIONS)
def test_gradient_of_the_whole_network(configuration):
    """<c, J u> = <J^T c, u>, u being a direction of the parameters and the image together."""
    net, rng = small(**configuration), np.random.default_rng(3)
    x, t, y = batch(net, 2)

    def run(net, x):
        return net.forward(x, t, y, np.random.default_rng(4))       # the same units drop out
    _, back = run(net, x)
    c, dx = rng.standard_normal((2, *x.shape))
    dp = rng.standard_normal(net.params.flat.size)
    forward = c * derivative(net, run, dp, dx, x)
    backward = (back(c) * dx).sum() + net.grads.flat @ dp
    assert abs(forward.sum() - backward) <= 1e-9 * (1 + abs(forward).sum())


def test_finite_differences_agree_with_the_complex_step():
    net, rng = small(), np.random.default_rng(3)
    x, t, y = batch(net)
    dp, dx, h = rng.standard_normal(net.params.flat.size), rng.standard_normal(x.shape), 1e-6
    up, low = (net.with_params(net.params.flat + s * dp)(x + s * dx, t, y) for s in (h, -h))
    exact = derivative(net, lambda net, x: net.forward(x, t, y), dp, dx, x)
    close((up - low) / (2 * h), exact, 1e-5)


# --------------------------------------------------------------------------------- refusals

@pytest.mark.parametrize("changes, given_text", [
    (dict(attention=(2,)), "(2,)"), (dict(attention=(-1,)), "(-1,)"),
    (dict(blocks=(2,)), "(2,)"), (dict(blocks=(1, 2, 1)), "(1, 2, 1)"),
    (dict(dropout=1), "1"), (dict(dropout=-0.1), "-0.1"), (dict(dtype=np.float16), "float16")])
def test_options_that_would_be_silently_wrong(changes, given_text):
    refused(given_text, td.UNet, **SMALL | changes)


@pytest.mark.parametrize("shape", [(3, 6, 5, 2), (3, 5, 6), (3, 5, 6, 1), (5, 6, 2)])
def test_an_image_of_another_shape(shape):
    refused(shape, small(), np.zeros(shape), 1)


@pytest.mark.parametrize("x, t", [(np.zeros((3, 5, 6, 2), np.uint8), 1),
                                  (np.zeros((3, 5, 6, 2)), 0.5)])
def test_bytes_and_shares_of_t_are_refused(x, t):
    with pytest.raises(ValueError, match="uint8|float64"):
        small()(x, t)


@pytest.mark.parametrize("labels, message", [
    (np.array([0, 4, 0]), r"4.*0\.\.3"), (np.array([-1, 0, 0]), r"-1.*0\.\.3"),
    ([0, 4, 0], r"0\.\.3"), (4, r"0\.\.3")])
def test_a_label_out_of_range(labels, message):
    """The null label, 3, is the largest; an array, a list or one integer for all."""
    net = small()
    with pytest.raises(ValueError, match=message):
        net(batch(net)[0], 1, labels)


@pytest.mark.parametrize("label", [-1, 1])
def test_labels_for_a_network_without_classes(label):
    """Its one label is the null label, 0."""
    net = small(classes=0)
    x = batch(net)[0]
    assert net.null == 0 and np.array_equal(net(x, 1, np.zeros(3, int)), net(x, 1))
    with pytest.raises(ValueError, match=rf"{label}.*0\.\.0"):
        net(x, 1, np.array([0, label, 0]))


@pytest.mark.parametrize("t, labels", [([1, 2], None), (1, [0, 1])])
def test_steps_and_labels_of_another_length(t, labels):
    net = small()
    with pytest.raises(ValueError):
        net(batch(net)[0], t, labels)
