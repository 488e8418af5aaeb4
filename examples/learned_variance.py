"""Learned variance (iDDPM, 2102.09672): the network says how far off each step back may be.

In the step from x_t to x_s the mean is off by a multiple of what the guess of x0 is. So the
variance is at least the posterior's, beta~, right where x0 is known; and on average, for data
of unit variance or less, at most beta, right where data are noise themselves. DDPM takes one of
the two; iDDPM asks the network for f, pixel by pixel (eq. 15):

    log var = f log beta + (1 - f) log beta~
    beta = 1 - abar_t / abar_s,    beta~ = beta (1 - abar_s) / (1 - abar_t)

f learns from the variational bound: the loss is |v(x_t, t) - v|^2 + lambda L_vlb (eq. 16). With
d = the posterior's mean - ours, and r = (beta~ + d^2) / var, the terms of L_vlb are

    KL = (log(var / beta~) + r - 1) / 2,    dKL / dlog var = (1 - r) / 2

and -log p(x0 | x_1) for s = 0. d is held fixed: L_vlb teaches variance only. This is for few
steps (section 4): in a jump to an s far below t, beta~ is far below beta. There

    var = beta~ + (beta - beta~) g,    g = Var(x0 | x_t) / (1 - abar_t)

is best (2201.06503). g, the mean of error^2 / noise^2 of the best guess, is the same for every
s, and f is not. iDDPM trains f with s = t-1, and uses it for any s; "carried over" below keeps
g instead, to see what that is worth.
"""
from itertools import pairwise

from gallery import asnumpy, demo, digits, files, learn, run, td, xp
import numpy as np

LAMBDA = 0.001


def log_variances(diffusion, t, s, x):
    """log beta~ and log(beta / beta~), ready to multiply x. Into s = 0 the posterior has no
    variance; as in DDPM's code, that of 2 to 1 stands for it."""
    abar, (t, s) = diffusion.abar, np.broadcast_arrays(t, s)
    beta = 1 - abar[t] / abar[s]
    last = (1 - abar[2] / abar[1]) * (1 - abar[1]) / (1 - abar[2])
    small = np.where(s > 0, beta * (1 - abar[s]) / (1 - abar[t]), last)
    return td.per_image(np.log(small), x), td.per_image(np.log(beta / small), x)


def bound_terms(diffusion, x0, xt, guess, t, s, log_var):
    """KL(q(x_s | x_t, x0) || p(x_s | x_t)), and -log p(x0 | x_t) where s = 0, in nats, value by
    value; and their slopes by log_var."""
    log_small = log_variances(diffusion, t, s, x0)[0]
    d = diffusion.q_posterior(guess, xt, t, s)[0] - diffusion.q_posterior(x0, xt, t, s)[0]
    ratio = xp.exp(log_small - log_var) + d ** 2 * xp.exp(-log_var)
    nats, slope = (log_var - log_small + ratio - 1) / 2, (1 - ratio) / 2
    last = xp.asarray(np.broadcast_to(s, len(x0)) == 0)
    nats[last], slope[last] = decoder_terms(x0[last], guess[last], log_var[last])
    return nats, slope


def decoder_terms(x0, mean, log_var):
    """-log of the normal variable's probability to fall in the bin of byte x0; its slope."""
    x0, mean, std = (asnumpy(a).astype(np.float64) for a in (x0, mean, xp.exp(log_var / 2)))
    p = td.bin_probability(x0, mean, std)

    def lost(edge):     # As std grows, the edge z of the bin moves by -z dlog(std).
        z = (edge - mean) / std
        return np.where(abs(edge) < 1, z * np.exp(-z * z / 2) / (2 * np.pi) ** 0.5, 0)
    slope = (lost(x0 + 1 / 255) - lost(x0 - 1 / 255)) / (2 * p)
    return xp.asarray(-np.log(p)), xp.asarray(slope)


def answers(diffusion, out, xt, t):
    """What the network's two channels, v and 2 f - 1, mean: v, the guess of x0 by it, and f."""
    v, second = xp.split(out, 2, axis=3)
    return v, diffusion.to_x0(xt, t, v, clip=(-1, 1)), (second + 1) / 2


