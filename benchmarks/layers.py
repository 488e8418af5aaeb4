"""Each layer of the demo's network, forward and backward, against the peaks of this machine.

    python benchmarks/layers.py             one thread, one chunk of 16 images, as in training
    python benchmarks/layers.py --short     each once, to see that it runs

GFLOP/s counts the products' multiplications and additions (a convolution's backward has twice
its forward's), GB/s what must be read and written at least: x and y forward; dy, x and dx
backward. The peaks, of a 1,024-wide product and of a copy of as many numbers as the layer's x,
are measured in turns with the layers.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import cores                                                                    # noqa: E402
import numpy as np                                                              # noqa: E402

import demo                                                                     # noqa: E402
import tinyddpm as td                                                           # noqa: E402

IMAGES = 16


def cases():
    """Name -> layer(x, *) to y and back(dy), the shape of x, flops of its forward."""
    rng = np.random.default_rng(0)

    def with_parameters(layer, layout, *options):
        p = td.initial(layout, rng)
        p.flat = 0.1 * td.normal(rng, p.flat.shape)
        return lambda x: layer(p, x, *options)

    found = {}
    for side, C, D in ((28, 1, 16), (28, 16, 16), (28, 16, 1), (14, 32, 32), (7, 64, 64)):
        found[f"conv3x3 {side}x{side} {C:2} -> {D}"] = (
            with_parameters(td.conv3x3, td.product_layout(3, 3, C, D)), (IMAGES, side, side, C),
            2 * IMAGES * side * side * 9 * C * D)
    for side, C in ((28, 16), (14, 32), (7, 64)):
        shape = IMAGES, side, side, C
        found[f"norm    {side}x{side} {C}"] = (
            with_parameters(td.norm, td.norm_layout(C)), shape, 0)
        found[f"silu    {side}x{side} {C}"] = (td.silu, shape, 0)
    found["average_pool 28x28 16"] = (
        lambda x: (td.average_pool(x), lambda dy: td.upsample(dy) / 4), (IMAGES, 28, 28, 16), 0)
    found["upsample 14x14 16"] = (
        lambda x: (td.upsample(x), lambda dy: 4 * td.average_pool(dy)), (IMAGES, 14, 14, 16), 0)
    found["linear  7x7 64 -> 192"] = (
        with_parameters(td.linear, td.product_layout(64, 192)), (IMAGES, 7, 7, 64),
        2 * IMAGES * 49 * 64 * 192)
    found["attention 7x7 64"] = (
        with_parameters(td.attention, td.attention_layout(64), 1), (IMAGES, 7, 7, 64),
        2 * IMAGES * 49 * 64 * (4 * 64 + 2 * 49))
    return found


def seconds(function):
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30, help="rounds (default: 30)")
    parser.add_argument("--short", action="store_const", const=1, dest="repeats")
    rounds = parser.parse_args().repeats
    cores.keep_memory()
    rng = np.random.default_rng(0)
    layers = cases()
    a = td.normal(rng, (1024, 1024))
    product = np.empty_like(a)
    inputs = {name: td.normal(rng, shape) for name, (_, shape, _) in layers.items()}
    slopes = {name: td.normal(rng, layers[name][0](x)[0].shape) for name, x in inputs.items()}
    copies = {name: np.empty_like(x) for name, x in inputs.items()}
    times = {name: ([], [], []) for name in layers}
    peaks = []
    for _ in range(rounds):
        peaks.append(seconds(lambda: np.matmul(a, a, out=product))[0])
        for name, (layer, _, _) in layers.items():
            x, dy = inputs[name], slopes[name]
            forward, (_, back) = seconds(lambda: layer(x))
            backward, _ = seconds(lambda: back(dy))
            copy, _ = seconds(lambda: np.copyto(copies[name], x))
            for column, value in zip(times[name], (forward, backward, copy)):
                column.append(value)
    peak = 2 * 1024 ** 3 / statistics.median(peaks) / 1e9
    print(f"{IMAGES} images, one thread, medians of {rounds} rounds; sgemm peak "
          f"{peak:.0f} GFLOP/s; copy: x read and written once\n")
    print(f"{'':24}{'forward':>30}{'':4}{'backward':>30}\n{'':24}"
          + "    ".join([f"{'ms':>6}{'GFLOP/s':>9}{'GB/s':>7}{'of peak':>8}"] * 2))
    for name, (_, _, flops) in layers.items():
        forward, backward, copy = map(statistics.median, times[name])
        x, y = inputs[name].nbytes, slopes[name].nbytes
        line = ""
        for took, work, size in ((forward, flops, x + y), (backward, 2 * flops, 2 * x + y)):
            share = work / took / 1e9 / peak if flops else (size / took) / (2 * x / copy)
            rate = f"{work / took / 1e9:9.0f}" if flops else f"{'':9}"
            line += f"{1000 * took:6.2f}{rate}{size / took / 1e9:7.1f}{share:8.0%}    "
        print(f"{name:24}{line}")
    print("\nof peak: of sgemm's where there are products, else of the copy's bytes a second")


if __name__ == "__main__":
    main()
