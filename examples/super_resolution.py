"""Super-resolution (SR3, 2104.07636): digits of 7 x 7 pixels drawn anew with 28 x 28.

Sixteen pixels have become one, their mean, and many digits have the same 7 x 7. SR3 does not ask
for the one answer but draws from all: a diffusion model of p(x0 | c), c being the small picture
enlarged. It is trained as any other, and c is one more channel of what the network sees (SR3
section 2.3, eq. 6, with v for eps):

    x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps,     loss = E |v(x_t, c, t) - v|^2

and every sampler works as it is. Which measure says how good the answers are? PSNR, from the
squared error, prefers the mean E[x0 | c], which is a blur and no digit: for a draw x from
p(x0 | c), independent of x0, E |x - x0|^2 = 2 E |E[x0 | c] - x0|^2, 3.01 dB worse, however
perfect the model is. The mean is the network's own first guess, at x_T, where x_t says nothing.
"""
import demo
import files
import gallery
import numpy as np
import tinyddpm as td
from PIL import Image
from tinyddpm import asnumpy, xp


def reduce(x):
    """(B, 28, 28, 1) -> (B, 7, 7, 1): the means of 4 x 4 pixels."""
    return td.average_pool(td.average_pool(x))


def enlarge(small):
    """(B, 7, 7, 1) -> (B, 28, 28, 1): every pixel becomes 4 x 4 of the same value."""
    return td.upsample(td.upsample(small))


def bicubic(small):
    return np.stack([np.asarray(Image.fromarray(a).resize((28, 28), Image.Resampling.BICUBIC))
                     for a in small[..., 0]])[..., None]


def with_condition(x0):
    """Images and, behind them, what is left of them: (B, 28, 28, 1) -> (B, 28, 28, 2)."""
    return np.concatenate([x0, enlarge(reduce(x0))], 3)


class Given:
    """The network with the small picture beside what it is asked about: a network of x alone."""

    def __init__(self, net, c):
        self.net, self.c = net, c

    def forward(self, x, *rest):
        out, back = self.net.forward(xp.concatenate([x, self.c], 3), *rest)
        return out, lambda dy: back(dy)[..., :x.shape[3]]


def add_gradient(net, diffusion, pair, t, y, eps, *rest):
    """td.add_gradient for pairs of an image and its condition, to which no noise is added."""
    x0, c = pair[..., :1], pair[..., 1:]
    return td.add_gradient(Given(net, c), diffusion, x0, t, y, eps[..., :1], *rest)


def conditioned(net, c):
    """A model(x, t) for the samplers, on all cores."""
    net = demo.parallel(net)
    return lambda x, t: net(xp.concatenate([x, c], 3), t)


def psnr(x, x0):
    """Mean peak signal-to-noise ratio in dB; from black to white it is 2."""
    return np.mean(10 * np.log10(4 / ((x - x0) ** 2).mean((1, 2, 3))))


def main(out, short):
    data = gallery.digits()
    x0, labels = (a[:100 if short else 1000] for a in (data.test_images, data.test_labels))
    small, score = reduce(x0), gallery.Score(data, out)
    net = td.UNet(channels=demo.CHANNELS, classes=0, blocks=(1, 1, 2), attention=(2,), heads=1,
                  condition=1)
    diffusion = td.Diffusion(td.cosine_betas(1000), "v")
    net = gallery.learn(net, diffusion, with_condition(data.images), gradient=add_gradient,
                        steps=20 if short else 1200)

    model, rng = conditioned(net, xp.asarray(enlarge(small))), np.random.default_rng(0)
    draws = [td.normal(rng, x0.shape) for _ in range(3)]
    mean = next(td.ddim(model, diffusion, draws[0], steps=[diffusion.T]))[1]
    draws = [asnumpy(td.sample(td.ddim(model, diffusion, x, rng, steps=20, eta=1))) for x in draws]
    results = {"nearest": enlarge(small), "bicubic": bicubic(small).clip(-1, 1),
               "mean": asnumpy(mean), "SR3": draws[0], "true": x0}
    print(f"{len(x0):,} test digits  PSNR   read right   Frechet   reduced again, off by")
    for name, x in results.items():
        accuracy, distance = score(x, labels)
        off = 127.5 * ((reduce(x) - small) ** 2).mean() ** 0.5
        ps = psnr(x, x0) if name != "true" else np.inf
        print(f"{name:12}{ps:6.2f}{accuracy:8.1%} {distance:8.2f} {off:8.2f}")
    pick = [np.flatnonzero(labels == k)[0] for k in range(10)]
    rows = {"given": enlarge(small), "nearest": enlarge(small), "bicubic": bicubic(small), "mean": asnumpy(mean), "SR3": draws[0], "again":draws[1], "and again":draws[2],"true": x0}
    files.sheet(out / "super_resolution.png", np.stack([x[pick] for x in rows.values()]),
                names=[*rows])
    np.savez("/tmp/hB/sr.npz", x=draws[0], y=labels)
    td.save("/tmp/hB/sr_net.npz", net, diffusion)


if __name__ == "__main__":
    gallery.run(main)
