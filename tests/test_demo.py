"""The demo: what it reads, fetches and writes, training that stops and goes on, every command
on a tiny checkpoint, the scores, and that each failure is one sentence."""
import gzip
import hashlib
import http.server
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

import demo
import tinyddpm as td
from common import close

pytestmark = pytest.mark.skipif(td.xp is not np, reason="these run with TINYDDPM_BACKEND=numpy")
CLASSES, SIZE = 3, 8
SMALL = ["--steps", "6", "--batch", "4", "--channels", "8", "8", "8"]
NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")


def idx(array):
    """The bytes of an IDX file with these bytes in it."""
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) \
        + array.astype(np.uint8).tobytes()


def put(directory, images, labels, split="train"):
    (directory / f"{split}-images-idx3-ubyte").write_bytes(idx(images))
    (directory / f"{split}-labels-idx1-ubyte").write_bytes(idx(labels))
    return directory


def put_digits(directory, seed=0):
    """A directory of small digits: bytes at random, 40 for training and 12 for the test."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", 40), ("t10k", 12)):
        images, labels = rng.integers(0, 256, (count, SIZE, SIZE)), np.arange(count) % CLASSES
        put(directory, images, labels, split)
    return directory


def run(*words):
    demo.main([str(word) for word in words])


def complaint(*words):
    """The command ends with a status that is not 0 and one sentence, which this returns."""
    with pytest.raises(SystemExit) as end:
        run(*words)
    text = end.value.code           # a text is printed, and the status is 1
    assert isinstance(text, str) and re.fullmatch("demo.py: .+", text)
    return text


def hidden(directory):
    """Temporary files that somebody forgot."""
    return [path.name for path in directory.rglob("*")
            if path.name.startswith(".") or ".tmp" in path.name]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return put_digits(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A directory with a tiny checkpoint, of 100 diffusion steps, and the pictures with it."""
    out = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "T", 100)
        run("train", *SMALL, "--lr", "0.3", "--data", data, "--out", out)
    return out


@pytest.fixture
def sheets(monkeypatch):
    """The pictures are not drawn; what they would show is kept here, by file name."""
    kept = {}
    monkeypatch.setattr(demo, "sheet",
                        lambda path, images, *rest, **more: kept.update({path.name: images}))
    monkeypatch.setattr(demo, "plot_loss",
                        lambda path, losses: kept.update({path.name: losses}))
    return kept


# --------------------------------------------------------------------------- reading the data

IMAGES = np.random.default_rng(1).integers(0, 256, (2, 3, 3))


@pytest.mark.parametrize("split, each", [("train", 1000), ("t10k", 100)])
def test_the_bundled_digits(split, each):
    """As data/README.md says: so many of each digit, with full black and white."""
    images, labels = demo.load_digits(demo.HERE / "data", split)
    assert images.shape == (10 * each, 28, 28, 1)
    assert np.array_equal(np.bincount(labels), [each] * 10)
    assert images.min() == -1 and images.max() == 1


# ------------------------------------------------------------------------- fetching, writing

PACKED = [gzip.compress(idx(IMAGES)), gzip.compress(idx(np.array([3, 4])))]


