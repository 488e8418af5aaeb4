"""Samples scored by a classifier: how many are of the class that was asked for, and how far all
together are from the training pictures, by Frechet distance; and the same of the test pictures.

    python benchmarks/score.py                          samples of OUT/model.npz, drawn for this
    python benchmarks/score.py --samples FILE FILE      .npz files of `demo.py sample --save`

The classifier is trained on the pictures of --data, with tinyddpm's own layers, and kept in
OUT/classifier.npz. Distances fall with the number of samples: compare those of equal numbers.
"""
import argparse
import math
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import cores                                                                    # noqa: E402
import demo                                                                     # noqa: E402
import files                                                                    # noqa: E402
import numpy as np                                                              # noqa: E402
import pictures                                                                 # noqa: E402
import tinyddpm as td                                                           # noqa: E402
from tinyddpm import asnumpy, xp                                                # noqa: E402
from tqdm import tqdm                                                           # noqa: E402


def classifier_layout(image, classes):
    H, W, C = image
    return {"stages": [{"conv": td.product_layout(3, 3, c, d), "norm": td.norm_layout(d)}
                       for c, d in ((C, 16), (16, 32), (32, 64))],
            "features": td.product_layout(H // 4 * (W // 4) * 64, 64),
            "out": td.product_layout(64, classes)}


def classify(p, x, rng=None):
    """Images (B, H, W, C) -> 64 features each, logits, and back. Three convolutions, the
    picture halved between them, then two linear layers; an rng turns dropout on."""
    pool = [lambda x: (td.average_pool(x), lambda dy: td.upsample(dy) / 4)]
    h, stages_back = td.sequential(x, [
        layer for i, stage in enumerate(p.stages)
        for layer in (pool if i else []) + [partial(td.conv3x3, stage.conv),
                                            partial(td.norm, stage.norm), td.silu]])
    features, features_back = td.sequential(
        h.reshape(len(x), -1), [partial(td.linear, p.features), td.silu])
    logits, out_back = td.sequential(
        features, [partial(td.dropout, rate=0.5, rng=rng), partial(td.linear, p.out)])

    def back(dlogits):
        return stages_back(features_back(out_back(dlogits)).reshape(h.shape))
    return features, logits, back


def train_classifier(images, labels, epochs=5, batch=50, highest=2e-3):
    """The classifier's Params after `epochs` of cross-entropy."""
    rng = np.random.default_rng(0)
    p = td.initial(classifier_layout(images.shape[1:], int(labels.max()) + 1), rng)
    adam, step, steps = td.AdamW(p), 0, epochs * (len(images) // batch)
    for _ in tqdm(range(epochs), "training the classifier", unit=" epochs", disable=None):
        for rows in rng.permutation(len(images))[:steps // epochs * batch].reshape(-1, batch):
            # Shifted by up to 2 pixels at random, the whole batch: 10,000 are few.
            shifted = np.roll(images[rows], rng.integers(-2, 3, 2), (1, 2))
            p.grad.flat = 0
            _, logits, back = classify(p, xp.asarray(shifted), rng)
            e = xp.exp(logits - logits.max(1, keepdims=True))
            onehot = xp.eye(logits.shape[1], dtype=e.dtype)[xp.asarray(labels[rows])]
            # The gradient of the mean cross-entropy of p = softmax(logits). A tenth of each
            # label goes to all classes, lest features grow with certainty alone.
            wanted = 0.9 * onehot + 0.1 / logits.shape[1]
            back((e / e.sum(1, keepdims=True) - wanted) / batch)
            lr = highest * min(1, (step + 1) / 50) * (1 + math.cos(math.pi * step / steps)) / 2
            adam.step(p.flat, p.grad.flat, lr, weight_decay=0.01)
            step += 1
    return p


def load_classifier(data, out):
    """The classifier of these Pictures: from OUT/classifier.npz, or trained and kept there."""
    images = pad_to_fours(data.images)
    path, key = out / "classifier.npz", f"2 {data.crc()}"
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            if str(file["key"]) == key:
                layout = classifier_layout(images.shape[1:], len(data.names))
                return td.Params(layout, xp.asarray(file["params"]))
    except Exception:       # not there, or damaged, which fails in many ways
        pass
    p = train_classifier(images, data.labels)
    with files.written(path) as file:
        np.savez(file, params=asnumpy(p.flat), key=key)
    return p


def pad_to_fours(images):
    """Padded with black to sides that halve twice."""
    N, H, W, C = images.shape
    return np.pad(images, ((0, 0), (0, -H % 4), (0, -W % 4), (0, 0)), constant_values=-1)


def read(p, images):
    """What the classifier sees: features (N, 64), all of length 30 so that how sure it is does
    not count, and labels (N,); on the host."""
    images = pad_to_fours(images)
    parts = np.array_split(images, -(-len(images) // 100))
    outs = [classify(p, xp.asarray(part))[:2] for part in parts]
    features, logits = (np.concatenate([asnumpy(a) for a in column]) for column in zip(*outs))
    features = features.astype(np.float64)
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return 30 * features / np.maximum(length, 1e-12), logits.argmax(1)


def frechet(a, b):
    """Frechet distance of the Gaussians fitted to two sets of features (N, 64):
    |mean - mean'|^2 + tr(C + C' - 2 (C^1/2 C' C^1/2)^1/2)."""
    A, B = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(A)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ B @ root), 0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A) + np.trace(B) - 2 * cross)


class Score:
    """Accuracy and Frechet distance of samples of these Pictures, by their classifier."""

    def __init__(self, data, out):
        self.p = load_classifier(data, out)
        self.reference = read(self.p, data.images)[0]

    def __call__(self, images, labels):
        features, seen = read(self.p, images)
        return np.mean(seen == labels), frechet(self.reference, features)


def load_samples(path, data):
    """Images x (N, H, W, C) and labels y (N,) that `sample --save` or another program wrote."""
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            x, y, names = file["x"], file["y"], file.get("names", np.array(data.names)).tolist()
    except FileNotFoundError:
        raise
    except Exception as error:      # a damaged archive fails in many ways
        raise ValueError(f"{path} is not an .npz of x and y ({str(error)[:100]})") from error
    image = data.images.shape[1:]
    if x.shape[1:] != image or y.shape != x.shape[:1] or len(x) < 100 or x.dtype.kind != "f":
        raise ValueError(f"{path} has x {x.dtype} {x.shape} and y {y.shape}; they have to be "
                         f"floats (N, *{image}) and labels (N,), with N at least 100")
    if not abs(x).max() < 1.001:
        raise ValueError(f"x of {path} reaches {abs(x).max()}; it has to be within -1 and 1")
    if names != data.names:
        raise ValueError(f"{path} is of classes {' '.join(names)}, not {' '.join(data.names)}")
    return x, y


def main(words):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, default=pictures.DIGITS, help="pictures (default: bundled digits)")
    add("--size", type=int, help="of the pictures of a folder")
    add("--out", type=Path, default=demo.OUT, help="of the classifier, score.png, model.npz")
    add("--samples", type=Path, nargs="+", help="score these, instead of drawing some")
    add("--model", type=Path, help="weights to draw with (default: OUT/model.npz)")
    add("--count", type=demo.number(int, 100), default=1000, help="samples of each weight")
    add("--guidance", type=float, nargs="+", default=[1.0, demo.DRAWING["guidance"]])
    add("--sampler", choices=demo.SAMPLERS)
    add("--steps", type=int, help="of the sampler")
    add("--eta", type=float)
    add("--seed", type=int, default=0)
    args = parser.parse_args(words)
    cores.keep_memory()
    with demo.one_sentence("score.py"):
        score(args)


def score(args):
    data = files.read(args.data, args.size)
    if data.labels is None or data.test_images is None:
        missing = "classes" if data.labels is None else "test pictures"
        raise ValueError(f"{args.data} has no {missing}; a score needs pictures in classes, "
                         "and some of them for tests")
    if args.samples:
        drawn = [(path.name, *load_samples(path, data)) for path in args.samples]
    else:
        net, diffusion, notes = demo.trained(args)
        demo.fits("the network", net, notes, data, "--data and --model choose others")
        labels = np.arange(args.count) % net.classes
        drawn = [(f"samples, w = {w:g}", demo.draw(
            net, diffusion, labels, args.seed, sampler=args.sampler, steps=args.steps,
            eta=args.eta, guidance=w), labels) for w in args.guidance]
    measure = Score(data, args.out)
    print(f"{'':24}{'number':>8}{'accuracy':>11}   Frechet distance to {len(data.images):,} "
          "training pictures")
    names, rows = [], []
    for name, x, y in [("real test pictures", data.test_images, data.test_labels), *drawn]:
        accuracy, distance = measure(x, y)
        print(f"{name:24}{len(x):8,}{accuracy:11.1%}{distance:11.3f}")
        names.append(f"{name}: {accuracy:.1%}, {distance:.2f}")
        rows.append(np.stack([x[np.argmax(y == k)] for k in range(len(data.names))]))
    files.sheet(args.out / "score.png", np.stack(rows), data.names, names)


if __name__ == "__main__":
    main(sys.argv[1:])
