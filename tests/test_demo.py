"""The demo: its lines are tinyddpm's, training stops and goes on as one run, any pictures train
and draw, what does not belong together is found, and each failure is one sentence."""
import gzip
import hashlib
import http.server
import itertools
import re
import signal
import struct
import subprocess
import sys
import threading
from argparse import Namespace
from functools import partial

import numpy as np
import pytest
from PIL import Image

import cores
import demo
import files
import pictures
import tinyddpm as td
from common import close

pytestmark = pytest.mark.skipif(td.xp is not np, reason="these run with TINYDDPM_BACKEND=numpy")
SIZE, NAMES, T = 8, ["a", "c", "x"], 10
SMALL = ["--steps", "6", "--batch", "4", "--channels", "8", "8", "8", "--T", T]


def run(*words):
    demo.main([str(word) for word in words])


def complaint(*words):
    """The command ends with a status that is not 0 and one sentence, which this returns."""
    with pytest.raises(SystemExit) as end:
        run(*words)
    text = end.value.code           # a text is printed, and the status is 1
    assert isinstance(text, str) and re.fullmatch("demo.py: .+", text)
    return text


def small_set(path, seed=0, **changes):
    """An .npz of bytes at random: 40 pictures in three classes, and 12 for tests."""
    x = np.random.default_rng(seed).integers(0, 256, (52, SIZE, SIZE), np.uint8)
    y = np.array(NAMES)[np.arange(52) % 3]
    arrays = dict(x_train=x[:40], y_train=y[:40], x_test=x[40:], y_test=y[40:]) | changes
    np.savez(path, **{name: a for name, a in arrays.items() if a is not None})
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_set(tmp_path_factory.mktemp("data") / "small.npz")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A directory with a tiny training, and the pictures that it leaves."""
    out = tmp_path_factory.mktemp("trained")
    run("train", *SMALL, "--lr", "0.3", "--data", data, "--out", out)
    return out


@pytest.fixture
def copy(trained, tmp_path):
    """A directory with the same training, to change."""
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "model.npz").write_bytes((trained / "model.npz").read_bytes())
    return tmp_path / "copy"


@pytest.fixture
def sheets(monkeypatch):
    """Pictures are not drawn; what would be on them is kept here, all under one file name."""
    kept = {}
    for name in ("sheet", "film", "plot"):
        monkeypatch.setattr(files, name, lambda path, *what, **more:
                            kept.setdefault(path.name, []).append(what))
    return kept


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("L"), float)


def load(out):
    return demo.trained(Namespace(model=None, out=out))


def test_training_is_tinyddpms(trained, data):
    """The losses, one by one, are those of td.train with the settings that the demo says."""
    net, diffusion, state, notes = td.load(trained / "model.npz")
    fresh = td.UNet((SIZE, SIZE, 1), (8, 8, 8), 3, blocks=(1, 1, 2), attention=(2,), heads=1)
    digits = pictures.load(data)
    with cores.processes(fresh) as gradient:
        losses = [state.loss for state in td.train(
            fresh, td.Diffusion(td.cosine_betas(T), "v"), digits.images, digits.labels, steps=6,
            batch=4, lr=0.3, optimizer="muon", ema=0.995, rng=1, gradient=gradient)]
    assert notes["losses"] == losses and state.step == 6 and diffusion.predicts == "v"
    assert np.array_equal(net.params.flat, fresh.params.flat)
    assert notes["names"] == NAMES and notes["data"] == digits.crc()


def test_drawing_is_tinyddpms(trained):
    """With the average, not with the last parameters; guided below 0.8 T."""
    net, diffusion, state, _ = td.load(trained / "model.npz")
    found, _, notes = load(trained)
    assert np.any(net.params.flat != state.ema.flat) and notes["steps"] == 6
    assert np.array_equal(found.params.flat, state.ema.flat)
    labels, rng = np.arange(3), np.random.default_rng(7)
    model = td.guided(net.with_params(state.ema.flat), labels, 3, 1.6, interval=(1, 8))
    x = td.normal(rng, (3, *net.image))
    x = td.sample(td.ddim(model, diffusion, x, rng, steps=5, eta=0.6))
    close(demo.draw(found, diffusion, labels, 7, steps=5), x, 1e-4)


# ----------------------------------------------------------------------------------- training

def all_of(path):
    """What training leaves: all arrays, the losses and the step."""
    net, _, state, notes = td.load(path)
    return [net.params.flat, state.ema.flat, state.optimizer.m, state.optimizer.v,
            np.array(notes["losses"]), np.array(state.step)]


def assert_same_run(path, other):
    for a, b in zip(all_of(path), all_of(other)):
        assert np.array_equal(a, b)


def test_train_leaves_its_files(trained):
    left = ["denoising.gif", "denoising.png", "loss.png", "model.npz", "samples.png"]
    assert sorted(path.name for path in trained.iterdir()) == left
    for name in ("samples.png", "denoising.png", "denoising.gif", "loss.png"):
        assert pixels(trained / name).std() > 1


def test_the_pictures_of_train(copy, data, sheets):
    """A finished training only draws again. Ten rows of all classes; one of each on its way
    from noise, t = T, to x_0; all in the film, which begins with noise and ends with them."""
    before = (copy / "model.npz").read_bytes()
    run("train", "--data", data, "--out", copy)
    assert (copy / "model.npz").read_bytes() == before
    net, diffusion, _ = load(copy)
    labels, how = np.tile(np.arange(3), 10), demo.choices(diffusion)
    frames = {t: x.reshape(10, 3, SIZE, SIZE, 1)
              for t, x in demo.frames(net, diffusion, labels, 0, **how)}
    (images, heads), = sheets["samples.png"]
    assert heads == NAMES and np.array_equal(images, frames[0])
    (strip, times), = sheets["denoising.png"]
    assert times[0] == "t = 10" and times[-1] == "t = 0"
    assert np.array_equal(strip[:, [0, -1]], np.stack([frames[T][1], frames[0][1]], 1))
    (pages,), = sheets["denoising.gif"]
    for page, t in ((pages[0], T), (pages[-1], 0)):
        assert np.array_equal(page, files.tile(frames[t]))


def test_every_half_minute_it_saves_and_draws(data, tmp_path, sheets, monkeypatch):
    """Here half a minute passes at each look at the clock. The last sheet is the whole one."""
    clock = Namespace(perf_counter=itertools.count(0, 31).__next__)
    monkeypatch.setattr(demo, "time", clock)
    saves = []
    monkeypatch.setattr(td, "save", lambda path, net, diffusion, state, **notes:
                        saves.append((state.step, len(notes["losses"]))))
    run("train", *SMALL, "--data", data, "--out", tmp_path)
    assert saves == [(i, i) for i in range(1, 7)]
    assert [len(images) for images, _ in sheets["samples.png"]] == [4] * 5 + [10]


@pytest.mark.parametrize("terminal", [False, True])
def test_progress(terminal, data, tmp_path, sheets, capsys, monkeypatch):
    """To a file it is a line every tenth of the way; at a terminal, a bar."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    run("train", *SMALL, "--steps", "30", "--data", data, "--out", tmp_path)
    said = capsys.readouterr()
    steps = re.findall(r"step (\d+) of 30, loss 0\.\d+\n", said.out)
    assert steps == ([] if terminal else [str(3 * i) for i in range(1, 11)])
    assert ("steps/s" in said.err) == terminal and ("\r" in said.err) == terminal