@pytest.fixture
def web(monkeypatch):
    """A web server on this machine, asked for two files: its address, and a dict from file name
    to (status, the length that it claims, the bytes that it sends)."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(demo, "MNIST_SHA256", {
        name: hashlib.sha256(gzip.decompress(raw)).hexdigest()
        for name, raw in zip(NAMES, PACKED)})
    replies = {name: (200, len(raw), raw) for name, raw in zip(NAMES, PACKED)}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, length, raw = replies[self.path.removeprefix("/a/").removesuffix(".gz")]
            if status:
                self.send_response(status)
                self.send_header("Content-Length", str(length))
                self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *words):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/a/", replies
        server.shutdown()
        thread.join()


def test_download_brings_whole_files(web, tmp_path):
    address, _ = web
    run("download", "--url", address, "--data", tmp_path / "new")
    assert {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()} \
        == {f"{name}.gz": raw for name, raw in zip(NAMES, PACKED)}
    images, labels = demo.load_digits(tmp_path / "new", "train")
    close(images[..., 0], IMAGES / 127.5 - 1, 1e-6)
    assert np.array_equal(labels, [0, 1])       # the classes that occur, numbered anew


@pytest.mark.parametrize("reply", [
    (200, len(PACKED[0]), PACKED[0]), (200, len(PACKED[1]), PACKED[1][:-5]),
    (200, len(PACKED[1]) - 5, PACKED[1][:-5]), (404, 4, b"none"), (200, 6, b"<html>"),
    (200, 0, b""), (0, 0, b"no HTTP at all\r\n\r\n")],
    ids=["another file", "cut on the way", "cut at home", "404", "no gzip", "empty", "no HTTP"])
def test_download_keeps_nothing_of_a_bad_file(reply, web, tmp_path):
    """One sentence with its address; the good file before it stays, of it nothing does."""
    address, replies = web
    replies[NAMES[1]] = reply
    assert f"{address}{NAMES[1]}.gz " in complaint("download", "--url", address,
                                                   "--data", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"{NAMES[0]}.gz"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_write_that_fails_leaves_the_old_file(error, tmp_path):
    """Whole or not at all: what was half written is gone, what was there before is there."""
    path = tmp_path / "c.txt"
    path.write_text("old")

    def make(file):
        file.write(b"ne")
        raise error

    with pytest.raises(error):
        demo.write(path, make)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------------------------- pictures

@pytest.mark.parametrize("channels", [1, 3])
def test_tile_keeps_each_image_in_its_place(channels):
    images = np.random.default_rng(3).uniform(-1, 1, (2, 3, 4, 5, channels))
    page = demo.tile(images).reshape(2 * 6, 3 * 7, channels)
    for row in range(2):
        for column in range(3):
            cell = page[6 * row:6 * row + 6, 7 * column:7 * column + 7]
            close(cell[1:-1, 1:-1], (images[row, column] + 1) / 2)
            assert cell.sum() == pytest.approx(cell[1:-1, 1:-1].sum())


# ---------------------------------------------------------------------------------- training

def all_of(path):
    """What training leaves: all arrays, the step and the losses."""
    net, _, state, settings = td.load(path)
    return [net.params.flat, state.ema.flat, state.optimizer.m, state.optimizer.v,
            np.array(settings["losses"]), np.array(state.step)]


def assert_same_run(path, other):
    for a, b in zip(all_of(path), all_of(other)):
        assert np.array_equal(a, b)


def test_train_writes_its_four_files(trained):
    assert sorted(path.name for path in trained.iterdir()) \
        == ["denoising.png", "loss.png", "model.npz", "samples.png"]
    net, diffusion, state, settings = td.load(trained / "model.npz")
    assert diffusion.T == 100 and diffusion.predicts == "v"
    assert net.image == (SIZE, SIZE, 1) and net.classes == CLASSES and state.step == 6
    assert len(settings["losses"]) == 6 and settings["losses"][-1] == state.loss
    for name in ("samples", "denoising", "loss"):
        assert plt.imread(trained / f"{name}.png").std() > 0.01


@pytest.mark.parametrize("options", [[*SMALL, "--lr", "0.3", "--seed", "0"], []],
                         ids=["the same options", "no options"])
def test_a_finished_training_only_draws_again(options, trained, data, tmp_path, sheets):
    (tmp_path / "model.npz").write_bytes((trained / "model.npz").read_bytes())
    run("train", *options, "--data", data, "--out", tmp_path)
    assert (tmp_path / "model.npz").read_bytes() == (trained / "model.npz").read_bytes()
    assert set(sheets) == {"samples.png", "denoising.png", "loss.png"}


@pytest.mark.parametrize("option, asked, before", [
    ("--steps", "7", "6"), ("--batch", "5", "4"), ("--lr", "0.25", "0.3"),
    ("--channels", "16", "[8, 8, 8]"), ("--seed", "1", "0")])
def test_other_options_than_the_checkpoint_has(option, asked, before, trained, data):
    """Refused with both values, and the checkpoint stays as it was."""
    old = (trained / "model.npz").read_bytes()
    text = complaint("train", option, asked, "--data", data, "--out", trained)
    assert re.search(rf"{option[2:]} {re.escape(before)},.*\b{asked}\b.*--fresh", text)
    assert (trained / "model.npz").read_bytes() == old


def test_other_digits_than_the_checkpoint_has(trained, tmp_path):
    text = complaint("train", "--data", put_digits(tmp_path, seed=1), "--out", trained)
    assert re.search(r"data [0-9a-f]{8}, and [0-9a-f]{8} ", text)


def test_fresh_starts_over(trained, data, tmp_path, sheets):
    """Over another run, over a damaged one, and where there is none, with the same result."""
    for before in ((trained / "model.npz").read_bytes(), b"damaged", None):
        if before:
            (tmp_path / "model.npz").write_bytes(before)
        run("train", "--steps", "2", "--batch", "3", "--channels", "4", "4", "4", "--seed", "5",
            "--fresh", "--data", data, "--out", tmp_path)
        if before:
            results = all_of(tmp_path / "model.npz")
            (tmp_path / "model.npz").unlink()
    for a, b in zip(results, all_of(tmp_path / "model.npz")):
        assert np.array_equal(a, b)
    assert results[-1] == 2 and not hidden(tmp_path)


@pytest.mark.parametrize("channels", [["8"], ["8", "16"], ["8", "8", "8", "8"]])
def test_any_number_of_levels(channels, data, tmp_path, sheets):
    """--channels decides how many there are, whatever the default has."""
    run("train", *SMALL[:4], "--channels", *channels, "--data", data, "--out", tmp_path)
    assert demo.trained(tmp_path).net.channels == tuple(map(int, channels))


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
KILLED = """
import itertools, os, signal, sys, demo
demo.time.perf_counter = itertools.count(0, 31).__next__        # half a minute at each look
saves = itertools.count(1)
def fsync(file):
    if next(saves) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
