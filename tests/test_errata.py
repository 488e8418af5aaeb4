"""ERRATA.md row by row: what widely copied diffusion code gets wrong, next to what is right.

Each test states a property, `holds`, shows that the wrong form fails it, and that tinyddpm's
own function has it. A wrong sampler is a wrong step in the library's own `walk`, so that
nothing else differs.

The samplers need no network: for data of one point, or of N(0, s^2), the best model is known,
and each step is then affine, x_s = slope x_t + offset + kick z. So the mean and deviation of
the samples can be followed exactly, from x_T to x_0.
"""
import copy
import math
from functools import partial
from itertools import combinations

import numpy as np
import pytest

import tinyddpm as td
from common import abar_of, refused

pytestmark = pytest.mark.skipif(td.xp is not np, reason="these run with TINYDDPM_BACKEND=numpy")

T = 1000
BETAS = td.linear_betas(T)
ABAR, D = abar_of(BETAS), td.Diffusion(BETAS)
X0, EPS, GUESS = np.random.default_rng(0).uniform(-1, 1, (3, 4, 1))


def near(a, b, tolerance=1e-9):
    return np.allclose(a, b, rtol=tolerance, atol=tolerance)


def seed():
    return np.random.default_rng(0)


def mix(abar, x0, eps):
    """DDPM eq. 4: of the variance the share abar is x0's, the rest is noise."""
    return abar ** 0.5 * x0 + (1 - abar) ** 0.5 * eps


def eps_of(x, x0, t):
    """The eps that with x0 makes x at t."""
    return (x - ABAR[t] ** 0.5 * x0) / (1 - ABAR[t]) ** 0.5


def lawful(betas):
    """Variances in (0, 1]: every step adds noise, and abar falls, never below 0."""
    return np.all((0 < betas) & (betas <= 1)) and np.all(np.diff(abar_of(betas)) < 0)


# --------------------------------------------- what a sampler does to the mean and deviation

ROWS = np.array([[0.0], [1.0], [0.0]])      # x of three rows, and their noise z: together they
Z = np.array([[0.0], [0.0], [1.0]])         # show the offset, the slope and the kick


class NoiseZ:
    """Stands in for a Generator: every draw is Z."""

    def standard_normal(self, shape, dtype):
        return Z.astype(dtype)


def laws(walk, mean=0.0, std=1.0):
    """(t, mean, deviation) after every step of a walk over ROWS, from those at its start."""
    for t, x in walk:
        offset, slope, kick = x[0, 0], x[1, 0] - x[0, 0], x[2, 0] - x[0, 0]
        mean, std = offset + slope * mean, math.hypot(slope * std, kick)
        yield t, mean, std
        x[:] = ROWS                         # a sampler goes on from what is written into x


def end(walk):
    """The deviation of x_0, x_T being standard normal."""
    return list(laws(walk))[-1][2]


def best_eps(x, t, s=0.5):
    """E[eps | x_t] for data of N(0, s^2)."""
    abar = ABAR[t].reshape(-1, 1)
    return (1 - abar) ** 0.5 / (abar * s ** 2 + 1 - abar) * x


def point(x, t):
    """E[x0 | x_t] where all data are one point."""
    return np.full_like(x, 0.7)


def ours(sampler, model=best_eps, kind="eps", steps=50, **options):
    return sampler(model, D, ROWS, NoiseZ(), steps=steps, kind=kind, clip=None, **options)


def with_step(step, model=best_eps, kind="eps", steps=50):
    """The library's walk, with another step in it."""
    return td.walk(model, D, ROWS, steps, "trailing", kind, None, step)


def ddim_end(route, s=0.5):
    """The exact deviation at the end of DDIM, eq. 12 with no noise, for data of N(0, s^2)."""
    abar, abar_s = ABAR[route], ABAR[[*route[1:], 0]]
    return np.prod(((abar * abar_s) ** 0.5 * s ** 2 + ((1 - abar) * (1 - abar_s)) ** 0.5)
                   / (abar * s ** 2 + 1 - abar))


def ddpm_end(route, variance="small", s=0.5):
    """The exact deviation at the end of DDPM, Algorithm 2, for data of N(0, s^2)."""
    var = 1.0
    for abar, abar_s in zip(ABAR[route], ABAR[[*route[1:], 0]]):
        alpha = abar / abar_s
        slope = (1 - (1 - alpha) / (abar * s ** 2 + 1 - abar)) / alpha ** 0.5
        kick2 = (1 - alpha) * ((1 - abar_s) / (1 - abar) if variance == "small" else abar_s < 1)
        var = slope ** 2 * var + kick2
    return var ** 0.5


