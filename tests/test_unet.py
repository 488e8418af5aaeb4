"""The network: it is its drawing, its gradient is right, and what it takes and refuses."""
import copy
import pickle

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st

import loops
import tinyddpm as td
from common import close, refused

pytestmark = pytest.mark.skipif(td.xp is not np, reason="these run with TINYDDPM_BACKEND=numpy")
SMALL = dict(image=(5, 6, 2), channels=(12, 16), classes=3, attention=(1,), dtype=np.float64)
ALL = dict(image=(5, 7, 2), channels=(4, 12, 8), classes=3, blocks=(1, 2, 1), attention=(0, 2),
           heads=2, dropout=0.4, space_to_depth=True, condition=1, answers=2)


def small(**changes):
    """A small network, none of whose parameters is 0, so that nothing hides behind a zero."""
    net = td.UNet(**SMALL | changes)
    net.params.flat = 0.4 * np.random.default_rng(1).standard_normal(net.params.flat.size)
    return net


def batch(net, B=3):
    """Images, steps and labels for it, the null label among them."""
    rng = np.random.default_rng(2)
    x, t = rng.standard_normal((B, *net.input)), rng.integers(1, 1000, B)
    return x, t, np.arange(net.null, net.null - B, -1) % (net.classes + 1)


@st.composite
def configurations(draw):
    """Every option of a network, each by itself."""
    channels = draw(st.sampled_from([(4,), (16,), (4, 8), (16, 12), (4, 6, 10)]))
    levels = range(len(channels))
    return dict(
        channels=channels, image=draw(st.tuples(*[st.integers(1, n) for n in (6, 6, 3)])),
        blocks=draw(st.sampled_from([1, 2, (1, 2, 1)[-len(levels):], (2, 1, 2)[:len(levels)]])),
        attention=draw(st.lists(st.sampled_from(levels), unique=True)),
        heads=draw(st.sampled_from([1, 2])), classes=draw(st.sampled_from([0, 1, 3])),
        dropout=draw(st.sampled_from([0.0, 0.4])), space_to_depth=draw(st.booleans()),
        condition=draw(st.sampled_from([0, 2])), answers=draw(st.sampled_from([1, 2])))


# ------------------------------------------------------------------------------- the drawing

@settings(max_examples=60)
@given(configuration=configurations())
@example(configuration=ALL)
def test_the_network_is_its_drawing(configuration):
    """Of images padded with zeros to what halves at every level, the answer is that of plain
    loops down and up the U; units drop out of every block, drawn one by one in that order."""
    net = small(**configuration)
    x, t, y = batch(net, 2)
    rng = np.random.default_rng(3)

    def drop(h):
        kept = rng.random(h.shape, dtype=np.float32) >= net.dropout if net.dropout else 1
        return h * kept / (1 - net.dropout)
    close(net.forward(x, t, y, 3)[0], loops.unet(net, x, t, y, drop), 1e-10)
    close(net(x, t, y), loops.unet(net, x, t, y, lambda h: h), 1e-10)


def test_the_answer_depends_on_step_label_and_image():
    net = small()
    x, t, y = batch(net)
    out = net(x, t, y)
    for other in (net(x, t + 1, y), net(x, t, (y + 1) % 4), net(x + 0.1, t, y)):
        assert (abs(other - out) > 1e-6).any(axis=(1, 2, 3)).all()      # in every image


@pytest.mark.parametrize("image, channels, space_to_depth", [
    ((1, 1, 1), (8,), False), ((2, 2, 1), (8,), True), ((1, 2, 1), (4, 8), False)])
def test_the_smallest_picture_does_not_blind_it(image, channels, space_to_depth):
    """Where all is a single pixel, a group norm over single values would always give 0."""
    net = small(image=image, channels=channels, space_to_depth=space_to_depth, attention=())
    x, t, y = batch(net)
    for other in (net(x + 0.1, t, y), net(x, t + 1, y), net(x, t, (y + 1) % 4)):
        assert (abs(other - net(x, t, y)) > 1e-6).any(axis=(1, 2, 3)).all()


