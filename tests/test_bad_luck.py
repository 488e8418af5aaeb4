"""Bad luck: files that are damaged, processes that are killed, disks that are full, servers
that break off. Nothing that was saved is lost, nothing half written stays, and the demo ends
with one sentence."""
import contextlib
import gzip
import hashlib
import http.server
import itertools
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest

import demo
import tinyddpm as td
from test_demo import CLASSES, NAMES, SIZE, SMALL, complaint, hidden, idx, put_digits, run

pytestmark = pytest.mark.skipif(td.xp is not np, reason="these run with TINYDDPM_BACKEND=numpy")
DIFFUSION = td.Diffusion(td.linear_betas(10, 0.01, 0.3))
MODEL = "model.npz"


def started(*words, first=""):
    """`python demo.py words` as a process of its own; `first` is run before, as a patch."""
    program = f"import sys, demo\n{first}\ndemo.main(sys.argv[1:])"
    return subprocess.Popen([sys.executable, "-u", "-c", program, *map(str, words)],
                            cwd=demo.HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)


def fails(*words, first=""):
    """The shell sees a status that is not 0 and, but for the progress bars, one line, which
    this returns."""
    with started(*words, first=first) as child:
        _, said = child.communicate(timeout=60)
    lines = [line for line in re.split("[\r\n]+", said) if line.strip() and "%|" not in line]
    assert child.returncode == 1 and len(lines) == 1 and lines[0].startswith("demo.py: "), said
    return lines[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return put_digits(tmp_path_factory.mktemp("data"))


def without_pictures(patch):
    """The demo draws none, and what it would show is drawn in few steps."""
    patch.setattr(demo, "sheet", lambda *args, **options: None)
    patch.setattr(demo, "plot_loss", lambda *args: None)
    patch.setitem(demo.DRAWING, "steps", 10)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A directory with the checkpoint of a tiny training, of 100 diffusion steps."""
    out = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "T", 100)
        without_pictures(patch)
        run("train", *SMALL, "--data", data, "--out", out)
    return out


@pytest.fixture
def begun(data, tmp_path):
    """The options of a training that was stopped after its first step, and its directory."""
    words = ["train", "--steps", "30", *SMALL[2:], "--data", data, "--out", tmp_path / "out"]

    class Stop(demo.Interrupt):
        def __enter__(self):
            super().__enter__()
            self.asked = True
            return self

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "Interrupt", Stop)
        with pytest.raises(SystemExit, match="stopped after step 1 of 30"):
            run(*words)
    return words, tmp_path / "out"


@contextlib.contextmanager
def limited(size):
    """A disk on which no file can grow beyond so many bytes; for this process alone."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# ----------------------------------------------------------------------------- damaged digits

@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzipped"])
@pytest.mark.parametrize("name", NAMES)
def test_digits_of_which_one_file_is_cut_anywhere(name, pack, tmp_path):
    """Images or labels, the other file being whole."""
    rng = np.random.default_rng(0)
    whole = {NAMES[0]: idx(rng.integers(0, 256, (3, 2, 2))), NAMES[1]: idx(np.array([2, 0, 1]))}
    for each, raw in whole.items():
        (tmp_path / each).write_bytes(pack(raw))
    path, raw = tmp_path / name, pack(whole[name])
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} .+$"):
            demo.load_digits(tmp_path, "train")
    path.write_bytes(raw)
    assert np.array_equal(demo.load_digits(tmp_path, "train")[1], [2, 0, 1])


def test_a_flipped_bit_in_a_plain_file_is_refused_or_changes_that_byte(tmp_path):
    """There is no checksum in IDX. In the header a flip never reshapes the pictures."""
    array, path = np.random.default_rng(1).integers(0, 256, (2, 2, 2)), tmp_path / "flipped"
    raw, refused = idx(array), 0
    for place in range(8 * len(raw)):
        damaged = bytearray(raw)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            out = demo.read_idx(path)
        except ValueError as error:
            assert re.fullmatch(rf"{re.escape(str(path))} .+", str(error))
            refused += 1
        else:
            assert out.shape == array.shape and np.sum(out != array) == 1
    assert refused == 8 * 16                # all of the header, and nothing else


def test_images_and_labels_exchanged(data, tmp_path):
    for a, b in (NAMES, NAMES[::-1]):
        (tmp_path / a).write_bytes((data / b).read_bytes())
    with pytest.raises(ValueError, match="do not belong together"):
        demo.load_digits(tmp_path, "train")


