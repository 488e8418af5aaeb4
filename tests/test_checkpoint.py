"""Checkpoints: all comes back, to the bit; a damaged file is never taken for a whole one; and
whatever happens while one is written, the last good one stays, with nothing beside it."""
import contextlib
import dataclasses
import errno
import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

import tinyddpm as td

pytestmark = pytest.mark.skipif(td.xp is not np, reason="these run with TINYDDPM_BACKEND=numpy")
DIFFUSION = td.Diffusion(td.zero_terminal_snr(td.linear_betas(10, 0.01, 0.3)), "flow")
CONFIG = dict(image=(2, 3, 1), channels=(4, 8), classes=3, blocks=(1, 2), attention=(1,),
              heads=2, dropout=0.2, space_to_depth=True)
ARRAYS = ("betas", "params", "ema", "m", "v")


def run(net, state=None, steps=6, **options):
    """The training that these tests interrupt; four pictures, the same every time."""
    images = np.random.default_rng(2).uniform(-1, 1, (4, *net.image))
    options = dict(batch=6, warmup=2, rng=7, chunk=2, state=state) | options
    return td.train(net, DIFFUSION, images, np.array([0, 1, 2, 0]), steps=steps, **options)


def after(net, steps, **options):
    """The State after so many of its six steps."""
    return [state for _, state in zip(range(steps), run(net, **options))][-1]


def contents(net, diffusion, state, notes):
    """All that a file holds, as plain values to compare."""
    arrays = [diffusion.beta, net.params.flat]
    rest = [json.dumps(dataclasses.asdict(net)), diffusion.predicts, notes]
    if state:
        adam, ema = state.optimizer, state.ema
        arrays += [ema.flat, adam.m, adam.v]
        rest += [[*adam.momentum], adam.muon, adam.n, adam.matrices, ema.decay, ema.n,
                 state.step, state.loss, state.lr, state.rng.bit_generator.state]
    return [(a.dtype, a.tobytes()) for a in arrays], rest


@pytest.fixture
def saved(tmp_path):
    """A file, alone in its folder, and what it was saved from."""
    net = td.UNet(image=(1, 1, 1), channels=(4,), classes=3)
    state = after(net, 2)
    td.save(tmp_path / "run.npz", net, DIFFUSION, state)
    return tmp_path / "run.npz", (net, DIFFUSION, state)


# -------------------------------------------------------------------------------- round trip

@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_checkpoint_is_complete(dtype, optimizer, tmp_path):
    """Whoever loads it needs nothing else: the network and what it computes, the process and
    what is predicted, the State, the notes. The file's name is left as it is."""
    net, notes = td.UNet(**CONFIG, dtype=dtype), dict(clip=[-1, 1], w=None, why="naïve")
    state = after(net, 3, ema=0.9, optimizer=optimizer, momentum=(0.8, 0.95))
    td.save(tmp_path / "a", net, DIFFUSION, state, **notes)
    loaded = td.load(tmp_path / "a")
    assert contents(*loaded) == contents(net, DIFFUSION, state, notes)
    x, y = np.ones((2, 2, 3, 1), dtype), np.array([0, 3])
    for rng in (None, 0):
        assert np.array_equal(loaded[0].forward(x, 3, y, rng)[0], net.forward(x, 3, y, rng)[0])


def test_a_network_alone(tmp_path, monkeypatch):
    """To draw with. There is no State then; a name without a folder is one in this."""
    monkeypatch.chdir(tmp_path)
    net = td.UNet(**CONFIG, rng=5)
    td.save("net.npz", net, DIFFUSION)
    assert contents(*td.load(Path("net.npz"))) == contents(net, DIFFUSION, None, {})
    assert os.listdir() == ["net.npz"]


def test_numbers_of_numpy_are_taken(tmp_path):
    """labels.max() + 1 is one."""
    net = td.UNet(**CONFIG | dict(classes=np.int64(3), blocks=np.array([1, 2])))
    td.save(tmp_path / "a", net, DIFFUSION, loss=np.float32(0.5), many=np.arange(3))
    again, _, _, notes = td.load(tmp_path / "a")
    assert np.array_equal(again.params.flat, net.params.flat) and again.classes == 3
    assert notes == dict(loss=0.5, many=[0, 1, 2])