demo.td.os.fsync = fsync
demo.main(sys.argv[1:])
"""


def start(program, *words):
    """A Python process that can import the demo."""
    return subprocess.Popen([sys.executable, "-c", program, *map(str, words)], cwd=demo.HERE,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture
def whole_run(data, tmp_path, sheets):
    """A run to the end without a stop, the options of it, and the path of another one."""
    options = ["train", "--steps", "40", "--batch", "4", "--channels", "8", "8", "8",
               "--data", data]
    run(*options, "--out", tmp_path / "whole")
    return tmp_path / "whole" / "model.npz", options, tmp_path / "other" / "model.npz"


def test_ctrl_c_saves_and_going_on_is_the_same_run(whole_run):
    whole, options, other = whole_run
    with start(SLOWLY, *options, "--out", other.parent) as child:
        watchdog = threading.Timer(60, child.kill)
        watchdog.start()
        said = b""
        while b"images/s" not in said:              # the progress bar
            piece = os.read(child.stderr.fileno(), 1000)
            assert piece, said
            said += piece
        child.send_signal(signal.SIGINT)
        said = child.communicate()[1].decode()
        watchdog.cancel()
    assert child.returncode == 1 and "Traceback" not in said
    step = int(re.search(r"stopped after step (\d+) of 40, which .*model.npz holds; the same "
                         r"command goes on", said)[1])
    assert 1 <= step < 40 and td.load(other)[2].step == step
    run(*options, "--out", other.parent)
    assert_same_run(whole, other)


def test_a_kill_while_saving_loses_no_saved_step(whole_run):
    """Saved after each step and killed inside the third save: two steps are safe, and going on
    from there is the same run."""
    whole, options, other = whole_run
    with start(KILLED, *options, "--out", other.parent) as child:
        said = child.communicate(timeout=60)[1].decode()
    assert child.returncode == -signal.SIGKILL, said
    assert td.load(other)[2].step == 2
    run(*options, "--out", other.parent)
    assert_same_run(whole, other)


# ------------------------------------------------------------------ what goes wrong, and how

NEED_A_MODEL = ["sample", "speed", "guidance", "score", "bpd"]


def no_training(*args):
    raise AssertionError("the classifier is trained in vain")


@pytest.mark.parametrize("command", NEED_A_MODEL)
def test_a_checkpoint_that_is_not_there_is_missed_at_once(command, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "train_classifier", no_training)
    text = complaint(command, "--out", tmp_path / "none")
    assert f"{tmp_path / 'none' / 'model.npz'} is not there yet" in text and "trains it" in text


@pytest.mark.parametrize("damage", ["cut", "empty", "a network alone", "other settings"])
@pytest.mark.parametrize("command", ["train", *NEED_A_MODEL])
def test_a_checkpoint_that_is_none(command, damage, trained, tmp_path, monkeypatch):
    """Damaged, or tinyddpm's but not the demo's own: its name, in one sentence."""
    monkeypatch.setattr(demo, "train_classifier", no_training)
    path = tmp_path / "model.npz"
    net, diffusion, state, _ = td.load(trained / "model.npz")
    if damage == "cut":
        path.write_bytes((trained / "model.npz").read_bytes()[:-1000])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "a network alone":
        td.save(path, net, diffusion)
    else:
        td.save(path, net, diffusion, state, note="of another program")
    assert f"{path} " in complaint(command, "--out", tmp_path)


@pytest.mark.parametrize("command", ["train", "score", "bpd", "forward", "schedules"])
def test_no_digits_there(command, trained, tmp_path):
    assert f"{tmp_path} has no " in complaint(command, "--data", tmp_path, "--out", trained)


@pytest.mark.parametrize("digit", ["3", "-1"])
def test_an_unknown_digit(digit, trained, data, tmp_path):
    text = complaint("sample", "--digits", "0", digit, "--out", trained)
    assert f"[0, {digit}]" in text and "0..2" in text
    text = complaint("forward", "--digit", digit, "--data", data, "--out", tmp_path)
    assert f"is {digit};" in text and "0..2" in text


def test_train_refuses_in_one_sentence(tmp_path):
    """Also without the word train."""
    assert "nowhere" in complaint("--steps", "2", "--out", tmp_path, "--data", "nowhere")


@pytest.mark.parametrize("words", [
    "--steps 0", "--steps few", "--steps 1.5", "--batch -1", "--lr nan", "--lr -1", "--lr inf",
    "--channels 0", "--channels", "--seed -1", "--colour red", "sample --eta 1.5",
    "sample --eta nan", "sample --sampler euler", "sample --count 0", "sample --digits one",
    "sample --guidance nan", "score --guidance 1 nan", "score --count 99", "speed --full 0",
    "forward --schedule none", "bpd --count 0", "walk"])
def test_option_values_that_make_no_sense(words, capsys, monkeypatch):
    """argparse's way: the usage, one line that repeats what was given, and status 2."""
    for work in ("load_digits", "Model"):
        monkeypatch.setattr(demo, work, None)       # so that no command gets far
    with pytest.raises(SystemExit) as end:
        run(*words.split())
    assert end.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in last and words.split()[-1] in last


