"""The forward process, its posterior, the conversions, the loss weights and the likelihood.

Every law is derived here a second time, from Gaussians and Bayes' rule, in float64.
"""
import copy
import math

import numpy as np
import pytest
from hypothesis import given, strategies as st

from common import PREDICTS, refused
from tinyddpm import (Diffusion, bin_probability, cosine_betas, flow_betas, linear_betas,
                      zero_terminal_snr)

SHAPE = (3, 2, 2, 1)
beta_lists = st.lists(st.floats(1e-3, 0.5), min_size=2, max_size=12)
every_kind = pytest.mark.parametrize("kind", PREDICTS)

# Every method that takes two arrays and t, in one form, for the laws that all of them share.
METHODS = {
    "q_sample": lambda d, a, b, t: d.q_sample(a, t, b),
    "q_step": lambda d, a, b, t: d.q_step(a, t, b),
    "q_posterior": lambda d, a, b, t: d.q_posterior(a, b, t)[0],
    "score": lambda d, a, b, t: d.score(a, t, b),
    "to_eps": lambda d, a, b, t: d.to_eps(a, t, b),
    **{f"to_x0 {kind}": lambda d, a, b, t, kind=kind: told(d, kind).to_x0(a, t, b)
       for kind in PREDICTS},
    **{f"target {kind}": lambda d, a, b, t, kind=kind: told(d, kind).target(a, b, t)
       for kind in PREDICTS},
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


def told(d, kind):
    """The same process, for a model that predicts this kind."""
    d = copy.copy(d)
    d.predicts = kind
    return d


def pictures(count=2, dtype=np.float64, seed=0):
    """So many independent batches of standard normal pictures, all of one SHAPE."""
    return np.random.default_rng(seed).standard_normal((count, *SHAPE)).astype(dtype)


def per_image(value, t):
    """value[t] ready to multiply pictures: a number, or (B, 1, 1, 1)."""
    return value[t] if np.ndim(t) == 0 else value[t].reshape(-1, 1, 1, 1)


@st.composite
def processes_and_steps(draw):
    """A Diffusion, and t as one integer or one for each picture."""
    d = Diffusion(draw(beta_lists))
    t = st.integers(1, d.T)
    return d, draw(t | st.lists(t, min_size=3, max_size=3).map(np.array))


def zero_snr(kind="v"):
    return Diffusion(zero_terminal_snr(linear_betas(10, 0.05, 0.5)), kind)


def same(a, b, rtol=1e-9, atol=1e-11):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


# ------------------------------------------------------------------------- the forward process

@given(betas=beta_lists)
def test_q_sample_is_t_steps_of_q_step(betas):
    """Both are linear in x and eps: x = 1, eps = 0 shows the coefficient of x, and x = 0,
    eps = 1 that of eps. Coefficients of x multiply; variances are scaled, and add."""
    d, one, zero = Diffusion(betas), np.ones((1, 1)), np.zeros((1, 1))
    coefficient, variance = 1.0, 0.0
    for t in range(1, d.T + 1):
        of_x, of_eps = d.q_step(one, t, zero), d.q_step(zero, t, one)
        coefficient, variance = of_x * coefficient, of_x ** 2 * variance + of_eps ** 2
        same(d.q_sample(one, t, zero), coefficient)
        same(d.q_sample(zero, t, one) ** 2, variance)


@given(betas=beta_lists)
def test_a_step_adds_variance_beta_and_keeps_the_total_at_1(betas):
    """DDPM eq. 2: the noise has deviation sqrt(beta), not beta, and data of
    variance 1 keep it."""
    d, one, zero = Diffusion(betas), np.ones((1, 1)), np.zeros((1, 1))
    for t in range(1, d.T + 1):
        same(d.q_step(zero, t, one) ** 2, betas[t - 1])
        same(d.q_step(zero, t, one) ** 2 + d.q_step(one, t, zero) ** 2, 1)


def test_the_first_step_from_clean_data_is_q_sample():
    """To the sign: the same eps has to make the same x_1."""
    d, (x0, eps) = Diffusion(linear_betas(10)), pictures()
    same(d.q_step(x0, 1, eps), d.q_sample(x0, 1, eps))


@given(betas=beta_lists, data=st.data(), to_zero_snr=st.booleans())
def test_posterior_is_bayes_rule(betas, data, to_zero_snr):
    """q(x_s | x_t, x0) is proportional to q(x_s | x0) q(x_t | x_s), two Gaussians in x_s.
    Complete the square: precisions add, and so do precisions times means."""
    betas = zero_terminal_snr(betas) if to_zero_snr else np.array(betas)
    t = data.draw(st.integers(2, len(betas)))
    s = data.draw(st.integers(1, t - 1))
    x0, xt = pictures()
    abar_s, alpha = np.prod(1 - betas[:s]), np.prod(1 - betas[s:t])
    precision = 1 / (1 - abar_s) + alpha / (1 - alpha)
    mean = (abar_s ** 0.5 * x0 / (1 - abar_s) + alpha ** 0.5 * xt / (1 - alpha)) / precision
    d = Diffusion(betas, "v")
    got_mean, got_var = d.q_posterior(x0, xt, t, s)
    same(got_mean, mean)
    same(got_var, 1 / precision)
    if s == t - 1:
        same(d.q_posterior(x0, xt, t)[0], mean)
        same(d.q_posterior(x0, xt, t)[1], 1 / precision)


@pytest.mark.parametrize("t", [1, 4, 10])
def test_posterior_of_clean_data_is_x0_itself(t):
    """At s = 0 there is nothing left to be unsure of: abar_0 = 1, variance 0."""
    x0, xt = pictures()
    mean, var = zero_snr().q_posterior(x0, xt, t, 0)
    assert np.array_equal(mean, x0) and var == 0


def test_forward_and_posterior_agree_on_real_draws():
    """One dimension, 200,000 draws: steps composed have q_sample's moments, and the line that
    best predicts x_2 from x_5 is the posterior. Bounds are five standard errors."""
    n, x0, s, t = 200_000, 0.7, 2, 5
    rng, d = np.random.default_rng(0), Diffusion([0.05, 0.1, 0.2, 0.3, 0.4])
    x = [np.full(n, x0)]
    for step in range(1, t + 1):
        x.append(d.q_step(x[-1], step, rng.standard_normal(n)))
    bound = 5 / n ** 0.5
    one = np.ones(1)
    assert abs(x[t].mean() - d.q_sample(x0 * one, t, 0 * one)) < bound
    assert abs(x[t].var() / d.q_sample(0 * one, t, one) ** 2 - 1) < 2 * bound
    mean, var = d.q_posterior(np.full(n, x0), x[t], t, s)
    slope, constant = np.polyfit(x[t], x[s], 1)
    assert np.abs(slope * x[t] + constant - mean).max() < 5 * bound
    assert abs((x[s] - mean).var() / var - 1) < 2 * bound


# ----------------------------------------------------------------------------- the conversions

@every_kind
@given(process=processes_and_steps())
def test_every_answer_is_a_name_for_one_thing(kind, process):
    """What a perfect model would answer, target(), gives back x0 and eps. (v: Salimans & Ho
    section 4; flow: the velocity of the straight path from x0 to eps.)"""
    d, t = told(process[0], kind), process[1]
    x0, eps = pictures()
    xt, out = d.q_sample(x0, t, eps), d.target(x0, eps, t)
    signal, noise = per_image(d.abar, t) ** 0.5, (1 - per_image(d.abar, t)) ** 0.5
    same(out, {"eps": eps, "x0": x0, "v": signal * eps - noise * x0, "flow": eps - x0}[kind])
    same(d.to_x0(xt, t, out), x0)
    same(d.to_eps(xt, t, x0), eps)


@every_kind
@given(process=processes_and_steps())
def test_a_wrong_answer_still_means_one_x0_and_eps_that_make_xt(kind, process):
    """Whatever the model says, its x0 and its eps make up the xt that it saw."""
    d, t = told(process[0], kind), process[1]
    xt, out = pictures()
    x0 = d.to_x0(xt, t, out)
    eps = d.to_eps(xt, t, x0)
    same(d.q_sample(x0, t, eps), xt)
    same(d.target(x0, eps, t), out, rtol=1e-7)


def test_x0_is_clipped_to_bounds_or_by_a_function():
    d, (xt, out) = Diffusion(linear_betas(10)), pictures()
    x0 = d.to_x0(xt, 9, out)
    same(d.to_x0(xt, 9, out, clip=(-0.5, 0.2)), np.clip(x0, -0.5, 0.2))
    same(d.to_x0(xt, 9, out, clip=np.tanh), np.tanh(x0))
    assert (abs(x0) > 1).any() and np.array_equal(d.to_x0(xt, 9, out, clip=None), x0)


@pytest.mark.parametrize("kind", ["x0", "v", "flow"])
@pytest.mark.parametrize("betas", [zero_terminal_snr(linear_betas(10, 0.05, 0.5)),
                                   flow_betas(10)])
def test_zero_snr_hides_x0_but_not_from_x0_v_and_flow(kind, betas):
    """At abar_T = 0, xt is eps, v is -x0, flow is xt - x0; all of them still give x0."""
    d = Diffusion(betas, kind)
    x0, eps = pictures()
    assert np.array_equal(d.q_sample(x0, d.T, eps), eps)
    out = d.target(x0, eps, d.T)
    same(out, {"x0": x0, "v": -x0, "flow": eps - x0}[kind])
    same(d.to_x0(eps, d.T, out), x0)
    assert np.array_equal(d.to_eps(eps, d.T, x0), eps)


def test_a_model_of_eps_at_zero_snr_is_refused_at_once():
    """Not when it is sampled from, a training later."""
    betas = zero_terminal_snr(linear_betas(10))
    refused("'eps'", Diffusion, betas)
    refused("'eps'", Diffusion, flow_betas(10), "eps")
    Diffusion(cosine_betas(10), "eps")


def test_an_unknown_prediction_is_refused():
    refused("'noise'", Diffusion, linear_betas(10), "noise")


@given(process=processes_and_steps())
def test_score_is_the_gradient_of_log_q(process):
    """q(x_t | x0) is N(sqrt(abar) x0, 1 - abar); its log, differentiated by differences. The
    score is eps with a scale and a minus sign."""
    d, t = process
    x0, eps = pictures()
    xt, abar, h = d.q_sample(x0, t, eps), per_image(d.abar, t), 1e-3

    def log_q(x):
        return -(x - abar ** 0.5 * x0) ** 2 / (2 * (1 - abar))
    same(d.score(xt, t, x0), (log_q(xt + h) - log_q(xt - h)) / (2 * h), rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------- the loss weights

@pytest.mark.parametrize("gamma", [0.5, 5.0])
@given(betas=beta_lists)
def test_loss_weights_have_min_snrs_closed_forms(gamma, betas):
    """Min-SNR: each kind has its own. t is one step or many alike."""
    d, t = Diffusion(betas), np.arange(1, len(betas) + 1)
    abar = np.cumprod(1 - np.array(betas))
    snr = abar / (1 - abar)
    held = np.minimum(snr, gamma)
    for kind, weight in {"eps": held / snr, "x0": held, "v": held / (snr + 1),
                         "flow": held / (1 + snr ** 0.5) ** 2}.items():
        same(told(d, kind).loss_weight(t, "min_snr", gamma), weight)
        same(told(d, kind).loss_weight(2, "min_snr", gamma), weight[1])
        same(told(d, kind).loss_weight(t, "simple"), np.ones(len(t)))


@given(process=processes_and_steps(), gamma=st.floats(0.1, 10))
def test_weighted_losses_of_all_kinds_are_equal(process, gamma):
    """One wrong x0, told in any way: with "snr" each loss is the squared error of eps, and with
    "min_snr" it is min(snr, gamma) times the squared error of x0."""
    d, t = process
    x0, eps, guess = pictures(3)
    abar = per_image(d.abar, t)
    guess_eps = (d.q_sample(x0, t, eps) - abar ** 0.5 * guess) / (1 - abar) ** 0.5
    for kind in PREDICTS:
        d = told(d, kind)
        error = (d.target(x0, eps, t) - d.target(guess, guess_eps, t)) ** 2
        weights = {how: per_image(d.loss_weight(np.arange(1, d.T + 1), how, gamma),
                                  np.array(t) - 1) for how in ("snr", "min_snr")}
        same(weights["snr"] * error, (eps - guess_eps) ** 2, rtol=1e-7)
        held = np.minimum(abar / (1 - abar), gamma)
        same(weights["min_snr"] * error, held * (x0 - guess) ** 2, rtol=1e-7)


def test_gamma_is_5_unless_told():
    """Min-SNR's choice; the first weight here is held by it."""
    d, t = Diffusion(linear_betas(10, 0.05, 0.5), "x0"), np.arange(1, 11)
    assert d.snr[1] > 6 and d.snr[10] < 5
    same(d.loss_weight(t, "min_snr"), np.minimum(d.snr[1:], 5))


@pytest.mark.parametrize("how", ["simple", "snr", "min_snr"])
@pytest.mark.parametrize("kind", ["x0", "v", "flow"])
def test_loss_weights_at_zero_snr(kind, how):
    """Finite, and the limit, 0, unless simple; with no warning of a division."""
    assert zero_snr(kind).loss_weight(10, how) == (1 if how == "simple" else 0)


def test_bad_loss_weights():
    d = Diffusion(linear_betas(10))
    refused("'p2'", d.loss_weight, 3, "p2")
    for t in (0, 11, np.array([1, -1])):
        refused(f"t is {t}", d.loss_weight, t, "snr")


# ---------------------------------------------------------------------- what all methods share

@every_method
@pytest.mark.parametrize("t", [7, np.array([1, 10, 4])], ids=["int", "(B,)"])
def test_float32_stays_float32(method, t):
    """NumPy 2 promotes a float32 array times a float64 scalar; the tables are float64."""
    out = method(Diffusion(linear_betas(10)), *pictures(dtype=np.float32), t)
    assert out.dtype == np.float32 and out.shape == SHAPE


@every_method
def test_t_for_each_image_is_the_images_one_by_one(method):
    """Each image has its own t, whatever its place in the batch."""
    d, (a, b), t = Diffusion(linear_betas(10)), pictures(), np.array([1, 10, 4])
    alone = [method(d, a[i:i + 1], b[i:i + 1], int(t[i])) for i in range(3)]
    same(method(d, a, b, t), np.concatenate(alone), rtol=1e-13)


def test_posterior_variance_for_each_image():
    """It broadcasts over the picture, as its mean does; s may differ from image to image."""
    d, (x0, xt) = Diffusion(linear_betas(10)), pictures()
    t, s = np.array([2, 10, 4]), np.array([0, 3, 3])
    mean, var = d.q_posterior(x0, xt, t, s)
    assert var.shape == (3, 1, 1, 1)
    for i in range(3):
        one_mean, one_var = d.q_posterior(x0[i:i + 1], xt[i:i + 1], int(t[i]), int(s[i]))
        same(mean[i:i + 1], one_mean)
        same(var[i:i + 1], one_var)


@every_method
@pytest.mark.parametrize("t", [0, 11, -1, 2.0, np.array([1, 0, 2]),
                               np.array([1.0, 2.0, 3.0])], ids=str)
def test_bad_t(method, t):
    """Out of 1..T it would wrap around, or be a step too far; as a float it is no index."""
    with pytest.raises((ValueError, IndexError)):
        method(Diffusion(linear_betas(10)), *pictures(), t)


@every_method
@pytest.mark.parametrize("a, b, given_text", [
    (np.ones(SHAPE), np.ones((3, 2, 2, 2)), "(3, 2, 2, 2)"),
    (np.ones((3, 4)), np.ones((3, 1)), "(3, 1)"),
    (np.ones(SHAPE, np.uint8), np.ones(SHAPE), "uint8"),
    (np.ones(SHAPE, np.float16), np.ones(SHAPE, np.float16), "float16")])
def test_bad_arrays(method, a, b, given_text):
    """Shapes that would broadcast are refused as well: they are never meant."""
    refused(given_text, method, Diffusion(linear_betas(10)), a, b, 3)


@pytest.mark.parametrize("s", [-1, 5, 6, np.array([0, 5, 3]), np.array([0, -1, 3])], ids=str)
def test_bad_s(s):
    t = 5 if np.ndim(s) == 0 else np.array([5, 5, 5])
    refused(f"s is {s}", Diffusion(linear_betas(10)).q_posterior, *pictures(), t, s)


# ------------------------------------------------------------------------------ the likelihood

BETAS = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
ABAR = np.append(1, np.cumprod(1 - BETAS))
BYTES = np.arange(256) / 127.5 - 1


def byte_pictures():
    """Bytes scaled to [-1, 1], the darkest and the brightest among them."""
    x0 = BYTES[np.random.default_rng(1).integers(0, 256, SHAPE)]
    x0[0, 0, 0, 0], x0[0, 0, 1, 0] = -1, 1
    return x0


def fixed_guess(guess, kind, seen=None):
    """A model that means x0 = guess whatever it sees, told in any way."""
    def model(x, t):
        if seen is not None:
            seen.append(t)
        a = ABAR[t].reshape(-1, 1, 1, 1)
        eps = (x - a ** 0.5 * guess) / (1 - a) ** 0.5
        return {"eps": eps, "x0": guess, "v": a ** 0.5 * eps - (1 - a) ** 0.5 * guess,
                "flow": eps - guess}[kind]
    return model


def bits(model, x0, kind, betas=BETAS):
    return Diffusion(betas, kind).bits_per_dim(model, x0, np.random.default_rng(0))


@every_kind
def test_likelihood_of_a_fixed_guess(kind):
    """All four numbers, each from its own definition.

    The prior is the KL of two Gaussians. A step is half the fall in SNR times the squared error
    of x0 (VDM, Kingma et al. 2021; the code has the KL of two posteriors). The decoder
    is the mass of a Gaussian over each byte's bin, and the edge bins are open.
    """
    x0 = byte_pictures()
    guess = 0.9 * x0 + 0.02
    got = bits(fixed_guess(guess, kind), x0, kind)

    mean, var = ABAR[-1] ** 0.5 * x0, 1 - ABAR[-1]
    same(got["prior"], np.mean(mean ** 2 + var - 1 - np.log(var)) / 2 / math.log(2))

    snr = ABAR[1:] / (1 - ABAR[1:])
    fall = snr[:-1] - snr[1:]
    same(got["steps"], 0.5 * fall * np.mean((x0 - guess) ** 2) / math.log(2))

    std = ((1 - ABAR[1]) / (1 - ABAR[2]) * BETAS[1]) ** 0.5      # the posterior's at t = 2
    total = 0.0
    for x, m in zip(x0.flat, guess.flat):
        below, above = (0.5 * (1 + math.erf((x + side / 255 - m) / std / 2 ** 0.5))
                        for side in (-1, 1))
        total -= math.log2((1 if x == 1 else above) - (0 if x == -1 else below))
    same(got["decoder"], total / x0.size)

    assert got["steps"].shape == (4,) and got["steps"].dtype == np.float64
    same(got["total"], got["prior"] + got["steps"].sum() + got["decoder"])


def test_a_perfect_model_pays_no_bits_on_the_way():
    x0 = byte_pictures()
    got = bits(fixed_guess(x0, "x0"), x0, "x0")
    same(got["steps"], np.zeros(4))
    same(got["total"], got["prior"] + got["decoder"])


def test_likelihood_asks_once_a_step_and_clips_the_guess():
    x0, seen = byte_pictures(), []
    for guess, clipped in (7.0, 1.0), (-7.0, -1.0):
        got = bits(fixed_guess(np.full(SHAPE, guess), "x0", seen), x0, "x0")
        expected = bits(fixed_guess(np.full(SHAPE, clipped), "x0"), x0, "x0")
        same(got["steps"], expected["steps"])
    assert [list(t) for t in seen] == [[t] * len(x0) for t in (5, 4, 3, 2, 1)] * 2


def test_likelihood_is_that_of_xt_at_t():
    """The model sees draws of q(x_t | x0): at a tiny beta, nearly x0; at zero SNR, noise."""
    x0, shown = byte_pictures(), {}

    def model(x, t):
        shown[int(t[0])] = x
        return x0
    got = bits(model, x0, "x0", zero_terminal_snr([1e-12, 0.3, 0.4]))
    same(shown[1], x0, atol=1e-5)
    assert np.array_equal(shown[3], np.random.default_rng(0).standard_normal(SHAPE))
    assert got["prior"] == 0


def test_likelihood_of_one_step():
    """T = 1 has no step t = 2 whose variance the decoder could take; it takes beta_1."""
    x0 = byte_pictures()
    got = bits(fixed_guess(0.9 * x0, "x0"), x0, "x0", [0.01])
    assert got["steps"].shape == (0,)
    same(got["decoder"], -np.log2(bin_probability(x0, 0.9 * x0, 0.1)).mean())


@given(mean=st.floats(-3, 3), std=st.floats(1e-3, 5))
def test_the_256_bytes_share_all_of_the_probability(mean, std):
    p = bin_probability(BYTES, np.full(256, mean), std)
    same(p.sum(), 1)
    assert np.all(p > 0)


@given(mean=st.floats(-2, 2), std=st.floats(0.01, 1))
def test_bin_probability_keeps_its_digits_on_both_sides(mean, std):
    """A mirror turns left tails into right ones. Out there 1 - p is 1, and p is what counts."""
    mirrored = bin_probability(-BYTES, -mean, std)
    same(bin_probability(BYTES, mean, std), mirrored, rtol=1e-8, atol=0)


def test_bin_probability_far_out_is_the_density_integrated():
    """Thirty deviations away: Simpson's rule on the density over one bin, against erfc."""
    x, mean, std = BYTES[40:41], 0.9, 0.05
    u = np.linspace(x - 1 / 255, x + 1 / 255, 201)
    density = np.exp(-((u - mean) / std) ** 2 / 2) / std / (2 * math.pi) ** 0.5
    simpson = (density[0] + density[-1] + 4 * density[1::2].sum() + 2 * density[2:-1:2].sum())
    same(bin_probability(x, mean, std), simpson * (u[1] - u[0]) / 3, rtol=1e-6, atol=0)


@pytest.mark.parametrize("mean", [-1e6, 1e6])
def test_bin_probability_has_a_finite_logarithm(mean):
    p = bin_probability(BYTES, np.full(256, mean), 1e-6)
    assert np.all(np.isfinite(np.log(p)))
    assert p[0 if mean < 0 else 255] == 1


def test_bad_likelihood_input():
    x0 = byte_pictures()
    refused("(3, 2, 2, 3)", bits, lambda x, t: np.ones((3, 2, 2, 3)), x0, "x0")
    refused("254.0", bits, lambda x, t: x, 127 * (x0 + 1), "x0")
