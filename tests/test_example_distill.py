"""examples/distill.py: where a student's step ends, and what its loss is."""
from functools import partial
from itertools import islice
from types import SimpleNamespace

import distill
import numpy as np
import pytest
from common import close

import tinyddpm as td


def distill_net(seed):
    """A small network in float64, whose every answer depends on x, t and y."""
    net = td.UNet((4, 4, 1), (8,), classes=3, rng=seed, dtype=np.float64)
    net.params.flat += 0.3 * td.normal(seed, net.params.flat.shape, np.float64)
    return net


def taught(teacher, diffusion, stride):
    """A model that answers exactly what a student of this stride is taught."""
    def model(xt, t):
        x0 = distill.target(teacher, diffusion, xt, t, t - stride // 2, t - stride)
        return diffusion.target(x0, diffusion.to_eps(xt, t, x0), t)
    return model


@pytest.mark.parametrize("t, s", [(16, 12), (9, 3), (4, 0), (2, 0), (16, 0)])
def test_a_students_step_ends_where_two_of_its_teachers_do(t, s):
    diffusion, teacher = td.Diffusion(td.cosine_betas(16), "v"), distill_net(0)
    x, student = td.normal(1, (5, 4, 4, 1), np.float64), taught(teacher, diffusion, t - s)
    steps = [t, (t + s) // 2, s] if s else [t, t // 2]
    _, (_, two) = islice(td.ddim(teacher, diffusion, x, steps=steps), 2)
    at, one = next(td.ddim(student, diffusion, x, steps=[t, s] if s else [t]))
    assert at == s
    close(one, two)


def test_a_student_of_students_draws_in_one_step_what_the_first_teacher_does_in_16():
    diffusion, model = td.Diffusion(td.cosine_betas(16), "v"), distill_net(0)
    x = td.normal(1, (3, 4, 4, 1), np.float64)
    expected = td.sample(td.ddim(model, diffusion, x, steps=16))
    for steps in (8, 4, 2, 1):
        model = taught(model, diffusion, 16 // steps)
        close(td.sample(td.ddim(model, diffusion, x, steps=steps)), expected, 1e-9)


@pytest.mark.parametrize("steps, w, weighting", [(4, 1, "simple"), (2, 1.6, "snr")])
def test_the_students_loss_by_a_plain_loop_and_its_slope(steps, w, weighting):
    """At the student's own steps, with labels: the error of x0, not of v, by SNR + 1."""
    diffusion, stride, expected = td.Diffusion(td.cosine_betas(1000), "v"), 1000 // steps, 0
    teacher, net, rng = distill_net(1), distill_net(2), np.random.default_rng(0)
    x0, eps = rng.uniform(-1, 1, (6, 4, 4, 1)), td.normal(rng, (6, 4, 4, 1), np.float64)
    y, given = np.arange(6) % 3, np.array([1, 250, 251, 500, 501, 1000])
    gradient = partial(distill.add_gradient, net, diffusion, x0, given, y, eps, 10, "l2",
                       weighting, None, (-1, 1), teacher=teacher, steps=steps, w=w)
    for i in range(6):
        t, one = next(t for t in range(stride, 1001, stride) if t >= given[i]), slice(i, i + 1)
        xt, at = diffusion.q_sample(x0[one], t, eps[one]), np.array([t])
        model = td.guided(teacher, y[one], 3, w, interval=(1, 800))
        right = distill.target(model, diffusion, xt, at, at - stride // 2, at - stride)
        guess = diffusion.to_x0(xt, t, net(xt, at, y[one]))
        for a, b in zip(guess.ravel(), right.ravel()):
            if not (b == -1 and a < -1 or b == 1 and a > 1):        # which clipping puts right
                expected += (diffusion.snr[t] + (weighting == "simple")) * (a - b) ** 2 / 10
    net.grads.flat = 0
    close(gradient(), expected, 1e-9)
    u, slope, f = td.normal(3, net.params.flat.shape, np.float64), net.grads.flat.copy(), []
    for shift in (1e-6, -2e-6):
        net.params.flat += shift * u
        f.append(gradient())
    close((f[0] - f[1]) / 2e-6, slope @ u, 1e-5)


def test_a_student_comes_nearer_to_two_steps_of_its_teacher_and_the_teacher_stays():
    """And learns nothing for the null label, as it never meets one."""
    diffusion, teacher = td.Diffusion(td.cosine_betas(16), "v"), distill_net(0)
    before, y = teacher.params.flat.copy(), np.arange(99) % 3
    x = td.normal(0, (99, 4, 4, 1), np.float64)
    two = td.sample(td.ddim(td.guided(teacher, y, 3, 1.6), diffusion, x, steps=4))

    def error(net):
        one = td.sample(td.ddim(td.guided(net, y, 3, 1), diffusion, x, steps=2))
        return ((one - two) ** 2).mean()
    data = SimpleNamespace(images=np.clip(x, -1, 1), labels=y)
    student = distill.halve(teacher, diffusion, data, 2, 1.6, 20)
    assert error(student) < error(teacher) / 2
    assert (teacher.params.flat == before).all()
    assert (student.params.label[3] == teacher.params.label[3]).all()
