"""The tour of tinyddpm: train on pictures, watch it learn, draw, and see each idea on the way.

    python demo.py                  train on the bundled digits (again: go on), and draw some
    python demo.py --data PATH      on your own pictures: a folder, an .npz, IDX files
    python demo.py COMMAND          one of the others, below; COMMAND --help lists its options
"""
import argparse
import contextlib
import copy
import math
import signal
import sys
import time
from pathlib import Path

import cores        # before NumPy: it sets how many threads that takes
import numpy as np
from tqdm import tqdm

import files
import noise
import pictures
import tinyddpm as td
from cores import CORES, ON_GPU, parallel
from tinyddpm import asnumpy, xp

HERE, OUT = Path(__file__).parent, Path("out")
WEIGHTS = HERE / "weights" / "mnist.npz"        # these come with the demo

# Chosen by measurement: the best found for five minutes on two CPU cores. For a GPU, larger.
CHANNELS = [64, 128, 128] if ON_GPU else [16, 32, 64]
STEPS, BATCH = (6000, 128) if ON_GPU else (3400, 32)
LR, EMA = {"muon": 9e-3, "adamw": 2e-3}, 0.995
TRAINING = dict(steps=STEPS, batch=BATCH, predicts="v", schedule="cosine", T=1000,
                optimizer="muon", lr=None, channels=CHANNELS, seed=0)
DRAWING = dict(sampler="ddim", steps=20, eta=0.6, guidance=1.6)
SAMPLERS = {"ddpm": td.ddpm, "ddim": td.ddim, "dpm_solver": td.dpm_solver, "heun": td.heun}


# --------------------------------------------------- the demo: network, process, learn, frames

def network(image=(28, 28, 1), channels=CHANNELS, classes=10, seed=0):
    """A U-Net; more blocks, and attention, at the lowest level, where pictures are small."""
    low = len(channels) - 1
    return td.UNet(image, channels, classes, blocks=(1,) * low + (2,), attention=(low,),
                   heads=1, rng=seed)


def process(schedule="cosine", T=1000, predicts="v"):
    """How pictures become noise in T steps, and what the network has to say about it."""
    return td.Diffusion(td.SCHEDULES[schedule](T), predicts)


def learn(net, diffusion, images, labels, steps=STEPS, batch=BATCH, optimizer="muon", lr=None,
          seed=0, state=None):
    """DDPM Algorithm 1, steps times: a generator of the State, with its loss, after each."""
    with cores.processes(net, CORES) as gradient:
        yield from td.train(net, diffusion, images, labels, steps=steps, batch=batch, ema=EMA,
                            optimizer=optimizer, lr=lr or LR[optimizer], rng=seed + 1,
                            chunk=16 * CORES, gradient=gradient, state=state)


def frames(net, diffusion, labels, seed, sampler, guidance, **options):
    """From noise to pictures of these classes: a generator of (t, x_t), from T down to 0."""
    rng, T, w = np.random.default_rng(seed), diffusion.T, guidance if net.classes else 1
    # At the highest noise nothing is guided, so that pictures differ more from each other.
    interval = (1, max(1, round(0.8 * T))) if w > 1 else None
    model = td.guided(parallel(net), labels, net.null, w, interval=interval)
    x = td.normal(rng, (len(labels), *net.image))
    yield T, x
    yield from SAMPLERS[sampler](model, diffusion, x, rng, **options)


# ----------------------------------------------------------------------------------- training

