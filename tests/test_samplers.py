"""The samplers and guidance, without a trained network.

Each sampler is first its paper's algorithm, written again here in the paper's own variables,
for any schedule, any of its steps and any model, right or wrong. Then the truth: for data whose
law is a mixture of Gaussians the best model is a formula, and where a sampler has to arrive is
known, with nothing drawn: a deterministic one keeps every x at its quantile, and one with noise
moves a density, by one integral a step.
"""
import math
from functools import partial
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, strategies as st

import tinyddpm as td
from common import PREDICTS, SPACINGS, abar_of, close, refused
from tinyddpm import (Diffusion, cosine_betas, ddim, ddpm, dpm_solver, dynamic_threshold,
                      flow_betas, guided, heun, linear_betas, sample, timesteps)

pytestmark = pytest.mark.skipif(td.xp is not np, reason="these run with TINYDDPM_BACKEND=numpy")
every_kind = pytest.mark.parametrize("kind", PREDICTS)
TEN = linear_betas(10, 0.05, 0.3)
START = np.random.default_rng(1).standard_normal((2, 3))
START.flags.writeable = False


def model_of(guess, betas, kind):
    """A model that guesses x0 = guess(x, abar), and says so in its own kind of answer."""
    abars = abar_of(betas)

    def model(x, t):
        abar = abars[t[0]]
        x0 = guess(x, abar)
        eps = (x - abar ** 0.5 * x0) / (1 - abar) ** 0.5
        return {"eps": eps, "x0": x0, "v": abar ** 0.5 * eps - (1 - abar) ** 0.5 * x0,
                "flow": eps - x0}[kind]
    return model


def bad_guess(x, abar):
    """Neither right nor linear, nor within -1 and 1."""
    return 1.5 * np.tanh(2 * x + abar)


def run(sampler, guess=bad_guess, kind="eps", betas=TEN, x=START, rng=5, steps=10, **options):
    """All (t, x_t) that a sampler yields."""
    return list(sampler(model_of(guess, betas, kind), Diffusion(betas, kind), x, rng=rng,
                        steps=steps, **options))


def assert_same_walk(walk, other, tolerance=0.0):
    for (t, x), (t_too, x_too) in zip(walk, other, strict=True):
        assert t == t_too
        close(x, x_too, tolerance)


# ------------------------------------------------------------------- what the papers prescribe
# guess(x, abar) -> x0, eps; abars: of the steps and, last, 1; draw() -> standard normal noise.

def ddpm_algorithm_2(guess, x, abars, draw, variance):
    """With alpha = abar / abar_s, also where steps are left out; no noise in the last step."""
    for abar, abar_s in pairwise(abars):
        alpha = abar / abar_s
        var = 1 - alpha if variance == "large" else (1 - abar_s) / (1 - abar) * (1 - alpha)
        x = (x - (1 - alpha) / (1 - abar) ** 0.5 * guess(x, abar)[1]) / alpha ** 0.5
        x = x + var ** 0.5 * draw() if abar_s < 1 else x
    return x


def ddim_equation_12(guess, x, abars, draw, eta):
    for abar, abar_s in pairwise(abars):
        x0, eps = guess(x, abar)
        sigma = eta * ((1 - abar_s) / (1 - abar)) ** 0.5 * (1 - abar / abar_s) ** 0.5
        z = draw() if sigma else 0
        x = abar_s ** 0.5 * x0 + max(1 - abar_s - sigma ** 2, 0) ** 0.5 * eps + sigma * z
    return x


def dpm_solver_algorithm_2(guess, x, abars, draw):
    """In its alpha, sigma, lambda, h and r. The first and the last step are of order 1."""
    alpha, sigma = abars ** 0.5, (1 - abars) ** 0.5
    with np.errstate(divide="ignore"):
        lam = np.log(alpha / sigma)             # -inf at zero SNR; r is then infinite
    guesses = []
    for i in range(1, len(abars)):
        guesses.append(guess(x, abars[i - 1])[0])
        D, h = guesses[-1], lam[i] - lam[i - 1]
        if 1 < i < len(abars) - 1:
            r = (lam[i - 1] - lam[i - 2]) / h
            D = (1 + 1 / (2 * r)) * guesses[-1] - 1 / (2 * r) * guesses[-2]
        x = sigma[i] / sigma[i - 1] * x - alpha[i] * np.expm1(-h) * D
    return x