def test_more_steps_go_on(copy, data, sheets):
    """From where it was, with the losses that it had."""
    before = all_of(copy / "model.npz")
    run("train", "--steps", "9", "--data", data, "--out", copy)
    losses, step = all_of(copy / "model.npz")[-2:]
    assert step == 9 and len(losses) == 9 and np.array_equal(losses[:6], before[-2])


def test_minutes_set_the_steps(copy, data, sheets, monkeypatch):
    """A step takes 0.5 s by this clock: as many as fit in 0.9 of it, less the 13 tried."""
    clock = itertools.count(0, 0.5)
    monkeypatch.setattr(demo, "time", Namespace(perf_counter=lambda: next(clock)))
    run("train", "--minutes", "0.5", "--data", data, "--out", copy)
    step = td.load(copy / "model.npz")[2].step
    assert step == 6 + (0.9 * 30 - 13 * 0.5) // 0.5


@pytest.mark.parametrize("option, asked, before", [
    ("batch", "5", "4"), ("lr", "0.25", "0.3"), ("channels", "16", "[8, 8, 8]"),
    ("seed", "1", "0"), ("predicts", "eps", "v"), ("schedule", "linear", "cosine"),
    ("T", "20", "10"), ("optimizer", "adamw", "muon"), ("steps", "5", "6")])
