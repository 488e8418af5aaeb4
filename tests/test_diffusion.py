"""The forward process, its posterior, what a model predicts, loss weights, the likelihood.

Every law is derived here a second time, from Gaussians and Bayes' rule, in float64.
"""
import copy
import math
import pickle
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, strategies as st

import tinyddpm as td
from common import PREDICTS, abar_of, refused
from tinyddpm import Diffusion, bin_probability, flow_betas, linear_betas, zero_terminal_snr

pytestmark = pytest.mark.skipif(td.xp is not np, reason="these run with TINYDDPM_BACKEND=numpy")
SHAPE = (3, 2, 2, 1)
TEN = linear_betas(10)
ZERO_SNR = zero_terminal_snr(linear_betas(10, 0.05, 0.5))
beta_lists = st.lists(st.floats(1e-3, 0.5), min_size=2, max_size=12)
every_kind = pytest.mark.parametrize("kind", PREDICTS)


def pictures(count=2, dtype=np.float64):
    """So many independent batches of standard normal pictures, all of one SHAPE."""
    return np.random.default_rng(0).standard_normal((count, *SHAPE)).astype(dtype)


def at(table, t):
    """table[t] ready to multiply pictures: a number, or (B, 1, 1, 1)."""
    return table[t] if np.ndim(t) == 0 else table[t].reshape(-1, 1, 1, 1)


def told(kind, x0, eps, abar):
    """This x0 and this eps, told in each way."""
    return {"eps": eps, "x0": x0, "v": abar ** 0.5 * eps - (1 - abar) ** 0.5 * x0,
            "flow": eps - x0}[kind]


@st.composite
def betas_and_steps(draw):
    """Betas, and t as one integer or one for each picture."""
    betas = draw(beta_lists)
    t = st.integers(1, len(betas))
    return betas, draw(t | st.lists(t, min_size=3, max_size=3).map(np.array))


def same(a, b, rtol=1e-9, atol=1e-11):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


# ---------------------------------------------------------------------------------- the tables

@given(betas=beta_lists)
def test_tables_start_at_clean_data(betas):
    """Index 0 is clean: beta_0 = 0, abar_0 = 1, so abar_t has exactly t factors."""
    d = Diffusion(betas)
    assert d.T == len(betas) and np.isinf(d.snr[0])
    same(d.beta, [0, *betas])
    same(d.alpha, 1 - d.beta)
    same(d.abar, abar_of(betas))
    same(d.snr[1:] * (1 - d.abar[1:]), d.abar[1:])
    for table in (d.beta, d.alpha, d.abar, d.snr):
        assert table.dtype == np.float64 and table.shape == (d.T + 1,)


def test_an_abar_without_digits_is_refused():
    """1 - abar_t / abar_s would be nonsense. By the last one nothing is divided."""
    Diffusion([0.9] * 299 + [0.99])
    refused("1e-301", Diffusion, [0.9] * 301 + [0.1])
    refused("abar_199", Diffusion, [0.999] * 200)


def test_a_model_of_eps_at_zero_snr_is_refused_at_once():
    """Where x_T is eps, whatever x0 was. Not found out when sampling, a training later."""
    for betas in (ZERO_SNR, flow_betas(10)):
        refused("'eps'", Diffusion, betas)
        for kind in ("x0", "v", "flow"):
            assert Diffusion(betas, kind).predicts == kind
    assert Diffusion(TEN).predicts == "eps"
    refused("'noise'", Diffusion, TEN, "noise")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))])
def test_a_copy_is_the_same_process(copied):
    d, (xt, out) = Diffusion(ZERO_SNR, "flow"), pictures()
    assert np.array_equal(copied(d).to_x0(xt, 10, out), d.to_x0(xt, 10, out))


# ------------------------------------------------------------------------- the forward process

