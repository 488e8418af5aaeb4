"""Samplers, guidance and likelihood against what is true of them for data of a known law.

For a mixture of Gaussians the best model is a formula. With it a sampler of ever more steps has
to end at the mixture, whatever its kind of model, its spacing or its noise. In one dimension
nothing needs to be drawn for that: a deterministic sampler moves every x along its quantile, a
stochastic one a whole density, by one integral a step. The likelihood's expectations are
integrals as well, and it bounds a probability that can be had by summing over all paths.
"""
import math
from functools import cache, partial
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import pytest

import tinyddpm as td
from common import KINDS, SPACINGS, abar_of, close

pytestmark = pytest.mark.skipif(td.xp is not np, reason="these run with TINYDDPM_BACKEND=numpy")
T = 1000
BETAS = td.cosine_betas(T)
ABAR, D = abar_of(BETAS), td.Diffusion(BETAS)
erf = np.frompyfunc(math.erf, 1, 1)             # NumPy has none of its own

DETERMINISTIC = {"ddim": td.ddim, "dpm_solver": td.dpm_solver, "heun": td.heun}
STOCHASTIC = {"ddpm small": partial(td.ddpm, variance="small"),
              "ddpm large": partial(td.ddpm, variance="large"),
              "ddim eta=.5": partial(td.ddim, eta=0.5)}      # at eta = 1 it is "ddpm small"
every_deterministic = pytest.mark.parametrize("name", DETERMINISTIC)
every_stochastic = pytest.mark.parametrize("name", STOCHASTIC)


def phi(z):
    """The distribution function of the standard normal."""
    return 0.5 * (1 + erf(np.asarray(z) / 2 ** 0.5).astype(float))


def density(x, mean, var):
    return np.exp(-(x - mean) ** 2 / (2 * var)) / (2 * math.pi * var) ** 0.5


class Mixture(NamedTuple):
    """Gaussians in any dimension. Noised to abar they are Gaussians again: of means
    sqrt(abar) m, covariances abar C + (1 - abar) I."""
    weights: np.ndarray         # (K,)
    means: np.ndarray           # (K, dimensions)
    covs: np.ndarray            # (K, dimensions, dimensions)

    def noised(self, abar):
        identity = np.eye(self.means.shape[1])
        return abar ** 0.5 * self.means, abar * self.covs + (1 - abar) * identity

    def eps(self, x, abar):
        """The best prediction: -sqrt(1 - abar) times the gradient of the log density."""
        means, covs = self.noised(abar)
        heights = np.log(self.weights / np.linalg.det(covs) ** 0.5)
        pulls, logs = [], []
        for mean, inverse, height in zip(means, np.linalg.inv(covs), heights):
            pulls.append((x - mean) @ inverse)
            logs.append(height - 0.5 * ((x - mean) * pulls[-1]).sum(1))
        shares = np.exp(logs - np.max(logs, 0))
        shares /= shares.sum(0)
        return (1 - abar) ** 0.5 * sum(w[:, None] * pull for w, pull in zip(shares, pulls))

    def cdf(self, x, abar=1.0):
        """In one dimension."""
        means, covs = self.noised(abar)
        return phi((x[..., None] - means[:, 0]) / covs[:, 0, 0] ** 0.5) @ self.weights

    def quantile(self, u, abar=1.0):
        """In one dimension: the x below which a share u lies, by bisection."""
        low, high = np.full(u.shape, -9.0), np.full(u.shape, 9.0)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.cdf(middle, abar) < u
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return low


def one_dimensional(weights, means, deviations):
    return Mixture(np.array(weights), np.array(means)[:, None],
                   np.array(deviations)[:, None, None] ** 2)


LINE = one_dimensional([0.3, 0.5, 0.2], [-0.7, 0.2, 0.8], [0.1, 0.15, 0.05])
PLANE = Mixture(np.array([0.6, 0.4]), np.array([[-0.5, 0.3], [0.6, -0.2]]), np.array(
    [[[0.05, 0.04], [0.04, 0.06]], [[0.02, -0.01], [-0.01, 0.1]]]))
U = (np.arange(59) + 1) / 60


def model_of(eps_of, kind="eps"):
    """A model from eps_of(x, abar)."""
    def model(x, t):
        abar = ABAR[t[0]]
        eps = eps_of(x, abar)
        x0 = (x - (1 - abar) ** 0.5 * eps) / abar ** 0.5
        return {"eps": eps, "x0": x0, "v": abar ** 0.5 * eps - (1 - abar) ** 0.5 * x0}[kind]
    return model


