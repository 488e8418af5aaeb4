"""docs/ERRATA.md row by row: what widely copied diffusion code gets wrong, and what is right.

Each entry of ROWS is a property, the right form, tinyddpm's own, and wrong forms: the first has
the property and the others lack it. What is wrong with them is said in the document.
"""
import math
import re
from functools import partial
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest

import tinyddpm as td
from common import abar_of

if td.xp is not np:
    pytest.skip("these run with TINYDDPM_BACKEND=numpy", allow_module_level=True)

T = 1000
U = np.arange(T + 1) / T
BETAS = np.linspace(1e-4, 0.02, T)
ABAR = abar_of(BETAS)
D, OF_X0, OF_V, OF_FLOW = (td.Diffusion(BETAS, kind) for kind in ("eps", "x0", "v", "flow"))
X0, EPS, GUESS = np.random.default_rng(0).uniform(-1, 1, (3, 4, 1))


def near(a, b, tolerance=1e-9):
    return np.allclose(a, b, rtol=tolerance, atol=tolerance)


def mix(abar, x0, eps):
    """DDPM eq. 4: of the variance the share abar is x0's, the rest is noise."""
    return abar ** 0.5 * x0 + (1 - abar) ** 0.5 * eps


XT, ROWS = mix(ABAR[300], X0, EPS), {}

# ----------------------------------------------------------------------------------- schedules

def short(steps):
    return np.linspace(1e-4, 0.02, steps)


def betas_of(abar):
    return 1 - abar[1:] / abar[:-1]


COSINE = betas_of(np.cos((U + 0.008) / 1.008 * np.pi / 2) ** 2)
OF_COSINE = td.Diffusion(td.cosine_betas(T))
SINE = np.diff(np.sin(np.pi * np.arange(T + 1) / (T + 1)) ** 2)
KARRAS = np.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), T) ** 7
KARRAS_BETAS = betas_of(np.append(1, 1 / (1 + KARRAS ** 2)))
ABAR_SIGMOID = 1 / (1 + np.exp(6 * U - 3)) - 1 / (1 + np.exp(3))

ROWS |= {
    "01_linear_betas_for_few_steps": lambda: (
        lambda make: all(abar_of(make(steps))[-1] < 5e-5 for steps in (50, 300, 400)),
        td.scaled_linear_betas, short),
    "02_scaled_betas_above_1": lambda: (
        lambda betas: 0 < betas.min() <= betas.max() <= 1,
        td.scaled_linear_betas(20), *(short(n) * 1000 / n for n in range(2, 20))),
    "03_a_factor_too_many": lambda: (
        lambda abar: abar[0] == 1 and near(betas_of(abar), BETAS),
        D.abar, np.cumprod(1 - short(T + 1))),
    "09_the_mean_by_way_of_eps_with_cosine_betas": lambda: (
        lambda mean: np.abs(mean(EPS + 0.1) - mean(EPS)).max() < 0.1,
        lambda eps: next(td.ddpm(lambda x, t: eps, OF_COSINE, X0, 0))[1],
        lambda eps: (X0 - 0.999 / (1 - OF_COSINE.abar[T]) ** 0.5 * eps) / 0.001 ** 0.5),
    "10_cosine_betas_clipped_from_below": lambda: (
        partial(near, np.minimum(COSINE, 0.999)), td.cosine_betas(T),
        np.clip(COSINE, 1e-4, 0.999), np.clip(COSINE, 0.01, 0.999)),
    "12_two_names_for_one_schedule": lambda: (
        lambda named: len({round(make(100)[50], 9) for make in named.values()}) == len(named),
        td.SCHEDULES,
        {"scaled_linear": lambda T: np.linspace(1e-4 ** 0.5, 0.02 ** 0.5, T) ** 2,
         "quad": lambda T: (0.01 + (0.02 ** 0.5 - 0.01) * np.arange(T) / (T - 1)) ** 2}),
    "13_sqrt_of_beta": lambda: (
        lambda betas: near(abar_of(betas)[1:T], 1 - (U[1:T] + 1e-4) ** 0.5),
        td.sqrt_betas(T), BETAS ** 0.5, 0.9999 ** 0.5 - 4e-5 ** 0.5 * U[1:]),
    "14_two_sigmoid_schedules": lambda: (
        partial(near, 1e-4 + 0.0199 / (1 + np.exp(-np.linspace(-6, 6, T)))),
        td.sigmoid_betas(T), betas_of(ABAR_SIGMOID)),
    "15_karras_sigmas_as_they_are_sampled": lambda: (
        lambda betas: near(abar_of(betas)[1:], 1 / (1 + KARRAS[::-1] ** 2)),
        td.karras_betas(T), KARRAS_BETAS, np.clip(KARRAS_BETAS, 1e-4, 0.999)),
    "16_a_cosine_in_beta": lambda: (
        lambda betas: near(betas[:-1], COSINE[:-1]), td.cosine_betas(T), SINE),
}

