"""Noise schedules: what holds for every one, each one's closed form, and the steps to visit."""
import numpy as np
import pytest
from hypothesis import given, strategies as st

from common import SPACINGS, abar_of, refused
from tinyddpm import (SCHEDULES, Diffusion, betas_from_abar, checked_betas, cosine_betas,
                      flow_betas, karras_betas, linear_betas, quadratic_betas,
                      scaled_linear_betas, sigmoid_betas, sqrt_betas, timesteps,
                      zero_terminal_snr)

lengths = st.integers(1, 300)
ends = st.tuples(st.floats(1e-5, 0.5), st.floats(1e-5, 0.5))
beta_lists = st.lists(st.floats(1e-4, 0.9), min_size=2, max_size=12)


def fractions(T):
    """(t - 1) / (T - 1): how far step t lies from the first step, 0, to the last, 1."""
    return np.arange(T) / max(T - 1, 1)


def same(a, b, rtol=1e-10, atol=1e-13):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


# ------------------------------------------------------------------------- laws of all of them

def assert_lawful(betas, T):
    """T variances in (0, 1]; every step adds noise, so abar falls to the end."""
    assert betas.shape == (T,) and betas.dtype == np.float64
    assert np.all((0 < betas) & (betas <= 1))
    assert np.all(np.diff(abar_of(betas)) < 0)


@pytest.mark.parametrize("name", SCHEDULES)
@given(T=lengths)
def test_every_schedule_is_lawful_for_every_length(name, T):
    if name == "scaled_linear":
        T += 19                     # its ends, times 1000/T, pass 1 for a shorter T
    assert_lawful(SCHEDULES[name](T), T)


@pytest.mark.parametrize("schedule", [linear_betas, quadratic_betas, sigmoid_betas])
@given(T=lengths, ends=ends)
def test_lawful_for_any_ends(schedule, T, ends):
    assert_lawful(schedule(T, *ends), T)


@pytest.mark.parametrize("names, paper", [
    (["linear", "scaled_linear", "quadratic", "sigmoid"], dict(start=1e-4, end=0.02)),
    (["cosine"], dict(s=0.008, max_beta=0.999)), (["sqrt"], dict(s=1e-4, max_beta=0.999)),
    (["karras"], dict(sigma_min=0.002, sigma_max=80, rho=7))])
def test_unless_told_the_numbers_are_the_papers(names, paper):
    for name in names:
        assert np.array_equal(SCHEDULES[name](50), SCHEDULES[name](50, **paper))


# -------------------------------------------------------------------------- each one's formula

@given(T=lengths, ends=ends)
def test_on_beta(T, ends):
    """Equal steps of beta; of its root; and the logistic function from -6 to 6."""
    (start, end), u = ends, fractions(T)
    same(linear_betas(T, start, end), start + (end - start) * u)
    same(quadratic_betas(T, start, end) ** 0.5, start ** 0.5 + (end ** 0.5 - start ** 0.5) * u)
    logistic = (1 + np.tanh((12 * u - 6) / 2)) / 2
    same(sigmoid_betas(T, start, end), start + (end - start) * logistic)


@given(T=st.integers(1, 40), end=st.floats(0.001, 0.04))
def test_scaled_linear_is_linear_with_both_ends_scaled(T, end):
    """As long as they stay below 1; a beta above it would make abar negative."""
    if T > 1 and end * 1000 / T > 1:
        refused(T, scaled_linear_betas, T, 1e-4, end)
    else:
        same(scaled_linear_betas(T, 1e-4, end), linear_betas(T, 0.1 / T, end * 1000 / T))


@pytest.mark.parametrize("T, left", [(50, 0.603), (300, 0.0481), (400, 0.0175), (1000, 4e-5)])
def test_linear_leaves_signal_when_short_and_scaled_does_not(T, left):
    """Made for T = 1000, the linear schedule's x_T is not noise for a short T."""
    same(abar_of(linear_betas(T))[-1], left, rtol=0.01)
    assert abar_of(scaled_linear_betas(T))[-1] < 5e-5


def assert_follows(betas, abar, cap):
    """beta is 1 less the ratio of neighbours in abar (0 where it is negative), the cap at most
    and where nothing is left; up to the first capped step abar is the closed form itself."""
    abar = [max(a, 0) for a in abar]
    ratios = [b / a if a else 0 for a, b in zip(abar, abar[1:])]
    same(betas, [min(1 - ratio, cap) for ratio in ratios], rtol=1e-8)
    free = np.flatnonzero(np.append(betas >= cap, True))[0]
    same(abar_of(betas)[:free + 1], abar[:free + 1], rtol=1e-9)


@given(T=lengths, s=st.floats(1e-4, 0.1), cap=st.floats(0.2, 0.9999))
def test_cosine_is_on_abar(T, s, cap):
    """iDDPM eq. 17; written with 1 + cos(2 x) = 2 cos^2(x), so not the same line of code."""
    f = 1 + np.cos(np.pi * (np.arange(T + 1) / T + s) / (1 + s))
    assert_follows(cosine_betas(T, s, cap), f / f[0], cap)


@given(T=lengths, s=st.floats(1e-6, 0.5), cap=st.floats(0.2, 0.9999))
def test_sqrt_is_on_abar(T, s, cap):
    """Diffusion-LM: abar_t = 1 - sqrt(t/T + s), and below 0 in the end; abar_0 is 1."""
    abar = [1] + [1 - (t / T + s) ** 0.5 for t in range(1, T + 1)]
    assert_follows(sqrt_betas(T, s, cap), abar, cap)


@given(T=st.integers(2, 200), low=st.floats(1e-3, 0.1), high=st.floats(1, 100),
       rho=st.floats(1, 10))
