"""The tour of tinyddpm on MNIST: train, sample, and a picture of every idea on the way.

    python demo.py              train on the bundled digits (again: go on from the checkpoint),
                                then draw out/samples.png, out/denoising.png, out/loss.png
    python demo.py COMMAND      one of the others, below; COMMAND --help lists its options
"""
import argparse
import contextlib
import ctypes
import gzip
import hashlib
import http.client
import math
import os
import signal
import sys
import time
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

# Before NumPy starts: one thread to a product, because we cut the batch over threads instead.
for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS",
             "VECLIB_MAXIMUM_THREADS"):
    os.environ.setdefault(name, "1")

import matplotlib                                                               # noqa: E402
matplotlib.use("Agg")
import matplotlib.pyplot as plt                                                 # noqa: E402
import numpy as np                                                              # noqa: E402
from tqdm import tqdm                                                           # noqa: E402

import pictures                                                                 # noqa: E402
import tinyddpm as td                                                           # noqa: E402
from tinyddpm import asnumpy, xp                                                # noqa: E402

HERE = Path(__file__).parent
ON_GPU = xp is not np
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

# Chosen by measurement: the best found for five minutes on two CPU cores. For a GPU, larger.
CHANNELS = (64, 128, 128) if ON_GPU else (16, 32, 64)
STEPS, BATCH = (6000, 128) if ON_GPU else (1900, 64)
PREDICTS, TRAINING = "v", dict(optimizer="muon", lr=1.2e-2, ema=0.995)
DRAWING = dict(sampler="ddim", steps=20, eta=0.6, guidance=1.6)
GUIDED_BELOW = 0.8      # guidance above w = 1 waits until t has come down to this share of T
SCHEDULE, T = "cosine", 1000
SAMPLERS = {"ddpm": td.ddpm, "ddim": td.ddim, "dpm_solver": td.dpm_solver, "heun": td.heun}
OUT = Path("out")
WEIGHTS = HERE / "weights" / "mnist.npz"


def keep_memory():
    """Ask glibc to keep what NumPy frees, instead of giving it back to the kernel after every
    step and getting it anew, page by page."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):      # another C library
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-3, 32 << 20)      # M_MMAP_THRESHOLD, at its highest
            libc.mallopt(-1, 1 << 30)       # M_TRIM_THRESHOLD


# ------------------------------------------------------------------------------------- data

MNIST_URL = "https://storage.googleapis.com/cvdf-datasets/mnist/"
MNIST_SHA256 = {    # of the unpacked files: one file can be packed in many ways
    "train-images-idx3-ubyte":
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte":
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte":
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte":
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"}


def load_digits(path, split):
    """Images (N, H, W, C) float32 in [-1, 1] and labels (N,) of the split "train" or "t10k",
    from whatever pictures.load reads. Pictures without classes are all of one."""
    data = pictures.load(path)
    images, labels = ((data.images, data.labels) if split == "train"
                      else (data.test_images, data.test_labels))
    if images is None:
        raise ValueError(f"{path} has no test pictures, which this command needs")
    return images, np.zeros(len(images), int) if labels is None else labels


TIMEOUT = 30        # seconds without a byte


def download(args):
    """Fetch the full MNIST, 60,000 and 10,000 digits, and check it."""
    args.data.mkdir(parents=True, exist_ok=True)
    for name, digest in MNIST_SHA256.items():
        url, path = args.url.rstrip("/") + f"/{name}.gz", args.data / f"{name}.gz"
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as reply:
                packed = reply.read()
            found = hashlib.sha256(gzip.decompress(packed)).hexdigest()
        except (OSError, EOFError, zlib.error, http.client.HTTPException) as error:
            getattr(error, "close", str)()      # a reply of 404 is an open file too
            raise ValueError(f"{url} could not be fetched: {error}") from error
        if found != digest:
            raise ValueError(f"{url} is not the file that was asked for: its SHA-256 is "
                             f"{found}, not {digest}")
        write(path, lambda file: file.write(packed))
        print(f"{path}: {len(packed):,} bytes, SHA-256 as it should be")
    print(f"Train on it: python demo.py --data {args.data}")


def write(path, make):
    """make(an open file), in the end renamed to path: it is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with td.written(path) as file:
        make(file)


# --------------------------------------------------------------------------------- pictures

