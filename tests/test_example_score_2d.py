"""examples/score_2d.py and ode_2d.py: laws of mixtures, of scores, and of their uses."""
import numpy as np
import ode_2d
import pytest
import score_2d
from common import close

import tinyddpm as td

DIFFUSION = td.Diffusion(td.linear_betas(1000))
PLANE = np.stack(np.meshgrid(*[np.linspace(-4, 4, 161)] * 2), 2).reshape(-1, 2)    # 0.05 apart
LOPSIDED = score_2d.Mixture([[-1.0, 0.5], [1.0, 0.0]], [0.2, 0.8], 0.3)


class ExactNet:
    """eps of x_t where the data is one Gaussian, and its constant Jacobian."""

    def __init__(self, mean, std):
        self.data = score_2d.Mixture([mean], [1.0], std)

    def forward(self, x, t):
        abar = DIFFUSION.abar[t[0]]
        noise, var = (1 - abar) ** 0.5, abar * self.data.std ** 2 + 1 - abar
        return -noise * self.data.score(x, abar), lambda dy: noise / var * dy

    def __call__(self, x, t):
        return self.forward(x, t)[0]


def perturbed_mlp():
    net = score_2d.MLP(width=12, dtype=np.float64)
    net.params.flat = 0.5 * td.normal(1, net.params.flat.shape)
    return net


def test_mixture_is_a_density_and_its_score_the_gradient():
    for abar in (1.0, 0.7, 0.01):
        close(np.exp(LOPSIDED.log_density(PLANE, abar)).sum() * 0.05 ** 2, 1.0, 1e-3)
        x, h, log_q = PLANE[::997], 1e-5, lambda x: LOPSIDED.log_density(x, abar)   # noqa: B023
        slopes = [(log_q(x + h * e) - log_q(x - h * e)) / (2 * h) for e in np.eye(2)]
        close(LOPSIDED.score(x, abar), np.stack(slopes, 1), 1e-6)


@pytest.mark.parametrize("name", ["moons", "three"])
def test_mixture_samples_and_their_noisy_versions_are_of_its_density(name):
    mixture, rng = score_2d.mixtures()[name], np.random.default_rng(0)
    assert name == "three" or np.allclose(*map(mixture.log_density, (PLANE, -PLANE)))
    x0 = mixture.sample(40_000, rng)
    for t in (1, 300):
        xt = DIFFUSION.q_sample(x0, t, rng.standard_normal(x0.shape))
        p = np.exp(mixture.log_density(PLANE, DIFFUSION.abar[t])) * 0.05 ** 2
        for f in (lambda x: x[:, 0], lambda x: x[:, 1], lambda x: np.sin(3 * x.sum(1))):
            assert abs(f(xt).mean() - p @ f(PLANE)) < 4 * f(xt).std() / 200


def test_mlp_gradients():
    x, t = td.normal(0, (5, 2)), np.array([1, 3, 200, 700, 1000])
    net = perturbed_mlp()
    errors = td.gradient_errors(lambda p, x: net.with_params(p).forward(x, t), net.params, [x])
    assert max(dict(errors).values()) < 1e-7


def test_score_matching_is_eps_prediction():
    grads, losses, t = [], [], np.array([1, 2, 50, 400, 900, 1000])
    x0, eps = np.random.default_rng(0).standard_normal((2, 6, 2))
    for gradient in (score_2d.score_matching, td.add_gradient):
        net = perturbed_mlp()
        losses.append(gradient(net, DIFFUSION, x0, t, 0, eps, 12, "l2", "simple", None, None))
        grads.append(net.grads.flat)
    close(*losses), close(*grads)


def test_true_score_leaves_the_least_loss():
    """Another s has (1 - abar) E |s - true|^2 more (Vincent 2011)."""
    rng, t = np.random.default_rng(0), 200
    x0, eps = LOPSIDED.sample(100_000, rng), rng.standard_normal((100_000, 2))
    xt, noise = DIFFUSION.q_sample(x0, t, eps), (1 - DIFFUSION.abar[t]) ** 0.5
    true = LOPSIDED.score(xt, DIFFUSION.abar[t])
    s = true + np.sin(2 * xt)
    more = (noise * s + eps) ** 2 - (noise * true + eps) ** 2 - noise ** 2 * (s - true) ** 2
    assert abs(more.mean()) < 4 * more.std() / len(x0) ** 0.5


def test_distance_is_the_integral_that_it_says():
    """Here done on a grid, for points of one mixture and the density of another."""
    rng, other = np.random.default_rng(0), score_2d.Mixture([[0.3, 0.2]], [1.0], 0.4)
    p, q = (np.exp(ode_2d.smoothed(m, 0.2 / 2 ** 0.5).log_density(PLANE))
            for m in (LOPSIDED, other))
    for mixture, wanted in ((other, ((p - q) ** 2).sum() / (q ** 2).sum()), (LOPSIDED, 0.0)):
        values = [ode_2d.distance(LOPSIDED.sample(400, rng), mixture) for _ in range(30)]
        assert abs(np.mean(values) - wanted) < 4 * np.std(values) / 30 ** 0.5


def test_langevin_ends_in_the_data_given_time():
    net, rng = ExactNet([0.7, -0.4], 0.5), np.random.default_rng(0)
    steps = ode_2d.levels(DIFFUSION, 40)
    assert steps[0] == 1000 and steps[-1] == 1 and (np.diff(steps) <= 0).all()
    x = td.normal(rng, (4000, 2), np.float64)
    *_, (s, still) = ode_2d.langevin(net, DIFFUSION, x, rng, steps, r=0)
    assert s == 0 and np.allclose(still, x / DIFFUSION.abar[-1] ** 0.5)    # the signal's growth
    x = td.sample(ode_2d.langevin(net, DIFFUSION, x, rng, steps, each=60, r=0.2))
    close(x.mean(0), [0.7, -0.4], 0.03), close(np.cov(x.T), 0.25 * np.eye(2), 0.02)


def test_divergence_is_that_of_the_velocity():
    net, x, h = perturbed_mlp(), np.random.default_rng(0).standard_normal((7, 2)), 1e-5
    div = sum((ode_2d.velocity(net, DIFFUSION, x + h * e, 300)[0][:, i]
               - ode_2d.velocity(net, DIFFUSION, x - h * e, 300)[0][:, i]) / (2 * h)
              for i, e in enumerate(np.eye(2)))
    close(ode_2d.velocity(net, DIFFUSION, x, 300)[1], div, 1e-6)


def test_likelihood_by_the_flow_is_the_true_one():
    net, rng = ExactNet([0.5, -1.0], 0.2), np.random.default_rng(0)
    x = net.data.sample(300, rng)
    for steps, tolerance in ((50, 0.02), (200, 0.01)):
        off = ode_2d.log_likelihood(net, DIFFUSION, x, steps) - net.data.log_density(x)
        assert (off ** 2).mean() ** 0.5 < tolerance
