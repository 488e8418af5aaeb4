"""Noise schedules: what holds for every one, each one's closed form, and the steps to visit."""
import numpy as np
import pytest
from hypothesis import given, strategies as st

from common import SPACINGS, abar_of, refused
from tinyddpm import (SCHEDULES, Diffusion, checked_betas, cosine_betas, flow_betas,
                      karras_betas, linear_betas, quadratic_betas, scaled_linear_betas,
                      sigmoid_betas, sqrt_betas, timesteps, zero_terminal_snr)

lengths = st.integers(1, 300)
ends = st.tuples(st.floats(1e-5, 0.5), st.floats(1e-5, 0.5))
beta_lists = st.lists(st.floats(1e-4, 0.9), min_size=2, max_size=12)
every_schedule = pytest.mark.parametrize("name", SCHEDULES)


def fractions(T):
    """(t - 1) / (T - 1): how far step t lies from the first step, 0, to the last, 1."""
    return np.arange(T) / max(T - 1, 1)


def same(a, b, rtol=1e-10, atol=1e-13):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


# ------------------------------------------------------------------------- laws of all of them

def assert_lawful(betas, T):
    """A schedule is T variances in (0, 1]; every step adds noise, so abar falls to the end."""
    assert betas.shape == (T,) and betas.dtype == np.float64
    assert np.all((0 < betas) & (betas <= 1))
    assert np.all(np.diff(abar_of(betas)) < 0)


@every_schedule
@given(T=lengths)
def test_every_schedule_is_lawful_for_every_length(name, T):
    if name == "scaled_linear":
        T += 19                     # its ends, times 1000/T, pass 1 for a shorter T
    assert_lawful(SCHEDULES[name](T), T)


@pytest.mark.parametrize("schedule", [linear_betas, quadratic_betas, sigmoid_betas])
@given(T=lengths, ends=ends)
def test_lawful_for_any_ends(schedule, T, ends):
    assert_lawful(schedule(T, *ends), T)


@given(T=lengths, s=st.floats(1e-6, 1e-3), cap=st.floats(0.1, 0.999))
def test_lawful_for_any_offset_and_cap(T, s, cap):
    for schedule in (cosine_betas, sqrt_betas):
        betas = schedule(T, s, cap)
        assert_lawful(betas, T)
        assert betas.max() <= cap


@given(betas=beta_lists)
def test_tables_start_at_clean_data(betas):
    """Index 0 is clean: beta_0 = 0, abar_0 = 1, so abar_t has exactly t factors."""
    d = Diffusion(betas)
    assert d.T == len(betas)
    assert d.beta[0] == 0 and d.alpha[0] == 1 and d.abar[0] == 1 and np.isinf(d.snr[0])
    same(d.beta[1:], betas)
    same(d.alpha, 1 - d.beta)
    same(d.abar, abar_of(betas))
    same(d.snr[1:] * (1 - d.abar[1:]), d.abar[1:])
    for table in (d.beta, d.alpha, d.abar, d.snr):
        assert table.dtype == np.float64 and table.shape == (d.T + 1,)


# -------------------------------------------------------------------------- each one's formula

@given(T=lengths, ends=ends)
def test_linear(T, ends):
    start, end = ends
    same(linear_betas(T, start, end), start + (end - start) * fractions(T))


@given(T=st.integers(20, 1500))
def test_scaled_linear_scales_both_ends(T):
    first, last = scaled_linear_betas(T)[[0, -1]]
    same([first, last], [1e-4 * 1000 / T, 0.02 * 1000 / T])
    same(scaled_linear_betas(T), first + (last - first) * fractions(T))


@given(T=st.integers(2, 40), end=st.floats(0.001, 0.04))
def test_scaled_linear_refuses_to_pass_1(T, end):
    """Unrefused, 1 - beta would be negative and so would abar."""
    if end * 1000 / T > 1:
        refused(f" of {T} is ", scaled_linear_betas, T, 1e-5, end)
    else:
        assert_lawful(scaled_linear_betas(T, 1e-5, end), T)


def test_scaled_linear_default_needs_20_steps():
    refused("beta_19 of 19 is 1.053", scaled_linear_betas, 19)
    assert scaled_linear_betas(20)[-1] == 1


@pytest.mark.parametrize("T, left", [(50, 0.603), (300, 0.0481), (400, 0.0175), (1000, 4e-5)])
def test_linear_leaves_signal_when_short_and_scaled_does_not(T, left):
    """Made for T = 1000, the linear schedule's x_T is not noise for a short T."""
    same(abar_of(linear_betas(T))[-1], left, rtol=0.01)
    assert abar_of(scaled_linear_betas(T))[-1] < 5e-5


