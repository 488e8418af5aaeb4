"""Checkpoints: what comes back, resuming to the bit, damage of every kind, and that a failed
save leaves the last good file as it was."""
import os
import pickle
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

import tinyddpm as td

pytestmark = pytest.mark.skipif(td.xp is not np, reason="these run with TINYDDPM_BACKEND=numpy")
DIFFUSION = td.Diffusion(td.zero_terminal_snr(td.linear_betas(10, 0.01, 0.3)), "flow")
CONFIG = dict(image=(2, 3, 1), channels=(4, 8), classes=3, blocks=(1, 2), attention=(1,),
              heads=2, dropout=0.2, space_to_depth=True)


def runs(net, state=None, steps=6, **options):
    """The training run that these tests interrupt; four pictures, the same every time."""
    images = np.random.default_rng(2).uniform(-1, 1, (4, 2, 3, 1))
    options = dict(batch=6, warmup=2, rng=7, chunk=2, state=state) | options
    return td.train(net, DIFFUSION, images, np.array([0, 1, 2, 0]), steps=steps, **options)


def after(net, steps, **options):
    """The State after so many of its six steps."""
    states = runs(net, **options)
    return [next(states) for _ in range(steps)][-1]


def everything(net, state):
    """All that training changes: arrays, and the rest by name."""
    adam = state.optimizer
    return ([net.params.flat, state.ema.flat, adam.m, adam.v],
            dict(step=state.step, loss=state.loss, lr=state.lr, n=adam.n, muon=adam.muon,
                 momentum=tuple(adam.momentum), ema=(state.ema.decay, state.ema.n),
                 matrices=adam.matrices, rng=state.rng.bit_generator.state))


def assert_same(one, other):
    (arrays, rest), (other_arrays, other_rest) = everything(*one), everything(*other)
    for a, b in zip(arrays, other_arrays):
        assert a.dtype == b.dtype and np.array_equal(a, b)
    assert rest == other_rest


