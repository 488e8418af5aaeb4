"""The network: what it answers at first, what its answer depends on, its flat parameters, its
gradient, and what it refuses."""
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import tinyddpm as td
from common import close

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


# ------------------------------------------------------------------------------ the answer

@pytest.mark.parametrize("changes", [{}, {"fold": True}, {"classes": 0}, {"blocks": 2}])
def test_first_answer_is_0_and_first_loss_the_noise_s_variance(changes):
    net = td.UNet(**SMALL | changes)
    x, t, y = batch(net)
    assert not net(x, t, y).any()
    images, labels = np.zeros((4, *net.image)), None if y is None else np.zeros(4, int)
    run = td.train(net, td.Diffusion(td.linear_betas(10)), images, labels, steps=1, kind="eps")
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


@pytest.mark.parametrize("threads, chunk", [(1, 2), (2, 2), (2, 3), (3, 100)])
def test_parallel_cuts_the_batch_and_nothing_else(threads, chunk):
    """The model in chunks, over threads, gives what it gives in one go, and in that order."""
    net = small()
    x, t, y = batch(net, 7)
    model = td.parallel(net, threads, chunk)
    close(model(x, t, y), net(x, t, y))
    close(model(x, t), net(x, t))


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
    net = small(image=(H, W, C), channels=(4, 6, 8)[:levels], attention=(levels - 1,), heads=2,
                fold=fold)
    x, t, y = batch(net, 2)
    out, back = net.forward(x, t, y)
    assert out.shape == x.shape == back(out).shape
    assert np.isfinite(out).all() and np.isfinite(net.grads.flat).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_type_of_answer_and_gradients(dtype):
    net = small(dtype=dtype, dropout=0.2)
    x, t, y = batch(net)
    out, back = net.forward(x.astype(dtype), t, y, np.random.default_rng(0))
    found = net.params.flat, net.grads.flat, out, back(out)
    assert {a.dtype for a in found} == {np.dtype(dtype)}


# ------------------------------------------------------------------------- flat parameters

def arrays(tree):
    """Every (path, array) of a tree, in the layout's order."""
    for name in tree.layout:
        part = getattr(tree, name)
        for i, one in enumerate(part if isinstance(part, list) else [part]):
            path = f"{name}{i}" if isinstance(part, list) else name
            if isinstance(one, td.Tree):
                yield from ((f"{path}.{rest}", a) for rest, a in arrays(one))
            else:
                yield path, one


@pytest.mark.parametrize("changes", [{}, {"channels": (4, 8, 6), "blocks": 2}, {"classes": 0}])
def test_flat_reaches_every_parameter_once(changes):
    """Numbered in the flat buffer, the parameters hold every number once, in order."""
    net = td.UNet(**SMALL | changes)
    net.params.flat[:] = np.arange(net.params.flat.size)
    found = [a for _, a in arrays(net.params)]
    assert np.array_equal(np.concatenate([a.ravel() for a in found]), net.params.flat)
    assert all(np.shares_memory(a, net.params.flat) for a in found)


def test_flat_is_a_view():
    net = small()
    x, t, y = batch(net)
    out = net(x, t, y)
    w, below = net.params.stem.w.copy(), net.params.top.below.flat.copy()
    net.params.flat *= 2
    assert np.array_equal(net.params.stem.w, 2 * w)
    assert np.array_equal(net.params.top.below.flat, 2 * below)
    assert not np.allclose(net(x, t, y), out)
    net.params.top.below.flat[:] = 7                    # and back up, from a part to the whole
    assert (net.params.flat == 7).sum() == below.size
    assert (net.params.top.below.enter[0].conv1.w == 7).all()


def test_layout_says_what_the_network_has():
    names = [name for name, _ in arrays(td.UNet(**SMALL).params)]
    assert "top.below.enter0.attention.qkv.w" in names      # at level 1, and nowhere else
    assert all(name.startswith("top.below") for name in names if "attention" in name)
    assert {"top.match.w", "top.below.enter0.skip.w", "label"} <= set(names)
    assert "label" not in [name for name, _ in arrays(td.UNet(**SMALL | {"classes": 0}).params)]


def test_unless_told_it_is_a_network_for_digits():
    """Of 28x28 pixels in ten classes; its parameters are float32, the same every time."""
    net = td.UNet()
    assert net.config == dict(image=(28, 28, 1), channels=(32, 64), classes=10, blocks=(1, 1),
                              attention=(), heads=4, dropout=0.0, fold=False)
    assert net.params.label.shape == (11, 128)          # the null label's row is the last
    assert net.params.flat.dtype == np.float32
    assert np.array_equal(net.params.flat, td.UNet(rng=0).params.flat)


@pytest.mark.parametrize("blocks, each", [
    (1, (1, 1, 1)), (2, (2, 2, 2)), ((3, 1, 2), (3, 1, 2)), ([1, 2, 3], (1, 2, 3))])
