"""Super-resolution (SR3, 2104.07636): digits of 7 x 7 pixels drawn anew with 28 x 28.

Every pixel of the small picture is the mean of 16, and many digits have the same small picture.
SR3 does not look for the one answer but draws from all of them, p(x0 | c), c being the small
picture enlarged. The network is a diffusion model like any other, but for one more channel of
what it sees, which holds c and gets no noise (SR3 eq. 6, there with eps for v):

    x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps,    loss = E |v(x_t, c, t) - v|^2

and the samplers are as they were. How good is an answer x? Squared error, and with it PSNR,
prefers the mean m = E[x0 | c], a blur of all the answers: a draw from p(x0 | c) is off by

    E |x - x0|^2 = E |x - m|^2 + E |m - x0|^2 = 2 E |m - x0|^2,    3.01 dB of PSNR less,

even if it is perfect. And m is the network's guess of x0 at t = T, where x_t tells it nothing.
"""
from gallery import Score, asnumpy, demo, digits, files, learn, run, td, xp
import numpy as np
from PIL import Image


def reduce(x):
    """(B, 28, 28, 1) -> (B, 7, 7, 1): the means of 4 x 4 pixels."""
    return td.average_pool(td.average_pool(x))


def enlarge(small):
    """(B, 7, 7, 1) -> (B, 28, 28, 1): every pixel becomes 4 x 4 of the same value."""
    return td.upsample(td.upsample(small))


def bicubic(small):
    """(B, 7, 7, 1) -> (B, 28, 28, 1), smoothly."""
    large = [Image.fromarray(a).resize((28, 28), Image.Resampling.BICUBIC)
             for a in small[..., 0]]
    return np.clip(np.stack(large), -1, 1)[..., None]


class Given:
    """The network, with c beside whatever it is asked about: a network of x alone."""

    def __init__(self, net, c):
        self.net, self.c = net, c

    def forward(self, x, *rest):
        out, back = self.net.forward(xp.concatenate([x, self.c], 3), *rest)
        return out, lambda dout: back(dout)[..., :x.shape[3]]


def add_gradient(net, diffusion, pair, t, y, eps, *rest):
    """td.add_gradient, for images that have their c behind them as a further channel."""
    x0, c = pair[..., :1], pair[..., 1:]
    return td.add_gradient(Given(net, c), diffusion, x0, t, y, eps[..., :1], *rest)


def draw(net, diffusion, small, rng, steps):
    """Digits that could have been reduced to these (B, 7, 7, 1)."""
    c = enlarge(xp.asarray(small))
    parts = demo.parallel(net)          # which cuts c as it cuts x
    sampler = td.ddpm(lambda x, t: parts(xp.concatenate([x, c], 3), t), diffusion,
                      td.normal(rng, c.shape, c.dtype), rng, steps=steps)
    return asnumpy(td.sample(sampler))


def psnr(x, x0):
    """Peak signal-to-noise ratio of each image in dB. From black to white it is 2."""
    return 10 * np.log10(4 / ((x - x0) ** 2).mean((1, 2, 3)))


def main(out, short):
    data = digits()
    score = Score(data, out)
    pairs = np.concatenate([data.images, enlarge(reduce(data.images))], 3)
    net = td.UNet(channels=demo.CHANNELS, classes=0, blocks=(1, 1, 2), attention=(2,), heads=1,
                  condition=1)
    diffusion = td.Diffusion(td.cosine_betas(1000), "v")
    net = learn(net, diffusion, pairs, steps=20 if short else 1150, gradient=add_gradient)

    N = 100 if short else 1000
    x0, labels, rng = data.test_images[:N], data.test_labels[:N], np.random.default_rng(0)
    small = reduce(x0)
    # The sampler's guess on the way from T straight to 0 is all there is to the mean.
    mean = draw(net, diffusion, small, rng, [diffusion.T])
    draws = [draw(net, diffusion, small, rng, 20) for _ in range(2)]
    print(f"{N:5,} test digits     PSNR in dB    read right    Frechet   reduced, off by")
    for name, x in {"nearest": enlarge(small), "bicubic": bicubic(small), "mean": mean,
                    "a draw": draws[0], "the true ones": x0}.items():
        right, distance = score(x, labels)
        off = 127.5 * ((reduce(x) - small) ** 2).mean() ** 0.5
        dB = "" if x is x0 else f"{psnr(x, x0).mean():.2f} +- {psnr(x, x0).std() / N ** .5:.2f}"
        print(f"{name:16}{dB:>15}{right:9.1%} +- {(right * (1 - right) / N) ** 0.5:.1%}"
              f"{distance:11.2f}{off:12.2f} of 255")
    # If both are from p(x0 | c), the other draw is as far from a draw as the true x0 is.
    print(f"between draws{psnr(*draws).mean():10.2f}")

    first = np.array([np.argmax(labels == k) for k in range(10)])
    some = draw(net, diffusion, np.tile(small[first], (12, 1, 1, 1)), rng, 20)
    some = some.reshape(12, 10, 28, 28, 1)
    rows = [enlarge(small)[first], bicubic(small[first]), mean[first], *some[:3],
            2 * some.std(0) - 1, x0[first]]
    files.sheet(out / "super_resolution.png", np.stack(rows), names=[
        "7 x 7", "bicubic", "mean", "three draws", "", "", "deviation of 12", "true"])


if __name__ == "__main__":
    run(main)