def edm_algorithm_1(guess, x, abars, draw):
    """With its general slope, d = (sigma'/sigma + s'/s) x - sigma' s/sigma D, for s = cos(phi)
    and sigma = tan(phi). The last step is Euler's in its own choice, s = 1 and sigma itself."""
    phi = np.arctan2((1 - abars) ** 0.5, abars ** 0.5)

    def slope(x, i):
        s, ds = np.cos(phi[i]), -np.sin(phi[i])
        sigma, dsigma = np.tan(phi[i]), np.cos(phi[i]) ** -2
        return (dsigma / sigma + ds / s) * x - dsigma * s / sigma * guess(x, abars[i])[0]
    for i in range(len(abars) - 2):
        d = slope(x, i)
        ahead = x + (phi[i + 1] - phi[i]) * d
        x = x + (phi[i + 1] - phi[i]) * (d + slope(ahead, i + 1)) / 2
    y, sigma, D = x / np.cos(phi[-2]), np.tan(phi[-2]), guess(x, abars[-2])[0]
    return y + (0 - sigma) * (y - D) / sigma


NOISY = {"ddpm small": (ddpm, partial(ddpm_algorithm_2, variance="small")),
         "ddpm large": (partial(ddpm, variance="large"),
                        partial(ddpm_algorithm_2, variance="large")),
         "ddim eta=.4": (partial(ddim, eta=0.4), partial(ddim_equation_12, eta=0.4)),
         "ddim eta=1": (partial(ddim, eta=1.0), partial(ddim_equation_12, eta=1.0))}
ALL = NOISY | {"ddim": (ddim, partial(ddim_equation_12, eta=0.0)),
               "dpm_solver": (dpm_solver, dpm_solver_algorithm_2),
               "heun": (heun, edm_algorithm_1)}
any_sampler = pytest.mark.parametrize("sampler", [one for one, _ in ALL.values()], ids=ALL)


@st.composite
def betas_and_route(draw):
    """A short schedule, one in two ending in zero SNR, and some of its steps from the last."""
    betas = draw(st.lists(st.floats(1e-3, 0.5), max_size=9)) + [draw(st.sampled_from([0.3, 1]))]
    steps = draw(st.sets(st.integers(1, len(betas))))
    return betas, sorted(steps | {len(betas)}, reverse=True)


@pytest.mark.parametrize("name", ALL)
@every_kind
@given(schedule=betas_and_route())
def test_every_sampler_is_its_paper(name, kind, schedule):
    """Without clipping. Two of the papers divide by abar: for them, 1e-17 is left of it."""
    (sampler, paper), (betas, route) = ALL[name], schedule
    kind = "v" if betas[-1] == 1 and kind == "eps" else kind
    abars = abar_of(betas)[[*route, 0]]
    if name[:4] in ("ddpm", "heun"):
        abars = np.maximum(abars, 1e-17)

    def guess(x, abar):
        x0 = bad_guess(x, abar)
        return x0, (x - abar ** 0.5 * x0) / (1 - abar) ** 0.5
    rng = np.random.default_rng(5)
    end = paper(guess, START, abars, lambda: rng.standard_normal((2, 3)))
    walk = run(sampler, kind=kind, betas=betas, steps=route, clip=None)
    close(walk[-1][1], end, 1e-6 if betas[-1] == 1 else 1e-9)