@given(T=lengths, ends=ends)
def test_quadratic_is_linear_in_the_root(T, ends):
    start, end = ends
    root = start ** 0.5 + (end ** 0.5 - start ** 0.5) * fractions(T)
    same(quadratic_betas(T, start, end), root ** 2)


@given(T=lengths, ends=ends)
def test_sigmoid_is_on_beta(T, ends):
    """(beta - start) / (end - start) is the logistic function from -6 to 6."""
    start, end = ends
    x = -6 + 12 * fractions(T)
    same(sigmoid_betas(T, start, end), start + (end - start) * (1 + np.tanh(x / 2)) / 2)


def assert_capped(betas, abar, cap):
    """beta is that of the closed form where it is below the cap, else the cap; never raised
    from below. Before the first capped step abar is the closed form itself."""
    same(betas, np.minimum(1 - abar[1:] / abar[:-1], cap), rtol=1e-8)
    free = np.flatnonzero(np.append(betas >= cap, True))[0]
    same(abar_of(betas)[:free + 1], abar[:free + 1], rtol=1e-9)


@given(T=lengths, s=st.floats(1e-4, 0.1), cap=st.floats(0.2, 0.9999))
def test_cosine_is_on_abar(T, s, cap):
    """iDDPM eq. 17; written with 1 + cos(2 x) = 2 cos^2(x), so not the same line of code."""
    f = 1 + np.cos(np.pi * (np.arange(T + 1) / T + s) / (1 + s))
    assert_capped(cosine_betas(T, s, cap), f / f[0], cap)


@given(T=lengths, s=st.floats(1e-6, 1e-3), cap=st.floats(0.9, 0.9999))
def test_sqrt_is_on_abar(T, s, cap):
    """Diffusion-LM: abar_t = 1 - sqrt(t/T + s); abar_0 is 1 all the same."""
    abar = np.array([1] + [1 - (t / T + s) ** 0.5 for t in range(1, T + 1)])
    assert abar[-1] < 0             # so the last beta is always the cap
    assert_capped(sqrt_betas(T, s, cap), abar, cap)


@given(T=st.integers(2, 200), low=st.floats(1e-3, 0.1), high=st.floats(1, 100),
       rho=st.floats(1, 10))
