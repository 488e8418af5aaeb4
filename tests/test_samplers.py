"""The samplers and guidance, without a trained network.

For data x0 ~ N(m, s^2) the best prediction is known, and it is affine in x_t. So is then every
step of a sampler: x_s = slope x_t + offset + noise z. A recursion over these three, from the
papers' formulae, gives the exact mean and deviation at the end. The sampler's own numbers are
read off with a stub Generator whose k-th draw is 1 in one row of the batch and 0 elsewhere.
"""
from functools import partial

import numpy as np
import pytest
from hypothesis import given, strategies as st

from common import PREDICTS, SPACINGS, abar_of, refused
from tinyddpm import (Diffusion, cosine_betas, ddim, ddpm, dpm_solver, dynamic_threshold,
                      flow_betas, guided, heun, linear_betas, sample, timesteps,
                      zero_terminal_snr)

every_kind = pytest.mark.parametrize("kind", PREDICTS)


# The papers' steps, as factors (of x_t, of eps, of z), written with eps, as the papers do; the
# code goes by way of x0.

def algorithm_2(abar, abar_s, variance):
    """DDPM Algorithm 2, with beta = 1 - abar/abar_s where steps are left out."""
    alpha = abar / abar_s
    beta = 1 - alpha
    var = beta if variance == "large" else (1 - abar_s) / (1 - abar) * beta
    return alpha ** -0.5, -beta / (1 - abar) ** 0.5 / alpha ** 0.5, var ** 0.5 * (abar_s < 1)


def equation_12(abar, abar_s, eta):
    """DDIM eq. 12, with the sigma of eq. 16."""
    sigma = eta * ((1 - abar_s) / (1 - abar)) ** 0.5 * (1 - abar / abar_s) ** 0.5
    of_x = (abar_s / abar) ** 0.5
    return of_x, (1 - abar_s - sigma ** 2) ** 0.5 - of_x * (1 - abar) ** 0.5, sigma


SAMPLERS = {
    "ddpm small": (partial(ddpm, variance="small"), partial(algorithm_2, variance="small")),
    "ddpm large": (partial(ddpm, variance="large"), partial(algorithm_2, variance="large")),
    "ddim eta=0": (partial(ddim, eta=0.0), partial(equation_12, eta=0.0)),
    "ddim eta=.4": (partial(ddim, eta=0.4), partial(equation_12, eta=0.4)),
    "ddim eta=1": (partial(ddim, eta=1.0), partial(equation_12, eta=1.0)),
}
every_sampler = pytest.mark.parametrize("name", SAMPLERS)

# Of second order: more than one prediction to a step, so no factors of x_t, eps and z.
ALL = {name: sampler for name, (sampler, _) in SAMPLERS.items()}
ALL |= {"dpm_solver": dpm_solver, "heun": heun}
any_sampler = pytest.mark.parametrize("name", ALL)


def best_eps(abar, m, s):
    """(slope, offset) of E[eps | x_t] for x0 ~ N(m, s^2). eps and x_t are jointly Gaussian, so
    it is cov / var (x_t - mean of x_t)."""
    slope = (1 - abar) ** 0.5 / (abar * s ** 2 + 1 - abar)
    return slope, -slope * abar ** 0.5 * m


def best_model(betas, m, s, kind):
    """The model that knows that x0 ~ N(m, s^2)."""
    abars = abar_of(betas)

    def model(x, t):
        abar = abars[t].reshape(-1, 1)
        slope, offset = best_eps(abar, m, s)
        eps = slope * x + offset
        x0 = (x - (1 - abar) ** 0.5 * eps) / abar ** 0.5
        return {"eps": eps, "x0": x0, "v": abar ** 0.5 * eps - (1 - abar) ** 0.5 * x0,
                "flow": eps - x0}[kind]
    return model


def recursion(betas, route, factors, m, s, mean, std):
    """Mean and deviation at the end of the route, from those at its start."""
    abars, var = abar_of(betas), std ** 2
    for t, to in zip(route, [*route[1:], 0]):
        of_x, of_eps, of_z = factors(abars[t], abars[to])
        slope, offset = best_eps(abars[t], m, s)
        step = of_x + of_eps * slope
        mean, var = step * mean + of_eps * offset, step ** 2 * var + of_z ** 2
    return mean, var ** 0.5