@every_kind
@given(schedule=betas_and_route())
def test_ddim_at_eta_1_is_ddpm(kind, schedule):
    """The same mean and variance at every step, so the same x from the same noise; clipped, and
    from zero SNR, where an abar off by 1e-16 leaves its root, 1e-8, of x."""
    betas, route = schedule
    kind = "v" if betas[-1] == 1 and kind == "eps" else kind
    assert_same_walk(run(partial(ddim, eta=1.0), kind=kind, betas=betas, steps=route),
                     run(ddpm, kind=kind, betas=betas, steps=route), 1e-6)


@given(T=st.integers(1, 40), data=st.data())
def test_euler_steps_of_rectified_flow_are_ddim(T, data):
    """In the flow's own variables: x = (1 - u) x0 + u eps, dx/du = eps - x0 = velocity(x, u),
    Euler from u to u'. At unit variance this x is divided by c(u) = |(1 - u, u)|."""
    route = sorted(data.draw(st.sets(st.integers(1, T), min_size=1)), reverse=True)

    def c(u):
        return np.hypot(1 - u, u)

    def velocity(x, u):
        return np.tanh(2 * x + u)                       # any network
    x = START * c(route[0] / T)
    for t, s in pairwise([*route, 0]):
        x = x + (s - t) / T * velocity(x, t / T)
    walk = ddim(lambda x, t: velocity(x * c(t[0] / T), t[0] / T),
                Diffusion(flow_betas(T), "flow"), START, steps=route, eta=0, clip=None)
    close(sample(walk), x, 1e-12)


# ---------------------------------------------------------------------------- the known truths

def density(x, mean, var):
    return np.exp(-(x - mean) ** 2 / (2 * var)) / (2 * math.pi * var) ** 0.5


class Mixture:
    """Gaussians in one dimension, each a (weight, mean m, deviation s). Noised to abar they are
    Gaussians again: of means sqrt(abar) m, variances abar s^2 + 1 - abar."""
    def __init__(self, *parts):
        self.weights, self.means, self.stds = np.transpose(parts)

    def noised(self, abar):
        return abar ** 0.5 * self.means, abar * self.stds ** 2 + 1 - abar

    def guess(self, x, abar):
        """E[x0 | x_t]: each Gaussian's own, m + cov/var (x - mean), by their shares at x."""
        mean, var = self.noised(abar)
        off = x[..., None] - mean
        share = self.weights * density(off, 0, var) + 1e-290
        own = self.means + abar ** 0.5 * self.stds ** 2 / var * off
        return (share * own).sum(-1) / share.sum(-1)

    def cdf(self, x, abar=1.0):
        mean, var = self.noised(abar)
        z = (x[..., None] - mean) / var ** 0.5
        return np.vectorize(math.erf)(z / 2 ** 0.5) @ self.weights / 2 + 0.5

    def quantile(self, u, abar=1.0):
        """The x below which a share u lies, by bisection."""
        low, high = np.full(u.shape, -9.0), np.full(u.shape, 9.0)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.cdf(middle, abar) < u
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return low


HALF = Mixture((1, 0, 0.5))
LINE = Mixture((0.3, -0.7, 0.1), (0.5, 0.2, 0.15), (0.2, 0.8, 0.05))
COSINE = cosine_betas(1000)
ABAR = abar_of(COSINE)
U = (np.arange(29) + 1) / 30


@every_kind
def test_known_deviation(kind):
    """Data of N(0, .5^2), linear betas, an exact model: 50 steps of DDIM end at .4714, whatever
    the model answers. Nearer to .5 would be a fault."""
    low, high = run(ddim, HALF.guess, kind, linear_betas(1000), np.array([[0.0], [1.0]]),
                    steps=50, clip=None)[-1][1]
    assert round(float(high[0] - low[0]), 4) == 0.4714


def off_quantile(sampler, steps, spacing):
    """How far any x of the LINE strays from its quantile, in probability, at any time."""
    x = LINE.quantile(U, ABAR[timesteps(1000, steps, spacing)[0]])[:, None]
    walk = run(sampler, LINE.guess, "v", COSINE, x, steps=steps, spacing=spacing, clip=None)
    return max(np.abs(LINE.cdf(x[:, 0], ABAR[t]) - U).max() for t, x in walk)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler, limit", [(ddim, 0.005), (dpm_solver, 0.002), (heun, 0.002)])