def keeps_marginals(walk):
    """For data of one point a step has to lead from N(sqrt(abar) x0, 1 - abar) at t to the same
    at s: only then does the model see what it was trained on."""
    return all(near((mean, std), (ABAR[t] ** 0.5 * 0.7, (1 - ABAR[t]) ** 0.5))
               for t, mean, std in laws(walk, ABAR[T] ** 0.5 * 0.7, (1 - ABAR[T]) ** 0.5))


@pytest.mark.parametrize("steps, std", [
    (10, 0.3700), (20, 0.4314), (50, 0.4714), (100, 0.4854)])
def test_exact_deviation_of_ddim(steps, std):
    """Of data of deviation .5, a right DDIM falls short, by an amount that is known."""
    exact = ddim_end(td.timesteps(T, steps))
    assert round(exact, 4) == std
    assert near(end(ours(td.ddim, steps=steps)), exact)


@pytest.mark.parametrize("variance, std", [("small", 0.4961), ("large", 0.5008)])
def test_exact_deviation_of_ddpm(variance, std):
    exact = ddpm_end(np.arange(T, 0, -1), variance)
    assert round(exact, 4) == std
    assert near(end(ours(td.ddpm, steps=None, variance=variance)), exact)


def test_nearer_to_the_data_is_not_more_right():
    """Why these tests ask for the recursion's number, not for one near the data's: four of the
    faults below end nearer to .5 than the right DDIM of as many steps does, with .4714."""
    def abar_0_like_abar_1(x, x0, t, s):
        return mix(ABAR[max(s, 1)], x0, eps_of(x, x0, t))

    row_5 = end(ours(td.ddim, spacing="leading"))
    row_5_too = end(ours(td.ddim, steps=quadratic_steps(50)))
    row_7 = end(with_step(abar_0_like_abar_1))
    row_31 = list(laws(ours(td.ddim)))[-2][2]
    faults = [row_5, row_7, row_31, row_5_too]
    assert np.round([end(ours(td.ddim)), *faults], 4).tolist() == [
        0.4714, 0.4724, 0.4728, 0.4810, 0.4853]


# ----------------------------------------------------------------------------------- schedules

@pytest.mark.parametrize("steps, left", [(50, 0.6030), (300, 0.0481), (400, 0.0175)])
def test_01_linear_betas_for_few_steps(steps, left):
    """Row 1: 1e-4..0.02 was made for T = 1000. With fewer steps x_T is not yet noise, but
    sampling starts from noise. Both ends have to grow by 1000/T."""
    def holds(betas):
        return abar_of(betas)[-1] < 5e-5

    wrong = np.linspace(1e-4, 0.02, steps)
    assert round(abar_of(wrong)[-1], 4) == left
    assert holds(BETAS) and not holds(wrong)
    assert holds(td.scaled_linear_betas(steps))


@pytest.mark.parametrize("steps", [2, 10, 19])
def test_02_scaled_betas_above_1(steps):
    """Row 2: from T = 2 to 19 those scaled ends pass 1, abar turns negative, and its root is
    nan. At T = 20 the last beta is exactly 1, and no signal is left, as it may be."""
    scale = 1000 / steps
    wrong = np.linspace(1e-4 * scale, 0.02 * scale, steps)
    assert wrong[-1] > 1 and abar_of(wrong).min() < 0 and not lawful(wrong)
    refused(f"of {steps} is", td.scaled_linear_betas, steps)
    assert lawful(td.scaled_linear_betas(20)) and td.scaled_linear_betas(20)[-1] == 1


def test_03_a_factor_too_many():
    """Row 3: T+1 betas, so that an index runs 0..T, but the product starts at index 0: abar_0
    is below 1, and abar_1 has two factors."""
    def holds(abar):
        return abar[0] == 1 and near(abar[1:] / abar[:-1], 1 - BETAS)

    wrong = np.cumprod(1 - np.linspace(1e-4, 0.02, T + 1))
    assert not holds(wrong)
    assert holds(D.abar)


def test_09_the_mean_by_way_of_eps_with_cosine_betas():
    """Row 9: DDPM's mean written with eps divides by sqrt(alpha_T), so that an error of eps
    grows 31.6 times, although beta is capped at .999 (uncapped, it is a division by 0). By way
    of x0, clipped, it cannot grow."""
    betas = td.cosine_betas(T)
    d, beta, x = td.Diffusion(betas), betas[-1], EPS

    def wrong(eps):
        return (x - beta / (1 - d.abar[T]) ** 0.5 * eps) / (1 - beta) ** 0.5

    def right(eps):
        return next(td.ddpm(lambda x, t: eps, d, x, seed()))[1]

    def holds(mean):
        return np.abs(mean(EPS + 0.1) - mean(EPS)).max() < 0.1
    assert round((1 - beta) ** -0.5, 1) == 31.6 and td.cosine_betas(T, max_beta=1)[-1] == 1
    assert not holds(wrong)
    assert holds(right)