def test_blocks_of_each_level(blocks, each):
    """One number for all levels or one for each: so many on the way in and out of a level. The
    lowest has both ways' in `enter`, and no other."""
    net = small(channels=(4, 8, 6), blocks=blocks)
    assert net.config["blocks"] == each
    top, below, lowest = net.params.top, net.params.top.below, net.params.top.below.below
    assert len(top.enter) == len(top.leave) == each[0]
    assert len(below.enter) == len(below.leave) == each[1]
    assert len(lowest.enter) == 2 * each[2] and list(lowest.layout) == ["enter"]
    x, t, y = batch(net)
    net.forward(x, t, y)[1](x)
    assert all(a.any() for _, a in arrays(net.grads))           # every one of them has its part


def test_deviations_at_the_start():
    """(9 C)^-1/2 for a kernel, C^-1/2 for a product, 1 for the labels' table; 0 for biases and
    last products."""
    net = td.UNet(channels=(32, 64), attention=(1,))
    p = net.params.top.below.enter[0]
    for a, fan in [(p.conv1.w, 9 * 32), (p.film.w, 128), (p.attention.qkv.w, 64),
                   (p.skip.w, 32), (net.params.label, 1)]:
        assert abs(a.std() * fan ** 0.5 - 1) < 0.05
    zero = [p.conv2.w, p.attention.out.w, net.params.out.w]
    zero += [a for name, a in arrays(net.params)
             if name.rsplit(".")[-1] in ("b", "scale", "shift")]
    assert len(zero) > 30 and not any(a.any() for a in zero)


def test_same_seed_same_network():
    one, same, other = (td.UNet(**SMALL, rng=rng).params.flat for rng in (0, 0, 1))
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    drawn = td.UNet(**SMALL, rng=np.random.default_rng(0)).params.flat
    assert np.array_equal(one, drawn)                   # a seed is short for its Generator


def test_twin_shares_parameters_but_not_gradients():
    net = small()
    x, t, y = batch(net)
    twin, moved = net.twin(), net.twin(net.params.flat + 1)
    twin.forward(x, t, y)[1](x)
    assert twin.grads.flat.any() and not net.grads.flat.any()
    net.params.flat[:] *= 2
    assert np.array_equal(twin(x, t, y), net(x, t, y))
    assert not np.array_equal(moved(x, t, y), net(x, t, y))


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
    dropout=st.sampled_from([0.0, 0.4]), fold=st.booleans()))


def derivative(net, run, dp, dx, x, h=1e-30):
    """How run(net, x) changes along (dp, dx), by the complex step: see test_layers."""
    return run(net.twin(net.params.flat + 1j * h * dp), x + 1j * h * dx)[0].imag / h


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
    up, low = (net.twin(net.params.flat + s * dp)(x + s * dx, t, y) for s in (h, -h))
    exact = derivative(net, lambda net, x: net.forward(x, t, y), dp, dx, x)
    close((up - low) / (2 * h), exact, 1e-5)


# --------------------------------------------------------------------------------- refusals

@pytest.mark.parametrize("changes, message", [
    (dict(image=(28, 28)), r"\(28, 28\)"), (dict(image=(0, 4, 1)), r"\(0, 4, 1\)"),
    (dict(channels=()), "channels"), (dict(channels=(5, 8)), "even"),
    (dict(channels=(2, 4)), r"\(2, 4\).*at least 4"), (dict(channels=(4, 0)), r"\(4, 0\)"),
    (dict(channels=(4, 2)), r"4 heads.*\(4, 2\)"),
    (dict(attention=(2,)), r"level 2.*0\.\.1"), (dict(attention=(-1,)), "level -1"),
    (dict(heads=3), "3 heads"), (dict(heads=0), "heads is 0"),
    (dict(classes=-1), "classes.*-1"), (dict(blocks=0), r"blocks.*\(0, 0\)"),
    (dict(blocks=(1, 0)), r"\(1, 0\).*at least 1"), (dict(blocks=(2,)), r"\(2,\).*each level"),
    (dict(blocks=(1, 2, 1)), r"\(1, 2, 1\).*each level"), (dict(blocks=()), r"blocks.*\(\)"),
    (dict(dropout=1), "dropout.*1"), (dict(dropout=-0.1), "-0.1")])
def test_bad_configurations(changes, message):
    """A ValueError that says what was given."""
    with pytest.raises(ValueError, match=message):
        td.UNet(**SMALL | changes)


@pytest.mark.parametrize("shape", [(3, 6, 5, 2), (3, 5, 6), (3, 5, 6, 1), (5, 6, 2)])
def test_an_image_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"B, \*\(5, 6, 2\)"):
        small()(np.zeros(shape), 1)


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
