"""Training beyond digits: pictures of 32x32 in colour and 64x64 in grey, and 128, 256 and 256
channels, all kept or computed again (examples/memory.py), beside PyTorch.

    python benchmarks/large.py              a table, in some ten minutes
    python benchmarks/large.py --short      small networks, to see that it runs

Every row is a program of its own; MB is the most memory that it had, of all its processes, and
images a second are those of its fastest step. PyTorch is needed for its rows: pip install torch
"""
import argparse
import json
import subprocess
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
from scaling import megabytes                                                   # noqa: E402

IMAGES, CHANNELS, BATCH = ((32, 32, 3), (64, 64, 1)), (128, 256, 256), 16
WAYS = "tinyddpm", "tinyddpm, computed again", "PyTorch, channels-last"


def measure(way, image, channels, steps):
    """Seconds of the fastest step, and MB."""
    cores.keep_memory()
    images, diffusion = np.tanh(td.normal(0, (BATCH, *image))), demo.process()
    labels, times = np.arange(BATCH) % 10, []
    net = (Recomputed if "again" in way else td.UNet)(image, channels, attention=(2,))
    if "PyTorch" in way:
        from vs_torch import TorchStep, TorchUNet, torch
        torch.set_num_threads(cores.CORES)
        twin = TorchUNet(net).to(memory_format=torch.channels_last)
        step = TorchStep(twin, twin, diffusion, images, labels, BATCH)
    else:
        training = demo.learn(net, diffusion, images, labels, 10 ** 6, BATCH, "adamw")

        def step():
            next(training)
    for _ in range(steps):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    if "PyTorch" not in way:
        training.close()                # whose other processes end, so that their memory counts
    return min(times), megabytes(0 if "PyTorch" in way else cores.CORES - 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--short", action="store_true")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one)))
        return
    channels, steps = ((8, 16, 16), 2) if args.short else (CHANNELS, 4)
    print(f"batch {BATCH}, channels {channels}\n\n{'':37}ms a step  images/s{'MB':>8}")
    for image in IMAGES:
        for way in WAYS:
            out = subprocess.run(
                [sys.executable, __file__, "--one", json.dumps((way, image, channels, steps))],
                check=True, stdout=subprocess.PIPE, text=True).stdout
            seconds, most = json.loads(out)
            print(f"{'x'.join(map(str, image)):12}{way:25}{1000 * seconds:9.0f}"
                  f"{BATCH / seconds:10.1f}{most:8.0f}", flush=True)


if __name__ == "__main__":
    main()