def test_an_error_is_one_line_and_a_status(tmp_path):
    """As the shell sees it: no traceback, nothing else printed."""
    done = subprocess.run([sys.executable, demo.HERE / "demo.py", "sample", "--out", tmp_path],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(r"demo\.py: .* is not there yet; .*\n", done.stderr)


@pytest.mark.parametrize("command", sorted(demo.parser()[1]))
def test_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        run(command, "--help")
    assert end.value.code == 0
    assert " ".join(demo.parser()[1][command].description.split()) \
        in " ".join(capsys.readouterr().out.split())


# ------------------------------------------------------------------- commands that draw

def draw(out, *words):
    """The numbers that `sample` saves."""
    path = out / "numbers.npz"
    run("sample", *words, "--out", out, "--save", path)
    with np.load(path) as file:
        path.unlink()
        return file["x"], file["y"]


def test_sample_saves_images_and_labels(trained):
    x, y = draw(trained, "--digits", "2", "0", "--count", "5", "--steps", "4")
    assert x.shape == (5, SIZE, SIZE, 1) and x.dtype == np.float32
    assert -1 <= x.min() < x.max() <= 1
    assert np.array_equal(y, [2, 0, 2, 0, 2])
    assert plt.imread(trained / "sample.png").ndim == 3
    assert not hidden(trained) and not plt.get_fignums()


@pytest.mark.parametrize("options", ["", "--sampler ddpm --steps 5", "--eta 1 --steps 5"])
def test_the_seed_decides_and_threads_do_not(options, trained, sheets, monkeypatch):
    def numbers(seed, threads):
        monkeypatch.setattr(demo, "THREADS", threads)
        return draw(trained, "--count", "40", "--seed", seed, *options.split())[0]
    first = numbers(3, threads=1)
    assert np.array_equal(numbers(3, threads=3), first)
    assert not np.allclose(numbers(4, threads=1), first, atol=0.1)


def test_guidance_decides_how_much_the_label_counts(trained, sheets):
    """Weight 0 ignores it; the others differ from each other."""
    def numbers(digit, w):
        return draw(trained, "--digits", digit, "--count", "2", "--guidance", w)[0]
    assert np.array_equal(numbers(0, w=0), numbers(1, w=0))
    every = [numbers(0, w) for w in (0, 1, 3)] + [numbers(1, 1)]
    assert all(np.any(a != b) for i, a in enumerate(every) for b in every[:i])


def test_speed(trained, capsys):
    """A line for each way of drawing, with its time and the ratio to DDPM's."""
    run("speed", "--full", "4", "--out", trained)
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.startswith("DD")]
    assert [line[:18].strip() for line in table] == ["DDPM 4"] + [
        f"DDIM {n}, eta {eta}" for n in (10, 20, 50) for eta in ("0", "0.5", "1")]
    assert float(table[0].split()[-1]) == 1
    assert plt.imread(trained / "speed.png").ndim == 3


