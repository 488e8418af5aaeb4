"""The laws of examples/latent.py."""
import latent
import numpy as np
from common import close

import tinyddpm as td

RNG = np.random.default_rng(0)


def autoencoder(image):
    net = latent.Autoencoder(image, 8, dtype=np.float64)
    net.params.flat = 0.3 * RNG.standard_normal(net.params.flat.shape)
    return net


def test_the_autoencoders_gradient_is_the_slope_of_its_loss(monkeypatch):
    monkeypatch.setattr(latent, "LAMBDA", 0.5)          # as large as the rest
    net = autoencoder((8, 12, 1))
    x, eps = RNG.standard_normal((2, 5, *net.image))

    def loss(p):
        fresh = net.with_params(p.flat)
        value = latent.add_gradient(fresh, None, x, None, None, eps, 7)

        def back(dvalue):
            p.grad.flat += dvalue * fresh.grads.flat
            return ()
        return np.array([value]), back
    for name, error in td.gradient_errors(loss, net.params, []):
        assert error < 1e-6, name


def test_the_loss_is_the_pictures_error_and_the_latents_length(monkeypatch):
    net = autoencoder((8, 12, 1))
    x, eps = RNG.standard_normal((2, 5, *net.image))
    z, _ = net.encode(x)
    assert z.shape == (5, *net.latent) == (5, 2, 3, 4)
    found, decode = [], net.decode
    monkeypatch.setattr(net, "decode", lambda z: found.append(z) or decode(z))
    loss = latent.add_gradient(net, None, x, None, None, eps, 10)
    noise = (found[0] - z) / latent.SIGMA
    noise = noise.round(9)              # different values of eps
    assert len(np.unique(noise)) == noise.size and np.isin(noise, eps.round(9)).all()
    error = ((decode(found[0])[0] - x) ** 2).sum()
    close(loss, (error + latent.LAMBDA * (z ** 2).sum()) / 10)


def test_canvases_hold_digits_in_order_and_cut_takes_them_apart():
    labels = np.tile(np.arange(10), 3)
    images = (labels + np.arange(30) / 100)[:, None, None, None] + np.zeros((28, 28, 1))
    x, first = latent.canvases(images, labels, 2, RNG)
    corners = x[:, ::55, ::55, 0].reshape(-1, 4) // 1
    assert np.array_equal(corners, (first[:, None] + np.arange(4)) % 10)
    parts, wanted = latent.cut(x, first)
    assert np.array_equal(parts // 1, wanted[:, None, None, None] + np.zeros((28, 28, 1)))
    used = np.sort(parts[:, 0, 0, 0])
    assert np.array_equal(used, np.sort(np.repeat(images[:, 0, 0, 0], 4)))


def test_latents_have_mean_0_and_deviation_1_and_decode_to_what_the_decoder_says():
    net, x = autoencoder((8, 12, 1)), RNG.standard_normal((50, 8, 12, 1))
    encode, decode = latent.coder(net, x)
    z = encode(x)
    close(z.mean((0, 1, 2)), 0)
    close(z.std((0, 1, 2)), 1)
    close(decode(z), np.clip(net.decode(net.encode(x)[0])[0], -1, 1))
