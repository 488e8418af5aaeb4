"""examples/classifier_guidance.py: its gradients, and what Bayes' rule says of an exact one."""
import classifier_guidance
import numpy as np
import pytest
from common import PREDICTS, close

import tinyddpm as td

BETAS, LABELS = td.linear_betas(100), np.array([0, 1, 1, 0, 1])


def tiny_classifier():
    net = classifier_guidance.Classifier((8, 8, 2), 3, (4, 8, 8))
    return net.with_params(0.3 * td.normal(0, net.params.flat.shape, np.float64))


class TwoGaussians:
    """Classes N(mean_k, std^2) with shares: as a model of noise, and as a classifier, exact."""

    def __init__(self, diffusion):
        rng = np.random.default_rng(3)
        self.diffusion, self.std, self.shares = diffusion, 0.6, np.array([0.3, 0.7])
        self.means = rng.standard_normal((2, 2, 3, 1))

    def parts(self, x, t):
        """Logits (B, 2), and the answers for each class (B, 2, H, W, C) as eps."""
        abar = td.per_image(self.diffusion.abar[t], x)
        noise, var = (1 - abar) ** 0.5, abar * self.std ** 2 + 1 - abar
        away = x[:, None] - (abar ** 0.5)[:, None] * self.means
        logits = np.log(self.shares) - (away ** 2).sum((2, 3, 4)) / (2 * var.reshape(-1, 1))
        return logits, (noise / var)[:, None] * away

    def forward(self, x, t):
        logits, eps = self.parts(x, t)
        noise = td.per_image((1 - self.diffusion.abar[t]) ** 0.5, x)

        def back(dlogits):      # each logit's gradient is its class's score, -eps / noise
            return -(dlogits.reshape(*dlogits.shape, 1, 1, 1) * eps).sum(1) / noise
        return logits, back

    def model(self, x, t, y):
        """What a network answers, by classes and, at label 2, without."""
        logits, eps = self.parts(x, t)
        odds = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        odds = np.where((y == 2)[:, None], odds, np.eye(3, 2)[y])
        eps = (odds[:, :, None, None, None] * eps).sum(1)
        abar = td.per_image(self.diffusion.abar[t], x)
        return self.diffusion.target((x - (1 - abar) ** 0.5 * eps) / abar ** 0.5, eps, t)


@pytest.mark.parametrize("predicts", PREDICTS)
@pytest.mark.parametrize("w", [0, 1, 2.5])
def test_exact_classifier_guides_as_classifier_free_guidance(predicts, w):
    """And at w = 1 it makes of a model of all the model of one class. (CFG section 3.)"""
    exact = TwoGaussians(td.Diffusion(BETAS, predicts))
    x, t = td.normal(0, (5, 2, 3, 1), np.float64), np.array([1, 20, 50, 90, 100])
    guided = classifier_guidance.guided(lambda x, t, y: exact.model(x, t, 2 + 0 * y),
                                        exact.diffusion, exact, w)
    close(guided(x, t, LABELS), td.guided(exact.model, LABELS, 2, w)(x, t), 1e-9)


def test_labelled_model_is_asked_for_its_labels():
    exact = TwoGaussians(td.Diffusion(BETAS))
    x, t = td.normal(0, (5, 2, 3, 1), np.float64), np.array([1, 20, 50, 90, 100])
    unguided = classifier_guidance.guided(exact.model, exact.diffusion, exact, 0)
    close(unguided(x, t, LABELS), exact.model(x, t, LABELS))


def test_spread_is_within_classes():
    x, y = td.normal(0, (3000, 2, 2, 1)), np.arange(3000) % 10
    close(classifier_guidance.spread(3 * x + y.reshape(-1, 1, 1, 1), y), 3, 0.03)


def test_classifier_gradients():
    x, t = td.normal(1, (3, 8, 8, 2)), np.array([1, 40, 100])
    net = tiny_classifier()
    errors = td.gradient_errors(lambda p, x: net.with_params(p).forward(x, t), net.params, [x])
    assert max(dict(errors).values()) < 1e-6


def test_log_probability_and_its_gradient():
    logits, y = 5 * td.normal(0, (4, 3), np.float64), np.array([0, 2, 1, 1])
    log_p, _ = classifier_guidance.log_probability(logits + 1000, y)
    close(log_p, [row[k] - np.log(sum(np.exp(row))) for row, k in zip(logits, y)])

    def layer(logits):
        log_p, slope = classifier_guidance.log_probability(logits, y)
        return log_p, lambda dy: dy[:, None] * slope
    assert max(dict(td.gradient_errors(layer, None, [logits])).values()) < 1e-6


def test_cross_entropy_of_a_batch_is_that_of_its_parts():
    """And the mean over its pictures, with the gradient of that."""
    diffusion, rng = td.Diffusion(BETAS), np.random.default_rng(0)
    x0, eps = rng.standard_normal((2, 4, 8, 8, 2))
    t, y = np.array([1, 30, 60, 100]), np.array([0, 1, 2, 1])
    net, parts = tiny_classifier(), tiny_classifier()

    def loss(net, rows, total):
        return classifier_guidance.add_gradient(net, diffusion, x0[rows], t[rows], y[rows],
                                                eps[rows], total, "l2", "simple", None, None)
    whole = loss(net, slice(None), x0.size)
    close(whole, sum(loss(parts, slice(i, i + 1), x0.size) for i in range(4)))
    close(net.grads.flat, parts.grads.flat)
    logits, _ = net.forward(diffusion.q_sample(x0, t, eps), t)
    close(whole, -np.mean([classifier_guidance.log_probability(logits, y)[0]]))
    u, h, slopes = rng.standard_normal(net.params.flat.shape), 1e-6, []
    for shift in (h, -h):
        moved = net.with_params(net.params.flat + shift * u)
        slopes.append(loss(moved, slice(None), x0.size))
    close((slopes[0] - slopes[1]) / (2 * h), u @ net.grads.flat, 1e-6)