@pytest.mark.parametrize("length", [0, 1, 100, 81000, 162199])
def test_bundled_digits_cut(length, tmp_path):
    """Of the real files, for every command that reads them."""
    for path in (demo.HERE / "data").glob("*.gz"):
        shutil.copy(path, tmp_path)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:length])
    for command in ("forward", "schedules", "score"):
        text = complaint(command, "--data", tmp_path, "--out", tmp_path / "out")
        assert f"demo.py: {path} is " in text
    assert not (tmp_path / "out").exists()


def test_digits_of_more_classes_than_the_network_knows(finished, tmp_path):
    """The first label too many is the network's null label, which it would take in silence."""
    digits = put_digits(tmp_path)
    (digits / "t10k-labels-idx1-ubyte").write_bytes(idx(np.arange(12) % (CLASSES + 1)))
    text = complaint("bpd", "--count", "2", "--data", digits, "--out", finished)
    assert f"{digits} has labels up to {CLASSES}; the network knows 0..{CLASSES - 1}" in text


def samples(path, **changes):
    """100 images and labels as `sample --save` writes them."""
    arrays = dict(x=np.zeros((100, SIZE, SIZE, 1), np.float32), y=np.arange(100) % CLASSES)
    for name, value in changes.items():
        arrays[name][3] = value
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("value", [np.nan, np.inf, 255])
def test_samples_that_are_no_images(value, data, tmp_path, monkeypatch):
    """NaN, or bytes that nobody scaled; said before the classifier is trained."""
    monkeypatch.setattr(demo, "train_classifier", None)
    path = samples(tmp_path / "x.npz", x=value)
    text = complaint("score", "--samples", path, "--data", data, "--out", tmp_path)
    assert f"{path} is {float(value)}; it has to be from 0 to 1.001" in text


# -------------------------------------------------------------------------- damaged checkpoints

@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small checkpoint with its State: where it is, its bytes, and all that is in it."""
    path = tmp_path_factory.mktemp("saved") / MODEL
    net = td.UNet(image=(1, 1, 1), channels=(4,), classes=2)
    images, labels = np.ones((2, 1, 1, 1)), np.array([0, 1])
    for state in td.train(net, DIFFUSION, images, labels, steps=3, batch=2):
        pass
    td.save(path, net, state, schedule="cosine", T=10, losses=[0.5, 0.25])
    return path, path.read_bytes(), contents(path)


def contents(path):
    """All that load gives back, as plain values to compare."""
    net, state, settings = td.load(path)
    arrays = (net.params.flat, state.ema.flat, state.adam.m, state.adam.v)
    return ([a.tobytes() for a in arrays], net.config, settings, state.step, state.loss,
            state.lr, state.adam.n, state.adam.betas, state.adam.eps, state.ema.n,
            state.ema.decay, state.rng.bit_generator.state)


def read(saved, damaged):
    """Whether the damaged bytes are read, and then rightly; else they are refused in one
    sentence with the file's name, and with no other error."""
    path, _, right = saved
    path.write_bytes(damaged)
    try:
        assert contents(path) == right
    except ValueError as error:
        text = str(error)
        assert text.startswith(f"{path} ") and "\n" not in text and len(text) < 400
        return False
    return True


def test_a_checkpoint_cut_anywhere(saved):
    whole = saved[1]
    assert read(saved, whole)
    for length in range(0, len(whole), 97):
        assert not read(saved, whole[:length])


@pytest.mark.slow
def test_a_checkpoint_cut_everywhere(saved):
    path, whole, _ = saved
    path.write_bytes(whole)
    for length in reversed(range(len(whole))):
        os.truncate(path, length)
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))} .*damaged"):
            td.load(path)


