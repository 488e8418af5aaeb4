"""Input of every kind, right and wrong, drawn by hypothesis: what is allowed works and is
finite, all else is a ValueError of one sentence. And cases that are odd, but right: one pixel,
one step, one image, no image, guidance beyond all measure."""
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import tinyddpm as td
from common import KINDS, SPACINGS

pytestmark = [
    pytest.mark.skipif(td.xp is not np, reason="these run with TINYDDPM_BACKEND=numpy"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning")]       # of what is refused afterwards

DIFFUSION = td.Diffusion(td.linear_betas(10, 0.01, 0.3))
IMAGE = (3, 2, 1)
SENTENCE = r"[^;]+; [^;]+"
ALLOWED = r"\b(ha(s|ve) to be|may be|needs|levels are)\b"
NUMBERS = st.one_of(st.floats(-2, 2), st.sampled_from(
    [math.nan, math.inf, -math.inf, 0, 1, -1, 1e-300, 1e-17, 1e-12, 5e-324, 1e9, -1e9, 1e300]))
WHOLES = st.integers(-3, 14)
ODD = st.sampled_from([2.0, 2.5, math.nan, "3", "v", True, [3], np.array([3]), np.array(3.0)])


def net(**changes):
    """A small network, none of whose parameters is 0."""
    made = td.UNet(**dict(image=IMAGE, channels=(4, 8), classes=3) | changes)
    made.params.flat[:] = 0.3 * np.random.default_rng(1).standard_normal(made.params.flat.size)
    return made


NET = net()


def data(N=4, image=IMAGE):
    return (np.random.default_rng(2).uniform(-1, 1, (N, *image)).astype(np.float32),
            np.arange(N) % 3)


def noise(B=2, shape=IMAGE, dtype=np.float32):
    return td.normal(np.random.default_rng(3), (B, *shape), dtype)


def refused(function, *args, given=(), **kwargs):
    """The call is a ValueError of one sentence, which says what was given and what may be."""
    with pytest.raises(ValueError) as caught:
        function(*args, **kwargs)
    text = str(caught.value)
    assert re.fullmatch(SENTENCE, text) and re.search(ALLOWED, text), text
    for part in [given] if isinstance(given, str) else given:
        assert part in text, text


def may_be_refused(function, *args, **kwargs):
    """What the call returns, or None where it is refused, in one sentence."""
    try:
        return function(*args, **kwargs)
    except ValueError as error:
        assert re.fullmatch(SENTENCE, str(error)) and re.search(ALLOWED, str(error)), error


def allowed_or_refused(allowed, function, *args, **kwargs):
    """What the call returns where that is allowed, and otherwise it is refused."""
    if allowed:
        return function(*args, **kwargs)
    refused(function, *args, **kwargs)


def finite(*arrays):
    return all(np.isfinite(a).all() for a in arrays)


# --------------------------------------------------------------------------------- schedules

KNOWN = {*KINDS, *SPACINGS, *td.WEIGHTINGS, *td.LOSSES, "small", "large"}
PARAMETERS = {"linear": ("start", "end"), "scaled_linear": ("start", "end"),
              "quadratic": ("start", "end"), "sigmoid": ("start", "end"),
              "cosine": ("s", "max_beta"), "sqrt": ("s", "max_beta"),
              "karras": ("sigma_min", "sigma_max", "rho")}


def well(betas):
    """Every number that Diffusion knows of such betas is finite and within its bounds."""
    d = td.Diffusion(betas)
    assert np.all(np.diff(d.abar) < 0) and np.all((0 <= d.abar) & (d.abar <= 1))
    assert finite(d.beta, d.alpha, d.snr[1:])
    steps, x = sorted({1, d.T}), np.ones((1, 2))
    for t in steps:
        for s in {0, t - 1, t // 2}:
            mean, var = d.q_posterior(x, 2 * x, t, s)
            assert finite(mean) and 0 <= var <= 1
        for kind in KINDS:
            assert finite(d.target(x, 2 * x, t, kind), d.to_eps(x, t, x, kind))
            for how in td.WEIGHTINGS:
                assert d.loss_weight(t, kind, how) >= 0


def test_every_schedule_has_its_parameters_here():
    assert PARAMETERS.keys() == td.SCHEDULES.keys()


@pytest.mark.parametrize("name", td.SCHEDULES)
@given(T=st.integers(1, 60), data=st.data())
def test_a_schedule_is_lawful_or_refused(name, T, data):
    """Whatever its parameters are, down to infinities and NaN."""
    options = {each: data.draw(NUMBERS) for each in PARAMETERS[name]
               if data.draw(st.booleans())}
    betas = may_be_refused(td.SCHEDULES[name], T, **options)
    if betas is not None:
        assert betas.shape == (T,) and betas.dtype == np.float64
        assert np.all((0 < betas) & (betas <= 1))
        if may_be_refused(td.Diffusion, betas):
            well(betas)


@given(betas=st.lists(NUMBERS, max_size=5), times=st.integers(1, 300))
def test_betas_are_lawful_or_refused(betas, times):
    """Also those too small for 1 - beta to notice, and so many that no signal stays."""
    if may_be_refused(td.Diffusion, betas * times):
        well(betas * times)
    zero = may_be_refused(td.zero_terminal_snr, betas * times)
    if zero is not None:
        assert td.Diffusion(zero).abar[-1] == 0


@pytest.mark.parametrize("betas, given", [
    ([0.1, 1e-17], "beta_2 of 2 is 1e-17"), ([0.9] * 400, "abar_399 is 0"),
    (td.linear_betas(100_000), "add up to 1005, so abar_99999 is"),
    ([0.1, None], "beta_2 of 2 is nan")])
def test_betas_that_leave_nothing_to_divide_by(betas, given):
    refused(td.Diffusion, betas, given=given)


@pytest.mark.parametrize("options", [
    dict(sigma_min=-1), dict(sigma_min=0), dict(sigma_max=-5), dict(sigma_max=math.inf),
    dict(sigma_min=5, sigma_max=4), dict(rho=0), dict(rho=-7), dict(rho=math.nan)])
def test_karras_parameters_that_make_no_schedule(options):
    """Negative ones would have become complex on the way, and a warning."""
    refused(td.karras_betas, 10, **options, given=str(list(options.values())[-1]))


@given(T=st.one_of(WHOLES, ODD), steps=st.one_of(WHOLES, ODD),
       spacing=st.sampled_from(SPACINGS))
def test_timesteps(T, steps, spacing):
    ok = all(type(n) in (int, bool) and n >= 1 for n in (T, steps)) and steps <= T
    chosen = allowed_or_refused(ok, td.timesteps, T, steps, spacing)
    assert not ok or len(chosen) == steps


@given(name=st.text(max_size=8).filter(lambda name: name not in KNOWN))
@settings(max_examples=20)
def test_names_that_nobody_knows(name):
    """Of anything that has a name."""
    x, y = data()
    for function, *args in [
            (td.timesteps, 10, 5, name), (DIFFUSION.to_x0, x, 1, x, name),
            (DIFFUSION.target, x, x, 1, name), (DIFFUSION.loss_weight, 1, "v", name),
            (td.ddpm, NET, DIFFUSION, x, np.random.default_rng(0), None, "trailing", name)]:
        refused(function, *args, given=repr(name))
    for option in ("kind", "loss", "weighting"):
        refused(next, td.train(NET, DIFFUSION, x, y, steps=1, **{option: name}),
                given=f"{option} is {name!r}")


# -------------------------------------------------------------------------- the forward process

METHODS = {
    "q_sample": lambda a, b, t: DIFFUSION.q_sample(a, t, b),
    "q_step": lambda a, b, t: DIFFUSION.q_step(a, t, b),
    "q_posterior": lambda a, b, t: DIFFUSION.q_posterior(a, b, t)[0],
    "to_x0": lambda a, b, t: DIFFUSION.to_x0(a, t, b, "eps"),
    "to_eps": lambda a, b, t: DIFFUSION.to_eps(a, t, b, "v"),
    "target": lambda a, b, t: DIFFUSION.target(a, b, t, "v"),
    "score": lambda a, b, t: DIFFUSION.score(a, t, b)}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
SHAPES = st.sampled_from([(), (1,), (2,), (3,), (2, 1), (2, 3), (3, 2), (2, 2, 2, 1), (0, 3)])
TYPES = st.sampled_from([np.float32, np.float64, np.float16, np.uint8, np.int64, bool, complex])
STEPS = st.one_of(WHOLES, ODD, st.none(), st.lists(WHOLES, max_size=4),
                  st.lists(WHOLES, max_size=3).map(lambda t: np.array(t, np.int32)))


@every_method
@given(shapes=st.tuples(SHAPES, SHAPES), types=st.tuples(TYPES, TYPES), t=STEPS)
def test_arrays_and_steps_fit_or_are_refused(method, shapes, types, t):
    """The images have to be of one shape and floats, t one step of 1..T or one for each."""
    steps, shape = np.asarray(t), shapes[0]
    ok = (shape == shapes[1] and shape != () and steps.dtype.kind == "i"
          and steps.shape in ((), shape[:1]) and np.all((1 <= steps) & (steps <= 10))
          and all(np.dtype(one).kind == "f" for one in types))
    out = allowed_or_refused(ok, method, np.ones(shapes[0], types[0]),
                             np.ones(shapes[1], types[1]), t)
    assert not ok or out.shape == shape and finite(out)


@every_method
@given(t=STEPS.filter(lambda t: np.size(t) != 3), same=st.booleans())
def test_agreeing_arrays_alone_are_not_enough(method, t, same):
    """The same with arrays that fit, so that it is t that decides."""
    steps, x = np.asarray(t), noise(2 if same else 3)
    ok = (steps.dtype.kind == "i" and steps.shape in ((), (len(x),))
          and np.all((1 <= steps) & (steps <= 10)))
    out = allowed_or_refused(ok, method, x, x, t)
    assert not ok or finite(out) and out.dtype == np.float32


@every_method
@pytest.mark.parametrize("what, given", [
    ([0.5, 1.0], "list (2,)"), (0.5, "float ()"), (None, "NoneType ()"), ("x", "str ()"),
    (np.float64(0.5), "float64 ()"), (np.array(0.5), "float64 ()")])
def test_what_is_not_an_array_of_images(method, what, given):
    refused(method, what, np.ones(2), 1, given=given)
    refused(method, np.ones(2), what, 1, given=given)


@pytest.mark.parametrize("gamma", [-1, math.nan, -math.inf])
def test_gamma_of_min_snr(gamma):
    refused(DIFFUSION.loss_weight, 1, "v", "min_snr", gamma, given=str(gamma))


@every_method
def test_no_images_are_no_mistake(method):
    for t in (3, np.zeros(0, int)):
        assert method(noise(0), noise(0), t).shape == (0, *IMAGE)


@every_method
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_image_that_is_not_finite_spoils_no_other(method, value):
    """And it stays to be seen as what it is."""
    a, b = noise(3), noise(3)
    good = method(a, b, np.array([3, 4, 5]))
    a[1, 0, 0, 0] = value
    out = method(a, b, np.array([3, 4, 5]))
    if method is not METHODS["score"]:          # which is of eps alone
        assert not np.isfinite(out[1, 0, 0, 0])
        good[1, 0, 0, 0] = out[1, 0, 0, 0] = 0
    assert np.array_equal(out, good)


@pytest.mark.parametrize("x0, given", [
    (noise() * 0 + 255, "255"), (noise() * math.nan, "nan"), (noise() - math.inf, "inf"),
    (noise() * 0 + 1.01, "1.0"), (noise(0), "nan")])
def test_likelihood_of_what_is_no_image(x0, given):
    """Bytes that nobody scaled, NaN, nothing at all: a bound of these would mean nothing."""
    refused(DIFFUSION.bits_per_dim, lambda x, t: x, x0, np.random.default_rng(0), given=given)


@pytest.mark.parametrize("rng", [None, 0, "rng", np.random])
def test_a_seed_is_not_a_generator(rng):
    """Where train and UNet take either, these do not; they say so."""
    for use in (lambda: td.sample(td.ddpm(lambda x, t: x, DIFFUSION, noise(), rng)),
                lambda: td.sample(td.ddim(lambda x, t: x, DIFFUSION, noise(), rng, 5, eta=1)),
                lambda: DIFFUSION.bits_per_dim(lambda x, t: x, noise() / 9, rng)):
        if rng is np.random:
            with pytest.raises(TypeError):      # NumPy's old functions know no dtype
                use()
        else:
            refused(use, given=f"rng is {rng!r}")


# ----------------------------------------------------------------------- samplers and guidance

def rng():
    return np.random.default_rng(4)


SAMPLERS = {
    "ddpm": lambda model, x, **more: td.ddpm(model, DIFFUSION, x, rng(), **more),
    "ddim": lambda model, x, **more: td.ddim(model, DIFFUSION, x, **{"steps": 5} | more),
    "noisy ddim": lambda model, x, **more: td.ddim(model, DIFFUSION, x, rng(),
                                                   **{"steps": 5, "eta": 0.7} | more)}
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)


def zero(x, t):
    return 0 * x


@every_sampler
@given(steps=st.one_of(st.none(), WHOLES, NUMBERS, st.lists(WHOLES, max_size=4),
                       st.sets(WHOLES, max_size=4).map(lambda steps: sorted(steps)[::-1]),
                       st.lists(st.one_of(WHOLES, NUMBERS), min_size=1, max_size=3)))
def test_steps_descend_or_are_refused(sampler, steps):
    """At the call, before anything is drawn."""
    if isinstance(steps, list):
        ok = (steps and all(type(t) is int for t in steps)
              and all(a > b for a, b in zip([11, *steps], [*steps, 0])))
        taken = len(steps)
    else:
        ok = steps is None or type(steps) is int and 1 <= steps <= 10
        taken = 10 if steps is None else steps
    run = allowed_or_refused(ok, sampler, zero, noise(), steps=steps)
    assert not ok or len(list(run)) == taken


@pytest.mark.parametrize("steps", [[[3, 1]], [math.inf], [math.nan, 1], np.array(3), 2.5, "5",
                                   {9, 1}, [5.0, 2.0], ["3"], [3, None], object()],
                         ids=lambda steps: type(steps).__name__)
def test_other_steps(steps):
    refused(td.ddim, zero, DIFFUSION, noise(), steps=steps)


@every_sampler
@given(clip=st.one_of(st.none(), NUMBERS.map(lambda a: (a,)), st.tuples(NUMBERS, NUMBERS),
                      st.tuples(NUMBERS, NUMBERS, NUMBERS), st.just(())))
def test_bounds_are_in_order_or_refused(sampler, clip):
    ok = clip is None or len(clip) == 2 and clip[0] < clip[1]
    run = allowed_or_refused(ok, sampler, zero, noise(), clip=clip)
    if ok and clip and finite(clip):
        out = td.sample(run)
        assert np.all((np.float32(clip[0]) <= out) & (out <= np.float32(clip[1])))


@given(eta=NUMBERS)
def test_eta(eta):
    allowed_or_refused(0 <= eta <= 1, td.ddim, zero, DIFFUSION, noise(),
                       np.random.default_rng(0), steps=2, eta=eta)


@every_sampler
@pytest.mark.parametrize("start, model, given", [
    (noise().astype(int), zero, "int64"), (noise() > 0, zero, "bool"),
    (noise().astype(complex), zero, "complex128"),
    (noise(), lambda x, t: None, "NoneType"), (noise(), lambda x, t: x.tolist(), "list"),
    (noise(), lambda x, t: x[0], "(3, 2, 1)"), (noise(), lambda x, t: x > 0, "bool"),
    (noise(), lambda x, t: float(x.mean()), "float ()")])
def test_starts_and_answers_that_are_no_images(sampler, start, model, given):
    refused(td.sample, sampler(model, start), given=given)


@every_sampler
def test_sampling_no_images(sampler):
    assert td.sample(sampler(zero, noise(0))).shape == (0, *IMAGE)


@every_sampler
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_answer_that_is_not_finite_spoils_no_other_image(sampler, kind, value):
    def broken(x, t):
        out = 0.1 * x
        out[1, 0, 0, 0] = value
        return out

    good = td.sample(sampler(lambda x, t: 0.1 * x, noise(3), kind=kind))
    out = td.sample(sampler(broken, noise(3), kind=kind))
    assert np.isnan(out[1, 0, 0, 0]) or math.isinf(value)
    out[1, 0, 0, 0] = good[1, 0, 0, 0] = 0
    assert np.array_equal(out, good)


@every_sampler
@given(w=st.one_of(st.floats(-1e30, 1e30), st.sampled_from([1e30, -1e30, 1e3, 7.5, -1])),
       rescale=st.sampled_from([0, 0.7, 1]), kind=st.sampled_from(KINDS),
       interval=st.sampled_from([None, (1, 8), (3, 3)]))
@settings(max_examples=25)
def test_guidance_beyond_all_measure_stays_bounded(sampler, w, rescale, kind, interval):
    model = td.guided(NET, [0, 2], NET.null, w, rescale, interval)
    out = td.sample(sampler(model, noise(), kind=kind))
    assert np.all(np.abs(out) <= 1) and out.dtype == np.float32


@given(w=NUMBERS, rescale=NUMBERS, low=NUMBERS, high=NUMBERS)
def test_guidance_options(w, rescale, low, high):
    ok = abs(w) <= 1e30 and 0 <= rescale <= 1 and low <= high
    allowed_or_refused(ok, td.guided, NET, [0, 1], 3, w, rescale, (low, high))


@pytest.mark.parametrize("image, answer", [(IMAGE, 0.0), (IMAGE, 0.25), ((1, 1, 1), 0.25)])
def test_rescaling_a_flat_answer_leaves_it(image, answer):
    """There is no deviation to bring back: a fresh network answers 0, and an image of one pixel
    never has any."""
    x = noise(2, image)
    model = td.guided(lambda x, t, y: 0 * x + answer, [0, 1], 3, w=3.0, rescale=0.7)
    assert np.array_equal(model(x, np.array([1, 2])), 0 * x + np.float32(answer))


LABELS = st.one_of(
    WHOLES, ODD, st.lists(WHOLES, min_size=1, max_size=3), st.lists(NUMBERS, max_size=2),
    st.lists(st.booleans(), min_size=1, max_size=2), st.just(["a", "b"]), st.just([[0, 1]]),
    st.lists(WHOLES, min_size=2, max_size=2).map(lambda y: np.array(y, np.int8)))


@pytest.mark.parametrize("w", [0, 1, 2])
@given(labels=LABELS)
def test_labels_for_guidance(w, labels):
    """One for each image; with a weight of 0 they are not looked at further."""
    y = np.asarray(labels)
    ok = y.dtype.kind == "i" and y.shape == (2,) and (w == 0 or np.all((0 <= y) & (y <= 3)))

    def draw():
        return td.guided(NET, labels, NET.null, w)(noise(), np.array([1, 2]))
    out = allowed_or_refused(ok, draw)
    assert not ok or finite(out)


@pytest.mark.parametrize("threads, chunk", [
    (0, 4), (-1, 4), (2, 0), (2, -1), (2, 2.5), (1.5, 2)])
def test_parts_of_parallel(threads, chunk):
    refused(td.parallel, NET, threads, chunk)


# -------------------------------------------------------------------------------- the network

@given(t=STEPS)
def test_steps_for_the_network(t):
    """Integers, one or one for each image; it does not know T."""
    steps = np.asarray(t)
    ok = steps.dtype.kind == "i" and steps.shape in ((), (2,))
    out = allowed_or_refused(ok, NET, noise(), t)
    assert not ok or finite(out)


@given(labels=LABELS)
def test_labels_for_the_network(labels):
    y = np.asarray(labels)
    ok = y.dtype.kind == "i" and y.shape in ((), (2,)) and np.all((0 <= y) & (y <= 3))
    out = allowed_or_refused(ok, NET, noise(), 3, labels)
    assert not ok or finite(out)


@given(shape=st.one_of(SHAPES, st.sampled_from([(2, *IMAGE), (1, *IMAGE), (0, *IMAGE), IMAGE])),
       dtype=TYPES.filter(lambda dtype: dtype not in (complex, np.float16)))
def test_images_for_the_network(shape, dtype):
    ok = shape[1:] == IMAGE and shape[0] and np.dtype(dtype).kind == "f"
    out = allowed_or_refused(ok, NET, np.ones(shape, dtype), 3)
    assert not ok or finite(out) and out.shape == shape


def test_no_images_for_a_parallel_network():
    refused(td.parallel(NET, 2), noise(0), np.zeros(0, int), given="(0, 3, 2, 1)")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_image_spoils_no_other_in_the_network(value):
    x = noise(3)
    good = NET(x, 3)
    x[1, 2, 1, 0] = value
    out = NET(x, 3)
    assert np.isnan(out[1]).any() and np.array_equal(out[[0, 2]], good[[0, 2]])


FEW = st.sampled_from([0, -1, 1, 2, 3, 4, 8, 1.0, 2.0, 4.5, math.nan])
RIGHT = dict(image=(3, 1, 2), channels=(4, 8), blocks=1, classes=2, attention=(1,), heads=2,
             dropout=0.5)
DRAWN = dict(image=st.lists(FEW, min_size=2, max_size=4), channels=st.lists(FEW, max_size=3),
             blocks=st.one_of(FEW, st.lists(FEW, max_size=3)), classes=FEW,
             attention=st.lists(FEW, max_size=2), heads=FEW, dropout=NUMBERS)


@pytest.mark.parametrize("names", [*([name] for name in RIGHT), ["channels", "blocks"],
                                   ["channels", "attention", "heads"]], ids="-".join)
@given(fold=st.booleans(), data=st.data())
def test_configurations(names, fold, data):
    """Built and working, or refused; these options are drawn, the others are right."""
    given = RIGHT | {name: data.draw(DRAWN[name]) for name in names}

    def whole(values, least=1):
        return all(type(n) is int and n >= least for n in values)
    image, channels, attention = given["image"], given["channels"], given["attention"]
    blocks = given["blocks"] if np.ndim(given["blocks"]) else [given["blocks"]] * len(channels)
    ok = (len(image) == 3 and whole(image) and channels and whole(channels)
          and channels[0] in (4, 8) and whole(blocks) and len(blocks) == len(channels)
          and whole([given["classes"]], 0) and 0 <= given["dropout"] < 1
          and whole(attention, 0) and all(i < len(channels) for i in attention)
          and (not attention or whole([given["heads"]])
               and not any(channels[i] % given["heads"] for i in attention)))
    made = allowed_or_refused(ok, td.UNet, **given, fold=fold)
    if ok:
        x = noise(2, image)
        assert made(x, 1).shape == x.shape


@pytest.mark.parametrize("dtype", [int, bool, complex, object, np.uint8])
def test_a_network_of_other_numbers(dtype):
    """Of integers, every parameter would be 0, and nobody would know why it learns nothing."""
    refused(td.UNet, dtype=dtype, given=str(np.dtype(dtype)))


# -------------------------------------------------------------------------------- training

def trained(model=None, images=None, labels=None, **options):
    """The network and its last State, after two steps or as many as are asked for."""
    model = model or net()
    images, labels = data()[0] if images is None else images, labels
    labels = data(len(images))[1] if labels is None and model.classes else labels
    state = None
    for state in td.train(model, DIFFUSION, images, labels,
                          **dict(steps=2, batch=3, warmup=0) | options):
        pass
    return model, state


BOUNDS = {"lr": (0, 1000), "decay": (0, 1000), "ema": (0, 1), "label_drop": (0, 1),
          "warmup": (0, math.inf), "clip": (0, math.inf)}


@pytest.mark.parametrize("name", BOUNDS)
@given(value=NUMBERS)
@settings(max_examples=25)
def test_options_of_training(name, value):
    """Within their bounds the parameters stay finite, or a FloatingPointError says that they
    would not have; beyond the bounds they are refused. None slips through as NaN."""
    low, high = BOUNDS[name]
    try:
        done = allowed_or_refused(low <= value <= high, trained, **{name: value})
    except FloatingPointError as error:
        assert value > 100 and "try a lower one" in str(error)
    else:
        assert not done or finite(done[0].params.flat, done[1].ema.flat, done[1].loss)


@pytest.mark.parametrize("name", ["steps", "batch", "accumulate", "threads", "chunk"])
@pytest.mark.parametrize("value", [0, -1, 1.5, math.nan, math.inf, "2", None])
def test_counts_of_training(name, value):
    """No steps at all would silently train nothing, and infinitely many for ever."""
    refused(trained, **{name: value}, given=f"{name} is {value!r}")


@pytest.mark.parametrize("betas", [(1, 0.9), (0.9, 1), (math.nan, 0.9), (-0.1, 0.9), (0.9,),
                                   (0.9, 0.99, 0.999)])
def test_betas_of_adam(betas):
    refused(trained, betas=betas, given=f"betas are {betas}")


def test_adam_without_memory():
    """Betas of 0 are allowed: each step is then the sign of the gradient."""
    model, state = trained(betas=(0, 0))
    assert finite(model.params.flat)


def test_a_diverging_run_leaves_what_can_be_saved(tmp_path):
    """At last the loss is not finite, or save finds that the parameters are not; the file of
    the step before stays."""
    model, kept = net(), None
    with pytest.raises((FloatingPointError, ValueError), match="try a lower one|not finite"):
        for state in td.train(model, DIFFUSION, *data(), steps=200, lr=1000, decay=1000,
                              batch=2):
            td.save(tmp_path / "a", model, state)
            kept = state.step, model.params.flat.copy()
    again, state, _ = td.load(tmp_path / "a")
    assert state.step == kept[0] and np.array_equal(again.params.flat, kept[1])


def test_the_state_of_another_network():
    state = trained()[1]
    refused(trained, net(channels=(4, 12)), state=state, given=str(state.ema.flat.size))


@given(value=st.one_of(NUMBERS, st.floats(-1.1, 1.1)), place=st.integers(0, 4 * 6 - 1),
       dtype=st.sampled_from([np.float32, np.float64]))
def test_one_pixel_decides_over_the_images(value, place, dtype):
    """A single NaN, infinity or 2 among all pixels is found; what rounding does is not one."""
    images = data()[0].astype(dtype)
    images.flat[place] = value
    run = td.train(NET.twin(NET.params.flat.copy()), DIFFUSION, images, data()[1], steps=1,
                   batch=1)
    allowed_or_refused(abs(dtype(value)) < 1.001, next, run)


@given(labels=st.one_of(LABELS, st.lists(WHOLES, min_size=4, max_size=4)))
def test_labels_for_training(labels):
    y = np.asarray(labels)
    ok = y.dtype.kind == "i" and y.shape == (4,) and np.all((0 <= y) & (y <= 3))
    run = td.train(NET.twin(NET.params.flat.copy()), DIFFUSION, data()[0], labels, steps=1,
                   batch=1)
    allowed_or_refused(ok, next, run)


# --------------------------------------------------------------------------- odd, but right

@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("image", [(1, 1, 1), (1, 1, 3), (1, 7, 1), (7, 1, 2), (5, 3, 1)])
def test_images_of_one_pixel_and_of_odd_sizes_from_end_to_end(image, fold, tmp_path):
    """Trained on a single image with the picture, saved, loaded, drawn from, scored."""
    model = td.UNet(image=image, channels=(4, 8, 8), classes=1, attention=(2,), fold=fold)
    images = data(1, image)[0]
    for state in td.train(model, DIFFUSION, images, [0], steps=2, batch=3, chunk=2, warmup=0):
        td.save(tmp_path / "a", model, state)
    model, state, _ = td.load(tmp_path / "a")
    mean = model.twin(state.ema.flat)
    for sampler in SAMPLERS.values():
        out = td.sample(sampler(td.guided(mean, [0, 0], 1, 3.0, rescale=0.5), noise(2, image),
                                kind="v"))
        assert out.shape == (2, *image) and np.all(np.abs(out) <= 1)
    bits = DIFFUSION.bits_per_dim(mean, images, np.random.default_rng(0), "v")
    assert math.isfinite(bits["total"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", td.SCHEDULES)
def test_a_process_of_one_step_from_end_to_end(name, kind):
    """T = 1: the first step is the last. scaled_linear, whose beta would be 0.1 * 1000, is made
    for more steps and says so; the others work."""
    betas = td.SCHEDULES[name](1, *([1e-5, 1e-5] if name == "scaled_linear" else []))
    d, model = td.Diffusion(betas), net()
    for state in td.train(model, d, *data(), steps=2, kind=kind, batch=4):
        assert math.isfinite(state.loss)
    for sampler in (td.ddpm(model, d, noise(), np.random.default_rng(0), kind=kind),
                    td.ddim(model, d, noise(), steps=1, kind=kind)):
        steps = list(sampler)
        assert [t for t, _ in steps] == [0] and np.all(np.abs(steps[0][1]) <= 1)
    bits = d.bits_per_dim(model, data()[0], np.random.default_rng(0), kind)
    assert math.isfinite(bits["total"]) and bits["steps"].shape == (0,)
    refused(td.ddim, model, d, noise(), steps=2, given="steps is 2")


def test_numbers_of_numpy_in_a_configuration(tmp_path):
    """labels.max() + 1 is one, and so are most that are measured. The file takes them."""
    model = td.UNet(image=np.array([2, 3, 1]), channels=np.array([4, 8]), heads=np.int8(2),
                    classes=np.arange(4).max(), blocks=np.array([1, 2]),
                    attention=[np.int64(1)], dropout=np.float32(0.5), fold=np.bool_(True))
    td.save(tmp_path / "a", model, loss=np.float32(0.5), many=np.arange(3), yes=np.bool_(True))
    again, _, settings = td.load(tmp_path / "a")
    assert np.array_equal(again.params.flat, model.params.flat)
    assert again.config == model.config and again.classes == 3
    assert settings == dict(loss=0.5, many=[0, 1, 2], yes=True)


def test_settings_that_json_cannot_hold(tmp_path):
    for value in ({1, 2}, 1j, np.random.default_rng(0)):
        with pytest.raises(TypeError, match=rf"is a {type(value).__name__}, which JSON cannot"):
            td.save(tmp_path / "a", NET, value=value)
    assert not list(tmp_path.iterdir())
