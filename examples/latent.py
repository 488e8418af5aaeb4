"""Latent diffusion (2112.10752): an autoencoder makes pictures small, diffusion draws those.

Most numbers of a picture say how the edges of strokes look, few say which digit it is, and a
diffusion model works on all of them alike, at every step. So first learn an encoder E and a
decoder D (section 3.1), here E(x) a quarter as wide and high, of 4 channels, by

    loss = |D(z + sigma eps) - x|^2 + lambda |z|^2,     z = E(x), eps standard normal

The noise makes all that is near a z decode alike, and the last term keeps E from drowning it in
large z: KL(N(z, sigma^2) || N(0, 1)) is |z|^2 / 2 and a constant, so this is LDM's KL penalty
for a fixed sigma. Then train diffusion on the z, brought to the mean 0 and deviation 1 of the
noise that it will meet (section 4.3.2, appendix G), and decode what it draws.

STEPS give both ways about the same time on two quiet cores, the autoencoder's included; the
table prints the times.
"""
import time
from functools import partial

from gallery import Score, asnumpy, demo, digits, files, learn, run, td, xp
import numpy as np
from matplotlib.figure import Figure

SIGMA, LAMBDA = 0.2, 1e-3
STEPS = {1: (400, 500, 350), 2: (400, 300, 300)}     # of autoencoder, latents, pixels, by side