def test_a_checkpoint_with_flipped_bits(saved):
    """One at each of many places; then several at once."""
    rng, whole = np.random.default_rng(0), saved[1]
    for count in (1, 2, 10):
        for _ in range(100):
            damaged = bytearray(whole)
            for bit in rng.integers(0, 8 * len(whole), count):
                damaged[bit // 8] ^= 1 << int(bit % 8)
            read(saved, bytes(damaged))


@pytest.mark.slow
def test_a_checkpoint_with_a_flipped_bit_in_every_second_byte(saved):
    rng, whole = np.random.default_rng(1), saved[1]
    for place in range(0, len(whole), 2):
        read(saved, whole[:place] + bytes([whole[place] ^ 1 << rng.integers(8)])
             + whole[place + 1:])


def test_a_checkpoint_with_lost_and_foreign_pieces(saved):
    """Blocks of zeros, as after a crash of the machine; pieces that are missing, doubled, or of
    another place; and something before or after the file."""
    rng, whole = np.random.default_rng(2), saved[1]
    for _ in range(100):
        a, b, c = sorted(rng.integers(0, len(whole), 3))
        assert not read(saved, whole[:a] + whole[b + 1:])
        read(saved, whole[:a] + bytes(b - a) + whole[b:])
        read(saved, whole[:b] + whole[a:])
        read(saved, whole[:a] + whole[b:c] + whole[a:b] + whole[c:])
    for foreign in (b"x", bytes(600), whole[:100], whole):
        assert read(saved, foreign + whole) in (True, False)
        assert read(saved, whole + foreign) in (True, False)


def altered(saved, change):
    """The file with other arrays or other meta, and right checksums."""
    path, whole, _ = saved
    path.write_bytes(whole)
    with np.load(path) as file:
        arrays = dict(file)
    meta = json.loads(str(arrays["meta"]))
    change(arrays, meta)
    with open(path, "wb") as file:
        np.savez(file, **{"meta": json.dumps(meta)} | {
            name: a for name, a in arrays.items() if name != "meta"})
    with pytest.raises(ValueError) as caught:
        td.load(path)
    text = str(caught.value)
    assert text.startswith(f"{path} ") and "\n" not in text
    return text


@pytest.mark.parametrize("name", ["params", "ema", "m", "v"])
@pytest.mark.parametrize("change", [
    lambda a: a * np.nan, lambda a: a + np.inf, lambda a: a.astype(np.float16),
    lambda a: a.astype(np.float64), lambda a: a.astype(int), lambda a: a.astype(complex),
    lambda a: a.astype(str), lambda a: a.astype("V9"), lambda a: a[1:], lambda a: a[:, None],
    lambda a: np.append(a, 0), lambda a: np.array(0.5), lambda a: a[:0]])
def test_arrays_that_do_not_fit(saved, name, change):
    """Shapes and types of all kinds, and numbers that are none: save would not have written
    them."""
    altered(saved, lambda arrays, meta: arrays.update({name: change(arrays[name])}))


@pytest.mark.parametrize("place, value", [
    (("net", "image"), [8, 8, 2]), (("net", "image"), 5), (("net", "image"), [1.5, 1, 1]),
    (("net", "channels"), [8]), (("net", "channels"), ["a"]), (("net", "channels"), [10 ** 15]),
    (("net", "classes"), 9), (("net", "classes"), 1.5), (("net", "colour"), "red"),
    (("net",), 5), (("net",), None), (("state", "adam"), []), (("state", "adam"), 5),
    (("state", "ema"), 3), (("state", "rng"), {}), (("state", "rng"), None),
    (("state", "rng", "bit_generator"), "shuffle"), (("state", "rng", "bit_generator"), "seed"),
    (("state", "rng", "bit_generator"), "nobody"), (("state", "rng", "state"), {}),
    (("state", "rng", "state"), 3), (("state",), None), (("state",), 7), (("arrays",), 5),
    (("arrays",), ["params"]), (("format",), None), (("format",), "tinyddpm checkpoint 0")])
def test_meta_that_does_not_fit(saved, place, value):
    def change(arrays, meta):
        for name in place[:-1]:
            meta = meta[name]
        meta[place[-1]] = value
    altered(saved, change)


@pytest.mark.parametrize("name", ["format", "net", "settings", "arrays", *(
    f"state {name}" for name in ("step", "loss", "lr", "adam", "ema", "rng"))])
def test_meta_that_is_incomplete(saved, name):
    *above, last = name.split()
    altered(saved, lambda arrays, meta: (meta[above[0]] if above else meta).pop(last))


class Bomb:
    def __reduce__(self):
        return os.abort, ()


@pytest.mark.parametrize("name", ["meta", "params", "m", "another"])
def test_a_pickle_in_any_place_is_not_run(saved, name):
    """It would end the tests."""
    path, whole, _ = saved
    path.write_bytes(whole)
    with np.load(path) as file:
        arrays = dict(file) | {name: np.array([Bomb()], object)}
    with open(path, "wb") as file:
        np.savez(file, **arrays)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} .*damaged"):
        td.load(path)


@pytest.mark.parametrize("name, value", [
    ("schedule", "linearly"), ("losses", None), ("lr", None), ("batch", None), ("seed", None)])
def test_a_checkpoint_with_other_settings(name, value, finished, data, tmp_path):
    """Of a later version, say, with another schedule; or of an earlier one, without one."""
    net, state, settings = td.load(finished / MODEL)
    settings[name] = value
    settings = {name: value for name, value in settings.items() if value is not None}
    td.save(tmp_path / MODEL, net, state, **settings)
    for words in (["train", "--data", data], ["sample"]):
        assert str(tmp_path / MODEL) in complaint(*words, "--out", tmp_path)


