"""All cores: parts of a batch, put together, are the batch; processes share one network, and
end with the block, or with the first of them, even if that is killed."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import cores
import tinyddpm as td
from common import close

pytestmark = pytest.mark.skipif(td.xp is not np, reason="these run with TINYDDPM_BACKEND=numpy")
DIFFUSION = td.Diffusion(td.cosine_betas(20), "v")
HOW = (64, "l2", "simple", np.random.default_rng(0), (-1, 1))       # total, ..., rng, clip


def network(**options):
    net = td.UNet((4, 4, 1), (8,), classes=2, dtype=np.float64, **options)
    net.params.flat = 0.3 * td.normal(1, net.params.flat.shape, np.float64)
    return net


def batch(n):
    images, rng = np.tanh(td.normal(0, (20, 4, 4, 1), np.float64)), np.random.default_rng(2)
    return td.draw_batch(DIFFUSION, images, np.arange(20) % 2, 2, rng, n, 0.1)


def noted(net, diffusion, x0, t, y, eps, total, loss, weighting, rng, clip):
    """A gradient that tells what its part is: process, pictures, the first of its rng."""
    drawn = rng.random()
    net.grads.flat[:4] += os.getpid(), x0.sum(), drawn, drawn ** 2
    return len(x0)


def failing(*arguments):
    if cores.multiprocessing.parent_process():
        raise ArithmeticError("in a part")
    return 0.0


@pytest.mark.parametrize("threads, n", [(1, 2), (1, 5), (3, 2), (3, 5), (3, 13)])
def test_a_model_in_parts_is_the_model(threads, n):
    """Whatever the batch: parts of at most 4 images, as many for each thread."""
    net, sizes = network(), []
    x, t, y = td.normal(0, (n, 4, 4, 1), np.float64), np.arange(1, n + 1), np.arange(n) % 2

    def model(x, t, y):
        sizes.append(len(x))
        return net(x, t, y)
    close(cores.parallel(model, threads, 4)(x, t, y), net(x, t, y))
    assert max(sizes) <= 4 and (len(sizes) % threads == 0 or len(sizes) == n)


def test_gradients_of_parts_are_the_batchs():
    """Of all of a part's pictures; after the parameters have changed, too; added to what is
    there; and of a batch with fewer pictures than there are processes."""
    net = network()
    with cores.processes(net, 3) as gradient:
        for n in (7, 2):
            net.params.flat *= 0.9
            net.grads.flat, other = 1, network().with_params(net.params.flat)
            how = dict(total=16 * n, loss="huber", weighting="snr")
            loss = td.add_gradient(other, DIFFUSION, *batch(n), **how)
            found = gradient(net, DIFFUSION, *batch(n), **how, rng=np.random.default_rng(0),
                             clip=(-1, 1))
            close(found, loss)
            close(net.grads.flat, 1 + other.grads.flat)


def test_parts_are_of_different_processes_with_noise_of_their_own(capfd):
    """From one seed always the same. At the end they go without a word."""
    net, parts = network(), []
    with cores.processes(net, 2, noted) as gradient:
        for seed in (0, 0, 1):
            net.grads.flat = 0
            assert gradient(net, DIFFUSION, *batch(5), 1, "l2", "simple",
                            np.random.default_rng(seed), None) == 5
            parts.append(net.grads.flat[:4].copy())
    once, again, other = parts
    close(once[1], batch(5)[0].sum())
    assert once[0] != 2 * os.getpid() and np.array_equal(once, again) and once[2] != other[2]
    assert 2 * once[3] > 1.001 * once[2] ** 2       # they would be equal for equal numbers
    assert capfd.readouterr().err == ""


def test_an_error_in_another_process_is_the_firsts():
    """After which the block is of no more use: other parts' answers would be the next ones'."""
    with cores.processes(network(), 3, failing) as gradient:
        for error in ArithmeticError, OSError:
            with pytest.raises(error, match="in a part|closed"):
                gradient(network(), DIFFUSION, *batch(4), *HOW)


def test_one_core_needs_no_process():
    with cores.processes(network(), 1, noted) as gradient:
        assert gradient is noted


def test_a_process_that_is_lost_is_one_sentence():
    net = network()
    with cores.processes(net, 2) as gradient:
        arguments = (net, DIFFUSION, *batch(4), *HOW)
        gradient(*arguments)
        (process,) = cores.multiprocessing.active_children()
        os.kill(process.pid, signal.SIGINT)         # which is for the first process to heed
        assert os.getpgid(process.pid) != os.getpgrp()          # as is what all of a group get
        gradient(*arguments)
        process.kill()
        process.join()
        with pytest.raises(ChildProcessError, match="with a part of the batch has ended"):
            gradient(*arguments)
    assert not cores.multiprocessing.active_children()


ENDLESS = """
import cores, test_cores
if __name__ == "__main__":
    net = test_cores.network()
    with cores.processes(net, 2) as gradient:
        gradient(net, test_cores.DIFFUSION, *test_cores.batch(4), *test_cores.HOW)
        print(cores.multiprocessing.active_children()[0].pid, flush=True)
        input()
"""


def test_processes_end_with_the_first(tmp_path):
    """Even if that is killed."""
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS)
    path = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
    with subprocess.Popen([sys.executable, script], env=os.environ | {"PYTHONPATH": path},
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        other = int(program.stdout.readline())
        program.kill()
    for _ in range(100):
        try:
            os.kill(other, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError(f"{other} goes on")