@pytest.mark.parametrize("floor, changed", [(1e-4, 13), (0.01, 807)])
def test_10_cosine_betas_clipped_from_below(floor, changed):
    """Row 10: the cap of .999 is needed at the end; a floor only bends the gentle start, for
    which the schedule was made. How many betas it raises depends on the floor."""
    f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
    free = 1 - f[1:] / f[:-1]

    def raised(betas):
        return np.sum(betas > free * (1 + 1e-6))

    def holds(betas):
        return raised(betas) == 0 and betas.max() <= 0.999
    wrong = np.clip(free, floor, 0.999)
    assert raised(wrong) == changed and not holds(wrong)
    assert holds(td.cosine_betas(T))


def test_12_two_names_for_one_schedule():
    """Row 12: "scaled linear" (diffusers) and "quad" (DDIM's code), offered side by side, are
    one formula, that of latent diffusion's "linear" too. Scaling both ends is another one."""
    def holds(schedules):
        return not any(near(one(100), other(100))
                       for one, other in combinations(schedules.values(), 2))

    wrong = {"scaled_linear": lambda T: np.linspace(1e-4 ** 0.5, 0.02 ** 0.5, T) ** 2,
             "quad": lambda T: (0.01 + (0.02 ** 0.5 - 0.01) * np.arange(T) / (T - 1)) ** 2}
    assert not holds(wrong)
    assert holds(td.SCHEDULES)
    assert near(td.quadratic_betas(100), wrong["scaled_linear"](100))
    assert near(td.scaled_linear_betas(100), np.linspace(1e-3, 0.2, 100))


@pytest.mark.parametrize("wrong", [
    np.linspace(1e-4, 0.02, T) ** 0.5, 0.9999 ** 0.5 - 4e-5 ** 0.5 * np.arange(1, T + 1) / T])
def test_13_sqrt_of_beta(wrong):
    """Row 13: the "sqrt schedule" has its root in abar, not in beta: abar_t = 1 - sqrt(t/T + s)
    (Diffusion-LM). Both of these betas are far too large."""
    def holds(betas):
        return near(abar_of(betas)[1:T], 1 - (np.arange(1, T) / T + 1e-4) ** 0.5)

    assert not holds(wrong)
    assert holds(td.sqrt_betas(T))


def test_14_two_sigmoid_schedules():
    """Row 14: the name stands for a sigmoid in beta (GeoDiff; here) and for one in abar
    (2212.11972): a model trained with one cannot sample with the other."""
    def logistic(x):
        return 1 / (1 + np.exp(-x))

    def holds(betas):
        return near(betas, 1e-4 + 0.0199 * logistic(np.linspace(-6, 6, T)))
    abar = logistic(3 - 6 * np.arange(T + 1) / T)
    abar = (abar - abar[-1]) / (abar[0] - abar[-1])
    assert not holds(1 - abar[1:] / abar[:-1])
    assert holds(td.sigmoid_betas(T))


