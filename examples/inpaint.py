"""Inpainting (RePaint, 2201.09865): the missing part of a picture drawn by a network that was
never told about missing parts.

Go from noise to picture as always, and after every step from t to s put in what is known,
noised as q(x_s | x0) wants it at s, the step gone to:

    x_s  =  known:    sqrt(abar_s) x0 + sqrt(1 - abar_s) eps
            unknown:  a step of DDPM from x_t

At s = 0 the known pixels are exact. But their noise at s is drawn without a look at the
unknown pixels: the two go together only roughly. So resample (section 4.2, Algorithm 1): add
the noise of the step from s to t again and repeat the step, so that both parts meet in the
network once more,

    x_t  =  sqrt(abar_t/abar_s) x_s + sqrt(1 - abar_t/abar_s) eps

The network is not told the class either; it has to see it in what is left.
"""
from itertools import pairwise

from gallery import Score, asnumpy, demo, digits, files, run, shipped, td, xp
import numpy as np

STEPS, TIMES = 20, (1, 5, 10)


def fill(model, diffusion, x0, known, rng, steps, times, clip=(-1, 1)):
    """x0 where known is true, and what the model draws elsewhere; each of the steps is made
    `times` times. x0 (B, H, W, C), known of the same shape or one that broadcasts."""
    rng = np.random.default_rng(rng)            # one for all: a seed would begin anew each time
    x = td.normal(rng, x0.shape, x0.dtype)
    for t, s in pairwise([*td.timesteps(diffusion.T, steps), 0]):
        step = [t, s] if s else [t]         # from the last of its steps a sampler goes to 0
        for left in reversed(range(times)):
            _, x = next(td.ddpm(model, diffusion, x, rng, steps=step, clip=clip))
            eps = td.normal(rng, x0.shape, x0.dtype)
            x = xp.where(known, diffusion.q_sample(x0, s, eps) if s else x0, x)
            if left:
                alpha = float(diffusion.abar[t] / diffusion.abar[s])
                eps = td.normal(rng, x0.shape, x0.dtype)
                x = alpha ** 0.5 * x + (1 - alpha) ** 0.5 * eps
    return x


def masks(n, rng):
    """What is known, of n digits each time: (n, 28, 28, 1), or (1, 28, 28, 1) for all."""
    hole, half = np.ones((2, 1, 28, 28, 1), bool)
    hole[:, 8:20, 8:20] = False
    half[:, 14:] = False
    return {"a hole of 12 x 12": hole, "the lower half": half,
            "7 of 8 pixels": rng.random((n, 28, 28, 1)) < 1 / 8}


def main(out, short):
    n, rng, data = 20 if short else 200, np.random.default_rng(0), digits()
    net, diffusion = shipped()
    model, score = demo.parallel(net), Score(data, out)
    x0, labels, mean = data.test_images[:n], data.test_labels[:n], data.images.mean(0)
    print(f"{n} test digits: {score(x0, labels)[0]:.1%} are read as what they are.\n"
          f"{'missing':20}{'mean digit':>12}" + "".join(f"{f'{k} times':>12}" for k in TIMES)
          + "   known pixels off by")
    columns = []
    for name, known in masks(n, rng).items():
        filled = [np.where(known, x0, mean)]
        for times in TIMES:
            filled.append(asnumpy(fill(model, diffusion, xp.asarray(x0), xp.asarray(known), rng,
                                       2 if short else STEPS, times)))
        off = max(abs(x - x0)[np.broadcast_to(known, x0.shape)].max() for x in filled)
        print(f"{name:20}" + "".join(f"{score(x, labels)[0]:12.1%}" for x in filled)
              + f"{off:12.1f}")
        columns.append(np.stack([np.where(known, x0, 0), *filled, x0])[:, :4])
    error = (0.25 / n) ** 0.5
    print(f"(a share of 50 % of {n} digits has a standard error of {error:.1%})")
    files.sheet(out / "inpaint.png", np.concatenate(columns, 1), names=[
        "given", "mean digit", *(f"each step {k} x" for k in TIMES), "true"])


if __name__ == "__main__":
    run(main)
