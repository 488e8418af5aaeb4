"""Quality against training time: the same network and settings in tinyddpm and in PyTorch.

    python benchmarks/quality.py            a table, and docs/quality.png
    python benchmarks/quality.py --minutes 1 2 --only tinyddpm

Each run has its own learning-rate decay, over as many steps as fit its minutes by a timing of
20 steps. Samples of both, --count digits with the demo's drawing, are drawn by tinyddpm from
the moving average of the parameters, and scored by the classifier of `python demo.py score`.
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

import vs_torch                                                                 # noqa: E402
import numpy as np                                                              # noqa: E402
import torch                                                                    # noqa: E402

import demo                                                                     # noqa: E402
import tinyddpm as td                                                           # noqa: E402
from torch_unet import TorchUNet                                                # noqa: E402


def in_tinyddpm(diffusion, images, labels, steps, seed):
    net = demo.network(seed=seed)
    for state in td.train(net, diffusion, images, labels, steps=steps, batch=demo.BATCH,
                          threads=demo.THREADS, rng=seed + 1, **demo.TRAINING):
        yield lambda: net.with_params(state.ema.flat)


def in_torch(diffusion, images, labels, steps, seed):
    torch.manual_seed(seed)
    net = demo.network(seed=seed)
    twin = TorchUNet(net).to(memory_format=torch.channels_last)
    step = vs_torch.TorchStep(twin, twin, diffusion, images, labels, demo.BATCH, muon=True)
    for i in range(steps):
        lr = demo.TRAINING["lr"] * min(1, (i + 1) / 100)
        step(lr * (1 + math.cos(math.pi * i / steps)) / 2, i)
        yield lambda: net.with_params(twin.flat(net, step.ema))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, nargs="+", default=[1, 2, 5, 10])
    parser.add_argument("--count", type=int, default=1000, help="samples of each")
    parser.add_argument("--only", choices=("tinyddpm", "PyTorch"))
    parser.add_argument("--out", type=Path, default=Path("out"), help="of the classifier")
    args = parser.parse_args()
    demo.keep_memory()
    torch.set_num_threads(demo.THREADS)
    args.data = demo.HERE / "data"
    images, labels = demo.load_digits(args.data, "train")
    diffusion = td.Diffusion(td.SCHEDULES[demo.SCHEDULE](demo.T), demo.PREDICTS)
    classifier, reference = demo.load_classifier(args)
    features = demo.read(classifier, reference)[0]
    runs = {"tinyddpm": in_tinyddpm, "PyTorch": in_torch}
    if args.only:
        runs = {args.only: runs[args.only]}
    wanted = np.arange(args.count) % 10
    rows = {name: [] for name in runs}
    print(f"{'':12}{'minutes':>8}{'steps':>8}{'took':>8}{'accuracy':>10}{'Frechet':>9}")
    for minutes in args.minutes:
        for name, run in runs.items():      # in turns, so that a slow hour slows both
            times, start = [], time.perf_counter()
            for _ in run(diffusion, images, labels, 23, 0):
                times.append(time.perf_counter() - start)
                start = time.perf_counter()
            steps, start = int(60 * minutes / statistics.median(times[3:])), time.perf_counter()
            for net in run(diffusion, images, labels, steps, 0):
                pass
            took = (time.perf_counter() - start) / 60
            model = demo.Model(net(), diffusion)
            read, seen = demo.read(classifier, demo.pad_to_fours(model.draw(wanted, 0)))
            rows[name].append((took, np.mean(seen == wanted), demo.frechet(features, read)))
            print("{:12}{:8g}{:8}{:8.2f}{:10.1%}{:9.3f}".format(
                name, minutes, steps, *rows[name][-1]), flush=True)
    figure, axes = demo.plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for name, row in rows.items():
        took, accuracy, distance = zip(*row)
        axes[0].semilogx(took, accuracy, "o-", label=name)
        axes[1].loglog(took, distance, "o-", label=name)
    for ax, what in zip(axes, ("class accuracy", "Frechet distance")):
        ax.set(xlabel="minutes of training on this CPU", ylabel=what)
        ax.set_xticks(args.minutes, [f"{m:g}" for m in args.minutes])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].legend()
    demo.keep(figure, demo.HERE / "docs" / "quality.png")


if __name__ == "__main__":
    main()
