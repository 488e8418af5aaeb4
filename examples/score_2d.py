"""The score of points in the plane (1907.05600), learned, beside the true one.

The score of a density q is grad log q(x), the way uphill; who has it at every level of noise
can draw from q (ode_2d.py does). It can be learned without knowing q. For given x0, that of
x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps is -eps / sqrt(1 - abar_t), and least squares finds
the mean of it, the score of q(x_t): this is denoising score matching (eqs. 5, 6), with

    loss = E (1 - abar_t) |s(x_t, t) + eps / sqrt(1 - abar_t)|^2        (weight: section 4.2)

As s = -eps_theta / sqrt(1 - abar_t), it is E |eps_theta - eps|^2, DDPM's. Our points are of
mixtures of Gaussians, whose score is known at every t: two moons, and three of unequal shares.
"""
from functools import partial

from gallery import asnumpy, files, learn, run, td, xp
import numpy as np
from matplotlib.figure import Figure


class Mixture:
    """Gaussians of one deviation around means (K, 2), with shares (K,) that sum to 1. The noise
    of step t makes of it another one; abar is abar_t, and 1 for the mixture itself."""

    def __init__(self, means, shares, std):
        self.means, self.shares, self.std = np.array(means), np.array(shares), std

    def sample(self, n, rng):
        pick = rng.choice(len(self.means), n, p=self.shares)
        return self.means[pick] + self.std * rng.standard_normal((n, 2))

    def log_density(self, x, abar=1.0):
        return np.logaddexp.reduce(self.parts(x, abar)[1], 1)

    def score(self, x, abar=1.0):
        """The mean of the Gaussians' scores, by the odds that x is of each."""
        scores, log_p = self.parts(x, abar)
        odds = np.exp(log_p - np.logaddexp.reduce(log_p, 1)[:, None])
        return (odds[:, :, None] * scores).sum(1)

    def parts(self, x, abar):
        """The score of each Gaussian (B, K, 2), and log of its share times density (B, K)."""
        away, var = x[:, None] - abar ** 0.5 * self.means, abar * self.std ** 2 + 1 - abar
        log_p = np.log(self.shares) - (away ** 2).sum(2) / (2 * var) - np.log(2 * np.pi * var)
        return -away / var, log_p


def mixtures():
    angle = np.linspace(0, np.pi, 60)
    upper = np.stack([np.cos(angle) - 0.5, np.sin(angle) - 0.25], 1)
    return {"moons": Mixture([*upper, *-upper], [1 / 120] * 120, 0.1),
            "three": Mixture([[-1.2, -0.8], [1.2, -0.8], [0, 1.2]], [0.1, 0.3, 0.6], 0.2)}


class MLP:
    """eps of x_t (B, 2): three times `linear` and `silu`, the embedded step added to the first.
    It has the names of td.UNet that td.train uses."""
    image = input = (2,)
    classes = null = 0

    def __init__(self, width=64, rng=0, dtype=np.float32):
        square = td.product_layout(width, width)
        self.params = td.initial({
            "time1": td.product_layout(32, width), "time2": square,
            # Near the data eps turns around in short distances: a gain of 3 makes h as quick.
            "first": td.product_layout(2, width, gain=3), "hidden": [square, square],
            "out": td.product_layout(width, 2, gain=0)}, rng, dtype)
        self.grads = self.params.grad

    with_params, __call__ = td.UNet.with_params, td.UNet.__call__

    def forward(self, x, t, y=None, rng=None):
        p = self.params
        emb, embed_back = td.embed(p, t, None)
        h, first_back = td.linear(p.first, x.astype(p.flat.dtype, copy=False))
        out, rest_back = td.sequential(h + emb, [
            layer for q in [*p.hidden, p.out] for layer in (td.silu, partial(td.linear, q))])

        def back(dy):
            dh = rest_back(dy)
            embed_back(dh)
            return first_back(dh)
        return out, back


