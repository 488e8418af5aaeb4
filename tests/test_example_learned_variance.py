"""The laws of examples/learned_variance.py."""
import learned_variance as lv
import numpy as np
import pytest
from common import close

import tinyddpm as td

RNG = np.random.default_rng(0)
DIFFUSION = td.Diffusion(td.scaled_linear_betas(40), "v")
X0 = np.round(255 * RNG.random((6, 2, 3, 1))) / 127.5 - 1           # bytes
X0[0, 0, :2, 0] = -1, 1
EPS = RNG.standard_normal(X0.shape)
T = np.array([1, 1, 2, 5, 23, 40])


def test_the_hybrid_gradient_is_the_bounds_for_f_and_the_squared_errors_for_v(monkeypatch):
    class Net:
        def forward(self, *args):
            return self.out, lambda dout: vars(self).update(dout=dout)
    net = Net()

    def loss(out):
        net.out = out
        return lv.add_gradient(net, DIFFUSION, X0, T, T, EPS, 5)
    v, guess = DIFFUSION.target(X0, EPS, T), 0.02 * RNG.standard_normal(X0.shape)
    v[1] += 5                                                       # a guess to be clipped
    out = np.concatenate([v + guess, RNG.standard_normal(X0.shape)], 3)
    loss(out)
    dout, u, h = net.dout, RNG.standard_normal(out.shape), 1e-6
    for u, weight in ((u * [0, 1], lv.LAMBDA), (u * [1, 0], 0)):
        monkeypatch.setattr(lv, "LAMBDA", weight)
        slope = (loss(out + h * u) - loss(out - h * u)) / (2 * h)
        assert (u * dout).sum() == pytest.approx(slope, rel=1e-4)


def constant(x, t, y=None):
    """Whatever x is, x0 is 0.2; and f is 0."""
    signal, noise = (td.per_image(a[t] ** 0.5, x) for a in (DIFFUSION.abar, 1 - DIFFUSION.abar))
    v = (signal * x - 0.2) / noise
    return v if y is None else np.concatenate([v, 0 * v - 1], 3)


def test_with_f_0_and_all_steps_it_is_the_cores_bound():
    bits = lv.bits_per_dim(constant, DIFFUSION, X0, T, range(40, 0, -1), 6,
                           np.random.default_rng(0))
    expected = td.variational_bound(DIFFUSION, constant, X0, 1)["total"]
    for name in ("fixed small", "learned", "learned, carried over"):
        close(bits[name][0], expected, 1e-6)
    assert bits["fixed large"][0] < expected - 1


def test_a_jump_is_a_step_of_the_process_that_has_no_others():
    """iDDPM section 4: betas from the abar of the steps that are left."""
    steps, guess, log_var = [2, 7, 40], 0.9 * X0, RNG.standard_normal(X0.shape)
    respaced = td.Diffusion(td.betas_from_abar(np.append(1, DIFFUSION.abar[steps])), "v")
    for i, (t, s) in enumerate(zip(steps[1:], steps), 2):
        xt = DIFFUSION.q_sample(X0, t, EPS)
        close(lv.bound_terms(DIFFUSION, X0, xt, guess, t, s, log_var),
              lv.bound_terms(respaced, X0, xt, guess, i, i - 1, log_var))
        close(lv.log_variances(DIFFUSION, t, s, X0), lv.log_variances(respaced, i, i - 1, X0))
        close(sum(lv.log_variances(DIFFUSION, t, s, X0)), np.log(respaced.beta[i]))


@pytest.mark.parametrize("t, s", [(5, 4), (40, 12)])
def test_the_bound_is_flat_where_the_variance_is_right(t, s):
    """Of data N(0, 0.5): the mean's square and the slope on average."""
    x0 = 0.5 ** 0.5 * RNG.standard_normal((200_000, 1))
    xt = DIFFUSION.q_sample(x0, t, RNG.standard_normal(x0.shape))
    abar, (log_small, width) = DIFFUSION.abar[t], lv.log_variances(DIFFUSION, t, s, x0)
    guess, g = 0.5 * abar ** 0.5 * xt / (1 - 0.5 * abar), 0.5 / (1 - 0.5 * abar)
    step = lv.log_variances(DIFFUSION, t, t - 1, x0)[1]
    f = np.log1p(g * np.expm1(step)) / step         # the best in the step to t-1
    jump = lv.carried_over(DIFFUSION, t, s, f)
    below, right, above = (
        lv.bound_terms(DIFFUSION, x0, xt, guess, t, s, log_small + f * width + 0 * x0)[1].mean()
        for f in (jump - 0.1, jump, jump + 0.1))
    assert below < -5 * abs(right) and above > 5 * abs(right)


def test_the_decoder_is_the_cores_and_its_slope_too():
    mean, h = X0 + 0.02 * RNG.standard_normal(X0.shape), 1e-5
    log_var = np.log(RNG.uniform(1e-5, 1e-3, X0.shape))
    terms = [lv.decoder_terms(X0, mean, log_var + shift) for shift in (0, h, -h)]
    close(terms[0][0], -np.log(td.bin_probability(X0, mean, np.exp(log_var / 2))))
    close(terms[0][1], (terms[1][0] - terms[2][0]) / (2 * h), 1e-6)