def test_guidance(trained, capsys, sheets, monkeypatch):
    """A row for each weight from the same noise; the row of 1 is what sample draws with 1."""
    run("guidance", "--seed", "2", "--out", trained)
    weights = re.findall(r"w=([\d.]+) +\d+%", capsys.readouterr().out)
    assert weights == ["0", "1", "2", "3", "7.5"]
    page = sheets["guidance.png"]
    x, _ = draw(trained, "--count", CLASSES, "--guidance", "1", "--seed", "2")
    assert page.shape == (5, CLASSES, SIZE, SIZE, 1) and np.array_equal(page[1], x)
    monkeypatch.undo()
    run("guidance", "--out", trained)
    assert plt.imread(trained / "guidance.png").ndim == 3


@pytest.mark.parametrize("schedule", td.SCHEDULES)
def test_forward(schedule, data, tmp_path, capsys, sheets):
    """One digit at six steps, with the table's numbers; the first frame is nearly the digit."""
    run("forward", "--digit", "1", "--schedule", schedule, "--data", data, "--out", tmp_path)
    diffusion = td.Diffusion(td.SCHEDULES[schedule](1000), "v")
    table = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [int(t) for t, _, _ in table] == [1, 100, 250, 500, 750, 1000]
    for t, abar, snr in table:
        close(float(abar), diffusion.abar[int(t)], 1e-3)
        close(float(snr), diffusion.snr[int(t)], 1e-3)
    images, labels = demo.load_digits(data, "t10k")
    frames, digit = sheets["forward.png"], images[labels == 1][0]
    assert frames.shape == (1, 6, SIZE, SIZE, 1)
    assert np.corrcoef(frames[0, 0].ravel(), digit.ravel())[0, 1] > 0.9
    assert abs(np.corrcoef(frames[0, 5].ravel(), digit.ravel())[0, 1]) < 0.5


def test_forward_and_schedules_write_their_pictures(data, tmp_path, capsys):
    """Neither needs a checkpoint; schedules has a line for each of them."""
    run("forward", "--digit", "1", "--data", data, "--out", tmp_path)
    run("schedules", "--data", data, "--out", tmp_path)
    said = capsys.readouterr().out
    for name in td.SCHEDULES:
        assert re.search(rf"^{name} +[\d.]", said, re.M)
    assert re.search(r"^linear, zero SNR .* 0$", said, re.M)
    for name in ("forward.png", "schedules.png"):
        assert plt.imread(tmp_path / name).std() > 0.01
    assert not hidden(tmp_path) and not plt.get_fignums()


def test_bpd(trained, data, capsys):
    """The parts add up, and the sum is what Diffusion says of the same digits and labels."""
    run("bpd", "--count", "2", "--seed", "1", "--data", data, "--out", trained)
    said = capsys.readouterr().out
    total = float(re.search(r"^2 test digits: ([\d.]+) bits", said, re.M)[1])
    parts = [float(part) for part in re.findall(r"^  \w+ +([\d.]+) ", said, re.M)]
    assert len(parts) == 3 and sum(parts) == pytest.approx(total, abs=6e-4)
    images, labels = demo.load_digits(data, "t10k")
    rng = np.random.default_rng(1)
    pick = rng.permutation(12)[:2]
    model = demo.trained(trained)
    bound = model.diffusion.bits_per_dim(lambda x, t: model.net(x, t, labels[pick]),
                                         images[pick], rng)
    assert total == pytest.approx(float(bound["total"]), abs=6e-4)
    assert plt.imread(trained / "bpd.png").ndim == 3


