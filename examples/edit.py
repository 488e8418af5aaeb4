"""SDEdit (2108.01073): a scribble, or another digit, made into a digit.

Noise hides small things first. So noise the picture to a step t, at which what is wrong with
it is hidden and its gist is not, and denoise from there as if it were a digit's x_t:

    x_t = sqrt(abar_t) picture + sqrt(1 - abar_t) eps,    then t, ..., 0 by any sampler

(This is the paper's algorithm for VP-SDEs, in its appendix; its Algorithm 1, for VE-SDEs, adds
noise and leaves the picture's scale.) The strength t / T trades likeness for realism. Sampling
starts at t itself: code that goes on one step below leaves the noise of a step in the picture
(docs/ERRATA.md, row 22).
"""
from gallery import Score, asnumpy, demo, digits, files, run, shipped, td, xp
import numpy as np
from PIL import Image, ImageDraw

STRENGTHS = (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
TURNED = {1: 7, 3: 8, 4: 9, 5: 6, 7: 9, 9: 4}       # what digit a digit is to become
SCRIBBLES = {       # by hand: lines through these points of 28 x 28
    0: [(14, 5), (8, 14), (14, 23), (20, 14), (14, 5)],
    2: [(8, 8), (18, 6), (8, 22), (20, 22)],
    3: [(8, 5), (19, 8), (11, 13), (19, 18), (8, 23)],
    4: [(19, 23), (18, 5), (7, 16), (21, 16)],
    5: [(19, 5), (9, 5), (9, 13), (19, 17), (9, 23)],
    7: [(7, 6), (20, 6), (12, 23)]}


def scribble(points):
    """A picture (28, 28, 1) in [-1, 1] of one thick line."""
    picture = Image.new("L", (28, 28))
    ImageDraw.Draw(picture).line(points, fill=255, width=3)
    return np.asarray(picture, np.float32)[..., None] / 127.5 - 1


def sdedit(model, diffusion, picture, strength, rng, steps=20, clip=(-1, 1)):
    """The pictures (B, H, W, C) noised to t = strength T and denoised again: x_0."""
    rng, grid = np.random.default_rng(rng), td.timesteps(diffusion.T, steps)
    t = max(1, round(strength * diffusion.T))
    x = diffusion.q_sample(picture, t, td.normal(rng, picture.shape, picture.dtype))
    below = [t, *grid[grid < t]]
    return td.sample(td.ddim(model, diffusion, x, rng, steps=below, eta=0.6, clip=clip))


def main(out, short):
    n, rng, data = 20 if short else 300, np.random.default_rng(0), digits()
    (net, diffusion), score = shipped(), Score(data, out)

    def edited(pictures, wanted, strength):
        model = td.guided(demo.parallel(net), wanted, net.null, demo.DRAWING["guidance"])
        steps = 4 if short else 20
        return asnumpy(sdedit(model, diffusion, xp.asarray(pictures), strength, rng, steps))

    drawn = np.array([scribble(points) for points in SCRIBBLES.values()])
    some = np.isin(data.test_labels, [*TURNED]).nonzero()[0][:n]
    others, were = data.test_images[some], data.test_labels[some]
    sets = {"a scribble": (np.resize(drawn, (n, 28, 28, 1)), np.resize([*SCRIBBLES], n)),
            "another digit": (others, np.array([TURNED[k] for k in were]))}
    rows, names = [], []
    for name, (pictures, wanted) in sets.items():
        real = data.images[np.isin(data.labels, wanted)][:n]
        print(f"{name}, {n} times{'':12}read as wanted   Frechet distance   pixels changed by")
        sheet = [pictures, *(edited(pictures, wanted, strength) for strength in STRENGTHS)]
        for what, x in zip(["as it is", *(f"strength {s}" for s in STRENGTHS)], sheet):
            seen, distance = score(x, wanted)
            change = abs(x - pictures).mean() / 2
            print(f"{what:24}{seen:18.1%}{distance:19.2f}{change:19.1%}")
        print(f"{'training digits':42}{score(real, wanted)[1]:19.2f}\n")
        for k in dict.fromkeys(wanted):
            rows.append([x[np.argmax(wanted == k)] for x in sheet])
            names.append(f"{name}: a {k}")
    files.sheet(out / "edit.png", np.array(rows), ["given", *map(str, STRENGTHS)], names)


if __name__ == "__main__":
    run(main)
