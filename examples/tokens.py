"""Sentences (latent diffusion, 2112.10752 section 3.3): "seven left of two" conditions a
picture, by cross-attention.

A class is one vector for the whole picture. A sentence is several, and each matters elsewhere:
"seven" on the left, "two" on the right. So let every pixel ask for itself. The token of the
i-th word is tau_i = word + place i, both learned. A pixel's feature x makes a query, each token
a key and a value, and the pixel takes the values whose keys its query meets:

    q = W_q x,   k_i = W_k tau_i,   v_i = W_v tau_i
    a_i = exp(q . k_i / sqrt(d)) / sum_j exp(q . k_j / sqrt(d)),     x + W_o sum_i a_i v_i

The a_i, a number for every pixel and word, say where the word looks. The baseline has no
attention: it adds the sum of W_i tau_i, one vector for the picture, to the embedding of time.
(Without the W_i, a sum would not know which of two digits comes first.)

A tenth of the sentences is dropped in training, for guidance. A fifth of all pairs of digits
never stand together in training, in no relation; sentences of those are counted apart.
"""
from functools import partial

from gallery import asnumpy, demo, digits, files, learn, run, td, xp
import numpy as np
import score

WORDS = [*"zero one two three four five six seven eight nine".split(),
         "left of", "right of", "above", "below", "-"]
PLACES = np.array([(7, 0), (7, 14), (0, 7), (14, 7)])   # left, right, top, bottom: corners
# Sentence 100 r + 10 a + b is: digit a, relation r, digit b. The last is the dropped one.
SENTENCES = np.array([(a, 10 + r, b) for r in range(4) for a in range(10) for b in range(10)]
                     + [(14, 14, 14)])
UNSEEN = (SENTENCES[:400, 0] + SENTENCES[:400, 2]) % 5 == 0


def canvas(a, b, r):
    """Digits a and b (B, 14, 14, 1) in relation r (B,), on black: (B, 28, 28, 1)."""
    x = np.full((len(r), 28, 28, 1), -1, np.float32)
    for digits, places in (a, PLACES[r]), (b, PLACES[r ^ 1]):
        for one, digit, (i, j) in zip(x, digits, places):
            one[i:i + 14, j:j + 14] = digit
    return x


def parts(x, r):
    """Of pictures x (B, 28, 28, 1), where a and b stand: two of (B, 14, 14, 1)."""
    return [np.stack([one[i:i + 14, j:j + 14] for one, (i, j) in zip(x, places)])
            for places in (PLACES[r], PLACES[r ^ 1])]