def test_half_precision_weights_are_widened(tmp_path):
    """They are half the file; computing in them would overflow."""
    net = td.UNet(**CONFIG)
    half = net.params.flat.astype(np.float16)
    td.save(tmp_path / "half", net.with_params(half), DIFFUSION)
    again = td.load(tmp_path / "half")[0]
    assert again.params.flat.dtype == np.float32 and np.array_equal(again.params.flat, half)
    assert again(np.ones((1, 2, 3, 1)), 3).dtype == np.float32


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resuming_is_the_uninterrupted_run(optimizer, tmp_path):
    """To the bit, with dropout too. A State knows its optimiser. At the end nothing is left."""
    whole, part, path = td.UNet(**CONFIG), td.UNet(**CONFIG), tmp_path / "a"
    expected = after(whole, 6, optimizer=optimizer)
    td.save(path, part, DIFFUSION, after(part, 3, optimizer=optimizer))
    part, diffusion, state, _ = td.load(path)
    td.save(path, part, diffusion, after(part, 3, state=state))
    assert contents(*td.load(path)) == contents(whole, DIFFUSION, expected, {})
    part, _, state, _ = td.load(path)
    assert [*run(part, state)] == []


@pytest.mark.parametrize("bits", ["PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64"])
def test_every_generator_goes_on_where_it_was(bits, saved):
    path, (net, diffusion, state) = saved
    state.rng = np.random.Generator(getattr(np.random, bits)(1))
    state.rng.random(3, dtype=np.float32)               # of which half a draw is kept
    td.save(path, net, diffusion, state)
    other = td.load(path)[2].rng
    for dtype in (np.float32, np.float64):
        assert np.array_equal(state.rng.random(1000, dtype), other.random(1000, dtype))


def test_no_pickle_inside(saved):
    """Plain arrays and one text: nothing that could run when it is read."""
    with np.load(saved[0], allow_pickle=False) as file:
        kinds = {name: file[name].dtype.kind for name in file.files}
    assert kinds == {"meta": "U"} | dict.fromkeys(ARRAYS, "f")


# ------------------------------------------------------------------------------------ damage

def refused(path):
    """The file is refused in a sentence that names it, and nothing of it is left open."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        with pytest.raises(ValueError) as error:
            td.load(path)
        message = str(error.value)
        del error
    assert not caught
    assert str(path) in message and "\n" not in message and len(message) < 300 + len(str(path))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A place for damaged files, the bytes of a whole one, and its contents."""
    path = tmp_path_factory.mktemp("damaged") / "a.npz"
    net = td.UNet(image=(1, 1, 1), channels=(4,), classes=1)
    state = next(td.train(net, DIFFUSION, -np.ones((1, 1, 1, 1)), [0], steps=3, batch=2))
    td.save(path, net, DIFFUSION, state, losses=[0.5, 0.25])
    return path, path.read_bytes(), contents(*td.load(path))