def test_other_options_than_the_training_had(option, asked, before, copy, data):
    """Are refused with both values, and the checkpoint stays as it was; fewer steps too."""
    old = (copy / "model.npz").read_bytes()
    text = complaint("train", f"--{option}", asked, "--data", data, "--out", copy)
    assert option in text and before in text and asked in text and "--fresh" in text
    assert (copy / "model.npz").read_bytes() == old


@pytest.mark.parametrize("words, betas, predicts, muon", [
    ("--predicts eps --T 20", td.cosine_betas(20), "eps", True),
    ("--predicts flow --schedule flow", td.flow_betas(T), "flow", True),
    ("--optimizer adamw", td.cosine_betas(T), "v", False)])
def test_one_word_changes_the_experiment(words, betas, predicts, muon, data, tmp_path, sheets):
    run("train", *SMALL, *words.split(), "--data", data, "--out", tmp_path)
    _, diffusion, state, notes = td.load(tmp_path / "model.npz")
    close(diffusion.beta[1:], betas)
    assert diffusion.predicts == predicts and state.optimizer.muon == muon
    assert notes["lr"] == demo.LR["muon" if muon else "adamw"]


def test_fresh_starts_over(trained, data, tmp_path, sheets):
    """Whatever was there before."""
    (tmp_path / "model.npz").write_bytes(b"damaged")
    run("train", "--fresh", *SMALL, "--lr", "0.3", "--data", data, "--out", tmp_path)
    assert_same_run(tmp_path / "model.npz", trained / "model.npz")


def test_asked_once_it_is_patient_and_asked_twice_it_stops():
    """And what Ctrl-C did before, it does afterwards."""
    before = signal.getsignal(signal.SIGINT)
    with demo.patience() as asked, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
        assert asked
        signal.raise_signal(signal.SIGINT)
    with demo.patience():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