def test_karras_ascends(T, low, high, rho):
    """abar = 1/(1 + sigma^2) with EDM eq. 5 read backwards, so that noise grows."""
    edm = [(high ** (1 / rho) + i / (T - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
           for i in range(T)]
    same(abar_of(karras_betas(T, low, high, rho))[1:], 1 / (1 + np.array(edm[::-1]) ** 2))


@given(T=lengths)
def test_flow_is_the_straight_path_at_unit_variance(T):
    """x = (1 - u) x0 + u eps, divided by its deviation for data of variance 1, is a mix like
    any other: sqrt(abar) x0 + sqrt(1 - abar) eps. It ends in pure noise."""
    u = np.arange(T + 1) / T
    signal, noise = np.array([1 - u, u]) / np.hypot(1 - u, u)
    abar = abar_of(flow_betas(T))
    same(abar ** 0.5, signal)
    same((1 - abar) ** 0.5, noise, atol=1e-7)
    assert abar[-1] == 0


@given(betas=beta_lists)
def test_betas_from_abar_undoes_abar(betas):
    same(betas_from_abar(abar_of(betas)), betas, rtol=1e-8)


# --------------------------------------------------------------------------- zero terminal SNR

@given(betas=beta_lists)
def test_zero_terminal_snr(betas):
    """ZeroSNR Algorithm 1: sqrt(abar) is shifted to end at 0 and stretched to start where it
    did; both together are one affine map of the old sqrt(abar)."""
    out = zero_terminal_snr(betas)
    assert_lawful(out, len(betas))
    old, new = abar_of(betas)[1:] ** 0.5, abar_of(out)[1:] ** 0.5
    assert new[-1] == 0
    same(new[0], old[0])
    same((new - new[0]) * (old[-1] - old[0]), (old - old[0]) * (new[-1] - new[0]))


@pytest.mark.parametrize("name", SCHEDULES)
def test_zero_terminal_snr_of_every_schedule(name):
    assert abar_of(zero_terminal_snr(SCHEDULES[name](50)))[-1] == 0


def test_zero_terminal_snr_needs_two_steps():
    """One step cannot both keep its start and end at 0."""
    refused(1, zero_terminal_snr, [0.5])


# --------------------------------------------------------------------------- what are no betas

@pytest.mark.parametrize("takes_betas", [checked_betas, zero_terminal_snr, Diffusion])
@pytest.mark.parametrize("betas, given_text", [
    ([0.1, 0.0, 0.2], "beta_2"), ([-0.25], "-0.25"), ([0.1, 1.5], "1.5"),
    ([0.1, 0.2, float("nan")], "nan"), ([[0.1, 0.2]], "(1, 2)"), ([], "(0,)"), (0.1, "()"),
    ([0.1, 1.0, 0.2], "beta_2"), ([1.0, 0.1], "beta_1"), ([0.1, 0.2, 1.0, 1.0], "beta_3"),
    ([0.1, 1e-17], "beta_2")])
def test_bad_betas(takes_betas, betas, given_text):
    """A share of 0 adds nothing, one of 1 leaves nothing for another step. (1 - 1e-17 is 1.)"""
    refused(given_text, takes_betas, betas)


@pytest.mark.parametrize("betas", [np.float32([0.1, 0.3, 0.4]), [1]])
def test_betas_are_computed_with_as_float64(betas):
    """In float32 the product of a thousand factors near 1 would be off in the fifth digit."""
    exact = checked_betas(betas)
    assert exact.dtype == np.float64 and np.array_equal(exact, betas)
    assert np.array_equal(Diffusion(betas, "v").abar, abar_of(exact))


# ------------------------------------------------------------------------------ steps to visit

@given(T=st.integers(1, 1000), data=st.data())
def test_each_spacing_has_its_formula(T, data):
    """ZeroSNR Table 2. Rounding is to the nearest, so at most a half away."""
    steps = data.draw(st.integers(1, T))
    i = np.arange(steps)
    trailing, leading, linspace = found = [timesteps(T, steps, how) for how in SPACINGS]
    for t in found:
        assert t.shape == (steps,) and t.dtype.kind == "i" and np.all(np.diff(t) < 0)
    assert trailing[0] == linspace[0] == T      # training put pure noise there
    assert np.abs(trailing - (T - i * T / steps)).max() <= 0.5 + 1e-9
    assert sorted(leading) == [1 + k * (T // steps) for k in range(steps)]
    assert np.abs(linspace - (T - i * (T - 1) / max(steps - 1, 1))).max() <= 0.5 + 1e-9
    assert steps == 1 or linspace[-1] == 1


def test_trailing_is_the_default_and_all_steps_are_all_steps():
    assert list(timesteps(1000, 4)) == [1000, 750, 500, 250]
    for spacing in SPACINGS:
        assert list(timesteps(7, 7, spacing)) == [7, 6, 5, 4, 3, 2, 1]


@given(T=st.integers(1, 200), more=st.integers(1, 200), spacing=st.sampled_from(SPACINGS))
def test_more_steps_than_there_are(T, more, spacing):
    """So many cannot all be different."""
    with pytest.raises(ValueError):
        timesteps(T, T + more, spacing)


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_chosen_steps_have_to_descend_to_above_0(kind):
    assert list(timesteps(10, kind([9, 4, 1]))) == [9, 4, 1]
    for steps in ([3, 3], [1, 2], [5, 0], [5, -1], [4, 2, 3]):
        refused(steps[-1], timesteps, 10, kind(steps))


def test_an_unknown_spacing():
    refused("'middle'", timesteps, 10, 5, "middle")
