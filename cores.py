"""All cores of a CPU, each with a part of every batch: threads to draw, processes to train.

NumPy lets other threads go on while it computes, but Python between its calls does not (the
GIL), and a training step is thousands of short calls, so that threads wait for each other.
Processes do not, but need half a second to start. (docs/MEASURED.md compares them.)
"""
import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

# Before NumPy starts: one thread to a product, because we cut the batch instead.
for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS",
             "VECLIB_MAXIMUM_THREADS"):
    os.environ.setdefault(name, "1")

import numpy as np                                                              # noqa: E402

import tinyddpm as td                                                           # noqa: E402
from tinyddpm import xp                                                         # noqa: E402

ON_GPU = xp is not np       # one process keeps it busy
CORES = (1 if ON_GPU else len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
         else os.cpu_count())


def parallel(model, threads=CORES, chunk=500 if ON_GPU else 32):
    """The same model, its batch cut into equal parts of at most chunk images, the same number
    of parts for each thread."""
    pool = ThreadPoolExecutor(threads)

    def model_in_parts(*arrays):
        n = len(arrays[0])
        parts = min(n, threads * -(-n // (threads * chunk)))
        cuts = [slice(n * i // parts, n * (i + 1) // parts) for i in range(parts)]
        return xp.concatenate([*pool.map(lambda cut: model(*(a[cut] for a in arrays)), cuts)])
    return model_in_parts


@contextlib.contextmanager
def processes(net, n=CORES, gradient=td.add_gradient):
    """A gradient for td.train, computed by n processes, this one and others that end with the
    block. They share each chunk: give n times as much. A copy of the parameters, and a gradient
    for each other process, are in memory that all see.

        import cores                    # first, as it sets NumPy's threads

        def main():                     # all that the program does
            with cores.processes(net) as gradient:
                for state in td.train(..., chunk=16 * cores.CORES, gradient=gradient): ...

        if __name__ == "__main__":
            main()

    The others import the program's file, so nothing may run outside main. Net and gradient go
    to them by pickle: net's class and gradient have to be importable by name."""
    if n == 1:
        yield gradient
        return
    flat, context = net.params.flat, multiprocessing.get_context("spawn")   # on every system
    shared = context.RawArray(flat.dtype.char, n * flat.size)
    params, *their_grads = np.frombuffer(shared, flat.dtype).reshape(n, -1)
    pipes, ends = zip(*(context.Pipe() for _ in their_grads))
    team = [context.Process(target=serve, args=(end, net, shared, i, gradient), daemon=True)
            for i, end in enumerate(ends, 1)]
    for process, end in zip(team, ends):
        process.start()
        end.close()         # so that only the process has it: if that ends, recv fails

    def in_parts(net, diffusion, x0, t, y, eps, total, loss, weighting, rng, clip):
        params[:] = net.params.flat
        few = min(n, len(x0))           # a last chunk may be small
        cut = [np.array_split(a, few) for a in (x0, t, y, eps)]
        own, *parts = [(diffusion, *part, total, loss, weighting, part_rng, clip)
                       for *part, part_rng in zip(*cut, rng.spawn(few))]
        try:
            for pipe, part in zip(pipes, parts):
                pipe.send(part)
            mean_loss = gradient(net, *own)
            for pipe, grads, _ in zip(pipes, their_grads, parts):
                answer = pipe.recv()
                if isinstance(answer, Exception):
                    raise answer
                mean_loss += answer
                net.grads.flat += grads
        except BaseException as error:
            for pipe in pipes:          # other answers may be on their way: nobody shall take
                pipe.close()            # them for the next chunk's
            if isinstance(error, (EOFError, ConnectionError)):
                raise ChildProcessError(
                    "a process with a part of the batch has ended") from error
            raise
        return mean_loss

    try:
        yield in_parts
    finally:
        for pipe, process in zip(pipes, team):
            pipe.close()
            process.join()


def serve(pipe, net, shared, i, gradient):
    """What the i-th of the other processes does, until the pipe ends."""
    # Ctrl-C, and any signal to the group, is for the first process, which then ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):          # not on Windows
        os.setpgrp()
    keep_memory()
    params = net.params
    rows = np.frombuffer(shared, params.flat.dtype).reshape(-1, params.flat.size)
    net = net.with_params(td.Params(params.layout, rows[0], rows[i]))
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            part = pipe.recv()
            net.grads.flat = 0
            try:
                answer = gradient(net, *part)
            except Exception as error:
                answer = error
            pipe.send(answer)


def keep_memory():
    """Ask glibc to keep what NumPy frees, instead of giving it back to the kernel after every
    step and getting it anew, page by page."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):      # another C library
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-3, 32 << 20)      # M_MMAP_THRESHOLD, at its highest
            libc.mallopt(-1, 1 << 30)       # M_TRIM_THRESHOLD