def train(args):
    """Train on the pictures of --data, or go on with OUT/model.npz; then draw."""
    if args.minutes and args.steps:
        raise ValueError("--minutes finds out how many --steps; give one of the two")
    began, path = time.perf_counter(), args.out / "model.npz"
    data = files.read(args.data, args.size)
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
        trial, times = copy.deepcopy(net), []
        for _ in learn(trial, diffusion, data.images, data.labels, **options | {"steps": 13}):
            times.append(time.perf_counter())
        left = 0.9 * 60 * args.minutes - (times[-1] - began)        # a tenth is for drawing
        fit = int(left / np.median(np.diff(times[2:])))
        options["steps"] = notes["steps"] = done + max(1, fit)
    steps, batch = options["steps"], options["batch"]
    args.out.mkdir(parents=True, exist_ok=True)     # if that fails, then now, not at the end
    print(f"{net.params.flat.size:,} parameters; {steps:,} steps of {batch} pictures, {done:,} "
          f"of them done; {xp.__name__}{'' if ON_GPU else f' on {CORES} cores'}")
    if done < steps:
        print(f"{args.out / 'samples.png'} shows what it draws, anew every half minute; Ctrl-C "
              "saves and stops")
    else:
        print(f"{path} has had all its steps; --steps N goes on to more, --fresh starts over")
    with (patience() as interrupted,
          tqdm(total=steps, initial=done, unit=" steps", smoothing=0.05,
               disable=None) as bar):           # None: only at a terminal
        saved = time.perf_counter()
        for state in learn(net, diffusion, data.images, data.labels, **options, state=state):
            losses.append(state.loss)
            recent = f"loss {np.mean(losses[-50:]):.4f}"
            bar.set_postfix_str(recent, refresh=False)
            bar.update()
            if bar.disable and 10 * state.step // steps > 10 * (state.step - 1) // steps:
                print(f"step {state.step:,} of {steps:,}, {recent}")
            if interrupted or time.perf_counter() - saved > 30 or state.step == steps:
                td.save(path, net, diffusion, state, **notes)
                if state.step < steps and not interrupted:
                    glance(args.out, net.with_params(state.ema.flat), diffusion, notes)
                saved = time.perf_counter()
            if interrupted:
                break
    if state.step < steps:
        again = "the same command, without --fresh," if args.fresh else "the same command"
        raise SystemExit(f"stopped after step {state.step:,} of {steps:,}, which {path} holds; "
                         f"{again} goes on from there")
    if done < steps:
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
    was = notes | {"steps": state.step}
    for name, value in asked.items():
        if value != was[name] and not (name == "steps" and value > state.step):
            raise ValueError(f"{path} was trained with {name} {was[name]}, not {value}; {BOTH}")
    return net, diffusion, state, notes | asked


def fits(path, net, notes, data, advice):
    """A ValueError, in plain words, unless the network was trained on these pictures."""
    was, now = (net.image, notes["names"]), (data.images.shape[1:], data.names)
    if was != now:
        raise ValueError(f"{path} was trained on pictures of {files.words(*was)}; these are of "
                         f"{files.words(*now)}; {advice}")
    if notes.get("data", data.crc()) != data.crc():
        raise ValueError(f"{path} was trained on other pictures than these; {advice}")


