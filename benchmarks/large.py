"""Training beyond digits: pictures of 32x32 in colour and 64x64 in grey, and 128, 256 and 256
channels, all kept or computed again (examples/memory.py), beside PyTorch.

    python benchmarks/large.py              a table, in two minutes
    python benchmarks/large.py --short      small networks, to see that it runs

Every row is measured in a new process; MB is the sum of the peaks of all processes, in which
what they share counts twice, and images a second are those of the fastest step. PyTorch is
needed for its rows: pip install torch
"""
import argparse
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "examples")]

import cores                                                                    # noqa: E402
import numpy as np                                                              # noqa: E402

import demo                                                                     # noqa: E402
import tinyddpm as td                                                           # noqa: E402
from memory import Recomputed                                                   # noqa: E402
from scaling import anew, megabytes                                               # noqa: E402

IMAGES, CHANNELS, BATCH = ((32, 32, 3), (64, 64, 1)), (128, 256, 256), 16
WAYS = "tinyddpm", "tinyddpm, computed again", "PyTorch, channels-last"


def measure(way, image, channels, steps):
    """Seconds of the fastest step, and MB."""
    cores.keep_memory()
    images, diffusion = np.tanh(td.normal(0, (BATCH, *image))), demo.process()
    labels, others = np.arange(BATCH) % 10, cores.CORES - 1
    net = (Recomputed if "again" in way else td.UNet)(image, channels, attention=(2,))
    if "PyTorch" in way:
        from vs_torch import TorchStep, TorchUNet, torch
        torch.set_num_threads(cores.CORES)
        twin, others = TorchUNet(net).to(memory_format=torch.channels_last), 0
        step = TorchStep(twin, twin, diffusion, images, labels, BATCH)
        training = (step() for _ in range(steps))
    else:
        training = demo.learn(net, diffusion, images, labels, 10 ** 6, BATCH, "adamw")
    times = [time.perf_counter()]
    for _ in range(steps):
        next(training)
        times.append(time.perf_counter())
    training.close()                    # other processes end, so that their memory counts
    return np.diff(times).min(), megabytes(others)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true")
    short = parser.parse_args().short
    channels, steps = ((8, 16, 16), 2) if short else (CHANNELS, 4)
    print(f"batch {BATCH}, channels {channels}\n\n{'':37}ms a step  images/s{'MB':>8}")
    for image in IMAGES:
        for way in WAYS:
            seconds, most = anew(measure, way, image, channels, steps)
            print(f"{'x'.join(map(str, image)):12}{way:25}{1000 * seconds:9.0f}"
                  f"{BATCH / seconds:10.1f}{most:8.0f}", flush=True)


if __name__ == "__main__":
    main()