class Impulses(np.random.Generator):
    """Stands in for a Generator: draw k is 1 in row 2 + k of the batch, and 0 elsewhere."""
    draws = 0

    def __init__(self):
        super().__init__(np.random.PCG64(0))

    def standard_normal(self, shape, dtype):
        z = np.zeros(shape, dtype)
        z[2 + self.draws] = 1
        self.draws += 1
        return z


def measured(sampler, model, betas, steps, mean, std, kind="eps", **options):
    """Mean and deviation that a sampler gives x ~ N(mean, std^2), exactly. Row 0 starts at 0
    and shows the offset, row 1 starts at 1 and shows the slope, each other row one draw."""
    count = steps if isinstance(steps, int) else len(steps)
    x = np.zeros((count + 2, 1))
    x[1] = 1
    end = sample(sampler(model, Diffusion(betas, kind), x, Impulses(), steps=steps, clip=None,
                         **options))
    offset = end[0, 0]
    slope, *kicks = end[1:, 0] - offset
    return offset + slope * mean, ((slope * std) ** 2 + np.sum(np.square(kicks))) ** 0.5


@st.composite
def betas_and_route(draw):
    """A short schedule and some of its steps, descending."""
    betas = draw(st.lists(st.floats(1e-3, 0.5), min_size=1, max_size=10))
    route = draw(st.sets(st.integers(1, len(betas)), min_size=1))
    return np.array(betas), sorted(route, reverse=True)


def squash(x, t):
    """A model that is neither right nor linear."""
    return np.tanh(2 * x + 0.1 * t.reshape(-1, *[1] * (x.ndim - 1)))


def run(sampler, model=squash, betas=linear_betas(10, 0.05, 0.3), kind="eps", **options):
    """All (t, x_t) that a sampler yields, from one start, with one seed."""
    x = np.random.default_rng(1).standard_normal((2, 3))
    return list(sampler(model, Diffusion(betas, kind), x, 2, **options))


def same(a, b, rtol=1e-10, atol=1e-10):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


# -------------------------------------------------------------------- the exact Gaussian check

@every_sampler
@every_kind
@given(schedule=betas_and_route(), m=st.floats(-1, 1), s=st.floats(0.1, 2))
def test_every_sampler_follows_its_paper(name, kind, schedule, m, s):
    """For any schedule, any steps of it, any Gaussian data and any start."""
    (sampler, factors), (betas, route) = SAMPLERS[name], schedule
    model = best_model(betas, m, s, kind)
    same(measured(sampler, model, betas, route, 0.3, 0.8, kind=kind),
         recursion(betas, route, factors, m, s, 0.3, 0.8))


@every_sampler
@every_kind
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_sampler_follows_its_paper_with_spacings(name, kind, spacing):
    """The step before t is the next of the steps used, not t - T//N."""
    sampler, factors = SAMPLERS[name]
    betas, route = linear_betas(1000), timesteps(1000, 7, spacing)
    model = best_model(betas, 0.2, 0.5, kind)
    same(measured(sampler, model, betas, 7, 0, 1, kind=kind, spacing=spacing),
         recursion(betas, route, factors, 0.2, 0.5, 0, 1))


@pytest.mark.parametrize("name, steps, std", [
    ("ddim eta=0", 10, 0.3700), ("ddim eta=0", 20, 0.4314), ("ddim eta=0", 50, 0.4714),
    ("ddim eta=0", 100, 0.4854), ("ddpm small", 1000, 0.4961), ("ddpm large", 1000, 0.5008)])
def test_known_deviations(name, steps, std):
    """Data of deviation .5, linear betas: where each sampler really ends. Being nearer to .5
    would be a fault."""
    sampler, factors = SAMPLERS[name]
    betas, route = linear_betas(1000), timesteps(1000, steps)
    expected = recursion(betas, route, factors, 0, 0.5, 0, 1)
    assert round(expected[1], 4) == std
    same(measured(sampler, best_model(betas, 0, 0.5, "eps"), betas, steps, 0, 1), expected)


@every_kind
@given(schedule=betas_and_route())
def test_ddim_at_eta_1_is_ddpm(kind, schedule):
    """The same mean and variance at every step, so the same x from the same noise; with a
    wrong, nonlinear model and clipping too."""
    betas, route = schedule
    for (t, x), (t_too, x_too) in zip(
            run(partial(ddim, eta=1.0), betas=betas, steps=route, kind=kind),
            run(ddpm, betas=betas, steps=route, kind=kind), strict=True):
        assert t == t_too
        same(x, x_too, rtol=1e-8)


# -------------------------------------------------------------- samplers of the second order