def follow(eps_of, x, abar, abar_s, steps=100):
    """From abar to abar_s on the probability-flow ODE. Of y = x / sqrt(abar) and sigma, noise
    over signal, it is dy = eps dsigma (DDIM eq. 14); here in log(sigma), by Runge and Kutta."""
    def slope(y, log):
        abar = 1 / (1 + math.exp(2 * log))
        return math.exp(log) * eps_of(abar ** 0.5 * y, abar)
    start, end = (0.5 * math.log((1 - a) / a) for a in (abar, abar_s))
    y, h = x / abar ** 0.5, (end - start) / steps
    for i in range(steps):
        log = start + i * h
        a = slope(y, log)
        b = slope(y + h / 2 * a, log + h / 2)
        c = slope(y + h / 2 * b, log + h / 2)
        y = y + h / 6 * (a + 2 * b + 2 * c + slope(y + h * c, log + h))
    return abar_s ** 0.5 * y


# ------------------------------------------------------------------- in one dimension, exactly

def off_quantile(sampler, law, model, steps, spacing="trailing", kind="eps", clip=None):
    """How far any x strays from its quantile: at any time, and at the end. It starts there,
    at the first step of the spacing."""
    first = td.timesteps(T, steps, spacing)[0]
    walk = sampler(model, D, law.quantile(U, ABAR[first])[:, None], steps=steps,
                   spacing=spacing, kind=kind, clip=clip)
    off = [np.abs(law.cdf(x[:, 0], ABAR[t]) - U).max() for t, x in walk]
    return max(off), off[-1]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name, limit", [("ddim", 0.0025), ("dpm_solver", 0.001),
                                         ("heun", 0.001)])
def test_deterministic_samplers_keep_quantiles(name, limit, spacing):
    """A mixture of three, all the way from noise to data: in probability, no x is off by more
    than the limit with 500 steps. With 50 it is: the limit is about what a step costs."""
    model = model_of(LINE.eps)
    assert off_quantile(DETERMINISTIC[name], LINE, model, 500, spacing)[0] < limit
    assert limit < off_quantile(DETERMINISTIC[name], LINE, model, 50, spacing)[0] < 0.02


class Same:
    """Stands in for a Generator whose every draw is z."""

    def __init__(self, z):
        self.z = z

    def standard_normal(self, shape, dtype):
        return np.full(shape, self.z, dtype)


GRID = np.arange(-4.5, 4.5, 0.015)


def moved_density(sampler, law, steps):
    """{t: distribution function at the GRID's right edges} of x on its way. Each step is
    x -> N(mean(x), std^2), both of which the sampler's answers to two draws, 0 and 1, tell; the
    density of x_s is an integral over x_t."""
    h, model, route = GRID[1] - GRID[0], model_of(law.eps), td.timesteps(T, steps)
    p, found = np.diff(law.cdf(np.append(GRID - h / 2, 9), ABAR[route[0]])), {}
    for t, s in zip(route, route[1:]):
        mean, other = (next(sampler(model, D, GRID[:, None], Same(z), steps=[t, s],
                                    clip=None))[1][:, 0] for z in (0.0, 1.0))
        std = other - mean
        close(std, std[0], 1e-9)
        assert std[0] > 0.6 * h                         # else the grid is too coarse
        p = h * density(GRID[:, None], mean, std[0] ** 2) @ p
        found[s] = np.cumsum(p)
    close(p.sum(), 1, 2e-3)
    return found


@every_stochastic
def test_stochastic_samplers_keep_the_density(name):
    """Off by two hundredths with 50 steps, by half as much with 100: so twice the one less the
    other is their limit, and that is the mixture's own density."""
    few, many = (moved_density(STOCHASTIC[name], LINE, steps) for steps in (50, 100))
    edges, off = GRID + (GRID[1] - GRID[0]) / 2, []
    for t in few:
        wanted = LINE.cdf(edges, ABAR[t])
        off.append([np.abs(F - wanted).max() for F in (few[t], many[t], 2 * many[t] - few[t])])
    off_few, off_many, off_limit = np.max(off, 0)
    assert 0.01 < off_few < 0.025 and 1.8 < off_few / off_many < 2.2
    assert off_limit < 0.0025