# ------------------------------------------------------------------------ weights to draw with

def test_export_holds_the_average_in_half_the_bytes(trained, tmp_path):
    """float16 of the EMA, and no State. Drawing computes in float32 with it."""
    path = tmp_path / "weights" / "some.npz"
    run("export", "--out", trained, "--weights", path)
    _, _, state, _ = td.load(trained / "model.npz")
    net, diffusion, none, settings = td.load(path)
    assert none is None and path.stat().st_size < 2.5 * net.params.flat.size
    assert np.array_equal(net.params.flat, state.ema.flat.astype(np.float16))
    assert diffusion.predicts == "v" and "losses" not in settings
    (tmp_path / "model.npz").write_bytes(path.read_bytes())
    model = demo.trained(tmp_path)
    assert model.net.params.flat.dtype == model.draw(np.arange(2), 0, steps=2).dtype == "f4"
    assert "weights alone" in complaint("train", "--out", tmp_path)


def test_before_training_the_weights_in_the_repository_draw(tmp_path, monkeypatch, capsys):
    """They are small, and digits; but only where no other --out was asked for."""
    monkeypatch.chdir(tmp_path)
    assert demo.WEIGHTS.stat().st_size < 2e6
    run("sample", "--count", "10")
    assert "the weights that come with the demo" in capsys.readouterr().out
    assert plt.imread(tmp_path / "out" / "sample.png").std() > 0.1
    assert "other" in complaint("sample", "--out", "other")


# ------------------------------------------------------------- the classifier and the scores

@pytest.fixture
def stub(monkeypatch, data):
    """Instead of a training, parameters at random: the list of those that were asked for. And
    where --data is not given, the small digits instead of the bundled ones."""
    made = []

    def quick(images, labels):
        layout = demo.classifier_layout(images.shape[1:], int(labels.max()) + 1)
        made.append(td.initial(layout, 9))
        return made[-1]
    monkeypatch.setattr(demo, "train_classifier", quick)
    parse = demo.parser

    def parser():
        top, commands = parse()
        for one in commands.values():
            one.set_defaults(data=data)
        return top, commands
    monkeypatch.setattr(demo, "parser", parser)
    return made


def test_the_gradient_of_the_classifier():
    """Every parameter's, against finite differences in float64."""
    rng = np.random.default_rng(5)
    p = td.initial(demo.classifier_layout((8, 4, 2), 5), rng)
    x = rng.standard_normal((3, 8, 4, 2))

    def layer(p):
        features, logits, back = demo.classify(p, x)
        assert features.shape == (3, 64) and logits.shape == (3, 5)
        return logits, back
    errors = dict(td.gradient_errors(layer, p, []))
    assert len(errors) == 3 * 4 + 4 and max(errors.values()) < 1e-6


def test_the_classifier_learns():
    """Three kinds of picture: dark, bright, and bright in the upper half."""
    labels = np.arange(60) % 3
    images = np.random.default_rng(6).normal(0, 0.1, (60, 8, 8, 1)).astype(np.float32)
    images += np.array([-1, 1, -1])[labels][:, None, None, None]
    images[labels == 2, :4] += 2
    p = demo.train_classifier(images, labels, epochs=10, batch=10)
    features, seen = demo.read(p, images)
    assert features.shape == (60, 64) and np.array_equal(seen, labels)


@pytest.mark.slow
def test_the_shipped_weights_draw_digits_that_a_classifier_reads():
    """The classifier knows 98 of 100 test digits it has not seen. Of the drawn ones it reads
    99 in 100 as meant; of a network that is wired wrongly, few."""
    p = demo.train_classifier(*demo.load_digits(demo.HERE / "data", "train"))
    images, labels = demo.load_digits(demo.HERE / "data", "t10k")
    assert np.mean(demo.read(p, images)[1] == labels) >= 0.98
    net, diffusion, _, _ = td.load(demo.WEIGHTS)
    labels = np.arange(100) % 10
    drawn = demo.Model(net, diffusion).draw(labels, 0)
    assert np.mean(demo.read(p, drawn)[1] == labels) >= 0.95