class Autoencoder:
    """Pictures (B, H, W, 1) to latents (B, H/4, W/4, 4) and back, for td.train."""

    def __init__(self, image, width=32, rng=0, dtype=np.float32):
        self.image = self.input = image
        self.classes = self.null = 0
        self.latent = (image[0] // 4, image[1] // 4, 4)
        C, D, conv, norm = width, 2 * width, partial(td.product_layout, 3, 3), td.norm_layout
        self.params = td.initial({
            "encoder": {"conv1": conv(4, C), "norm1": norm(C), "conv2": conv(4 * C, D),
                        "norm2": norm(D), "conv3": conv(D, 4)},
            "decoder": {"conv1": conv(4, D), "norm1": norm(D), "conv2": conv(D, 4 * C),
                        "norm2": norm(C), "conv3": conv(C, 4)}}, rng, dtype)
        self.grads = self.params.grad

    with_params = td.UNet.with_params

    def encode(self, x):
        p = self.params.encoder
        return td.sequential(x, [
            smaller, partial(td.conv3x3, p.conv1), partial(td.norm, p.norm1), td.silu,
            smaller, partial(td.conv3x3, p.conv2), partial(td.norm, p.norm2), td.silu,
            partial(td.conv3x3, p.conv3)])

    def decode(self, z):
        p = self.params.decoder
        return td.sequential(z, [
            partial(td.conv3x3, p.conv1), partial(td.norm, p.norm1), td.silu,
            partial(td.conv3x3, p.conv2), larger, partial(td.norm, p.norm2), td.silu,
            partial(td.conv3x3, p.conv3), larger])


def smaller(x):
    """2 x 2 pixels into channels; its backward puts them back."""
    return td.space_to_depth(x), td.depth_to_space


def larger(x):
    return td.depth_to_space(x), td.space_to_depth


def add_gradient(net, diffusion, x, t, y, eps, total, *rest):
    """The autoencoder's loss, called as td.add_gradient is. There are no steps t: of what
    td.train draws, it takes the pictures and the noise."""
    z, encoder_back = net.encode(x)
    noise = SIGMA * td.space_to_depth(td.space_to_depth(eps))[..., :z.shape[3]]
    answer, decoder_back = net.decode(z + noise)
    dz = decoder_back(2 * (answer - x) / total)
    encoder_back(dz + 2 * LAMBDA * z / total)           # z went two ways
    return float(((answer - x) ** 2).sum() + LAMBDA * (z ** 2).sum()) / total


def canvases(images, labels, side, rng):
    """Pictures of side x side digits, in reading order k, k + 1, ..., 9, 0, ...; and all k."""
    first = rng.permutation(labels)
    wanted = (first[:, None] + np.arange(side * side)) % 10
    pick = np.zeros_like(wanted)
    for k in range(10):
        pick[wanted == k] = np.resize(rng.permutation(np.flatnonzero(labels == k)),
                                      np.sum(wanted == k))
    x = images[pick].reshape(-1, side, side, 28, 28, 1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, 28 * side, 28 * side, 1), first


def cut(x, first):
    """The digits of canvases, and what they should be."""
    B, side = len(x), x.shape[1] // 28
    parts = x.reshape(B, side, 28, side, 28, 1).transpose(0, 1, 3, 2, 4, 5)
    wanted = (first[:, None] + np.arange(side * side)) % 10
    return parts.reshape(-1, 28, 28, 1), wanted.ravel()


def coder(auto, x):
    """E and D on all cores; between them, latents of x have mean 0 and deviation 1 in each
    channel. What is decoded is clipped to [-1, 1]."""
    raw = demo.parallel(lambda x: auto.encode(x)[0])
    z = raw(x)
    mean, std = z.mean((0, 1, 2)), z.std((0, 1, 2))
    return (lambda x: (raw(x) - mean) / std,
            demo.parallel(lambda z: xp.clip(auto.decode(z * std + mean)[0], -1, 1)))


def compare(data, score, side, steps, count):
    """Train both ways, draw `count` digits by each, print a table; some of each, by name."""
    rng, diffusion = np.random.default_rng(0), demo.process()
    x, y = canvases(data.images, data.labels, side, rng)
    real, first = canvases(data.test_images, data.test_labels, side, rng)
    real, first = xp.asarray(real[:count // side ** 2]), first[:count // side ** 2]
    image, batch = x.shape[1:], 64 // side ** 2         # as many pixels to a step
    times = [time.perf_counter()]

    auto = learn(Autoencoder(image), diffusion, x, steps=steps[0], batch=batch, lr=2e-3,
                 optimizer="adamw", gradient=add_gradient, said="autoencoder")
    encode, decode = coder(auto, xp.asarray(x[:1000]))
    z = encode(xp.asarray(x))
    bounds = float(z.min()), float(z.max())
    of_latents = learn(demo.network(auto.latent, [64] if side == 1 else [32, 64]), diffusion, z,
                       y, steps=steps[1], clip=bounds, said="latent diffusion")
    times.append(time.perf_counter())
    of_pixels = learn(demo.network(image), diffusion, x, y, steps=steps[2], batch=batch,
                      said="pixel diffusion")
    times.append(time.perf_counter())

    def draw(net, **bounds):
        return td.sample(demo.frames(net, diffusion, first, 0, "ddim", 1.6, steps=20, eta=0.6,
                                     **bounds))
    ways = {"test digits": lambda: real, "through E and D": lambda: decode(encode(real)),
            "latent diffusion": lambda: decode(draw(of_latents, clip=bounds)),
            "pixel diffusion": lambda: draw(of_pixels)}
    trained, rows = dict(zip([*ways][2:], np.diff(times))), {}
    print(f"{'x'.join(map(str, image[:2])):20}trained for   ms to draw one   read as asked   "
          "Frechet distance")
    for name, make in ways.items():
        began = time.perf_counter()
        x = make()
        ms = 1000 * (time.perf_counter() - began) / len(x)
        accuracy, distance = score(*cut(asnumpy(x), first))
        cost = f"{trained[name]:9.0f} s{ms:18.0f}" if name in trained else " " * 29
        print(f"{name:20}{cost}{accuracy:16.1%}{distance:19.1f}")
        rows[name] = asnumpy(x)[[np.argmax(first == k) for k in range(10)]]
    error = (0.09 / count) ** 0.5
    print(f"({count} digits; a share of 90 % of them has a standard error of {error:.1%})")
    return rows


def main(out, short):
    data = digits()
    score, figure = Score(data, out), Figure((11, 7.5), layout="constrained")
    for ax, (side, steps) in zip(figure.subplots(2), STEPS.items()):
        rows = compare(data, score, side, (5, 5, 5) if short else steps, 40 if short else 400)
        files.show(ax, np.stack([*rows.values()]), names=[*rows])
    files.keep(figure, out / "latent.png")


if __name__ == "__main__":
    run(main)
