"""Progressive distillation (2202.00512): the network learns to take two of its steps in one.

DDIM without noise goes a fixed way from x_t, so where two steps of a teacher end, from t by way
of m to s, can be taught to a student. Which x0 does it have to answer at x_t, for one step of
its own to end there? Let r = sqrt(SNR). A step of DDIM leaves eps as it is, and eps is
x_t / noise_t - r_t x0. So with the teacher's two guesses, x0_t and x0_m,

    x_s / noise_s = x_t / noise_t + (r_m - r_t) x0_t + (r_s - r_m) x0_m

where one step has (r_s - r_t) x0. The target is the mean of the two guesses by these weights,
and at s = 0, where r is infinite, x0_m (this is Algorithm 2's x~). The student starts as a copy
of its teacher, its loss is that of v, which weighs the error of x0 by SNR + 1 (section 4), and
then it is the teacher of the next, with half the steps.

A denoiser's best answer is the mean of all x0 behind x_t: at x_T, a blur. The student's best is
one picture, where x_T leads. That is why a single step can do.

The first teacher is guided, w fixed to 1.6 as the demo draws (2210.03142 learns all w at once).
So guidance is in the students: a step of theirs is one call of the network, a guided step of
the teacher's is two.
"""
import copy
from functools import partial

from gallery import Score, asnumpy, demo, digits, files, learn, run, shipped, td, xp
import numpy as np

W, INTERVAL = demo.DRAWING["guidance"], (1, 800)    # guided is, as in the demo, t = 1..800
ROUNDS = {8: 80, 4: 100, 2: 150, 1: 200}            # a student's steps: updates to train it


def target(teacher, diffusion, xt, t, m, s):
    """The x0 with which one step of DDIM from x_t to s ends where the teacher's two do, by way
    of m. t, m, s: integers (B,)."""
    x0_t = diffusion.to_x0(xt, t, teacher(xt, xp.asarray(t)), clip=(-1, 1))
    xm = diffusion.q_sample(x0_t, m, diffusion.to_eps(xt, t, x0_t))         # DDIM's step
    x0_m = diffusion.to_x0(xm, m, teacher(xm, xp.asarray(m)), clip=(-1, 1))
    r = diffusion.snr ** 0.5
    share = (r[m] - r[t]) / (r[s] - r[t])           # 0 at s = 0
    return x0_m + td.per_image(share, xt) * (x0_t - x0_m)


def add_gradient(net, diffusion, x0, t, y, eps, total, *options, teacher, steps, w):
    """td.add_gradient with the target as x0, and as eps what with it makes the same x_t."""
    stride = diffusion.T // steps
    t = -(-t // stride) * stride                    # up to the next step that the student takes
    xt = diffusion.q_sample(x0, t, eps)
    model = td.guided(teacher, y, net.null, w, interval=INTERVAL)
    x0 = target(model, diffusion, xt, t, t - stride // 2, t - stride)
    eps = diffusion.to_eps(xt, t, x0)
    return td.add_gradient(net, diffusion, x0, t, y, eps, total, *options)


def halve(teacher, diffusion, data, steps, w, updates):
    """A student that in `steps` steps ends where the teacher does in twice as many."""
    gradient = partial(add_gradient, teacher=teacher, steps=steps, w=w)
    return learn(copy.deepcopy(teacher), diffusion, data.images, data.labels, steps=updates,
                 said=f"{2 * steps} -> {steps} steps", gradient=gradient, label_drop=0,
                 lr=3e-3, warmup=10, ema=0.98)


def main(out, short):
    data, (net, diffusion) = digits(), shipped()
    score, labels = Score(data, out), np.arange(100 if short else 1000) % 10

    def draw(net, sampler, steps, w=1, seed=0):
        x = td.normal(seed, (len(labels), *net.image))
        model = td.guided(demo.parallel(net), labels, net.null, w, interval=INTERVAL)
        return asnumpy(td.sample(sampler(model, diffusion, x, steps=steps)))

    students, teacher, w = {}, net, W
    for steps, updates in ROUNDS.items():
        teacher = halve(teacher, diffusion, data, steps, w, 3 if short else updates)
        students[steps], w = teacher, 1             # from here on, guidance is in it
    drawn = {("DDIM", 16): draw(net, td.ddim, 16, W)}
    for steps, student in students.items():
        drawn["DDIM", steps] = draw(net, td.ddim, steps, W)
        drawn["DPM-Solver++", steps] = draw(net, td.dpm_solver, steps, W)
        drawn["distilled", steps] = draw(student, td.ddim, steps)

    print(f"{len(labels):,} digits       steps   calls   read right   Frechet   "
          "off DDIM 16's by")
    for (name, steps), x in drawn.items():
        accuracy, distance = score(x, labels)
        off = 127.5 * ((x - drawn["DDIM", 16]) ** 2).mean() ** 0.5      # grey levels
        guided = name != "distilled" and td.timesteps(diffusion.T, steps) <= INTERVAL[1]
        print(f"{name:16}{steps:8}{steps + np.sum(guided):8}{accuracy:11.1%}{distance:12.2f}"
              f"{off:11.0f}")
    again = [score(draw(students[1], td.ddim, 1, seed=seed), labels) for seed in range(5)]
    spread = np.std(again, axis=0, ddof=1)
    print(f"standard deviation of 5 draws in 1 step: {spread[0]:9.1%}{spread[1]:12.2f}")
    files.sheet(out / "distill.png", np.stack([x[:10] for x in drawn.values()]),
                names=[f"{name} {steps}" for name, steps in drawn])


if __name__ == "__main__":
    run(main)