def test_damaged_files_at_the_command_line(finished, tmp_path):
    raw = (finished / MODEL).read_bytes()
    (tmp_path / MODEL).write_bytes(raw[:3000] + bytes(512) + raw[3512:])
    text = fails("sample", "--out", tmp_path)
    assert f"{tmp_path / MODEL} is not a tinyddpm checkpoint, or it is damaged" in text
    put_digits(tmp_path)
    path = tmp_path / "t10k-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    text = fails("forward", "--data", tmp_path, "--out", tmp_path)
    assert f"{path} is damaged: its header promises 12 bytes" in text
    assert hidden(tmp_path) == [] and not list(tmp_path.glob("*.png"))


# ------------------------------------------------------------------------------------- kills

KILLS = """
import itertools, json, os, pathlib, random, signal, sys, time, traceback
import demo, tinyddpm as td
kills, longest, path, words = int(sys.argv[1]), 0.06, pathlib.Path(sys.argv[2]), sys.argv[3:]
demo.time.perf_counter = itertools.count(0, 31).__next__        # half a minute at each look
demo.sheet = demo.plot_loss = lambda *args, **options: None
demo.DRAWING["steps"] = 10
luck = random.Random(1)

def library():
    images, labels = demo.load_digits(pathlib.Path(words[1]), "train")
    net, state = td.UNet(image=images.shape[1:], channels=(4, 4), classes=3), None
    if path.exists():
        net, state, _ = td.load(path)
    d = td.Diffusion(td.cosine_betas(100))
    for state in td.train(net, d, images, labels, steps=int(words[2]), batch=4, state=state):
        td.save(path, net, state)

def begin():
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        library() if words[0] == "library" else demo.main(words)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)

steps, hit, times = [0], 0, 0
while times < kills:            # soon enough to hit it, late enough that it gets on
    child = begin()
    time.sleep(luck.uniform(0, longest))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    left = [name for name in os.listdir(path.parent) if name != path.name]
    if os.WIFSIGNALED(status):
        times, hit = times + 1, hit + bool(left)
        steps.append(td.load(path)[1].step if path.exists() else 0)
        assert steps[-1] >= steps[-2], steps
        assert len(left) <= 1, left
        longest *= 1.5 if steps[-1] == steps[-2] else 0.9
    else:                       # it was at the end before it could be killed
        assert status == 0
        longest /= 2
        path.unlink()
        steps.append(0)
last = os.waitpid(begin(), 0)[1]
print(json.dumps([last, steps, hit, os.listdir(path.parent)]))
"""


