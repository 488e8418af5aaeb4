"""Time and memory of a training step and of drawing, as each size grows and the rest stays.

    python benchmarks/scaling.py            a table, and docs/scaling.png
    python benchmarks/scaling.py --short    the two smallest of each, and out/scaling.png

Every row is a process of its own, whose peak resident memory is the whole of Python, NumPy and
the digits too; "of the step" is what came on top of what it held before its first step.
"""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np                                                              # noqa: E402
from matplotlib.figure import Figure                                            # noqa: E402

import demo                                                                     # noqa: E402
import files                                                                    # noqa: E402
import tinyddpm as td                                                           # noqa: E402

BASE = {"batch": 64, "width": 16, "side": 28, "threads": 2, "calls": 0}
SERIES = {"batch": (1, 16, 32, 64, 128, 256), "width": (8, 16, 32, 64), "threads": (1, 2),
          "side": (14, 28, 56), "calls": (5, 10, 20, 50)}


def megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(batch, width, side, threads, calls):
    """Milliseconds of a training step or, with calls, of drawing; MB of the process, of it."""
    demo.keep_memory()
    rng = np.random.default_rng(0)
    net = demo.network((side, side, 1), (width, 2 * width, 4 * width))
    diffusion = demo.process()
    images = np.clip(td.normal(rng, (1000, side, side, 1)), -1, 1)
    if calls:
        model = td.guided(demo.parallel(net, threads), np.arange(batch) % 10, net.null, 2.0)
        x = td.normal(rng, (batch, side, side, 1))

        def step():
            td.sample(td.ddim(model, diffusion, x, steps=calls))
    else:
        demo.THREADS = threads
        training = demo.learn(net, diffusion, images, np.arange(1000) % 10, 10 ** 6, batch)

        def step():
            next(training)
    before, times = megabytes(), []
    for _ in range(3 if calls else 9):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times), megabytes(), megabytes() - before


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--short", action="store_true", help="to see that it runs")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(**args.one)))
        return
    print(f"otherwise batch 64, channels 16, 32, 64, 28x28, 2 threads\n\n{'':>10}{'':>10}"
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