def test_deterministic_samplers_keep_quantiles(sampler, limit, spacing):
    """All the way from noise to data, the better the more steps."""
    assert off_quantile(sampler, 250, spacing) < limit < off_quantile(sampler, 40, spacing)


@pytest.mark.parametrize("sampler, order", [(ddim, 1), (dpm_solver, 2), (heun, 2)])
@pytest.mark.parametrize("law", [HALF, Mixture((1, 0.4, 1.5)), LINE])
def test_order_of_convergence(sampler, order, law):
    """With twice the steps the error, at a fixed t, falls 2^order times."""
    T, begin, stop, errors = 20_000, 18_000, 4000, []
    betas = cosine_betas(T)
    x, wanted = (law.quantile(U, abar_of(betas)[t])[:, None] for t in (begin, stop))
    for n in (40, 80, 160):
        steps = np.round(np.linspace(begin, stop, n + 1)).astype(int)
        walk = run(sampler, law.guess, "eps", betas, x, steps=steps, clip=None)
        errors.append(np.abs(dict(walk)[stop] - wanted).max())
    measured = np.log2(errors[:-1]) - np.log2(errors[1:])
    assert np.all(np.abs(measured - order) < 0.2), measured


GRID, H = np.linspace(-4.5, 4.5, 301, retstep=True)


def moved_density(sampler, steps):
    """{t: distribution function at the right edges of the GRID's cells} of x on its way. A step
    leads from x to N(mean(x), std^2), as its answers to two known draws tell; the density of
    x_s is an integral over x_t."""
    route, found = timesteps(1000, steps), {}
    z = [np.random.default_rng(seed).standard_normal((301, 1)) for seed in (0, 1)]
    p = np.diff(LINE.cdf(np.append(GRID - H / 2, 9), ABAR[route[0]]))
    for t, s in pairwise(route):
        x = [run(sampler, LINE.guess, "v", COSINE, GRID[:, None], seed, [t, s], clip=None)[0][1]
             for seed in (0, 1)]
        std = (x[0] - x[1]) / (z[0] - z[1])
        assert np.ptp(std) < 1e-9
        p = H * density(GRID[:, None], (x[0] - std * z[0])[:, 0], std[0] ** 2) @ p
        found[s] = np.cumsum(p)
    return found


@pytest.mark.parametrize("name", NOISY)
def test_noisy_samplers_keep_the_density(name):
    """Off by a little with 25 steps, by half as much with 50: so twice the one less the other
    is their limit, and that is the mixture's own density."""
    few, many = (moved_density(NOISY[name][0], steps) for steps in (25, 50))
    off = [[np.abs(F - LINE.cdf(GRID + H / 2, ABAR[t])).max()
            for F in (few[t], many[t], 2 * many[t] - few[t])] for t in few]
    off_few, off_many, off_limit = np.max(off, 0)
    assert 0.02 < off_few < 0.05 and 1.7 < off_few / off_many < 2.3 and off_limit < 0.006


# ------------------------------------------------------------------------------------ the loop

@any_sampler
@pytest.mark.parametrize("steps, times", [
    (5, [8, 6, 4, 2, 0]), (np.int64(2), [5, 0]), (1, [0]), ([9, 4, 1], [4, 1, 0]),
    ((9, 4, 1), [4, 1, 0]), (np.array([3]), [0]), (range(6, 0, -3), [3, 0])], ids=str)
def test_yields_the_time_arrived_at(sampler, steps, times):
    """One yield a step, the last of t = 0. The model is asked once a step, at the time left, t
    being one integer for each image; by Heun also at the time arrived at, but for 0."""
    asked = []
    walk = list(sampler(lambda x, t: asked.append(t) or np.tanh(x), Diffusion(TEN), START,
                        rng=5, steps=steps))
    assert [t for t, _ in walk] == times
    assert all(isinstance(t, (int, np.integer)) and x.shape == (2, 3) for t, x in walk)
    left = [10 if np.ndim(steps) == 0 else steps[0], *times[:-1]]
    arrived = times[:-1] if sampler is heun else []
    assert sorted(map(list, asked)) == sorted([t, t] for t in [*left, *arrived])
    assert all(t.dtype.kind == "i" for t in asked)


