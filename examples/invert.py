"""DDIM inversion (2010.02502 section 5): from a picture to the noise that it comes from, and
back.

With eta = 0 sampling draws nothing: it follows an ordinary differential equation from x_T to
x_0 by Euler's method, and an equation can be followed the other way, too:

    x_t = sqrt(abar_t) x0(x_s, s) + sqrt(1 - abar_t) eps(x_s, s),      s < t

Sampling from the x_T that this ends at gives the picture again, but for the error of Euler's
method and for what the first step's noise hides, which fall as steps become shorter; with
guidance the equation is steeper, and the error larger. The way up begins at the first step,
with its noise in the picture: black that is exactly black tells nothing of eps, and would go
up as black, not as noise.

Two such x_T can be mixed into a third. Their sum, halved, is shorter than noise ever is: in
many dimensions |x_T| is always about its mean, sqrt(dimensions). So go from one to the other
along the sphere (Shoemake's slerp), with theta the angle between a and b:

    slerp(a, b, u) = (sin((1 - u) theta) a + sin(u theta) b) / sin(theta)
"""
from itertools import pairwise

from gallery import Score, asnumpy, demo, digits, files, run, shipped, td, xp
import numpy as np

WEIGHTS = (1, 1.6, 3)


def invert(model, diffusion, x0, steps, rng, clip=(-1, 1)):
    """The x_T from which td.ddim, with eta 0 and as many steps, comes back to x0."""
    up = td.timesteps(diffusion.T, steps)[::-1]
    x = diffusion.q_sample(x0, up[0], td.normal(rng, x0.shape, x0.dtype))
    for s, t in pairwise(up):
        guess = diffusion.to_x0(x, s, model(x, xp.full(len(x), s)), clip)
        abar = float(diffusion.abar[t])
        x = abar ** 0.5 * guess + (1 - abar) ** 0.5 * diffusion.to_eps(x, s, guess)
    return x


def lerp(a, b, u):
    return (1 - u) * a + u * b


def slerp(a, b, u):
    """From a to b, u of the way along the sphere; of every pair in a batch (B, H, W, C)."""
    axes = (1, 2, 3)
    a_size, b_size = (xp.sqrt((x * x).sum(axes, keepdims=True)) for x in (a, b))
    theta = xp.arccos((a * b).sum(axes, keepdims=True) / (a_size * b_size))
    return (xp.sin((1 - u) * theta) * a + xp.sin(u * theta) * b) / xp.sin(theta)


def reconstruction(net, diffusion, x0, labels, counts):
    """Root mean square error of pictures that went to noise and back, by steps and guidance."""
    errors = {}
    for w in WEIGHTS:
        model = td.guided(demo.parallel(net), labels, net.null, w)
        for steps in counts:
            x = invert(model, diffusion, x0, steps, 0)
            back = td.sample(td.ddim(model, diffusion, x, steps=steps))
            errors[w, steps] = float(((back - x0) ** 2).mean() ** 0.5)
    return errors


def main(out, short):
    data, (net, diffusion) = digits(), shipped()
    counts = (2, 4) if short else (10, 50, 200, 500)
    x0, labels = (xp.asarray(a[:10]) for a in (data.test_images, data.test_labels))
    print("There and back, pixels in [-1, 1] off by (root of the mean square of 10 digits)\n"
          f"{'guidance':12}" + "".join(f"{f'{n} steps':>12}" for n in counts))
    errors = reconstruction(net, diffusion, x0, asnumpy(labels), counts)
    for w in WEIGHTS:
        print(f"w = {w:<8g}" + "".join(f"{errors[w, n]:12.4f}" for n in counts))

    n, steps = (100, 2) if short else (200, 50)
    model, score = demo.parallel(net), Score(data, out)     # without labels: any digits
    a, b = (xp.asarray(data.test_images[i:i + n]) for i in (0, n))
    za, zb = (invert(model, diffusion, x, steps, rng) for rng, x in enumerate((a, b)))
    print(f"\nHalf way between {n} pairs of digits     |x_T| / sqrt(784)   Frechet distance")
    mixes = {"linear": lerp(za, zb, 0.5), "spherical": slerp(za, zb, 0.5),
             "no mixing: one of each pair": za, "fresh noise": td.normal(2, za.shape)}
    for name, z in mixes.items():
        x = asnumpy(td.sample(td.ddim(model, diffusion, z, steps=steps)))
        size = float((z * z).mean() ** 0.5)
        print(f"{name:32}{size:20.2f}{score(x, np.zeros(n, int))[1]:19.2f}")
    blend = score(asnumpy(lerp(a, b, 0.5)), np.zeros(n, int))[1]
    print(f"{'the pictures mixed, linear':52}{blend:19.2f}")

    rows, way = [], np.linspace(0, 1, 9)
    for i in range(3):
        for mix in (lerp, slerp):
            z = xp.concatenate([mix(za[i:i + 1], zb[i:i + 1], u) for u in way])
            rows.append(asnumpy(td.sample(td.ddim(model, diffusion, z, steps=steps))))
    files.sheet(out / "invert.png", np.stack(rows), [f"{u:.2f}" for u in way],
                ["linear", "spherical"] * 3)


if __name__ == "__main__":
    run(main)
