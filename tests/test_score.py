"""benchmarks/score.py: the classifier has the right gradients, and learns; the Frechet distance
is its formula; and the table says what was measured."""
import re

import numpy as np
import pytest

import demo
import pictures
import score
import tinyddpm as td
from common import close
from test_demo import pixels, small_set

pytestmark = pytest.mark.skipif(td.xp is not np, reason="these run with TINYDDPM_BACKEND=numpy")


@pytest.fixture
def made(monkeypatch):
    """Instead of a training, parameters at random: the list of those that were asked for."""
    made = []

    def quick(images, labels):
        layout = score.classifier_layout(images.shape[1:], int(labels.max()) + 1)
        made.append(td.initial(layout, 9))
        return made[-1]
    monkeypatch.setattr(score, "train_classifier", quick)
    return made


def test_the_gradient_of_the_classifier():
    """Of every parameter, and of the picture, against finite differences in float64."""
    rng = np.random.default_rng(5)
    p = td.initial(score.classifier_layout((8, 4, 2), 5), rng)
    errors = dict(td.gradient_errors(lambda p, x: score.classify(p, x)[1:], p,
                                     [rng.standard_normal((3, 8, 4, 2))]))
    assert len(errors) == 1 + 3 * 4 + 4 and max(errors.values()) < 1e-6


def test_the_classifier_learns():
    """Three kinds of picture: dark, bright, and bright in the upper half; of 6 x 7 pixels, and
    padded to 8 x 8 with black."""
    labels = np.arange(60) % 3
    images = np.random.default_rng(6).normal(0, 0.1, (60, 6, 7, 1)).astype(np.float32)
    images += np.array([-1, 1, -1])[labels][:, None, None, None]
    images[labels == 2, :3] += 2
    padded = score.pad_to_fours(images)
    assert padded.shape == (60, 8, 8, 1) and np.array_equal(padded[:, :6, :7], images)
    assert np.all(padded[:, 6:] == -1) and np.all(padded[:, :, 7:] == -1)
    features, seen = score.read(score.train_classifier(padded, labels, 10, batch=10), images)
    assert features.shape == (60, 64) and np.array_equal(seen, labels)
    close(np.linalg.norm(features, axis=1), 30)


@pytest.mark.slow
def test_the_shipped_weights_draw_digits_that_a_classifier_reads():
    """The classifier knows 98 of 100 test digits it has not seen. Of the drawn ones it reads
    95 in 100 as meant, and more; of a network that is wired wrongly, few."""
    digits = pictures.load()
    p = score.train_classifier(digits.images, digits.labels)
    assert np.mean(score.read(p, digits.test_images)[1] == digits.test_labels) >= 0.98
    net, diffusion, _, _ = td.load(demo.WEIGHTS)
    labels = np.arange(100) % 10
    assert np.mean(score.read(p, demo.draw(net, diffusion, labels, 0))[1] == labels) >= 0.95