def test_karras_ascends(T, low, high, rho):
    """abar = 1/(1 + sigma^2) with EDM eq. 5 read backwards, so that noise grows."""
    edm = [(high ** (1 / rho) + i / (T - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
           for i in range(T)]
    same(abar_of(karras_betas(T, low, high, rho))[1:], 1 / (1 + np.array(edm[::-1]) ** 2))


@given(T=lengths)
def test_flow_is_the_straight_path_at_unit_variance(T):
    """x = (1 - u) x0 + u eps, divided by its deviation for data of variance 1."""
    u = np.arange(T + 1) / T
    signal, noise = np.array([1 - u, u]) / np.hypot(1 - u, u)
    abar = abar_of(flow_betas(T))
    same(abar, signal ** 2)
    same(1 - abar, noise ** 2, atol=1e-11)
    assert abar[-1] == 0


@pytest.mark.parametrize("schedule, paper", [
    *[(schedule, dict(start=1e-4, end=0.02)) for schedule in (
        linear_betas, scaled_linear_betas, quadratic_betas, sigmoid_betas)],
    (cosine_betas, dict(s=0.008, max_beta=0.999)), (sqrt_betas, dict(s=1e-4, max_beta=0.999)),
    (karras_betas, dict(sigma_min=0.002, sigma_max=80, rho=7)), (flow_betas, {})])
def test_unless_told_the_numbers_are_the_papers(schedule, paper):
    assert np.array_equal(schedule(50), schedule(50, **paper))


# --------------------------------------------------------------------------- zero terminal SNR

@given(betas=beta_lists)
def test_zero_terminal_snr(betas):
    """ZeroSNR Algorithm 1: sqrt(abar) is shifted to end at 0 and stretched to start where it
    did; both together are one affine map of the old sqrt(abar)."""
    out = zero_terminal_snr(betas)
    assert_lawful(out, len(betas))
    assert Diffusion(out, "v").abar[-1] == 0 and Diffusion(out, "v").snr[-1] == 0
    same(out[0], betas[0])
    old, new = abar_of(betas)[1:] ** 0.5, abar_of(out)[1:] ** 0.5
    same((new - new[0]) * (old[-1] - old[0]), (old - old[0]) * (new[-1] - new[0]))


@every_schedule
def test_zero_terminal_snr_of_every_schedule(name):
    assert Diffusion(zero_terminal_snr(SCHEDULES[name](50)), "v").abar[-1] == 0


# ----------------------------------------------------------------------------------- bad input

def test_zero_terminal_snr_needs_two_steps():
    """One step cannot both keep its start and end at 0."""
    refused("given 1", zero_terminal_snr, [0.5])


@pytest.mark.parametrize("takes_betas", [Diffusion, zero_terminal_snr])
@pytest.mark.parametrize("betas, given_text", [
    ([0.1, 0.0, 0.2], "beta_2 of 3 is 0"), ([-0.1], "beta_1 of 1 is -0.1"),
    ([0.1, 1.5], "beta_2 of 2 is 1.5"), ([0.1, 0.2, float("nan")], "beta_3 of 3 is nan"),
    ([[0.1, 0.2]], "(1, 2)"), ([], "(0,)"), (0.1, "()"),
    ([0.1, 1.0, 0.2], "beta_2 of 3 is 1"), ([1.0, 0.1], "beta_1 of 2 is 1"),
    ([0.1, 0.2, 1.0, 1.0], "beta_3 of 4 is 1")])
def test_bad_betas(takes_betas, betas, given_text):
    refused(given_text, takes_betas, betas)


@pytest.mark.parametrize("betas", [np.float32([0.1, 0.3, 0.4]), [1]])
def test_betas_are_computed_with_as_float64(betas):
    """In float32 the product of a thousand factors near 1 would be off in the fifth digit."""
    exact = np.asarray(betas, np.float64)
    assert checked_betas(betas).dtype == np.float64
    assert np.array_equal(Diffusion(betas, "v").abar, Diffusion(exact, "v").abar)
    if len(betas) > 1:
        assert np.array_equal(zero_terminal_snr(betas), zero_terminal_snr(exact))


@every_schedule
@pytest.mark.parametrize("T", [0, 2.5, "10", None])
def test_bad_T(name, T):
    with pytest.raises((ValueError, TypeError, ZeroDivisionError)):
        SCHEDULES[name](T)


@pytest.mark.parametrize("betas", [[0.999] * 200, [0.9999999] * 50 + [0.5]])
def test_an_abar_without_digits_is_refused(betas):
    """Below 1e-300 it is a denormal number or 0, and 1 - abar_t/abar_s nonsense."""
    refused("1e-300", Diffusion, betas)


# ------------------------------------------------------------------------------ steps to visit

@pytest.mark.parametrize("spacing", SPACINGS)
@given(T=st.integers(1, 1000), data=st.data())
def test_timesteps_are_so_many_distinct_steps_going_down(spacing, T, data):
    steps = data.draw(st.integers(1, T))
    t = timesteps(T, steps, spacing)
    assert t.shape == (steps,) and t.dtype.kind == "i"
    assert np.all(np.diff(t) < 0) and 1 <= t[-1] and t[0] <= T


@given(T=st.integers(1, 1000), data=st.data())
def test_each_spacing_has_its_formula(T, data):
    """ZeroSNR Table 2. Rounding is to the nearest, so at most a half away."""
    steps = data.draw(st.integers(1, T))
    i = np.arange(steps)
    trailing, leading, linspace = (timesteps(T, steps, spacing) for spacing in SPACINGS)
    assert trailing[0] == T         # training put pure noise there
    assert np.abs(trailing - (T - i * T / steps)).max() <= 0.5 + 1e-9
    assert sorted(leading) == [1 + k * (T // steps) for k in range(steps)]
    assert linspace[0] == T
    if steps > 1:
        assert linspace[-1] == 1
        assert np.abs(linspace - (T - i * (T - 1) / (steps - 1))).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("spacing", SPACINGS)
def test_all_steps_are_all_steps(spacing):
    assert list(timesteps(7, 7, spacing)) == [7, 6, 5, 4, 3, 2, 1]


def test_trailing_is_the_default():
    assert list(timesteps(1000, 4)) == [1000, 750, 500, 250]


@given(T=st.integers(1, 200), more=st.integers(1, 200))
def test_more_steps_than_there_are(T, more):
    """So many cannot all be different: refused with every spacing."""
    for spacing in SPACINGS:
        with pytest.raises((ValueError, ZeroDivisionError)):
            timesteps(T, T + more, spacing)


@pytest.mark.parametrize("steps", [[3, 3], [1, 2], [5, 0], [5, -1], (4, 2, 3)])
def test_steps_have_to_descend_to_above_0(steps):
    refused(list(steps)[0], timesteps, 10, steps)


def test_descending_steps_are_kept():
    for steps in ([9, 4, 1], (9, 4, 1), np.array([9, 4, 1])):
        assert list(timesteps(10, steps)) == [9, 4, 1]


def test_an_unknown_spacing():
    refused("'middle'", timesteps, 10, 5, "middle")
