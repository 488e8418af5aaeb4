"""Point clouds: a digit as 128 points in no order, by the same td.train and td.ddim.

A cloud is a set: a permutation P of its points leaves it what it is. So the network's answer to
permuted points has to be its answer, permuted,

    f(P x) = P f(x),

and a cloud drawn from noise, whose order means nothing, is as likely in any other (2006.02425).
What treats each point alone is such an f, and so is what gives all the same function of a mean
over all (Deep Sets, 1703.06114; for diffusion, 2103.01458). Here, for points h_i of C numbers
and a vector e of the time and the class,

    u_i = silu(W1 norm(h_i)),   scale, shift = W2 [e, mean_j u_j]
    h_i <- h_i + W3 silu((1 + scale) u_i + shift)

(norm takes its mean and variance over the whole cloud, which keeps the order out, too.)

The baseline is the best that f could do without the mean: points drawn one by one, from all
points of a class.
"""
from functools import partial

from gallery import asnumpy, demo, digits, files, learn, run, td, xp
import numpy as np
import score
from matplotlib.figure import Figure

N, UNIT = 128, 5.0          # points of a cloud; pixels to a unit of their coordinates
BOUNDS = (-14 / UNIT, 14 / UNIT)


def clouds(images, n, rng):
    """From each image (28, 28, 1) in [-1, 1], n points, brightness being their density: row and
    column from its middle, (B, n, 2)."""
    share = np.cumsum(images.reshape(len(images), -1) + 1, 1, dtype=np.float64)
    pixel = np.stack([np.searchsorted(s / s[-1], rng.random(n), "right") for s in share])
    corner = np.stack(np.divmod(pixel, 28), 2)
    return ((corner + rng.random(corner.shape) - 14) / UNIT).astype(np.float32)


def rasterise(x, width=0.7, full=0.5):
    """Clouds (B, n, 2) to pictures (B, 28, 28, 1) in [-1, 1]: round spots, of `width` pixels;
    white is where a cloud of 100 points would have `full` of them on a pixel."""
    off = UNIT * x[..., None] + 14 - (np.arange(28) + 0.5)              # (B, n, 2, 28)
    rows, columns = np.exp(-(off / width) ** 2 / 2).transpose(2, 0, 1, 3)
    density = rows.swapaxes(1, 2) @ columns / (2 * np.pi * width ** 2)  # points on a pixel
    return 2 * np.minimum(density * (100 / x.shape[1] / full), 1)[..., None] - 1


def fourier(x, octaves=5):
    """Coordinates (B, n, 2) as they are, and as waves of 56 pixels and shorter, down to 3.5:
    (B, n, 1, 2 + 4 octaves). To td's layers that is a picture of n x 1 pixels."""
    frequency = xp.asarray(np.pi / BOUNDS[1] / 2 * 2 ** np.arange(octaves), x.dtype)
    angle = (x[..., None] * frequency).reshape(*x.shape[:2], -1)
    return xp.concatenate([x, xp.sin(angle), xp.cos(angle)], 2)[:, :, None]


def block(p, h, emb, demb):
    """The equations above, (B, n, 1, C) -> the same."""
    (B, n, _, C), E = h.shape, emb.shape[1]
    u, first_back = td.sequential(
        h, [partial(td.norm, p.norm), partial(td.linear, p.w1), td.silu])
    scale_shift, linear_back = td.linear(
        p.w2, xp.concatenate([emb, u.mean((1, 2))], 1)[:, None, None])
    scale, shift = 1 + scale_shift[..., :C], scale_shift[..., C:]
    y, second_back = td.sequential(scale * u + shift, [td.silu, partial(td.linear, p.w3)])

    def back(dy):
        dv = second_back(dy)
        dscale_shift = xp.concatenate([dv * u, dv], 3).sum((1, 2), keepdims=True)
        demb_mean = linear_back(dscale_shift)           # one scale and shift served all points
        demb[:] += demb_mean[:, 0, 0, :E]               # one emb served all blocks
        return dy + first_back(scale * dv + demb_mean[..., E:] / n)
    return h + y, back