@pytest.mark.parametrize("name", DETERMINISTIC | STOCHASTIC)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_all_kinds_make_one_walk(name, spacing):
    """Models of eps, x0 and v of one mixture, on the same draws."""
    sampler, x = (DETERMINISTIC | STOCHASTIC)[name], LINE.quantile(U)[:, None]
    ends = [td.sample(sampler(model_of(LINE.eps, kind), D, x, np.random.default_rng(0),
                              steps=20, spacing=spacing, kind=kind, clip=None))
            for kind in KINDS]
    close(ends[1], ends[0], 1e-9)
    close(ends[2], ends[0], 1e-9)


# ------------------------------------------------------------------------------ in the plane

@pytest.mark.parametrize("name, tolerance", [("ddim", 0.02), ("dpm_solver", 1e-3),
                                             ("heun", 3e-4)])
def test_deterministic_samplers_in_the_plane(name, tolerance):
    """Two leaning Gaussians: where Runge and Kutta go, point by point."""
    x = np.random.default_rng(0).standard_normal((50, 2))
    route = list(range(900, 99, -10))
    walk = dict(DETERMINISTIC[name](model_of(PLANE.eps), D, x, steps=route, clip=None))
    for s in (500, 100):
        wanted = follow(PLANE.eps, x, ABAR[900], ABAR[s])
        assert np.abs(walk[s] - wanted).max() < tolerance


@every_stochastic
def test_stochastic_samplers_in_the_plane(name):
    """10,000 draws, 100 steps: the mean of exp(i k x), for some k, is that of the mixture,
    exp(i k m - k C k / 2), to four standard errors and 0.025 for the steps' own."""
    x = np.random.default_rng(0).standard_normal((10_000, 2))
    end = td.sample(STOCHASTIC[name](model_of(PLANE.eps), D, x, np.random.default_rng(1),
                                     steps=100, clip=None))
    for k in np.array([[1, 0], [0, 1], [2, 2], [2, -2], [4, 1]]):
        wanted = PLANE.weights @ np.exp(1j * PLANE.means @ k - PLANE.covs @ k @ k / 2)
        assert abs(np.exp(1j * end @ k).mean() - wanted) < 4 / 10_000 ** 0.5 + 0.025


# ---------------------------------------------------------------------------------- clipping

def uniform_eps(x, abar):
    """Of data uniform on [-1, 1], x0 given x_t is a normal of mean x / sqrt(abar) and variance
    (1 - abar) / abar cut off at -1 and 1; eps by way of its mean. Where x is so far out that
    its mass is nothing, the mean is the nearer end."""
    mean, std = x / abar ** 0.5, ((1 - abar) / abar) ** 0.5
    low, high = (-1 - mean) / std, (1 - mean) / std
    mass = phi(high) - phi(low)
    with np.errstate(invalid="ignore", divide="ignore"):
        x0 = mean + std * (density(low, 0, 1) - density(high, 0, 1)) / mass
    x0 = np.clip(np.where(mass > 1e-9, x0, np.sign(x)), -1, 1)
    return (x - abar ** 0.5 * x0) / (1 - abar) ** 0.5


class Uniform:
    """The law of data uniform on [-1, 1], as far as off_quantile needs it."""

    @staticmethod
    def cdf(x, abar):
        """At abar = 1, a ramp; else the ramp smoothed: an integral of phi."""
        if abar == 1:
            return np.clip((x + 1) / 2, 0, 1)
        std = (1 - abar) ** 0.5

        def area(z):
            return z * phi(z) + density(z, 0, 1)
        a = abar ** 0.5
        return std / (2 * a) * (area((x + a) / std) - area((x - a) / std))

    quantile = Mixture.quantile


@every_deterministic
def test_clipping_leaves_alone_what_lies_within(name):
    """Data uniform on [-1, 1]: no posterior mean leaves it, so that the default clip does
    nothing, to the last bit, and the quantiles end evenly spread over it."""
    law, model = Uniform(), model_of(uniform_eps, "x0")
    clipped, free = (off_quantile(DETERMINISTIC[name], law, model, 200, kind="x0", clip=clip)
                     for clip in ((-1, 1), None))
    assert clipped == free
    assert max(clipped) < 0.01