@given(betas=beta_lists)
def test_q_sample_is_t_steps_of_q_step(betas):
    """Both are linear in x and eps: x = 1, eps = 0 shows the coefficient of x, and x = 0,
    eps = 1 that of eps. Coefficients of x multiply; variances are scaled, and add. A step adds
    beta (DDPM eq. 2), and data of variance 1 keep it."""
    d, one, zero = Diffusion(betas), np.ones((1, 1)), np.zeros((1, 1))
    coefficient, variance = 1.0, 0.0
    for t, beta in enumerate(betas, start=1):
        of_x, of_eps = d.q_step(one, t, zero), d.q_step(zero, t, one)
        same([of_x ** 2 + of_eps ** 2, of_eps], np.reshape([1, beta ** 0.5], (2, 1, 1)))
        coefficient, variance = of_x * coefficient, of_x ** 2 * variance + of_eps ** 2
        same(d.q_sample(one, t, zero), coefficient)
        same(d.q_sample(zero, t, one), variance ** 0.5)


@given(betas=beta_lists, data=st.data(), to_zero_snr=st.booleans())
def test_posterior_is_bayes_rule(betas, data, to_zero_snr):
    """q(x_s | x_t, x0) is proportional to q(x_s | x0) q(x_t | x_s), two Gaussians in x_s.
    Complete the square: precisions add, and so do precisions times means. Each image may jump
    from a t to an s of its own, t-1 unless told; at s = 0 nothing is left to be unsure of."""
    betas = zero_terminal_snr(betas) if to_zero_snr else np.array(betas)
    d, (x0, xt) = Diffusion(betas, "v"), pictures()
    t = np.array([data.draw(st.integers(1, d.T)) for _ in x0])
    s = np.array([data.draw(st.integers(0, t_i - 1)) for t_i in t])
    mean, var = d.q_posterior(x0, xt, t, s)
    for i in range(3):
        a, x = x0[i:i + 1], xt[i:i + 1]
        wanted = a, 0
        if s[i]:
            abar, alpha = np.prod(1 - betas[:s[i]]), np.prod(1 - betas[s[i]:t[i]])
            precision = 1 / (1 - abar) + alpha / (1 - alpha)
            pull = abar ** 0.5 * a / (1 - abar) + alpha ** 0.5 * x / (1 - alpha)
            wanted = pull / precision, 1 / precision
        told_s = [] if s[i] == t[i] - 1 else [int(s[i])]
        of_one = d.q_posterior(a, x, int(t[i]), *told_s)
        for got in (of_one, (mean[i:i + 1], var[i:i + 1])):
            same(got[0], wanted[0])
            same(got[1], wanted[1])
            assert got[1].shape == (1, 1, 1, 1)


# ----------------------------------------------------------------------------- the conversions

