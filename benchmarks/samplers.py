"""Quality against calls of the network, for every sampler: which to take for few calls.

    python benchmarks/samplers.py           a table, and docs/samplers.png

Draws 500 digits each time, with the guidance of the demo, from OUT/model.npz or the weights
that come with the demo, and scores them with the classifier of `python demo.py score`.
"""
import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import demo                                                                     # noqa: E402
import numpy as np                                                              # noqa: E402

RUNS = {"DDIM, eta 0": ("ddim", 0.0), "DDIM, eta 0.6": ("ddim", 0.6),
        "DDPM = DDIM, eta 1": ("ddim", 1.0), "DPM-Solver++(2M)": ("dpm_solver", 0),
        "Heun": ("heun", 0)}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=demo.OUT, help="where model.npz is")
    parser.add_argument("--count", type=int, default=500, help="digits each time")
    parser.add_argument("--calls", type=int, nargs="+", default=[5, 7, 10, 15, 20, 50])
    parser.add_argument("--guidance", type=float, default=demo.DRAWING["guidance"])
    parser.add_argument("--save", type=Path, help="directory for the samples, as .npz")
    args = parser.parse_args()
    demo.keep_memory()
    args.data = demo.HERE / "data"
    model = demo.trained(args.out)
    classifier, images = demo.load_classifier(args)
    reference = demo.read(classifier, images)[0]
    labels = np.arange(args.count) % model.net.classes
    test, test_labels = demo.load_digits(args.data, "t10k")
    order = np.argsort(test_labels, kind="stable").reshape(model.net.classes, -1)
    some = order[:, :args.count // model.net.classes].T.ravel()       # of each class as many
    read, seen = demo.read(classifier, demo.pad_to_fours(test[some]))
    print(f"{'':20}{'calls':>6}{'seconds':>9}{'accuracy':>10}{'Frechet':>9}\n"
          f"{'test digits':35}{np.mean(seen == test_labels[some]):10.1%}"
          f"{demo.frechet(reference, read):9.3f}")
    figure, axes = demo.plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    for name, (sampler, eta) in RUNS.items():
        rows = []
        for calls in args.calls:
            steps = (calls + 1) // 2 if sampler == "heun" else calls
            start = time.perf_counter()
            x = model.draw(labels, 0, sampler=sampler, steps=steps, eta=eta,
                           guidance=args.guidance)
            took = time.perf_counter() - start
            calls = 2 * steps - 1 if sampler == "heun" else steps
            read, seen = demo.read(classifier, demo.pad_to_fours(x))
            rows.append((calls, np.mean(seen == labels), demo.frechet(reference, read)))
            print(f"{name:20}{calls:6}{took:9.1f}{rows[-1][1]:10.1%}{rows[-1][2]:9.3f}",
                  flush=True)
            if args.save:
                args.save.mkdir(parents=True, exist_ok=True)
                np.savez(args.save / f"{sampler}-{eta:g}-{calls}.npz", x=x, y=labels)
        calls, accuracy, distance = zip(*rows)
        axes[0].semilogx(calls, accuracy, "o-", label=name)
        axes[1].semilogx(calls, distance, "o-", label=name)
    for ax, what in zip(axes, ("class accuracy", "Frechet distance")):
        ax.set(xlabel="calls of the network", ylabel=what)
        ax.set_xticks(args.calls, args.calls)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].legend()
    demo.keep(figure, demo.HERE / "docs" / "samplers.png")


if __name__ == "__main__":
    main()
