"""Less memory (1604.06174): activations thrown away, and computed again for the backward pass.

What training needs memory for is not the parameters but what each layer keeps for its
backward: its inputs and more, for every pixel of every image of the batch, so with n blocks

    kept by all layers                  n (a + m),    a: the input of a block, m: all inside it
    kept by recomputed blocks           n a + m       only one block's inside exists at a time

for one more forward pass: about a third more time, as backward is about twice forward. The
gradients are the same, bit for bit, as the same is computed again from the same input; where
something is drawn (dropout), it has to be drawn the same again.

The input may be kept in half precision, too. What goes forward stays exact; going back, each
block's derivative is taken at a slightly different input: float16 rounds numbers from 6e-5 to
65504 to a relative 2^-11 at most.
"""
import copy
import time
import tracemalloc

from gallery import asnumpy, files, run, td
import numpy as np

BATCH, DEPTHS = 16, (1, 2, 4, 8)


def recomputed(block, keep=None):
    """The block (td.res_block), but all it keeps for its backward is x, as the type `keep`
    if that is given."""
    def frugal(p, x, *, drop, **others):
        before = copy.deepcopy(drop)                # the state of its random numbers
        y, _ = block(p, x, drop=drop, **others)
        dtype, x = x.dtype, x.astype(keep or x.dtype, copy=False)

        def back(dy):
            again = copy.deepcopy(before)
            return block(p, x.astype(dtype, copy=False), drop=again, **others)[1](dy)
        return y, back
    return frugal


class Recomputed(td.UNet):
    """A U-Net whose blocks are computed again."""
    res_block = staticmethod(recomputed(td.res_block))


class Halved(td.UNet):
    """The same, the blocks' inputs being kept in half precision."""
    res_block = staticmethod(recomputed(td.res_block, np.float16))


def step(kind, depth, batch, channels=(32, 64)):
    """One forward and backward of a network with so many blocks on each side of a level: its
    gradient, the seconds, and the bytes that were taken at the most."""
    net, rng = kind((28, 28, 1), channels, blocks=depth, dropout=0.1), np.random.default_rng(0)
    net.params.flat += 0.05 * td.normal(rng, net.params.flat.shape)
    x, t = td.normal(rng, (batch, *net.image)), rng.integers(1, 1000, batch)
    took = []
    for _ in range(3):
        net.grads.flat, began = 0, time.perf_counter()
        y, back = net.forward(x, t, None, 1)
        back(y)
        took.append(time.perf_counter() - began)
    del y, back
    tracemalloc.start()
    y, back = net.forward(x, t, None, 1)
    back(y)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return asnumpy(net.grads.flat), np.median(took), peak


def main(out, short):
    print(f"{'':16}all kept{'':10}recomputed{'':24}and x in half precision\n"
          f"blocks, batch{'MB':>9}{'ms':>8}" + 2 * f"{'MB':>10}{'ms':>8}   gradient off")
    curves = {name: [] for name in ("all kept", "recomputed", "x in half precision")}
    settings = [(depth, BATCH) for depth in DEPTHS] + [(2, 2 * BATCH), (2, 4 * BATCH)]
    for depth, batch in [(1, 4), (2, 4)] if short else settings:
        results = [step(kind, depth, batch) for kind in (td.UNet, Recomputed, Halved)]
        exact, line = results[0][0], f"{4 * depth:4}{batch:8}"
        for name, (gradient, took, peak) in zip(curves, results):
            line += f"{peak / 1e6:10.1f}{1000 * took:8.0f}"
            if name != "all kept":
                off = np.linalg.norm(gradient - exact) / np.linalg.norm(exact)
                line += f"{off:15.1g}"
            if batch == settings[0][1] or short:
                curves[name].append((4 * depth, peak / 1e6))
        print(line)
    files.plot(out / "memory.png", *((*zip(*points), name, dict(marker="o"))
                                     for name, points in curves.items()),
               title=f"one step of {BATCH} images, 28 x 28 pixels, 32 and 64 channels",
               xlabel="blocks", ylabel="memory at the most, MB")


if __name__ == "__main__":
    run(main)
