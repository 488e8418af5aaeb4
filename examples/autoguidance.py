"""Autoguidance (2406.02507): guided by what the network itself was, earlier in its training.

Classifier-free guidance pushes an answer away from that of a network that was not told the
class. Its pictures are better, and more alike: two effects in one. Karras et al. ask for the
first alone, and push away from a worse network of the same task (eqs. 3, 4):

    out = good(x, t, y) + (w - 1) (good(x, t, y) - bad(x, t, y))

Both make the same kinds of errors, the bad one larger ones, so the way from bad to good leads
on to better. As densities: p_good is multiplied by (p_good / p_bad)^(w-1), which is small where
the bad network spreads too far. Here it is the shipped network's own past, the same training
stopped early. The two guidances can be added:

    out = cond + (w - 1) (cond - uncond) + (w_bad - 1) (cond - bad)

A guided step then takes two calls of a network, or three. Compared is what as many calls give:
who guides has fewer steps to go.
"""
from gallery import Score, asnumpy, demo, digits, files, run, shipped, td
import numpy as np

LAST = 800              # guided is, as in the demo, t = 1..LAST
METHODS = {             # w, w_bad, steps
    "no guidance": (1, 1, 18),
    "classifier-free": (1.6, 1, 10),
    "autoguidance": (1, 1.5, 10),
    "both": (1.6, 1.25, 7),
}


def earlier(diffusion, data, steps):
    """The shipped network's training once more, stopped after so many of its steps."""
    net = demo.network(seed=0)
    for state in demo.learn(net, diffusion, data.images, data.labels):
        if state.step == steps:
            return net.with_params(state.ema.flat)


def guided(good, bad, labels, null, w, w_bad):
    """A model(x, t), guided by the unconditional answer, by the bad network's, or by both. All
    pictures are at the same t, as in a sampler."""
    nulls = np.full_like(labels, null)

    def model(x, t):
        cond = out = good(x, t, labels)
        if w != 1 and t[0] <= LAST:
            out = out + (w - 1) * (cond - good(x, t, nulls))
        if w_bad != 1 and t[0] <= LAST:
            out = out + (w_bad - 1) * (cond - bad(x, t, labels))
        return out
    return model


def main(out, short):
    data, (net, diffusion) = digits(), shipped()
    score, labels = Score(data, out), np.arange(100 if short else 1000) % 10
    bad = earlier(diffusion, data, 3 if short else 800)
    calls = [0]

    def counted(net):
        model = demo.parallel(net)

        def call(x, t, y):
            calls[0] += 1
            return model(x, t, y)
        return call

    good, bad, rows = counted(net), counted(bad), []
    print(f"{len(labels):,} digits, 3 times      steps   calls    read right          Frechet")
    for name, (w, w_bad, steps) in METHODS.items():
        model, scores, calls[0] = guided(good, bad, labels, net.null, w, w_bad), [], 0
        for seed in range(3):
            rng = np.random.default_rng(seed)
            x = td.normal(rng, (len(labels), *net.image))
            x = asnumpy(td.sample(td.ddim(model, diffusion, x, rng, steps=steps, eta=0.6)))
            scores.append(score(x, labels))
        (accuracy, distance), spread = np.mean(scores, 0), np.std(scores, 0, ddof=1)
        print(f"{name:24}{steps:8}{calls[0] // 3:8}{accuracy:10.1%} +- {spread[0]:.1%}"
              f"{distance:9.2f} +- {spread[1]:.2f}")
        rows.append(x[:10])
    files.sheet(out / "autoguidance.png", np.stack(rows), names=[*METHODS])


if __name__ == "__main__":
    run(main)