def add_gradient(net, diffusion, x0, t, y, eps, total, *_):
    """The hybrid loss, called as td.add_gradient is, and as there: what clipping puts right is
    no error of v."""
    xt = diffusion.q_sample(x0, t, eps)
    out, back = net.forward(xt, t, y)
    v, guess, f = answers(diffusion, out, xt, t)
    error = xp.where(guess == x0, 0, v - diffusion.target(x0, eps, t))
    log_small, width = log_variances(diffusion, t, t - 1, x0)
    nats, slope = bound_terms(diffusion, x0, xt, guess, t, t - 1, log_small + f * width)
    weight = LAMBDA * diffusion.T       # of the sum over T steps we see one
    back(xp.concatenate([2 * error, weight * slope * width / 2], 3) / total)
    return float((error ** 2 + weight * nats).sum() / total)


def carried_over(diffusion, t, s, f):
    """The f of the jump from t to s that has the g of this f in the step from t to t-1."""
    width, jump = (log_variances(diffusion, t, to, f)[1] for to in (t - 1, s))
    g = xp.maximum(xp.expm1(f * width) / xp.expm1(width), 0)
    return xp.log1p(g * xp.expm1(jump)) / jump


def bits_per_dim(model, diffusion, images, labels, steps, count, rng):
    """The bound with these steps and each kind of variance: a dict of (bits, standard error).
    Each step is measured on `count` digits of its own: of all digits we can afford no more."""
    terms = {}
    for t, s in pairwise([*steps, 0]):
        pick = rng.permutation(len(images))[:count]
        x0 = xp.asarray(images[pick])
        xt = diffusion.q_sample(x0, t, td.normal(rng, x0.shape, x0.dtype))
        _, guess, f = answers(diffusion, model(xt, xp.full(count, t), labels[pick]), xt, t)
        log_small, width = log_variances(diffusion, t, s, x0)
        for name, f in {"fixed small": 0 * f, "fixed large": 0 * f + 1, "learned": f,
                        "learned, carried over": carried_over(diffusion, t, s, f)}.items():
            nats = bound_terms(diffusion, x0, xt, guess, t, s, log_small + f * width)[0]
            terms.setdefault(name, []).append(asnumpy(nats).mean((1, 2, 3)) / np.log(2))
    abar = diffusion.abar[steps[0]]
    prior = (abar * (images ** 2).mean() - abar - np.log1p(-abar)) / (2 * np.log(2))
    return {name: (prior + np.mean(bits, 1).sum(), (np.var(bits, 1).sum() / count) ** 0.5)
            for name, bits in terms.items()}


def main(out, short):
    data, rng, T = digits(), np.random.default_rng(0), 100 if short else 1000
    net = td.UNet(channels=demo.CHANNELS, blocks=(1, 1, 2), attention=(2,), heads=1, answers=2)
    diffusion = td.Diffusion(td.cosine_betas(T), "v")
    net = learn(net, diffusion, data.images, data.labels, steps=20 if short else 1150,
                gradient=add_gradient)
    counts = {10: 20, 50: 4, T: 2} if short else {10: 2000, 50: 400, T: 30}
    table = [bits_per_dim(demo.parallel(net), diffusion, data.test_images, data.test_labels,
                          td.timesteps(T, steps, "linspace"), count, rng)
             for steps, count in counts.items()]
    print("bits per dimension    ", *(f"{steps:11,} steps" for steps in counts))
    for name in table[0]:
        print(f"{name:22}", *("{:8.3f} +- {:.3f}".format(*bits[name]) for bits in table))

    # A digit at several t: f beside what its g is the mean of. Black is 0, white 1 or more.
    columns, shown = [], np.array([1, 5, 10, 20, 40, 60, 80]) * T // 100
    x0, y = xp.asarray(data.test_images[1:2]), data.test_labels[1:2]
    for t in shown:
        xt = diffusion.q_sample(x0, t, td.normal(rng, x0.shape))
        _, guess, f = answers(diffusion, net(xt, t, y), xt, t)
        rows = {"x_t": xt, "guess of x0": guess,
                "error^2 / noise^2": 2 * (guess - x0) ** 2 / (1 - diffusion.abar[t]) - 1,
                "f": 2 * f - 1}
        columns.append(asnumpy(xp.concatenate([*rows.values()])))
    files.sheet(out / "learned_variance.png", np.stack(columns, 1),
                [f"t = {t}" for t in shown], [*rows])


if __name__ == "__main__":
    run(main)