def killed_often(kills, path, *words):
    """What the program above reports: the steps that were found after each of the kills."""
    path.parent.mkdir()
    words = map(str, (kills, path, *words))
    done = subprocess.run([sys.executable, "-c", KILLS, *words], cwd=demo.HERE,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    last, steps, hit, left = json.loads(done.stdout)
    assert last == 0 and left == [path.name], (last, left)
    print(f"{kills} kills, {hit} of them while saving; steps {steps}")
    assert max(steps) > 0
    return steps


def test_kills_of_the_library_lose_nothing_that_was_saved(data, tmp_path):
    """Eight times at a random moment of a training that saves after each step. The step never
    goes back, what is found can be read, no more than one temporary file lies about, and in the
    end all is as after a run without a stop."""
    path = tmp_path / "out" / MODEL
    killed_often(8, path, "library", data, 40)
    images, labels = demo.load_digits(data, "train")
    net = td.UNet(image=images.shape[1:], channels=(4, 4), classes=3)
    for state in td.train(net, td.Diffusion(td.cosine_betas(100)), images, labels, steps=40,
                          batch=4):
        pass
    td.save(tmp_path / MODEL, net, state)
    assert contents(path) == contents(tmp_path / MODEL)


def whole_run(data, tmp_path, steps, monkeypatch):
    """The options of a training, and what it leaves where nothing disturbs it."""
    words = ["train", "--steps", steps, "--batch", "8", "--channels", "8", "--data", data]
    without_pictures(monkeypatch)
    run(*words, "--out", tmp_path / "whole")
    return words, contents(tmp_path / "whole" / MODEL)


def test_kills_of_the_demo_lose_nothing_that_was_saved(data, tmp_path, monkeypatch):
    """The same twelve times with the demo itself, which thinks that half a minute has passed at
    each look at the clock."""
    words, right = whole_run(data, tmp_path, 40, monkeypatch)
    path = tmp_path / "killed" / MODEL
    killed_often(12, path, *words, "--out", path.parent)
    assert contents(path) == right


OFTEN = """
import itertools
demo.time.perf_counter = itertools.count(0, 31).__next__
demo.DRAWING["steps"] = 10
"""


@pytest.mark.slow
def test_twenty_kills_of_processes(data, tmp_path, monkeypatch):
    """Of whole processes: most while they train, some from the first import on, some with
    Ctrl-C just before. One that was at its end too early does not count, and all begins
    again."""
    words, right = whole_run(data, tmp_path, 400, monkeypatch)
    out, luck, steps, kills = tmp_path / "killed", np.random.default_rng(4), [0], 0
    longest = 0.3
    while kills < 20:
        with started(*words, "--out", out, first=OFTEN) as child:
            if kills % 4:
                child.stdout.readline()             # the data are read, training begins
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(luck.uniform(0, longest if kills % 4 else 1.5))
            if kills % 5 == 4:
                child.send_signal(signal.SIGINT)
            child.kill()
            said = child.communicate()[1]
        assert child.returncode in (0, 1, -signal.SIGKILL) and "Traceback" not in said
        assert len(hidden(out) if out.exists() else []) <= 1
        steps.append(td.load(out / MODEL)[1].step if (out / MODEL).exists() else 0)
        assert steps[-1] >= steps[-2], steps
        longest *= 1.2 if steps[-1] == steps[-2] else 0.9
        kills += child.returncode == -signal.SIGKILL
        if child.returncode == 0:
            (out / MODEL).unlink()
            steps.append(0)
    print(kills, "kills; steps", steps)
    with started(*words, "--out", out, first=OFTEN) as child:
        child.communicate(timeout=60)
    assert child.returncode == 0 and contents(out / MODEL) == right
    assert sorted(path.name for path in out.iterdir()) \
        == ["denoising.png", "loss.png", MODEL, "samples.png"]


EVERY_LINE = """
import json, os, signal, sys
import tinyddpm as td
path = sys.argv[1]
net = td.UNet(image=(1, 1, 1), channels=(4,), classes=0)
codes = {getattr(td.save, "__code__"), td.written.__wrapped__.__code__}
net.params.flat[:] = 1
td.save(path, net)
found = []
for place in range(10 ** 6):
    child = os.fork()
    if not child:
        count = 0
        def trace(frame, event, value):
            global count
            if frame.f_code in codes:
                if count == place:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
                return trace
        net.params.flat[:] = 2
        sys.settrace(trace)
        td.save(path, net)
        os._exit(0)
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    value = set(td.load(path)[0].params.flat.tolist())
    found.append([killed, sorted(value), len(os.listdir(os.path.dirname(path))) - 1])
    if not killed:
        break
    net.params.flat[:] = 1
    td.save(path, net)
    assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)]
print(json.dumps(found))
"""


def test_a_kill_at_every_line_of_save(tmp_path):
    """The file is the old one up to some line, and from there on the new one; never anything
    else. At some lines a temporary file is left, which the next save removes."""
    done = subprocess.run([sys.executable, "-c", EVERY_LINE, tmp_path / MODEL], cwd=demo.HERE,
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    killed, values, left = zip(*json.loads(done.stdout))
    assert len(killed) > 25 and all(killed[:-1]) and not killed[-1]
    turn = values.index([2])
    assert set(map(tuple, values[:turn])) == {(1,)} and set(map(tuple, values[turn:])) == {(2,)}
    assert set(left) == {0, 1} and left[-1] == 0


def test_only_what_a_killed_process_left_is_removed(saved, tmp_path):
    """By save and by the demo's write, for this very file; all else stays."""
    path, whole, _ = saved
    path.write_bytes(whole)
    net, state, _ = td.load(path)
    with subprocess.Popen(["true"]) as child:
        child.wait()
    dead = child.pid
    stale = [f".{dead}-a.npz", ".99999999-a.npz"]
    others = [f".{dead}-b.npz", f".x{dead}-a.npz", f".{dead}-a.npz.old", f"{dead}-a.npz",
              ".-a.npz", f".{dead}-aXnpz", f"a.npz.{dead}.tmp"]
    if os.path.exists("/proc/self"):
        others.append(f".{os.getppid()}-a.npz")         # which may be about to rename it
    for save in (lambda to: td.save(to, net, state),
                 lambda to: demo.write(to, lambda temporary: temporary.write_text("new"))):
        for name in stale + others:
            (tmp_path / name).write_text("half")
        save(tmp_path / "a.npz")
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "a.npz"])


