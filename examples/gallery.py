"""What the examples share: the bundled digits, the network that comes with the demo, training,
the score's classifier, and a command line with two options. They import it before NumPy, as
cores sets how many threads NumPy takes."""
import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import cores                                                                    # noqa: E402
import demo                                                                     # noqa: E402
import files                                                              # noqa: E402, F401
import pictures                                                                 # noqa: E402
import tinyddpm as td                                                           # noqa: E402
from score import Score                                                   # noqa: E402, F401
from tinyddpm import asnumpy, xp                                          # noqa: E402, F401


def digits():
    """The bundled digits: .images (10000, 28, 28, 1) in [-1, 1], .labels, .test_images, ..."""
    return pictures.load()


def shipped():
    """The network of weights/mnist.npz, which the demo trained, and its diffusion. As a model,
    demo.parallel(net) computes the same on all cores."""
    net, diffusion, _, _ = td.load(demo.WEIGHTS)
    return net, diffusion


def learn(net, diffusion, images, labels=None, *, steps, said="training",
          gradient=td.add_gradient, workers=cores.CORES, **options):
    """td.train with Muon on all cores; returns net with its averaged parameters."""
    options = dict(optimizer="muon", lr=1.2e-2, ema=demo.EMA, chunk=16 * workers, rng=1) | options
    began = time.perf_counter()
    with cores.processes(net, workers, gradient) as shared:
        states = td.train(net, diffusion, images, labels, steps=steps, gradient=shared,
                          **options)
        for state in demo.tqdm(states, said, steps, disable=None):
            pass
    print(f"{said}: {steps:,} steps, {time.perf_counter() - began:.0f} s")
    return net.with_params(state.ema.flat)


def run(example):
    """Call example(out, short) with what the command line says; a failure is one sentence."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=demo.OUT, help="folder of the pictures")
    parser.add_argument("--short", action="store_true", help="a trial in seconds, as CI has it")
    args = parser.parse_args()
    cores.keep_memory()
    with demo.one_sentence(Path(sys.argv[0]).name):
        args.out.mkdir(parents=True, exist_ok=True)
        example(args.out, args.short)
