"""Schedules, forward process and samplers against diffusers (0.42.1), on one wrong, nonlinear
model.

Their tables are float32. doubled() has their own code make and use float64 ones: what then
differs is the formula. As they come, they agree to float32's rounding: 1e-6 of abar, 2e-5 of a
sample.

    python tests/test_against_diffusers.py      what, and its largest relative difference

Where they do otherwise, each with the test that shows it and why:
    steps are numbered from 0, so that the model is told t - 1        test_numbered_from_0
    1 - abar_1 has four digits, being 1 - .9999 in float32            test_digits_of_float32
    "trailing" by a float arange: at times N + 1 steps, the last -1,
        which is the table's last entry                               test_trailing_goes_below_0
    "linspace" rounds halves to even numbers of t - 1; of one step,
        it takes the cleanest, not the noisiest                       test_linspace_halves
    the multistep solver leaves out the last of N + 1 steps           test_steps_of_the_solver
    DDIM goes to t - T // N, not to the next step of the list         test_ddim_misses_its_steps
    DDIM with set_alpha_to_one=False ends at abar_1, not at 1         test_last_abar
    DDIM clips x0 and keeps eps, unless use_clipped_model_output      test_ddim_keeps_eps
    DDPM adds noise in its last step unless t is 1: a deviation of
        1e-10 (a variance clamped at 1e-20), or all of "fixed_large"  test_noise_at_the_end
    zero SNR: models of eps are let through; the multistep solver
        takes abar_T = 2^-24                                          test_eps_at_zero_snr
    zero SNR: DDIM at eta = 1 is NaN for many N, as 1 - abar_s -
        sigma^2 rounds to below 0                                     test_nan_at_zero_snr
    "thresholding" is a plain clip, unless sample_max_value is raised test_threshold_by_default
    the multistep solver does not clip                                test_the_solver_unclipped
"""
import sys
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch")
diffusers = pytest.importorskip("diffusers",
                                reason="diffusers is not installed: pip install diffusers")

from diffusers import (DDIMScheduler, DDPMScheduler,                            # noqa: E402
                       DPMSolverMultistepScheduler as Multistep)

import tinyddpm as td                                                           # noqa: E402