def compose(y, digits, labels, rng):
    """Pictures of sentences y (B,), of digits taken at random from these."""
    a, b = (digits[[rng.choice(np.flatnonzero(labels == k)) for k in SENTENCES[y, i]]]
            for i in (0, 2))
    return canvas(a, b, y // 100)


def judge(reader, x, y):
    """Which pictures have both digits where the sentence wants them; which have each digit
    where the other should be."""
    a, b = (score.read(reader, part)[1] for part in parts(x, y // 100))
    (first, _, second), other = SENTENCES[y].T, SENTENCES[y, 0] != SENTENCES[y, 2]
    return (a == first) & (b == second), (a == second) & (b == first) & other


def cross_attention_layout(C, E):
    return {"norm": td.norm_layout(C), "q": td.product_layout(C, C),
            "kv": td.product_layout(E, 2 * C), "out": td.product_layout(C, C, gain=0)}


def cross_attention(p, x, tokens, heads=4, looks=None):
    """x (B, H, W, C) and what its pixels take from the tokens (B, L, E); back returns dx and
    dtokens. To a list `looks`, the weights a (B, heads, H W, L) are added."""
    B, H, W, C = x.shape
    h, norm_back = td.norm(p.norm, x)
    h, q_back = td.linear(p.q, h)
    kv, kv_back = td.linear(p.kv, tokens)
    q = h.reshape(B, H * W, heads, -1).swapaxes(1, 2)
    k, v = kv.reshape(B, -1, 2, heads, C // heads).transpose(2, 0, 3, 1, 4)
    c = (C // heads) ** -0.5
    logits = c * (q @ k.swapaxes(2, 3))
    a = xp.exp(logits - logits.max(3, keepdims=True))
    a /= a.sum(3, keepdims=True)
    if looks is not None:
        looks.append(a)
    h, out_back = td.linear(p.out, (a @ v).swapaxes(1, 2).reshape(x.shape))

    def back(dy):
        dh = out_back(dy).reshape(B, H * W, heads, -1).swapaxes(1, 2)
        da, dv = dh @ v.swapaxes(2, 3), a.swapaxes(2, 3) @ dh   # every pixel took of each v
        dlogits = a * (da - (da * a).sum(3, keepdims=True))     # softmax, as in td.attention
        dq, dk = c * (dlogits @ k), c * (dlogits.swapaxes(2, 3) @ q)
        dkv = xp.stack([dk, dv]).transpose(1, 3, 0, 2, 4).reshape(kv.shape)
        dx = dy + norm_back(q_back(dq.swapaxes(1, 2).reshape(x.shape)))
        return dx, kv_back(dkv)
    return x + h, back


class Painter(td.UNet):
    """The core's network for sentences y (B,) instead of classes: with cross-attention after
    every block of its lower level, 7 x 7 pixels, or with the sum."""

    def __init__(self, attention, channels=(32, 64)):
        super().__init__((28, 28, 1), channels, 0, (1, 2), space_to_depth=True)
        self.classes = self.null = len(SENTENCES) - 1
        layout, E = self.params.layout, len(self.params.time2.w)
        inner = layout["top"]["inner"]
        for block in inner["down"] + inner["up"] if attention else ():
            block["cross"] = cross_attention_layout(channels[1], E)
        self.params = td.initial(layout | {
            "word": ((len(WORDS), E), 1), "place": ((3, E), 1),
            **({} if attention else {"sum": td.product_layout(3 * E, E)})}, rng=0)
        self.grads = self.params.grad

    def forward(self, x, t, y, rng=None, looks=None):
        p = self.params
        onehot = xp.asarray(SENTENCES[y][..., None] == np.arange(len(WORDS)), p.flat.dtype)
        tokens = onehot @ p.word + p.place              # (B, 3, E)
        emb, time_back = td.embed(p, t, y)
        if summed := hasattr(p, "sum"):
            h, sum_back = td.linear(p.sum, tokens.reshape(len(x), -1))
            emb, silu_back = td.silu(emb + h)
        demb, dtokens = xp.zeros_like(emb), xp.zeros_like(tokens)

        def block(q, x):
            x, res_back = td.res_block(q, x, emb, demb, lambda x: (x, lambda dy: dy), 1)
            if not hasattr(q, "cross"):
                return x, res_back
            x, cross_back = cross_attention(q.cross, x, tokens, looks=looks)

            def back(dy):
                dx, d = cross_back(dy)
                dtokens[:] += d                         # the tokens went to every such block
                return res_back(dx)
            return x, back

        h, unet_back = td.sequential(self._enter(x), [
            partial(td.conv3x3, p.stem), partial(td.level, p.top, block=block),
            partial(td.norm, p.norm), td.silu, partial(td.conv3x3, p.out)])

        def back(dy):
            dx = unet_back(self._enter(dy))
            dh = silu_back(demb) if summed else demb
            if summed:
                dtokens[:] = sum_back(dh).reshape(tokens.shape)
            time_back(dh)
            p.grad.word += xp.tensordot(onehot, dtokens, ((0, 1), (0, 1)))
            p.grad.place += dtokens.sum(0)
            return self._leave(dx)
        return self._leave(h), back


def gaze(net, diffusion, x0, y, t=500):
    """How much every pixel takes of each word at step t, the mean over blocks and heads:
    (B, 28, 28, 3), at each pixel of sum 1."""
    looks, eps = [], td.normal(0, x0.shape)
    net.forward(diffusion.q_sample(x0, t, eps), np.full(len(y), t), y, looks=looks)
    return td.upsample(td.upsample((sum(looks) / len(looks)).mean(1).reshape(-1, 7, 7, 3)))


def main(out, short):
    N, steps, n, calls = (500, 8, 20, 2) if short else (20000, 800, 320, 20)
    data, rng, diffusion = digits(), np.random.default_rng(0), demo.process()
    small, test = td.average_pool(data.images), td.average_pool(data.test_images)
    reader = score.train_classifier(score.pad_to_fours(small), data.labels, 1 if short else 5)
    y = rng.choice(np.flatnonzero(~UNSEEN), N)
    images = compose(y, small, data.labels, rng)
    nets = {name: learn(Painter(name == "attention"), diffusion, images, y, steps=steps,
                        said=name) for name in ("sum", "attention")}

    y = np.concatenate([np.resize(rng.permutation(np.flatnonzero(which)), n)
                        for which in (~UNSEEN, UNSEEN)])
    drawn = {("real", ""): compose(y, test, data.test_labels, rng)}
    for name, net in nets.items():
        for w in (1, 2, 4):
            model = td.guided(demo.parallel(net), y, net.null, w)
            x = td.normal(1, (2 * n, *net.image))
            x = td.sample(td.ddim(model, diffusion, x, rng, calls, eta=0.6))
            drawn[name, w] = asnumpy(x)
    print(f"{n} pictures each of pairs of digits         seen together"
          f"         never seen together\n{'':24}w" + 2 * f"{'right':>14}{'exchanged':>12}")
    for (name, w), x in drawn.items():
        right, exchanged = (np.split(found, 2) for found in judge(reader, x, y))
        print(f"{name:20}{w:5}" + "".join(f"{a.mean():14.1%}{b.mean():12.1%}"
                                         for a, b in zip(right, exchanged)))
    print(f"(a share of 50 % of {n} has a standard error of {(0.25 / n) ** 0.5:.1%})")
    x, r = drawn["attention", 2], y // 100
    looks = asnumpy(gaze(nets["attention"], diffusion, xp.asarray(x), y))
    first, second = parts(looks[..., :1] / (looks[..., :1] + looks[..., 2:]), r)
    print(f"where a digit stands, of the weight on both digits' words "
          f"{(first.mean() + 1 - second.mean()) / 2:.1%} is on its own ({len(y)} pictures)")
    some = [np.argmax((UNSEEN[y] == unseen) & (r == k)) for unseen in (0, 1) for k in range(4)]
    colours = np.array([(1, 0.5, 0.1), (0.4, 0.9, 0.4), (0.2, 0.6, 1)])     # of the words
    rows = [drawn["sum", 2][some].repeat(3, 3), x[some].repeat(3, 3),
            *(np.maximum(x[some], 2 * looks[some, ..., i, None] / looks.max() * colour - 1)
              for i, colour in enumerate(colours))]
    files.sheet(out / "tokens.png", np.stack(rows),
                ["\n".join(WORDS[i] for i in SENTENCES[k]) for k in y[some]],
                ["sum", "attention", "first word", "relation", "second word"])


if __name__ == "__main__":
    run(main)
