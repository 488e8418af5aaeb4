"""Quality against calls of the network, for every sampler: which to take for few calls.

    python benchmarks/samplers.py           a table, and docs/samplers.png
    python benchmarks/samplers.py --short   few digits and calls, and out/samplers.png

Draws 500 digits each time, with the guidance of the demo, from OUT/model.npz or the weights
that come with the demo, and scores them with the classifier of benchmarks/score.py.
"""
import argparse
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import cores                                                                    # noqa: E402
import demo                                                                     # noqa: E402
import files                                                                    # noqa: E402
import numpy as np                                                              # noqa: E402
import pictures                                                                 # noqa: E402
from matplotlib.figure import Figure                                            # noqa: E402
from score import Score                                                         # noqa: E402

RUNS = {"DDIM, eta 0": ("ddim", 0.0), "DDIM, eta 0.6": ("ddim", 0.6),
        "DDPM = DDIM, eta 1": ("ddim", 1.0), "DPM-Solver++(2M)": ("dpm_solver", None),
        "Heun": ("heun", None)}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=demo.OUT, help="where model.npz is")
    parser.add_argument("--count", type=int, default=500, help="digits each time")
    parser.add_argument("--calls", type=int, nargs="+", default=[5, 7, 10, 15, 20, 50])
    parser.add_argument("--guidance", type=float, default=demo.DRAWING["guidance"])
    parser.add_argument("--save", type=Path, help="directory for the samples, as .npz")
    parser.add_argument("--model", type=Path, help="weights to draw with")
    parser.add_argument("--short", action="store_true", help="to see that it runs")
    args = parser.parse_args()
    if args.short:
        args.count, args.calls = 100, [3, 5]
    cores.keep_memory()
    net, diffusion, _ = demo.trained(args)
    digits = pictures.load()
    score, labels = Score(digits, args.out), np.arange(args.count) % net.classes
    order = np.argsort(digits.test_labels, kind="stable").reshape(net.classes, -1)
    some = order[:, :args.count // net.classes].T.ravel()       # of each class as many
    accuracy, distance = score(digits.test_images[some], digits.test_labels[some])
    print(f"{'':20}{'calls':>6}{'seconds':>9}{'accuracy':>10}{'Frechet':>9}\n"
          f"{'test digits':35}{accuracy:10.1%}{distance:9.3f}")
    figure = Figure((10, 3.4), layout="constrained")
    axes = figure.subplots(1, 2)
    for name, (sampler, eta) in RUNS.items():
        rows = []
        for calls in args.calls:
            steps = (calls + 1) // 2 if sampler == "heun" else calls
            start = time.perf_counter()
            x = demo.draw(net, diffusion, labels, 0, sampler=sampler, steps=steps, eta=eta,
                          guidance=args.guidance)
            took = time.perf_counter() - start
            calls = 2 * steps - 1 if sampler == "heun" else steps
            rows.append((calls, *score(x, labels)))
            print(f"{name:20}{calls:6}{took:9.1f}{rows[-1][1]:10.1%}{rows[-1][2]:9.3f}",
                  flush=True)
            if args.save:
                args.save.mkdir(parents=True, exist_ok=True)
                np.savez(args.save / f"{sampler}-{eta or 0:g}-{calls}.npz", x=x, y=labels)
        calls, accuracy, distance = zip(*rows)
        axes[0].semilogx(calls, accuracy, "o-", label=name)
        axes[1].semilogx(calls, distance, "o-", label=name)
    for ax, what in zip(axes, ("class accuracy", "Frechet distance")):
        ax.set(xlabel="calls of the network", ylabel=what)
        ax.set_xticks(args.calls, args.calls)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].legend()
    files.keep(figure, (args.out if args.short else demo.HERE / "docs") / "samplers.png")


if __name__ == "__main__":
    main()