def test_images_do_not_mix():
    """An image has the answer it has alone, wherever in the batch it is, whatever else is."""
    net, order = small(), [2, 0, 1]
    x, t, y = batch(net)
    out = net(x, t, y)
    close(net(x[order], t[order], y[order]), out[order])
    close(net(x[1:2], t[1:2], y[1:2]), out[1:2])
    x[1, 2, 1, 0] = np.nan
    close(net(x, t, y)[[0, 2]], out[[0, 2]])


def test_one_step_and_one_label_stand_for_all():
    """t may be one integer, and so may y; no label is the null label, the number of classes."""
    net = small()
    x, sevens, nulls = batch(net)[0], np.array([7, 7, 7]), np.array([3, 3, 3])
    for t, y in ((7, None), (7, 3), (sevens, None), (7, nulls), (np.int8(7), np.uint8(3))):
        assert np.array_equal(net(x, t, y), net(x, sevens, nulls))


def test_dropout_needs_an_rng():
    """A call without one is for sampling: every time the same."""
    net = small(dropout=0.5)
    x, t, y = batch(net)
    one, again, other = (net.forward(x, t, y, rng)[0]
                         for rng in (0, np.random.default_rng(0), 1))
    assert np.array_equal(one, again) and np.array_equal(net(x, t, y), net.forward(x, t, y)[0])
    assert not np.array_equal(one, other) and not np.array_equal(one, net(x, t, y))


# -------------------------------------------------------------------------------- gradient

@settings(max_examples=60)
@given(configuration=configurations(), seed=st.integers(0, 1000))
@example(configuration=ALL, seed=0)
def test_gradient_of_the_whole_network(configuration, seed):
    """<c, J u> = <J^T c, u>, u being a direction of the parameters and the image together; J u
    by the complex step, as in test_layers."""
    net, rng = small(**configuration), np.random.default_rng(seed)
    x, t, y = batch(net, 2)
    out, back = net.forward(x, t, y, 4)
    c, dx = rng.standard_normal(out.shape), rng.standard_normal(x.shape)
    dp = rng.standard_normal(net.params.flat.size)
    shifted = net.with_params(net.params.flat + 1e-30j * dp)
    forward = c * shifted.forward(x + 1e-30j * dx, t, y, 4)[0].imag / 1e-30
    backward = (back(c) * dx).sum() + net.grads.flat @ dp
    assert abs(forward.sum() - backward) <= 1e-9 * (1 + abs(forward).sum())


def test_gradients_add_up():
    """A second call of back returns the same and adds the same; so do the halves of a batch."""
    net = small(blocks=2)
    x, t, y = batch(net, 4)
    _, back = net.forward(x, t, y)
    dx, once = back(x), net.grads.flat.copy()
    assert np.array_equal(back(x), dx) and np.array_equal(net.grads.flat, 2 * once)
    for half in (slice(0, 2), slice(2, 4)):
        net.forward(x[half], t[half], y[half])[1](x[half])
    close(net.grads.flat, 3 * once)


@pytest.mark.parametrize("changes", [{}, {"blocks": 2}, {"classes": 0}, {"attention": (0, 1)}])
def test_every_parameter_has_its_part(changes):
    net = small(**changes)
    x, t, y = batch(net, 4)
    net.forward(x, t, y)[1](x)
    end = 0
    for name, shape, _ in td.leaves(net.params.layout):
        start, end = end, end + int(np.prod(shape))
        assert abs(net.grads.flat[start:end]).max() > 1e-6, name


# ---------------------------------------------------------------------------- its parameters