TWO_AT_ONCE = """
import os, sys
import tinyddpm as td
path, children = sys.argv[1], []
net = td.UNet(image=(1, 1, 1), channels=(4,), classes=0)
td.save(path, net)
for value in (1, 2):
    child = os.fork()
    if not child:
        code = 1
        try:
            net.params.flat[:] = value
            for _ in range(40):
                td.save(path, net)
            code = 0
        finally:
            os._exit(code)
    children.append(child)
found = set()
for _ in range(40):
    found |= {tuple(set(td.load(path)[0].params.flat.tolist()))}
    found -= {one for one in found if len(one) > 2}         # the start's random numbers
for child in children:
    assert os.waitpid(child, 0)[1] == 0
print(sorted(found), os.listdir(os.path.dirname(path)))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="it cannot be seen who lives")
def test_two_processes_that_save_to_the_same_file(tmp_path):
    """Neither takes the other's temporary file away, and what is read is always whole."""
    done = subprocess.run([sys.executable, "-c", TWO_AT_ONCE, tmp_path / MODEL], cwd=demo.HERE,
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(rf"\[(\((1|2)\.0,\)(, )?)*\] \['{MODEL}'\]\n", done.stdout)


def test_a_name_without_a_directory(saved, tmp_path, monkeypatch):
    """In the current one."""
    net = td.UNet(image=(1, 1, 1), channels=(4,), classes=0)
    monkeypatch.chdir(tmp_path)
    td.save("a.npz", net)
    td.save(Path("a.npz"), net)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


# -------------------------------------------------------------------------------- full disks

def test_a_disk_that_is_full_at_any_byte(saved):
    """save says which file, and the one before stays, with nothing beside it."""
    path, whole, right = saved
    path.write_bytes(whole)
    net, state, settings = td.load(path)
    for size in range(0, len(whole), 211):
        with limited(size), pytest.raises(OSError, match=re.escape(str(path))):
            td.save(path, net, state, **settings)
        assert path.read_bytes() == whole and list(path.parent.iterdir()) == [path]
    td.save(path, net, state, **settings)
    assert contents(path) == right


def test_a_disk_that_is_really_full(saved, tmp_path):
    """A file system of 32 kB, where one may be mounted."""
    path, whole, _ = saved
    path.write_bytes(whole)
    net, state, settings = td.load(path)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "none", tmp_path],
                             capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        td.save(tmp_path / MODEL, net, state, **settings)
        with pytest.raises(OSError, match=f"No space left .*{MODEL}"):
            for i in itertools.count():
                td.save(tmp_path / f"{i}{MODEL}", net, state, **settings)
        assert (tmp_path / MODEL).read_bytes() == whole and not hidden(tmp_path)
        with pytest.raises(OSError, match=f"No space left .*{MODEL}"):
            td.save(tmp_path / MODEL, net, state, losses=[0.5] * 5000)
        assert (tmp_path / MODEL).read_bytes() == whole and not hidden(tmp_path)
        text = complaint("forward", "--out", tmp_path)
        assert "No space left" in text and "forward.png" in text and not hidden(tmp_path)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_training_on_a_full_disk(begun, capsys):
    """As the shell sees it. The step before stays, and with room again it goes on."""
    words, out = begun
    before = (out / MODEL).read_bytes()
    full = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n" + OFTEN
    text = fails(*words, first=full)
    assert re.fullmatch(rf"demo.py: \[Errno \d+\] .*'{re.escape(str(out / MODEL))}'", text)
    assert (out / MODEL).read_bytes() == before and list(out.iterdir()) == [out / MODEL]
    with limited(9000):
        complaint(*words, "--fresh")
    assert (out / MODEL).read_bytes() == before and list(out.iterdir()) == [out / MODEL]


def test_commands_on_a_full_disk(finished, data, tmp_path, capsys):
    """Pictures, samples, all that is written: its name, and nothing of it is left. (capsys, as
    otherwise pytest keeps in a file what is printed.)"""
    shutil.copy(finished / MODEL, tmp_path)
    for words, name in [
            (["forward", "--digit", "1", "--data", data], "forward.png"),
            (["schedules", "--data", data], "schedules.png"),
            (["sample", "--steps", "2"], "sample.png"),
            (["sample", "--steps", "2", "--save", tmp_path / "x.npz"], "x.npz")]:
        with limited(200):
            text = complaint(*words, "--out", tmp_path)
        assert f"'{tmp_path / name}'" in text
        assert list(tmp_path.iterdir()) == [tmp_path / MODEL]


# ------------------------------------------------------------------ directories that are none

def no_training(*args, **options):
    raise AssertionError("it trains, though nothing can be written")
    yield


