"""The laws of examples/super_resolution.py."""
import numpy as np
import pytest
import super_resolution as sr
from common import close

import tinyddpm as td

RNG = np.random.default_rng(0)
DIFFUSION = td.Diffusion(td.cosine_betas(500), "v")


def small_deviation(x, t):
    """v for pixels that are N(0, 0.2^2), given x_t and the mean of every 4 x 4 of them: the
    expected x0 of x_t alone, but for its mean, and c."""
    xt, c = x[..., :1], x[..., 1:]
    abar = td.per_image(DIFFUSION.abar[t], x)
    x0 = 0.04 * abar ** 0.5 * xt / (0.04 * abar + 1 - abar)
    x0 = x0 - sr.enlarge(sr.reduce(x0)) + c
    return (abar ** 0.5 * xt - x0) / (1 - abar) ** 0.5


def test_reduced_are_the_means_of_4_x_4_and_enlarging_keeps_them():
    x = RNG.standard_normal((2, 8, 12, 1))
    small = sr.reduce(x)
    for i, j in np.ndindex(2, 3):
        close(small[:, i, j, 0], x[:, 4 * i:4 * i + 4, 4 * j:4 * j + 4].mean((1, 2, 3)))
    close(sr.reduce(sr.enlarge(small)), small)


def test_a_draw_has_the_mean_it_was_given_and_is_3_dB_worse_than_the_expected():
    x0 = 0.2 * RNG.standard_normal((200, 8, 8, 1))
    small = sr.reduce(x0)
    mean, draw = (sr.draw(small_deviation, DIFFUSION, small, 1, steps)
                  for steps in ([500], 500))
    close(mean, sr.enlarge(small), 0.001)       # x_T says next to nothing
    close(sr.reduce(draw), small)
    gap = sr.psnr(mean, x0).mean() - sr.psnr(draw, x0).mean()
    assert gap == pytest.approx(10 * np.log10(2), abs=0.2)


def test_the_network_sees_the_noisy_image_and_the_condition_as_it_is():
    pair, eps, t = *RNG.standard_normal((2, 3, 4, 4, 2)), np.array([1, 90, 500])
    seen, x0, noise = [], pair[..., :1], eps[..., :1]

    class Net:
        def forward(self, x, *rest):
            seen.append(x)
            return 0 * x[..., :1], lambda dout: x
    loss = sr.add_gradient(Net(), DIFFUSION, pair, t, t, eps, 7)
    close(seen[0], np.concatenate([DIFFUSION.q_sample(x0, t, noise), pair[..., 1:]], 3))
    close(loss, (DIFFUSION.target(x0, noise, t) ** 2).sum() / 7)


def test_the_gradient_past_the_condition():
    net = td.UNet((4, 4, 1), (8,), classes=0, condition=1)
    net.params.flat = 0.3 * td.normal(0, net.params.flat.shape)
    x, c = RNG.standard_normal((2, 2, 4, 4, 1))
    errors = td.gradient_errors(
        lambda p, x: sr.Given(net.with_params(p), c).forward(x, np.array([3, 900])),
        net.params, [x])
    assert max(dict(errors).values()) < 1e-6


def test_psnr_is_of_each_image_in_dB():
    x0 = np.zeros((2, 4, 4, 1))
    close(sr.psnr(x0 + np.array([0.2, 0.02]).reshape(2, 1, 1, 1), x0), [20, 40])


def test_bicubic_keeps_what_is_flat_does_not_shift_and_stays_within_bounds():
    small = np.sign(RNG.standard_normal((2, 7, 7, 1))).astype(np.float32)
    close(sr.bicubic(0 * small + 0.3), 0.3, 1e-6)
    close(sr.bicubic(small[:, ::-1]), sr.bicubic(small)[:, ::-1], 1e-5)
    assert abs(sr.bicubic(small)).max() == 1
