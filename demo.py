"""The tour of tinyddpm: train on pictures, watch it learn, draw, and see each idea on the way.

    python demo.py                  train on the bundled digits (again: go on), and draw some
    python demo.py --data PATH      on your own pictures: a folder, an .npz, IDX files
    python demo.py COMMAND          one of the others, below; COMMAND --help lists its options
"""
import argparse
import contextlib
import copy
import ctypes
import gzip
import hashlib
import http.client
import io
import math
import os
import signal
import sys
import textwrap
import time
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Before NumPy starts: one thread to a product, because we cut the batch over threads instead.
for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS",
             "VECLIB_MAXIMUM_THREADS"):
    os.environ.setdefault(name, "1")

import numpy as np                                                              # noqa: E402
from matplotlib.figure import Figure                                            # noqa: E402
from PIL import Image                                                           # noqa: E402
from tqdm import tqdm                                                           # noqa: E402

import pictures                                                                 # noqa: E402
import tinyddpm as td                                                           # noqa: E402
from tinyddpm import asnumpy, xp                                                # noqa: E402

HERE, OUT = Path(__file__).parent, Path("out")
WEIGHTS = HERE / "weights" / "mnist.npz"        # these come with the demo
ON_GPU = xp is not np
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
THREADS, CHUNK = (1, 500) if ON_GPU else (CORES, 32)

# Chosen by measurement: the best found for five minutes on two CPU cores. For a GPU, larger.
CHANNELS = [64, 128, 128] if ON_GPU else [16, 32, 64]
STEPS, BATCH = (6000, 128) if ON_GPU else (1900, 64)
LR, EMA = {"muon": 1.2e-2, "adamw": 2e-3}, 0.995
TRAINING = dict(steps=STEPS, batch=BATCH, predicts="v", schedule="cosine", T=1000,
                optimizer="muon", lr=None, channels=CHANNELS, seed=0)
DRAWING = dict(sampler="ddim", steps=20, eta=0.6, guidance=1.6)
SAMPLERS = {"ddpm": td.ddpm, "ddim": td.ddim, "dpm_solver": td.dpm_solver, "heun": td.heun}


# ---------------------------------------------------------------------- the demo, in ten lines

def network(image=(28, 28, 1), channels=CHANNELS, classes=10, seed=0):
    """A U-Net with more blocks, and attention, at its lowest level, where pictures are small."""
    low = len(channels) - 1
    return td.UNet(image, channels, classes, blocks=(1,) * low + (2,), attention=(low,),
                   heads=1, rng=seed)


def process(schedule="cosine", T=1000, predicts="v"):
    """How pictures become noise in T steps, and what the network has to say about it."""
    return td.Diffusion(td.SCHEDULES[schedule](T), predicts)


def learn(net, diffusion, images, labels, steps=STEPS, batch=BATCH, optimizer="muon", lr=None,
          seed=0, state=None):
    """DDPM Algorithm 1, again and again: a generator of the State, with the loss, after each."""
    return td.train(net, diffusion, images, labels, steps=steps, batch=batch, ema=EMA,
                    optimizer=optimizer, lr=lr or LR[optimizer], rng=seed + 1, state=state,
                    threads=THREADS)


def frames(net, diffusion, labels, seed, sampler, guidance, **options):
    """From noise to pictures of these classes: a generator of (t, x_t), from T down to 0."""
    rng, T = np.random.default_rng(seed), diffusion.T
    # At the highest noise nothing is guided, so that pictures differ more from each other.
    interval = (1, max(1, round(0.8 * T))) if guidance > 1 else None
    model = td.guided(parallel(net), labels, net.null, guidance, interval=interval)
    x = td.normal(rng, (len(labels), *net.image))
    yield T, x
    yield from SAMPLERS[sampler](model, diffusion, x, rng, **options)