@contextlib.contextmanager
def patience():
    """Ctrl-C or SIGTERM only fills this list, so that the step under way can end; a second one
    stops at once."""
    asked = []

    def restore(*signals):
        asked.extend(signals)
        for number, handler in before.items():
            signal.signal(number, handler)
    before = {number: signal.signal(number, restore)        # which returns what was there
              for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        restore()


def glance(out, net, diffusion, notes):
    """Redraw OUT/samples.png during training: four rows, in few steps."""
    labels, heads = files.columns(notes["names"])
    x = td.sample(frames(net, diffusion, np.tile(labels, 4), notes["seed"], "dpm_solver",
                         DRAWING["guidance"], steps=min(8, diffusion.T)))
    files.sheet(out / "samples.png", asnumpy(x).reshape(4, -1, *net.image), heads, say=False)


def results(out, net, diffusion, notes):
    """Draw samples.png; how they came out of noise, denoising.gif and .png; and loss.png."""
    labels, heads = files.columns(notes["names"])
    rows = max(3, min(10, 100 // len(labels)))
    pages, strip, how = [], {}, choices(diffusion)
    course = watched(net, diffusion, np.tile(labels, rows), notes["seed"], **how)
    for i, (t, x) in enumerate(course):
        x = asnumpy(x).reshape(rows, -1, *net.image)
        strip[t] = x[1, ::max(1, len(labels) // 5)]
        if i % 4 == 0 or i > 0.4 * how["steps"]:        # the first are noise: a few will do
            pages.append(files.tile(x))
    files.sheet(out / "samples.png", x, heads)
    some = np.array([*strip])[np.linspace(0, len(strip) - 1, 10).astype(int)]
    files.sheet(out / "denoising.png", np.stack([strip[t] for t in some], 1),
                [f"t = {t}" for t in some])
    files.film(out / "denoising.gif", pages)
    losses, width = notes["losses"], max(1, len(notes["losses"]) // 50)
    mean = np.convolve(losses, np.ones(width) / width, "valid")
    files.plot(out / "loss.png", (np.arange(len(losses)) + 1, losses, "each step",
                                  dict(lw=0.5, alpha=0.4)),
               (np.arange(len(mean)) + (width + 1) / 2, mean, "running mean", dict(lw=1.5)),
               title=f"loss {mean[-1]:.4f} at the end", xlabel="step", yscale="log",
               ylabel=f"squared error of {diffusion.predicts}, past clipping")


# ------------------------------------------------------------------------------------ drawing

def trained(args):
    """The network of --model, or else of OUT/model.npz, with the average of its parameters;
    its diffusion; its notes. Where nothing is trained, or for a trial of a few steps only, the
    weights that come with the demo. Says which."""
    path, free = args.model or args.out / "model.npz", args.model is None and args.out == OUT
    if not (free or path.exists()):
        raise FileNotFoundError(f"{path} is not there; `python demo.py --out DIR` trains "
                                "DIR/model.npz, and --model FILE chooses a file")
    shipped = td.load(WEIGHTS)
    loaded = td.load(path) if path.exists() or not free else shipped
    net, diffusion, state, notes = loaded
    if free and state and state.step < 100 and notes.get("data") == shipped[3]["data"]:
        print(f"{path} has had {state.step} steps of training, too few to draw with; --model "
              f"{path} draws with it all the same")
        net, diffusion, state, notes = loaded = shipped
    if state:
        net, notes["steps"] = net.with_params(state.ema.flat), state.step
    notes.setdefault("names", [str(k) for k in range(net.classes)])
    source = "the weights that come with the demo" if loaded is shipped else path
    print(f"drawing with {source}"
          + (f", after {notes['steps']:,} steps of training" if "steps" in notes else ""))
    return net, diffusion, notes


def choices(diffusion, sampler=None, steps=None, eta=None, guidance=None):
    """Options of `frames`: what is asked for, and for the rest DRAWING."""
    sampler = sampler or DRAWING["sampler"]
    if eta is not None and sampler != "ddim":
        raise ValueError(f"--eta is an option of ddim's; {sampler} has none")
    if steps and steps > diffusion.T:
        raise ValueError(f"--steps is {steps}, and this network was trained with only "
                         f"{diffusion.T} from noise to picture")
    few = diffusion.T if sampler == "ddpm" else min(DRAWING["steps"], diffusion.T)
    return {"sampler": sampler, "steps": steps or few,
            "guidance": DRAWING["guidance"] if guidance is None else guidance,
            **({"eta": DRAWING["eta"] if eta is None else eta} if sampler == "ddim" else {})}


def watched(net, diffusion, labels, seed, **how):
    """The frames, with a progress bar at a terminal."""
    return tqdm(frames(net, diffusion, labels, seed, **how), how["sampler"], how["steps"] + 1,
                unit=" steps", disable=None)


def draw(net, diffusion, labels, seed, **asked):
    """The last frame, x_0: host (N, H, W, C)."""
    how = choices(diffusion, **asked)
    return asnumpy(td.sample(watched(net, diffusion, labels, seed, **how)))


def sample(args):
    """Draw pictures: OUT/sample.png; --save FILE writes all, and their labels, as .npz."""
    net, diffusion, notes = trained(args)
    chosen, heads = files.columns(notes["names"], args.digits)
    labels = np.resize(chosen, args.count or 10 * len(chosen))
    began = time.perf_counter()
    x = draw(net, diffusion, labels, args.seed, sampler=args.sampler, steps=args.steps,
             eta=args.eta, guidance=args.guidance)
    took = time.perf_counter() - began
    print(f"{len(x)} pictures in {took:.1f} s, {1000 * took / len(x):.0f} ms each")
    if args.save:
        with files.written(args.save) as file:
            np.savez_compressed(file, x=x, y=labels, names=np.array(notes["names"]))
        print(f"wrote {args.save}: x {x.shape} in [-1, 1], y {labels.shape}")
    rows = min(20, -(-len(x) // len(chosen)))
    page = np.full((rows * len(chosen), *net.image), -1.0, np.float32)
    page[:len(x)] = x[:len(page)]
    files.sheet(args.out / "sample.png", page.reshape(rows, -1, *net.image), heads)


def speed(args):
    """DDPM with all steps against DDIM with 10, 20, 50 and eta 0, 0.5, 1: time and picture."""
    net, diffusion, notes = trained(args)
    labels, heads = files.columns(notes["names"])
    full = args.full or diffusion.T
    runs = {f"DDPM {full}": dict(sampler="ddpm", steps=full)}
    runs |= {f"DDIM {steps}, eta {eta}": dict(sampler="ddim", steps=steps, eta=eta)
             for steps in (10, 20, 50) if steps <= diffusion.T for eta in (0, 0.5, 1)}
    rows, times = [], []
    for run in runs.values():
        began = time.perf_counter()
        rows.append(draw(net, diffusion, labels, args.seed, **run))
        times.append(time.perf_counter() - began)
    print(f"{'':18}{'seconds':>8}   DDPM takes ... times as long")
    for name, took in zip(runs, times):
        print(f"{name:18}{took:8.2f}{times[0] / took:9.1f}")
    files.sheet(args.out / "speed.png", np.stack(rows), heads,
                [f"{name}: {took:.1f} s" for name, took in zip(runs, times)])


def guidance(args):
    """A row of pictures for each guidance weight, from the same noise."""
    net, diffusion, notes = trained(args)
    labels, heads = files.columns(notes["names"])
    rows = {f"w = {w}": draw(net, diffusion, labels, args.seed, guidance=w)
            for w in (0, 1, 2, 3, 7.5)}
    for name, row in rows.items():
        print(f"{name:8}{np.mean(np.abs(row) > 0.98):5.0%} of the pixels are black or white")
    files.sheet(args.out / "guidance.png", np.stack([*rows.values()]), heads, [*rows])


def bpd(args):
    """Bits per dimension of test pictures, given their labels, with the bound's parts."""
    net, diffusion, notes = trained(args)
    data = files.read(args.data, args.size)
    fits("the network", net, notes, data, "--model and --data choose others")
    if data.test_images is None:
        raise ValueError(f"{args.data} has no test pictures, and they are what bpd measures")
    images, rng = data.test_images, np.random.default_rng(args.seed)
    labels = np.zeros(len(images), int) if data.test_labels is None else data.test_labels
    pick = rng.permutation(len(images))[:args.count]
    model = td.guided(parallel(net), labels[pick], net.null, 1)
    with tqdm(total=diffusion.T, unit=" steps", disable=None) as bar:
        def counted(x, t):
            bar.update()
            return model(x, t)
        bound = td.variational_bound(diffusion, counted, xp.asarray(images[pick]), rng)
    total, steps, decoder = bound["total"], bound["steps"], bound["decoder"]
    print(f"{len(pick)} test pictures: {total:.3f} bits per dimension\n"
          f"  prior    {bound['prior']:.5f}   x_T is not quite noise\n"
          f"  steps    {steps.sum():.5f}   the model's x0 is not the true one; sum over t > 1\n"
          f"  decoder  {decoder:.5f}   from x_1 to bytes")
    files.plot(args.out / "bpd.png",
               ([1], [decoder], f"decoder {decoder:.3f}", dict(marker="o", ls="")),
               (np.arange(2, diffusion.T + 1), steps, f"steps, in all {steps.sum():.3f}", {}),
               title=f"{total:.3f} bits per dimension in all", xlabel="t", xscale="log",
               ylabel="bits per dimension of the step to t-1", yscale="log")


def export(args):
    """Write what drawing needs of OUT/model.npz, in few bytes, as weights/mnist.npz has it."""
    args.model = args.model or args.out / "model.npz"
    net, diffusion, notes = trained(args)
    path = args.weights or args.out / "weights.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    half = net.with_params(net.params.flat.astype(np.float16))
    td.save(path, half, diffusion, **notes | {"losses": []})
    print(f"wrote {path}: {path.stat().st_size:,} bytes")


# --------------------------------------------------------------------------- the command line

def number(kind, low, high=math.inf):
    """An argparse type: an int or a float from low to high."""
    limits = f"{low} or more" if high == math.inf else f"from {low} to {high}"

    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not {limits}")
        return value
    parse.__name__ = kind.__name__
    return parse


def parser():
    top = argparse.ArgumentParser(description=__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(title="commands", metavar="COMMAND")

    def command(function, *options):
        sub = commands.add_parser(function.__name__, help=function.__doc__.splitlines()[0],
                                  description=function.__doc__)
        sub.set_defaults(run=function)
        for flags, settings in options:
            sub.add_argument(*flags, **settings)

    def option(flags, kind, help, default=None, shown=None, **more):
        shown = default if shown is None else shown
        metavar = {Path: "PATH", str: "NAME"}.get(kind, "N")
        return flags.split(), {"type": kind, "metavar": metavar, "default": default, **more,
                               "help": help + ("" if shown is None else f" (default: {shown})")}

    def one_of(flag, what, names, shown, default=None):
        what += ": " + ", ".join(names)
        return option(flag, str, what, default, shown, choices=[*names])

    whole, natural, share = number(int, 1), number(int, 0), number(float, 0, 1)
    out = option("--out", Path, "folder of the checkpoint and the pictures", OUT)
    data = [option("--data", Path, "pictures: a folder, with subfolders if there are classes; "
                   "an .npz; IDX files, as MNIST's", pictures.DIGITS, "the bundled digits"),
            option("--size", whole, "crop and resize the pictures of a folder to N x N")]
    seed = option("--seed", natural, "of the noise", 0)
    model = option("--model", Path, "weights to draw with", shown="OUT/model.npz")
    drawn = out, model, seed
    command(train, out, *data,
            option("--minutes", number(float, 0.01), "about how long, drawing included"),
            option("--steps", whole, "of training; more than before: it goes on", shown=STEPS),
            option("--batch", whole, "pictures a step", shown=BATCH),
            one_of("--predicts", "what the network answers", td.PREDICTS, "v"),
            one_of("--schedule", "of the noise", td.SCHEDULES, "cosine"),
            option("--T", whole, "steps from a picture to noise", shown=1000),
            one_of("--optimizer", "what takes the steps", LR, "muon"),
            option("--lr", number(float, 1e-9, 1), "highest learning rate",
                   shown=", ".join(f"{lr} with {name}" for name, lr in LR.items())),
            option("--channels", whole, "of each level", shown=" ".join(map(str, CHANNELS)), nargs="+"),
            option("--seed", natural, "of parameters, training and pictures", shown=0),
            (["--fresh"], dict(action="store_true", help="start over")))
    command(sample, *drawn,
            one_of("--sampler", "one of", SAMPLERS, DRAWING["sampler"]),
            option("--steps", whole, "of the sampler, each a call of the network, heun's two",
                   shown=f"{DRAWING['steps']}, with ddpm all"),
            option("--eta", share, "ddim's noise, from 0 to ddpm's at 1", shown=DRAWING["eta"]),
            option("--guidance", number(float, -1e3, 1e3), "w: 0 ignores classes, 1 follows "
                   "them, more insists", shown=DRAWING["guidance"]),
            option("--digits --classes", str, "which to draw, a column each", shown="the first 30",
                   nargs="+"),
            option("--count", whole, "how many pictures", shown="10 a column"),
            option("--save", Path, "write all pictures and labels here, .npz"))
    command(speed, *drawn, option("--full", whole, "steps of DDPM", shown="all"))
    command(guidance, *drawn)
    command(bpd, *drawn, *data, option("--count", whole, "test pictures", 100))
    command(noise.forward, out, *data, seed,
            option("--digit --class", str, "which to show", shown="the first picture's",
                   dest="digit"),
            one_of("--schedule", "of the noise", td.SCHEDULES, "linear", "linear"))
    command(noise.schedules, out, *data, seed)
    command(export, out, model, option("--weights", Path, "the file", shown="OUT/weights.npz"))
    command(files.download, option("--data", Path, "folder to fill", Path("mnist")),
            option("--url", str, "where the four .gz files are", files.MNIST_URL))
    return top


@contextlib.contextmanager
def one_sentence(program):
    """What goes wrong ends the program with a sentence, not with a traceback."""
    try:
        yield
    except (ValueError, OSError, ArithmeticError, MemoryError) as error:
        raise SystemExit(f"{program}: {str(error).strip() or type(error).__name__}")
    except KeyboardInterrupt:
        raise SystemExit(f"{program}: stopped")


def main(words):
    cores.keep_memory()
    if not words or words[0].startswith("-") and words[0] not in ("-h", "--help"):
        words = ["train", *words]           # plain `python demo.py` trains
    args = parser().parse_args(words)
    with one_sentence("demo.py"):
        args.run(args)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)         # a file that it goes to can be followed
    main(sys.argv[1:])