def paper_dpm_solver(x0_of, x, abars):
    """DPM-Solver++ Algorithm 2, in its words: alpha, sigma, lambda, h and r; x0_of(x, i)."""
    alpha, sigma = abars ** 0.5, (1 - abars) ** 0.5
    with np.errstate(divide="ignore"):
        lam = np.log(alpha / sigma)
    guesses = []
    for i in range(1, len(abars)):
        guesses.append(x0_of(x, i - 1))
        D, h = guesses[-1], lam[i] - lam[i - 1]
        if 1 < i < len(abars) - 1:              # the first and the last step are of order 1
            r = (lam[i - 1] - lam[i - 2]) / h
            D = (1 + 1 / (2 * r)) * guesses[-1] - 1 / (2 * r) * guesses[-2]
        x = sigma[i] / sigma[i - 1] * x - alpha[i] * np.expm1(-h) * D
    return x


def paper_heun(x0_of, x, abars):
    """EDM Algorithm 1 in its general form, d = (sigma'/sigma + s'/s) x - sigma' s/sigma D, for
    s(phi) = cos(phi) and sigma(phi) = tan(phi)."""
    phi = np.arctan2((1 - abars) ** 0.5, abars ** 0.5)

    def slope(x, i):
        s, ds = np.cos(phi[i]), -np.sin(phi[i])
        sigma, dsigma = np.tan(phi[i]), np.cos(phi[i]) ** -2.0
        return (dsigma / sigma + ds / s) * x - dsigma * s / sigma * x0_of(x, i)
    for i in range(len(abars) - 2):
        d = slope(x, i)
        ahead = x + (phi[i + 1] - phi[i]) * d
        x = x + (phi[i + 1] - phi[i]) * (d + slope(ahead, i + 1)) / 2
    return x0_of(x, len(abars) - 2)     # Euler's step to sigma = 0 in EDM's own variables is D


SECOND_ORDER = {dpm_solver: paper_dpm_solver, heun: paper_heun}


@pytest.mark.parametrize("sampler", SECOND_ORDER)
@every_kind
@given(schedule=betas_and_route(), clip=st.sampled_from([None, (-0.5, 0.8)]))
def test_second_order_samplers_follow_their_papers(sampler, kind, schedule, clip):
    """For any schedule and route, a model that is wrong and nonlinear, clipped or not."""
    betas, route = schedule
    abars, d = abar_of(betas), Diffusion(betas, kind)

    def x0_of(x, i):
        return d.to_x0(x, route[i], squash(x, np.full(len(x), route[i])), clip)
    x = np.random.default_rng(1).standard_normal((2, 3))
    same(sample(sampler(squash, d, x, steps=route, clip=clip)),
         SECOND_ORDER[sampler](x0_of, x, abars[[*route, 0]]), rtol=1e-8)