SLOWLY = """
import sys, time, demo
train = demo.td.train
def slowly(*args, **options):
    for state in train(*args, **options):
        yield state
        time.sleep(0.05)
demo.td.train = slowly
demo.main(sys.argv[1:])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_saves_and_going_on_is_the_same_run(number, data, tmp_path, sheets):
    options = ["train", *map(str, SMALL), "--steps", "20", "--data", data, "--out"]
    run(*options, tmp_path / "whole")
    with subprocess.Popen([sys.executable, "-u", "-c", SLOWLY, *options, tmp_path / "other"],
                          cwd=demo.HERE, stdout=-1, stderr=-1, text=True) as child:
        while not child.stdout.readline().startswith("step 4 of 20"):
            assert child.poll() is None
        child.send_signal(number)
        said = child.communicate(timeout=60)[1]
    assert child.returncode == 1 and "Traceback" not in said
    step = int(re.search(r"step (\d+) of 20, which .*model.npz holds", said)[1])
    assert 4 <= step < 20 and td.load(tmp_path / "other" / "model.npz")[2].step == step
    run(*options, tmp_path / "other")
    assert_same_run(tmp_path / "whole" / "model.npz", tmp_path / "other" / "model.npz")


# ------------------------------------------------------------------------------- any pictures

X = pictures.read_idx(pictures.DIGITS / "t10k-images-idx3-ubyte.gz")
Y = pictures.read_idx(pictures.DIGITS / "t10k-labels-idx1-ubyte.gz")
SOME = np.concatenate([np.flatnonzero(Y == k)[:4] for k in (0, 2, 5)])
X, Y = X[SOME], Y[SOME]


def idx(path):
    for split in ("train", "t10k"):
        for what, a in (("images", X), ("labels", Y)):
            (path / f"{split}-{what}-idx{a.ndim}-ubyte").write_bytes(
                struct.pack(f">HBB{a.ndim}I", 0, 8, a.ndim, *a.shape) + a.tobytes())


def npz(path):
    np.savez(path / "set.npz", images=X / 255, labels=Y)


def folder(path, classes=False):
    for i, (x, y) in enumerate(zip(X, Y)):
        place = path / f"class {y}" if classes else path
        place.mkdir(exist_ok=True)
        Image.fromarray(np.stack([x, x // 2, x], 2) if classes else x).save(place / f"{i}.png")


@pytest.mark.parametrize("write, names, image", [
    (idx, ["0", "2", "5"], (28, 28, 1)), (npz, ["0", "2", "5"], (28, 28, 1)),
    (partial(folder, classes=True), ["class 0", "class 2", "class 5"], (16, 16, 3)),
    (folder, [], (16, 16, 1))])
def test_a_layout_trains_and_draws(write, names, image, tmp_path, sheets):
    """A few real digits, as people have theirs: from one command, with only the classes that
    there are, under their own names; and bpd where there are test pictures."""
    data, out = tmp_path / "set", tmp_path / "out"
    data.mkdir()
    write(data)
    data = data / "set.npz" if write is npz else data
    options = ["--data", data, "--out", out, *(["--size", "16"] if image[0] == 16 else [])]
    run("train", *SMALL, *options)
    (images, heads), = sheets["samples.png"]
    assert heads == names and images.shape == (10, len(names) or 10, *image)
    x, y = draw(out, *(["--digits", names[2], "--count", "2"] if names else []))
    assert len(x) == (2 if names else 100) and set(y) == ({2} if names else {0})
    run("forward", *options)
    if write is idx:
        run("bpd", "--count", "2", *options)
    else:
        assert "test" in complaint("bpd", *options)


@pytest.mark.parametrize("change, told", [
    ({"x_train": np.zeros((40, 8, 12), np.uint8), "x_test": None, "y_test": None},
     ["8 x 8", "8 x 12"]),
    ({"x_train": np.zeros((40, 8, 8, 3), np.uint8), "x_test": None, "y_test": None},
     ["grey", "colour"]),
    ({"y_train": np.arange(40) % 4, "y_test": np.arange(12) % 4}, ["a c x", "0 1 2 3"]),
    ({"y_train": None, "y_test": None}, ["a c x", "without classes"]),
    ({"seed": 1}, ["other"])], ids=["size", "channels", "classes", "no classes", "another set"])
@pytest.mark.parametrize("command", ["train", "bpd"])
def test_pictures_that_do_not_belong_to_the_network(command, change, told, copy, tmp_path,
                                                    monkeypatch):
    """Are found before anything is computed, and what differs is said in words."""
    monkeypatch.setattr(td.UNet, "forward", None)
    other = small_set(tmp_path / "other.npz", **change)
    text = complaint(command, "--data", other, "--out", copy)
    assert all(word in text for word in told)


# --------------------------------------------------------------- weights, and drawing with them

def test_before_training_the_weights_of_the_demo_draw(tmp_path, monkeypatch, capsys, sheets):
    """And after a trial of a few steps too, which is said; --model has the last word. Only
    where no other --out was asked for."""
    monkeypatch.chdir(tmp_path)
    assert demo.WEIGHTS.stat().st_size < 1e6
    run("sample", "--count", "1", "--steps", "1")
    assert "come with the demo" in capsys.readouterr().out
    run("train", "--steps", "2", "--batch", "2", "--channels", "4", "4", "4", "--T", "2")
    run("sample", "--count", "1", "--steps", "1")
    said = capsys.readouterr().out
    assert "come with the demo" in said and "out/model.npz has had 2 steps" in said
    run("sample", "--count", "1", "--steps", "1", "--model", "out/model.npz")
    assert "out/model.npz, after 2 steps" in capsys.readouterr().out
    assert "other" in complaint("sample", "--out", "other")
    assert "none.npz" in complaint("sample", "--model", "none.npz")


def test_any_checkpoint_draws_but_only_the_demos_go_on(copy, data):
    """Such as one that tinyddpm saved for another program, with other notes or none."""
    net, diffusion, state, _ = td.load(copy / "model.npz")
    td.save(copy / "model.npz", net, diffusion, state, note="of another program")
    assert draw(copy, "--digits", "2", "--count", "1")[0].shape == (1, SIZE, SIZE, 1)
    assert "model.npz" in complaint("train", "--data", data, "--out", copy)


def test_export_holds_the_average_in_half_the_bytes(copy):
    """float16 of the EMA, and no State, to draw with in float32; not over the shipped file."""
    shipped = demo.WEIGHTS.read_bytes()
    run("export", "--out", copy)
    assert demo.WEIGHTS.read_bytes() == shipped
    _, _, state, notes = td.load(copy / "model.npz")
    net, diffusion, none, exported = td.load(copy / "weights.npz")
    assert none is None and np.array_equal(net.params.flat, state.ema.flat.astype(np.float16))
    assert (copy / "weights.npz").stat().st_size < 2.5 * net.params.flat.size
    assert exported == notes | {"losses": []}
    assert demo.draw(net, diffusion, np.arange(2), 0, steps=2).dtype == np.float32
    run("export", "--out", copy, "--weights", copy / "model.npz")       # as it is told
    assert td.load(copy / "model.npz")[2] is None


def draw(out, *words):
    """The numbers that `sample` saves."""
    run("sample", *words, "--out", out, "--save", out / "numbers.npz")
    with np.load(out / "numbers.npz") as file:
        return file["x"], file["y"]


def test_sample_saves_images_and_labels(copy):
    x, y = draw(copy, "--digits", "x", "a", "--count", "5", "--steps", "4")
    assert x.shape == (5, SIZE, SIZE, 1) and x.dtype == np.float32
    assert -1 <= x.min() < x.max() <= 1 and np.array_equal(y, [2, 0, 2, 0, 2])
    assert pixels(copy / "sample.png").std() > 1


def test_ddpm_takes_all_steps_by_itself():
    """As --help says: 20 with DDIM, all with DDPM, and never more than there are."""
    diffusion = td.Diffusion(td.cosine_betas(100))
    for sampler, asked, steps in (("ddim", None, 20), ("ddpm", None, 100), ("ddpm", 7, 7)):
        assert demo.choices(diffusion, sampler, asked)["steps"] == steps
    assert demo.choices(td.Diffusion(td.cosine_betas(5)))["steps"] == 5


def test_speed(copy, capsys):
    """A line for each way of drawing, with its time and the ratio to DDPM's."""
    run("speed", "--full", "4", "--out", copy)
    table = re.findall(r"^(DD.{16}) +([\d.]+) +([\d.]+)$", capsys.readouterr().out, re.M)
    assert [name.strip() for name, _, _ in table] \
        == ["DDPM 4"] + [f"DDIM 10, eta {eta}" for eta in ("0", "0.5", "1")]
    assert table[0][2] == "1.0" and pixels(copy / "speed.png").std() > 1


