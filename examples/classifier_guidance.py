"""Classifier guidance (ADM, 2105.05233): a network without classes, led to the one asked for.

By Bayes' rule, the score of the pictures of class y is that of all pictures and one term more:

    grad log q(x_t | y) = grad log q(x_t) + grad log q(y | x_t)

The first is what a network without labels says, -eps / sqrt(1 - abar_t). The second comes from
a classifier that has learned to read noisy pictures: its `back` returns the gradient by the
picture, which training throws away. Both together are again an eps, which any sampler takes:

    eps - w sqrt(1 - abar_t) grad log p(y | x_t)            (section 4.2, eq. 14)

With w = 1 it is Bayes' rule; a larger w draws surer pictures, more alike (section 4.3).
Classifier-free guidance (CFG, 2207.12598) needs no classifier, but a network that knows labels.
"""
from functools import partial

from gallery import Score, asnumpy, demo, digits, files, learn, run, shipped, td, xp
import numpy as np


class Classifier:
    """Logits of the classes of x_t: a U-Net's way down, but for the skips. It has the names of
    td.UNet that td.train uses."""

    def __init__(self, image=(28, 28, 1), classes=10, channels=(16, 32, 64)):
        H, W, C = self.image = self.input = image
        self.classes = self.null = classes
        first, last, E = channels[0], channels[-1], 4 * channels[0]
        self.params = td.initial({
            "time1": td.product_layout(first, E), "time2": td.product_layout(E, E),
            "stem": td.product_layout(3, 3, C, first),
            "top": [td.res_block_layout(c, d, E, attended=False)
                    for c, d in zip(channels, channels[1:])],
            "norm": td.norm_layout(last),
            "out": td.product_layout(H * W // 4 ** (len(channels) - 1) * last, classes),
        }, rng=0)
        self.grads = self.params.grad

    with_params = td.UNet.with_params

    def forward(self, x, t, rng=None):
        p = self.params
        emb, embed_back = td.embed(p, t, None)
        demb = xp.zeros_like(emb)
        block = partial(td.res_block, emb=emb, demb=demb, heads=1,
                        drop=partial(td.dropout, rate=0.2, rng=rng))
        layers = [layer for q in p.top for layer in (pool, partial(block, q))]
        logits, layers_back = td.sequential(x, [
            partial(td.conv3x3, p.stem), *layers, partial(td.norm, p.norm), td.silu, flatten,
            partial(td.linear, p.out)])

        def back(dlogits):
            demb[:] = 0
            dx = layers_back(dlogits)
            embed_back(demb)
            return dx
        return logits, back


def pool(x):
    return td.average_pool(x), lambda dy: td.upsample(dy) / 4


def flatten(x):
    return x.reshape(len(x), -1), lambda dy: dy.reshape(x.shape)


def log_probability(logits, y):
    """log p(y) of each row (B,), and its gradient, onehot(y) - p, by the logits."""
    logits = logits - logits.max(1, keepdims=True)
    log_p = logits - xp.log(xp.exp(logits).sum(1, keepdims=True))
    onehot = (y[:, None] == xp.arange(log_p.shape[1])).astype(log_p.dtype)
    return (onehot * log_p).sum(1), onehot - xp.exp(log_p)


def add_gradient(classifier, diffusion, x0, t, y, eps, total, loss, weighting, rng, clip):
    """Cross-entropy at x_t, for td.train; total counts pixels, and we have one answer each."""
    logits, back = classifier.forward(diffusion.q_sample(x0, t, eps), xp.asarray(t), rng)
    log_p, slope = log_probability(logits, xp.asarray(y))
    share = np.prod(x0.shape[1:]) / total
    back(-share * slope)
    return float(-share * log_p.sum())


def guided(model, diffusion, classifier, w):
    """A model(x, t, y), whatever it predicts and whether or not it cares about y, led to y."""
    of_eps = td.Diffusion(diffusion.beta[1:], "eps")

    def guided_model(x, t, y):
        out, (logits, back) = model(x, t, y), classifier.forward(x, t)
        gradient, t = back(log_probability(logits, y)[1]), asnumpy(t)
        noise = td.per_image((1 - diffusion.abar[t]) ** 0.5, x)
        x0 = diffusion.to_x0(x, t, out)
        eps = diffusion.to_eps(x, t, x0) - w * noise * gradient
        return diffusion.target(of_eps.to_x0(x, t, eps), eps, t)
    return guided_model


def spread(x, y):
    """Root mean square difference of a pixel from the mean of its class, averaged."""
    return np.mean([x[y == k].var(0).mean() for k in range(10)]) ** 0.5


def main(out, short):
    data, (net, diffusion) = digits(), shipped()
    classifier = learn(Classifier(), diffusion, data.images, data.labels, label_drop=0,
                       gradient=add_gradient, steps=20 if short else 1200)
    logits = demo.parallel(lambda x, t: classifier.forward(x, t)[0])

    def right(x, t, y):
        """The share of pictures x_t that our classifier reads right."""
        answer = asnumpy(logits(xp.asarray(x), xp.full(len(x), t)))
        return np.mean(answer.argmax(1) == y)
    noise = td.normal(0, data.test_images.shape)
    for t in (1, 300, 600, 900):
        xt = diffusion.q_sample(xp.asarray(data.test_images), t, noise)
        print(f"of the test digits at t = {t} it reads {right(xt, t, data.test_labels):.1%}")

    def unlabelled(x, t, y):
        return net(x, t)
    models = {}
    for w in (0, 1, 4, 10):
        models[f"classifier, w = {w}"] = guided(unlabelled, diffusion, classifier, w)
    for w in (0.8, 1, 1.6):
        models[f"CFG, w = {w}"] = lambda x, t, y, w=w: td.guided(net, y, net.null, w)(x, t)
    models["labels and classifier, w = 2"] = guided(net, diffusion, classifier, 2)
    y, score = np.arange(10 if short else 500) % 10, Score(data, out)
    noise, labels = td.normal(1, (len(y), *net.image)), xp.asarray(y)
    page, table, real = [], [], spread(data.test_images, data.test_labels)
    print(f"{len(y):,} digits, asked for by      read right   by the guide   distance   spread")
    for name, model in models.items():
        in_parts = demo.parallel(model)
        x = asnumpy(td.sample(td.ddim(lambda x, t: in_parts(x, t, labels), diffusion, noise, 0,
                                      steps=4 if short else 20, eta=0.6)))
        (accuracy, distance), wide = score(x, y), spread(x, y) / real
        error = (accuracy * (1 - accuracy) / len(y)) ** 0.5
        print(f"{name:28}{accuracy:7.1%} +- {error:.1%}{right(x, 1, y):11.1%}{distance:12.1f}"
              f"{wide:9.0%}")
        page.append(x[:10])
        table.append((accuracy, distance, wide))
    # CFG as accurate as the strongest classifier is between two rows; w = 0 belongs to both.
    accuracy, CFG = table[3][0], np.array([table[0], *table[4:7]]).T
    distance, wide = (np.interp(accuracy, CFG[0], row) for row in CFG[1:])
    print(f"{'CFG, of equal accuracy':28}{accuracy:7.1%}{distance:30.1f}{wide:9.0%}")
    files.sheet(out / "classifier_guidance.png", np.stack(page), data.names, [*models])


if __name__ == "__main__":
    run(main)
