"""examples/inpaint.py."""
import numpy as np

import inpaint
import tinyddpm as td

PROCESS = td.Diffusion(td.cosine_betas(50), "x0")


def pairs(x, t):
    """E[x0 | x_t] of pairs of pixels that are N(0, 1), .9 of each the other's."""
    C, abar = np.array([[1, 0.9], [0.9, 1]]), PROCESS.abar[t[0]]
    gain = abar ** 0.5 * C @ np.linalg.inv(abar * C + (1 - abar) * np.eye(2))
    return x @ gain.T


def test_filling_keeps_what_is_known_and_by_resampling_agrees_with_it():
    """Given one pixel of a pair, the other is N(.9 times it, .19), but for the length of the
    steps. Without resampling it is far less like it, and less certain."""
    x0 = np.random.default_rng(0).standard_normal((4000, 1, 1, 2))
    known, found = np.array([True, False]), {}
    for times in (1, 15):
        x = inpaint.fill(pairs, PROCESS, x0, known, 1, 50, times, clip=None)
        assert np.array_equal(x[..., 0], x0[..., 0])
        a, b = x[:, 0, 0].T
        found[times] = a @ b / (a @ a), np.var(b - 0.9 * a)
    assert found[1][0] < 0.7 and abs(found[15][0] - 0.9) < 0.03
    assert found[1][1] > 0.3 and 0.1 < found[15][1] < 0.2


def test_each_step_is_made_so_many_times():
    asked = []

    def model(x, t):
        asked.append(int(t[0]))
        return 0 * x
    inpaint.fill(model, PROCESS, np.zeros((1, 2, 2, 1)), np.array([True]), 0, 5, 3)
    assert asked == [t for t in (50, 40, 30, 20, 10) for _ in range(3)]


def test_masks_leave_what_they_say():
    hole, half, few = inpaint.masks(500, np.random.default_rng(0)).values()
    assert (~hole).sum() == 144 and half[0, :14].all() and not half[0, 14:].any()
    assert abs(few.mean() - 1 / 8) < 0.005
