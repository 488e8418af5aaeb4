"""examples/data_parallel.py."""
import copy
import os
import shutil
from importlib.util import find_spec

import data_parallel
import numpy as np
import pytest
from common import close

import demo
import pictures
import tinyddpm as td


class Rank:
    """One of `size` processes, whose all-reduce only keeps what it would send."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size

    def Allreduce(self, in_place, message):
        self.sent = message.copy()


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_what_processes_send_adds_up_to_the_gradient_and_loss_of_the_batch(size, monkeypatch):
    """Also where it cannot be cut evenly, and where some have nothing to do."""
    monkeypatch.setattr(data_parallel, "in_place", lambda: None)
    monkeypatch.setattr(data_parallel, "CHUNK", 2)
    net, diffusion = td.UNet((4, 4, 1), (4,), classes=2, dtype=np.float64), demo.process()
    net.params.flat = 0.3 * np.random.default_rng(0).standard_normal(net.params.flat.size)
    images = np.random.default_rng(1).uniform(-1, 1, (9, 4, 4, 1))
    rng, labels = np.random.default_rng(2), np.arange(9) % 2
    batch = td.draw_batch(diffusion, images, labels, 2, rng, 5, 0.1)
    other, total = copy.deepcopy(net), 0
    loss = td.add_gradient(other, diffusion, *batch, 80)
    for rank in range(size):
        net.grads.flat = 7          # of an earlier batch of the same step
        comm = Rank(rank, size)
        data_parallel.all_reduced(comm, net, diffusion, *batch, 80)
        close(net.grads.flat, 7 + comm.sent[:-1])
        total = total + comm.sent
    close(total[:-1], other.grads.flat)
    close(total[-1], loss)


@pytest.mark.skipif(not (shutil.which("mpiexec") and find_spec("mpi4py")),
                    reason="no MPI: pip install mpi4py mpich")
@pytest.mark.skipif(td.xp is not np, reason="the messages are on the host")
def test_processes_train_as_one_does_and_go_on_after_one_has_failed(tmp_path):
    """Two, of which one fails after step 11: the job ends with a sentence. Three go on from the
    checkpoint of step 10. All end where td.train ends."""
    path, data, net = tmp_path / "model.npz", pictures.load(), demo.network()
    said, well = data_parallel.mpiexec(2, 12, path, 5, 11)
    assert not well and "process 1 of 2 failed: it was told to" in said
    assert td.load(path)[2].step == 10
    said, well = data_parallel.mpiexec(3, 12, path, 5)
    assert well, said
    for state in td.train(net, demo.process(), data.images, data.labels, steps=12, batch=5,
                          optimizer="muon", lr=demo.LR["muon"], ema=demo.EMA, rng=1):
        pass
    after, _, its, _ = td.load(path)
    close(after.params.flat, net.params.flat, 1e-5)
    close(its.ema.flat, state.ema.flat, 1e-5)
    assert its.step == 12 and abs(its.loss - state.loss) < 1e-5
    assert its.rng.bit_generator.state == state.rng.bit_generator.state
    assert not os.path.exists(f"{path}.tmp")
