"""tinyddpm against PyTorch on the same network, weights and batch, in turns in one run.

    python benchmarks/vs_torch.py               medians, and ratios to PyTorch's better format
    python benchmarks/vs_torch.py --isa avx2    both libraries held to AVX2 instructions
    python benchmarks/vs_torch.py --compile     torch.compile as well
    python benchmarks/vs_torch.py --short       each once, to see that it runs

With --isa best each library takes the fastest instructions that it finds, whatever the
environment holds OpenBLAS to; with --isa env the environment decides. On a GPU both use TF32.

First both networks' outputs and gradients are compared. A training step is: draw a batch and
its noise, forward, backward, clip, AdamW, EMA. A sampling forward is the network's answer
alone.
PyTorch is needed for this alone: pip install torch
"""
import argparse
import os
import statistics
import sys
import time
from pathlib import Path

ISA = argparse.ArgumentParser(add_help=False)
ISA.add_argument("--isa", choices=("best", "avx2", "env"), default="best", help="instructions")
isa = ISA.parse_known_args()[0].isa             # before NumPy and PyTorch look
if isa == "best":
    os.environ.pop("OPENBLAS_CORETYPE", None)
elif isa == "avx2":
    os.environ |= {"OPENBLAS_CORETYPE": "Haswell", "ONEDNN_MAX_CPU_ISA": "AVX2",
                   "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
os.environ.setdefault("CUPY_TF32", "1")         # on a GPU, as PyTorch's line in main()
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import cores                                                                    # noqa: E402
import numpy as np                                                              # noqa: E402
import torch                                                                    # noqa: E402
import torch.nn.functional as F                                                 # noqa: E402

import demo                                                                     # noqa: E402
import pictures                                                                 # noqa: E402
import tinyddpm as td                                                           # noqa: E402
from torch_unet import TorchUNet                                                # noqa: E402

DEVICE = "cuda" if demo.ON_GPU else "cpu"
NETS = {"the demo's, 28x28": demo.network}
if demo.ON_GPU:
    NETS["32x32x3, channels 128, 256, 256"] = lambda: td.UNet((32, 32, 3), (128, 256, 256))
else:
    NETS["28x28, channels 32, 64, 128"] = lambda: td.UNet(channels=(32, 64, 128))


def compare(make):
    """The largest differences of output and gradient, relative to the largest value."""
    net = make()
    rng = np.random.default_rng(0)
    net.params.flat[:] += 0.05 * td.normal(rng, net.params.flat.shape)  # no layer starts at 0
    x, dy = (td.normal(rng, (8, *net.image)) for _ in range(2))
    t, y = rng.integers(1, 1001, 8), rng.integers(0, 11, 8)
    out, back = net.forward(x, t, y)
    back(dy)
    twin = TorchUNet(net).to(DEVICE)
    other = twin(*(torch.tensor(td.asnumpy(a), device=DEVICE) for a in (x, t, y)))
    other.backward(torch.tensor(td.asnumpy(dy), device=DEVICE))
    pairs = (out, other.detach().cpu().numpy()), (net.grads.flat, twin.gradients(net))
    pairs = [[td.asnumpy(a) for a in pair] for pair in pairs]
    return [float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs]


def ours(make, diffusion, images, labels, batch):
    """Two functions: one training step, one sampling forward."""
    net = make()
    images = images_for(net, images)
    training = demo.learn(net, diffusion, images, labels, 10 ** 6, batch, "adamw")
    model = net if demo.ON_GPU else demo.parallel(net)
    x = td.normal(np.random.default_rng(0), (batch, *net.image))
    t, y = np.full(batch, 500), np.arange(batch) % 10
    return lambda: next(training), lambda: model(x, t, y)


class TorchStep:
    """The training step of tinyddpm.train, as PyTorch users write it."""

    def __init__(self, net, forward, diffusion, images, labels, batch, muon=False):
        self.net, self.forward, self.batch = net, forward, batch
        self.images = torch.tensor(images, device=DEVICE)
        self.labels = torch.tensor(labels, device=DEVICE)
        self.abar = torch.tensor(diffusion.abar, dtype=torch.float32, device=DEVICE)
        self.params = list(net.parameters())
        self.ema = [p.detach().clone() for p in self.params]
        self.matrices = {p: torch.zeros_like(p) for p in net.top.parameters()
                         if muon and p.ndim > 1}
        self.adam = torch.optim.AdamW([p for p in self.params if p not in self.matrices],
                                      betas=(0.9, 0.99), weight_decay=0, fused=True)

    def __call__(self, lr=1e-3, n=10 ** 6):
        batch = self.batch
        pick = torch.randint(len(self.images), (batch,), device=DEVICE)
        t = torch.randint(1, len(self.abar), (batch,), device=DEVICE)
        dropped = torch.rand(batch, device=DEVICE) < 0.1
        y = torch.where(dropped, self.net.null, self.labels[pick])
        x0, abar = self.images[pick], self.abar[t][:, None, None, None]
        eps, signal, noise = torch.randn_like(x0), abar.sqrt(), (1 - abar).sqrt()
        out = self.forward(signal * x0 + noise * eps, t, y)
        loss = F.mse_loss(out, signal * eps - noise * x0)
        self.net.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        self.muon_step(lr)
        decay = min(demo.EMA, (1 + n) / (10 + n))
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.params], 1 - decay)
        return loss     # not looked at: that would be waiting for a GPU

    @torch.no_grad()
    def muon_step(self, lr):
        """As tinyddpm.AdamW does with muon=True."""
        for p, mean in self.matrices.items():
            mean.lerp_(p.grad, 0.1)
            m = torch.lerp(mean, p.grad, 0.1).flatten(1)
            wide = m if m.shape[0] <= m.shape[1] else m.T
            wide = wide / (wide.norm() + 1e-12)
            for _ in range(5):
                gram = wide @ wide.T
                wide = 3.4445 * wide - (4.775 * gram - 2.0315 * gram @ gram) @ wide
            m = wide if m.shape[0] <= m.shape[1] else wide.T
            p.sub_(0.2 * lr * max(m.shape) ** 0.5 * m.reshape(p.shape))