def score_matching(net, diffusion, x0, t, y, eps, total, *rest):
    """The loss above, and its gradient, in place of td.add_gradient."""
    noise = td.per_image((1 - diffusion.abar[t]) ** 0.5, x0)
    out, back = net.forward(diffusion.q_sample(x0, t, eps), xp.asarray(t))
    error = -out / noise + eps / noise
    back(noise ** 2 * 2 * error * (-1 / noise) / total)
    return float((noise ** 2 * error ** 2).sum()) / total


def train(mixture, diffusion, steps):
    """An MLP that learned from 20,000 points. It is too small for a second process to pay."""
    points = mixture.sample(20_000, np.random.default_rng(0))
    return learn(MLP(), diffusion, points, steps=steps, gradient=score_matching, clip=None,
                 batch=512, chunk=512, workers=1, optimizer="adamw", lr=0.01)


def learned_score(net, diffusion, x, t):
    return -asnumpy(net(xp.asarray(x), xp.full(len(x), t))) / (1 - diffusion.abar[t]) ** 0.5


def draw(axes, mixture, net, diffusion, t=60, edge=2.2, side=100):
    """The true and the learned score as arrows over the density, and how far they are apart."""
    line, few = np.linspace(-edge, edge, side), slice(2, None, 5)
    grid = np.stack(np.meshgrid(line, line), 2).reshape(-1, 2)
    density = np.exp(mixture.log_density(grid, diffusion.abar[t])).reshape(side, side)
    true = mixture.score(grid, diffusion.abar[t]).reshape(side, side, 2)
    learned = learned_score(net, diffusion, grid, t).reshape(side, side, 2)
    look = {"origin": "lower", "extent": (-edge, edge) * 2}
    for ax, score, title in zip(axes, (true, learned), ("true", "learned")):
        arrows = score / (10 + np.linalg.norm(score, axis=2, keepdims=True))    # at most 1 long
        ax.imshow(density, cmap="Blues", **look)
        ax.quiver(line[few], line[few], *arrows[few, few].transpose(2, 0, 1), scale=18)
        ax.set_title(f"{title} score at t = {t}")
    off = np.linalg.norm(learned - true, axis=2)
    axes[2].imshow(off, cmap="magma", vmin=0, vmax=5, **look)
    axes[2].contour(line, line, density, colors="white", linewidths=0.6, levels=4)
    axes[2].set_title("how far apart; 0 is black, 5 or more white")


def main(out, short):
    diffusion, rng = td.Diffusion(td.linear_betas(1000)), np.random.default_rng(1)
    figure = Figure((11.5, 7.8), layout="constrained")
    for axes, (name, mixture) in zip(figure.subplots(2, 3), mixtures().items()):
        net, x0 = train(mixture, diffusion, 100 if short else 6000), mixture.sample(10_000, rng)
        batch = td.draw_batch(diffusion, x0, np.zeros(len(x0), int), 0, rng, 512, 0)
        losses = [loss(net, diffusion, *batch, 1024, "l2", "simple", None, None)
                  for loss in (score_matching, td.add_gradient)]
        print("{}: loss {:.12f} by score matching, {:.12f} by eps".format(name, *losses))
        print("    t   noise / signal    loss   with the true score   score off by")
        for t in (1, 10, 60, 200, 1000):
            abar, eps = diffusion.abar[t], rng.standard_normal(x0.shape)
            xt, noise = diffusion.q_sample(x0, t, eps), (1 - abar) ** 0.5
            true, learned = mixture.score(xt, abar), learned_score(net, diffusion, xt, t)
            least, loss = (np.mean((noise * s + eps) ** 2) for s in (true, learned))
            off = np.linalg.norm(learned - true) / np.linalg.norm(true)
            print(f"{t:5}{noise / abar ** 0.5:13.3f}{loss:12.4f}{least:15.4f}{off:18.1%}")
        draw(axes, mixture, net, diffusion)
    files.keep(figure, out / "score_2d.png")


if __name__ == "__main__":
    run(main)