def test_guidance(copy, capsys, sheets):
    """A row for each weight from the same noise, none like another; the row of 1 is what sample
    draws with 1; and weight 0 ignores the class."""
    run("guidance", "--seed", "2", "--out", copy)
    weights = re.findall(r"^w = ([\d.]+) +\d+%", capsys.readouterr().out, re.M)
    (page, heads, _), = sheets["guidance.png"]
    assert weights == ["0", "1", "2", "3", "7.5"] and len(page) == 5 and heads == NAMES
    assert all(np.any(a != b) for a, b in itertools.combinations(page, 2))
    x, _ = draw(copy, "--count", "3", "--guidance", "1", "--seed", "2")
    a, b = (draw(copy, "--digits", name, "--count", "2", "--guidance", "0")[0] for name in "ac")
    assert np.array_equal(page[1], x) and np.array_equal(a, b)


def test_bpd(copy, data, capsys):
    """The parts add up, and the sum is what tinyddpm says of the same pictures and labels."""
    run("bpd", "--count", "2", "--seed", "1", "--data", data, "--out", copy)
    said = capsys.readouterr().out
    total = float(re.search(r"^2 test pictures: ([\d.]+) bits", said, re.M)[1])
    parts = [float(part) for part in re.findall(r"^  \w+ +([\d.]+) ", said, re.M)]
    assert len(parts) == 3 and sum(parts) == pytest.approx(total, abs=6e-4)
    test, rng = pictures.load(data), np.random.default_rng(1)
    pick, (net, diffusion, _) = rng.permutation(12)[:2], load(copy)
    bound = td.variational_bound(diffusion, lambda x, t: net(x, t, test.test_labels[pick]),
                                 test.test_images[pick], rng)
    assert total == pytest.approx(bound["total"], abs=6e-4)
    assert pixels(copy / "bpd.png").std() > 1


