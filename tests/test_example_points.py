"""The laws of examples/points.py."""
import numpy as np
import points
from common import close

import tinyddpm as td

RNG = np.random.default_rng(0)


def network():
    net = points.PointNet(5, 8, 2, classes=3, dtype=np.float64)
    net.params.flat = 0.3 * RNG.standard_normal(net.params.flat.shape)
    return net


def test_the_point_networks_gradients():
    net, t, y = network(), np.array([1, 40, 999]), np.array([0, 2, 3])
    x = RNG.standard_normal((3, 5, 2))

    def layer(p):
        out, back = net.with_params(p).forward(x, t, y)
        return out, lambda dy: back(dy) or ()
    for name, error in td.gradient_errors(layer, net.params, []):
        assert error < 2e-6, name


def test_a_block_of_the_point_network_is_its_equations_point_by_point():
    p, silu = network().params.top[0], lambda x: td.silu(x)[0]
    h, e = RNG.standard_normal((5, 8)), RNG.standard_normal((1, 16))
    normed = td.norm(p.norm, h[None, :, None])[0][0, :, 0]
    u = [silu(normed[i] @ p.w1.w + p.w1.b) for i in range(5)]
    scale, shift = np.split(np.concatenate([e[0], sum(u) / 5]) @ p.w2.w
                            + p.w2.b, 2)
    expected = [h[i] + silu((1 + scale) * u[i] + shift) @ p.w3.w + p.w3.b for i in range(5)]
    close(points.block(p, h[None, :, None], e, 0 * e)[0][0, :, 0], expected)


def test_permuted_noise_becomes_the_same_cloud_permuted_and_each_point_twice_the_same_twice():
    net, noise, y = network(), RNG.standard_normal((3, 5, 2)), np.array([0, 1, 2])
    diffusion, order = td.Diffusion(td.cosine_betas(1000), "v"), RNG.permutation(5)

    def draw(noise):
        model = td.guided(net, y, net.null, 1.5)
        return td.sample(td.ddim(model, diffusion, noise, steps=5, clip=points.BOUNDS))
    x = draw(noise)
    close(draw(noise[:, order]), x[:, order])
    close(draw(noise.repeat(2, 1)), x.repeat(2, 1))
    noise[:, 0] += 1
    assert abs(draw(noise)[:, 1:] - x[:, 1:]).min() > 1e-5      # they look at one another


def test_points_fall_where_it_is_bright_in_proportion():
    image = np.full((1, 28, 28, 1), -1.0)
    image[0, 3, 20], image[0, 10, 5] = 1, 0            # the first is twice as bright
    x = points.UNIT * points.clouds(image, 6000, RNG)[0] + 14
    first = x[:, 0] < 4
    assert (x[first] // 1 == [3, 20]).all() and (x[~first] // 1 == [10, 5]).all()
    assert abs(first.mean() - 2 / 3) < 0.02
    close(x[first].mean(0), [3.5, 20.5], 0.02)
    close(x[first].var(0), 1 / 12, 0.01)


def test_a_rasterised_cloud_is_its_points_density():
    x = RNG.uniform(-1, 1, (2, 7, 2))
    picture, off = points.rasterise(x, 0.9, 20), np.arange(28) + 0.5 - 14
    for i, j in ((14, 14), (9, 17)):
        squares = ((points.UNIT * x - [off[i], off[j]]) ** 2).sum(2)
        density = np.exp(-squares / 2 / 0.81).sum(1) / (2 * np.pi * 0.81)
        close(picture[:, i, j, 0], 2 * density * 100 / 7 / 20 - 1)
    assert points.rasterise(x, 0.9, 1e-9).max() == 1