# -------------------------------------------------------------------------- steps of a sampler
# A step(x, x0, t, s) is affine, x_s = offset + slope x + kick z: three images and their noise z
# show the three numbers.
SHOWN, Z = np.array([[[0.0], [1.0], [0.0]], [[0.0], [0.0], [1.0]]])


class NoiseZ(np.random.Generator):
    def standard_normal(self, shape, dtype):
        return Z.astype(dtype)


def step_of(sampler, **options):
    def step(x, x0, t, s):
        rng, steps = NoiseZ(np.random.PCG64()), [t, s] if s else [t]
        return next(sampler(lambda *_: x0, OF_X0, x, rng, steps=steps, clip=None, **options))[1]
    return step


def keeps_marginals(step):
    """From an x_t of mean sqrt(abar_t) x0 and variance 1 - abar_t a step has to lead to such an
    x_s, or the model sees what it was not trained on. And it may not turn the noise around."""
    for t, s in [(T, 857), (500, 480), (20, 0), (1, 0)]:
        offset, turned, kick = step(SHOWN, 0.7 + 0 * SHOWN, t, s)[:, 0]
        slope, kick = turned - offset, kick - offset
        mean = offset + slope * ABAR[t] ** 0.5 * 0.7
        var = slope ** 2 * (1 - ABAR[t]) + kick ** 2
        if slope < 0 or not near([mean, var], [ABAR[s] ** 0.5 * 0.7, 1 - ABAR[s]]):
            return False
    return True


def sigma(t, s):
    """DDIM's at eta = 1 (eq. 16), and DDPM's (eq. 7)."""
    return ((1 - ABAR[s]) / (1 - ABAR[t]) * (1 - ABAR[t] / ABAR[s])) ** 0.5


def ddim(sigma, sign, reduced, x, x0, t, s):
    rest = max(0, 1 - ABAR[s] - reduced * sigma(t, s) ** 2) ** 0.5
    return ABAR[s] ** 0.5 * x0 + sign * rest * D.to_eps(x, t, x0) + sigma(t, s) * Z


def ddpm(sigma, x, x0, t, s):
    return D.q_posterior(x0, x, t, s)[0] + sigma(t, s) * Z


def inpaints(known_at):
    """Known pixels are as in training whenever the model sees them, and exact at the end."""
    seen, steps = [], range(T, 0, -100)

    def model(x, t):
        seen.append(near(x[0], mix(ABAR[t[0]], X0[0], EPS[0])))
        return np.tanh(x)
    for t, (s, x) in zip(steps, td.ddpm(model, OF_X0, mix(ABAR[T], X0, EPS), 0, steps=steps)):
        x[0] = mix(ABAR[known_at(t, s)], X0[0], EPS[0])
    return all(seen) and near(x[0], X0[0])


def arange(steps):
    return np.round(np.arange(T, 0, -T / steps)).astype(int)


