"""Time and memory of a training step and of drawing, as each size grows and the rest stays.

    python benchmarks/scaling.py            a table, and docs/scaling.png
    python benchmarks/scaling.py --short    the two smallest of each, and out/scaling.png

Every row is measured in a new process, which trains with one for each core; MB is the sum of
their peaks of resident memory, with Python, NumPy and the images.
"""
import argparse
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np                                                              # noqa: E402
from matplotlib.figure import Figure                                            # noqa: E402

import demo                                                                     # noqa: E402
import files                                                                    # noqa: E402
import tinyddpm as td                                                           # noqa: E402
from cores import keep_memory, parallel                                         # noqa: E402

BASE = {"batch": 64, "width": 16, "side": 28, "cores": 2, "calls": 0}
SERIES = {"batch": (1, 16, 32, 64, 128, 256), "width": (8, 16, 32, 64), "cores": (1, 2),
          "side": (14, 28, 56), "calls": (5, 10, 20, 50)}


def anew(function, *arguments):
    """What it returns in a new process, which has had no memory yet."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def megabytes(others=0):
    """The most that this process has had, and so many others that have ended."""
    own, other = (resource.getrusage(who).ru_maxrss / 1024
                  for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own + others * other


def measure(batch, width, side, cores, calls):
    """Milliseconds of a training step or, with calls, of drawing; MB."""
    keep_memory()
    rng = np.random.default_rng(0)
    net = demo.network((side, side, 1), (width, 2 * width, 4 * width))
    diffusion = demo.process()
    images = np.clip(td.normal(rng, (1000, side, side, 1)), -1, 1)
    if calls:
        model = td.guided(parallel(net, cores), np.arange(batch) % 10, net.null, 2.0)
        x = td.normal(rng, (batch, side, side, 1))

        def step():
            td.sample(td.ddim(model, diffusion, x, steps=calls))
    else:
        demo.CORES = cores
        training = demo.learn(net, diffusion, images, np.arange(1000) % 10, 10 ** 6, batch)

        def step():
            next(training)
    times = []
    for _ in range(3 if calls else 9):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    if not calls:
        training.close()
    return 1000 * statistics.median(times), megabytes(0 if calls else cores - 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="to see that it runs")
    args = parser.parse_args()
    print(f"otherwise batch 64, channels 16, 32, 64, 28x28, 2 cores\n\n{'':>10}{'':>10}"
          f"{'ms':>10}{'us an image':>13}{'MB':>8}")
    figure = Figure((15, 3), layout="constrained")
    for ax, (name, values) in zip(figure.subplots(1, len(SERIES)), SERIES.items()):
        values, rows = values[:2] if args.short else values, []
        for value in values:
            case = {**BASE, name: value}
            ms, mb = anew(measure, *case.values())
            rows.append((ms, mb))
            print(f"{name:>10}{value:10}{ms:10.1f}{1000 * ms / case['batch']:13.0f}{mb:8.0f}",
                  flush=True)
        ax.loglog(values, [ms for ms, _ in rows], "o-", label="ms")
        ax.loglog(values, [mb for _, mb in rows], "s--", label="MB")
        ax.set(xlabel={"calls": "calls of the network, drawing 64", "width": "channels on top",
                       "side": "pixels a side"}.get(name, name))
        ax.set_xticks(values, values)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    figure.axes[0].legend()
    files.keep(figure, (demo.OUT if args.short else demo.HERE / "docs") / "scaling.png")


if __name__ == "__main__":
    main()