pytestmark = [
    pytest.mark.skipif(td.xp is not np, reason="these run with TINYDDPM_BACKEND=numpy"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")]
otherwise = pytest.mark.xfail(diffusers.__version__ != "0.42.1", strict=False,
                              reason="what 0.42.1 does; another version may have mended it")
LARGEST = 1e-11     # allowed, relative, where both are float64
T = 1000
NAMES = {"linear": td.linear_betas, "scaled_linear": td.quadratic_betas,
         "squaredcos_cap_v2": td.cosine_betas, "sigmoid": td.sigmoid_betas}
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


@contextmanager
def doubled():
    """In here float32 is float64, for the code that asks for it by name or by default."""
    with (mock.patch.object(torch, "float32", torch.float64),
          mock.patch.object(np, "float32", np.float64)):
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float)


def difference(theirs, ours):
    """The largest difference, relative to the largest of ours."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.abs(theirs - ours).max() / np.abs(ours).max())


def differences(theirs, ours):
    """The largest of two walks."""
    return max(difference(a, b) for a, b in zip(theirs, ours, strict=True))


def worst(theirs, ours):
    """The largest difference of any number, relative to itself."""
    return float(np.abs(np.asarray(theirs) / np.asarray(ours) - 1).max())


def start(seed=0, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal((2, 1, 3, 4)).astype(dtype)


def model(x, t):
    """Neither right nor linear, and another at every step."""
    return np.tanh(2 * x + 0.01 * t.reshape(-1, 1, 1, 1)).astype(x.dtype)


class TorchNoise:
    """Stands in for a NumPy Generator: draws what torch.Generator does."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def standard_normal(self, shape, dtype):
        dtype = getattr(torch, np.dtype(dtype).name)
        return torch.randn(shape, generator=self.generator, dtype=dtype).numpy()


def ours(sampler, betas, steps, dtype=np.float64, **options):
    """All x that our sampler yields."""
    return [x for _, x in sampler(model, td.Diffusion(betas), start(dtype=dtype), TorchNoise(),
                                  steps=steps, **options)]


def theirs(scheduler, steps, dtype=np.float64, asked=None, **options):
    """All x on their way. steps: how many, or None where they are set."""
    if steps is not None:
        scheduler.set_timesteps(steps)
    x, out = torch.tensor(start(dtype=dtype)), []
    if not isinstance(scheduler, Multistep):        # which draws nothing
        options["generator"] = TorchNoise().generator
    for t in scheduler.timesteps:
        answer = model(x.numpy(), np.full(len(x), int(t) + 1))
        x = scheduler.step(torch.tensor(answer), t, x, **options).prev_sample
        out.append(x.numpy())
        if asked is not None:
            asked.append(int(t))
    return out


def steps_of(scheduler):
    """The steps that a scheduler was set to, numbered as ours."""
    return [int(t) + 1 for t in scheduler.timesteps]


def make(cls, kind="eps", **options):
    return cls(T, prediction_type=PREDICTIONS[kind], **options)


# ----------------------------------------------------------------------------- what is the same

def schedule(name, T, zero_snr=False):
    """beta and abar, each number relative to itself; 1 - abar where abar is near 1."""
    with doubled():
        their = DDPMScheduler(T, beta_schedule=name, rescale_betas_zero_snr=zero_snr)
    betas = NAMES[name](T)
    d = td.Diffusion(td.zero_terminal_snr(betas) if zero_snr else betas)
    abar, end = their.alphas_cumprod.numpy(), T - 1 if zero_snr else T
    assert not zero_snr or abar[-1] == d.abar[-1] == 0
    return max(worst(their.betas, d.beta[1:]), worst(abar[:end], d.abar[1:end + 1]),
               worst(1 - abar, 1 - d.abar[1:]))


def forward(t):
    """add_noise and get_velocity: q_sample and the target of a model of v."""
    with doubled():
        their, d = DDPMScheduler(T), td.Diffusion(td.linear_betas(T))
        x0, eps = start(1), start(2)
        arguments = torch.tensor(x0), torch.tensor(eps), torch.tensor(t - 1)
        return max(difference(their.add_noise(*arguments), d.q_sample(x0, t, eps)),
                   difference(their.get_velocity(*arguments), d.target(x0, eps, t, "v")))


def ddpm_walk(kind, variance, spacing, clip, steps):
    """All but x_0, for which see test_noise_at_the_end."""
    with doubled():
        their = theirs(make(DDPMScheduler, kind, variance_type=f"fixed_{variance}",
                            timestep_spacing=spacing, clip_sample=clip), steps)
    our = ours(td.ddpm, td.linear_betas(T), steps, spacing=spacing, variance=variance,
               kind=kind, clip=(-1, 1) if clip else None)
    end = None if spacing != "trailing" else -1
    return differences(their[:end], our[:end])


def ddim_walk(kind, eta, spacing, clip, steps, name="linear", **options):
    with doubled():
        their = theirs(make(DDIMScheduler, kind, timestep_spacing=spacing, clip_sample=clip,
                            beta_schedule=name, **options), steps, eta=eta,
                       use_clipped_model_output=True)
    betas = NAMES[name](T)
    betas = td.zero_terminal_snr(betas) if options else betas
    our = ours(td.ddim, betas, steps, spacing=spacing, eta=eta, kind=kind,
               clip=(-1, 1) if clip else None)
    return differences(their, our)


def solver_walk(kind, spacing, steps, name="linear"):
    """On their steps, which are not ours: see test_steps_of_the_solver."""
    with doubled():
        their = make(Multistep, kind, timestep_spacing=spacing, beta_schedule=name)
        walk = theirs(their, steps)
    our = ours(td.dpm_solver, NAMES[name](T), steps_of(their), kind=kind, clip=None)
    return differences(walk, our)


def threshold(share, size):
    x = size * start()
    with doubled():
        their = DDPMScheduler(T, thresholding=True, dynamic_thresholding_ratio=share,
                              sample_max_value=1e9)._threshold_sample(torch.tensor(x))
    return difference(their, td.dynamic_threshold(x, share))


def largest(function, *choices, **options):
    """The largest difference over all combinations of the choices."""
    return max(function(*choice, **options) for choice in product(*choices))


KINDS, SPACINGS = tuple(PREDICTIONS), ("trailing", "leading", "linspace")
ROWS = {
    **{f"schedule {name}": lambda name=name: largest(schedule, [name], [1, 50, 1000])
       for name in NAMES},
    **{f"zero SNR of {name}": lambda name=name: largest(schedule, [name], [50, 1000], [True])
       for name in NAMES},
    "q_sample, v": lambda: largest(forward, [1, 2, 500, 1000]),
    **{f"DDPM, {kind}, {variance}": lambda kind=kind, variance=variance: largest(
        ddpm_walk, [kind], [variance], SPACINGS, [True, False], [20])
       for kind in KINDS for variance in ("small", "large")},
    "DDPM, 7 steps": lambda: largest(
        ddpm_walk, ["eps"], ["small"], ["trailing", "leading"], [True], [7]),
    **{f"DDIM, {kind}, eta {eta}": lambda kind=kind, eta=eta: largest(
        ddim_walk, [kind], [eta], ["trailing", "leading"], [True, False], [20])
       for kind in KINDS for eta in (0.0, 0.5, 1.0)},
    "DDIM, cosine": lambda: ddim_walk("v", 0.5, "trailing", True, 50, "squaredcos_cap_v2"),
    "DDIM, zero SNR": lambda: largest(ddim_walk, ["x0", "v"], [0.0, 0.5], ["trailing"], [True],
                                      [20], rescale_betas_zero_snr=True),
    **{f"DPM-Solver++(2M), {kind}": lambda kind=kind: largest(
        solver_walk, [kind], SPACINGS, [1, 2, 5, 20]) for kind in KINDS},
    "DPM-Solver++(2M), cosine": lambda: solver_walk("v", "trailing", 20, "squaredcos_cap_v2"),
    "dynamic threshold": lambda: largest(threshold, [0.5, 0.9, 0.995], [0.1, 1.0, 5.0]),
}


@pytest.mark.parametrize("what", ROWS)
def test_same_as_diffusers_in_float64(what):
    assert ROWS[what]() <= LARGEST


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_schedules_as_they_come(name, zero_snr):
    """Float32 tables: abar to a millionth."""
    their = DDPMScheduler(T, beta_schedule=name, rescale_betas_zero_snr=zero_snr)
    betas = NAMES[name](T)
    abar = td.Diffusion(td.zero_terminal_snr(betas) if zero_snr else betas).abar[1:]
    assert np.abs(their.alphas_cumprod.numpy() - abar).max() < 1e-6


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_samples_as_they_come(kind):
    """Float32 tables and pictures: samples to 2e-5 of the largest, for whole walks."""
    betas, steps, float32 = td.linear_betas(T), 20, np.float32
    pairs = {"DDPM": (theirs(make(DDPMScheduler, kind), steps, float32),
                      ours(td.ddpm, betas, steps, float32, spacing="leading", kind=kind)),
             "DDIM": (theirs(make(DDIMScheduler, kind), steps, float32, eta=0.5,
                             use_clipped_model_output=True),
                      ours(td.ddim, betas, steps, float32, spacing="leading", kind=kind,
                           eta=0.5))}
    solver = make(Multistep, kind)
    pairs["solver"] = (theirs(solver, steps, float32),
                       ours(td.dpm_solver, betas, steps_of(solver), float32, kind=kind,
                            clip=None))
    for name, (their, our) in pairs.items():
        assert {x.dtype for x in their + our} == {np.dtype(float32)}
        assert differences(their, our) < 2e-5, name


@pytest.mark.parametrize("spacing", SPACINGS)
def test_steps_are_the_same(spacing):
    """For most numbers of steps; for the others see above."""
    scheduler, same = DDPMScheduler(T, timestep_spacing=spacing), 0
    for steps in range(1, 301):
        scheduler.set_timesteps(steps)
        our, their = td.timesteps(T, steps, spacing), np.array(steps_of(scheduler))
        if len(their) == steps and np.array_equal(our, their):
            same += 1
        elif spacing == "trailing":
            their = their[:steps]
            exact = T - np.arange(steps) * T / steps
            assert np.all((our == their) | (exact % 1 == 0.5))      # halves, either way
        else:
            assert spacing == "linspace"                # see test_linspace_halves
    assert same >= {"trailing": 277, "leading": 300, "linspace": 150}[spacing]


# --------------------------------------------------------------------- what they do otherwise

@otherwise
def test_numbered_from_0():
    asked, our = [], []
    theirs(make(DDIMScheduler), 5, asked=asked)
    for _ in td.ddim(lambda x, t: our.append(t[0]) or x, td.Diffusion(td.linear_betas(T)),
                     start(), steps=5, spacing="leading"):
        pass
    assert asked == [t - 1 for t in our] == [800, 600, 400, 200, 0]


@otherwise
@pytest.mark.parametrize("name, off", [("linear", 1.7e-4), ("squaredcos_cap_v2", 5.3e-4)])
def test_digits_of_float32(name, off):
    """The noise's variance at t = 1 is wrong in its fourth digit, though abar is right to a
    millionth."""
    abar = DDPMScheduler(T, beta_schedule=name).alphas_cumprod
    assert round(worst((1 - abar)[:1], [NAMES[name](T)[0]]) / off, 1) == 1


@otherwise
@pytest.mark.parametrize("T, steps", [(1000, 61), (300, 7), (300, 14)])
def test_trailing_goes_below_0(T, steps):
    """arange(T, 0, -T/N) comes to 1e-13 in place of 0, and stays in. Entry -1 of a table is
    its last: a clean picture is taken for pure noise, once more."""
    scheduler = DDPMScheduler(T, timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(steps)
    assert steps_of(scheduler)[-1] == 0 and len(steps_of(scheduler)) == steps + 1
    assert steps_of(scheduler)[:-1] == list(td.timesteps(T, steps))
    clean, eps, abar = torch.full((1, 1, 1, 1), 0.5), 0.3, scheduler.alphas_cumprod[-1]
    x = scheduler.step(torch.full_like(clean, eps), -1, clean).prev_sample
    np.testing.assert_allclose(x, (0.5 - (1 - abar) ** 0.5 * eps) / abar ** 0.5, rtol=1e-4)


@otherwise
def test_linspace_halves():
    """With an odd number of steps of 1000 the middle one is a half, 499.5 or 500.5; both sides
    round to even, but of numbers that differ by 1. A single step is t = 1, the last, not T."""
    scheduler = DDPMScheduler(T, timestep_spacing="linspace")
    for steps in range(3, T, 20):
        scheduler.set_timesteps(steps)
        our, exact = td.timesteps(T, steps, "linspace"), np.linspace(T, 1, steps)
        moved = np.array(steps_of(scheduler)) - our
        assert np.abs(moved).max() == 1 and np.all((moved == 0) | (np.abs(
            exact % 1 - 0.5) < 1e-9))
    scheduler.set_timesteps(1)
    assert steps_of(scheduler) == [1] and list(td.timesteps(T, 1, "linspace")) == [T]


@otherwise
def test_steps_of_the_solver():
    """N steps are the first N of N + 1, but for "trailing"; its "leading" then starts lower."""
    for spacing, expected in [("trailing", td.timesteps(T, 4)),
                              ("leading", td.timesteps(T, 5, "leading")[:-1]),
                              ("linspace", td.timesteps(T, 6, "linspace")[:-1])]:
        scheduler = Multistep(T, timestep_spacing=spacing)
        scheduler.set_timesteps(len(expected))
        assert steps_of(scheduler) == list(expected)


@otherwise
@pytest.mark.parametrize("spacing, steps", [("linspace", 10), ("trailing", 7)])
def test_ddim_misses_its_steps(spacing, steps):
    """From t it goes to t - T // N, while the model is next asked at the list's next step. (So
    a known fault, huggingface/diffusers issue 12633.) With our steps set to where theirs goes,
    the first step is the same."""
    with doubled():
        scheduler = make(DDIMScheduler, timestep_spacing=spacing, clip_sample=False)
        their = theirs(scheduler, steps)
    first, following = steps_of(scheduler)[:2]
    assert first - T // steps != following
    betas = td.linear_betas(T)
    assert difference(their[0], ours(td.ddim, betas, [first, first - T // steps],
                                     clip=None)[0]) < LARGEST
    assert difference(their[0], ours(td.ddim, betas, [first, following], clip=None)[0]) > 1e-3


@otherwise
def test_last_abar():
    """Noise of variance beta_1 stays: what comes out is x_1, not x_0."""
    with doubled():
        their = theirs(make(DDIMScheduler, "x0", set_alpha_to_one=False, clip_sample=False), 10)
    d, our = td.Diffusion(td.linear_betas(T)), ours(td.ddim, td.linear_betas(T), 10, kind="x0",
                                                    spacing="leading", clip=None)
    assert differences(their[:-1], our[:-1]) < LARGEST
    eps = d.to_eps(our[-2], 1, our[-1], "x0")
    assert difference(their[-1], d.q_sample(our[-1], 1, eps)) < LARGEST
    assert difference(their[-1], our[-1]) > 1e-3


@otherwise
def test_ddim_keeps_eps():
    """Left to itself it clips x0 and goes on in the direction of the eps predicted, which is
    not what is left of x_t. Unclipped, both are one."""
    betas, abar = td.linear_betas(T), td.Diffusion(td.linear_betas(T)).abar
    with doubled():
        their = theirs(make(DDIMScheduler, timestep_spacing="trailing"), 20)
        free = theirs(make(DDIMScheduler, timestep_spacing="trailing", clip_sample=False), 20)
    x, eps = start(), model(start(), np.full(2, T))
    x0 = np.clip((x - (1 - abar[T]) ** 0.5 * eps) / abar[T] ** 0.5, -1, 1)
    assert difference(their[0], abar[950] ** 0.5 * x0 + (1 - abar[950]) ** 0.5 * eps) < LARGEST
    assert difference(their[0], ours(td.ddim, betas, 20)[0]) > 0.1
    assert differences(free, ours(td.ddim, betas, 20, clip=None)) < LARGEST


@otherwise
@pytest.mark.parametrize("variance", ["small", "large"])
def test_noise_at_the_end(variance):
    """Noise is left out at their t = 0 alone, where "trailing" does not end but with all steps.
    "small" is 0 there, clamped at 1e-20; "large" is 1 - abar_t: grain in the finished picture.
    """
    with doubled():
        scheduler = make(DDPMScheduler, timestep_spacing="trailing",
                         variance_type=f"fixed_{variance}")
        their = theirs(scheduler, 50)[-1]
        noise = TorchNoise()
        z = [noise.standard_normal(their.shape, np.float64) for _ in range(50)][-1]
    our = ours(td.ddpm, td.linear_betas(T), 50, variance=variance)[-1]
    abar = td.Diffusion(td.linear_betas(T)).abar[20]
    deviation = {"small": 1e-10, "large": (1 - abar) ** 0.5}
    np.testing.assert_allclose(their - our, deviation[variance] * z, rtol=1e-4)
    assert deviation["large"] > 0.07            # of pictures from -1 to 1


@otherwise
def test_eps_at_zero_snr():
    """Of x_T, which is eps, x0 cannot be told; theirs divides by 0, or by 2^-12, and clips."""
    x = torch.tensor(start())
    for scheduler in (make(cls, rescale_betas_zero_snr=True, timestep_spacing="trailing")
                      for cls in (DDPMScheduler, DDIMScheduler, Multistep)):
        scheduler.set_timesteps(20)
        x0 = scheduler.step(0.9 * x, T - 1, x)
        if isinstance(scheduler, Multistep):
            assert scheduler.alphas_cumprod[-1] == 2 ** -24
        else:
            assert np.array_equal(x0.pred_original_sample, x.sign())    # 0.1 x / 0, clipped
    with pytest.raises(ValueError, match="zero SNR"):
        ours(td.ddim, td.zero_terminal_snr(td.linear_betas(T)), 20)


@otherwise
def test_nan_at_zero_snr():
    """At eta = 1, sigma^2 is 1 - abar_s to rounding, and what is left for eps a root of 0, or
    of -6e-8. Ours is held at 0, and is DDPM's step."""
    scheduler = make(DDIMScheduler, "v", rescale_betas_zero_snr=True,
                     timestep_spacing="trailing")
    x, lost = start(dtype=np.float32), []
    d = td.Diffusion(td.zero_terminal_snr(td.linear_betas(T)))
    for steps in range(1, 101):
        scheduler.set_timesteps(steps)
        out = scheduler.step(torch.tensor(x), T - 1, torch.tensor(x), eta=1.0).prev_sample
        if torch.isnan(out).any():
            lost.append(steps)
        _, our = next(td.ddim(model, d, x, TorchNoise(), steps=steps, eta=1.0, kind="v"))
        assert np.isfinite(our).all()
    assert {3, 4, 6, 8, 9, 10} < set(lost)
    for (_, a), (_, b) in zip(*(sampler(model, d, start(), TorchNoise(), steps=10, kind="v")
                                for sampler in (td.ddpm, lambda *args, **options: td.ddim(
                                    *args, eta=1.0, **options)))):
        assert difference(a, b) < 1e-7          # an abar off by 1e-16 leaves 1e-8 of x


@otherwise
def test_threshold_by_default():
    """sample_max_value is 1 by default and bounds the quantile: nothing is divided."""
    x = 3 * start()
    scheduler = DDPMScheduler(T, thresholding=True)
    assert np.array_equal(scheduler._threshold_sample(torch.tensor(x)), np.clip(x, -1, 1))
    assert difference(np.clip(x, -1, 1), td.dynamic_threshold(x)) > 0.1


@otherwise
def test_the_solver_unclipped():
    """It has no clip_sample; its x0 leaves [-1, 1] where ours would not."""
    scheduler = make(Multistep, timestep_spacing="trailing")
    assert "clip_sample" not in scheduler.config
    their = theirs(scheduler, 5)
    assert np.abs(their[-1]).max() > 2
    assert np.abs(ours(td.dpm_solver, td.linear_betas(T), 5)[-1]).max() <= 1


def report():
    """Print the table; return whether everything in it is small enough."""
    print(f"diffusers {diffusers.__version__} made to use float64: the largest difference, "
          "relative to the largest value\n")
    found = {what: compare() for what, compare in ROWS.items()}
    for what, size in found.items():
        print(f"{what:34}{size:10.1e}")
    print(f"\nthe largest of all: {max(found.values()):.1e}; allowed: {LARGEST:.0e}")
    return max(found.values()) <= LARGEST


if __name__ == "__main__":
    raise SystemExit(0 if report() else 1)