def tile(images):
    """(rows, columns, H, W, C) in [-1, 1] to one picture with a thin line between."""
    images = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-1)
    rows, columns, H, W, C = images.shape
    page = images.transpose(0, 2, 1, 3, 4).reshape(rows * H, columns * W, C)
    page = np.clip((page + 1) / 2, 0, 1)
    return page if C == 3 else page[:, :, 0]


def show(ax, images, columns=(), rows=()):
    """Draw rows of images with a heading for each column and a name for each row."""
    images = asnumpy(images)
    n_rows, n_columns, H, W = images.shape[:4]
    ax.imshow(tile(images), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set_xticks((np.arange(n_columns) + 0.5) * (W + 2) - 0.5 if len(columns) else [], columns)
    ax.set_yticks((np.arange(n_rows) + 0.5) * (H + 2) - 0.5 if len(rows) else [], rows)
    ax.tick_params(length=0, top=False, bottom=False, labeltop=True, labelbottom=False,
                   labelsize=9)
    for side in ax.spines.values():
        side.set_visible(False)


def sheet(path, images, columns=(), rows=(), cell=0.6):
    """Write a picture of rows of images, each `cell` inches wide."""
    n_rows, n_columns, H, W = images.shape[:4]
    figure, ax = plt.subplots(figsize=(cell * n_columns, cell * n_rows * H / W), layout="none")
    ax.set_position((0, 0, 1, 1))
    show(ax, images, columns, rows)
    keep(figure, path)


def keep(figure, path):
    try:
        write(path, lambda file: figure.savefig(file, dpi=130, bbox_inches="tight"))
    finally:
        plt.close(figure)
    print(f"wrote {path}")


def plot_loss(path, losses):
    losses = np.array(losses)
    width = max(1, len(losses) // 50)
    smooth = np.convolve(losses, np.ones(width) / width, "valid")
    figure, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
    ax.semilogy(np.arange(1, len(losses) + 1), losses, lw=0.5, alpha=0.4, label="each step")
    ax.semilogy(np.arange(len(smooth)) + (width + 1) / 2, smooth, lw=1.5,
                label=f"mean of {width} steps")
    ax.set(xlabel="step", ylabel="mean squared error of v",
           title=f"{smooth[-1]:.4f} at the end")
    ax.grid(alpha=0.3, which="both")
    ax.legend()
    keep(figure, path)


# --------------------------------------------------------------------------------- training

def train(args):
    """Train on DATA, or go on from OUT/model.npz, then draw samples."""
    began = time.perf_counter()
    images, labels = load_digits(args.data, "train")
    for sentence in pictures.load(args.data).said:
        print(sentence)
    path = args.out / "model.npz"
    asked = {name: value for name, value in vars(args).items()
             if name in ("steps", "batch", "lr", "channels", "seed") and value is not None}
    if path.exists() and not args.fresh:
        net, diffusion, state, settings = checkpoint(path, to_train=True)
        was = settings | {"channels": list(net.channels)}
        for name, value in {**asked, "data": crc(images, labels)}.items():
            if was[name] != value:
                raise ValueError(f"{path} was trained with {name} {was[name]}, and {value} is "
                                 "asked for now; --fresh starts over, --out keeps both")
        print(f"{path}: {state.step} of {settings['steps']} steps are done")
    else:
        settings = {"steps": STEPS, "batch": BATCH, "lr": TRAINING["lr"], "seed": 0,
                    "schedule": SCHEDULE, "T": T, "data": crc(images, labels), "losses": [],
                    **asked}
        channels = settings.pop("channels", CHANNELS)
        net = network(images.shape[1:], channels, int(labels.max()) + 1, settings["seed"])
        state, diffusion = None, td.Diffusion(td.SCHEDULES[SCHEDULE](T), PREDICTS)
        print(f"{len(images):,} images {net.image}, {net.classes} classes, "
              f"{net.params.flat.size:,} parameters, {xp.__name__}"
              + ("" if ON_GPU else f" on {THREADS} threads"))
    losses, steps, batch = settings["losses"], settings["steps"], settings["batch"]
    training = td.train(net, diffusion, images, labels, steps=steps, batch=batch, state=state,
                        rng=settings["seed"] + 1, threads=THREADS,
                        **TRAINING | {"lr": settings["lr"]})

    def save():
        args.out.mkdir(parents=True, exist_ok=True)
        td.save(path, net, diffusion, state, **settings)

    args.out.mkdir(parents=True, exist_ok=True)     # if that fails, then now, not at the end
    done = state.step if state else 0
    with (Interrupt() as interrupt,
          tqdm(total=steps * batch, initial=done * batch, unit=" images", unit_scale=True,
               smoothing=0.05) as bar):
        saved = time.perf_counter()
        for state in training:
            losses.append(state.loss)
            if state.step % (50 if ON_GPU else 10) == 0:        # a GPU has to be waited for
                recent = np.mean(losses[-50:])
                bar.set_postfix_str(f"loss {recent:.4f}", refresh=False)
            bar.update(batch)
            if interrupt.asked or time.perf_counter() - saved > 30 or state.step == steps:
                save()
                saved = time.perf_counter()
            if interrupt.asked:
                break
    if state.step < steps:
        raise SystemExit(f"stopped after step {state.step} of {steps}, which {path} holds; "
                         "the same command goes on from there")
    print(f"trained for {steps} steps, this time in {time.perf_counter() - began:.0f} s")

    model = trained(args.out)
    labels = np.tile(np.arange(net.classes), 10)
    images = model.draw(labels, settings["seed"])
    sheet(args.out / "samples.png", images.reshape(10, net.classes, *net.image),
          range(net.classes))
    chosen = np.arange(0, net.classes, max(1, net.classes // 5))
    frames = dict(model.frames(chosen, settings["seed"], **DRAWING))
    at = np.array(list(frames))[np.linspace(0, len(frames) - 1, 10).astype(int)]
    sheet(args.out / "denoising.png", np.stack([asnumpy(frames[t]) for t in at], 1),
          [f"t = {t}" for t in at])
    plot_loss(args.out / "loss.png", losses)
    print(f"all of it took {time.perf_counter() - began:.0f} s")


def network(image=(28, 28, 1), channels=CHANNELS, classes=10, seed=0):
    """The demo's: more blocks, and attention, at the lowest level, where a picture is small."""
    lowest = len(channels) - 1
    return td.UNet(image=image, channels=channels, classes=classes, heads=1, rng=seed,
                   blocks=(1,) * lowest + (2,), attention=(lowest,))


def checkpoint(path, to_train=False):
    """What `train` saved: network, diffusion, State, settings. Another one is a ValueError."""
    net, diffusion, state, settings = td.load(path)
    names = {"data", "steps"} | ({"batch", "lr", "seed", "losses"} if state else set())
    if not names <= settings.keys():
        raise ValueError(f"{path} is a checkpoint, but not one of this demo's")
    if to_train and state is None:
        raise ValueError(f"{path} holds weights alone, which can draw but not be trained on")
    return net, diffusion, state, settings


def crc(images, labels):
    """A short name for these data."""
    return f"{zlib.crc32(labels, zlib.crc32(np.ascontiguousarray(images))):08x}"


class Interrupt:
    """Ctrl-C lets the step under way end first; pressed again, it stops at once."""

    def __enter__(self):
        self.asked = False
        self.before = signal.signal(signal.SIGINT, self.press)
        return self

    def press(self, number, frame):
        self.asked = True
        signal.signal(signal.SIGINT, self.before)

    def __exit__(self, *error):
        signal.signal(signal.SIGINT, self.before)


# --------------------------------------------------------------------------------- sampling

def parallel(model, threads, chunk=32):
    """The same model, its batch cut into equal parts of at most chunk images, as many for each
    thread."""
    pool = ThreadPoolExecutor(threads)

    def model_in_parts(*arrays):
        n = len(arrays[0])
        parts = min(n, threads * -(-n // (threads * chunk)))
        cuts = [slice(n * i // parts, n * (i + 1) // parts) for i in range(parts)]
        outs = pool.map(lambda cut: model(*(a[cut] for a in arrays)), cuts)
        return xp.concatenate(list(outs))
    return model_in_parts


class Model:
    """A network ready to draw, and its diffusion."""

    def __init__(self, net, diffusion):
        threads, chunk = (1, 500) if ON_GPU else (THREADS, 32)
        self.net, self.diffusion = net, diffusion
        self.model = parallel(net, threads, chunk)

    def guided(self, labels, w):
        interval = (1, max(1, round(GUIDED_BELOW * self.diffusion.T))) if w > 1 else None
        return td.guided(self.model, labels, self.net.null, w, interval=interval)

    def frames(self, labels, seed, sampler, steps, eta, guidance):
        """(t, x_t), from x_T to x_0. The seed decides x_T and the noise on the way."""
        rng = np.random.default_rng(seed)
        x = td.normal(rng, (len(labels), *self.net.image))
        yield self.diffusion.T, x
        options = {"eta": eta} if sampler == "ddim" else {}
        yield from SAMPLERS[sampler](self.guided(labels, guidance), self.diffusion, x, rng,
                                     steps=steps, **options)

    def draw(self, labels, seed, **drawing):
        """x_0, host (N, H, W, C), with a progress bar."""
        steps = self.diffusion.T if drawing.get("sampler") == "ddpm" else DRAWING["steps"]
        drawing = {**DRAWING, "steps": steps, **drawing}
        title = f"{len(labels)} images, {drawing['sampler']}, guidance {drawing['guidance']}"
        frames = self.frames(labels, seed, **drawing)
        return asnumpy(td.sample(tqdm(frames, title, drawing["steps"] + 1, unit=" steps")))


def trained(out):
    """The Model of OUT/model.npz, with the EMA of its parameters. Before anything is trained,
    that of the weights which come with the demo."""
    path = out / "model.npz"
    if not path.exists():
        if out != OUT:
            raise FileNotFoundError(f"{path} is not there yet; `python demo.py` trains it")
        path = WEIGHTS
        print("these are the weights that come with the demo; `python demo.py` trains others")
    net, diffusion, state, _ = checkpoint(path)
    return Model(net.with_params(state.ema.flat) if state else net, diffusion)


def export(args):
    """Write what drawing needs of OUT/model.npz, as float16: the file for `weights/`."""
    net, diffusion, state, settings = checkpoint(args.out / "model.npz", to_train=True)
    settings = {name: settings[name] for name in ("schedule", "T", "steps", "data")}
    args.weights.parent.mkdir(parents=True, exist_ok=True)
    half = net.with_params(state.ema.flat.astype(np.float16))
    td.save(args.weights, half, diffusion, **settings)
    print(f"wrote {args.weights}: {args.weights.stat().st_size:,} bytes")


def sample(args):
    """Draw digits: OUT/sample.png, and with --save all images and labels as .npz."""
    model = trained(args.out)
    digits = args.digits if args.digits is not None else range(model.net.classes)
    if not all(0 <= d < model.net.classes for d in digits):
        raise ValueError(f"digits are {list(digits)}; the network knows "
                         f"0..{model.net.classes - 1}")
    labels = np.resize(digits, args.count or 10 * len(digits))
    began = time.perf_counter()
    images = model.draw(labels, args.seed, **given(args, "sampler", "steps", "eta", "guidance"))
    took = time.perf_counter() - began
    print(f"{len(images)} images in {took:.1f} s, {1000 * took / len(images):.0f} ms each")
    if args.save:
        write(args.save, lambda file: np.savez_compressed(file, x=images, y=labels))
        print(f"wrote {args.save}: x {images.shape} in [-1, 1], y {labels.shape}")
    rows = -(-min(len(images), 20 * len(digits)) // len(digits))
    page = np.full((rows * len(digits), *images.shape[1:]), -1.0, np.float32)
    page[:len(images)] = images[:len(page)]
    sheet(args.out / "sample.png", page.reshape(rows, len(digits), *images.shape[1:]), digits)


def given(args, *names):
    """The options that were given on the command line."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def speed(args):
    """DDPM with all steps against DDIM with 10, 20, 50 and eta 0, 0.5, 1: time and picture."""
    model = trained(args.out)
    labels = np.arange(model.net.classes)
    runs = [("ddpm", args.full, None)]
    runs += [("ddim", steps, eta) for steps in (10, 20, 50) for eta in (0, 0.5, 1)]
    rows, names, times = [], [], []
    for sampler, steps, eta in runs:
        began = time.perf_counter()
        rows.append(model.draw(labels, args.seed, sampler=sampler, steps=steps, eta=eta or 0))
        times.append(time.perf_counter() - began)
        names.append(f"{sampler.upper()} {steps}" + ("" if eta is None else f", eta {eta}"))
    print(f"\n{'':18}{'seconds':>8}  DDPM takes ... times as long")
    for name, took in zip(names, times):
        print(f"{name:18}{took:8.2f}{times[0] / took:9.1f}")
    sheet(args.out / "speed.png", np.stack(rows), labels,
          [f"{name}: {took:.1f} s" for name, took in zip(names, times)])


def guidance(args):
    """A row of digits for each guidance weight, from the same noise."""
    model = trained(args.out)
    labels, weights = np.arange(model.net.classes), (0, 1, 2, 3, 7.5)
    rows = [model.draw(labels, args.seed, guidance=w) for w in weights]
    print("share of pixels at black or white, by weight: " +
          ", ".join(f"w={w} {np.mean(np.abs(r) > 0.98):.0%}" for w, r in zip(weights, rows)))
    sheet(args.out / "guidance.png", np.stack(rows), labels, [f"w = {w}" for w in weights])


# -------------------------------------------------------------------- the forward process

def forward(args):
    """One digit on its way to noise, with its signal-to-noise ratio."""
    images, labels = load_digits(args.data, "t10k")
    diffusion = td.Diffusion(td.SCHEDULES[args.schedule](T), "v")
    x0 = xp.asarray(images[labels == args.digit][:1])
    if not len(x0):
        raise ValueError(f"digit is {args.digit}; the data has {labels.min()}..{labels.max()}")
    eps = td.normal(np.random.default_rng(args.seed), x0.shape)
    steps = [1, 100, 250, 500, 750, 1000]
    print(f"{args.schedule} schedule\n{'t':>5}{'abar':>12}{'SNR':>12}")
    for t in steps:
        print(f"{t:5}{diffusion.abar[t]:12.4g}{diffusion.snr[t]:12.4g}")
    frames = np.stack([asnumpy(diffusion.q_sample(x0, t, eps)) for t in steps], 1)
    headings = [f"t = {t}\nSNR {diffusion.snr[t]:.2g}" for t in steps]
    sheet(args.out / "forward.png", frames, headings, cell=1.2)


def schedules(args):
    """Beta, alpha-bar and log-SNR of every schedule, and one digit under each."""
    images, labels = load_digits(args.data, "t10k")
    x0 = xp.asarray(images[:1])
    eps = td.normal(np.random.default_rng(args.seed), x0.shape)
    every = {name: td.Diffusion(betas(T), "v") for name, betas in td.SCHEDULES.items()}
    every["linear, zero SNR"] = td.Diffusion(td.zero_terminal_snr(td.linear_betas(T)), "v")
    steps, t = (200, 500, 800), np.arange(1, T + 1)
    figure, axes = plt.subplots(1, 4, figsize=(15, 4.6), width_ratios=(3, 3, 3, 2.4),
                                layout="constrained")
    print(f"{'':18}" + "".join(f"{f'SNR({s})':>12}" for s in (*steps, T)))
    with np.errstate(divide="ignore"):
        styles = ("-", "--", "-", "-", "--", "-", "-", "-.", ":")
        for (name, d), style in zip(every.items(), styles):
            for ax, values in zip(axes, (d.beta, d.abar, np.log10(d.snr))):
                ax.plot(t, values[1:], style, lw=1.4, label=name)
            print(f"{name:18}" + "".join(f"{d.snr[s]:12.3g}" for s in (*steps, T)))
    for ax, title in zip(axes, ("beta", "alpha-bar", "log10 SNR")):
        ax.set(title=title, xlabel="t")
        ax.grid(alpha=0.3)
    axes[0].set(yscale="log")
    axes[2].set(ylim=(-6, 6))
    axes[0].legend(fontsize=8)
    frames = np.stack([[asnumpy(d.q_sample(x0, s, eps))[0] for s in steps]
                       for d in every.values()])
    show(axes[3], frames, [f"t={s}" for s in steps], list(every))
    keep(figure, args.out / "schedules.png")


def bpd(args):
    """Bits per dimension of test digits, given their labels, with the bound's parts."""
    model = trained(args.out)
    images, labels = load_digits(args.data, "t10k")
    if labels.max() >= model.net.classes:
        raise ValueError(f"{args.data} has labels up to {labels.max()}; the network knows "
                         f"0..{model.net.classes - 1}")
    rng = np.random.default_rng(args.seed)
    pick = rng.permutation(len(images))[:args.count]
    parts = np.array_split(pick, -(-len(pick) // 50))
    bits = []
    for rows in tqdm(parts, "batches of 50 digits"):
        bits.append(model.diffusion.bits_per_dim(
            model.guided(labels[rows], 1), xp.asarray(images[rows]), rng))
    prior, steps, decoder, total = (
        sum(len(rows) * part[name] for rows, part in zip(parts, bits)) / len(pick)
        for name in ("prior", "steps", "decoder", "total"))
    print(f"{len(pick)} test digits: {total:.3f} bits per dimension\n"
          f"  prior    {prior:.5f}   x_T is not quite noise\n"
          f"  steps    {steps.sum():.5f}   the model's x0 is not the true one; sum over t > 1\n"
          f"  decoder  {decoder:.5f}   from x_1 to bytes")
    figure, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
    ax.loglog(np.arange(2, model.diffusion.T + 1), steps, lw=1)
    ax.plot(1, decoder, "o", label=f"decoder {decoder:.3f}")
    ax.plot([], [], " ", label=f"steps {steps.sum():.3f}, prior {prior:.5f}")
    ax.set(xlabel="t", ylabel="bits per dimension of the step to t-1",
           title=f"{total:.3f} bits per dimension in all")
    ax.grid(alpha=0.3, which="both")
    ax.legend()
    keep(figure, args.out / "bpd.png")


# ------------------------------------------------------------------------ score: a classifier

def classifier_layout(image, classes):
    H, W, C = image
    return {"stages": [{"conv": td.product_layout(3, 3, c, d), "norm": td.norm_layout(d)}
                       for c, d in ((C, 16), (16, 32), (32, 64))],
            "features": td.product_layout(H // 4 * (W // 4) * 64, 64),
            "out": td.product_layout(64, classes)}


def classify(p, x, rng=None):
    """Images (B, H, W, C) -> 64 features each, logits, and back. Three convolutions, the
    picture halved between them, then two linear layers; an rng turns dropout on."""
    pool = [lambda x: (td.average_pool(x), lambda dy: td.upsample(dy) / 4)]
    h, stages_back = td.sequential(x, [
        layer for i, stage in enumerate(p.stages)
        for layer in (pool if i else []) + [partial(td.conv3x3, stage.conv),
                                            partial(td.norm, stage.norm), td.silu]])
    features, features_back = td.sequential(
        h.reshape(len(x), -1), [partial(td.linear, p.features), td.silu])
    logits, out_back = td.sequential(
        features, [partial(td.dropout, rate=0.5, rng=rng), partial(td.linear, p.out)])

    def back(dlogits):
        stages_back(features_back(out_back(dlogits)).reshape(h.shape))
    return features, logits, back


def train_classifier(images, labels, epochs=5, batch=50, highest=2e-3):
    """The classifier's Params after `epochs` of cross-entropy."""
    rng = np.random.default_rng(0)
    layout = classifier_layout(images.shape[1:], int(labels.max()) + 1)
    p = td.initial(layout, rng)
    adam, step, steps = td.AdamW(p), 0, epochs * (len(images) // batch)
    for _ in tqdm(range(epochs), "training the classifier", unit=" epochs"):
        for rows in rng.permutation(len(images))[:steps // epochs * batch].reshape(-1, batch):
            # Shifted by up to 2 pixels at random, the whole batch: 10,000 are few.
            shifted = np.roll(images[rows], rng.integers(-2, 3, 2), (1, 2))
            p.grad.flat = 0
            _, logits, back = classify(p, xp.asarray(shifted), rng)
            e = xp.exp(logits - logits.max(1, keepdims=True))
            onehot = xp.eye(logits.shape[1], dtype=e.dtype)[xp.asarray(labels[rows])]
            # The gradient of the mean cross-entropy of p = softmax(logits). A tenth of each
            # label goes to all classes, lest features grow with certainty alone.
            wanted = 0.9 * onehot + 0.1 / logits.shape[1]
            back((e / e.sum(1, keepdims=True) - wanted) / batch)
            lr = highest * min(1, (step + 1) / 50) * (1 + math.cos(math.pi * step / steps)) / 2
            adam.step(p.flat, p.grad.flat, lr, weight_decay=0.01)
            step += 1
    return p


def load_classifier(args):
    """The classifier of DATA: from OUT/classifier.npz, or trained and kept there."""
    images, labels = load_digits(args.data, "train")
    images = pad_to_fours(images)
    path, key = args.out / "classifier.npz", "2 " + crc(images, labels)
    layout = classifier_layout(images.shape[1:], int(labels.max()) + 1)
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            if str(file["key"]) == key:
                return td.Params(layout, xp.asarray(file["params"])), images
    except Exception:       # not there, or damaged, which fails in many ways
        pass
    p = train_classifier(images, labels)
    write(path, lambda file: np.savez(file, params=asnumpy(p.flat), key=key))
    return p, images


def pad_to_fours(images):
    """Padded with black to sides that halve twice."""
    N, H, W, C = images.shape
    return np.pad(images, ((0, 0), (0, -H % 4), (0, -W % 4), (0, 0)), constant_values=-1)


def read(p, images):
    """What the classifier sees: features (N, 64), all of length 30 so that how sure it is does
    not count, and labels (N,); on the host."""
    parts = np.array_split(images, -(-len(images) // 100))
    outs = [classify(p, xp.asarray(part))[:2] for part in parts]
    features, logits = (np.concatenate([asnumpy(a) for a in column]) for column in zip(*outs))
    features = features.astype(np.float64)
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return 30 * features / np.maximum(length, 1e-12), logits.argmax(1)


def frechet(a, b):
    """Frechet distance of the Gaussians fitted to two sets of features (N, 64):
    |mean - mean'|^2 + tr(C + C' - 2 (C^1/2 C' C^1/2)^1/2)."""
    A, B = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(A)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ B @ root), 0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A) + np.trace(B) - 2 * cross)


def load_samples(path, image):
    """Images x (N, H, W, C) and labels y (N,) that `sample --save` or another program wrote."""
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            x, y = file["x"], file["y"]
    except FileNotFoundError:
        raise
    except Exception as error:      # a damaged archive fails in many ways
        raise ValueError(f"{path} is not an .npz of x and y ({str(error)[:100]})") from error
    if x.shape[1:] != image or y.shape != x.shape[:1] or len(x) < 100 or x.dtype.kind != "f":
        raise ValueError(f"{path} has x {x.dtype} {x.shape} and y {y.shape}; they have to be "
                         f"floats (N, *{image}) and labels (N,), with N at least 100")
    if not abs(x).max() < 1.001:
        raise ValueError(f"x of {path} reaches {abs(x).max()}; it has to be within -1 and 1")
    return x, y


def score(args):
    """Class accuracy and Frechet distance of samples, beside those of as many real digits."""
    test, test_labels = load_digits(args.data, "t10k")
    if args.samples:
        drawn = [(path.name, *load_samples(path, test.shape[1:])) for path in args.samples]
    else:
        model = trained(args.out)
        labels = np.arange(args.count) % model.net.classes
        drawn = [(f"samples, w = {w:g}", model.draw(
            labels, args.seed, guidance=w, **given(args, "sampler", "steps", "eta")), labels)
            for w in args.guidance]
    p, images = load_classifier(args)
    reference = read(p, images)[0]
    print(f"\n{'':24}{'number':>8}{'accuracy':>11}   Frechet distance to {len(images):,} "
          "training digits")
    names, pictures = [], []
    for name, x, y in [("real test digits", test, test_labels), *drawn]:
        features, seen = read(p, pad_to_fours(x))
        accuracy, distance = np.mean(seen == y), frechet(reference, features)
        print(f"{name:24}{len(x):8,}{accuracy:11.1%}{distance:11.3f}")
        names.append(f"{name}: {accuracy:.1%}, {distance:.2f}")
        pictures.append(np.stack([x[np.argmax(y == k)] for k in np.unique(test_labels)]))
    sheet(args.out / "score.png", np.stack(pictures), np.unique(test_labels), names)


# --------------------------------------------------------------------------- the command line

def number(kind, low, high=math.inf):
    """An argparse type: an int or a float from low to high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value
    parse.__name__ = kind.__name__
    return parse


def parser():
    top = argparse.ArgumentParser(description=__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(title="commands", metavar="COMMAND", dest="command")

    def command(function, *options):
        sub = commands.add_parser(function.__name__, help=function.__doc__.splitlines()[0],
                                  description=function.__doc__)
        sub.set_defaults(run=function)
        for flag, settings in (out, *options):
            sub.add_argument(flag, **settings)

    def option(flag, help, shown=None, **settings):
        shown = settings.get("default") if shown is None else shown
        if isinstance(shown, (list, tuple)):
            shown = " ".join(map(str, shown))
        help = help if shown is None else f"{help} (default: {shown})"
        return flag, dict(help=help, **settings)

    whole, natural, share = number(int, 1), number(int, 0), number(float, 0, 1)
    weight = number(float, -1e3, 1e3)
    out = option("--out", "where the checkpoint is and the pictures go", type=Path,
                 default=OUT, metavar="DIR")
    data = option("--data", "MNIST-like files, an .npz, or a folder of pictures", type=Path,
                  default=HERE / "data", shown="the bundled digits", metavar="PATH")
    seed = option("--seed", "of the noise", type=natural, default=0, metavar="N")
    drawing = [
        option("--sampler", ", ".join(SAMPLERS), choices=SAMPLERS, metavar="NAME",
               default=DRAWING["sampler"]),
        option("--steps", "of the sampler, each a call of the network, with heun two",
               shown=f"{DRAWING['steps']}, or all with ddpm", type=whole, metavar="N"),
        option("--eta", "ddim's noise, from 0 to ddpm's at 1", type=share,
               default=DRAWING["eta"])]
    command(train, data,
            option("--steps", "steps of training", shown=STEPS, type=whole, metavar="N"),
            option("--batch", "images a step", shown=BATCH, type=whole, metavar="N"),
            option("--lr", "highest learning rate", shown=TRAINING["lr"], type=share,
                   metavar="X"),
            option("--channels", "of each level", shown=CHANNELS, type=whole, nargs="+",
                   metavar="C"),
            option("--seed", "of the parameters, the training and the samples", shown=0,
                   type=natural, metavar="N"),
            option("--fresh", "start over, and replace the checkpoint", action="store_true"))
    command(export, option("--weights", "the file to write", type=Path,
                           default=Path("weights/mnist.npz"), metavar="FILE"))
    command(sample, *drawing, seed,
            option("--digits", "which to draw, a column each", shown="all", type=int, nargs="+",
                   metavar="D"),
            option("--count", "how many images", shown="10 a digit", type=whole, metavar="N"),
            option("--guidance", "weight w: 0 ignores the labels, 1 follows them, more insists",
                   type=weight, default=DRAWING["guidance"], metavar="W"),
            option("--save", "write all images and labels here, .npz", type=Path,
                   metavar="FILE"))
    command(speed, seed,
            option("--full", "steps of DDPM", type=whole, default=T, metavar="N"))
    command(guidance, seed)
    command(bpd, data, seed,
            option("--count", "test digits", type=whole, default=100, metavar="N"))
    command(score, data, *drawing, seed,
            option("--count", "samples of each weight", type=number(int, 100), default=1000,
                   metavar="N"),
            option("--guidance", "weights to score", type=weight, nargs="+",
                   default=[1.0, DRAWING["guidance"]], metavar="W"),
            option("--samples", "score these, from sample --save, instead of drawing",
                   type=Path, nargs="+", metavar="FILE"))
    command(forward, data, seed,
            option("--digit", "which digit to show", type=int, default=8, metavar="D"),
            option("--schedule", "of the noise", choices=list(td.SCHEDULES), default="linear"))
    command(schedules, data, seed)
    command(download,
            option("--data", "directory to fill", type=Path, default=Path("mnist"),
                   metavar="DIR"),
            option("--url", "where the four .gz files are", default=MNIST_URL))
    return top, commands.choices


def main(words):
    keep_memory()
    top, commands = parser()
    if not words or words[0] not in (*commands, "-h", "--help"):
        words = ["train", *words]           # plain `python demo.py` trains
    args = top.parse_args(words)
    try:
        args.run(args)
    except (ValueError, OSError, ArithmeticError, MemoryError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise SystemExit(f"demo.py: {said}")
    except KeyboardInterrupt:
        raise SystemExit("demo.py: stopped")


if __name__ == "__main__":
    main(sys.argv[1:])