@pytest.mark.parametrize("sampler, order", [(ddim, 1), (dpm_solver, 2), (heun, 2)])
@pytest.mark.parametrize("m, s", [(0.0, 0.5), (0.4, 1.5)])
def test_order_of_convergence(sampler, order, m, s):
    """For Gaussian data the probability-flow ODE has a closed form: x_t keeps its quantile. So
    the error at a fixed t is known, and with twice the steps it falls 2^order times."""
    T, stop = 20000, 2000
    betas = cosine_betas(T)
    abars = abar_of(betas)[[T * 9 // 10, stop]]
    (mu, mu_s), (sd, sd_s) = m * abars ** 0.5, (abars * s ** 2 + 1 - abars) ** 0.5
    x = np.linspace(-2, 2, 9)[:, None]
    errors = []
    for n in (40, 80, 160, 320):
        steps = np.round(np.linspace(T * 9 // 10, stop, n + 1)).astype(int)
        walk = sampler(best_model(betas, m, s, "eps"), Diffusion(betas), x, steps=steps,
                       clip=None)
        errors.append(np.abs(dict(walk)[stop] - mu_s - sd_s / sd * (x - mu)).max())
    measured = np.log2(errors[:-1]) - np.log2(errors[1:])
    assert np.all(np.abs(measured - order) < 0.15), measured


@pytest.mark.parametrize("sampler", SECOND_ORDER)
def test_second_order_samplers_start_from_zero_snr(sampler):
    """There lambda and tan(phi) are infinite, and x is eps. One step from T, x0 known: DDIM's
    step, which is the ODE's solution; Heun's turn by half a right angle is not exact."""
    betas = zero_terminal_snr(linear_betas(1000))
    x0, x = np.full((2, 1), 0.7), np.array([[0.0], [2.0]])
    with np.errstate(all="raise"):
        walk = sampler(lambda x, t: x0, Diffusion(betas, "x0"), x, steps=50)
        (_, first), *_, (_, end) = walk
    abar_s = abar_of(betas)[980]
    same(first, abar_s ** 0.5 * x0 + (1 - abar_s) ** 0.5 * x,
         atol=1e-9 if sampler is dpm_solver else 1e-3)
    assert np.array_equal(end, x0)


# --------------------------------------------------------------------------- zero terminal SNR

@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_from_zero_snr_ddim_keeps_x_as_eps(eta):
    """At abar = 0, eps is x itself: x_s = sqrt(abar_s) x0 + sqrt(1 - abar_s - sigma^2) x +
    sigma z, with sigma = eta sqrt(1 - abar_s)."""
    betas = zero_terminal_snr(linear_betas(10, 0.05, 0.3))
    abar_s, x0 = abar_of(betas)[4], np.full((2, 1), 0.7)
    x = np.array([[0.0], [2.0]])
    noise = np.random.default_rng(0).standard_normal((2, 1)) * eta * (1 - abar_s) ** 0.5
    _, got = next(ddim(lambda x, t: x0, Diffusion(betas, "x0"), x, 0, steps=[10, 4], eta=eta))
    same(got - noise, abar_s ** 0.5 * x0 + ((1 - abar_s) * (1 - eta ** 2)) ** 0.5 * x)


ETA_1 = pytest.param(partial(ddim, eta=1.0), id="ddim eta=1")


@pytest.mark.parametrize("sampler", [ddpm, ETA_1])
def test_from_zero_snr_all_noise_is_fresh(sampler):
    """DDPM, and DDIM at eta = 1, forget an x that says nothing of x0, for any step back."""
    betas = zero_terminal_snr(linear_betas(60))
    for s in range(1, 60):
        x0, x = np.full((2, 1), 0.7), np.array([[0.0], [2.0]])
        _, got = next(sampler(lambda x, t: x0, Diffusion(betas, "x0"), x, 0, steps=[60, s]))
        abar_s = abar_of(betas)[s]
        z = np.random.default_rng(0).standard_normal((2, 1))
        # An abar off by 1e-16 leaves 1e-8 of x, its root.
        same(got, abar_s ** 0.5 * x0 + (1 - abar_s) ** 0.5 * z, atol=1e-7)


@any_sampler
@given(schedule=betas_and_route())
def test_flow_is_one_more_prediction(name, schedule):
    """Exact models of every kind lead a sampler along the same path: here v and flow."""
    betas, route = schedule
    paths = [run(ALL[name], best_model(betas, 0.2, 0.5, kind), betas, kind, steps=route)
             for kind in ("v", "flow")]
    for (t, x), (t_too, x_too) in zip(*paths, strict=True):
        assert t == t_too
        same(x, x_too, rtol=1e-8)


@given(T=st.integers(2, 40), data=st.data())
def test_euler_steps_of_rectified_flow_are_ddim(T, data):
    """In the flow's own variables: x = (1 - u) x0 + u eps, dx/du = eps - x0 = velocity(x, u),
    Euler from u to u'. At unit variance this x is divided by c(u) = |(1 - u, u)|."""
    route = sorted(data.draw(st.sets(st.integers(1, T), min_size=1)), reverse=True)

    def c(u):
        return np.hypot(1 - u, u)

    def velocity(x, u):
        return np.tanh(2 * x + u)                       # any network
    x = start = np.random.default_rng(1).standard_normal((2, 3))
    x = x * c(route[0] / T)
    for t, s in zip(route, [*route[1:], 0]):
        x = x + (s - t) / T * velocity(x, t / T)
    end = sample(ddim(lambda x, t: velocity(x * c(t[0] / T), t[0] / T),
                      Diffusion(flow_betas(T), "flow"), start, steps=route, clip=None))
    same(end, x, rtol=1e-12, atol=1e-12)


@every_kind
def test_the_kind_is_said_once_and_ends_where_it_should(kind):
    """An exact model of N(0, .5^2), 50 DDIM steps, linear betas: .4714 for every kind."""
    betas = linear_betas(1000)
    std = measured(ddim, best_model(betas, 0, 0.5, kind), betas, 50, 0, 1, kind=kind)[1]
    assert round(std, 4) == 0.4714


# ------------------------------------------------------------------------------------ the walk

@any_sampler
@pytest.mark.parametrize("steps, times", [
    (5, [8, 6, 4, 2, 0]), (10, [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]), (1, [0]), (np.int64(2), [5, 0]),
    ([9, 4, 1], [4, 1, 0]), (np.array([3]), [0])])
def test_yields_the_time_arrived_at(name, steps, times):
    """One yield a step, the last of t = 0. The model is asked once a step, at the time left;
    by Heun also at the time arrived at, but for 0."""
    asked = []

    def model(x, t):
        asked.append(t)
        return squash(x, t)
    yielded = run(ALL[name], model, steps=steps)
    assert [t for t, _ in yielded] == times
    assert all(x.shape == (2, 3) for _, x in yielded)
    start = steps[0] if np.ndim(steps) else 10
    left, arrived = [start, *times[:-1]], times[:-1] if name == "heun" else []
    assert sorted(map(list, asked)) == sorted([t, t] for t in [*left, *arrived])
    assert all(t.dtype.kind == "i" for t in asked)


def test_ddpm_takes_all_steps_unless_told():
    assert [t for t, _ in run(ddpm)] == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("sampler, steps", [(ddim, 50), (dpm_solver, 20), (heun, 10)])
def test_the_others_take_so_many_unless_told(sampler, steps):
    assert [t for t, _ in run(sampler, betas=linear_betas(100))] == [
        *timesteps(100, steps)[1:], 0]


@pytest.mark.parametrize("spacing", SPACINGS)
def test_samplers_take_the_spacing_asked_for(spacing):
    expected = [*timesteps(10, 3, spacing)[1:], 0]
    for sampler in (ddpm, ddim, dpm_solver, heun):
        assert [t for t, _ in run(sampler, steps=3, spacing=spacing)] == expected


@any_sampler
def test_a_sampler_does_no_more_than_it_is_asked_for(name):
    """It is a generator: a caller who stops has paid for the steps taken, and no others."""
    calls = []

    def model(x, t):
        calls.append(t)
        return x
    walk = ALL[name](model, Diffusion(linear_betas(10)), np.zeros((2, 1)),
                     np.random.default_rng(0), steps=10)
    assert calls == []
    next(walk), next(walk)
    assert len(calls) == (4 if name == "heun" else 2)


@any_sampler
def test_the_start_is_left_as_it_was(name):
    d, x = Diffusion([0.1, 0.2]), np.ones((2, 1))
    sample(ALL[name](squash, d, x, np.random.default_rng(0), steps=2))
    assert np.array_equal(x, np.ones((2, 1)))


def test_sample_returns_the_last():
    assert sample(iter([(2, "x_2"), (1, "x_1"), (0, "x_0")])) == "x_0"
    assert np.array_equal(sample(iter(run(ddpm))), run(ddpm)[-1][1])


@any_sampler
@every_kind
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_types_stay(name, kind, dtype):
    x = np.ones((2, 3), dtype)
    walk = ALL[name](lambda x, t: x / 2, Diffusion(linear_betas(5), kind), x, 0, steps=5)
    assert [x.dtype for _, x in walk] == [dtype] * 5


@any_sampler
@pytest.mark.parametrize("steps", [1, 5, [7, 2]])
def test_the_last_step_lands_on_x0_exactly(name, steps):
    """abar_0 = 1: all of x_0 is the model's x0, to the last bit."""
    x0 = np.random.default_rng(3).uniform(-1, 1, (2, 3))
    _, end = run(ALL[name], lambda x, t: x0, steps=steps, kind="x0")[-1]
    same(end, x0, rtol=1e-15)


@pytest.mark.parametrize("name, draws", [
    ("ddpm small", 4), ("ddpm large", 4), ("ddim eta=0", 0), ("ddim eta=.4", 4),
    ("ddim eta=1", 4), ("dpm_solver", 0), ("heun", 0)])
def test_no_noise_at_the_last_step(name, draws):
    """Five steps draw noise four times; without eta, never."""
    d, x, rng = Diffusion(linear_betas(10)), np.zeros((7, 1)), Impulses()
    sample(ALL[name](squash, d, x, rng, steps=5))
    assert rng.draws == draws


def test_ddim_needs_a_rng_only_for_noise():
    d, x = Diffusion(linear_betas(10)), np.ones((2, 1))
    assert np.array_equal(sample(ddim(squash, d, x, steps=5)),
                          sample(ddim(squash, d, x, np.random.default_rng(0), steps=5)))


@pytest.mark.parametrize("name", ["ddpm small", "ddim eta=.4"])
def test_a_seed_is_short_for_its_generator(name):
    """One rule for every rng; and the noise of each step is another."""
    d, x = Diffusion(linear_betas(10)), np.zeros((2, 3))
    paths = [[x for _, x in ALL[name](lambda x, t: 0 * x, d, x, rng, steps=5, clip=None)]
             for rng in (3, np.random.default_rng(3), np.random.Generator(np.random.PCG64(3)))]
    for path in paths:
        assert np.array_equal(path, paths[0])
    assert not np.allclose(paths[0][0] / paths[0][0].std(), paths[0][1] / paths[0][1].std())


# ------------------------------------------------------------------------------------ clipping

def test_ddim_derives_eps_again_from_the_clipped_x0():
    """A model far off: its x0 is clipped, and eps has to be the one that with it makes x_t.
    Keeping the eps predicted is the usual fault; the test's numbers tell the two apart."""
    betas = linear_betas(10, 0.05, 0.3)
    abar, abar_s = abar_of(betas)[[10, 6]]
    x, eps = np.array([[0.5], [-0.2]]), np.array([[3.0], [-4.0]])
    x0 = np.clip((x - (1 - abar) ** 0.5 * eps) / abar ** 0.5, -1, 1)
    assert np.all(np.abs(x0) == 1)
    eps_again = (x - abar ** 0.5 * x0) / (1 - abar) ** 0.5
    _, got = next(ddim(lambda x, t: eps, Diffusion(betas), x, steps=[10, 6]))
    same(got, abar_s ** 0.5 * x0 + (1 - abar_s) ** 0.5 * eps_again)
    assert np.abs(got - (abar_s ** 0.5 * x0 + (1 - abar_s) ** 0.5 * eps)).min() > 1


def test_ddpm_puts_the_clipped_x0_in_the_posterior():
    """DDPM eq. 7, with its two coefficients as printed, for one step back from t = 10."""
    betas = linear_betas(10, 0.05, 0.3)
    abar, abar_s, beta = *abar_of(betas)[[10, 9]], betas[9]
    x, rng = np.array([[0.5], [-0.2]]), np.random.default_rng(0)
    _, got = next(ddpm(lambda x, t: 9 * np.sign(x), Diffusion(betas, "x0"), x, rng))
    of_x0 = abar_s ** 0.5 * beta / (1 - abar)
    of_x = (1 - beta) ** 0.5 * (1 - abar_s) / (1 - abar)
    z = np.random.default_rng(0).standard_normal((2, 1))
    same(got, of_x0 * np.sign(x) + of_x * x + ((1 - abar_s) / (1 - abar) * beta) ** 0.5 * z)


@any_sampler
def test_clip_is_from_minus_1_to_1_unless_told(name):
    x0 = np.array([[3, -9, 0.5]] * 2)
    _, got = run(ALL[name], lambda x, t: x0, steps=3, kind="x0")[-1]
    same(got, [[1, -1, 0.5]] * 2)


@pytest.mark.parametrize("clip, end", [
    (None, [3, -9, 0.5]), ((-1, 1), [1, -1, 0.5]), ((-2, 4), [3, -2, 0.5]),
    (lambda x0: x0 / 2, [1.5, -4.5, 0.25])], ids=["None", "(-1, 1)", "(-2, 4)", "function"])
@any_sampler
def test_clip_may_be_none_bounds_or_a_function(name, clip, end):
    """The last step shows it: x_0 is x0 as it was clipped."""
    x0 = np.array([[3, -9, 0.5]] * 2)
    _, got = run(ALL[name], lambda x, t: x0, steps=3, kind="x0", clip=clip)[-1]
    same(got, [end] * 2)


@given(seed=st.integers(0, 999), size=st.floats(0.1, 10), share=st.floats(0.5, 1))
def test_dynamic_threshold(seed, size, share):
    """Imagen: nothing passes 1; images within [-1, 1] stay as they are; in others the value at
    the quantile comes to 1, and what lies below it is scaled alike; each image by itself."""
    x0 = size * np.random.default_rng(seed).standard_normal((4, 5, 2))
    x0[0] = np.tanh(x0[0])
    out = dynamic_threshold(x0, share)
    assert np.abs(out).max() <= 1
    assert np.array_equal(out[0], x0[0])
    for image, result in zip(x0, out):
        sizes = np.sort(np.abs(image).ravel())
        scale = max(1, np.interp(share * (len(sizes) - 1), np.arange(len(sizes)), sizes))
        inside = np.abs(image) < scale
        same(result[inside], image[inside] / scale)
        same(result[~inside], np.sign(image[~inside]))


def test_dynamic_threshold_is_a_clip_of_the_samplers():
    x0 = 3 * np.random.default_rng(0).standard_normal((2, 3))
    end = run(ddpm, lambda x, t: x0, kind="x0", clip=dynamic_threshold)[-1][1]
    same(end, dynamic_threshold(x0))


# ------------------------------------------------------------------------------------ guidance

LABELS, NULL = np.array([3, 1, 4]), 10


class Classes:
    """A model with labels, nonlinear in all it is given. It keeps the batches it was given."""

    def __init__(self):
        self.batches = []

    def __call__(self, x, t, y):
        self.batches.append((x, t, y))
        return np.sin(x * (1 + y.reshape(-1, 1, 1)) + t.reshape(-1, 1, 1))


def guidance(w, rescale=0.0):
    """A guided model's answer, the conditional and the unconditional one, and the batches."""
    x, t = np.random.default_rng(0).standard_normal((3, 4, 2)), np.array([5, 6, 7])
    model = Classes()
    out = guided(model, LABELS, NULL, w, rescale)(x, t)
    return out, Classes()(x, t, LABELS), Classes()(x, t, np.full(3, NULL)), model.batches


def spread(x):
    """Each image's standard deviation, ready to multiply the images."""
    return x.std((1, 2), keepdims=True)


@pytest.mark.parametrize("w", [0, 1, 0.0, 1.0])
def test_guidance_weights_0_and_1_are_plain(w):
    """To the last bit, at the cost of one batch: there is nothing to mix."""
    out, cond, uncond, batches = guidance(w)
    assert np.array_equal(out, cond if w else uncond)
    assert [len(x) for x, _, _ in batches] == [3]
    assert list(batches[0][2]) == (list(LABELS) if w else [NULL] * 3)


@given(w=st.floats(-1, 10))
def test_guidance_moves_from_unconditional_to_conditional_and_on(w):
    """uncond + w (cond - uncond), which is (1 + v) cond - v uncond for CFG's v = w - 1."""
    out, cond, uncond, _ = guidance(w)
    v = w - 1
    same(out, (1 + v) * cond - v * uncond)


@pytest.mark.parametrize("w", [-1, 0.5, 3])
def test_guidance_asks_once_on_a_doubled_batch(w):
    """x and t twice, the labels and as many nulls, in one call."""
    _, _, _, batches = guidance(w)
    [(x, t, y)] = batches
    assert np.array_equal(x[:3], x[3:]) and x.shape == (6, 4, 2)
    assert list(t) == [5, 6, 7] * 2
    assert sorted(zip(t, y)) == sorted([(5, 3), (6, 1), (7, 4), (5, 10), (6, 10), (7, 10)])


@given(w=st.floats(1.5, 10), rescale=st.floats(0, 1))
def test_rescale_brings_back_the_conditional_deviation(w, rescale):
    """ZeroSNR section 3.4: at 1 each image has the conditional prediction's deviation, its
    picture being the same but for the scale; in between, the two are mixed."""
    plain, cond, _, _ = guidance(w)
    full = guidance(w, 1.0)[0]
    same(spread(full), spread(cond))
    same(full / spread(full), plain / spread(plain))
    same(guidance(w, rescale)[0], rescale * full + (1 - rescale) * plain)


def test_a_guided_model_is_a_model():
    """It goes into any sampler, and takes labels as a list."""
    walk = ddim(guided(Classes(), [3, 1, 4], NULL, 2.0), Diffusion(linear_betas(10)),
                np.ones((3, 4, 2)), steps=4)
    assert sample(walk).shape == (3, 4, 2)


# ----------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("sampler", [ddpm, ddim, dpm_solver, heun])
@pytest.mark.parametrize("options, given_text", [
    (dict(steps=[1, 5]), "[1, 5]"), (dict(steps=[5, 5]), "[5, 5]"),
    (dict(steps=[11, 5]), "t is 11"), (dict(steps=[5, 0]), "[5, 0]"),
    (dict(steps=[5, -1]), "[5, -1]"), (dict(steps=11), "steps"),
    (dict(steps=5, spacing="middle"), "'middle'")])
def test_bad_steps_are_refused(sampler, options, given_text):
    refused(given_text, run, sampler, **options)


@pytest.mark.parametrize("sampler, options, given_text", [
    (ddpm, dict(variance="learned"), "'learned'"),
    (ddim, dict(eta=-0.1), "eta is -0.1"), (ddim, dict(eta=1.1), "eta is 1.1"),
    (ddim, dict(eta=float("nan")), "eta is nan")])
def test_bad_variance_and_eta_are_refused(sampler, options, given_text):
    refused(given_text, run, sampler, steps=5, **options)


@any_sampler
def test_half_precision_is_refused(name):
    """In float16 a long walk overflows or stands still."""
    x = np.ones((2, 3), np.float16)
    walk = ALL[name](lambda x, t: x, Diffusion(linear_betas(5)), x, 0, steps=5)
    refused("float16", sample, walk)


@any_sampler
@every_kind
@pytest.mark.parametrize("clip", [None, (-9, 9)])
def test_what_a_model_answers_and_what_it_saw_stay_as_they_were(name, kind, clip):
    """A caller may write into x_t, as inpainting does: neither the model's answers nor the
    start may be that array."""
    kept, start = [], np.ones((2, 3))

    def model(x, t):
        out = np.tanh(x)
        kept.append((out, out.copy()))
        return out
    d = Diffusion(linear_betas(5), kind)
    for _, x in ALL[name](model, d, start, 0, steps=5, clip=clip):
        x[:] = 7
    assert np.array_equal(start, np.ones((2, 3)))
    assert all(np.array_equal(out, copy) for out, copy in kept)


@any_sampler
def test_inpainting_through_the_yielded_array(name):
    """What the caller writes into x_t is what the next step starts from."""
    seen = []

    def model(x, t):
        seen.append(x[:, 0].copy())
        return np.tanh(x)
    d = Diffusion(linear_betas(10))
    for s, x in ALL[name](model, d, np.ones((2, 3)), 0, steps=[9, 6, 3]):
        x[:, 0] = s
    assert [6.0, 6.0] in [list(column) for column in seen]
    assert [3.0, 3.0] in [list(column) for column in seen]


@pytest.mark.parametrize("sampler", [ddpm, ddim, dpm_solver, heun])
def test_a_model_of_another_shape_is_refused(sampler):
    """(2, 1) would broadcast against (2, 3) without a word."""
    refused("(2, 1)", run, sampler, lambda x, t: x[:, :1], steps=5)


def test_guidance_in_an_interval():
    """Inside it, ends included, the weight is w; outside, the conditional prediction. Also for
    w = 0, where it would otherwise be unconditional."""
    def model(x, t, y):
        return x + y[:, None] * t[:, None]

    x, t, labels = np.ones((5, 2)), np.array([1, 3, 5, 7, 9]), np.full(5, 2)
    for w in (0, 0.5, 3.0):
        out = guided(model, labels, null=1, w=w, interval=(3, 7))(x, t)
        inside = np.array([0, 1, 1, 1, 0])[:, None]
        same(out, x + t[:, None] * (2 * (1 - inside) + (1 + w) * inside))
    assert np.array_equal(guided(model, labels, 1, 3.0, interval=(1, 1))(x, t)[1:],
                          model(x, t, labels)[1:])


@pytest.mark.parametrize("interval", [(0, 0.8), (0.0, 1.0), (0.1, 5), (5, 1), (0, 5), (1, 2.5)])
def test_an_interval_is_of_whole_steps(interval):
    """Shares of T would never guide, and not say so."""
    refused(interval, guided, Classes(), LABELS, NULL, 2, interval=interval)


@pytest.mark.parametrize("labels", [[1.0, 2.0], np.array([-1, 2]), ["a"], [None]])
def test_labels_are_whole_numbers_from_0(labels):
    refused("labels", guided, Classes(), labels, NULL, 2)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint64])
def test_a_null_label_beyond_the_labels_type(dtype):
    """Among uint8, 256 would wrap around to 0: a class."""
    seen = []
    model = guided(lambda x, t, y: seen.append(y) or x, np.array([1, 2], dtype), 256, 2.0)
    model(np.ones((2, 3)), np.array([1, 1]))
    assert list(seen[0]) == [1, 2, 256, 256]


def test_flat_images_are_rescaled_to_themselves():
    """Both deviations are 0: their ratio is 1, not 0/0."""
    x, t = np.ones((3, 4, 2)), np.array([5, 6, 7])
    out = guided(lambda x, t, y: 0 * x + y[:, None, None], LABELS, NULL, 2.0, rescale=1.0)(x, t)
    same(out, 10 + 2 * (LABELS[:, None, None] - 10) + 0 * x)
