"""examples/memory.py."""
import memory
import numpy as np
import pytest

import tinyddpm as td


def gradients(kind, x, calls=1):
    net = kind((6, 7, 2), (8, 12), classes=2, blocks=2, attention=(1,), dropout=0.3, rng=3,
               dtype=x.dtype)
    net.params.flat += 0.2 * td.normal(0, net.params.flat.shape, x.dtype)
    y, back = net.forward(x, np.array([3, 900]), np.array([0, 2]), 5)
    return y, [back(y) for _ in range(calls)], net.grads.flat.copy()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_recomputed_blocks_give_the_same_bit_for_bit(dtype):
    """The answer, the gradient of the picture and of every parameter, with dropout; also when
    asked twice."""
    x = td.normal(1, (2, 6, 7, 2), dtype)
    y, dx, grads = gradients(td.UNet, x, 2)
    again, dx_again, grads_again = gradients(memory.Recomputed, x, 2)
    assert np.array_equal(y, again) and np.array_equal(grads, grads_again) and grads.any()
    assert np.array_equal(dx, dx_again)


def test_half_precision_changes_the_gradient_little_and_the_answer_not():
    x = td.normal(1, (2, 6, 7, 2))
    (y, (dx,), grads), (again, (dx_again,), grads_again) = (
        gradients(kind, x) for kind in (td.UNet, memory.Halved))
    assert np.array_equal(y, again)
    for a, b in ((dx, dx_again), (grads, grads_again)):
        assert 1e-6 < np.linalg.norm(a - b) / np.linalg.norm(a) < 2e-3


@pytest.mark.skipif(td.xp is not np, reason="tracemalloc counts the host's memory")
def test_memory_grows_by_one_input_a_block():
    """A block more keeps its input, 28 x 28 of 8 channels, and not all inside it."""
    def more(kind):
        few, many = (memory.step(kind, depth, 2, channels=(8,))[2] for depth in (2, 6))
        return (many - few) / 8         # so many blocks more, 4 on each side
    x = 4 * 2 * 28 * 28 * 8
    assert more(td.UNet) > 4 * x
    assert 0.9 * x < more(memory.Recomputed) < 1.5 * x
    assert 0.4 * x < more(memory.Halved) < more(memory.Recomputed) - 0.4 * x
