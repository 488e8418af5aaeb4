"""Time and memory of a training step and of drawing, as each size grows and the rest stays.

    python benchmarks/scaling.py            a table, and docs/scaling.png
    python benchmarks/scaling.py --short    the two smallest of each, and out/scaling.png

Every row is a program of its own, of one process for each core. Its peak resident memory is the
whole of Python, NumPy and the digits too; "of the step" is what came on top of what it held
before its first step.
"""
import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
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


def megabytes(others=0):
    """The most that this process has had, and so many others that have ended."""
    own, other = (resource.getrusage(who).ru_maxrss / 1024
                  for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own + others * other


def measure(batch, width, side, cores, calls):
    """Milliseconds of a training step or, with calls, of drawing; MB of the process, of it."""
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
    before, times = megabytes(), []
    for _ in range(3 if calls else 9):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    if not calls:
        training.close()
    most = megabytes(0 if calls else cores - 1)
    return 1000 * statistics.median(times), most, most - before


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--short", action="store_true", help="to see that it runs")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(**args.one)))
        return
    print(f"otherwise batch 64, channels 16, 32, 64, 28x28, 2 cores\n\n{'':>10}{'':>10}"
          f"{'ms':>10}{'us an image':>13}{'MB in all':>11}{'MB of it':>10}")
    figure = Figure((15, 3), layout="constrained")
    for ax, (name, values) in zip(figure.subplots(1, len(SERIES)), SERIES.items()):
        values, rows = values[:2] if args.short else values, []
        for value in values:
            case = {**BASE, name: value}
            out = subprocess.run([sys.executable, __file__, "--one", json.dumps(case)],
                                 check=True, stdout=subprocess.PIPE, text=True).stdout
            ms, whole, extra = json.loads(out)
            rows.append((ms, whole))
            print(f"{name:>10}{value:10}{ms:10.1f}{1000 * ms / case['batch']:13.0f}"
                  f"{whole:11.0f}{extra:10.0f}", flush=True)
        ax.loglog(values, [ms for ms, _ in rows], "o-", label="ms")
        ax.loglog(values, [mb for _, mb in rows], "s--", label="MB, whole process")
        ax.set(xlabel={"calls": "calls of the network, drawing 64", "width": "channels on top",
                       "side": "pixels a side"}.get(name, name))
        ax.set_xticks(values, values)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    figure.axes[0].legend()
    files.keep(figure, (demo.OUT if args.short else demo.HERE / "docs") / "scaling.png")


if __name__ == "__main__":
    main()
