"""The laws of examples/super_resolution.py."""
import numpy as np
import pytest
import super_resolution as sr
from common import close

import tinyddpm as td

LONG = td.Diffusion(td.cosine_betas(500), "v")
NORMAL = np.random.default_rng(0).standard_normal((400, 8, 8, 1))


def narrow(x, t):
    """v for pixels that are N(0, 0.2^2), given x_t and the mean of every 4 x 4 of them: the
    expected x0 of x_t alone, but for its mean, and c."""
    xt, c, abar = x[..., :1], x[..., 1:], td.per_image(LONG.abar[t], x)
    x0 = 0.04 * abar ** 0.5 * xt / (0.04 * abar + 1 - abar)
    x0 = x0 - sr.enlarge(sr.reduce(x0)) + c
    return (abar ** 0.5 * xt - x0) / (1 - abar) ** 0.5


def test_reduced_are_the_means_of_4_x_4_and_enlarging_keeps_them():
    small = sr.reduce(NORMAL)
    for i, j in np.ndindex(2, 2):
        close(small[:, i, j, 0], NORMAL[:, 4 * i:4 * i + 4, 4 * j:4 * j + 4].mean((1, 2, 3)))
    close(sr.reduce(sr.enlarge(small)), small)


def test_a_draw_has_the_mean_it_was_given_and_is_3_dB_worse_than_the_expected():
    x0 = 0.2 * NORMAL[:200]
    small = sr.reduce(x0)
    mean, draw = (sr.draw(narrow, LONG, small, 1, steps) for steps in ([500], 500))
    close(mean, sr.enlarge(small), 0.001)       # x_T says next to nothing
    close(sr.reduce(draw), small)
    gap = sr.psnr(mean, x0).mean() - sr.psnr(draw, x0).mean()
    assert gap == pytest.approx(10 * np.log10(2), abs=0.2)


def test_the_network_sees_the_noisy_image_and_the_condition_as_it_is():
    pair, eps = NORMAL[:24].reshape(2, 6, 8, 8, 2)
    t, seen, x0, noise = np.arange(1, 500, 90), [], pair[..., :1], eps[..., :1]

    class Net:
        def forward(self, x, *rest):
            seen.append(x)
            return 0 * x[..., :1], lambda dout: x
    loss = sr.add_gradient(Net(), LONG, pair, t, t, eps, 7)
    close(seen[0], np.concatenate([LONG.q_sample(x0, t, noise), pair[..., 1:]], 3))
    close(loss, (LONG.target(x0, noise, t) ** 2).sum() / 7)


def test_the_gradient_past_the_condition():
    net = td.UNet((8, 8, 1), (8,), classes=0, condition=1)
    net.params.flat = 0.3 * td.normal(0, net.params.flat.shape)
    errors = td.gradient_errors(
        lambda p, x: sr.Given(net.with_params(p), NORMAL[:2]).forward(x, np.array([3, 900])),
        net.params, [NORMAL[2:4]])
    assert max(dict(errors).values()) < 1e-6


def test_psnr_is_of_each_image_in_dB():
    close(sr.psnr(NORMAL[:2] + [[[[0.2]]], [[[0.02]]]], NORMAL[:2]), [20, 40])


def test_bicubic_keeps_ramps_inside_and_stays_within_bounds():
    i, j = np.indices((7, 7)) - 3
    ramp = np.float32(0.05 * i + 0.1 * j)[None, :, :, None]
    i, j = np.indices((12, 12)) / 4 - 1.375         # where no edge is near
    close(sr.bicubic(ramp)[0, 8:20, 8:20, 0], 0.05 * i + 0.1 * j, 1e-6)
    assert abs(sr.bicubic(np.sign(ramp))).max() == 1