def test_forward(data, tmp_path, capsys, sheets):
    """The first picture of the class at six steps, with the table's numbers."""
    run("forward", "--digit", "c", "--schedule", "flow", "--data", data, "--out", tmp_path)
    diffusion, test = td.Diffusion(td.flow_betas(1000), "v"), pictures.load(data)
    table = re.findall(r"^ *(\d+) +(\S+) +(\S+)$", capsys.readouterr().out, re.M)
    steps = np.array([int(t) for t, _, _ in table])
    close([[float(a), float(b)] for _, a, b in table],
          np.stack([diffusion.abar[steps], diffusion.snr[steps]], 1), 1e-3)
    (frames, _), = sheets["forward.png"]
    x0 = test.test_images[test.test_labels == 1][:1]
    eps = td.normal(0, x0.shape)
    assert frames.shape[1] == len(steps) == 6 and steps[0] == 1 and steps[-1] == 1000
    for i, t in enumerate(steps):
        close(frames[:, i], diffusion.q_sample(x0, t, eps))


def test_schedules(data, tmp_path, capsys):
    """A line for each of them, and their picture; no checkpoint is needed."""
    run("schedules", "--data", data, "--out", tmp_path)
    said = capsys.readouterr().out
    for name in (*td.SCHEDULES, "linear, zero SNR"):
        assert re.search(rf"^{name} +[\d.]", said, re.M)
    assert pixels(tmp_path / "schedules.png").std() > 1


# -------------------------------------------------------------------- files, whole or not there

def test_a_picture_is_whole_or_as_it_was(tmp_path, monkeypatch):
    """A directory is made where it lacks. Where drawing fails half way, the old one stays."""
    path, board = tmp_path / "new" / "a.png", np.ones((1, 1, 4, 4, 1))
    files.sheet(path, board)
    old = path.read_bytes()
    monkeypatch.setattr(files.Figure, "savefig", lambda figure, file, **more: file.fail())
    with pytest.raises(AttributeError):
        files.sheet(path, -board)
    assert path.read_bytes() == old and [*path.parent.iterdir()] == [path]


@pytest.mark.parametrize("channels", [1, 3])
def test_tile_keeps_each_image_in_its_place(channels):
    """With a black line around it, and in [0, 1]."""
    images = np.random.default_rng(3).uniform(-1.5, 1.5, (2, 3, 4, 5, channels))
    page = files.tile(images).reshape(2 * 6, 3 * 7, channels)
    for row, column in itertools.product(range(2), range(3)):
        cell = page[6 * row:6 * row + 6, 7 * column:7 * column + 7]
        close(cell[1:-1, 1:-1], np.clip((images[row, column] + 1) / 2, 0, 1))
        assert cell.sum() == pytest.approx(cell[1:-1, 1:-1].sum())


@pytest.mark.parametrize("shape, pages", [((300, 300), 15), ((600, 1200, 3), 4)])
def test_the_film_is_below_its_limit_even_of_noise(shape, pages, tmp_path):
    """It ends with the last page, rests on that, and begins again."""
    rng = np.random.default_rng(0)
    noise = [rng.random(shape) for _ in range(pages - 1)]
    files.film(tmp_path / "a.gif", [*noise, np.zeros(shape)])
    assert (tmp_path / "a.gif").stat().st_size < 1.5e6
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == pages and film.info["loop"] == 0
        first = film.info["duration"]
        film.seek(pages - 1)
        assert not np.asarray(film.convert("L")).any() and film.info["duration"] > 10 * first


MNIST = {"train-images-idx3-ubyte": gzip.compress(b"the pictures"),
         "train-labels-idx1-ubyte": gzip.compress(b"the labels")}
