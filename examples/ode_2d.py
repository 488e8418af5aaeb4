"""From noise to points of the plane in three ways, and back to their likelihood (2011.13456).

With the score s(x, t) at every level of noise, which score_2d.py learns, points can be drawn by

    annealed Langevin   x <- x + a s(x, t) / 2 + sqrt(a) z, some times at each level, a being r
                        times the noise's variance (1907.05600 Algorithm 1, with x over
                        sqrt(abar_t), and noise over signal as sigma)
    reverse SDE         dx = (-beta x / 2 - beta s) dt + sqrt(beta) dw, back in time (eq. 6);
                        ancestral sampling, td.ddpm, is a way to step along it (appendix E)
    probability flow    dx/dt = -beta (x + s) / 2, without noise, and each q(x_t) is the same
                        (eq. 13). As x = cos(phi) x0 + sin(phi) eps, it is dx/dphi = v: td.heun

The flow can be followed up to x_T, too. As it spreads, density falls (eq. 39), and

    log q(x) = log N(x_T; 0, 1) + integral of div v dphi,   v = (eps - sin(phi) x) / cos(phi)

where div eps needs no estimate: it is the trace of a 2 x 2 Jacobian, a row one call of `back`.
"""
from itertools import pairwise

from gallery import asnumpy, files, run, td, xp
import numpy as np
import score_2d
from matplotlib.figure import Figure


def levels(diffusion, count):
    """Steps, descending from T to 1, about equally far apart in log(noise / signal)."""
    log_ratio = np.log(diffusion.snr[1:]) / -2
    wanted = np.linspace(log_ratio[-1], log_ratio[0], count)
    return 1 + np.abs(log_ratio - wanted[:, None]).argmin(1)


def langevin(model, diffusion, x, rng, steps, each=10, r=0.3):
    """Annealed Langevin dynamics by a model of eps, each step `each` times: a generator of
    (t, x_t) like a sampler."""
    for t, s in pairwise([*steps, 0]):
        noise = float(1 - diffusion.abar[t]) ** 0.5
        for _ in range(each):                       # the score is -eps / noise
            eps, z = model(x, xp.full(len(x), t)), td.normal(rng, x.shape, x.dtype)
            x = x - r / 2 * noise * eps + r ** 0.5 * noise * z
        x = x * float(diffusion.abar[s] / diffusion.abar[t]) ** 0.5
        yield s, x


def smoothed(mixture, h):
    return score_2d.Mixture(mixture.means, mixture.shares, (mixture.std ** 2 + h ** 2) ** 0.5)


def distance(x, mixture, h=0.2):
    """Of the points' density from the mixture's: the squared difference, integrated, over the
    integral of the mixture's square, both smoothed by a Gaussian of variance h^2 / 2. Without
    bias, so it can be below 0. (A maximum mean discrepancy.)"""
    n, sum_k = len(x), 0.0
    for part in np.array_split(x, 20):
        sum_k += np.exp(-((part[:, None] - x) ** 2).sum(2) / (2 * h ** 2)).sum()
    x_x = (sum_k - n) / (n * (n - 1)) / (2 * np.pi * h ** 2)        # pairs of different points
    x_q = np.exp(smoothed(mixture, h).log_density(x)).mean()
    q_q = np.exp(smoothed(smoothed(mixture, mixture.std), h).log_density(mixture.means))
    return (x_x - 2 * x_q + mixture.shares @ q_q) / (mixture.shares @ q_q)


def velocity(net, diffusion, x, t):
    """dx/dphi of the probability flow at t, and its divergence (B,), from a net of eps."""
    cos, sin = diffusion.abar[t] ** 0.5, (1 - diffusion.abar[t]) ** 0.5
    eps, back = net.forward(xp.asarray(x), xp.full(len(x), t))
    div = sum(back(xp.full_like(eps, np.eye(2)[i]))[:, i] for i in range(2))
    return asnumpy(eps - sin * x) / cos, asnumpy(div - 2 * sin) / cos


