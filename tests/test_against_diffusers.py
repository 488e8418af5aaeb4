"""Schedules, forward process and samplers against diffusers (0.42.1), on one wrong, nonlinear
model.

Their tables are float32. doubled() has their own code make and use float64 ones: what then
differs is the formula. As they come, they agree to float32's rounding: 1e-6 of abar, 2e-5 of a
sample.

    python tests/test_against_diffusers.py      what, and its largest relative difference

Where they do otherwise, and what is compared here (rows: of docs/ERRATA.md):
    they number steps from 0, and tell the model t - 1      theirs() tells it t
    DDIM clips x0 and keeps the eps predicted, as row 8     use_clipped_model_output
    DDIM goes to t - T // N, as row 6                       N that divide T
    "trailing" goes below 0, as row 33                      N for which it does not
    DDIM is NaN at zero SNR and eta = 1, as row 34          eta of 0 and .5
    DDPM's last step, if not from t = 1, adds noise         all steps but that one
    the multistep solver has other steps and no clipping    on its steps, unclipped
"""
import sys
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
torch = pytest.importorskip("torch", reason="PyTorch is not installed: tests/requirements.txt")
diffusers = pytest.importorskip(
    "diffusers", reason="diffusers is not installed: tests/requirements.txt")

from diffusers import (DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler,  # noqa
                       DPMSolverMultistepScheduler as Multistep)

import tinyddpm as td                                                           # noqa: E402
from common import SPACINGS                                                     # noqa: E402