FIRST, SECOND = MNIST.values()


# On Python 3.13 urllib itself leaves the connection open where the reply is no HTTP.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("status, claimed, sent", [
    (200, len(SECOND), SECOND), (200, len(FIRST), FIRST), (200, len(SECOND), SECOND[:-5]),
    (200, len(SECOND) - 5, SECOND[:-5]), (404, 4, b"none"), (200, 6, b"<html>"),
    (None, 0, b"no HTTP at all\r\n\r\n")],
    ids=["good", "another file", "cut on the way", "cut at home", "404", "no gzip", "no HTTP"])
def test_download(status, claimed, sent, tmp_path, monkeypatch):
    """Brings whole files, here from a server on this machine. Of a bad one nothing stays, and
    its address is told; the good one before it stays."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            first = "images" in self.path
            if first or status:
                self.send_response(200 if first else status)
                self.send_header("Content-Length", str(len(FIRST) if first else claimed))
                self.end_headers()
            self.wfile.write(FIRST if first else sent)

        def log_message(self, *words):
            pass
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(files, "MNIST_SHA256", {
        name: hashlib.sha256(gzip.decompress(raw)).hexdigest() for name, raw in MNIST.items()})
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}/a/"
        words = ["download", "--url", address, "--data", tmp_path / "new"]
        good = sent == SECOND and status
        told = run(*words) if good else complaint(*words)
        server.shutdown()
        thread.join()
    assert good or f"{address}train-labels-idx1-ubyte.gz " in told
    left = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    assert left == {f"{name}.gz": raw for name, raw in MNIST.items() if good or raw == FIRST}


# ------------------------------------------------------------------ what goes wrong, and how

@pytest.mark.parametrize("words, told", [
    ("sample --digits a b", "b.*a c x"), ("sample --sampler heun --eta 0", "eta.*heun"),
    ("sample --sampler ddpm --eta 1", "eta.*ddpm"), ("sample --steps 11", "11.*10"),
    ("speed --full 11", "11.*10"), ("--steps 9 --minutes 2", "--minutes"),
    ("bpd --data nowhere", "nowhere"), ("forward --data nowhere", "nowhere"),
    ("--predicts eps --schedule flow --fresh", "eps"), ("forward --digit u", "u.*0 1 2")])
def test_one_sentence(words, told, copy):
    assert re.search(told, complaint(*words.split(), "--out", copy))


@pytest.mark.parametrize("words", [
    "--steps 0", "--steps few", "--steps 1.5", "--lr nan", "--lr -1", "--channels", "--seed -1",
    "--colour red", "--predicts u", "--optimizer sgd", "--minutes 0", "sample --eta 1.5",
    "sample --sampler euler", "sample --guidance nan", "forward --schedule none", "walk"])
def test_option_values_that_make_no_sense(words, capsys, monkeypatch):
    """argparse's way: the usage, one line that repeats what was given, and status 2."""
    monkeypatch.setattr(files, "read", None)        # so that no command gets far
    monkeypatch.setattr(demo, "trained", None)
    with pytest.raises(SystemExit) as end:
        run(*words.split())
    assert end.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in last and words.split()[-1] in last


def test_as_the_shell_sees_it(tmp_path):
    """An error is one line and a status: no traceback, nothing else printed. Imported, the demo
    leaves matplotlib's way to draw as it was."""
    (tmp_path / "model.npz").write_bytes(b"damaged")
    program = ("import demo, sys; assert 'matplotlib.pyplot' not in sys.modules; "
               "demo.main(sys.argv[1:])")
    done = subprocess.run([sys.executable, "-c", program, "sample", "--out", tmp_path],
                          cwd=demo.HERE, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(r"demo\.py: .*model.npz .*\n", done.stderr)


def test_help(capsys):
    """Of every command; a stray % in one would be an error. A word that is none is refused."""
    for command in ("train", "sample", "speed", "guidance", "bpd", "forward", "schedules",
                    "export", "download"):
        with pytest.raises(SystemExit, match="0"):
            run(command, "--help")
    with pytest.raises(SystemExit, match="2"):
        run("sampel")
    assert "sampel" in capsys.readouterr().err