@pytest.mark.parametrize("sampler, options", [
    (ddpm, dict(steps=120, variance="small")), (ddim, dict(steps=50, eta=0.0)),
    (dpm_solver, dict(steps=20)), (heun, dict(steps=10))])
def test_options_and_what_they_are_unless_told(sampler, options):
    betas, rng = linear_betas(120), dict(rng=5) if sampler is ddpm else {}
    walk = list(sampler(model_of(bad_guess, betas, "eps"), Diffusion(betas), START, **rng))
    options |= dict(spacing="trailing", clip=(-1, 1))
    assert_same_walk(walk, run(sampler, betas=betas, **options))
    assert np.all(np.abs(walk[-1][1]) == 1)             # so the clip shows
    for spacing in SPACINGS:
        assert_same_walk(run(sampler, steps=3, spacing=spacing),
                         run(sampler, steps=timesteps(10, 3, spacing)))


@any_sampler
@pytest.mark.parametrize("clip", [None, (-9, 9), dynamic_threshold])
def test_nobodys_array_is_written_to(sampler, clip):
    """The caller's start, the model's answers and all x_t yielded before, as a film keeps them,
    are locked here, as a view of them would be. The caller may write into every x_t."""
    def locked(x):
        x.flags.writeable = False
        return x
    for kind in PREDICTS:
        for _, x in sampler(lambda x, t: locked(np.tanh(x)), Diffusion(TEN, kind), START, rng=5,
                            steps=5, clip=clip):
            assert x.flags.writeable
            locked(x)


@any_sampler
def test_inpainting_through_the_yielded_array(sampler):
    """What the caller writes into x_t is what the next step starts from."""
    seen = set()
    for s, x in sampler(lambda x, t: seen.add((t[0], *x[:, 0])) or np.tanh(x), Diffusion(TEN),
                        START, rng=5, steps=[9, 6, 3]):
        x[:, 0] = s
    assert {(6, 6, 6), (3, 3, 3)} < seen


@any_sampler
def test_types_stay(sampler):
    """A NumPy float64, as the tables hold, would make float64 of a float32 array."""
    model = guided(lambda x, t, y: x / 2, [1, 2], 0, 2.0, rescale=0.7, interval=(3, 7))
    for kind, dtype in product(PREDICTS, (np.float32, np.float64)):
        walk = sampler(model, Diffusion(TEN, kind), START.astype(dtype), rng=5, steps=5)
        assert [x.dtype for _, x in walk] == [dtype] * 5


@any_sampler
def test_noise_is_drawn_once_a_step_but_for_the_last(sampler):
    """From the Generator given, which goes on, or from a seed's. Some samplers add none."""
    rng, same = np.random.default_rng(3), np.random.default_rng(3)
    walk, noisy = run(sampler, rng=rng, steps=5), sampler not in (ddim, dpm_solver, heun)
    same.standard_normal((4 * noisy, *START.shape))
    assert rng.bit_generator.state == same.bit_generator.state
    assert_same_walk(walk, run(sampler, rng=3, steps=5))
    assert noisy != np.array_equal(walk[1][1], run(sampler, rng=4, steps=5)[1][1])


@pytest.mark.parametrize("sampler", [ddpm, ddim, dpm_solver, heun])
@pytest.mark.parametrize("given_text, options", [
    ([5, 5], dict(steps=[5, 5])), ([5, 0], dict(steps=[5, 0])), (11, dict(steps=[11, 5])),
    ("'middle'", dict(spacing="middle")), ("float16", dict(x=START.astype(np.float16))),
    ("(2, 1)", dict(model=lambda x, t: x[:, :1]))])