pytestmark = [
    pytest.mark.skipif(td.xp is not np, reason="these run with TINYDDPM_BACKEND=numpy"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")]
faults = pytest.mark.skipif(diffusers.__version__ != "0.42.1",
                            reason="a fault of diffusers 0.42.1; another may have mended it")
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
    """The largest difference, relative to the largest of ours; of two walks, at any step."""
    if isinstance(ours, list):
        return max(difference(a, b) for a, b in zip(theirs, ours, strict=True))
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.abs(theirs - ours).max() / np.abs(ours).max())


def start(seed=0, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal((2, 1, 3, 4)).astype(dtype)


def model(x, t):
    """Neither right nor linear, and another at every step."""
    return np.tanh(2 * x + 0.01 * t.reshape(-1, 1, 1, 1)).astype(x.dtype)


class TorchNoise(np.random.Generator):
    """Draws what torch.Generator does."""

    def __init__(self):
        super().__init__(np.random.PCG64(0))
        self.torchs = torch.Generator().manual_seed(0)

    def standard_normal(self, shape, dtype):
        dtype = getattr(torch, np.dtype(dtype).name)
        return torch.randn(shape, generator=self.torchs, dtype=dtype).numpy()


def ours(sampler, betas, kind, steps, dtype=np.float64, **options):
    """All x that our sampler yields."""
    d = td.Diffusion(betas, kind)
    return [x for _, x in sampler(model, d, start(dtype=dtype), TorchNoise(), steps=steps,
                                  **options)]


def theirs(cls, kind, spacing, steps, dtype=np.float64, in_step={}, **options):
    """All x on their way, and the steps, numbered as ours."""
    with doubled() if dtype is np.float64 else nullcontext():
        scheduler = cls(T, prediction_type=PREDICTIONS[kind], timestep_spacing=spacing,
                        **options)
        scheduler.set_timesteps(steps)
        x, noise, out = torch.tensor(start(dtype=dtype)), TorchNoise().torchs, []
        for t in scheduler.timesteps:
            answer = torch.tensor(model(x.numpy(), np.full(len(x), int(t) + 1)))
            x = scheduler.step(answer, t, x, generator=noise, **in_step).prev_sample
            out.append(x.numpy())
    return out, [int(t) + 1 for t in scheduler.timesteps]


# ----------------------------------------------------------------------------- what is the same

def schedule(name, T, zero_snr=False):
    """beta and abar, each number relative to itself; 1 - abar where abar is near 1."""
    with doubled():
        their = DDPMScheduler(T, beta_schedule=name, rescale_betas_zero_snr=zero_snr)
    betas = NAMES[name](T)
    d = td.Diffusion(td.zero_terminal_snr(betas) if zero_snr else betas, "v")
    abar, end = their.alphas_cumprod.numpy(), T - 1 if zero_snr else T
    assert not zero_snr or abar[-1] == d.abar[-1] == 0
    return max(np.abs(a / b - 1).max() for a, b in [
        (their.betas.numpy(), d.beta[1:]), (abar[:end], d.abar[1:end + 1]),
        (1 - abar, 1 - d.abar[1:])])


def forward(t):
    """add_noise and get_velocity: q_sample and the target of a model of v."""
    with doubled():
        their, d = DDPMScheduler(T), td.Diffusion(td.linear_betas(T), "v")
        x0, eps = start(1), start(2)
        arguments = torch.tensor(x0), torch.tensor(eps), torch.tensor(t - 1)
        return max(difference(their.add_noise(*arguments), d.q_sample(x0, t, eps)),
                   difference(their.get_velocity(*arguments), d.target(x0, eps, t)))


def ddpm(kind, variance, spacing, clip, steps):
    their, _ = theirs(DDPMScheduler, kind, spacing, steps, clip_sample=bool(clip),
                      variance_type=f"fixed_{variance}")
    our = ours(td.ddpm, td.linear_betas(T), kind, steps, spacing=spacing, variance=variance,
               clip=clip)
    end = -1 if spacing == "trailing" else None
    return difference(their[:end], our[:end])


def ddim(kind, eta, spacing, clip, steps, name="linear", zero_snr=False, dtype=np.float64):
    their, _ = theirs(DDIMScheduler, kind, spacing, steps, dtype, clip_sample=bool(clip),
                      beta_schedule=name, rescale_betas_zero_snr=zero_snr,
                      in_step={"eta": eta, "use_clipped_model_output": True})
    betas = td.zero_terminal_snr(NAMES[name](T)) if zero_snr else NAMES[name](T)
    our = ours(td.ddim, betas, kind, steps, dtype, spacing=spacing, eta=eta, clip=clip)
    assert {x.dtype for x in their + our} == {np.dtype(dtype)}
    return difference(their, our)


def solver(kind, spacing, steps, name="linear"):
    their, route = theirs(Multistep, kind, spacing, steps, beta_schedule=name)
    return difference(their, ours(td.dpm_solver, NAMES[name](T), kind, route, clip=None))


def flow(steps):
    """Their x is (1 - u) x0 + u eps, ours the same at unit variance."""
    u = td.timesteps(T, steps) / T
    size = ((1 - u) ** 2 + u ** 2) ** 0.5
    with doubled():
        scheduler = FlowMatchEulerDiscreteScheduler(T)
        scheduler.set_timesteps(sigmas=u.tolist())
        x, their = torch.tensor(start()), []
        for t, scale in zip(scheduler.timesteps, size):
            answer = model(x.numpy() / scale, np.full(len(x), round(float(t))))
            x = scheduler.step(torch.tensor(answer), t, x).prev_sample
            their.append(x.numpy())
    our = ours(td.ddim, td.flow_betas(T), "flow", steps, clip=None)
    return difference(their, [x * scale for x, scale in zip(our, [*size[1:], 1])])


def largest(function, *choices):
    """The largest difference over all combinations of the choices."""
    return lambda: max(function(*choice) for choice in product(*choices))


CLIPS, TWO = [(-1, 1), None], ["linear", "squaredcos_cap_v2"]
ROWS = {
    "schedules": largest(schedule, NAMES, [1, 50, 1000]),
    "zero SNR": largest(schedule, NAMES, [50, 1000], [True]),
    "q_sample, v": largest(forward, [1, 2, 500, 1000]),
    **{f"DDPM, {kind}": largest(ddpm, [kind], ["small", "large"], SPACINGS, CLIPS, [20])
       for kind in PREDICTIONS},
    "DDPM, 7 steps": largest(ddpm, ["eps"], ["small"], SPACINGS[:2], CLIPS, [7]),
    **{f"DDIM, {kind}": largest(ddim, [kind], [0.0, 0.5, 1.0], SPACINGS[:2], CLIPS, [20], TWO)
       for kind in PREDICTIONS},
    "DDIM, zero SNR": largest(ddim, ["x0", "v"], [0.0, 0.5], ["trailing"], CLIPS, [20],
                              ["linear"], [True]),
    **{f"DPM-Solver++(2M), {kind}": largest(solver, [kind], SPACINGS, [1, 2, 5, 20], TWO)
       for kind in PREDICTIONS},
    "flow matching, Euler": largest(flow, [1, 4, 50]),
}


@pytest.mark.parametrize("what", ROWS)
def test_same_as_diffusers_in_float64(what):
    assert ROWS[what]() <= LARGEST


def test_as_they_come():
    """Float32 tables and pictures: abar to a millionth, samples to 2e-5 of the largest."""
    for name, betas in NAMES.items():
        abar = DDPMScheduler(T, beta_schedule=name).alphas_cumprod.numpy()
        assert np.abs(abar - td.Diffusion(betas(T)).abar[1:]).max() < 1e-6
    for kind in PREDICTIONS:
        assert ddim(kind, 0.5, "leading", (-1, 1), 20, dtype=np.float32) < 2e-5


@pytest.mark.parametrize("spacing, same", [("trailing", 277), ("leading", 300),
                                           ("linspace", 150)])
def test_steps(spacing, same):
    """For so many of 300 numbers of steps they are the same. In the others of "trailing" and
    "linspace" a half, or what is one but for rounding, goes the other way."""
    scheduler, found = DDPMScheduler(T, timestep_spacing=spacing), 0
    for steps in range(2, 302):
        scheduler.set_timesteps(steps)
        away = scheduler.timesteps.numpy()[:steps] + 1 - td.timesteps(T, steps, spacing)
        found += not away.any() and len(scheduler.timesteps) == steps
        assert np.abs(away).max() <= 1
    assert found >= same


# ---------------------------------------------------------- their faults that these tests found

@faults
def test_trailing_goes_below_0():
    """arange(T, 0, -T/N) comes to 1e-13 in place of 0, and stays in."""
    _, route = theirs(DDPMScheduler, "eps", "trailing", 61)
    assert route == [*td.timesteps(T, 61), 0]


@faults
def test_ddim_misses_its_steps():
    """From 1000 it goes to 1000 - 1000 // 7 = 858; the model is next told 857."""
    their, _ = theirs(DDIMScheduler, "eps", "trailing", 7, clip_sample=False)
    there, told = (ours(td.ddim, td.linear_betas(T), "eps", [T, s], clip=None)[0]
                   for s in (858, td.timesteps(T, 7)[1]))
    assert difference(their[0], there) < LARGEST < 1e-3 < difference(their[0], told)


@faults
def test_nan_at_zero_snr():
    """At eta = 1, what is left for eps is the root of 0, or of -6e-8."""
    their, _ = theirs(DDIMScheduler, "v", "trailing", 10, np.float32, {"eta": 1.0},
                      rescale_betas_zero_snr=True)
    assert np.isnan(their[0]).all()


if __name__ == "__main__":
    print(f"diffusers {diffusers.__version__} in float64: largest differences, relative")
    for what, compare in ROWS.items():
        print(f"{what:34}{compare():10.1e}")