def log_likelihood(net, diffusion, x, steps):
    """log q(x) (B,): Heun's method from t = 1, where there is hardly any noise, up to T."""
    up, log_q = levels(diffusion, steps)[::-1], 0
    for t, s, h in zip(up, up[1:], np.diff(np.arccos(diffusion.abar[up] ** 0.5))):
        v, div = velocity(net, diffusion, x, t)
        v_s, div_s = velocity(net, diffusion, x + h * v, s)
        x, log_q = x + h * (v + v_s) / 2, log_q + h * (div + div_s) / 2
    return log_q - (x ** 2).sum(1) / 2 - np.log(2 * np.pi)


def main(out, short):
    diffusion, rng = td.Diffusion(td.linear_betas(1000)), np.random.default_rng(2)
    n, calls, side = (500, 40, 20) if short else (5000, 500, 90)
    figure, edge = Figure((15, 6.2), layout="constrained"), 2.2
    line = np.linspace(-edge, edge, side)
    grid = np.stack(np.meshgrid(line, line), 2).reshape(-1, 2)
    for axes, (name, mixture) in zip(figure.subplots(2, 5), score_2d.mixtures().items()):
        parts = {"moons": 2, "three": 3}[name]
        net = score_2d.train(mixture, diffusion, 100 if short else 6000)
        x, steps = td.normal(rng, (n, 2)), levels(diffusion, calls // 10)
        ways = {"Langevin, least noise only": langevin(net, diffusion, x, rng, [1], each=calls),
                "annealed Langevin": langevin(net, diffusion, x, rng, steps, each=10),
                "reverse SDE": td.ddpm(net, diffusion, x, rng, steps=calls, clip=None),
                "probability flow": td.heun(net, diffusion, x, steps=calls // 2, clip=None)}
        floor = [1000 * distance(mixture.sample(n, rng), mixture) for _ in range(20)]
        true_shares = mixture.shares.reshape(parts, -1).sum(1)
        print(f"{name}: {n:,} points, {calls} calls  1000 x distance  shares of the {parts}\n"
              f"  true points {np.mean(floor):26.1f} +- {np.std(floor):.1f}    ", *true_shares)
        for ax, (way, sampler) in zip(axes, ways.items()):
            path = [asnumpy(x).astype(np.float64) for _, x in sampler]
            nearest = ((path[-1][:, None] - mixture.means) ** 2).sum(2).argmin(1)
            shares = np.bincount(nearest * parts // len(mixture.means), minlength=parts) / n
            print(f"  {way:26}{1000 * distance(path[-1], mixture):12.1f}      ", *shares)
            ax.scatter(*path[-1].T, s=0.5)
            ax.set(title=way, xlim=(-edge, edge), ylim=(-edge, edge), aspect="equal")
        ax.plot(*np.stack(path)[:, :40].transpose(2, 0, 1), color="k", lw=0.4)  # the flow lines

        x = mixture.sample(n, rng)
        log_q, true = log_likelihood(net, diffusion, x, 50), mixture.log_density(x)
        off, density = log_q - true, np.exp(log_likelihood(net, diffusion, grid, 50))
        mass, error = density.sum() * (line[1] - line[0]) ** 2, off.std() / n ** 0.5
        print(f"  log-likelihood in nats: true {true.mean():.3f}, "
              f"by the flow {log_q.mean():.3f},\n  apart {off.mean():.3f} +- {error:.3f}, "
              f"of a point {off.std():.3f}; the flow's density adds up to {mass:.3f}")
        axes[4].imshow(density.reshape(side, side), origin="lower", extent=(-edge, edge) * 2)
        axes[4].contour(line, line, np.exp(mixture.log_density(grid)).reshape(side, side),
                        colors="white", linewidths=0.5, levels=4)
        axes[4].set_title("density by the flow (lines: true)")
    files.keep(figure, out / "ode_2d.png")


if __name__ == "__main__":
    run(main)