def test_15_karras_sigmas_as_they_are_sampled():
    """Row 15: EDM lists its sigmas for sampling, from 80 down. Made into betas in that order,
    abar rises: the betas are negative, and clipping makes nearly all of them one constant."""
    i = np.arange(T) / (T - 1)
    sigma = (80 ** (1 / 7) + i * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7

    def holds(betas):
        return lawful(betas) and near(abar_of(betas)[1:], 1 / (1 + sigma[::-1] ** 2))
    abar = np.append(1, 1 / (1 + sigma ** 2))
    wrong = 1 - abar[1:] / abar[:-1]
    clipped = np.clip(wrong, 1e-4, 0.999)
    assert np.sum(wrong < 0) == np.sum(clipped == 1e-4) == 999
    assert not holds(wrong) and not holds(clipped)
    assert holds(td.karras_betas(T))


def test_16_a_cosine_in_beta():
    """Row 16: sin^2 of one step less sin^2 of the step before sums to 0, so that half of these
    betas are negative. The cosine is in abar (iDDPM eq. 17)."""
    f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2

    def holds(betas):
        return lawful(betas) and near(abar_of(betas)[:T], (f / f[0])[:T])
    wrong = np.diff(np.sin(np.pi * np.arange(T + 1) / (T + 1)) ** 2)
    assert np.sum(wrong < -1e-12) == 499
    assert not holds(wrong)
    assert holds(td.cosine_betas(T))


# ----------------------------------------------------------------------------- steps to visit

def quadratic_steps(steps):
    """DDIM's code, "quad", counted from 1."""
    squares = np.linspace(0, (0.8 * T) ** 0.5, steps) ** 2
    return np.unique(squares.astype(int) + 1)[::-1]


class Stub:
    """Stands in for a network, in train: it answers 0 and notes what it was asked."""
    image, classes, null = (1, 1, 1), 3, 3

    def __init__(self):
        self.params, self.grads = (td.Tree({}, np.zeros(1)) for _ in range(2))
        self.asked = []

    def forward(self, x, t, y, rng):
        self.asked.append((x, t, y))
        return np.zeros_like(x), lambda dy: None

    def twin(self):
        return copy.copy(self)


def trained_on(labels, T=T, batch=100, steps=20):
    """What the network is shown in training: x, t and y of every batch. All pictures are 0."""
    net, images = Stub(), np.zeros((len(labels), 1, 1, 1))
    for _ in td.train(net, td.Diffusion(td.linear_betas(T)), images, labels, steps=steps,
                      batch=batch, chunk=batch):
        pass
    return net.asked


def test_04_steps_never_trained():
    """Row 4: randint(1, T) never draws T, where sampling starts; with tables that count from 0
    it never draws the first step. Where the sampler goes, the network has to have been."""
    visited = []

    def model(x, t):
        visited.append(int(t[0]))
        return x

    def holds(trained):
        return set(trained) == set(visited)
    td.sample(td.ddpm(model, D, EPS, seed()))
    assert visited == list(range(T, 0, -1))
    assert not holds(seed().integers(1, T, 20 * T))
    assert not holds(1 + seed().integers(1, T, 20 * T))
    assert holds(np.concatenate([t for _, t, _ in trained_on(np.zeros(4, int), batch=T)]))


@pytest.mark.parametrize("wrong, first", [
    (np.arange(0, T, T // 50)[::-1] + 1, 981), (quadratic_steps(50), 801)],
    ids=["leading", "quadratic"])
def test_05_steps_that_do_not_start_at_T(wrong, first):
    """Row 5: sampling starts from pure noise, which is what x_T is; these start at a step where
    the network has learnt to see some picture in it."""
    def holds(steps):
        return steps[0] == T and np.abs(steps - (T - np.arange(50) * T / 50)).max() <= 0.5

    asked = {}
    for sampler in (td.ddpm, td.ddim):
        def model(x, t):
            asked.setdefault(sampler, []).append(int(t[0]))
            return x
        td.sample(sampler(model, D, EPS, seed(), steps=50))
    assert wrong[0] == first and not holds(wrong)
    assert holds(td.timesteps(T, 50)) and all(holds(steps) for steps in asked.values())
    assert td.timesteps(T, 7).tolist() == [1000, 857, 714, 571, 429, 286, 143]


def on_the_line(walk):
    """A model that knows x0, and no fresh noise: every x_t is made of this x0 and the eps that
    was in x_T; x_0 is x0."""
    return all(near(x, mix(ABAR[t], X0, EPS)) for t, x in walk)


def test_06_the_step_before_as_t_minus_T_over_N():
    """Row 6: 1000 // 7 is 142, but the step after 1000 is 857. x is moved to the noise of 858,
    and the model told that it is at 857; at the end there is noise left."""
    start = mix(ABAR[T], X0, EPS)

    def wrong(x, x0, t, s):
        return mix(ABAR[max(t - T // 7, 0)], x0, eps_of(x, x0, t))

    def model(x, t):
        return X0
    assert not on_the_line(td.walk(model, D, start, 7, "trailing", "x0", None, wrong))
    assert on_the_line(td.ddim(model, D, start, steps=7, kind="x0"))


@pytest.mark.parametrize("sampler", [td.ddpm, td.ddim])
def test_07_abar_at_the_last_step(sampler):
    """Row 7: where the last step goes there is no noise, so abar_0 is 1. With the first entry
    of the table in its stead, noise of variance beta_1 stays in the samples."""
    def holds(d):
        x = td.sample(sampler(lambda x, t: X0, d, EPS, seed(), steps=50, kind="x0"))
        return near(x, X0)

    wrong = td.Diffusion(BETAS)
    wrong.abar[0] = wrong.abar[1]
    assert not holds(wrong)
    assert holds(D)


@pytest.mark.parametrize("t, s", [(T, 980), (500, 480)])
def test_22_image_to_image_that_skips_its_first_step(t, s):
    """Row 22: noised to t, and then denoised from the step after: the model takes the noise
    for less than it is. With a model that knows eps, the picture has to come back."""
    def holds(steps):
        walk = td.ddim(lambda x, t: EPS, D, D.q_sample(X0, t, EPS), steps=steps, clip=None)
        return near(td.sample(walk), X0)

    assert not holds(range(s, 0, -20))
    assert holds(range(t, 0, -20))


def test_31_the_last_step_never_made():
    """Row 31: range(T - 1, 0, -1), counted from 0, stops before index 0, which is step 1: what
    comes out is x_1. A model that knows x0 has to have it drawn exactly."""
    asked = []

    def model(x, t):
        asked.append(int(t[0]))
        return X0
    steps = list(td.ddpm(model, D, EPS, seed(), kind="x0"))
    _, wrong = steps[len(range(T - 1, 0, -1)) - 1]
    assert asked == list(range(T, 0, -1))
    assert not near(wrong, X0)
    assert near(td.sample(iter(steps)), X0)


# ----------------------------------------------------------------------- one step of a sampler

def test_08_x0_clipped_but_not_eps():
    """Row 8: after clipping, x0 and the predicted eps no longer make up x_t, and the step goes
    from elsewhere. eps has to be derived again."""
    t, s, x, eps = 500, 480, EPS, 3 * GUESS

    def holds(x_s):
        eps_used = (x_s - ABAR[s] ** 0.5 * x0) / (1 - ABAR[s]) ** 0.5
        return near(mix(ABAR[t], x0, eps_used), x)
    x0 = np.clip(D.to_x0(x, t, eps, "eps"), -1, 1)
    wrong = mix(ABAR[s], x0, eps)
    assert not holds(wrong)
    assert holds(next(td.ddim(lambda x, t: eps, D, x, steps=[t, s]))[1])


def test_17_ddpm_with_old_and_new_noise():
    """Row 17: sqrt(1 - abar_s) of the predicted eps, and as much fresh noise on top: twice the
    variance that x_s has. DDPM's eq. 7 gives up some of the old for the new."""
    def wrong(x, x0, t, s):
        return mix(ABAR[s], x0, eps_of(x, x0, t)) + (1 - ABAR[s]) ** 0.5 * Z

    assert not keeps_marginals(with_step(wrong, point, "x0"))
    assert keeps_marginals(ours(td.ddpm, point, "x0"))


def ddim_without_a_factor(x, x0, t, s, eta):
    sigma = eta * ((1 - ABAR[s]) / (1 - ABAR[t])) ** 0.5
    rest = max(0, 1 - ABAR[s] - sigma ** 2)         # at eta = 1 it is below 0, its root nan
    return ABAR[s] ** 0.5 * x0 + rest ** 0.5 * eps_of(x, x0, t) + sigma * Z


def ddim_with_a_minus(x, x0, t, s, eta):
    sigma = eta * ((1 - ABAR[s]) / (1 - ABAR[t]) * (1 - ABAR[t] / ABAR[s])) ** 0.5
    rest = max(0, 1 - ABAR[s] - sigma ** 2)
    return ABAR[s] ** 0.5 * x0 - rest ** 0.5 * eps_of(x, x0, t) + sigma * Z


def ddim_unreduced(x, x0, t, s, eta):
    sigma = eta * ((1 - ABAR[s]) / (1 - ABAR[t]) * (1 - ABAR[t] / ABAR[s])) ** 0.5
    return mix(ABAR[s], x0, eps_of(x, x0, t)) + sigma * Z


@pytest.mark.parametrize("wrong", [ddim_without_a_factor, ddim_with_a_minus, ddim_unreduced])
def test_18_ddim_noise(wrong):
    """Row 18: sigma without its factor sqrt(1 - abar/abar_s), the direction to x_t with a minus
    sign, or not reduced by sigma^2; two of them show only where there is noise. At eta = 0 the
    end has to be that of eq. 12, at eta = 1 that of DDPM."""
    def holds(walk_of):
        route = td.timesteps(T, 50)
        return (near(end(walk_of(eta=0)), ddim_end(route))
                and near(end(walk_of(eta=1)), ddpm_end(route)))

    assert not holds(lambda eta: with_step(partial(wrong, eta=eta)))
    assert holds(lambda eta: ours(td.ddim, eta=eta))


def test_23_noise_times_beta():
    """Row 23: beta is a variance, and noise is multiplied by its root. With that, forward steps
    leave data of variance 1 at 1, and the sampler keeps the marginals."""
    one, zero = np.ones((1, 1)), np.zeros((1, 1))

    def holds(step):
        return all(near(step(one, t, zero) ** 2 + step(zero, t, one) ** 2, 1)
                   for t in (1, 500, T))

    def wrong(x, t, eps):
        return (1 - BETAS[t - 1]) ** 0.5 * x + BETAS[t - 1] * eps

    def wrong_back(x, x0, t, s):
        mean, var = D.q_posterior(x0, x, t, s)
        return mean + var * Z
    assert not holds(wrong) and not keeps_marginals(with_step(wrong_back, point, "x0"))
    assert holds(D.q_step) and keeps_marginals(ours(td.ddpm, point, "x0"))


@pytest.mark.parametrize("low, high", [(0, 1), (-1, 1), (-3 ** 0.5, 3 ** 0.5)])
def test_23_uniform_noise(low, high):
    """Row 23: rand for randn. Even with variance 1 it has the wrong shape: here by the largest
    distance between the distribution functions. Ours in training, in DDPM and by itself."""
    def holds(z):
        z = np.sort(z.ravel())
        normal = [0.5 * math.erfc(-value / 2 ** 0.5) for value in z]
        return np.abs(normal - (np.arange(len(z)) + 0.5) / len(z)).max() < 0.03

    n, black = 4000, np.zeros((4000, 1))
    (x, t, _), = trained_on(np.zeros(4, int), batch=n, steps=1)
    _, back = next(td.ddpm(lambda x, t: x, D, black, seed(), steps=[T, 500], kind="x0"))
    std = D.q_posterior(black, black, T, 500)[1] ** 0.5
    assert not holds(seed().uniform(low, high, n))
    assert holds(td.normal(seed(), (n,)))
    assert holds(x.ravel() / (1 - ABAR[t]) ** 0.5)
    assert holds(back / std)


def test_23_noise_after_the_last_step():
    """Row 23: Algorithm 2 adds no noise at t = 1: what comes out is the picture."""
    def holds(walk):
        return near(list(laws(walk))[-1], (0, 0.7, 0))

    def wrong(x, x0, t, s):
        return D.q_posterior(x0, x, t, s)[0] + (1 - ABAR[t] / ABAR[s]) ** 0.5 * Z
    assert not holds(with_step(wrong, point, "x0"))
    assert holds(ours(td.ddpm, point, "x0", variance="large"))
    assert holds(ours(td.ddpm, point, "x0", variance="small"))


def test_21_inpainting_one_step_behind():
    """Row 21: the step leads from t to s, and the known pixels are then noised to t, as
    RePaint's Algorithm 1 is printed. Noised to s, the model at s sees them as in training, and
    at the end they are exact."""
    route, pixels, eps = list(range(T, 0, -100)), X0[:, :1], EPS[:, :1]

    def holds(level_of):
        seen = {}

        def model(x, t):
            seen[int(t[0])] = x[:, :1].copy()
            return np.tanh(x)
        start = np.concatenate([mix(ABAR[T], pixels, eps), EPS], 1)
        for t, (s, x) in zip(route, td.ddpm(model, D, start, seed(), steps=route, kind="x0")):
            level = level_of(t, s)
            x[:, :1] = D.q_sample(pixels, level, eps) if level else pixels
        return (list(seen) == route and np.array_equal(x[:, :1], pixels)
                and all(near(seen[t], mix(ABAR[t], pixels, eps)) for t in route))

    assert not holds(lambda t, s: t)
    assert holds(lambda t, s: s)


# -------------------------------------------------- guidance, conversions, weights, likelihood

def test_19_two_guidance_weights():
    """Row 19: (1 + w) cond - w uncond is CFG's; uncond + w (cond - uncond) is what most code
    has, and here. A weight of one used in the other guides by 1 too much: CFG's is w - 1."""
    def model(x, t, y):
        return np.sin(x * (1 + y[:, None]))

    t, labels = np.full(4, 5), np.array([1, 2, 1, 2])
    cond, uncond = model(EPS, t, labels), model(EPS, t, np.zeros(4, int))

    def holds(guide):
        """0 is unconditional, 1 conditional, and it goes on in equal steps."""
        return (near(guide(0), uncond) and near(guide(1), cond)
                and near(guide(2) - guide(1), cond - uncond)
                and near(guide(3) - guide(2), cond - uncond))

    def cfg(w):
        return (1 + w) * cond - w * uncond

    def right(w):
        return td.guided(model, labels, 0, w)(EPS, t)
    assert not holds(cfg)
    assert holds(right)
    assert near(right(3.0), cfg(2.0))


@pytest.mark.parametrize("kind", ["x0", "v"])
def test_20_min_snr_weights_of_another_kind(kind):
    """Row 20: min(snr, g) / snr is for a model of eps. One wrong guess of x0 is a larger or a
    smaller error told as x0 or v, and has to be weighted to the same loss."""
    t = np.array([1, 100, 300, 900])
    snr = ABAR[t] / (1 - ABAR[t])
    xt = D.q_sample(X0, t, EPS)
    guessed_eps = D.to_eps(xt, t, GUESS, "x0")

    def holds(weight):
        error = D.target(X0, EPS, t, kind) - D.target(GUESS, guessed_eps, t, kind)
        return near(weight[:, None] * error ** 2,
                    np.minimum(snr, 5)[:, None] * (X0 - GUESS) ** 2)
    wrong = np.minimum(snr, 5) / snr
    assert not holds(wrong)
    assert holds(D.loss_weight(t, kind, "min_snr"))
    assert near(D.loss_weight(t, "eps", "min_snr"), wrong)


def test_28_eps_at_zero_snr():
    """Row 28: at abar_T = 0, x_T is eps whatever the picture was, and getting x0 from it is
    0 / 0. Such a schedule needs a model of v or x0."""
    d = td.Diffusion(td.zero_terminal_snr(BETAS))
    xt, v = d.q_sample(X0, T, EPS), d.target(X0, EPS, T, "v")

    def holds(x0):
        return near(x0, X0)
    with np.errstate(invalid="ignore"):
        wrong = (xt - (1 - d.abar[T]) ** 0.5 * EPS) / d.abar[T] ** 0.5
    assert d.abar[T] == 0 and np.all(np.isnan(wrong)) and not holds(wrong)
    assert holds(d.to_x0(xt, T, v, "v"))
    refused("zero SNR", d.to_x0, xt, T, EPS, "eps")
    refused("zero SNR", next, td.ddim(lambda x, t: x, d, xt))


@pytest.mark.parametrize("wrong", [
    lambda eps, std: eps, lambda eps, std: -eps, lambda eps, std: eps / std],
    ids=["neither", "no scale", "no sign"])
def test_30_eps_as_the_score(wrong):
    """Row 30: the score, the gradient of log q(x_t | x0), is -eps / sqrt(1 - abar): the way
    back to the picture, and steep where there is little noise."""
    t, h = 300, 1e-3
    xt, std = D.q_sample(X0, t, EPS), (1 - ABAR[t]) ** 0.5

    def log_q(x):
        return -(x - ABAR[t] ** 0.5 * X0) ** 2 / std ** 2 / 2

    def holds(score):
        return near(score, (log_q(xt + h) - log_q(xt - h)) / (2 * h))
    assert not holds(wrong(EPS, std))
    assert holds(D.score(xt, t, EPS))


BYTES = np.arange(256) / 127.5 - 1
FEW_BETAS = td.linear_betas(10, 0.001, 0.3)
FEW = td.Diffusion(FEW_BETAS)


def bits(x0, guess):
    """The likelihood under a model that always guesses this x0."""
    return FEW.bits_per_dim(lambda x, t: guess, x0, seed(), "x0")


def test_11_the_log_of_a_variance_of_0():
    """Row 11: at t = 1 the posterior's variance is 0. A floor of 1e-20 under its log, -46,
    means a deviation of 1e-10, with which a guess one byte off is impossible. It has to be the
    variance of t = 2."""
    x0, off = np.full((1, 1), BYTES[100]), np.full((1, 1), BYTES[101])
    beta_1, beta_2 = FEW_BETAS[:2]

    def cost(var):
        above, below = (math.erf((BYTES[100] + side / 255 - BYTES[101]) / (2 * var) ** 0.5)
                        for side in (1, -1))
        return -math.log2((above - below) / 2) if above > below else math.inf

    def holds(bits):
        return near(bits, cost(beta_1 / (1 - (1 - beta_1) * (1 - beta_2)) * beta_2))
    wrong = math.log(1e-20)
    assert FEW.q_posterior(x0, x0, 1)[1] == 0 and round(wrong) == -46
    assert cost(math.exp(wrong)) == math.inf and not holds(cost(math.exp(wrong)))
    assert holds(bits(x0, off)["decoder"])


@pytest.mark.parametrize("mean", [-1, -0.98, 0.995, 1])
def test_27_bins_at_the_edges(mean):
    """Row 27: most pixels of MNIST are exactly black, and the bin of -1 has to take all of the
    tail below it, that of 1 all above (DDPM eq. 13). Else probability is lost."""
    def holds(p):
        return near(p.sum(), 1)

    std, root = 0.01, 2 ** 0.5
    wrong = np.array([math.erf((x + 1 / 255 - mean) / std / root)
                      - math.erf((x - 1 / 255 - mean) / std / root) for x in BYTES]) / 2
    assert not holds(wrong)
    assert holds(td.bin_probability(BYTES, np.full(256, mean), std))


def test_29_the_bound_with_forward_kernels():
    """Row 29: the bound compares ways back, KL(q(x_{t-1}|x_t, x0) || p(x_{t-1}|x_t)), DDPM eq.
    5. In lectures it has been KL(q(x_t|x_{t-1}) || p(x_t|x_{t-1})), where variances are beta
    and means sqrt(alpha) x_{t-1}. A right step costs half the fall in SNR for every squared
    error of x0 (VDM, 2107.00630)."""
    abar = abar_of(FEW_BETAS)[1:]
    snr, error = abar / (1 - abar), np.mean((X0 - GUESS) ** 2)

    def holds(steps):
        return near(steps, (snr[:-1] - snr[1:]) * error / 2 / math.log(2))
    t = np.arange(2, 11)            # the mean of x_{t-1} is linear, so this is by how much two
    gap = [np.mean(FEW.q_posterior(X0 - GUESS, 0 * X0, i)[0] ** 2) for i in t]      # differ
    wrong = FEW.alpha[t] * gap / (2 * FEW.beta[t]) / math.log(2)
    assert not holds(wrong)
    assert holds(bits(X0, GUESS)["steps"])


# ------------------------------------------------------------------------- network and training

def network():
    """A small U-Net with random parameters; as it starts, it answers 0."""
    net = td.UNet(image=(4, 4, 1), channels=(4,), classes=3, dtype=np.float64)
    net.params.flat[:] = seed().standard_normal(net.params.flat.size) / 3
    return net


@pytest.mark.parametrize("wrong", [
    lambda net, x, t: net(x, np.ones_like(t)), lambda net, x, t: net(x, (t / T).astype(int)),
    lambda net, x, t: net(x, np.arange(len(x)))],
    ids=["ignored", "cast to 0", "the place in the batch"])
def test_24_a_network_that_never_sees_t(wrong):
    """Row 24: t is ignored, is cast to 0 as t/T, or the embedding's row is the image's place in
    the batch. It trains all the same, to predict for an average t."""
    def holds(net):
        a, b, a_too = net(np.repeat(seed().standard_normal((1, 4, 4, 1)), 3, 0),
                          np.array([100, 101, 100]))
        return near(a, a_too) and not near(a, b)

    assert not holds(partial(wrong, network()))
    assert holds(network())


@pytest.mark.parametrize("first, then, divisor", [
    (np.cos, np.sin, 4), (np.sin, np.cos, 4), (np.cos, np.sin, 3)])
def test_25_two_embeddings_of_t(first, then, divisor):
    """Row 25: DDPM's code has sines, then cosines, of frequencies that end at exactly 1/10,000
    (divided by half - 1), and so has this; others have cosines first, or divide by half. Each
    works, but not with the other's weights."""
    def holds(embedding):
        sines, cosines = embedding[:, :4], embedding[:, 4:]
        return (near(sines[:, 0], np.sin(t)) and near(sines[:, -1], np.sin(t / 10000))
                and near(sines ** 2 + cosines ** 2, 1) and near(cosines[:, 0], np.cos(t)))

    t = np.array([1, 500, T])
    angle = t[:, None] * 10000.0 ** (-np.arange(4) / divisor)
    assert not holds(np.concatenate([first(angle), then(angle)], 1))
    assert holds(td.sinusoids(t, 8))


def test_26_a_running_mean_that_keeps_the_start():
    """Row 26: with a decay of .9999 from the first step, 90 % of the mean is still the random
    start after 1,000 steps, and 37 % after 10,000. The decay has to grow up to it."""
    def holds(share):
        return share < 1e-6

    ema = td.EMA(np.ones(1), decay=0.9999)          # the start is 1, all later parameters 0
    for _ in range(1000):
        ema.step(np.zeros(1))
    wrong = 0.9999 ** 1000
    assert round(wrong, 2) == 0.90 and round(0.9999 ** 10_000, 2) == 0.37
    assert not holds(wrong)
    assert holds(ema.flat[0])
    assert np.isclose(ema.flat[0], 1 / math.comb(1009, 9), rtol=1e-9, atol=0)


def test_32_labels_dropped_for_good():
    """Row 32: labels[drop] = -1, written into the data set: every epoch drops some more, until
    none are left."""
    def holds(after):
        return np.array_equal(after, before)

    before = np.arange(60) % 3
    wrong, kept = before.copy(), before.copy()
    for epoch in range(20):
        wrong[np.random.default_rng(epoch).random(60) < 0.1] = -1
    trained_on(kept)
    assert not holds(wrong)
    assert holds(kept)


def test_32_labels_dropped_by_the_batch():
    """Row 32: y = None, a tenth of the time, drops a whole batch at once; a batch's gradient is
    then of one kind or the other. Each image has to have its own chance."""
    def holds(batches):
        return all(0 < np.sum(y == 3) < len(y) for y in batches)

    labels, rng = np.arange(60) % 3, seed()
    wrong = [np.full(60, 3) if rng.random() < 0.1 else labels for _ in range(20)]
    assert not holds(wrong)
    assert holds([y for _, _, y in trained_on(labels)])


def test_32_a_null_label_that_is_a_class():
    """Row 32: -1 as an index into a table of one row for each class is the last class, which
    then stands for "none" as well. The null label has a row of its own, and -1 is refused."""
    def holds(classes, null):
        return not any(near(one, null) for one in classes)

    net, x = network(), np.repeat(seed().standard_normal((1, 4, 4, 1)), 4, 0)
    *classes, null = net(x, np.full(4, 7), [0, 1, 2, net.null])
    assert not holds(classes, classes[-1])
    assert holds(classes, null)
    refused("-1", net, x, 7, [0, 1, 2, -1])
    assert near(net(x[:1], 7)[0], null)