def test_the_classifier_is_kept_for_its_pictures(tmp_path, made):
    """Trained once for the same, and anew for others, or where the file is damaged."""
    small, other = (pictures.load(small_set(tmp_path / "a.npz", seed)) for seed in (0, 1))
    p = score.load_classifier(small, tmp_path)
    again = score.load_classifier(small, tmp_path)
    assert len(made) == 1 and np.array_equal(p.flat, again.flat)
    good = (tmp_path / "classifier.npz").read_bytes()
    score.load_classifier(other, tmp_path)
    assert len(made) == 2
    for length in (0, 100, len(good) // 2, len(good) - 1):
        (tmp_path / "classifier.npz").write_bytes(good[:length])
        assert np.array_equal(score.load_classifier(small, tmp_path).flat, p.flat)
    assert len(made) == 6


def gaussian(mean, deviations, seed, count=200):
    """Features whose mean and covariance are exactly these: noise, made white, stretched."""
    noise = np.random.default_rng(seed).standard_normal((count, len(mean)))
    noise -= noise.mean(0)
    white = noise @ np.linalg.inv(np.linalg.cholesky(np.cov(noise.T))).T
    return white * deviations + mean


def test_frechet_of_gaussians():
    """With diagonal covariances it is |m - m'|^2 + |s - s'|^2, for deviations s, of which some
    are 0; and a common rotation, which makes the covariances full, changes nothing."""
    rng = np.random.default_rng(7)
    (m, n), (s, r) = rng.normal(size=(2, 6)), rng.uniform(0.1, 2, (2, 6))
    s[0] = r[1] = 0
    a, b = gaussian(m, s, seed=1), gaussian(n, r, seed=2, count=300)
    turn = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    expected = ((m - n) ** 2).sum() + ((s - r) ** 2).sum()
    for a, b in ((a, b), (b, a), (a @ turn, b @ turn)):
        assert score.frechet(a, b) == pytest.approx(expected, rel=1e-6)
        assert score.frechet(a, a[::-1]) == pytest.approx(0, abs=1e-5)


def test_score(tmp_path, made, capsys):
    """The table's lines are the accuracy and the distance of what was drawn, or was saved."""
    path = small_set(tmp_path / "set.npz")
    digits, net = pictures.load(path), td.UNet((8, 8, 1), (8,), classes=3)
    td.save(tmp_path / "model.npz", net, td.Diffusion(td.cosine_betas(10), "v"),
            data=digits.crc(), names=digits.names)
    x, y = np.clip(td.normal(3, (102, 8, 8, 1)), -1, 1), np.arange(102) % 3
    np.savez(tmp_path / "mine.npz", x=x, y=y)
    options = ["--out", str(tmp_path), "--data", str(path)]
    score.main(["--count", "100", "--guidance", "0", "3", "--steps", "2", *options])
    score.main(["--samples", str(tmp_path / "mine.npz"), *options])
    said = capsys.readouterr().out
    assert len(made) == 1 and re.search(r"^samples, w = 0 .*\nsamples, w = 3 ", said, re.M)
    reference = score.read(made[0], digits.images)[0]
    for name, images, labels in (("real test pictures", digits.test_images, digits.test_labels),
                                 ("mine.npz", x, y)):
        features, seen = score.read(made[0], images)
        line = re.search(rf"^{name} +(\d+) +([\d.]+)% +([\d.]+)$", said, re.M)
        number, accuracy, distance = map(float, line.groups())
        assert number == len(images)
        assert accuracy == pytest.approx(100 * np.mean(seen == labels), abs=0.051)
        assert distance == pytest.approx(score.frechet(reference, features), abs=6e-4)
    assert pixels(tmp_path / "score.png").std() > 1


@pytest.mark.parametrize("change, told", [
    ({"x": None}, "samples.npz"), ({"x": np.zeros((100, 2, 2, 1))}, "2, 2"),
    ({"x": np.zeros((99, 8, 8, 1)), "y": np.zeros(99)}, "99"),
    ({"x": np.full((100, 8, 8, 1), 2.0)}, "2.0"), ({"names": np.array(["a", "b"])}, "a c x"),
    ({"y_train": None, "y_test": None}, "classes"), ({"x_test": None, "y_test": None}, "test")])
def test_what_cannot_be_scored(change, told, tmp_path, made):
    """Samples of another kind, or pictures without classes or tests. Nothing is trained."""
    path = small_set(tmp_path / "set.npz", **{k: a for k, a in change.items() if "_" in k})
    samples = {"x": np.zeros((100, 8, 8, 1)), "y": np.zeros(100)} | change
    np.savez(tmp_path / "samples.npz", **{k: a for k, a in samples.items() if a is not None})
    with pytest.raises(SystemExit, match=f"score.py: .*{told}"):
        score.main(["--samples", str(tmp_path / "samples.npz"), "--data", str(path),
                    "--out", str(tmp_path)])
    assert not made