@pytest.mark.parametrize("name", DETERMINISTIC | STOCHASTIC)
@pytest.mark.parametrize("kind", KINDS)
def test_clipping_is_a_model_that_clips(name, kind):
    """Bounds that bind: the walk is that of the model whose x0 has been clipped before."""
    sampler, x = (DETERMINISTIC | STOCHASTIC)[name], LINE.quantile(U)[:, None]
    right = model_of(LINE.eps, "x0")
    runs = [sampler(model, D, x, np.random.default_rng(0), steps=50, kind=of, clip=clip)
            for model, of, clip in [
                (model_of(LINE.eps, kind), kind, (-0.6, 0.3)),
                (lambda x, t: np.clip(right(x, t), -0.6, 0.3), "x0", None)]]
    clipped, wanted = map(td.sample, runs)
    close(clipped, wanted, 1e-8)
    assert np.abs(wanted).max() == 0.6 and wanted.max() == 0.3


# ---------------------------------------------------------------------------------- guidance

NULL = 3


def classes(kind="eps"):
    """A model of LINE whose labels are its Gaussians; the null label stands for all of it."""
    laws = [one_dimensional([1.0], LINE.means[c], LINE.covs[c, 0] ** 0.5) for c in range(3)]
    laws.append(LINE)

    def model(x, t, y):
        out = np.empty_like(x)
        for label, law in enumerate(laws):
            if not (here := y == label).any():
                continue
            out[here] = model_of(law.eps, kind)(x[here], t[here])
        return out
    return laws, model


@pytest.mark.parametrize("w", [0, 1, 1e-12, 1 - 1e-12])
@pytest.mark.parametrize("name, kind, limit", [
    ("ddim", "eps", 0.02), ("dpm_solver", "x0", 0.01), ("heun", "v", 0.01)])
def test_guidance_of_0_is_the_mixture_and_of_1_the_class(name, kind, limit, w):
    """A class's picture ends at its own Gaussian's quantile; without guidance, at that of the
    whole mixture. (A weight next to 0 or 1 goes the long way, by both predictions.)"""
    laws, model = classes(kind)
    for c in range(3):
        guided = td.guided(model, np.full(len(U), c), NULL, w)
        law = laws[c if w > 0.5 else NULL]
        assert off_quantile(DETERMINISTIC[name], law, guided, 250, kind=kind)[1] < limit


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("w", [-1.0, 0.5, 3.0])
def test_guidance_follows_its_mixed_score(kind, w):
    """The score is (1 - w) that of the mixture plus w that of the class: where Runge and Kutta
    go with it, Heun goes, whatever the kind of model."""
    laws, model = classes(kind)
    labels = np.arange(len(U)) % 3

    def mixed(x, abar):
        own = np.stack([law.eps(x, abar) for law in laws[:3]])[labels, np.arange(len(x))]
        return (1 - w) * LINE.eps(x, abar) + w * own
    x, route = LINE.quantile(U, ABAR[900])[:, None], list(range(900, 199, -5))
    walk = td.heun(td.guided(model, labels, NULL, w), D, x, steps=route, kind=kind, clip=None)
    wanted = follow(mixed, x, ABAR[900], ABAR[200])
    assert np.abs(dict(walk)[200] - wanted).max() < 1e-3
    unguided = follow(LINE.eps, x, ABAR[900], ABAR[200])
    assert np.abs(unguided - wanted).max() > 0.1                # w does make a difference


# ------------------------------------------------------------------------------- the likelihood

BYTES = np.arange(256) / 127.5 - 1
SHARES = (0.2 * (BYTES == -1) + 0.5 * density(BYTES, -0.3, 0.2 ** 2) / 127.5
          + 0.3 * density(BYTES, 0.6, 0.1 ** 2) / 127.5)
SHARES /= SHARES.sum()          # black above all, two humps, the brightest rare


@cache
def pixel(steps):
    """Computed once for all tests, as its tables take a while."""
    few = np.linspace(0.02, 0.9, 8)
    return Pixel(few if steps == 8 else td.scaled_linear_betas(steps, 4e-4))