def refused_or_right(whole, damaged):
    path, _, right = whole
    path.write_bytes(damaged)
    try:
        loaded = td.load(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert contents(*loaded) == right


def flipped(raw, bits):
    damaged = bytearray(raw)
    for bit in bits:
        damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


@given(data=st.data())
def test_flipped_bits(whole, data):
    """Anywhere, or where no checksum looks: in the headers, or the directory at the end."""
    raw = whole[1]
    starts = [i for i in range(len(raw)) if raw[i:i + 2] == b"PK"]
    near = st.tuples(st.sampled_from(starts), st.integers(0, 8 * 160)).map(
        lambda a: min(8 * a[0] + a[1], 8 * len(raw) - 1))
    bits = st.lists(st.integers(0, 8 * len(raw) - 1) | near, min_size=1, max_size=4)
    for damage in data.draw(st.lists(bits, min_size=5, max_size=5)):
        refused_or_right(whole, flipped(raw, damage))


@given(st.data())
def test_lost_and_foreign_pieces(whole, data):
    """Cut short; blocks of zeros, as after a crash of the machine; pieces that are missing, or
    of another place; something before it or after it."""
    raw = whole[1]
    a, b, c = sorted(data.draw(st.tuples(*[st.integers(0, len(raw) - 1)] * 3)))
    whole[0].write_bytes(raw[:a])
    refused(whole[0])
    for damaged in (raw[:a] + bytes(b - a) + raw[b:], raw[:a] + raw[b:], raw[:b] + raw[a:],
                    raw[:a] + raw[b:c] + raw[a:b] + raw[c:], raw[a:b] + raw, raw + raw[a:b]):
        refused_or_right(whole, damaged)


def test_the_refusal_stays_short(whole):
    """A wrong length of a name makes zipfile quote the file in its error."""
    whole[0].write_bytes(flipped(whole[1], [8 * 27, 8 * 27 + 1, 8 * 27 + 2]))
    refused(whole[0])


@pytest.mark.slow
def test_a_bit_flipped_in_every_byte(whole):
    raw, rng = whole[1], np.random.default_rng()
    for i in range(len(raw)):
        refused_or_right(whole, flipped(raw, [8 * i + int(rng.integers(8))]))


@pytest.mark.parametrize("content", [
    b"", b"not an archive", pickle.dumps({"params": np.zeros(3)}), "array", "archive"], ids=str)
def test_another_kind_of_file(content, tmp_path):
    path = tmp_path / "a.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        with open(path, "wb") as file:
            np.save(file, np.zeros(3)) if content == "array" else np.savez(file, w=np.zeros(3))
    refused(path)


def rewritten(path, change):
    """The file again, rightly made, but for a change of its arrays and its meta."""
    with np.load(path) as file:
        arrays = dict(file)
    meta = json.loads(str(arrays.pop("meta")))
    change(arrays, meta)
    with open(path, "wb") as file:
        np.savez(file, **{"meta": json.dumps(meta)} | arrays)


class Bomb:
    def __reduce__(self):
        return os._exit, (1,)


def spoilt(a, value):
    a = a.copy()
    a[1] = value
    return a


CHANGES = {"nan": lambda a: spoilt(a, np.nan), "inf": lambda a: spoilt(a, np.inf),
           "text": lambda a: a.astype(str), "pickle": lambda a: np.array([Bomb()], object),
           "deeper": lambda a: a[None], "none": lambda a: a[:0], "shorter": lambda a: a[:-1],
           "one": lambda a: a[:1]}


@pytest.mark.parametrize("name, change", [
    (name, change) for name in ARRAYS for change in (*CHANGES, "missing")
    if name != "betas" or change not in ("text", "shorter", "one")])    # they would do as well
def test_an_array_that_does_not_fit(saved, name, change):
    """No number is read that save would not have written, and no pickle: it would end the
    tests."""
    def do(arrays, meta):
        a = arrays.pop(name)
        if change != "missing":
            arrays[name] = CHANGES[change](a)
    rewritten(saved[0], do)
    refused(saved[0])


def test_a_pickle_for_the_meta_is_not_run(saved):
    rewritten(saved[0], lambda arrays, meta: arrays.update(meta=np.array([Bomb()], object)))
    refused(saved[0])


@pytest.mark.parametrize("place, value", [
    ("format", "tinyddpm checkpoint 1"), ("format", None), ("net image", [8, 8, 2]),
    ("net channels", [8]), ("net classes", 9), ("net colour", "red"), ("net", None),
    ("predicts", "eps"), ("predicts", "score"), ("optimizer", []), ("ema", 3), ("rng", {}),
    ("rng bit_generator", "shuffle"), ("rng state", 3), ("state", 7), ("state", [1, 2, 3, 4])])
def test_meta_that_does_not_fit(saved, place, value):
    """Among it another version's file, and eps for betas that end at zero SNR."""
    def do(arrays, meta):
        *above, last = place.split()
        (meta[above[0]] if above else meta)[last] = value
    rewritten(saved[0], do)
    refused(saved[0])


@pytest.mark.parametrize("name", ["format", "net", "predicts", "notes", "optimizer", "ema",
                                  "rng"])
def test_meta_that_is_incomplete(saved, name):
    rewritten(saved[0], lambda arrays, meta: meta.pop(name))
    refused(saved[0])


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.npz"):
        td.load(tmp_path / "none.npz")


# ---------------------------------------------------------------------------------- bad luck

@contextlib.contextmanager
def unchanged(path):
    """In the end the file is as it was, and alone in its folder."""
    before = path.read_bytes()
    yield
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("name", ["params", "ema", "m", "v"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_not_saved(saved, name, value):
    path, (net, diffusion, state) = saved
    adam = state.optimizer
    dict(params=net.params.flat, ema=state.ema.flat, m=adam.m, v=adam.v)[name][3] = value
    with unchanged(path), pytest.raises(ValueError, match=path.name):
        td.save(path, net, diffusion, state)


@pytest.mark.parametrize("note", [{1, 2}, 1j, np.random.default_rng(0)], ids=str)
def test_notes_have_to_fit_into_json(saved, note):
    with unchanged(saved[0]), pytest.raises((TypeError, AttributeError)):
        td.save(saved[0], *saved[1], note=note)


def half(file, **arrays):
    file.write(b"half of it")
    raise OSError(errno.ENOSPC, "No space left on device")


def stopped(*args, **arrays):
    raise KeyboardInterrupt


def forbidden(*args):
    raise PermissionError(errno.EPERM, "Somebody else holds it open")


@pytest.mark.parametrize("module, name, broken", [
    (np, "savez", half), (np, "savez", stopped), (os, "fsync", forbidden),
    (os, "fsync", stopped), (os, "replace", forbidden), (os, "replace", stopped)])
def test_a_save_that_breaks_off_leaves_the_last_file(saved, module, name, broken, monkeypatch):
    """Errors of the system name the file, though a full disk names none. What an earlier
    process left, when it was killed, is in nobody's way."""
    path, args = saved
    with unchanged(path):
        Path(f"{path}.tmp").write_text("what a killed process left")
        monkeypatch.setattr(module, name, broken)
        error = KeyboardInterrupt if broken is stopped else OSError
        with pytest.raises(error) as caught:
            td.save(path, *args)
        assert error is KeyboardInterrupt or caught.value.filename == str(path)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of NumPy 2.0
def test_a_disk_that_is_full_at_any_byte(saved):
    """No file can grow beyond so many bytes; for this process alone."""
    resource = pytest.importorskip("resource")
    path, args = saved
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in [*range(0, path.stat().st_size, 500), path.stat().st_size - 1]:
        with unchanged(path):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
            try:
                with pytest.raises(OSError) as caught:
                    td.save(path, *args)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert caught.value.filename == str(path)


def test_all_is_on_the_disk_before_it_replaces_the_last_file(saved, monkeypatch):
    """Else the new file could be a part of itself, after a loss of power."""
    path, (net, diffusion, state) = saved
    before, synced = path.read_bytes(), []

    def look(_):
        synced.append(contents(*td.load(f"{path}.tmp")))
        assert path.read_bytes() == before
    monkeypatch.setattr(os, "fsync", look)
    net.params.flat += 1
    td.save(path, net, diffusion, state)
    assert synced == [contents(net, diffusion, state, {})] == [contents(*td.load(path))]
    assert os.listdir(path.parent) == [path.name]


KILLED_AT_EVERY_LINE = """
import json, os, signal, sys
import tinyddpm as td
path, found = sys.argv[1], []
net, diffusion, state, notes = td.load(path)
os.fsync = lambda _: None       # it takes time, and matters when the whole machine stops
for line in range(1000):
    net.params.flat = 1
    td.save(path, net, diffusion, state)
    child = os.fork()
    if not child:
        passed = 0
        def trace(frame, event, value):
            global passed
            if frame.f_code.co_filename == td.__file__:
                passed += event == "line"
                if passed > line:
                    os.kill(os.getpid(), signal.SIGKILL)
                return trace
        net.params.flat = 2
        sys.settrace(trace)
        td.save(path, net, diffusion, state)
        os._exit(0)
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    [value] = set(td.load(path)[0].params.flat.tolist())
    found.append([killed, value, sorted(os.listdir(os.path.dirname(path)))])
    if not killed:
        break
print(json.dumps(found))
"""


def test_a_process_killed_at_any_line_of_save(saved):
    """The file is the old one up to some line and from there on the new one, never anything
    else. At some lines one temporary file is left, which the next save overwrites."""
    path = saved[0]
    done = subprocess.run([sys.executable, "-c", KILLED_AT_EVERY_LINE, path], text=True,
                          capture_output=True, cwd=Path(td.__file__).parent, timeout=60)
    assert done.returncode == 0, done.stderr
    killed, values, left = zip(*json.loads(done.stdout))
    assert len(killed) > 25 and all(killed[:-1]) and not killed[-1]
    assert [*values] == sorted(values) and set(values) == {1, 2}
    beside = [path.name, f"{path.name}.tmp"]
    assert all(files in ([path.name], beside) for files in left) and beside in left
    assert left[-1] == [path.name]


def test_a_link_is_followed_and_stays_one(saved, tmp_path):
    """Also one whose file is not there yet, and one to a link."""
    _, args = saved
    (tmp_path / "folder").mkdir()
    file, link, far = tmp_path / "folder" / "new.npz", tmp_path / "link", tmp_path / "far"
    link.symlink_to(file), far.symlink_to(link)
    for path in (link, far):
        td.save(path, *args)
        assert link.is_symlink() and far.is_symlink() and not file.is_symlink()
        assert contents(*td.load(file)) == contents(*args, {})
        assert os.listdir(file.parent) == [file.name]
        file.unlink()


def test_what_is_no_file_is_refused(saved, tmp_path):
    """A device, a pipe, a folder, a link to one: renaming onto it would do away with it."""
    pipe, folder, link = tmp_path / "pipe", tmp_path / "folder", tmp_path / "link"
    os.mkfifo(pipe), folder.mkdir(), link.symlink_to(pipe)
    for path in (pipe, folder, link, Path(os.devnull)):
        with pytest.raises(ValueError, match=str(path.resolve())):
            td.save(path, *saved[1])
    assert pipe.is_fifo() and folder.is_dir() and Path(os.devnull).is_char_device()
    assert {path.name for path in tmp_path.iterdir()} == {"run.npz", "pipe", "folder", "link"}