@pytest.fixture
def forbidden():
    """A directory in which this process may not write, as somebody else if need be."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o555)
        me = os.geteuid()
        if me == 0:
            os.seteuid(65534)               # nobody
        try:
            yield Path(name)
        finally:
            os.seteuid(me)
            os.chmod(name, 0o755)


def test_a_directory_that_cannot_be_written(forbidden, finished, monkeypatch):
    net = td.UNet(image=(1, 1, 1), channels=(4,), classes=0)
    with pytest.raises(PermissionError, match=str(forbidden)):
        td.save(forbidden / "a.npz", net)
    monkeypatch.setattr(td, "train", no_training)
    for out in (forbidden / "out", forbidden / "out" / "deeper"):
        text = complaint("train", "--out", out, "--steps", "1")
        assert "Permission denied" in text and str(forbidden) in text
    text = complaint("forward", "--out", forbidden)
    assert "Permission denied" in text and str(forbidden) in text
    assert list(forbidden.iterdir()) == []


def test_an_out_that_is_a_file(data, finished, tmp_path, monkeypatch):
    """Or lies below one. Training notices before it has trained."""
    monkeypatch.setattr(td, "train", no_training)
    monkeypatch.setattr(demo, "train_classifier", no_training)
    path = tmp_path / "file"
    path.write_text("precious")
    for out in (path, path / "below"):
        for words in (["train"], ["forward", "--digit", "1"], ["schedules"]):
            assert str(path) in complaint(*words, "--out", out, "--data", data)
        for command in ("sample", "guidance", "speed", "bpd", "score"):
            assert str(path) in complaint(command, "--out", out)
        assert str(path) in complaint("download", "--data", out)
        assert str(path) in complaint("sample", "--steps", "1", "--count", "1",
                                      "--out", finished, "--save", out / "x.npz")
    assert path.read_text() == "precious" and list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_an_out_that_is_a_file_at_the_command_line(data, tmp_path):
    (tmp_path / "file").write_text("precious")
    assert "file" in fails("train", "--data", data, "--out", tmp_path / "file")


def test_files_that_are_directories(finished, data, tmp_path):
    """A directory with the name of the checkpoint, of a picture, of the samples: it stays."""
    shutil.copy(finished / MODEL, tmp_path)
    for name in ("sample.png", "x.npz", "below/model.npz"):
        (tmp_path / name).mkdir(parents=True)
    words = ["sample", "--steps", "1", "--count", "1", "--out", tmp_path]
    assert "sample.png" in complaint(*words)
    assert "x.npz" in complaint(*words, "--save", tmp_path / "x.npz")
    for command in ("train", "sample"):
        text = complaint(command, "--out", tmp_path / "below")
        assert f"{tmp_path / 'below' / MODEL} is not a tinyddpm checkpoint" in text
    assert not hidden(tmp_path) and (tmp_path / "x.npz").is_dir()


def test_a_directory_that_vanishes_while_training(begun, monkeypatch):
    """Somebody tidied up. It is made again, and no step is lost."""
    words, out = begun
    without_pictures(monkeypatch)
    train = td.train

    def then_removed(*args, **options):
        for state in train(*args, **options):
            if state.step == 2:
                shutil.rmtree(out)
            yield state

    monkeypatch.setattr(td, "train", then_removed)
    run(*words)
    assert td.load(out / MODEL)[1].step == 30


# -------------------------------------------------------------------------- too large, too many

@pytest.mark.parametrize("number", [10 ** 15, 10 ** 30])
def test_more_than_any_memory_holds(number, data, finished, tmp_path):
    """Beyond all address space, so that no machine tries."""
    for words in (["train", "--batch", number, "--data", data, "--out", tmp_path],
                  ["train", "--channels", number, "--data", data, "--out", tmp_path],
                  ["sample", "--count", number, "--out", finished]):
        assert len(complaint(*words)) > len("demo.py: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_more_than_any_memory_holds_at_the_command_line(data, tmp_path):
    text = fails("train", "--batch", 10 ** 15, "--data", data, "--out", tmp_path)
    assert "allocate" in text and "(1000000000000000,)" in text


# ----------------------------------------------------------------------------------- download

BODY = gzip.compress(os.urandom(100_000))


class Moody(http.server.BaseHTTPRequestHandler):
    """A server that answers as the first part of the address says."""

    def do_GET(self):
        mood = self.path.split("/")[1]
        if mood.isdigit():
            return self.send_error(int(mood))
        if mood in ("dead", "loop", "file"):
            return self.answer(302, b"", Location={
                "dead": f"http://127.0.0.1:{self.server.dead}/", "loop": self.path,
                "file": "file:///etc/hostname"}[mood])
        if mood == "silent":
            return self.server.end.wait(20)
        body = bytearray(BODY)
        if mood == "flipped":
            body[len(body) // 2] ^= 4
        if mood in ("cut", "stalls", "reset"):
            self.answer(200, body[:50_000], len(body))
            if mood == "stalls":
                self.server.end.wait(20)
            if mood == "reset":             # the connection breaks without a farewell
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                           b"\1\0\0\0\0\0\0\0")
                self.connection.shutdown(socket.SHUT_RD)
                self.connection.close()
            return
        self.answer(200, body)

    def answer(self, status, body, length=None, **headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": length or len(body)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words):
        pass

    def handle(self):
        with contextlib.suppress(OSError, ValueError):      # the other side, or ours, is gone
            super().handle()

    def finish(self):
        with contextlib.suppress(OSError, ValueError):
            super().finish()


@pytest.fixture(scope="module")
def moody():
    """The server's address; a time of 0.3 s is long for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "*")
        patch.setattr(demo, "TIMEOUT", 0.3)
        with socket.create_server(("127.0.0.1", 0)) as once:
            dead = once.getsockname()[1]
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Moody)
        server.dead, server.end = dead, threading.Event()
        server.handle_error = lambda *args: None
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.end.set()
        server.shutdown()
        thread.join()
        server.server_close()