@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("space_to_depth", [False, True])
def test_first_and_last_parameters(classes, space_to_depth):
    """The embedding is four times as wide as the top level. The null label has the last row of
    the table. After space_to_depth a pixel is four times as deep."""
    net = td.UNet((5, 6, 3), (4, 8), classes, space_to_depth=space_to_depth)
    p, pixel = net.params, 12 if space_to_depth else 3
    assert [*p.layout] == ["time1", "time2", *["label"][:classes], "stem", "top", "norm", "out"]
    assert (p.time1.w.shape, p.time2.w.shape) == ((4, 16), (16, 16))
    assert not classes or p.label.shape == (4, 16)
    assert (p.stem.w.shape, p.out.w.shape) == ((3, 3, pixel, 4), (3, 3, 4, pixel))


def test_more_comes_in_than_an_image_and_more_goes_out():
    """A picture to go by, of 2 channels here; and beside what is learned, how sure it is."""
    net = small(condition=2, answers=3)
    x, t, y = batch(net)
    out, back = net.forward(x, t, y)
    assert (x.shape, out.shape, back(out).shape) == ((3, 5, 6, 4), (3, 5, 6, 6), x.shape)
    refused((3, 5, 6, 2), net, x[..., :2], t, y)
    assert (abs(net(x + [0, 0, 0, 0.1], t, y) - out) > 1e-6).any(axis=(1, 2)).all()


def test_unless_told_it_is_a_network_for_digits():
    """Of 28x28 pixels in ten classes; its parameters are float32, the same every time."""
    net = td.UNet()
    assert (net.image, net.channels, net.classes, net.null) == ((28, 28, 1), (32, 64), 10, 10)
    assert (net.blocks, net.attention, net.heads) == (1, (), 4)
    assert net.dropout == 0 and not net.space_to_depth
    assert net.params.flat.dtype == net.grads.flat.dtype == np.float32
    assert np.array_equal(net.params.flat, td.UNet(rng=np.random.default_rng(0)).params.flat)
    assert not np.array_equal(net.params.flat, td.UNet(rng=1).params.flat)


@pytest.mark.parametrize("changes", [{}, ALL, {"classes": 0}])
def test_at_the_start(changes):
    """C^-1/2 for a product and (9 C)^-1/2 for a kernel keep the variance of what comes in. What
    is added to x, and so the answer, is 0; so are biases, and norms' scales and shifts."""
    net = td.UNet(**SMALL | changes)
    assert not net(*batch(net)).any()
    for name, shape, deviation in td.leaves(net.params.layout):
        *path, last = name.split(".")
        zero = last in ("b", "scale", "shift") or path[-1:] in (["conv2"], ["out"])
        close(deviation, 0 if zero else 1 if last == "label" else np.prod(shape[:-1]) ** -0.5)


def test_with_params_follows_other_parameters_and_shares_no_gradients():
    """A flat buffer, or Params; not a copy of it, so that where it moves, the network does."""
    net, other = small(), small(rng=1)
    x, t, y = batch(net)
    flat = 2 * net.params.flat
    for new in (net.with_params(flat), net.with_params(td.Params(net.params.layout, flat,
                                                                 np.zeros_like(flat)))):
        new.forward(x, t, y)[1](x)
        assert new.grads is new.params.grad and new.grads.flat.any()
        before = new(x, t, y)
        flat *= 0.5
        assert not np.array_equal(before, new(x, t, y))
        other.params.flat = flat
        assert np.array_equal(new(x, t, y), other(x, t, y))
    assert np.array_equal(net(x, t, y), small()(x, t, y)) and not net.grads.flat.any()
    refused(flat.size, net.with_params, flat[1:])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_is_a_network_of_its_own(copied):
    """Its names and its buffers are one memory, and not the original's."""
    net = small()
    x, t, y = batch(net)
    new, out = copied(net), net(x, t, y)
    assert np.array_equal(new(x, t, y), out)
    new.forward(x, t, y)[1](x)
    assert new.grads.flat.any() and np.array_equal(new.grads.flat, new.params.grad.flat)
    assert np.array_equal(new.grads.top.inner.down[0].conv1.w,
                          new.params.top.inner.down[0].grad.conv1.w)
    new.params.flat = 0
    new.params.out.b = [1, 2]
    assert np.array_equal(new(x, t, y), 0 * x + [1, 2]) and not net.grads.flat.any()
    assert np.array_equal(net(x, t, y), out)