def parallel(model, threads=THREADS, chunk=CHUNK):
    """The same model, its batch cut into equal parts of at most chunk images, as many for each
    thread."""
    pool = ThreadPoolExecutor(threads)

    def model_in_parts(*arrays):
        n = len(arrays[0])
        parts = min(n, threads * -(-n // (threads * chunk)))
        cuts = [slice(n * i // parts, n * (i + 1) // parts) for i in range(parts)]
        return xp.concatenate([*pool.map(lambda cut: model(*(a[cut] for a in arrays)), cuts)])
    return model_in_parts


# ----------------------------------------------------------------------------------- training

def train(args):
    """Train on the pictures of --data, or go on with OUT/model.npz; then draw."""
    began, path, data = time.perf_counter(), args.out / "model.npz", read(args)
    asked = {name: value for name in TRAINING if (value := getattr(args, name)) is not None}
    if path.exists() and not args.fresh:
        net, diffusion, state, notes = going_on(path, data, asked)
    else:
        notes = TRAINING | asked | {"data": data.crc(), "names": data.names, "losses": []}
        notes["lr"] = notes["lr"] or LR[notes["optimizer"]]
        net = network(data.images.shape[1:], notes["channels"], len(data.names), notes["seed"])
        diffusion = process(notes["schedule"], notes["T"], notes["predicts"])
        state = None
    done, losses = state.step if state else 0, notes["losses"]
    options = {name: notes[name] for name in ("steps", "batch", "optimizer", "lr", "seed")}
    if args.minutes:
        trial = learn(copy.deepcopy(net), diffusion, data.images, data.labels, **options)
        times = [(next(trial), time.perf_counter())[1] for _ in range(13)]
        fit = 60 * args.minutes / np.median(np.diff(times[2:]))
        options["steps"] = notes["steps"] = done + max(1, int(0.9 * fit))   # the rest: drawing
    steps, batch = options["steps"], options["batch"]
    args.out.mkdir(parents=True, exist_ok=True)     # if that fails, then now, not at the end
    print(f"{net.params.flat.size:,} parameters; {steps:,} steps of {batch} pictures, {done:,} "
          f"of them done; {xp.__name__}{'' if ON_GPU else f' on {THREADS} threads'}\n"
          f"what it draws by now: {args.out / 'samples.png'}, every half minute; Ctrl-C saves")
    with (Interrupt() as interrupt,
          tqdm(total=steps * batch, initial=done * batch, unit=" pictures", unit_scale=True,
               smoothing=0.05, disable=None) as bar):       # None: only at a terminal
        saved = time.perf_counter()
        for state in learn(net, diffusion, data.images, data.labels, **options, state=state):
            losses.append(state.loss)
            recent = f"loss {np.mean(losses[-50:]):.4f}"
            bar.set_postfix_str(recent, refresh=False)
            bar.update(batch)
            if bar.disable and 10 * state.step // steps > 10 * (state.step - 1) // steps:
                print(f"step {state.step:,} of {steps:,}, {recent}")
            if interrupt.asked or time.perf_counter() - saved > 30 or state.step == steps:
                td.save(path, net, diffusion, state, **notes)
                if state.step < steps and not interrupt.asked:
                    glance(args.out, net.with_params(state.ema.flat), diffusion, notes)
                saved = time.perf_counter()
            if interrupt.asked:
                break
    if state.step < steps:
        raise SystemExit(f"stopped after step {state.step:,} of {steps:,}, which {path} holds; "
                         "the same command goes on from there")
    print(f"trained for {steps - done:,} steps in {time.perf_counter() - began:.0f} s")
    results(args.out, net.with_params(state.ema.flat), diffusion, notes)
    print(f"all of it took {time.perf_counter() - began:.0f} s")


BOTH = "--fresh starts over, --out DIR keeps both"


def going_on(path, data, asked):
    """What `train` saved, if it is of these pictures and with the options asked for now."""
    net, diffusion, state, notes = td.load(path)
    if state is None or not {"data", "names", "losses", *TRAINING} <= notes.keys():
        raise ValueError(f"{path} holds no training of this demo's to go on with; {BOTH}")
    fits(path, net, notes, data, BOTH)
    for name, value in asked.items():
        if name == "steps" and value < state.step:
            raise ValueError(f"{path} has had {state.step} steps, not just {value}; {BOTH}")
        if name != "steps" and value != notes[name]:
            raise ValueError(f"{path} was trained with {name} {notes[name]}, not {value}; "
                             + BOTH)
    return net, diffusion, state, notes | asked


def fits(path, net, notes, data, advice):
    """A ValueError, in plain words, unless the network was trained on these pictures."""
    was, now = (net.image, notes["names"]), (data.images.shape[1:], data.names)
    if was != now:
        raise ValueError(f"{path} was trained on {words(*was)}; these are {words(*now)}; "
                         + advice)
    if notes.get("data") != data.crc():
        raise ValueError(f"{path} was trained on other pictures than these; {advice}")


class Interrupt:
    """Ctrl-C, or SIGTERM, lets the step under way end first; a second one stops at once."""

    def __enter__(self):
        self.asked = False
        self.before = {number: signal.signal(number, self.press)
                       for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def press(self, number, frame):
        self.asked = True
        self.__exit__()

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def glance(out, net, diffusion, notes):
    """Redraw OUT/samples.png during training: four rows, in few steps."""
    labels, heads = columns(notes)
    x = td.sample(frames(net, diffusion, np.tile(labels, 4), notes["seed"], "dpm_solver",
                         DRAWING["guidance"], steps=min(8, diffusion.T)))
    sheet(out / "samples.png", asnumpy(x).reshape(4, -1, *net.image), heads, say=False)


def results(out, net, diffusion, notes):
    """Draw samples.png; how they came out of noise, denoising.gif and .png; and loss.png."""
    labels, heads = columns(notes)
    pages, strip, how = [], {}, choices(diffusion)
    course = frames(net, diffusion, np.tile(labels, 10), notes["seed"], **how)
    for i, (t, x) in enumerate(course):
        x = asnumpy(x).reshape(10, -1, *net.image)
        strip[t] = x[0, ::max(1, len(labels) // 5)]
        if i % 4 == 0 or i > 0.4 * how["steps"]:        # the first are noise: a few will do
            pages.append(Image.fromarray(np.uint8(255 * tile(x) + 0.5)).convert("RGB"))
    sheet(out / "samples.png", x, heads)
    some = np.array([*strip])[np.linspace(0, len(strip) - 1, 10).astype(int)]
    sheet(out / "denoising.png", np.stack([strip[t] for t in some], 1),
          [f"t = {t}" for t in some])
    film(out / "denoising.gif", pages)
    losses, width = notes["losses"], max(1, len(notes["losses"]) // 50)
    smooth = np.convolve(losses, np.ones(width) / width, "valid")
    plot(out / "loss.png", (np.arange(len(losses)) + 1, losses, "c,", "each step"),
         (np.arange(len(smooth)) + (width + 1) / 2, smooth, "-", f"mean of {width} steps"),
         title=f"{smooth[-1]:.4f} at the end", xlabel="step", yscale="log",
         ylabel=f"mean squared error of {diffusion.predicts}")


# ------------------------------------------------------------------------------------ drawing

def trained(args):
    """The network of --model, or else of OUT/model.npz, with the average of its parameters;
    its diffusion; its notes. Where nothing is trained, or for a trial of a few steps only, the
    weights that come with the demo. Says which."""
    path, free = args.model or args.out / "model.npz", args.model is None and args.out == OUT
    if free and not path.exists():
        path = WEIGHTS
    elif not path.exists():
        raise FileNotFoundError(f"{path} is not there yet; `python demo.py` with this --out "
                                "trains it, and --model FILE chooses another")
    net, diffusion, state, notes = td.load(path)
    if free and state and state.step < 100 and notes.get("data") == SHIPPED:
        print(f"{path} has had {state.step} steps, too few to draw with; --model {path} does")
        path = WEIGHTS
        net, diffusion, state, notes = td.load(path)
    if state:
        net, notes["steps"] = net.with_params(state.ema.flat), state.step
    notes.setdefault("names", [str(k) for k in range(net.classes)])
    print(f"drawing with {path}{' of the demo' if path == WEIGHTS else ''}, after "
          f"{notes.get('steps', 'an unknown number of')} steps of training")
    return net, diffusion, notes


def columns(notes, asked=None):
    """For the columns of a sheet, labels and the names to write above: the classes asked for,
    or the first 30; without classes, ten columns of label 0."""
    names = notes["names"]
    for name in asked or ():
        if name not in names:
            raise ValueError(f"there is no class {name} here; there "
                             f"{'are ' + ' '.join(names) if names else 'are none'}")
    heads = asked or names[:30]
    return np.array([names.index(name) for name in heads] or [0] * 10), heads


def choices(diffusion, sampler=None, steps=None, eta=None, guidance=None):
    """Options of `frames`: what is asked for, and for the rest the measured best."""
    sampler = sampler or DRAWING["sampler"]
    if eta is not None and sampler != "ddim":
        raise ValueError(f"eta is {eta}, and {sampler} has none: it is ddim's")
    few = diffusion.T if sampler == "ddpm" else min(DRAWING["steps"], diffusion.T)
    return {"sampler": sampler, "steps": steps or few,
            "guidance": DRAWING["guidance"] if guidance is None else guidance,
            **({"eta": DRAWING["eta"] if eta is None else eta} if sampler == "ddim" else {})}


def draw(net, diffusion, labels, seed, **asked):
    """x_0, host (N, H, W, C), with a progress bar at a terminal."""
    how = choices(diffusion, **asked)
    title = ", ".join(f"{name} {value}" for name, value in how.items())
    return asnumpy(td.sample(tqdm(frames(net, diffusion, labels, seed, **how), title,
                                  how["steps"] + 1, unit=" steps", disable=None)))


def sample(args):
    """Draw pictures: OUT/sample.png, and with --save all, and their labels, as .npz."""
    net, diffusion, notes = trained(args)
    chosen, heads = columns(notes, args.digits)
    labels = np.resize(chosen, args.count or 10 * len(chosen))
    began = time.perf_counter()
    x = draw(net, diffusion, labels, args.seed, sampler=args.sampler, steps=args.steps,
             eta=args.eta, guidance=args.guidance)
    took = time.perf_counter() - began
    print(f"{len(x)} pictures in {took:.1f} s, {1000 * took / len(x):.0f} ms each")
    if args.save:
        with written(args.save) as file:
            np.savez_compressed(file, x=x, y=labels, names=np.array(notes["names"]))
        print(f"wrote {args.save}: x {x.shape} in [-1, 1], y {labels.shape}")
    rows = min(20, -(-len(x) // len(chosen)))
    page = np.full((rows * len(chosen), *net.image), -1.0, np.float32)
    page[:len(x)] = x[:len(page)]
    sheet(args.out / "sample.png", page.reshape(rows, -1, *net.image), heads)


def speed(args):
    """DDPM with all steps against DDIM with 10, 20, 50 and eta 0, 0.5, 1: time and picture."""
    net, diffusion, notes = trained(args)
    labels, heads = columns(notes)
    runs = {f"DDPM {args.full}": dict(sampler="ddpm", steps=args.full)}
    runs |= {f"DDIM {steps}, eta {eta}": dict(sampler="ddim", steps=steps, eta=eta)
             for steps in (10, 20, 50) for eta in (0, 0.5, 1)}
    rows, times = [], []
    for run in runs.values():
        began = time.perf_counter()
        rows.append(draw(net, diffusion, labels, args.seed, **run))
        times.append(time.perf_counter() - began)
    print(f"{'':18}{'seconds':>8}   DDPM takes ... times as long")
    for name, took in zip(runs, times):
        print(f"{name:18}{took:8.2f}{times[0] / took:9.1f}")
    sheet(args.out / "speed.png", np.stack(rows), heads,
          [f"{name}: {took:.1f} s" for name, took in zip(runs, times)])


def guidance(args):
    """A row of pictures for each guidance weight, from the same noise."""
    net, diffusion, notes = trained(args)
    labels, heads = columns(notes)
    rows = {f"w = {w}": draw(net, diffusion, labels, args.seed, guidance=w)
            for w in (0, 1, 2, 3, 7.5)}
    for name, row in rows.items():
        print(f"{name:8}{np.mean(np.abs(row) > 0.98):5.0%} of the pixels are black or white")
    sheet(args.out / "guidance.png", np.stack([*rows.values()]), heads, [*rows])


def bpd(args):
    """Bits per dimension of test pictures, given their labels, with the bound's parts."""
    net, diffusion, notes = trained(args)
    data = read(args)
    fits("the network", net, notes, data, "--model and --data choose")
    if data.test_images is None:
        raise ValueError(f"{args.data} has no test pictures, and they are what bpd measures")
    images, rng = data.test_images, np.random.default_rng(args.seed)
    labels = np.zeros(len(images), int) if data.test_labels is None else data.test_labels
    pick, model = rng.permutation(len(images))[:args.count], parallel(net)
    parts = np.array_split(pick, -(-len(pick) // 50))
    bounds = [td.variational_bound(diffusion, td.guided(model, labels[rows], net.null, 1),
                                   xp.asarray(images[rows]), rng)
              for rows in tqdm(parts, "50 pictures at a time", disable=None)]
    prior, steps, decoder, total = (
        sum(len(rows) * bound[name] for rows, bound in zip(parts, bounds)) / len(pick)
        for name in ("prior", "steps", "decoder", "total"))
    print(f"{len(pick)} test pictures: {total:.3f} bits per dimension\n"
          f"  prior    {prior:.5f}   x_T is not quite noise\n"
          f"  steps    {steps.sum():.5f}   the model's x0 is not the true one; sum over t > 1\n"
          f"  decoder  {decoder:.5f}   from x_1 to bytes")
    plot(args.out / "bpd.png", ([1], [decoder], "o", f"decoder {decoder:.3f}"),
         (np.arange(2, diffusion.T + 1), steps, "-", f"steps, together {steps.sum():.3f}"),
         title=f"{total:.3f} bits per dimension in all", xlabel="t", xscale="log",
         ylabel="bits per dimension of the step to t-1", yscale="log")


def export(args):
    """Write what drawing needs of OUT/model.npz, in few bytes, as weights/mnist.npz has it."""
    args.model = args.model or args.out / "model.npz"
    net, diffusion, notes = trained(args)
    path = args.weights or args.out / "weights.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    half = net.with_params(net.params.flat.astype(np.float16))
    td.save(path, half, diffusion, **{**notes, "losses": []})
    print(f"wrote {path}: {path.stat().st_size:,} bytes")


# ------------------------------------------------------------------------ the forward process

def one_picture(args, name=None):
    """The first test picture, of this class; (1, H, W, C). Without a test part, to train on."""
    data = read(args)
    images, labels = ((data.images, data.labels) if data.test_images is None else
                      (data.test_images, data.test_labels))
    if name is not None:
        images = images[labels == columns(vars(data), [name])[0]]
    return xp.asarray(images[:1])


def forward(args):
    """One picture on its way to noise, with its signal-to-noise ratio."""
    x0, diffusion = one_picture(args, args.digit), process(args.schedule)
    eps, steps = td.normal(args.seed, x0.shape), (1, 100, 250, 500, 750, 1000)
    print(f"{args.schedule} schedule\n{'t':>5}{'abar':>12}{'SNR':>12}")
    for t in steps:
        print(f"{t:5}{diffusion.abar[t]:12.4g}{diffusion.snr[t]:12.4g}")
    noisy = np.stack([asnumpy(diffusion.q_sample(x0, t, eps)) for t in steps], 1)
    heads = [f"t = {t}\nSNR {diffusion.snr[t]:.2g}" for t in steps]
    sheet(args.out / "forward.png", noisy, heads, cell=150)


def schedules(args):
    """Beta, alpha-bar and log-SNR of every schedule, and one picture under each."""
    x0 = one_picture(args)
    eps, steps, t = td.normal(args.seed, x0.shape), (200, 500, 800), np.arange(1, 1001)
    every = {name: process(name) for name in td.SCHEDULES}
    every["linear, zero SNR"] = td.Diffusion(td.zero_terminal_snr(td.linear_betas(1000)), "v")
    figure = Figure((15, 4.6), layout="constrained")
    axes = figure.subplots(1, 4, width_ratios=(3, 3, 3, 2.4))
    print(f"{'':18}" + "".join(f"{f'SNR({s})':>12}" for s in (*steps, 1000)))
    styles = ("-", "--", "-", "-", "--", "-", "-", "-.", ":")
    for (name, d), style in zip(every.items(), styles):
        with np.errstate(divide="ignore"):
            for ax, values in zip(axes, (d.beta, d.abar, np.log10(d.snr))):
                ax.plot(t, values[1:], style, lw=1.4, label=name)
        print(f"{name:18}" + "".join(f"{d.snr[s]:12.3g}" for s in (*steps, 1000)))
    for ax, title in zip(axes, ("beta", "alpha-bar", "log10 SNR")):
        ax.set(title=title, xlabel="t")
        ax.grid(alpha=0.3)
    axes[0].set(yscale="log")
    axes[2].set(ylim=(-6, 6))
    axes[0].legend(fontsize=8)
    noisy = [[asnumpy(d.q_sample(x0, s, eps))[0] for s in steps] for d in every.values()]
    show(axes[3], np.array(noisy), [f"t = {s}" for s in steps], [*every])
    keep(figure, args.out / "schedules.png")