LEADING = np.arange(0, T, T // 50)[::-1] + 1
QUADRATIC = np.unique((np.linspace(0, (0.8 * T) ** 0.5, 50) ** 2).astype(int) + 1)[::-1]
OF_ZERO = td.Diffusion(td.zero_terminal_snr(BETAS), "v")
CLIPPED = np.clip((XT - (1 - ABAR[300]) ** 0.5 * 3 * GUESS) / ABAR[300] ** 0.5, -1, 1)

ROWS |= {
    "05_steps_that_do_not_start_at_T": lambda: (
        lambda steps: steps[0] == T, td.timesteps(T, 50), LEADING, QUADRATIC),
    "06_the_step_before_as_t_minus_T_over_N": lambda: (
        keeps_marginals, step_of(td.ddim),
        lambda x, x0, t, s: mix(ABAR[max(t - T // 7, 0)], x0, D.to_eps(x, t, x0))),
    "07_abar_at_the_last_step": lambda: (
        keeps_marginals, step_of(td.ddim),
        lambda x, x0, t, s: mix(ABAR[max(s, 1)], x0, D.to_eps(x, t, x0))),
    "08_x0_clipped_but_not_eps": lambda: (      # x0 and the eps that leads to x_s make up x_t
        lambda x_s: near(mix(ABAR[300], CLIPPED, D.to_eps(x_s, 280, CLIPPED)), XT),
        next(td.ddim(lambda x, t: 3 * GUESS, D, XT, steps=[300, 280]))[1],
        mix(ABAR[280], CLIPPED, 3 * GUESS)),
    "17_ddpm_with_old_and_new_noise": lambda: (
        keeps_marginals, step_of(td.ddpm),
        lambda x, x0, t, s: mix(ABAR[s], x0, D.to_eps(x, t, x0)) + (1 - ABAR[s]) ** 0.5 * Z),
    "18_ddim_noise": lambda: (
        keeps_marginals, step_of(td.ddim, eta=1), partial(ddim, sigma, -1, 1),
        partial(ddim, lambda t, s: ((1 - ABAR[s]) / (1 - ABAR[t])) ** 0.5, 1, 1),
        partial(ddim, sigma, 1, 0)),
    "21_inpainting_one_step_behind": lambda: (inpaints, lambda t, s: s, lambda t, s: t),
    "22_image_to_image_that_skips_its_first_step": lambda: (
        lambda steps: near(X0, td.sample(td.ddim(
            lambda x, t: EPS, D, mix(ABAR[500], X0, EPS), steps=steps, clip=None))),
        range(500, 0, -20), range(480, 0, -20)),
    "23_noise_times_beta_or_after_the_last_step": lambda: (
        keeps_marginals, step_of(td.ddpm), partial(ddpm, lambda t, s: sigma(t, s) ** 2),
        partial(ddpm, lambda t, s: sigma(t, s) if s else (1 - ABAR[t]) ** 0.5)),
    "23_uniform_noise": lambda: (
        lambda z: near([np.mean(z), np.mean(z ** 2), np.mean(z ** 4)], [0, 1, 3], 0.1),
        td.normal(0, 10 ** 5), *(np.random.default_rng(0).uniform(-end * below, end, 10 ** 5)
                                 for end, below in [(1, 0), (1, 1), (3 ** 0.5, 1)])),
    "31_the_last_step_never_made": lambda: (
        lambda n: near(td.sample(islice(td.ddpm(lambda x, t: X0, OF_X0, EPS, 0), n)), X0),
        T, len(range(T - 1, 0, -1))),
    "33_trailing_steps_that_go_below_0": lambda: (
        lambda make: all(len(make(n)) == n and make(n)[-1] >= 1 for n in range(1, 130)),
        partial(td.timesteps, T), arange),
    "34_the_root_of_less_than_nothing": lambda: (
        lambda step: all(x.dtype == float and np.isfinite(x).all()
                         for x in map(step, range(1, T, 9))),
        lambda s: next(td.ddim(lambda x, t: x, OF_ZERO, X0, 0, steps=[T, s], eta=1.0))[1],
        lambda s: np.sqrt(1 - OF_ZERO.abar[s] - ((1 - OF_ZERO.abar[s]) ** 0.5) ** 2)),
}

# -------------------------------------------------- guidance, conversions, weights, likelihood

def answer(x, t, y):
    return np.sin(x * (1 + y[:, None]))


def as_large_a_loss(weight):
    """One wrong guess of x0, whatever the model answers."""
    eps = D.to_eps(D.q_sample(X0, SOME, EPS), SOME, GUESS)
    return all(near(weight(d)[:, None] * (d.target(X0 - GUESS, EPS - eps, SOME)) ** 2,
                    np.minimum(SNR, 5)[:, None] * (X0 - GUESS) ** 2) for d in (OF_X0, OF_V))


def cost(var):
    """In bits, of a guess one byte off."""
    return -np.log2(td.bin_probability(BYTE, OFF, var ** 0.5))


def forward_kernels():
    gap = [np.mean(FEW.q_posterior(X0 - GUESS, 0 * X0, t)[0] ** 2) for t in range(2, 11)]
    return FEW.alpha[2:] * gap / (2 * FEW.beta[2:]) / math.log(2)


LABELS, SOME = np.array([[1, 2, 1, 2], [1, 100, 300, 900]])
COND, UNCOND = (answer(EPS, None, y) for y in (LABELS, 0 * LABELS))
SNR = ABAR[SOME] / (1 - ABAR[SOME])
FLOW = td.Diffusion(td.flow_betas(T), "flow")
BYTES, erf = np.arange(256) / 127.5 - 1, np.vectorize(math.erf)
BYTE, OFF = BYTES[100:102].reshape(2, 1, 1)
FEW = td.Diffusion(td.linear_betas(10, 0.001, 0.3), "x0")

ROWS |= {
    "11_the_log_of_a_variance_of_0": lambda: (
        partial(near, cost(FEW.q_posterior(X0, X0, 2)[1].item())),
        FEW.bits_per_dim(lambda x, t: OFF, BYTE, 0)["decoder"], cost(1e-20)),
    "19_two_guidance_weights": lambda: (
        lambda guide: all(near(guide(w), UNCOND + w * (COND - UNCOND)) for w in range(4)),
        lambda w: td.guided(answer, LABELS, 0, w)(EPS, SOME),
        lambda w: (1 + w) * COND - w * UNCOND),
    "20_min_snr_weights_of_another_kind": lambda: (
        as_large_a_loss, lambda d: d.loss_weight(SOME, "min_snr"),
        lambda d: np.minimum(SNR, 5) / SNR),
    "27_bins_at_the_edges": lambda: (
        lambda p: all(near(np.sum(p(BYTES, np.full(256, mean), 0.01)), 1)
                      for mean in (-1, -0.98, 0.995, 1)), td.bin_probability,
        lambda x, mean, std: (erf((x + 1 / 255 - mean) / std / 2 ** 0.5)
                              - erf((x - 1 / 255 - mean) / std / 2 ** 0.5)) / 2),
    "28_eps_at_zero_snr": lambda: (
        partial(near, X0), OF_ZERO.to_x0(EPS, T, OF_ZERO.target(X0, EPS, T)),
        (EPS - EPS) / OF_ZERO.abar[T] ** 0.5),
    "29_the_bound_with_forward_kernels": lambda: (      # half the fall in SNR, times the error
        partial(near, -np.diff(FEW.snr[1:]) * np.mean((X0 - GUESS) ** 2) / 2 / math.log(2)),
        FEW.bits_per_dim(lambda x, t: GUESS, X0, 0)["steps"], forward_kernels()),
    "30_eps_as_the_score": lambda: (
        partial(near, -(XT - ABAR[300] ** 0.5 * X0) / (1 - ABAR[300])), D.score(XT, 300, X0),
        EPS, -EPS, EPS / (1 - ABAR[300]) ** 0.5),
    "35_a_path_run_the_other_way": lambda: (
        lambda t: near(math.hypot(0.7, 0.3) * FLOW.q_sample(X0, t, EPS), 0.7 * X0 + 0.3 * EPS),
        300, 700),
    "35_a_velocity_towards_the_data": lambda: (
        lambda answer: near(FLOW.to_x0(FLOW.q_sample(X0, 300, EPS), 300, answer), X0),
        FLOW.target(X0, EPS, 300), X0 - EPS),
    "36_a_velocity_used_as_eps": lambda: (
        lambda d: near(d.to_x0(XT, 300, OF_V.target(X0, EPS, 300)), X0), OF_V, D, OF_FLOW),
}

# ------------------------------------------------------------------------- network and training

class Stub:
    """Stands in for a network, in train: it answers 0 and notes what it was asked."""
    image = input = (1, 1, 1)
    classes = null = 256

    def __init__(self):
        self.params, self.asked = td.initial({"w": ((1,), 0)}, 0, np.float64), []
        self.grads = self.params.grad

    def with_params(self, params):
        return self

    def forward(self, x, t, y, rng):
        self.asked.append((x, t, y))
        return np.zeros_like(x), lambda dy: None


def trained_on(labels, steps=20, batch=100):
    """What the network is shown in training: x, t and y of every batch. All x0 are -1."""
    net, images = Stub(), np.full((len(labels), 1, 1, 1), -1.0)
    for _ in td.train(net, D, images, labels, steps=steps, batch=batch, chunk=batch):
        pass
    return net.asked


def sees_t(net):
    """Answers depend on t, and not on the place in the batch."""
    a, b, c, _ = net(IMAGES, np.array([100, 101, 100, 7]))
    return near(a, c) and not near(a, b)


def start_left(decay):
    """The start is 1, all later parameters 0: what is left of it after 1,000 steps."""
    ema = td.EMA(np.ones(1), decay)
    for _ in range(1000):
        ema.step(np.zeros(1))
    return ema.flat[0]


NET = td.UNet(image=(4, 4, 1), channels=(4,), classes=3, dtype=np.float64)
NET.params.flat = np.random.default_rng(0).standard_normal(NET.params.flat.shape) / 3
IMAGES = np.repeat(np.random.default_rng(0).standard_normal((1, 4, 4, 1)), 4, 0)
CLASSES, DROPPED = np.arange(60) % 3, np.random.default_rng(0).random(60) < 0.1
STEPS = np.array([[1], [500], [T]])

ROWS |= {
    "04_steps_never_trained": lambda: (
        lambda t: {*t} == {*td.timesteps(T, T)},        # where the sampler goes
        np.concatenate([t for _, t, _ in trained_on(CLASSES, batch=T)]),
        *(first + np.random.default_rng(0).integers(1, T, 20 * T) for first in (0, 1))),
    "24_a_network_that_never_sees_t": lambda: (
        sees_t, NET, lambda x, t: NET(x, 1), lambda x, t: NET(x, (t / T).astype(int)),
        lambda x, t: NET(x, np.arange(len(t)))),
    "25_two_embeddings_of_t": lambda: (
        lambda e: near(e[:, [0, 3, 4]], np.hstack([np.sin(STEPS), np.sin(STEPS / 10000),
                                                   np.cos(STEPS)])),
        td.timestep_embedding(STEPS[:, 0], 8),
        np.roll(td.timestep_embedding(STEPS[:, 0], 8), 4, 1),
        np.hstack([trig(STEPS / 10.0 ** np.arange(4)) for trig in (np.sin, np.cos)])),
    "26_a_running_mean_that_keeps_the_start": lambda: (
        lambda left: left < 1e-6, start_left(0.9999), 0.9999 ** 1000),
    "32_labels_dropped_for_good": lambda: (
        partial(near, CLASSES), (kept := CLASSES.copy(), trained_on(kept))[0],
        np.where(DROPPED, -1, CLASSES)),
    "32_labels_dropped_by_the_batch": lambda: (
        lambda batches: all(0 < np.sum(y == 256) < len(y) for y in batches),
        [y for _, _, y in trained_on(CLASSES)], [CLASSES] * 9 + [np.full(60, 256)]),
    "32_a_null_label_that_is_a_class": lambda: (
        lambda net: not any(near(one, net(IMAGES, 7, np.arange(4))[3])
                            for one in NET(IMAGES, 7, np.arange(4))[:3]),
        NET, lambda x, t, y: NET(x, t, np.arange(3)[np.where(y == 3, -1, y)])),
    "37_a_null_label_in_a_small_type": lambda: (
        lambda y: {*y} == {0, 1, 2, 256}, trained_on(CLASSES.astype(np.uint8))[0][2],
        np.where(DROPPED, 256, CLASSES).astype(np.uint8)),
    "38_a_group_norm_over_one_value": lambda: (
        lambda norm: not near(*norm(td.normal(0, (2, 1, 1, 8), np.float64))),
        lambda x: td.group_norm(x, np.zeros(8), np.zeros(8))[0],
        lambda x: x - x.mean((1, 2), keepdims=True)),
}

# -------------------------------------------------------------------------------------- tests

@pytest.mark.parametrize("name", ROWS)
def test_erratum(name):
    with np.errstate(invalid="ignore"):
        holds, right, *wrong = ROWS[name]()
        assert holds(right)
        assert not any(holds(form) for form in wrong)


def end(sampler, route, **options):
    """The deviation of x_0 for data of N(0, .5^2), whose best guess of x0 is linear in x_t."""
    std, step = 1.0, step_of(sampler, **options)
    for t, s in pairwise(route):
        guess = 0.25 * ABAR[t] ** 0.5 / (0.25 * ABAR[t] + 1 - ABAR[t])
        _, slope, kick = step(SHOWN, guess * SHOWN, t, s)[:, 0]
        std = math.hypot(slope * std, kick)
    return round(std, 4)


def test_nearer_to_the_data_is_not_more_right():
    """Rows 5, 7, 31 and 5 again end nearer to .5 than a right DDIM of 50 steps does: so
    samplers should be asked for exact numbers."""
    right = {n: [*td.timesteps(T, n), 0] for n in (10, 20, 50, 100)}
    assert [end(td.ddim, route) for route in right.values()] == [0.37, 0.4314, 0.4714, 0.4854]
    assert [end(td.ddpm, range(T, -1, -1), variance=variance)
            for variance in ("small", "large")] == [0.4961, 0.5008]
    assert [end(td.ddim, route) for route in (
        [*LEADING, 0], [*right[50][:-1], 1], right[50][:-1], [*QUADRATIC, 0])] == [
            0.4724, 0.4728, 0.4810, 0.4853]


def test_figures_in_the_document():
    assert [round(abar_of(short(n))[-1], 4) for n in (50, 300, 400)] == [0.603, 0.0481, 0.0175]
    assert LEADING[0] == 981 and QUADRATIC[0] == 801 and T - T // 7 == 858
    assert round((1 - 0.999) ** -0.5, 1) == 31.6 and round(math.log(1e-20)) == -46
    assert [np.sum(COSINE < floor * (1 - 1e-6)) for floor in (1e-4, 0.01)] == [13, 807]
    assert np.sum(KARRAS_BETAS < 0) == 999 and np.sum(SINE < -1e-12) == 499
    assert [round(0.9999 ** n, 2) for n in (1000, 10_000)] == [0.90, 0.37]
    below = [n for n in range(1, T + 1) if arange(n)[-1] == 0]
    assert len(below) == 62 and below[0] == 61


def test_every_row_has_its_tests_and_every_test_its_row():
    text = (Path(__file__).parents[1] / "docs" / "ERRATA.md").read_text(encoding="utf-8")
    index, table = text.split("\n| # |")
    rows = {int(number): {*re.findall(r"`(\d\d_\w+)`", cells)}
            for number, cells in re.findall(r"^\| (\d+) (.*)", table, re.M)}
    assert set().union(*rows.values()) == {*ROWS} and all(rows.values())
    assert all(int(name[:2]) == number for number in rows for name in rows[number])
    assert {*map(int, re.findall(r"\d+", index.split("| symptom |")[1]))} == {*rows}