def test_an_assigned_parameter_is_what_the_network_computes_with():
    net, other = small(), td.UNet(**SMALL, rng=5)
    x, t, y = batch(net)
    net.params.flat = other.params.flat
    assert np.array_equal(net(x, t, y), other(x, t, y))
    for one in (net, other):
        one.params.out.w = np.ones((3, 3, 12, 2))
    assert np.array_equal(net.params.flat, other.params.flat) and net(x, t, y).all()


# ---------------------------------------------------------------------------- types, refusals

@pytest.mark.parametrize("given", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_it_computes_in_the_type_of_its_parameters(dtype, given):
    net = small(dtype=dtype, dropout=0.2)
    x, t, y = batch(net)
    x = x.astype(given)
    out, back = net.forward(x, t, y, 0)
    assert all(a.dtype == dtype for a in (out, back(out), net.params.flat, net.grads.flat))
    assert np.array_equal(out, net.forward(x.astype(dtype), t, y, 0)[0])


@pytest.mark.parametrize("dtype", [np.float16, int, bool, complex, object])
def test_a_network_of_other_numbers_is_refused(dtype):
    """float16 overflows in group norms; of integers, every parameter would be 0."""
    refused(dtype, td.UNet, dtype=dtype)


@pytest.mark.parametrize("classes", [3, 127, 128, 255, 256])
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint64])
def test_labels_of_any_integer_type(classes, dtype):
    """What a label says does not depend on its type, not even where the null label is beyond
    it; None says the null label, of the last row."""
    net = small(classes=classes, attention=())
    x, t, _ = batch(net)
    y = np.array([0, 1, min(classes, np.iinfo(dtype).max)])
    assert np.array_equal(net(x, t, y.astype(dtype)), net(x, t, y))
    labelled, unlabelled = net(x, t, y.astype(dtype))[:2], net(x, t)
    assert np.array_equal(unlabelled, net(x, t, [classes] * 3))
    net.params.label[classes] += 1
    assert np.array_equal(labelled, net(x, t, y)[:2]) and np.all(unlabelled != net(x, t))


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("wrong", [-1, "beyond", 1.0, True])
def test_labels_out_of_range_are_refused(classes, wrong):
    """The null label is the largest; without classes it is the only one, 0."""
    net = small(classes=classes)
    wrong = classes + 1 if wrong == "beyond" else wrong
    for y in (wrong, [wrong] * 3, np.array([wrong] * 3)):
        given = wrong if np.asarray(y).dtype == int else np.asarray(y).dtype
        refused(given, net, batch(net)[0], 1, y)


@pytest.mark.parametrize("t, y", [([1, 2], None), (1, [0, 1]), (0.5, None), ([1.0] * 3, None)])
def test_steps_that_are_no_integers_or_not_one_for_each(t, y):
    """A t of 0.5 is a share of T for other networks, here it would be another step."""
    net = small()
    with pytest.raises(ValueError):
        net(batch(net)[0], t, y)


@pytest.mark.parametrize("x", [np.zeros((3, 6, 5, 2)), np.zeros((3, 5, 6)), np.zeros((5, 6, 2)),
                               np.zeros((3, 5, 6, 2), int), np.zeros((3, 5, 6, 1))])
def test_an_image_of_another_shape_or_of_integers_is_refused(x):
    refused(x.shape, small(), x, 1)


@pytest.mark.parametrize("changes, given", [
    (dict(attention=(2,)), 2), (dict(attention=(-1,)), -1), (dict(blocks=(2,)), 2),
    (dict(blocks=(1, 2, 1)), (1, 2, 1)), (dict(dropout=1), 1), (dict(dropout=-0.1), -0.1),
    (dict(channels=(2, 8)), 2), (dict(channels=(5, 8)), 5)])
def test_options_that_would_be_silently_wrong_or_fail_obscurely_are_refused(changes, given):
    refused(given, td.UNet, **SMALL | changes)
