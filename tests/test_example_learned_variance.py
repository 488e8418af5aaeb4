"""The laws of examples/learned_variance.py."""
import learned_variance as lv
import numpy as np
import pytest
from common import close

import tinyddpm as td

BOUND = td.Diffusion(td.linear_betas(40), "v")
BYTES = np.round(255 * np.random.default_rng(0).random((40, 2, 3, 1))) / 127.5 - 1
BYTES[::2] = np.sign(BYTES[::2])
Y, T = np.arange(40) % 5, np.arange(1, 41)
EPS, OTHER = np.random.default_rng(1).standard_normal((2, *BYTES.shape))


def certain(x, t, y, f=0.0):
    """Whatever x is: x0 is y / 5, and f is f."""
    signal, noise = (td.per_image(a[t] ** 0.5, x) for a in (BOUND.abar, 1 - BOUND.abar))
    v = (signal * x - td.per_image(y / 5, x)) / noise
    return np.concatenate([v, 0 * v + 2 * f - 1], 3)


def hybrid(add_gradient, out, x0=BYTES):
    """The loss and its gradient by the network's answer, where that is out."""
    class Net:
        def forward(self, *args):
            return out, vars(self).setdefault("douts", []).append
    net = Net()
    return add_gradient(net, BOUND, x0, T, Y, EPS, x0.size), net.douts[0]


def test_the_gradient_is_the_slope_of_the_cores_loss_by_v_and_of_the_bound_by_f(monkeypatch):
    out, both = np.random.default_rng(2).standard_normal((2, *BYTES.shape[:3], 2))
    dout, h = hybrid(lv.add_gradient, out)[1], 1e-6
    for u, weight in ((both * [0, 1], lv.LAMBDA), (both * [1, 0], 0)):
        monkeypatch.setattr(lv, "LAMBDA", weight)
        up, down = (hybrid(lv.add_gradient, out + d * u)[0] for d in (h, -h))
        assert (u * dout).sum() == pytest.approx((up - down) / (2 * h), rel=1e-4)
    close(down, hybrid(td.add_gradient, (out - h * u)[..., :1])[0])


def test_over_all_t_the_loss_has_lambda_times_the_bound(monkeypatch):
    x0, losses = np.repeat(BYTES[1:2], 40, 0), []
    for weight in (0, 0.5):
        monkeypatch.setattr(lv, "LAMBDA", weight)
        out = certain(BOUND.q_sample(x0, T, EPS), T, 0 * T)
        losses.append(hybrid(lv.add_gradient, out, x0)[0])
    bound = td.variational_bound(BOUND, lambda x, t: certain(x, t, 0 * t)[..., :1], x0[:1], 1)
    bits = (losses[1] - losses[0]) / 0.5 / np.log(2)
    close(bits, bound["total"] - bound["prior"], 1e-6)


@pytest.mark.parametrize("f, steps", [(0, T[::-1]), (0.3, T[::-1]), (0.3, (40, 9, 1))])
def test_with_f_0_and_all_steps_it_is_the_cores_bound_and_jumps_carry_another_f(f, steps):
    bits = lv.bits_per_dim(lambda x, t, y: certain(x, t, y, f), BOUND, BYTES, Y, steps, 40,
                           np.random.default_rng(1))
    small, large, learned, carried = (bit for bit, _ in bits.values())
    if len(steps) == 40:
        core = td.variational_bound(BOUND, lambda x, t: certain(x, t, Y)[..., :1], BYTES, 1)
        close(small, core["total"], 1e-6)
        close(learned, carried, 1e-5)
    assert (f == 0) == (abs(learned - small) < 1e-4) and large < learned <= small + 1e-4
    assert (len(steps) == 40) == (abs(carried - learned) < 1)


def test_the_error_is_what_the_bits_vary_by():
    rng = np.random.default_rng(0)
    bits, errors = np.transpose([lv.bits_per_dim(certain, BOUND, BYTES, Y, (40, 1), 4, rng)[
        "learned"] for _ in range(150)])
    assert errors.mean() == pytest.approx(bits.std(), rel=0.3)


def test_a_jump_is_a_step_of_the_process_that_has_no_others():
    """iDDPM section 4: betas from the abar of the steps that are left."""
    steps = [1, 7, 40]
    respaced = td.Diffusion(td.betas_from_abar(np.append(1, BOUND.abar[steps])), "v")
    for i, (t, s) in enumerate(zip(steps[1:], steps), 2):
        arrays = BYTES, BOUND.q_sample(BYTES, t, EPS), 0.9 * BYTES
        close(lv.bound_terms(BOUND, *arrays, t, s, OTHER),
              lv.bound_terms(respaced, *arrays, i, i - 1, OTHER))
        close(sum(lv.log_variances(BOUND, t, s, BYTES)), np.log(respaced.beta[i]))


@pytest.mark.parametrize("t, s", [(5, 4), (40, 12)])
def test_the_bound_is_flat_where_the_variance_is_right(t, s):
    """Of data N(0, 1/2), whose g is known: in the step and, carried over, in the jump."""
    x0, eps = np.random.default_rng(0).standard_normal((2, 200_000, 1))
    x0 *= 0.5 ** 0.5
    xt, abar = BOUND.q_sample(x0, t, eps), BOUND.abar[t]
    guess, g = 0.5 * abar ** 0.5 * xt / (1 - 0.5 * abar), 0.5 / (1 - 0.5 * abar)
    step = lv.log_variances(BOUND, t, t - 1, x0)[1]
    f = lv.carried_over(BOUND, t, s, np.log1p(g * np.expm1(step)) / step)
    log_small, width = lv.log_variances(BOUND, t, s, x0)
    below, right, above = (
        lv.bound_terms(BOUND, x0, xt, guess, t, s, log_small + h * width + 0 * x0)[1].mean()
        for h in (f - 0.1, f, f + 0.1))
    assert below < -5 * abs(right) and above > 5 * abs(right)


def test_the_decoder_is_the_cores_and_its_slope_too():
    log_var, h = OTHER - 9, 1e-5
    (nats, slope), (up, _), (down, _) = (
        lv.decoder_terms(BYTES, BYTES + 0.02 * EPS, log_var + d) for d in (0, h, -h))
    close(nats, -np.log(td.bin_probability(BYTES, BYTES + 0.02 * EPS, np.exp(log_var / 2))))
    close(slope, (up - down) / (2 * h), 1e-6)
