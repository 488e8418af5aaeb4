"""examples/tokens.py: sentences, where their digits stand, and what pixels take from words."""
import math

import numpy as np
import pytest
import tokens
from common import close

import tinyddpm as td

RNG = np.random.default_rng(0)
FLAT = np.arange(10).reshape(-1, 1, 1, 1) / 20 + 0.5 + np.zeros((10, 14, 14, 1))
STEP = {"t": np.array([3, 500]), "y": np.array([72, 400])}


def painter(by_attention):
    net = tokens.Painter(by_attention, (12, 24))
    net.params.flat = 0.2 * td.normal(0, net.params.flat.shape)
    return net


def test_sentences_say_where_their_digits_stand():
    y, left, top = np.array([72, 139, 205, 350]), np.s_[7:21, :14], np.s_[:14, 7:21]
    right, bottom = np.s_[7:21, 14:], np.s_[14:, 7:21]
    assert [" ".join(tokens.WORDS[i] for i in tokens.SENTENCES[k]) for k in y] == [
        "seven left of two", "three right of nine", "zero above five", "five below zero"]
    x = tokens.compose(y, FLAT, np.arange(10), RNG)
    for one, a, b, first, second in zip(x, (left, right, top, bottom),
                                        (right, left, bottom, top), (7, 3, 0, 5), (2, 9, 5, 0)):
        close(one[a], FLAT[first], 1e-6)
        close(one[b], FLAT[second], 1e-6)
        assert (one == -1).sum() == 2 * 14 * 14                 # and the rest is black


def test_a_picture_of_two_digits_is_right_exchanged_or_wrong(monkeypatch):
    monkeypatch.setattr(tokens.score, "read",                   # a reader of greys
                        lambda _, x: (None, np.rint(20 * x.mean((1, 2, 3)) - 10)))
    y = np.arange(400)
    r, a, b = y // 100, y // 10 % 10, y % 10
    x = tokens.compose(y, FLAT, np.arange(10), RNG)
    for asked, right, exchanged in (
            (y, True, False), (100 * r + 10 * b + a, a == b, a != b),
            (y + 100 * (-1) ** r, a == b, a != b), ((y + 200) % 400, False, False),
            ((y + 1) % 400, False, False)):
        found = tokens.judge(None, x, asked)
        assert (found[0] == right).all() and (found[1] == exchanged).all()


def test_a_fifth_of_the_pairs_is_unseen_in_any_order_and_relation():
    unseen = tokens.UNSEEN.reshape(4, 10, 10)
    assert (unseen == unseen[0]).all() and (unseen == unseen.swapaxes(1, 2)).all()
    assert (unseen.sum(2) == 2).all()


def test_no_unseen_pair_is_trained_on_and_they_are_counted_apart(monkeypatch, tmp_path, capsys):
    """Where all unseen pairs are right, all others are exchanged, and of the weight on both
    digits' words 3/4 is on a digit's own."""
    trained, one = [], np.ones((40, 14, 14, 1))

    def gaze(net, diffusion, x0, y):
        first = 0.5 + tokens.canvas(one, -one, y // 100) / 4
        return np.concatenate([first, 1 + 0 * first, 1 - first], 3)
    monkeypatch.setattr(tokens, "gaze", gaze)
    monkeypatch.setattr(tokens.score, "train_classifier", lambda *_: None)
    monkeypatch.setattr(tokens, "learn", lambda net, *to, **_: trained.append(to[2]) or net)
    monkeypatch.setattr(tokens, "judge", lambda _, x, y: (tokens.UNSEEN[y], ~tokens.UNSEEN[y]))
    tokens.main(tmp_path, True)
    lines = capsys.readouterr().out.splitlines()
    for line in lines[2:9]:
        assert line.split()[-4:] == ["0.0%", "100.0%", "100.0%", "0.0%"]
    assert "words 75.0% is on its own" in lines[10]
    assert len(trained) == 2 and not tokens.UNSEEN[np.concatenate(trained)].any()


@pytest.fixture
def attention():
    p = td.initial(tokens.cross_attention_layout(8, 6), 0, np.float64)
    p.flat = td.normal(0, p.flat.shape)
    return p, RNG.standard_normal((2, 3, 4, 8)), RNG.standard_normal((2, 5, 6))


def test_cross_attention_by_a_plain_loop(attention):
    p, x, words = attention
    y, looks = tokens.cross_attention(p, x, words, 2, looks := [])[0], looks
    q, kv = td.norm(p.norm, x)[0] @ p.q.w + p.q.b, words @ p.kv.w + p.kv.b
    for b, i, j in np.ndindex(2, 3, 4):
        taken = []
        for head in range(2):
            k, v = (kv[b, :, n + 4 * head:n + 4 * head + 4] for n in (0, 8))
            e = [math.exp(q[b, i, j, 4 * head:4 * head + 4] @ key / 2) for key in k]
            close(looks[0][b, head, 4 * i + j], np.array(e) / sum(e))
            taken += [sum(weight / sum(e) * value[c] for weight, value in zip(e, v))
                      for c in range(4)]
        close(y[b, i, j], x[b, i, j] + taken @ p.out.w + p.out.b)


def test_gradients_to_pixels_words_and_parameters(attention):
    errors = dict(td.gradient_errors(tokens.cross_attention, *attention[:1], attention[1:]))
    assert len(errors) == 10 and max(errors.values()) < 1e-6


@pytest.mark.parametrize("by_attention", [True, False])
def test_the_gradient_of_a_painter(by_attention):
    net = painter(by_attention)

    def layer(flat, x):
        given = net.with_params(flat)
        y, back = given.forward(x, **STEP)
        return y, lambda dy: (back(dy), given.grads.flat)[::-1]
    errors = dict(td.gradient_errors(layer, None, [net.params.flat,
                                                   RNG.standard_normal((2, 28, 28, 1))]))
    assert max(errors.values()) < 1e-6


@pytest.mark.parametrize("by_attention", [True, False])
def test_the_order_of_words_is_known_by_their_places(by_attention):
    net, x = painter(by_attention), td.normal(0, (1, 28, 28, 1))

    def difference():
        one, other = (net(x, np.array([500]), np.array([y])) for y in (72, 27))
        return abs(one - other).max()
    assert difference() > 0.01
    if by_attention:
        net.params.place = 0
        assert difference() < 1e-5


def test_where_words_look_is_the_mean_over_blocks_and_heads():
    net, diffusion = painter(True), td.Diffusion(td.cosine_betas(1000), "v")
    x0, y, looks = td.normal(1, (2, 28, 28, 1)), STEP["y"], []
    found = tokens.gaze(net, diffusion, x0, y)
    xt = diffusion.q_sample(x0, 500, td.normal(0, x0.shape))
    net.forward(xt, np.full(2, 500), y, looks=looks)
    assert len(looks) == 4
    for b, i, j in ((0, 0, 27), (1, 9, 14)):
        pixel = i // 4 * 7 + j // 4
        close(found[b, i, j], np.mean([a[b, :, pixel] for a in looks], (0, 1)), 1e-5)
    close(found.sum(3), 1, 1e-5)