def test_samplers_refuse(sampler, given_text, options):
    """Steps that do not descend or are not there; float16; answers that would be broadcast."""
    right = dict(model=lambda x, t: x, diffusion=Diffusion(TEN), x=START, rng=5, steps=5)
    refused(given_text, sample, sampler(**right | options))


# ------------------------------------------------------------------------------------ clipping

@any_sampler
@pytest.mark.parametrize("clip", [(-0.6, 0.3), np.sin, dynamic_threshold])
def test_clipping_is_a_model_that_clips(sampler, clip):
    """The way is that of a model whose x0 has been clipped before, by bounds or a function. So
    eps is derived again: the usual fault is to keep the one predicted."""
    clipped = clip if callable(clip) else lambda x0: np.clip(x0, *clip)
    wanted = run(sampler, lambda x, abar: clipped(bad_guess(x, abar)), "x0", clip=None)
    for kind in PREDICTS:
        assert_same_walk(run(sampler, kind=kind, clip=clip), wanted, 1e-9)


@given(seed=st.integers(0, 999), size=st.floats(0.1, 10),
       share=st.just([]) | st.tuples(st.floats(0.5, 1)))
def test_dynamic_threshold(seed, size, share):
    """Imagen: nothing passes 1; images within [-1, 1] stay as they are; in others the value at
    the quantile comes to 1, and what lies below it is scaled alike; each image by itself."""
    x0 = size * np.random.default_rng(seed).standard_normal((4, 5, 2))
    x0[0] = np.tanh(x0[0])
    out = dynamic_threshold(x0, *share)
    assert np.abs(out).max() <= 1 and np.array_equal(out[0], x0[0])
    for image, result in zip(x0, out):
        sizes = np.sort(np.abs(image).ravel())
        scale = max(1, np.interp(9 * (share or [0.995])[0], np.arange(10), sizes))
        close(result, np.clip(image / scale, -1, 1))


# ------------------------------------------------------------------------------------ guidance

LABELS, NULL, STEPS = np.array([3, 1, 4]), 10, np.array([1, 6, 7])
IMAGES = np.random.default_rng(0).standard_normal((3, 4, 2))
IMAGES.flags.writeable = False


def labelled(x, t, y):
    """A model with labels, nonlinear in all it is given."""
    return np.sin(x * (1 + y[:, None, None]) + t[:, None, None])


COND, UNCOND = labelled(IMAGES, STEPS, LABELS), labelled(IMAGES, STEPS, np.full(3, NULL))


def guide(w, model=labelled, x=IMAGES, **options):
    return guided(model, LABELS, NULL, w, **options)(x, STEPS)