@every_kind
@given(process=betas_and_steps())
def test_every_answer_means_one_x0_and_eps_and_so_any_other_answer(kind, process):
    """v: v-prediction section 4; flow: the velocity of the straight path from x0 to eps."""
    (betas, t), (x0, eps) = process, pictures()
    d = Diffusion(betas, kind)
    xt, out = d.q_sample(x0, t, eps), told(kind, x0, eps, at(abar_of(betas), t))
    same(d.target(x0, eps, t), out)
    same(d.to_x0(xt, t, out), x0)
    same(d.to_eps(xt, t, x0), eps)
    for other in (Diffusion(betas, name) for name in PREDICTS):
        out_of_other = other.target(d.to_x0(xt, t, out), d.to_eps(xt, t, x0), t)
        back = other.to_x0(xt, t, out_of_other)
        same(d.target(back, d.to_eps(xt, t, back), t), out, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("kind", ["x0", "v", "flow"])
@pytest.mark.parametrize("betas", [ZERO_SNR, flow_betas(10)])
def test_zero_snr_hides_x0_but_not_from_x0_v_and_flow(kind, betas):
    """At abar_T = 0, xt is eps, v is -x0, flow is xt - x0; none divides by 0."""
    d, (x0, eps) = Diffusion(betas, kind), pictures()
    assert np.array_equal(d.q_sample(x0, d.T, eps), eps)
    out = d.target(x0, eps, d.T)
    same(out, {"x0": x0, "v": -x0, "flow": eps - x0}[kind])
    same(d.to_x0(eps, d.T, out), x0)
    assert np.array_equal(d.to_eps(eps, d.T, x0), eps)


def test_x0_is_clipped_to_bounds_or_by_a_function():
    d, (xt, out) = Diffusion(TEN), pictures()
    x0 = d.to_x0(xt, 9, out)
    assert abs(x0).max() > 1 and np.array_equal(d.to_x0(xt, 9, out, clip=None), x0)
    assert np.array_equal(d.to_x0(xt, 9, out, clip=(-0.5, 0.2)), np.clip(x0, -0.5, 0.2))
    assert np.array_equal(d.to_x0(xt, 9, out, clip=np.tanh), np.tanh(x0))


@given(process=betas_and_steps())
def test_score_is_the_gradient_of_log_q(process):
    """Of log q(x_t | x0) for x0 itself. Of log q(x_t), where x0 is -1 or 1 at even odds, for
    its mean given x_t, which is a tanh. Differentiated by differences."""
    (betas, t), (xt, x0) = process, pictures()
    abar = at(abar_of(betas), t)
    width, h = 1 - abar, 1e-4 * (1 - abar)

    def log_q(x, x0=x0):
        return -(x - abar ** 0.5 * x0) ** 2 / (2 * width)

    def log_q_of_two(x):
        return np.logaddexp(log_q(x, 1), log_q(x, -1))
    for f, guess in (log_q, x0), (log_q_of_two, np.tanh(xt * abar ** 0.5 / width)):
        slope = (f(xt + h) - f(xt - h)) / (2 * h)
        same(width * Diffusion(betas).score(xt, t, guess), width * slope, 1e-6, 1e-6)


# ---------------------------------------------------------------------------- the loss weights

@pytest.mark.parametrize("gamma", [0.5, 5.0])
@given(betas=beta_lists)
def test_loss_weights_have_min_snrs_closed_forms(gamma, betas):
    """Min-SNR: each kind has its own. t is one step or many alike; gamma is 5 unless told."""
    t, abar = np.arange(1, len(betas) + 1), abar_of(betas)[1:]
    snr = abar / (1 - abar)
    for kind, divisor in {"eps": snr, "x0": 1, "v": snr + 1,
                          "flow": (1 + snr ** 0.5) ** 2}.items():
        weight = Diffusion(betas, kind).loss_weight
        same(weight(t, "min_snr", gamma), np.minimum(snr, gamma) / divisor)
        same(weight(2, "min_snr"), (np.minimum(snr, 5) / divisor * np.ones(len(t)))[1])
        same(weight(t, "snr"), snr / divisor)
        same(weight(t, "simple"), np.ones(len(t)))
        assert {weight(2, how).shape for how in ("simple", "snr", "min_snr")} == {()}


@pytest.mark.parametrize("kind", ["x0", "v", "flow"])
def test_loss_weights_at_zero_snr(kind):
    """0, in the limit, unless simple; with no warning of a division."""
    d = Diffusion(ZERO_SNR, kind)
    assert [d.loss_weight(10, how) for how in ("simple", "snr", "min_snr")] == [1, 0, 0]


def test_bad_loss_weights():
    refused("'p2'", Diffusion(TEN).loss_weight, 3, "p2")
    for t in (0, 11, np.array([1, -1])):
        refused(t, Diffusion(TEN).loss_weight, t, "snr")


# ---------------------------------------------------------------------- what all methods share

METHODS = {name: lambda d, a, b, t, name=name: getattr(d, name)(a, t, b)
           for name in ("q_sample", "q_step", "to_x0", "to_eps", "score")}
METHODS |= {"target": lambda d, a, b, t: d.target(a, b, t),
            "q_posterior": lambda d, a, b, t: d.q_posterior(a, b, t)[0]}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@every_method
@every_kind
def test_each_image_has_its_own_t_and_keeps_its_type(method, kind):
    """A NumPy float64, as the tables hold, would make float64 of a float32 array."""
    d, t = Diffusion(TEN, kind), np.array([1, 10, 4])
    for dtype, tolerance in (np.float32, 1e-6), (np.float64, 1e-13):
        a, b = pictures(dtype=dtype)
        together = method(d, a, b, t)
        assert together.dtype == dtype and together.shape == SHAPE
        for i in range(3):
            alone = method(d, a[i:i + 1], b[i:i + 1], int(t[i]))
            assert alone.dtype == dtype
            same(together[i:i + 1], alone, tolerance)


@every_method
@pytest.mark.parametrize("t", [0, 11, -1, np.array([1, 0, 2]), np.array([1, 11, 2])], ids=str)
def test_t_out_of_range(method, t):
    """It would wrap around, or be a step too far."""
    with pytest.raises((ValueError, IndexError)):
        method(Diffusion(TEN), *pictures(), t)


@every_method
@pytest.mark.parametrize("a, b, given_text", [
    (np.ones(SHAPE), np.ones((3, 2, 2, 2)), "(3, 2, 2, 2)"),
    (np.ones((3, 4)), np.ones((3, 1)), "(3, 1)"),
    (np.ones(SHAPE, np.uint8), np.ones(SHAPE), "uint8"),
    (np.ones(SHAPE, np.float16), np.ones(SHAPE, np.float16), "float16")])
def test_bad_arrays(method, a, b, given_text):
    """Shapes that would broadcast are refused as well: they are never meant."""
    refused(given_text, method, Diffusion(TEN), a, b, 3)


@pytest.mark.parametrize("s", [-1, 5, 6, np.array([0, 5, 3]), np.array([0, -1, 3])], ids=str)
def test_s_is_below_t(s):
    t = 5 if np.ndim(s) == 0 else np.array([5, 5, 5])
    refused(s, Diffusion(TEN).q_posterior, *pictures(), t, s)


# ------------------------------------------------------------------------------ the likelihood

BETAS = np.linspace(0.02, 0.9, 8)
ABAR = abar_of(BETAS)
STD = (BETAS[1] * (1 - ABAR[1]) / (1 - ABAR[2])) ** 0.5       # the posterior's at t = 2
BYTES = np.arange(256) / 127.5 - 1


def linear(t):
    """The slope and constant of E[x0 | x_t] for x0 ~ N(0.1, 0.1^2); it stays within [-1, 1]."""
    slope = ABAR[t] ** 0.5 * 0.01 / (ABAR[t] * 0.01 + 1 - ABAR[t])
    return slope, 0.1 - slope * ABAR[t] ** 0.5 * 0.1


def guess(x, t):
    return linear(t)[0] * x + linear(t)[1]


Z = np.array([NormalDist().inv_cdf((i + 0.5) / 80) for i in range(80)])
Z /= Z.std()            # the normal's quantiles, of variance 1: a mean over them is an integral


class Quantiles(np.random.Generator):
    def standard_normal(self, shape, dtype):
        return Z.reshape(shape).astype(dtype)


def bits(byte, kind="x0"):
    """The likelihood of a byte under a model that means x0 = guess(x, t), told in any way."""
    d, x0 = Diffusion(BETAS, kind), np.full((20, 2, 2, 1), BYTES[byte])

    def model(x, t):
        return d.target(guess(x, t[0]), d.to_eps(x, t, guess(x, t[0])), t)
    return d.bits_per_dim(model, x0, Quantiles(np.random.PCG64(0)))


@every_kind
@pytest.mark.parametrize("byte", [0, 89, 255])
def test_likelihood_is_its_integrals(kind, byte):
    """All four numbers, each from its own definition. The prior is the KL of two Gaussians. A
    step is half the fall in SNR times the squared error of x0 (VDM; the code has the KL of two
    posteriors). The decoder is the mass of a Gaussian over the byte's bin."""
    got, x0 = bits(byte, kind), BYTES[byte]
    mean, var = ABAR[-1] ** 0.5 * x0, 1 - ABAR[-1]
    same(got["prior"], (mean ** 2 + var - 1 - math.log(var)) / 2 / math.log(2))
    error = [(x0 - guess(abar ** 0.5 * x0, t)) ** 2 + linear(t)[0] ** 2 * (1 - abar)
             for t, abar in enumerate(ABAR[1:], start=1)]
    fall = -np.diff(ABAR[1:] / (1 - ABAR[1:]))
    same(got["steps"], 0.5 * fall * error[1:] / math.log(2))
    mass = []
    for mean in guess(ABAR[1] ** 0.5 * x0 + (1 - ABAR[1]) ** 0.5 * Z, 1):
        normal = NormalDist(mean, STD)
        below, above = (normal.cdf(x0 + side / 255) for side in (-1, 1))
        mass.append((1 if byte == 255 else above) - (0 if byte == 0 else below))
    same(got["decoder"], -np.log2(mass).mean(), 1e-8)
    same(got["total"], got["prior"] + got["steps"].sum() + got["decoder"])


def test_likelihood_is_a_bound():
    """On -log2 of the byte's probability. With a linear guess every step back is a linear map
    plus noise, so that x_1 is normal, and so is what the decoder draws."""
    mean, var = 0.0, 1.0
    for t in range(8, 1, -1):
        (slope, constant), beta, abar_s = linear(t), BETAS[t - 1], ABAR[t - 1]
        precision = (1 - beta) / beta + 1 / (1 - abar_s)
        of_x0 = abar_s ** 0.5 / (1 - abar_s) / precision
        gain = of_x0 * slope + (1 - beta) ** 0.5 / beta / precision
        mean, var = gain * mean + of_x0 * constant, gain ** 2 * var + 1 / precision
    std = (linear(1)[0] ** 2 * var + STD ** 2) ** 0.5
    p = bin_probability(BYTES, np.full(256, guess(mean, 1)), std)
    gap = np.array([bits(byte)["total"] for byte in range(256)]) + np.log2(p)
    assert np.all(gap > 0) and p @ gap < 0.4            # and not far from it


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_likelihood_asks_once_a_step_with_fresh_noise_and_clips_the_answer(dtype):
    """Down from T. At zero SNR x_T tells nothing, and the prior costs nothing."""
    d, seen = Diffusion(zero_terminal_snr(BETAS), "x0"), []
    x0 = BYTES[::23].reshape(SHAPE).astype(dtype)

    def model(x, t):
        seen.append((t, x))
        return 7 * x0
    got = d.bits_per_dim(model, x0, 0)
    expected = d.bits_per_dim(lambda x, t: np.clip(7 * x0, -1, 1), x0, 0)
    assert got["total"] == expected["total"] and got["prior"] == 0
    rng = np.random.default_rng(0)              # as is a seed
    for (t, x), wanted in zip(seen, range(8, 0, -1), strict=True):
        assert list(t) == [wanted] * 3 and x.dtype == dtype
        assert np.array_equal(x, d.q_sample(x0, wanted, rng.standard_normal(SHAPE, dtype)))


def test_likelihood_of_one_step():
    """T = 1 has no step t = 2 whose variance the decoder could take; it takes beta_1."""
    x0 = BYTES[::23].reshape(SHAPE)
    got = Diffusion([0.01], "x0").bits_per_dim(lambda x, t: 0.9 * x0, x0, 0)
    assert got["steps"].shape == (0,)
    same(got["decoder"], -np.log2(bin_probability(x0, 0.9 * x0, 0.1)).mean())


def test_bad_likelihood_input():
    """Bytes that were not scaled would pass all else."""
    d, x0 = Diffusion(BETAS, "x0"), abs(pictures(1)[0]).clip(0, 1)
    refused("(3, 2, 2, 3)", d.bits_per_dim, lambda x, t: np.ones((3, 2, 2, 3)), x0, 0)
    for factor in (1.5, 127.5, -127.5):
        refused(abs(factor), d.bits_per_dim, lambda x, t: x, factor * x0, 0)


@given(mean=st.floats(-3, 3), std=st.floats(1e-3, 5))
def test_the_256_bytes_share_all_of_the_probability(mean, std):
    """Their bins leave nothing out. A mirror turns left tails into right ones: both keep their
    digits, out where 1 - p is 1."""
    p = bin_probability(BYTES, np.full(256, mean), std)
    same(p.sum(), 1)
    same(bin_probability(-BYTES, -mean, std), p, rtol=1e-8, atol=0)


def test_bin_probability_far_out_is_the_density_integrated():
    """Thirty deviations away: Simpson's rule on the density over one bin, against erfc."""
    x, mean, std = BYTES[40:41], 0.9, 0.05
    u = np.linspace(x - 1 / 255, x + 1 / 255, 201)
    density = np.exp(-((u - mean) / std) ** 2 / 2) / std / (2 * math.pi) ** 0.5
    simpson = (density[0] + density[-1] + 4 * density[1::2].sum() + 2 * density[2:-1:2].sum())
    same(bin_probability(x, mean, std), simpson * (u[1] - u[0]) / 3, rtol=1e-6, atol=0)


def test_bin_probability_has_a_finite_logarithm():
    for mean, end in (-1e6, 0), (1e6, 255):
        p = bin_probability(BYTES, np.full(256, mean), 1e-6)
        assert np.all(np.isfinite(np.log(p))) and p[end] == 1
