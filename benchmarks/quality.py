"""Quality against training time: the same network and settings in tinyddpm and in PyTorch.

    python benchmarks/quality.py            a table, and docs/quality.png
    python benchmarks/quality.py --minutes 1 2 --only tinyddpm
    python benchmarks/quality.py --short    a few seconds, to see that it runs: out/quality.png

Each run has its own learning-rate decay, over as many steps as fit its minutes by a timing of
20 steps. Samples of both, --count digits with the demo's drawing, are drawn by tinyddpm from
the moving average of the parameters, and scored by the classifier of benchmarks/score.py.
PyTorch is needed for its half alone: pip install torch
"""
import argparse
import math
import os
import statistics
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import cores                                                                    # noqa: E402
import vs_torch                                                                 # noqa: E402
import numpy as np                                                              # noqa: E402
import torch                                                                    # noqa: E402
from matplotlib.figure import Figure                                            # noqa: E402

import demo                                                                     # noqa: E402
import files                                                                    # noqa: E402
import pictures                                                                 # noqa: E402
from score import Score                                                         # noqa: E402
from torch_unet import TorchUNet                                                # noqa: E402


def in_tinyddpm(diffusion, images, labels, steps, seed):
    net = demo.network(seed=seed)
    for state in demo.learn(net, diffusion, images, labels, steps, seed=seed):
        yield lambda: net.with_params(state.ema.flat)


def in_torch(diffusion, images, labels, steps, seed):
    torch.manual_seed(seed)
    net = demo.network(seed=seed)
    twin = TorchUNet(net).to(memory_format=torch.channels_last)
    step = vs_torch.TorchStep(twin, twin, diffusion, images, labels, demo.BATCH, muon=True)
    for i in range(steps):
        lr = demo.LR["muon"] * min(1, (i + 1) / 100)
        step(lr * (1 + math.cos(math.pi * i / steps)) / 2, i)
        yield lambda: net.with_params(twin.flat(net, step.ema))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, nargs="+", default=[1, 2, 5, 10])
    parser.add_argument("--count", type=int, default=1000, help="samples of each")
    parser.add_argument("--only", choices=("tinyddpm", "PyTorch"))
    parser.add_argument("--out", type=Path, default=demo.OUT, help="of the classifier")
    parser.add_argument("--short", action="store_true")
    args = parser.parse_args()
    if args.short:
        args.minutes, args.count = [0.05, 0.1], 100
    cores.keep_memory()
    torch.set_num_threads(cores.CORES)
    digits, diffusion = pictures.load(), demo.process()
    data, score = (diffusion, digits.images, digits.labels), Score(digits, args.out)
    runs = {"tinyddpm": in_tinyddpm, "PyTorch": in_torch}
    if args.only:
        runs = {args.only: runs[args.only]}
    wanted = np.arange(args.count) % 10
    rows = {name: [] for name in runs}
    print(f"{'':12}{'minutes':>8}{'steps':>8}{'took':>8}{'accuracy':>10}{'Frechet':>9}")
    for minutes in args.minutes:
        for name, run in runs.items():      # in turns, so that a slow hour slows both
            times, start = [], time.perf_counter()
            for _ in run(*data, 5 if args.short else 23, 0):
                times.append(time.perf_counter() - start)
                start = time.perf_counter()
            steps, start = int(60 * minutes / statistics.median(times[3:])), time.perf_counter()
            for net in run(*data, steps, 0):
                pass
            took = (time.perf_counter() - start) / 60
            x = demo.draw(net(), diffusion, wanted, 0, steps=5 if args.short else None)
            rows[name].append((took, *score(x, wanted)))
            print("{:12}{:8g}{:8}{:8.2f}{:10.1%}{:9.3f}".format(
                name, minutes, steps, *rows[name][-1]), flush=True)
    figure = Figure((9, 3.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for name, row in rows.items():
        took, accuracy, distance = zip(*row)
        axes[0].semilogx(took, accuracy, "o-", label=name)
        axes[1].semilogx(took, distance, "o-", label=name)
    for ax, what in zip(axes, ("class accuracy", "Frechet distance")):
        ax.set(xlabel="minutes of training on this CPU", ylabel=what)
        ax.set_xticks(args.minutes, [f"{m:g}" for m in args.minutes])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].legend()
    files.keep(figure, (args.out if args.short else demo.HERE / "docs") / "quality.png")


if __name__ == "__main__":
    main()