@pytest.mark.parametrize("w", [-1, 0, 0.0, 0.5, 1, 1.0, 3])
def test_guidance_moves_from_unconditional_to_conditional_and_on(w):
    """uncond + w (cond - uncond), which is (1 + v) cond - v uncond for CFG's v = w - 1. The
    model is called once, on x and t twice, the labels and as many nulls; for w = 0 and 1, where
    there is nothing to mix, on one of the two. No array is written to."""
    close(guide(w), w * COND - (w - 1) * UNCOND)
    calls = []

    def model(x, t, y):
        out = labelled(x, t, y)
        x.flags.writeable = out.flags.writeable = False
        calls.append((x, t, y))
        return out
    out = guide(w, model, rescale=0.5 if w else 0.0)
    [(x, t, y)] = calls
    wanted = [(1, 3), (6, 1), (7, 4)] if w else []
    wanted += [(1, 10), (6, 10), (7, 10)] if w != 1 else []
    assert sorted(zip(t, y)) == sorted(wanted)
    assert np.array_equal(x, np.concatenate([IMAGES] * (len(wanted) // 3)))
    assert w not in (0, 1) or np.array_equal(out, COND if w else UNCOND)


@any_sampler
def test_guidance_between_gaussians_is_the_model_of_another(sampler):
    """Two laws of one width: w of the way from one mean to the other, and on, lies the mean of
    a third, whose score the mixed score is. Each sampler goes, on the same noise, its way."""
    means = np.zeros((11, 1))
    means[[7, 9, NULL], 0] = 0.9, -0.3, 0.2

    def model_at(mean, kind):
        def guess(x, abar):
            return mean + HALF.guess(x - abar ** 0.5 * mean, abar)
        return model_of(guess, TEN, kind)
    for kind, w in product(PREDICTS, (-1, 0, 0.5, 1, 3)):
        third = model_at((1 - w) * means[[NULL]] + w * means[[7, 9]], kind)
        mixed = guided(lambda x, t, y: model_at(means[y], kind)(x, t), [7, 9], NULL, w)
        walks = (sampler(model, Diffusion(TEN, kind), START, rng=5, steps=7, clip=None)
                 for model in (mixed, third))
        assert_same_walk(*walks, 1e-9)


@given(w=st.just(0) | st.floats(1.5, 10), rescale=st.floats(0, 1))
def test_rescale_brings_back_the_conditional_deviation(w, rescale):
    """ZeroSNR section 3.4: at 1 each image has the conditional answer's deviation, its picture
    being the same but for the scale; in between, the two are mixed."""
    plain, full = guide(w), guide(w, rescale=1.0)
    stds = [a.std((1, 2), keepdims=True) for a in (COND, full, plain)]
    close(stds[1], stds[0])
    close(full / stds[1], plain / stds[2])
    close(guide(w, rescale=rescale), rescale * full + (1 - rescale) * plain)


@pytest.mark.parametrize("x", [IMAGES, np.ones((3, 1, 1), np.float32)])
def test_a_flat_answer_is_rescaled_to_itself(x):
    """Both deviations are 0, and their ratio has to be 1, not 0/0. A fresh network answers 0,
    and an image of one pixel never has a deviation."""
    for flat in (0, 0.3):
        out = guide(3.0, lambda x, t, y: 0 * x + flat, x, rescale=0.7)
        close(out, np.full(x.shape, flat), 1e-6)


@pytest.mark.parametrize("w", [0, 0.5, 3.0])
def test_guidance_in_an_interval(w):
    """From its first step to its last the weight is w; elsewhere 1, for w = 0 as well, and
    where it is 1 for all, nothing unconditional is computed."""
    for low, high in ((1, 1), (1, 6), (6, 7), (7, 7), (2, 5)):
        inside, sizes = ((low <= STEPS) & (STEPS <= high)).reshape(3, 1, 1), []

        def model(x, t, y):
            sizes.append(len(x))
            return labelled(x, t, y)
        close(guide(w, model, interval=(low, high)), np.where(inside, guide(w), COND))
        assert sizes == [6 if inside.any() else 3]


@pytest.mark.parametrize("kind", [list, np.uint8, np.int8, np.uint64])
def test_labels_of_any_integers_and_a_null_beyond_them(kind):
    """Among uint8, 256 would wrap around to 0: a class."""
    seen = []
    guided(lambda x, t, y: seen.append(y) or x, kind([1, 2]), 256, 2.0)(START, np.ones(2, int))
    assert list(seen[0]) == [1, 2, 256, 256]


def test_ddpm_ddim_and_guided_refuse():
    """An interval given as shares of T would never guide, and not say so."""
    refused("'learned'", run, ddpm, variance="learned")
    for eta in (-0.1, 1.1, math.nan):
        refused(eta, run, ddim, eta=eta)
    for interval in ((0, 0.8), (0.0, 1.0), (0.1, 5), (5, 1), (0, 5), (1, 2.5)):
        refused(interval, guide, 2, interval=interval)
    for labels in ([1.5, 2.0], [-1, 2], ["a", "b"], [None, 1], [True, False]):
        refused(labels[0], guided, labelled, labels, NULL, 2)
    refused("float16", guide, 2.0, lambda x, t, y: x, IMAGES.astype(np.float16))