class Pixel:
    """One pixel of the law SHARES, its best model for some betas, and brute force on grids."""

    def __init__(self, betas):
        self.betas, self.abar, self.T = betas, abar_of(betas), len(betas)
        self.x = np.arange(-6, 6.01, 0.02)
        self.guesses = [None, *(self.best(self.x, a) for a in self.abar[1:])]

    @staticmethod
    def best(x, abar):
        """E[x0 | x]: the mean of all bytes, by Bayes' rule."""
        logs = np.log(SHARES) - (x[:, None] - abar ** 0.5 * BYTES) ** 2 / 2 / (1 - abar)
        share = np.exp(logs - logs.max(1, keepdims=True))
        return share @ BYTES / share.sum(1)

    def model(self, kind):
        """From the table, by straight lines. All that is shown here is true of any model."""
        def answer(x, t):
            abar = self.abar[t[0]]
            x0 = np.interp(x, self.x, self.guesses[t[0]])
            eps = (x - abar ** 0.5 * x0) / (1 - abar) ** 0.5
            return {"eps": eps, "x0": x0,
                    "v": abar ** 0.5 * eps - (1 - abar) ** 0.5 * x0}[kind]
        return answer

    def reverse(self, x0, t):
        """q(x_{t-1} | x_t, x0) on the grid, for each x_t of it one column: the product of two
        densities, brought to a sum of 1. x0: one number, or one for each x_t."""
        beta, abar_s = self.betas[t - 1], self.abar[t - 1]
        logs = (-(self.x - (1 - beta) ** 0.5 * self.x[:, None]) ** 2 / (2 * beta)
                - (self.x[:, None] - abar_s ** 0.5 * x0) ** 2 / (2 * (1 - abar_s)))
        p = np.exp(logs - logs.max(0))
        return p / p.sum(0)

    def here(self, x0, t):
        """q(x_t | x0) on the grid."""
        p = density(self.x, self.abar[t] ** 0.5 * x0, 1 - self.abar[t])
        return p / p.sum()

    def bins(self):
        """P(byte | x_1), (256, grid). The deviation is that of q(x_1 | x_2, x0), measured."""
        column = self.reverse(0.0, 2)[:, len(self.x) // 2]
        std = (column @ self.x ** 2 - (column @ self.x) ** 2) ** 0.5
        edges = np.array([-np.inf, *(BYTES[1:] + BYTES[:-1]) / 2, np.inf])
        return np.diff(phi((edges[:, None] - self.guesses[1]) / std), axis=0)

    @cache
    def bits(self, byte):
        """What bits_per_dim estimates, in full."""
        x0, normal = BYTES[byte], density(self.x, 0, 1) / density(self.x, 0, 1).sum()

        def kl(p, q):
            return (p * np.log2(np.maximum(p, 1e-300) / np.maximum(q, 1e-300))).sum(0)
        steps = [self.here(x0, t) @ kl(self.reverse(x0, t), self.reverse(self.guesses[t], t))
                 for t in range(2, self.T + 1)]
        decoder = -np.log2(np.maximum(self.bins()[byte], 1e-300)) @ self.here(x0, 1)
        return {"prior": kl(self.here(x0, self.T), normal), "steps": np.array(steps),
                "decoder": decoder}

    def marginal(self):
        """P(byte) of the model, (256,): all paths from x_T to x_1 summed."""
        p = density(self.x, 0, 1) * 0.02
        for t in range(self.T, 1, -1):
            p = self.reverse(self.guesses[t], t) @ p
        return self.bins() @ p


class Nodes:
    """Stands in for a Generator: one draw is all quantiles of the normal, evenly, so that a
    batch's mean is an integral. Scaled, as midpoints fall short of variance 1."""

    @cache
    def standard_normal(self, shape, dtype):
        z = np.array([NormalDist().inv_cdf((i + 0.5) / shape[0]) for i in range(shape[0])])
        return (z / z.std()).reshape(shape).astype(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("byte", [0, 89, 204, 250])
def test_likelihood_is_its_integrals(kind, byte):
    """Every KL as a sum over x_{t-1} and x_t, the decoder as one over x_1; no posterior's
    formula, no KL of Gaussians."""
    few = pixel(8)
    got = td.Diffusion(few.betas).bits_per_dim(few.model(kind), np.full((1000, 1), BYTES[byte]),
                                               Nodes(), kind)
    for part, wanted in few.bits(byte).items():
        np.testing.assert_allclose(got[part], wanted, rtol=2e-3, atol=1e-6, err_msg=part)


def test_likelihood_is_a_bound():
    """Of -log2 of the probability that the model gives the byte, for each byte; on average of
    the entropy too, and nearer to it with more steps."""
    entropy, mean = -(SHARES * np.log2(SHARES)).sum(), []
    for steps in (8, 24):
        one = pixel(steps)
        d, model, nodes = td.Diffusion(one.betas), one.model("x0"), Nodes()
        got = np.array([d.bits_per_dim(model, np.full((100, 1), x0), nodes, "x0")["total"]
                        for x0 in BYTES])
        marginal = one.marginal()
        close(marginal.sum(), 1, 1e-6)
        assert np.all(got > -np.log2(marginal))
        mean.append(SHARES @ got)
    assert entropy < mean[1] < mean[0]