class PointNet:
    """Clouds (B, n, 2), steps, labels -> the answer, (B, n, 2), for td.train and the samplers.
    The parameters do not depend on n."""

    def __init__(self, n=N, width=96, depth=6, classes=10, rng=0, dtype=np.float32):
        self.image = self.input = (n, 2)
        self.classes = self.null = classes
        C, E, product = width, 2 * width, td.product_layout
        self.params = td.initial({
            "time1": product(E, E), "time2": product(E, E), "label": ((classes + 1, E), 1),
            "stem": product(22, C),
            "top": [{"norm": td.norm_layout(C), "w1": product(C, C),
                     "w2": product(E + C, 2 * C), "w3": product(C, C, gain=0)}
                    for _ in range(depth)],
            "norm": td.norm_layout(C), "out": product(C, 2, gain=0)}, rng, dtype)
        self.grads = self.params.grad

    with_params, __call__ = td.UNet.with_params, td.UNet.__call__

    def forward(self, x, t, y, rng=None):
        p = self.params
        emb, embed_back = td.embed(p, xp.asarray(t), xp.asarray(y))
        demb = xp.zeros_like(emb)
        h, net_back = td.sequential(fourier(x), [
            partial(td.linear, p.stem), *(partial(block, q, emb=emb, demb=demb) for q in p.top),
            partial(td.norm, p.norm), td.silu, partial(td.linear, p.out)])

        def back(dy):
            net_back(dy[:, :, None])        # nobody asks for the gradient of x
            embed_back(demb)
        return h[:, :, 0], back


def draw(net, diffusion, noise, y, steps=25, guidance=1.6):
    """The generator (t, x_t) of DDIM without noise, from noise (B, n, 2) to clouds."""
    model = td.guided(demo.parallel(net), y, net.null, guidance)
    return td.ddim(model, diffusion, noise, steps=steps, clip=BOUNDS)


def main(out, short):
    data, rng, diffusion = digits(), np.random.default_rng(0), demo.process()
    count, repeats, steps = (40, 1, 10) if short else (400, 4, 2000)
    x = np.concatenate([clouds(data.images, N, rng) for _ in range(repeats)])
    net = learn(PointNet(), diffusion, x, np.tile(data.labels, repeats), steps=steps,
                clip=BOUNDS)

    reader = score.load_classifier(data, out)
    reference, _ = score.read(reader, rasterise(x[:10 * count]))
    y = np.arange(count) % 10
    own, mean = np.zeros((2, count, 28, 28, 1))     # test digits; the mean of all of a class
    for k in range(10):
        own[y == k] = data.test_images[data.test_labels == k][:count // 10]
        mean[y == k] = data.images[data.labels == k].mean(0)
    noise = {n: td.normal(n, (count, n, 2)) for n in (N, 2 * N)}
    course = {n: {t: asnumpy(x) for t, x in draw(net, diffusion, noise[n], y)} for n in noise}
    print(f"{count} clouds each{'':15}points   read as asked   Frechet distance to training's")
    for name, n, drawn in (("test digits", N, clouds(own, N, rng)),
                           ("points one by one", N, clouds(mean, N, rng)),
                           ("the network", N, course[N][0]),
                           ("test digits", 2 * N, clouds(own, 2 * N, rng)),
                           ("the same network", 2 * N, course[2 * N][0])):
        features, seen = score.read(reader, rasterise(drawn))
        distance = score.frechet(reference, features)
        print(f"{name:24}{n:12}{np.mean(seen == y):16.1%}{distance:14.1f}")
    print(f"(a share of 90 % of {count} has a standard error of {(0.09 / count) ** 0.5:.1%})")

    order = rng.permutation(N)
    again = asnumpy(td.sample(draw(net, diffusion, noise[N][:40, order], y[:40])))
    print("From the same noise in another order come the same clouds in that order, but for "
          f"{UNIT * abs(again - course[N][0][:40, order]).max():.0e} pixels.")
    picture(out / "points.png", noise, course)


def picture(path, noise, course):
    """Ten clouds on their way; a point has the colour of the direction in which it started."""
    rows = [("noise", noise[N]), *((f"t = {t}", course[N][t]) for t in (400, 200, 80, 0)),
            (f"{2 * N} points", course[2 * N][0])]
    figure = Figure((11, 1.1 * len(rows)))
    axes = figure.subplots(len(rows), 10, gridspec_kw=dict(wspace=0, hspace=0))
    for row, (name, x) in zip(axes, rows):
        n = x.shape[1]
        for ax, cloud, start in zip(row, asnumpy(x), asnumpy(noise[n])):
            colour = np.arctan2(start[:, 0], start[:, 1])
            ax.scatter(cloud[:, 1], cloud[:, 0], 768 / n, colour, cmap="hsv", linewidths=0)
            ax.set(xlim=BOUNDS, ylim=BOUNDS[::-1], xticks=[], yticks=[], aspect="equal")
            ax.spines[:].set_visible(False)
        row[0].set_ylabel(name)
    files.keep(figure, path)


if __name__ == "__main__":
    run(main)