@pytest.fixture
def saved(tmp_path):
    """A file of a network and its training run: the path, net and state."""
    net = td.UNet(**CONFIG)
    state = after(net, 2)
    td.save(tmp_path / "run.npz", net, DIFFUSION, state, T=1000, note="naïve")
    return tmp_path / "run.npz", net, state


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A small file to damage: where it is, its bytes, and the parameters in it."""
    path = tmp_path_factory.mktemp("checkpoint") / "plain.npz"
    net = td.UNet(image=(1, 1, 1), channels=(4,), classes=0)
    td.save(path, net, DIFFUSION)
    return path, path.read_bytes(), net.params.flat


# ------------------------------------------------------------------------------- round trip

@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_run_comes_back_whole(dtype, optimizer, tmp_path):
    """Whoever loads it needs nothing else: the network, the diffusion and what is predicted,
    the State, the notes."""
    net = td.UNet(**CONFIG, dtype=dtype)
    state = after(net, 3, ema=0.9, optimizer=optimizer, momentum=(0.8, 0.95))
    td.save(tmp_path / "a", net, DIFFUSION, state, clip=[-1, 1], w=None, n=np.int64(3),
            a=np.arange(2))
    again, diffusion, its_state, notes = td.load(tmp_path / "a")    # the name is left as it is
    assert notes == dict(clip=[-1, 1], w=None, n=3, a=[0, 1])
    assert diffusion.predicts == "flow" and np.array_equal(diffusion.abar, DIFFUSION.abar)
    assert_same((net, state), (again, its_state))
    x = np.ones((2, 2, 3, 1), dtype)
    assert np.array_equal(again(x, 3, np.array([0, 3])), net(x, 3, np.array([0, 3])))
    assert np.array_equal(again.forward(x, 3, None, 0)[0], net.forward(x, 3, None, 0)[0])


def test_a_network_alone(tmp_path):
    """Without a State there is none, as for a network that is only to be drawn from."""
    net = td.UNet(**CONFIG, rng=5)
    td.save(str(tmp_path / "net.npz"), net, DIFFUSION)
    again, _, state, notes = td.load(str(tmp_path / "net.npz"))
    assert np.array_equal(again.params.flat, net.params.flat)
    assert state is None and notes == {}


def test_half_precision_weights_are_widened(tmp_path):
    """They are half the file; computing in them would overflow."""
    net = td.UNet(**CONFIG)
    half = net.params.flat.astype(np.float16)
    td.save(tmp_path / "half", net.with_params(half), DIFFUSION)
    again = td.load(tmp_path / "half")[0]
    assert again.params.flat.dtype == np.float32 and np.array_equal(again.params.flat, half)
    assert again(np.ones((1, 2, 3, 1)), 3).dtype == np.float32


def test_what_is_loaded_can_be_trained(saved):
    """The arrays are its own: none is shared or read-only."""
    net, _, state, _ = td.load(saved[0])
    arrays, _ = everything(net, state)
    for i, a in enumerate(arrays):
        assert not any(np.shares_memory(a, b) for b in arrays[:i])
        a += 1


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_resuming_is_the_uninterrupted_run(threads, dropout, optimizer, tmp_path):
    """To the bit: parameters, mean, moments, the Generator's state, loss and learning rate. A
    State knows its optimiser."""
    whole, part = (td.UNet(**CONFIG | dict(dropout=dropout)) for _ in range(2))
    state = after(part, 3, threads=threads, optimizer=optimizer)
    td.save(tmp_path / "half", part, DIFFUSION, state)
    part, _, state, _ = td.load(tmp_path / "half")
    assert_same((part, after(part, 3, state=state, threads=threads)),
                (whole, after(whole, 6, threads=threads, optimizer=optimizer)))


def test_a_finished_run_has_nothing_to_resume(tmp_path):
    net = td.UNet(**CONFIG)
    td.save(tmp_path / "end", net, DIFFUSION, after(net, 6))
    net, _, state, _ = td.load(tmp_path / "end")
    assert list(runs(net, state)) == []


@pytest.mark.parametrize("bits", [np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937,
                                  np.random.Philox, np.random.SFC64])
def test_every_generator_goes_on_where_it_was(bits, tmp_path):
    net = td.UNet(**CONFIG)
    state = after(net, 1, rng=np.random.Generator(bits(1)))
    td.save(tmp_path / "a", net, DIFFUSION, state)
    other = td.load(tmp_path / "a")[2]
    assert np.array_equal(state.rng.random(1000), other.rng.random(1000))


def test_no_pickle_inside(saved):
    """Plain arrays and one text: nothing that could run when it is read."""
    with np.load(saved[0], allow_pickle=False) as file:
        kinds = {name: file[name].dtype.kind for name in file.files}
    assert kinds == dict(meta="U", betas="f", params="f", ema="f", m="f", v="f")
    assert zipfile.is_zipfile(saved[0])


# ----------------------------------------------------------------------------------- damage

def refused(path):
    """The file is refused by one sentence that names it."""
    with pytest.raises(ValueError) as caught:
        td.load(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


def test_a_file_cut_short(plain):
    """At its ends, and at a hundred places between."""
    path, whole, _ = plain
    size = len(whole)
    for length in {*range(64), *range(0, size, size // 100), *range(size - 64, size)}:
        path.write_bytes(whole[:length])
        refused(path)


def flip(plain, bits):
    """Load the file with one bit turned over, each in turn: refused, or rightly read."""
    path, whole, params = plain
    for bit in bits:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            net, diffusion, state, notes = td.load(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:
            assert np.array_equal(net.params.flat, params)
            assert np.array_equal(diffusion.beta, DIFFUSION.beta)
            assert state is None and notes == {}


def test_a_bit_turned_over(plain):
    """Anywhere, and in the headers of the arrays and in the archive's directory, where a
    checksum may not look."""
    size, whole = 8 * len(plain[1]), plain[1]
    flip(plain, np.random.default_rng(0).integers(0, size, 300))
    for start in whole.index(b"\x93NUMPY"), whole.rindex(b"\x93NUMPY"):
        flip(plain, range(8 * (start - 58), 8 * (start + 80), 3))
    flip(plain, range(8 * whole.index(b"PK\1\2"), size, 3))


@pytest.mark.slow
def test_every_bit_turned_over(plain):
    flip(plain, range(8 * len(plain[1])))


def test_the_refusal_stays_short(plain):
    """A wrong length of a name makes zipfile quote half the file in its error."""
    path, whole, _ = plain
    path.write_bytes(whole[:27] + b"\7" + whole[28:])
    assert len(refused(path)) < 400


def rewritten(path, **changes):
    """The file again with some of its arrays changed, or left out where None."""
    with np.load(path) as file:
        arrays = dict(file) | changes
    with open(path, "wb") as file:
        np.savez(file, **{name: a for name, a in arrays.items() if a is not None})


@pytest.mark.parametrize("content", [
    b"", b"not an archive", pickle.dumps({"params": np.zeros(3)})],
    ids=["empty", "text", "pickle"])
def test_another_kind_of_file(content, tmp_path):
    (tmp_path / "a.npz").write_bytes(content)
    refused(tmp_path / "a.npz")


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was run",)


def test_a_pickle_is_not_run(saved):
    rewritten(saved[0], params=np.array([Bomb()], object))
    refused(saved[0])


def test_a_foreign_archive(tmp_path):
    np.savez(tmp_path / "a.npz", weights=np.zeros(3))
    refused(tmp_path / "a.npz")
    np.save(tmp_path / "a.npy", np.zeros(3))
    refused(tmp_path / "a.npy")


@pytest.mark.parametrize("name", ["meta", "betas", "params", "ema", "m", "v"])
def test_a_part_is_missing(saved, name):
    rewritten(saved[0], **{name: None})
    refused(saved[0])


@pytest.mark.parametrize("name", ["params", "ema", "m", "v"])
@pytest.mark.parametrize("change", [lambda a: a[:-1], lambda a: a[None], lambda a: a[:0]])
def test_sizes_that_do_not_fit(saved, name, change):
    with np.load(saved[0]) as file:
        a = change(file[name])
    rewritten(saved[0], **{name: a})
    refused(saved[0])


def test_another_version_s_file(saved):
    with np.load(saved[0]) as file:
        meta = str(file["meta"]).replace(td.FORMAT, "tinyddpm checkpoint 99")
    rewritten(saved[0], meta=meta)
    assert "checkpoint 99" in refused(saved[0])


@pytest.mark.parametrize("name", ["betas", "params", "ema", "m", "v"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_not_loaded(saved, name, value):
    with np.load(saved[0]) as file:
        a = file[name].copy()
    a[1] = value
    rewritten(saved[0], **{name: a})
    refused(saved[0])


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.npz"):
        td.load(tmp_path / "none.npz")


# ------------------------------------------------------------------------------ failing saves

def no_room(file, **arrays):
    file.write(b"half of it")
    raise OSError("no space left on device")


def refusing(*_):
    raise PermissionError("somebody else holds it open")


@pytest.mark.parametrize("module, name, broken", [
    (td.np, "savez", no_room), (td.os, "fsync", refusing), (td.os, "replace", refusing)])
def test_a_save_that_fails_leaves_the_old_file(saved, module, name, broken, monkeypatch):
    """And nothing else: no half of a file, no temporary one."""
    path, net, state = saved
    before = path.read_bytes()
    net.params.flat += 1
    monkeypatch.setattr(module, name, broken)
    with pytest.raises(OSError) as caught:
        td.save(path, net, DIFFUSION, state)
    assert str(path) == str(caught.value.filename)      # a full disk names no file by itself
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_all_is_written_before_it_is_synced(saved, monkeypatch):
    """Else the file renamed could be a part of it, after a loss of power."""
    path, net, state = saved
    synced = []

    def look(_):
        synced.append(zipfile.is_zipfile(f"{path}.tmp"))
        assert path.exists()                            # the old one: not yet replaced
    monkeypatch.setattr(td.os, "fsync", look)
    td.save(path, net, DIFFUSION, state)
    assert synced == [True]


def test_a_save_replaces_the_old_file(saved):
    path, net, state = saved
    net.params.flat += 1
    td.save(path, net, DIFFUSION, state)
    assert np.array_equal(td.load(path)[0].params.flat, net.params.flat)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("part", range(4), ids=["params", "ema", "m", "v"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_not_saved(saved, part, value):
    path, net, state = saved
    before = path.read_bytes()
    everything(net, state)[0][part][3] = value
    with pytest.raises(ValueError, match="run.npz"):
        td.save(path, net, DIFFUSION, state)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_settings_have_to_fit_into_json(saved):
    path, net, state = saved
    before = path.read_bytes()
    with pytest.raises((TypeError, AttributeError)):
        td.save(path, net, DIFFUSION, state, rng=state.rng)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_an_interrupted_save_leaves_the_old_file(saved, monkeypatch):
    """Ctrl-C in the middle of it."""
    path, net, state = saved
    before = path.read_bytes()
    monkeypatch.setattr(td.np, "savez", lambda file, **arrays: os.kill(os.getpid(), 2))
    with pytest.raises(KeyboardInterrupt):
        td.save(path, net, DIFFUSION, state)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_a_killed_save_loses_nothing(saved):
    """SIGKILL at any moment; what it left is overwritten by the next save."""
    path, net, state = saved
    code = ("import sys, numpy as np, tinyddpm as td\n"
            "net, diffusion, state, notes = td.load(sys.argv[1])\n"
            "print(flush=True)\n"
            "while True: td.save(sys.argv[1], net, diffusion, state)")
    for wait in (0.0, 0.004, 0.011):
        process = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE,
                                   cwd=Path(td.__file__).parent)
        process.stdout.readline()
        time.sleep(wait)
        process.kill(), process.wait(), process.stdout.close()
        assert_same((net, state), (lambda net, _, state, __: (net, state))(*td.load(path)))
    td.save(path, net, DIFFUSION, state)
    assert list(path.parent.iterdir()) == [path]


def test_a_link_is_followed_and_stays_one(saved, tmp_path):
    path, net, state = saved
    link = tmp_path / "link.npz"
    link.symlink_to(path)
    net.params.flat += 1
    td.save(link, net, DIFFUSION, state)
    assert link.is_symlink() and not path.is_symlink()
    assert np.array_equal(td.load(path)[0].params.flat, net.params.flat)


def test_what_is_no_file_is_refused(saved, tmp_path):
    """A device, a pipe, a folder: renaming onto it would do away with it."""
    _, net, state = saved
    pipe, folder = tmp_path / "pipe", tmp_path / "folder"
    os.mkfifo(pipe), folder.mkdir()
    for path in (pipe, folder, Path(os.devnull)):
        with pytest.raises(ValueError, match="regular"):
            td.save(path, net, DIFFUSION, state)
    assert pipe.is_fifo() and folder.is_dir() and Path(os.devnull).is_char_device()