MOODS = {"cut": "could not be fetched: .*", "reset": "could not be fetched: .*",
         "stalls": "could not be fetched: .*timed out.*",
         "silent": "could not be fetched: .*timed out.*",
         "404": "could not be fetched: HTTP Error 404.*",
         "500": "could not be fetched: HTTP Error 500.*",
         "503": "could not be fetched: HTTP Error 503.*",
         "dead": "could not be fetched: .*refused.*", "loop": "could not be fetched: .*loop.*",
         "file": "could not be fetched: .*not allowed.*",
         "flipped": "could not be fetched: .*", "other": "is not the file .* SHA-256 is .*"}


@pytest.mark.parametrize("mood", MOODS)
def test_a_download_that_goes_wrong(mood, moody, tmp_path):
    """One sentence with the address; nothing is left, and what was there before stays."""
    for name in (f"{NAMES[0]}.gz", "notes.txt"):
        (tmp_path / name).write_text("precious")
    text = complaint("download", "--url", f"{moody}/{mood}", "--data", tmp_path)
    assert re.fullmatch(f"demo.py: {moody}/{mood}/{NAMES[0]}.gz {MOODS[mood]}", text)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} \
        == {f"{NAMES[0]}.gz": "precious", "notes.txt": "precious"}


@pytest.mark.parametrize("mood", [
    "cut", *(pytest.param(mood, marks=pytest.mark.slow)
             for mood in ("reset", "stalls", "silent", "404", "500", "dead", "loop", "other"))])
def test_a_download_that_goes_wrong_at_the_command_line(mood, moody, tmp_path):
    text = fails("download", "--url", f"{moody}/{mood}", "--data", tmp_path,
                 first="demo.TIMEOUT = 0.3")
    assert re.fullmatch(f"demo.py: {moody}/{mood}/{NAMES[0]}.gz {MOODS[mood]}", text)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_download_that_is_killed(moody, tmp_path):
    """Half of the file has come, and none of it lies about."""
    with started("download", "--url", f"{moody}/stalls", "--data", tmp_path / "new") as child:
        for _ in range(100):
            if (tmp_path / "new").exists():
                break
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(0.1)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(0.2)
        child.kill()
        child.communicate()
    assert child.returncode == -signal.SIGKILL and list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("url", ["nonsense", "http://", "http://[", "http://127.0.0.1:port",
                                 "gopher://127.0.0.1", "http://a..b", "http://127.0.0.1/ä b",
                                 "file:///nowhere"])
def test_addresses_that_are_none(url, moody, tmp_path):
    assert len(complaint("download", "--url", url, "--data", tmp_path)) > 20
    assert not list(tmp_path.iterdir())


def test_a_download_to_a_full_disk(moody, tmp_path, monkeypatch):
    """The right file, and no room for it."""
    digest = hashlib.sha256(gzip.decompress(BODY)).hexdigest()
    monkeypatch.setattr(demo, "MNIST_SHA256", {NAMES[0]: digest})
    with limited(1000):
        text = complaint("download", "--url", f"{moody}/right", "--data", tmp_path)
    assert f"{NAMES[0]}.gz'" in text and not list(tmp_path.iterdir())
    run("download", "--url", f"{moody}/right", "--data", tmp_path)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [BODY]