def theirs(make, diffusion, images, labels, batch, channels_last, compiled=False):
    net = make()
    images = images_for(net, images)
    net = TorchUNet(net).to(DEVICE)
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
    forward = torch.compile(net) if compiled else net
    x = torch.randn(batch, *images.shape[1:], device=DEVICE)
    t, y = torch.full((batch,), 500, device=DEVICE), torch.arange(batch, device=DEVICE) % 10

    def draw():
        with torch.inference_mode():
            return forward(x, t, y)
    return TorchStep(net, forward, diffusion, images, labels, batch), draw


def images_for(net, images):
    """The digits, or noise where the network takes other images."""
    if images.shape[1:] == net.image:
        return images
    noise = np.random.default_rng(0).standard_normal((2000, *net.image), dtype=np.float32)
    return np.clip(noise, -1, 1)


def seconds(function):
    start = time.perf_counter()
    function()
    if demo.ON_GPU:
        td.xp.cuda.Device().synchronize()
        torch.cuda.synchronize()
    return time.perf_counter() - start


def sgemm(matmul, ones):
    torch.set_num_threads(1)
    dtype = np.float32 if ones is np.ones else torch.float32
    a = ones((1024, 1024), dtype=dtype)
    took = statistics.median(seconds(lambda: matmul(a, a)) for _ in range(20))
    torch.set_num_threads(cores.CORES)
    return 2 * 1024 ** 3 / took / 1e9


def alternate(functions, repeats):
    """Medians of each function's seconds, all called in turn."""
    times = {name: [] for name in functions}
    for _ in range(3 + repeats):
        for name, function in functions.items():
            times[name].append(seconds(function))
    return {name: statistics.median(values[3:]) for name, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, parents=[ISA],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--short", action="store_true")
    args = parser.parse_args()
    batches, repeats = ([8], 1) if args.short else (args.batch, args.repeats)
    cores.keep_memory()
    torch.set_num_threads(cores.CORES)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    numpys, torchs = sgemm(np.matmul, np.ones), sgemm(torch.matmul, torch.ones)
    print(f"NumPy {np.__version__}, PyTorch {torch.__version__}, {cores.CORES} cores, "
          f"instructions: {args.isa}; sgemm on one thread: NumPy {numpys:.0f} GFLOP/s, "
          f"PyTorch {torchs:.0f}")
    digits, diffusion = pictures.load(), demo.process()
    images, labels = digits.images[:2000], digits.labels[:2000]
    for title, make in NETS.items():
        output, gradient = compare(make)
        print(f"\n{title}: outputs differ by {output:.0e}, gradients by {gradient:.0e} of the "
              "largest")
        for batch in batches:
            data = diffusion, images, labels, batch
            runs = {"tinyddpm": ours(make, *data), "contiguous": theirs(make, *data, False),
                    "channels-last": theirs(make, *data, True)}
            if args.compile:
                runs["compiled"] = theirs(make, *data, True, True)
            for i, what in enumerate(("training step", "sampling forward")):
                ms = alternate({name: run[i] for name, run in runs.items()}, repeats)
                best = min(ms["contiguous"], ms["channels-last"])
                print(f"  batch {batch:4} {what:17}" + "  ".join(
                    f"{name} {1000 * value:.1f}" for name, value in ms.items())
                    + f"  ratio {ms['tinyddpm'] / best:.2f}", flush=True)


if __name__ == "__main__":
    main()