def options(data, out):
    return demo.parser()[0].parse_args(["score", "--data", str(data), "--out", str(out)])


def test_a_damaged_classifier_is_made_anew(data, tmp_path, stub):
    """Cut, or with a flipped byte in what zip and NumPy say about the numbers: never an error,
    never other numbers. A flip in a name or a date may be harmless."""
    def load():
        return demo.load_classifier(options(data, tmp_path))[0].flat

    numbers = load()
    path = tmp_path / "classifier.npz"
    good = path.read_bytes()
    for length in (0, 1, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        assert np.array_equal(load(), numbers)
    assert len(stub) == 6
    for place in (*range(0, 200, 7), len(good) // 2, *range(len(good) - 400, len(good), 7)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x55]) + good[place + 1:])
        assert np.array_equal(load(), numbers), place
    assert len(stub) > 50


def gaussian(mean, deviations, seed, count=200):
    """Features whose mean and covariance are exactly these: noise, made white, stretched."""
    noise = np.random.default_rng(seed).standard_normal((count, len(mean)))
    noise -= noise.mean(0)
    white = noise @ np.linalg.inv(np.linalg.cholesky(np.cov(noise.T))).T
    return white * deviations + mean


def test_frechet_of_gaussians():
    """With diagonal covariances it is |m - m'|^2 + |s - s'|^2, for deviations s; some are 0."""
    rng = np.random.default_rng(7)
    (m, n), (s, r) = rng.normal(size=(2, 6)), rng.uniform(0.1, 2, (2, 6))
    s[0] = r[1] = 0
    a, b = gaussian(m, s, seed=1), gaussian(n, r, seed=2, count=300)
    expected = ((m - n) ** 2).sum() + ((s - r) ** 2).sum()
    assert demo.frechet(a, b) == pytest.approx(expected, rel=1e-6)
    assert demo.frechet(b, a) == pytest.approx(expected, rel=1e-6)


def test_score(trained, data, tmp_path, stub, capsys):
    """The table's lines are the accuracy and the distance of what was drawn, or was saved."""
    (tmp_path / "model.npz").write_bytes((trained / "model.npz").read_bytes())
    run("score", "--count", "100", "--guidance", "0", "3", "--steps", "5", "--out", tmp_path)
    said = capsys.readouterr().out
    p, (images, _) = stub[0], demo.load_digits(data, "train")
    reference = demo.read(p, images)[0]

    def line(name, images, labels):
        features, seen = demo.read(p, images)
        number, accuracy, distance = re.search(rf"^{name} +(\d+) +([\d.]+)% +([\d.]+)$", said,
                                               re.M).groups()
        assert int(number) == len(images)
        assert float(accuracy) == pytest.approx(100 * np.mean(seen == labels), abs=0.051)
        assert float(distance) == pytest.approx(demo.frechet(reference, features), abs=6e-4)

    line("real test digits", *demo.load_digits(data, "t10k"))
    for w in (0, 3):
        x, y = draw(tmp_path, "--count", "100", "--guidance", w, "--steps", "5")
        line(f"samples, w = {w}", x, y)
    np.savez(tmp_path / "mine.npz", x=x, y=y)
    run("score", "--samples", tmp_path / "mine.npz", "--out", tmp_path)
    said = capsys.readouterr().out
    line("mine.npz", x, y)
    assert plt.imread(tmp_path / "score.png").ndim == 3


@pytest.mark.parametrize("arrays", [
    {}, {"x": np.zeros((100, 8, 8, 1))}, {"x": np.zeros((100, 2, 2, 1)), "y": np.zeros(100)},
    {"x": np.zeros((99, 8, 8, 1)), "y": np.zeros(99)}])
def test_samples_that_cannot_be_scored(arrays, data, tmp_path, stub):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(SystemExit, match="demo.py: .*bad.npz"):
        run("score", "--samples", tmp_path / "bad.npz", "--data", data, "--out", tmp_path)
    assert not stub         # no classifier was trained for them
