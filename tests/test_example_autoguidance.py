"""examples/autoguidance.py: what the guided answer is and costs, and who the bad one is."""
from types import SimpleNamespace

import autoguidance
import numpy as np
import pytest
from common import close

import demo
import tinyddpm as td

LABELS = np.array([0, 2, 1])


def labelled_model(seed):
    """A model(x, t, y) of random weights, and the labels that it was called with."""
    weights, calls = np.random.default_rng(seed).normal(size=(4, 5)), []

    def model(x, t, y):
        calls.append(list(y))
        return np.tanh(x * weights[y] + t[:, None] / 1000)
    return model, calls


@pytest.mark.parametrize("t", [1, 800, 801, 1000])
@pytest.mark.parametrize("w, w_bad", [(1, 1), (1.6, 1), (1, 2.5), (1.3, 1.5), (0, 0)])
def test_both_guidances_by_a_plain_loop_and_their_calls(w, w_bad, t):
    """Above 800, one call and no guidance."""
    (good, to_good), (bad, to_bad) = labelled_model(0), labelled_model(1)
    x = td.normal(2, (3, 5), np.float64)
    out = autoguidance.guided(good, bad, LABELS, 3, w, w_bad)(x, np.full(3, t))
    w, w_bad = (w, w_bad) if t <= 800 else (1, 1)
    assert to_good == [[0, 2, 1]] + [[3, 3, 3]] * (w != 1)
    assert to_bad == [[0, 2, 1]] * (w_bad != 1)
    for i, y in enumerate(LABELS):
        cond, uncond, worse = (model(x[i:i + 1], np.array([t]), [k])[0]
                               for model, k in ((good, y), (good, 3), (bad, y)))
        close(out[i], cond + (w - 1) * (cond - uncond) + (w_bad - 1) * (cond - worse))


def test_the_score_is_that_of_a_power_of_good_over_bad():
    """For normal data of deviation .5, which the bad model takes for .8: p_good^w p_bad^(1-w)
    is normal, of precision w / var_good - (w - 1) / var_bad, and so is less spread out."""
    diffusion, w = td.Diffusion(td.cosine_betas(20), "x0"), 2.5

    def expected_x0(deviation):
        def model(xt, t, y):
            abar = diffusion.abar[t][:, None]
            return abar ** 0.5 * deviation ** 2 / (abar * deviation ** 2 + 1 - abar) * xt
        return model
    model = autoguidance.guided(expected_x0(0.5), expected_x0(0.8), LABELS, 3, 1, w)
    x = td.normal(0, (3, 5), np.float64)
    for t in (1, 10, 20):
        score = diffusion.score(x, t, model(x, np.full(3, t)))
        good, bad = (diffusion.abar[t] * c ** 2 + 1 - diffusion.abar[t] for c in (0.5, 0.8))
        close(score, -x * (w / good - (w - 1) / bad))


def test_the_bad_one_is_an_earlier_state_of_the_demos_training(monkeypatch):
    """The average, not the parameters themselves, after 3 of the demo's so many steps."""
    def network(seed):
        return td.UNet((4, 4, 1), (4,), classes=3, rng=seed)
    monkeypatch.setattr(demo, "network", network)
    diffusion, rng = td.Diffusion(td.cosine_betas(20), "v"), np.random.default_rng(0)
    data = SimpleNamespace(images=np.float32(rng.uniform(-1, 1, (9, 4, 4, 1))),
                           labels=np.arange(9) % 3)
    states = demo.learn(network(0), diffusion, data.images, data.labels, steps=demo.STEPS)
    third = [next(states).ema.flat.copy() for _ in range(3)][-1]
    assert (autoguidance.earlier(diffusion, data, 3).params.flat == third).all()
