"""Denoising diffusion in one file: NumPy, CuPy where there is a GPU, every gradient by hand.

Read it from top to bottom; a helper stands just below what calls it. For the mathematics
alone, stop before "layers".

    noise schedules     beta_1..beta_T, the noise added at each step
    Diffusion           the forward process q, its posterior, conversions, the likelihood
    samplers            DDPM, DDIM, DPM-Solver++, Heun; guidance; for any model(x, t)
    layers, U-Net       each layer is a function that returns its value and its backward
    training            AdamW, Muon, EMA, checkpoints, the loop
    python tinyddpm.py  checks every gradient against finite differences

Notation, in the code, in the papers, and in words
    t         t            the step, an integer 1..T, of T in all; index 0 is clean data
    s         t-1          the step that a sampler goes to next, 0 <= s < t
    x0, xt    x_0, x_t     clean and noisy images (B, H, W, C), floats in [-1, 1] when clean
    eps       epsilon      the noise in xt, standard normal, of the shape of x0
    beta      beta_t       the variance of the noise that step t adds                  (T+1,)
    alpha     alpha_t      1 - beta_t                                                  (T+1,)
    abar      alpha-bar_t  alpha_1 ... alpha_t: the share of x0's variance left in xt  (T+1,)
    snr       SNR(t)       abar_t / (1 - abar_t)                                       (T+1,)
    v         v_t          sqrt(abar) eps - sqrt(1 - abar) x0
    eta       eta          DDIM's noise: 0 is deterministic, 1 is DDPM
    w         w            guidance weight: 0 unconditional, 1 conditional, more is stronger
    y                      labels; among the layers, a layer's value
    p, g                   parameters and their gradients
    dx                     the gradient of the loss with respect to x, for any x
    B, H, W, C, D, E       batch, height, width, channels in, channels out, embedding

Papers, by the names used below
    DDPM           Ho et al. 2020, arXiv 2006.11239
    DDIM           Song et al. 2021, 2010.02502
    iDDPM          Nichol & Dhariwal 2021, 2102.09672         cosine schedule
    ADM            Dhariwal & Nichol 2021, 2105.05233         adaptive group norm
    LDM            Rombach et al. 2022, 2112.10752            quadratic schedule
    Diffusion-LM   Li et al. 2022, 2205.14217                 sqrt schedule
    GeoDiff        Xu et al. 2022, 2203.02923                 sigmoid schedule
    v-prediction   Salimans & Ho 2022, 2202.00512
    EDM            Karras et al. 2022, 2206.00364             Karras schedule, Heun's method
    DPM-Solver++   Lu et al. 2022, 2211.01095
    CFG            Ho & Salimans 2022, 2207.12598             classifier-free guidance
    Interval       Kynkaanniemi et al. 2024, 2404.07724       guidance at some steps only
    Imagen         Saharia et al. 2022, 2205.11487            dynamic thresholding
    Muon           Jordan et al. 2024, kellerjordan.github.io/posts/muon
    Min-SNR        Hang et al. 2023, 2303.09556               loss weights
    ZeroSNR        Lin et al. 2024, 2305.08891                zero terminal SNR, trailing steps
"""
import contextlib
import copy
import json
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np


# ------------------------------------------------------------------------ backend, and checks

def one_of(name, value, allowed):
    """A ValueError unless value is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it may be " + ", ".join(map(repr, allowed)))


def whole(name, value):
    """The value, if it is an integer of at least 1; else a ValueError."""
    if not wholes([value]):
        raise ValueError(f"{name} is {value!r}; it has to be an integer of at least 1")
    return value


def wholes(values):
    """Whether all are integers of at least 1."""
    return all(isinstance(n, (int, np.integer)) and n >= 1 for n in values)


def within(name, value, low, high):
    """A ValueError unless the value is from low to high."""
    if not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; it has to be from {low} to {high}")


def choose_backend(choice=""):
    """The array module to compute with: cupy where a product on the GPU works, else numpy.

    choice: "numpy" or "cupy" decides by hand, as TINYDDPM_BACKEND does; "" tries cupy first.
    Asking for cupy where it does not work is a RuntimeError that says why.
    """
    one_of("TINYDDPM_BACKEND", choice, ("", "numpy", "cupy"))
    if choice == "numpy":
        return np
    try:
        import cupy
        one = cupy.ones((2, 2), "float32")
        if float((one @ one).sum()) == 8:       # an import alone succeeds without a GPU too
            return cupy
        why = "a 2x2 matrix product came out wrong"
    except Exception as error:  # a driver without its libraries fails in many ways
        why = f"{type(error).__name__}: {error}".splitlines()[0]
    if choice == "cupy":
        raise RuntimeError(f"TINYDDPM_BACKEND is 'cupy', but CuPy does not work here ({why})")
    return np


xp = choose_backend(os.environ.get("TINYDDPM_BACKEND", ""))


def asnumpy(a):
    """The array on the host (in the CPU's memory), as NumPy, wherever it is."""
    return a.get() if hasattr(a, "get") else np.asarray(a)


def normal(rng, shape, dtype=np.float32):
    """Standard normal noise on the device, where xp computes. rng: a NumPy or CuPy one."""
    if not hasattr(rng, "standard_normal"):
        raise ValueError(f"rng is {rng!r}; it has to be a NumPy or CuPy Generator")
    return xp.asarray(rng.standard_normal(shape, dtype=dtype))


# -------------------------------------------------------------------------- noise schedules
# Each returns float64 (T,), its entry i being beta_{i+1}, on the host.

def checked_betas(betas):
    """The betas as float64 (T,). One outside (0, 1], or 1 before the last, is a ValueError."""
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or not len(betas):
        raise ValueError(f"betas have shape {betas.shape}; they have to be (T,) with T >= 1")
    wrong = np.flatnonzero(~((1 - betas < 1) & (betas <= 1)))   # 1 - 1e-17 is 1
    if len(wrong):
        raise ValueError(f"beta_{wrong[0] + 1} of {len(betas)} is {betas[wrong[0]]:.4g}; "
                         "every beta has to be above 0 and at most 1")
    if np.any(betas[:-1] == 1):
        raise ValueError(f"beta_{np.argmax(betas) + 1} of {len(betas)} is 1; only the last may "
                         "be, as no signal is left after it")
    return betas


def betas_from_abar(abar, max_beta=1.0):
    """beta_t = 1 - abar_t / abar_{t-1}, at most max_beta. abar: (T+1,), starting at 1; where a
    formula overshoots to below 0, it counts as 0."""
    abar = np.maximum(abar, 0)
    return checked_betas(np.minimum(1 - abar[1:] / np.maximum(abar[:-1], 1e-300), max_beta))


def linear_betas(T, start=1e-4, end=0.02):
    """Equal steps of beta (DDPM section 4). Made for T = 1000; see scaled_linear_betas."""
    return checked_betas(np.linspace(start, end, whole("T", T)))


def scaled_linear_betas(T, start=1e-4, end=0.02):
    """linear_betas with both ends times 1000/T, so that x_T is noise for a short T too (iDDPM's
    code). At T = 20 the last beta is 1; at 2 to 19 it would pass 1: a ValueError. In diffusers
    this name means quadratic_betas."""
    scale = 1000 / whole("T", T)
    return checked_betas(np.linspace(scale * start, scale * end, T))


def quadratic_betas(T, start=1e-4, end=0.02):
    """Equal steps of sqrt(beta) (DDIM's code; LDM's "linear", diffusers' "scaled_linear")."""
    start, end = checked_betas([start, end]) ** 0.5
    return checked_betas(np.linspace(start, end, whole("T", T)) ** 2)


def cosine_betas(T, s=0.008, max_beta=0.999):
    """abar_t = f(t) / f(0), f(t) = cos^2((t/T + s) / (1 + s) pi/2) (iDDPM eq. 17).

    beta is capped at max_beta: uncapped, beta_T = 1 and x_T would know nothing of x0.
    """
    u = np.arange(whole("T", T) + 1) / T
    f = np.cos((u + s) / (1 + s) * np.pi / 2) ** 2
    return betas_from_abar(f / f[0], max_beta)


def sigmoid_betas(T, start=1e-4, end=0.02):
    """beta, not abar, follows a sigmoid from -6 to 6 (GeoDiff's code)."""
    rise = 1 / (1 + np.exp(-np.linspace(-6, 6, whole("T", T))))
    return checked_betas(start + (end - start) * rise)


def sqrt_betas(T, s=1e-4, max_beta=0.999):
    """abar_t = 1 - sqrt(t/T + s) (Diffusion-LM, appendix A): noise of standard deviation
    (1/T + s)^(1/4) in the first step, then slowly more. Their code also divides by abar_0.
    abar_T would be below 0; max_beta caps the last beta."""
    abar = 1 - np.sqrt(np.arange(whole("T", T) + 1) / T + s)
    abar[0] = 1
    return betas_from_abar(abar, max_beta)


def karras_betas(T, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """abar_t = 1 / (1 + sigma_t^2), sigma being noise over signal; sigma^(1/rho) rises in equal
    steps (EDM eq. 5). EDM made it a sampling grid, from sigma_max down; as a forward process it
    has to ascend."""
    if not (0 < sigma_min <= sigma_max < math.inf and rho > 0):
        raise ValueError(f"sigma is from {sigma_min} to {sigma_max}, rho {rho}; they have to "
                         "be above 0 and to ascend")
    sigma_min, sigma_max = np.float64([sigma_min, sigma_max])   # for which 1e300 ** 9 is inf
    root = np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), whole("T", T))
    sigma = root[::-1] ** rho
    return betas_from_abar(np.concatenate([[1], 1 / (1 + sigma ** 2)]))


SCHEDULES = {"linear": linear_betas, "scaled_linear": scaled_linear_betas,
             "quadratic": quadratic_betas, "cosine": cosine_betas, "sigmoid": sigmoid_betas,
             "sqrt": sqrt_betas, "karras": karras_betas}


def zero_terminal_snr(betas):
    """The schedule with sqrt(abar) shifted to end at exactly 0 and stretched to start where it
    did (ZeroSNR Algorithm 1). For models of v or x0: as x_T is eps itself, predicting eps there
    teaches nothing of x0."""
    root = np.sqrt(np.cumprod(1 - checked_betas(betas)))
    if len(root) < 2:
        raise ValueError("zero_terminal_snr needs at least 2 betas; it was given 1")
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return betas_from_abar(np.concatenate([[1], root ** 2]))


# ---------------------------------------------------------------------- the forward process

KINDS = ("eps", "x0", "v")      # what a model may predict; with xt, any one gives the others
WEIGHTINGS = ("simple", "snr", "min_snr")


class Diffusion:
    """The process that turns an image into noise, and all that is known of it exactly.

    betas: (T,), see the schedules. Tables .beta .alpha .abar .snr are host float64 of length
    T+1; index 0 is clean data: beta 0, abar 1, snr infinite.

    In every method t is an integer of 1..T, or (B,) of them, one for each image; best on the
    host, where it is checked. x0, xt, eps and a model's output are float arrays of one shape
    (B, ...). Anything else is a ValueError.
    """

    def __init__(self, betas):
        self.beta = np.concatenate([[0.0], checked_betas(betas)])
        self.alpha = 1 - self.beta
        self.abar = np.cumprod(self.alpha)
        self.T = len(self.beta) - 1
        if self.abar[-2] < 1e-300:      # so small, it would lose its digits
            raise ValueError(f"the betas add up to {self.beta.sum():.4g}, so abar_{self.T - 1} "
                             f"is {self.abar[-2]:.2g}; it has to be at least 1e-300")
        with np.errstate(divide="ignore"):
            self.snr = self.abar / (1 - self.abar)

    def q_sample(self, x0, t, eps):
        """x_t in one go: sqrt(abar_t) x0 + sqrt(1 - abar_t) eps (DDPM eq. 4)."""
        signal, noise = self._signal_noise(t, x0, eps)
        return signal * x0 + noise * eps

    def q_step(self, x_prev, t, eps):
        """x_t from x_{t-1}: sqrt(1 - beta_t) x_prev + sqrt(beta_t) eps (DDPM eq. 2)."""
        t = self._checked(t, x_prev, eps)
        return (factor(self.alpha[t] ** 0.5, x_prev) * x_prev
                + factor(self.beta[t] ** 0.5, eps) * eps)

    def q_posterior(self, x0, xt, t, s=None):
        """Mean and variance of q(x_s | x_t, x0), s = t-1 unless given (DDPM eqs. 6, 7).

        For a longer jump, s < t-1, the steps between act as one of alpha = abar_t / abar_s. The
        variance is a float where t is an integer, else (B, 1, ...), and 0 at s = 0.
        """
        t = self._checked(t, x0, xt)
        s = t - 1 if s is None else np.asarray(s)
        if s.shape != t.shape or s.dtype.kind not in "iu" or not np.all((0 <= s) & (s < t)):
            raise ValueError(f"s is {s} and t is {t}; the step to go back to has to be an "
                             "integer of 0..t-1, one for each t")
        abar, abar_s = self.abar[t], self.abar[s]
        alpha = abar / abar_s
        of_x0 = abar_s ** 0.5 * (1 - alpha) / (1 - abar)
        of_xt = alpha ** 0.5 * (1 - abar_s) / (1 - abar)
        var = (1 - alpha) * (1 - abar_s) / (1 - abar)
        return factor(of_x0, x0) * x0 + factor(of_xt, xt) * xt, factor(var, x0)

    # With xt, any one of eps, x0 and v gives the other two (but no eps gives x0 at zero SNR).

    def to_x0(self, xt, t, out, kind):
        """x0 from a model's output, which is "eps", "x0" or "v" according to kind."""
        signal, noise = self._signal_noise(t, xt, out, kind=kind)
        if kind == "x0":
            return out
        if kind == "v":
            return signal * xt - noise * out
        if not np.all(self.abar[asnumpy(t)]):
            raise ValueError("kind is 'eps' at a step of zero SNR, where xt is eps whatever x0 "
                             "was; a model for this schedule has to predict 'v' or 'x0'")
        return (xt - noise * out) / signal

    def to_eps(self, xt, t, out, kind):
        """eps from a model's output, which is "eps", "x0" or "v" according to kind."""
        signal, noise = self._signal_noise(t, xt, out, kind=kind)
        if kind == "eps":
            return out
        return noise * xt + signal * out if kind == "v" else (xt - signal * out) / noise

    def target(self, x0, eps, t, kind):
        """What a model of that kind should answer: eps, x0 or v (v-prediction, section 4)."""
        signal, noise = self._signal_noise(t, x0, eps, kind=kind)
        return {"eps": eps, "x0": x0, "v": signal * eps - noise * x0}[kind]

    def score(self, xt, t, eps):
        """The gradient of log q(x_t) that this eps means: -eps / sqrt(1 - abar_t); for the true
        eps, that of log q(x_t | x0), which is normal (DDPM eq. 4)."""
        _, noise = self._signal_noise(t, xt, eps)
        return -eps / noise

    def loss_weight(self, t, kind, how, gamma=5.0):
        """Factor for the squared error of a prediction of that kind at t; float64, t's shape.

        "simple" is 1 for every kind; "snr" turns the error of any kind into that of eps, DDPM
        eq. 14; "min_snr" is the same with the SNR held to gamma (Min-SNR section 3.4). For one
        x_t, |eps error|^2 is snr times |x0 error|^2, and |v error|^2 is snr + 1 times.
        """
        snr = self.snr[self._checked(t, kind=kind)]
        one_of("how", how, WEIGHTINGS)
        within("gamma", gamma, 0, math.inf)
        if how == "simple":
            return np.ones_like(snr)
        top = gamma if how == "min_snr" else np.inf
        with np.errstate(divide="ignore"):          # at zero SNR the weight of eps is 1
            return {"eps": np.minimum(1, top / snr), "x0": np.minimum(snr, top),
                    "v": np.minimum(snr, top) / (snr + 1)}[kind]

    def bits_per_dim(self, model, x0, rng, kind="eps"):
        """The variational bound on -log2 p(x0) per pixel and channel (DDPM eqs. 5 and 13).

        model(x, t): any callable, to a prediction of that kind; t is (B,) integers. x0:
        (B, ...), bytes scaled to [-1, 1]. Every step asks the model once, at one draw of
        x_t; the reverse variance is the posterior's. A dict of means over the batch:
            "prior"    KL(q(x_T|x0) || N(0, 1)), the same for every model
            "steps"    KL(q(x_{t-1}|x_t,x0) || p(x_{t-1}|x_t)) for t = 2..T, float64 (T-1,)
            "decoder"  -log2 p(x0|x_1), the Gaussian integrated over x0's bin
            "total"    their sum
        """
        self._checked(1, x0, kind=kind)
        within("the largest size in x0", largest(x0), 0, 1.001)
        bits, abar = 1 / math.log(2), float(self.abar[-1])
        prior = 0.5 * bits * float((abar * x0 ** 2 - abar - math.log1p(-abar)).mean())
        kl = np.zeros(self.T + 1)
        for t in range(self.T, 0, -1):
            xt = self.q_sample(x0, t, normal(rng, x0.shape, x0.dtype))
            out = model(xt, xp.full(len(xt), t))
            guess = xp.clip(self.to_x0(xt, t, out, kind), -1, 1)
            if t > 1:
                mean, var = self.q_posterior(x0, xt, t)
                error = self.q_posterior(guess, xt, t)[0] - mean
                kl[t] = bits * float((error ** 2).mean()) / (2 * var)
        # guess is now that of t = 1, where the posterior's mean is x0 itself and its variance
        # is 0; the decoder takes the variance of t = 2 (DDPM's code).
        var = self.beta[1] if self.T == 1 else self.q_posterior(x0, x0, 2)[1]
        decoder = -bits * float(np.log(bin_probability(x0, guess, var ** 0.5)).mean())
        return {"prior": prior, "steps": kl[2:], "decoder": decoder,
                "total": prior + kl.sum() + decoder}

    def _signal_noise(self, t, *arrays, kind="eps"):
        """sqrt(abar_t) and sqrt(1 - abar_t), ready to multiply the arrays."""
        abar = self.abar[self._checked(t, *arrays, kind=kind)]
        return factor(abar ** 0.5, arrays[0]), factor((1 - abar) ** 0.5, arrays[0])

    def _checked(self, t, *arrays, kind="eps"):
        """t as an integer or a host array, once it, the arrays and kind are found to fit."""
        one_of("kind", kind, KINDS)
        for a in arrays:
            if (not hasattr(a, "dtype") or a.shape != arrays[0].shape or not a.ndim
                    or a.dtype.kind != "f"):
                given = " and ".join(f"{getattr(b, 'dtype', type(b).__name__)} {np.shape(b)}"
                                     for b in arrays)
                raise ValueError(f"the arrays are {given}; they have to be floats of one shape "
                                 "(B, ...)")
        t = asnumpy(t)
        if t.dtype.kind not in "iu" or t.ndim > 1 or not np.all((1 <= t) & (t <= self.T)):
            raise ValueError(f"t is {t}; it has to be one integer, or (B,), of 1..{self.T}")
        if t.ndim and arrays and t.shape != arrays[0].shape[:1]:
            raise ValueError(f"t has shape {t.shape} for arrays of shape {arrays[0].shape}; it "
                             f"has to be one integer, or {len(arrays[0])}, one for each image")
        return t if t.ndim else t[()]


def factor(value, x):
    """A coefficient ready to multiply x: one as a Python float (a NumPy float64 would promote
    float32), (B,) of them as (B, 1, ...) in x's type and on its device."""
    if np.ndim(value) == 0:
        return float(value)
    return xp.asarray(value, x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def bin_probability(x, mean, std):
    """Probability that a normal variable of this mean and standard deviation falls in the bin
    of byte x, scaled to [-1, 1] (DDPM eq. 13). The bins of -1 and 1 take the whole tail. At
    least 1e-300, so that its logarithm is finite."""
    x, mean = asnumpy(x).astype(np.float64), asnumpy(mean).astype(np.float64)
    low = np.where(x < -0.999, -np.inf, (x - 1 / 255 - mean) / std)
    high = np.where(x > 0.999, np.inf, (x + 1 / 255 - mean) / std)
    # Both ends to the left, where the tail keeps its digits: 1 - 1e-20 is 1, 1e-20 is not 0.
    flip = low + high > 0
    low, high = np.where(flip, -high, low), np.where(flip, -low, high)
    erfc = np.frompyfunc(math.erfc, 1, 1)       # NumPy has none of its own
    p = 0.5 * (erfc(-high / 2 ** 0.5) - erfc(-low / 2 ** 0.5)).astype(np.float64)
    return np.maximum(p, 1e-300)


# --------------------------------------------------------------------- samplers and guidance
# A model is any callable model(x, t) -> prediction, with x (B, ...) and t (B,) integers. A
# sampler is a generator: it yields (t, x_t) after every step, so that a progress bar, a film,
# an early stop or inpainting (write into x_t) is a `for` loop in the caller's code.

def timesteps(T, steps, spacing="trailing"):
    """`steps` of the T steps, descending, integers (steps,) (ZeroSNR Table 2).

    "trailing" starts at T, where x is pure noise; "linspace" has both ends, T and 1; "leading",
    long the usual one, starts below T, where x is not yet noise (unless steps = T).
    """
    if not 1 <= whole("steps", steps) <= whole("T", T):
        raise ValueError(f"steps is {steps}; of T = {T} steps it has to be 1..{T}")
    one_of("spacing", spacing, ("trailing", "leading", "linspace"))
    i = np.arange(steps)
    if spacing == "trailing":
        chosen = np.round(T - i * T / steps)
    elif spacing == "leading":
        chosen = (i * (T // steps) + 1)[::-1]
    else:
        chosen = np.round(np.linspace(T, 1, steps))
    return chosen.astype(int)


def ddpm(model, diffusion, x, rng, steps=None, spacing="trailing", variance="small", kind="eps",
         clip=(-1, 1)):
    """Ancestral sampling (DDPM Algorithm 2): x_s ~ N(posterior mean of x_s given x_t and the
    model's x0, variance).

    x: the start (B, ...), usually standard normal noise. steps: None for all of T..1, how many
    to take, or the descending steps themselves, from the one that x is at. variance: "small" is
    the posterior's, best for data of a single point; "large" is 1 - abar_t/abar_s (beta_t),
    best for standard normal data (DDPM section 3.2). kind: what the model predicts. clip:
    bounds for x0, None, or a function of x0 such as dynamic_threshold.
    """
    one_of("variance", variance, ("small", "large"))
    if rng is None:
        raise ValueError("rng is None; the noise of every step needs a Generator")

    def step(x, x0, t, s):
        mean, var = diffusion.q_posterior(x0, x, t, s)
        if variance == "large":
            var = 1 - float(diffusion.abar[t] / diffusion.abar[s])
        return mean + var ** 0.5 * normal(rng, x.shape, x.dtype) if s else mean

    return walk(model, diffusion, x, steps, spacing, kind, clip, step)


def ddim(model, diffusion, x, rng=None, steps=50, eta=0.0, spacing="trailing", kind="eps",
         clip=(-1, 1)):
    """Implicit sampling (DDIM eqs. 12, 16): to the x_s that x0 and eps point at, with eta times
    DDPM's noise. At eta = 0 it is deterministic and needs no rng. Other arguments: see ddpm."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; it has to be from 0 (no noise) to 1 (DDPM)")
    if eta and rng is None:
        raise ValueError(f"eta is {eta} and rng is None; noise needs a Generator")

    def step(x, x0, t, s):
        abar, abar_s = float(diffusion.abar[t]), float(diffusion.abar[s])
        sigma = eta * math.sqrt((1 - abar_s) / (1 - abar) * (1 - abar / abar_s))
        eps = diffusion.to_eps(x, t, x0, "x0")      # of the clipped x0, so that the two agree
        x = abar_s ** 0.5 * x0 + max(0, 1 - abar_s - sigma ** 2) ** 0.5 * eps
        return x + sigma * normal(rng, x.shape, x.dtype) if sigma else x

    return walk(model, diffusion, x, steps, spacing, kind, clip, step)


def dpm_solver(model, diffusion, x, rng=None, steps=20, spacing="trailing", kind="eps",
               clip=(-1, 1)):
    """DPM-Solver++(2M) (DPM-Solver++ Algorithm 2): DDIM's step, towards an x0
    extrapolated from the last two predictions. One call of the model a step, an error of second
    order, and no noise: rng is there so that all samplers are called alike. See ddpm."""
    with np.errstate(divide="ignore"):
        lam = np.log(diffusion.snr) / 2         # x0 is taken as linear in lambda
    before = None                               # the last step: lambda, x0

    def step(x, x0, t, s):
        nonlocal before
        ahead = x0
        if before and s:                        # at s = 0, lambda is infinite
            share = (lam[s] - lam[t]) / (lam[t] - before[0]) / 2    # to half way from t to s
            ahead = x0 + float(share) * (x0 - before[1])
        before = lam[t], x0
        abar_s = float(diffusion.abar[s])
        eps = diffusion.to_eps(x, t, ahead, "x0")
        return abar_s ** 0.5 * ahead + (1 - abar_s) ** 0.5 * eps

    return walk(model, diffusion, x, steps, spacing, kind, clip, step)


def heun(model, diffusion, x, rng=None, steps=10, spacing="trailing", kind="eps",
         clip=(-1, 1)):
    """Heun's method on the probability-flow ODE (EDM Algorithm 1 without churn): an
    Euler step to s; then the step from t again, with the mean of the slopes at t and s. 2 steps
    - 1 calls of the model; no noise.

    The ODE is that of the angle phi: with x = cos(phi) x0 + sin(phi) eps, dx/dphi is v. (EDM's
    own variable, tan(phi), is infinite where a schedule ends in pure noise.)
    """
    def slope(x, x0, t):
        return diffusion.target(x0, diffusion.to_eps(x, t, x0, "x0"), t, "v")

    def step(x, x0, t, s):
        if not s:
            return x0
        phi, phi_s = (math.acos(diffusion.abar[i] ** 0.5) for i in (t, s))
        v = slope(x, x0, t)
        ahead = x + (phi_s - phi) * v
        v_s = slope(ahead, predict_x0(model, diffusion, ahead, s, kind, clip), s)
        return x + (phi_s - phi) * (v + v_s) / 2

    return walk(model, diffusion, x, steps, spacing, kind, clip, step)


def walk(model, diffusion, x, steps, spacing, kind, clip, step):
    """What the samplers share: check, then go down the steps, predict x0 at each, move on."""
    one_of("kind", kind, KINDS)
    if np.ndim(steps) == 0:
        steps = timesteps(diffusion.T, diffusion.T if steps is None else steps, spacing)
    if (not len(steps) or not wholes(steps) or steps[0] > diffusion.T
            or any(s >= t for t, s in zip(steps, steps[1:]))):
        raise ValueError(f"steps are {list(steps)}; they have to be integers that descend "
                         f"within {diffusion.T}..1")
    route = [*map(int, steps), 0]
    if not (clip is None or callable(clip) or len(clip) == 2 and clip[0] < clip[1]):
        raise ValueError(f"clip is {clip}; it has to be (low, high), None or a function")

    def run(x):     # apart, so that the checks above run at the call, not at the first next()
        for t, s in zip(route, route[1:]):
            x = step(x, predict_x0(model, diffusion, x, t, kind, clip), t, s)
            yield s, x
    return run(xp.asarray(x))


def predict_x0(model, diffusion, x, t, kind, clip):
    """The x0 that the model sees in x at step t, clipped."""
    return clamp(diffusion.to_x0(x, t, model(x, xp.full(len(x), t)), kind), clip)


def sample(sampler):
    """Run a sampler to its end; x_0."""
    for _, x in sampler:
        pass
    return x


def clamp(x0, clip):
    """x0 held to clip = (low, high), put through clip(x0), or left alone where clip is None."""
    if clip is None:
        return x0
    return clip(x0) if callable(clip) else xp.clip(x0, *clip)


def dynamic_threshold(x0, share=0.995):
    """Instead of clipping: where an image's values pass 1, clip at the quantile `share` of
    their absolute values and divide by it (Imagen section 2.3). Keeps strong guidance from
    saturating."""
    size = xp.quantile(xp.abs(x0).reshape(len(x0), -1), share, axis=1).astype(x0.dtype)
    size = xp.maximum(size, 1).reshape(-1, *[1] * (x0.ndim - 1))
    return xp.clip(x0, -size, size) / size


def guided(model, labels, null, w, rescale=0.0, interval=None):
    """model(x, t, y) -> a model(x, t): unconditional + w (conditional - unconditional).

    w = 1 is plain conditional and w = 0 unconditional; the weight in CFG eq. 6 is w - 1.
    labels: (B,) integers; null: the label that stands for none. Both predictions come from one
    call on a doubled batch. rescale: how far to bring each image's standard deviation back to
    that of the conditional prediction, 0 to 1 (ZeroSNR section 3.4; they use 0.7). interval:
    (low, high), the steps at which to guide; at others the conditional prediction is taken.
    Without guidance at the highest noise, samples vary more (Interval).
    """
    labels = xp.asarray(labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(f"labels are {labels.dtype} {labels.shape}; they have to be integers "
                         "(B,)")
    if interval and not interval[0] <= interval[1]:
        raise ValueError(f"interval is {interval}; it has to be (low, high) or None")
    within("w", w, -1e30, 1e30)
    within("rescale", rescale, 0, 1)
    nulls = xp.full_like(labels, null)
    if w == 1 or w == 0 and not interval:       # one of the two is not needed
        return lambda x, t: model(x, t, labels if w else nulls)
    both = xp.concatenate([labels, nulls])

    def guided_model(x, t):
        out = model(xp.concatenate([x, x]), xp.concatenate([t, t]), both)
        cond, uncond = out[:len(x)], out[len(x):]
        weight = w
        if interval:
            inside = (interval[0] <= t) & (t <= interval[1])
            weight = factor(xp.where(inside, w, 1), x)
        out = uncond + weight * (cond - uncond)
        if rescale:
            axes = tuple(range(1, x.ndim))
            cond_std, std = (a.std(axes, keepdims=True) + 1e-20 for a in (cond, out))
            ratio = cond_std / std                  # 1, and not 0/0, where both are flat
            out = out * (rescale * ratio + 1 - rescale)
        return out
    return guided_model


# --------------------------------------------------------------------------------- layers
# A layer returns its value y and a function `back`, nested in it. back(dy) gives dx, from the
# gradient of the loss with respect to y that with respect to x. Where the layer has parameters
# p, back(dy, g) also adds their gradients to g. Both are Trees, a class in the U-Net part: p.w
# is an array, p.norm another Tree. Read a `back` as its forward from the last line to the
# first: a product becomes one with the transpose, a broadcast a sum, a fork an addition.

def silu(x):
    """x sigmoid(x), also called swish."""
    s = xp.tanh(0.5 * x)        # in three steps the sigmoid, without the overflow of exp(-x)
    s += 1
    s *= 0.5
    y = x * s

    def back(dy):
        slope = 1 - s           # in three steps d/dx x s(x) = s + x s (1 - s)
        slope *= y
        slope += s
        return xp.multiply(dy, slope, out=slope)
    return y, back


def sum_rows(a):
    """The sum over all axes but the last, as ones @ a: where that axis is short, as channels
    are, a product is many times faster than a.sum."""
    rows = a.reshape(-1, a.shape[-1])
    return xp.ones(len(rows), a.dtype) @ rows


def linear(p, x):
    """x @ w + b on the last axis: (..., C) -> (..., D)."""
    rows = x.reshape(-1, x.shape[-1])
    y = rows @ p.w
    y += p.b

    def back(dy, g):
        dy = dy.reshape(y.shape)
        g.w += rows.T @ dy
        g.b += sum_rows(dy)                 # one b served every row
        return (dy @ p.w.T).reshape(x.shape)
    return y.reshape(*x.shape[:-1], -1), back


def windows(x, budget=2 ** 18):
    """The 3x3 window around every pixel of x (B, H, W, C), zero beyond the edge.

    Yields (rows, windows of these rows (n, 9 C)), where rows is a slice of the B H W pixels: a
    few images at a time, of about `budget` numbers, which on a CPU stay in the cache until the
    product has read them.
    """
    B, H, W, C = x.shape
    padded = xp.zeros((B, H + 2, W + 2, C), x.dtype)
    padded[:, 1:-1, 1:-1] = x
    b, h, w, c = padded.strides
    # Three neighbours in a row are 3 C numbers in a row, so a window is three runs of memory.
    runs = xp.lib.stride_tricks.as_strided(padded, (B, H, W, 3, 3 * C), (b, h, w, h, c))
    few = max(1, budget // (9 * C * H * W)) if xp is np else B
    for i in range(0, B, few):
        some = runs[i:i + few]
        yield slice(i * H * W, (i + len(some)) * H * W), some.reshape(-1, 9 * C)


def conv3x3(p, x):
    """3x3 convolution (correlation, as everywhere in the field), (B, H, W, C) -> (B, H, W, D):
    each window, as a row, times the kernel (9 C, D)."""
    B, H, W, C = x.shape
    D = p.w.shape[3]
    y = xp.empty((B * H * W, D), x.dtype)
    for rows, around in windows(x):
        xp.matmul(around, p.w.reshape(9 * C, D), out=y[rows])
    of_rows = y.reshape(-1, W * D)
    of_rows += xp.tile(p.b, W)

    def back(dy, g):
        # x_n met the weight w_k on its way to y_{n-k}. So dx_n is the sum of dy_{n-k} w_k^T, a
        # convolution of dy by the kernel turned by half a turn, and dw_k^T the sum of
        # dy_{n-k}^T x_n: both read the same windows of dy.
        turned = p.w[::-1, ::-1].transpose(0, 1, 3, 2).reshape(9 * D, C)
        pixels = x.reshape(-1, C)
        dx, dw = xp.empty_like(pixels), 0
        for rows, around in windows(dy):
            xp.matmul(around, turned, out=dx[rows])
            dw = dw + around.T @ pixels[rows]
        g.w += dw.reshape(3, 3, D, C).transpose(0, 1, 3, 2)[::-1, ::-1]
        g.b += sum_rows(dy)
        return dx.reshape(x.shape)
    return y.reshape(B, H, W, D), back


def group_norm(x, scale, shift, groups=8, eps=1e-5):
    """Bring each group of channels of each image to mean 0 and variance 1; then multiply by
    1 + scale and add shift. x (B, H, W, C); scale and shift (B, C), or (C,) for all images. eps
    keeps the division finite.

    back(dy) returns dx, and dscale and dshift as (B, C). Where groups does not divide C, their
    greatest common divisor is used.
    """
    B, H, W, C = x.shape
    groups = math.gcd(groups, C)
    ones = xp.ones((1, H * W), x.dtype)

    def sums(a):
        """Over the pixels: (B, C)."""
        return (ones @ a.reshape(B, H * W, C))[:, 0]

    def group_mean(sums):
        """Over each group's pixels and channels, at each of its channels: (B, C)."""
        total = sums.reshape(B, groups, -1).sum(2) / (H * W * C // groups)
        return total.repeat(C // groups, 1)

    def rows(a):
        """Values of channels (B, C), for a row of pixels (B, 1, W C): NumPy broadcasts few long
        rows faster than many short ones."""
        return a.repeat(W, 0).reshape(-1, 1, W * C)

    x = x.reshape(B, H, W * C)
    centred = x - rows(group_mean(sums(x)))
    r = 1 / xp.sqrt(group_mean(sums(centred * centred)) + eps)
    scale = 1 + scale.reshape(-1, C)
    y = centred * rows(r * scale)
    y += rows(shift.reshape(-1, C))

    def back(dy):
        dy = dy.reshape(B, H, W * C)
        dshift, dscale = sums(dy), r * sums(dy * centred)
        # Mean and r depend on all of x. They remove from r scale dy the two directions in which
        # x can move and not change y: a shift of the group, and r centred itself.
        dx = dy * rows(r * scale)
        dx -= rows(r * group_mean(scale * dshift))
        dx -= centred * rows(r * r * group_mean(scale * dscale))
        return dx.reshape(B, H, W, C), dscale, dshift
    return y.reshape(B, H, W, C), back


def norm(p, x):
    """Group norm with a learned scale and shift for each channel."""
    y, norm_back = group_norm(x, p.scale, p.shift)

    def back(dy, g):
        dx, dscale, dshift = norm_back(dy)
        g.scale += dscale.sum(0)            # one scale served the whole batch
        g.shift += dshift.sum(0)
        return dx
    return y, back


def dropout(x, rate, rng):
    """Zero a share `rate` of x at random and scale up the rest; without an rng, do nothing."""
    if rng is None or not rate:
        return x, lambda dy: dy
    keep = xp.asarray(rng.random(x.shape, dtype=np.float32) >= rate) / x.dtype.type(1 - rate)
    return x * keep, lambda dy: dy * keep


def fold(x):
    """2x2 pixels into channels: (B, H, W, C) -> (B, H/2, W/2, 4 C)."""
    B, H, W, C = x.shape
    y = x.reshape(B, H // 2, 2, W // 2, 2, C).transpose(0, 1, 3, 2, 4, 5)
    return y.reshape(B, H // 2, W // 2, 4 * C)


def unfold(y):
    """Channels back into 2x2 pixels. It undoes fold and, as both only move numbers, each is the
    other's backward."""
    B, H, W, C = y.shape
    x = y.reshape(B, H, W, 2, 2, C // 4).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, 2 * H, 2 * W, C // 4)


def down(x):
    """The mean of every 2x2 pixels: (B, H, W, C) -> (B, H/2, W/2, C)."""
    y = (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4
    return y, lambda dy: repeat(dy) / 4


def up(x):
    """Every pixel becomes 2x2 of the same value: (B, H, W, C) -> (B, 2H, 2W, C)."""
    return repeat(x), lambda dy: 4 * down(dy)[0]


def repeat(x):
    """The value of up, without its back."""
    B, H, W, C = x.shape
    y = xp.empty((B, H, 2, W, 2, C), x.dtype)
    y[:] = x[:, :, None, :, None]
    return y.reshape(B, 2 * H, 2 * W, C)


def attention(p, x, heads):
    """x + multi-head self-attention over its pixels (Vaswani et al. 2017, 1706.03762, eq. 1):
    every pixel takes a mean of the values v, weighted by how its query q meets the keys k."""
    B, H, W, C = x.shape
    h, norm_back = norm(p.norm, x)
    h, qkv_back = linear(p.qkv, h)
    # (B, H, W, 3 C) -> three of (B, heads, H W, C / heads)
    q, k, v = h.reshape(B, H * W, 3, heads, C // heads).transpose(2, 0, 3, 1, 4)
    c = (C // heads) ** -0.5                # keeps c q . k of unit variance
    logits = c * (q @ k.swapaxes(2, 3))
    a = xp.exp(logits - logits.max(3, keepdims=True))   # the maximum cancels in the next line
    a /= a.sum(3, keepdims=True)
    h, out_back = linear(p.out, (a @ v).transpose(0, 2, 1, 3).reshape(B, H, W, C))

    def back(dy, g):
        dh = out_back(dy, g.out).reshape(B, H * W, heads, C // heads).transpose(0, 2, 1, 3)
        da, dv = dh @ v.swapaxes(2, 3), a.swapaxes(2, 3) @ dh
        # Softmax: the derivative of a_i by logit_j is a_i ((i = j) - a_j).
        dlogits = a * (da - (da * a).sum(3, keepdims=True))
        dq, dk = c * (dlogits @ k), c * (dlogits.swapaxes(2, 3) @ q)
        dqkv = xp.stack([dq, dk, dv]).transpose(1, 3, 0, 2, 4).reshape(B, H, W, 3 * C)
        return dy + norm_back(qkv_back(dqkv, g.qkv), g.norm)    # x went two ways
    return x + h, back


def sinusoids(t, width):
    """Steps (B,) as sines, then cosines, of wavelengths 2 pi to 20,000 pi: (B, width), an even
    number of at least 4. The last frequency is exactly 1/10,000, as in DDPM's code; others
    divide by width/2 instead."""
    half = width // 2
    frequency = xp.exp(xp.arange(half) * (-math.log(10000) / (half - 1)))
    angle = t[:, None] * frequency
    return xp.concatenate([xp.sin(angle), xp.cos(angle)], 1)


# ----------------------------------------------------------------------------------- U-Net

def embed(p, t, y):
    """What every block is told: the steps t (B,) and the labels y (B,) as one vector (B, E)."""
    h, linear1_back = linear(p.time1, sinusoids(t, len(p.time1.w)).astype(p.time1.w.dtype))
    h, silu1_back = silu(h)
    h, linear2_back = linear(p.time2, h)
    if labelled := hasattr(p, "label"):
        onehot = (y[:, None] == xp.arange(len(p.label))).astype(h.dtype)
        h = h + onehot @ p.label            # row y of the table
    emb, silu2_back = silu(h)

    def back(demb, g):
        dh = silu2_back(demb)
        if labelled:
            g.label += onehot.T @ dh
        linear1_back(silu1_back(linear2_back(dh, g.time2)), g.time1)
    return emb, back


def res_block(p, x, emb, drop):
    """Two convolutions, and x straight past them: (B, H, W, C) -> (B, H, W, D).

    Before the second, the embedding scales and shifts the channels (ADM's adaptive group norm).
    drop(h) -> h and its back. back(dy, g, demb) adds to demb as it does to g: the embedding
    feeds every block.
    """
    h, norm1_back = norm(p.norm1, x)
    h, silu1_back = silu(h)
    h, conv1_back = conv3x3(p.conv1, h)
    film, film_back = linear(p.film, emb)       # "feature-wise linear modulation"
    scale, shift = xp.split(film, 2, axis=1)
    h, norm2_back = group_norm(h, scale, shift)
    h, silu2_back = silu(h)
    h, drop_back = drop(h)
    h, conv2_back = conv3x3(p.conv2, h)
    skip, skip_back = linear(p.skip, x) if hasattr(p, "skip") else (x, None)

    def back(dy, g, demb):
        dx = skip_back(dy, g.skip) if skip_back else dy
        dh = silu2_back(drop_back(conv2_back(dy, g.conv2)))
        dh, dscale, dshift = norm2_back(dh)
        demb += film_back(xp.concatenate([dscale, dshift], 1), g.film)
        return dx + norm1_back(silu1_back(conv1_back(dh, g.conv1)), g.norm1)
    return h + skip, back


def blocks(ps, x, emb, heads, drop):
    """Residual blocks one after the other, each followed by attention where it has some."""
    backs = []
    for p in ps:
        x, res_back = res_block(p, x, emb, drop)
        attention_back = None
        if hasattr(p, "attention"):
            x, attention_back = attention(p.attention, x, heads)
        backs.append((res_back, attention_back))

    def back(dy, gs, demb):
        for (res_back, attention_back), g in zip(backs[::-1], gs[::-1]):
            if attention_back:
                dy = attention_back(dy, g.attention)
            dy = res_back(dy, g, demb)
        return dy
    return x, back


def level(p, x, emb, heads, drop):
    """One level of the U and all below it: blocks; the level below, on a picture of half the
    size; blocks on the sum of its answer and what we had (the skip connection)."""
    x, enter_back = blocks(p.enter, x, emb, heads, drop)
    if not hasattr(p, "below"):
        return x, lambda dy, g, demb: enter_back(dy, g.enter, demb)
    h, down_back = down(x)
    h, below_back = level(p.below, h, emb, heads, drop)
    h, match_back = linear(p.match, h)      # to as many channels as x has
    h, up_back = up(h)
    y, leave_back = blocks(p.leave, h + x, emb, heads, drop)

    def back(dy, g, demb):
        dx = leave_back(dy, g.leave, demb)
        dh = match_back(up_back(dx), g.match)
        dx = dx + down_back(below_back(dh, g.below, demb))      # x went two ways
        return enter_back(dx, g.enter, demb)
    return y, back


# The parameters: name, shape, and the standard deviation that they start from. C^-1/2 (of a
# window, (9 C)^-1/2) makes a product's variance that of its input. What a block adds to x
# starts at 0, and so does what the network answers: its first loss is the mean square of the
# target, about 1 for eps.

def linear_layout(C, D, gain=1.0):
    return {"w": ((C, D), gain * C ** -0.5), "b": ((D,), 0)}


def conv_layout(C, D, gain=1.0):
    return {"w": ((3, 3, C, D), gain * (9 * C) ** -0.5), "b": ((D,), 0)}


def norm_layout(C):
    return {"scale": ((C,), 0), "shift": ((C,), 0)}


def attention_layout(C):
    return {"norm": norm_layout(C), "qkv": linear_layout(C, 3 * C),
            "out": linear_layout(C, C, gain=0)}


def block_layout(C, D, E, attended=False):
    layout = {"norm1": norm_layout(C), "conv1": conv_layout(C, D),
              "film": linear_layout(E, 2 * D), "conv2": conv_layout(D, D, gain=0)}
    if C != D:
        layout["skip"] = linear_layout(C, D)
    if attended:
        layout["attention"] = attention_layout(D)
    return layout


def level_layout(channels, counts, attention, C, E):
    """channels, counts of blocks, attention: of this level, then of those below. C: what comes
    in from above."""
    D, rest = channels[0], channels[1:]

    def row(first):
        return [block_layout(D if i else first, D, E, attention[0]) for i in range(counts[0])]
    if not rest:
        return {"enter": row(C) + row(D)}
    return {"enter": row(C), "below": level_layout(rest, counts[1:], attention[1:], D, E),
            "match": linear_layout(rest[0], D), "leave": row(D)}


def unet_layout(pixel, channels, counts, attention, classes):
    C, E = channels[0], 4 * channels[0]
    label = {"label": ((classes + 1, E), 1)} if classes else {}
    return {"time1": linear_layout(C, E), "time2": linear_layout(E, E), **label,
            "stem": conv_layout(pixel, C),
            "top": level_layout(channels, counts, attention, C, E),
            "norm": norm_layout(C), "out": conv_layout(C, pixel, gain=0)}


def leaves(layout):
    """The (shape, deviation) of every parameter, in the order of the flat buffer."""
    if isinstance(layout, tuple):
        yield layout
    else:
        for part in layout.values() if isinstance(layout, dict) else layout:
            yield from leaves(part)


def size_of(layout):
    return sum(math.prod(shape) for shape, _ in leaves(layout))


def initial(layout, rng):
    """Starting values for a flat buffer, float64 on the host."""
    return np.concatenate([std * rng.standard_normal(math.prod(shape))
                           for shape, std in leaves(layout)])


class Tree:
    """Names for the parts of one flat buffer: tree.stem.w is a view of tree.flat, and tree.stem
    a Tree with a .flat of its own. Zeroing, clipping, Adam, EMA and saving are one line each,
    on .flat. layout: dicts and lists down to (shape, deviation)."""

    def __init__(self, layout, flat):
        self.layout, self.flat, self._rest = layout, flat, flat
        for name, part in layout.items():
            setattr(self, name, self._take(part))

    def _take(self, part):
        if isinstance(part, list):
            return [self._take(one) for one in part]
        here, self._rest = self._rest[:size_of(part)], self._rest[size_of(part):]
        return Tree(part, here) if isinstance(part, dict) else here.reshape(part[0])


class UNet:
    """The network: images (B, H, W, C), steps (B,), labels (B,) -> prediction (B, H, W, C).

    image: (H, W, C) of any size; inside, it is padded to what the levels can halve.
    channels: of each level; the picture halves from one to the next.
    blocks: residual blocks on each side of a level, one number for all levels or one for each.
    classes: labels are 0..classes-1, and classes itself, .null, stands for none.
    attention, heads: the levels, 0 on top, whose blocks end in self-attention; its heads.
    dropout: its rate, in every residual block.
    fold: 2x2 pixels become channels on the way in, and pixels again on the way out: about a
        quarter of the work.
    rng: a Generator or a seed, for the parameters.
    """

    def __init__(self, image=(28, 28, 1), channels=(32, 64), classes=10, blocks=1, attention=(),
                 heads=4, dropout=0.0, fold=False, rng=0, dtype=np.float32):
        image, channels, attention = tuple(image), tuple(channels), tuple(attention)
        levels = len(channels)
        blocks = (blocks,) * levels if np.ndim(blocks) == 0 else tuple(blocks)
        if len(image) != 3 or not wholes(image):
            raise ValueError(f"image is {image}; it has to be (height, width, channels)")
        if not channels or not wholes(channels) or channels[0] % 2 or channels[0] < 4:
            raise ValueError(f"channels are {channels}; they have to be one number for each "
                             "level, the first even and at least 4")
        if len(blocks) != levels or not wholes(blocks):
            raise ValueError(f"blocks are {blocks}; they have to be at least 1 at each level")
        for i in attention:
            if not wholes([i + 1]) or i >= levels or channels[i] % whole("heads", heads):
                raise ValueError(f"attention is at level {i} with {heads} heads; levels are "
                                 f"0..{levels - 1}, and heads have to divide their {channels}")
        if not wholes([classes + 1]) or not 0 <= dropout < 1:
            raise ValueError(f"classes is {classes} and dropout {dropout}; they have to be an "
                             "integer of at least 0, and from 0 to below 1")
        if np.dtype(dtype).kind != "f":
            raise ValueError(f"dtype is {np.dtype(dtype)}; it has to be one of floats")
        self.config = dict(image=image, channels=channels, classes=classes, blocks=blocks,
                           attention=attention, heads=heads, dropout=dropout, fold=fold)
        self.image, self.classes, self.null = image, classes, classes
        self.heads, self.dropout, self.fold = heads, dropout, fold
        self.multiple = 2 ** (levels - 1) * (2 if fold else 1)
        layout = unet_layout(image[2] * (4 if fold else 1), channels, blocks,
                             [i in attention for i in range(levels)], classes)
        values = xp.asarray(initial(layout, np.random.default_rng(rng)), dtype)
        self.params = Tree(layout, values)
        self.grads = Tree(layout, xp.zeros_like(values))

    def forward(self, x, t, y=None, rng=None):
        """The prediction, and back(dy), which adds to .grads and returns dx.

        y: labels; None is the null label for all. Those on a GPU are not checked, as looking
        at them would be waiting for them. An rng turns dropout on.
        """
        if x.shape[1:] != self.image or not len(x) or x.dtype.kind in "biu":
            raise ValueError(f"x is {x.dtype} {x.shape}; it has to be floats of shape "
                             f"(B, *{self.image}), with B at least 1")
        y = self.null if y is None else checked_labels(y, self.null)
        t, y = xp.asarray(t), xp.asarray(y)
        for name, a in (("t", t), ("y", y)):
            if a.dtype.kind not in "iu" or a.shape not in ((), x.shape[:1]):
                raise ValueError(f"{name} is {a.dtype} {a.shape}; it has to be one integer, or "
                                 f"{len(x)}, one for each image")
        t, y = (xp.broadcast_to(a, len(x)) for a in (t, y))
        p, g = self.params, self.grads
        emb, embed_back = embed(p, t, y)
        h, stem_back = conv3x3(p.stem, self._enter(x))
        h, top_back = level(p.top, h, emb, self.heads, lambda h: dropout(h, self.dropout, rng))
        h, norm_back = norm(p.norm, h)
        h, silu_back = silu(h)
        h, out_back = conv3x3(p.out, h)

        def back(dy):
            dh = out_back(self._enter(dy), g.out)
            dh = norm_back(silu_back(dh), g.norm)
            demb = xp.zeros_like(emb)
            dh = top_back(dh, g.top, demb)
            embed_back(demb, g)
            return self._leave(stem_back(dh, g.stem))
        return self._leave(h), back

    def __call__(self, x, t, y=None):
        return self.forward(x, t, y)[0]

    # The way in pads with 0 and folds, the way out unfolds and crops: each other's backward.

    def _enter(self, x):
        pad = [(0, 0), *((0, -n % self.multiple) for n in self.image[:2]), (0, 0)]
        x = xp.pad(x, pad) if np.any(pad) else x
        return fold(x) if self.fold else x

    def _leave(self, x):
        x = unfold(x) if self.fold else x
        return x[:, :self.image[0], :self.image[1]]

    def twin(self, params=None):
        """The same network on the same parameters, or on others (flat), with gradients of its
        own: one for each thread, one for the EMA."""
        other, layout = copy.copy(self), self.params.layout
        other.params = self.params if params is None else Tree(layout, params)
        other.grads = Tree(layout, xp.zeros_like(other.params.flat))
        return other


def checked_labels(y, null):
    """The labels, if they are integers of 0..null, or on a GPU."""
    if not hasattr(y, "get"):
        y = np.asarray(y)
        if y.dtype.kind not in "iu" or not np.all((0 <= y) & (y <= null)):
            given = f" from {y.min()} to {y.max()}" if y.dtype.kind in "iu" else ""
            raise ValueError(f"labels are {y.dtype}{given}; they have to be integers of "
                             f"0..{null}, {null} being none")
    return y


def parallel(model, threads, chunk=32):
    """The same model, its batch cut into equal parts of at most chunk images, as many for each
    thread."""
    pool = ThreadPoolExecutor(whole("threads", threads))
    whole("chunk", chunk)

    def model_in_parts(*arrays):
        n = len(arrays[0])
        parts = min(n, threads * -(-n // (threads * chunk))) or 1
        cuts = [slice(n * i // parts, n * (i + 1) // parts) for i in range(parts)]
        outs = pool.map(lambda cut: model(*(a[cut] for a in arrays)), cuts)
        return xp.concatenate(list(outs))
    return model_in_parts


# -------------------------------------------------------------------------------- training

LOSSES = {      # of the error d, element by element: the loss and its slope
    "l2": lambda d: (d * d, 2 * d),
    "l1": lambda d: (abs(d), xp.sign(d)),
    "huber": lambda d: (xp.where(abs(d) < 1, d * d / 2, abs(d) - 0.5), xp.clip(d, -1, 1)),
}


class Adam:
    """AdamW on one flat buffer (Loshchilov & Hutter 2019, 1711.05101, Algorithm 2; the decay is
    times the learning rate, as everywhere in practice)."""

    def __init__(self, params, betas=(0.9, 0.999), eps=1e-8):
        self.m, self.v, self.n = xp.zeros_like(params), xp.zeros_like(params), 0
        self.betas, self.eps = betas, eps

    def step(self, params, grads, lr, decay=0.0):
        """Move params in place. decay shrinks them directly, not through the gradient."""
        self.n += 1
        b1, b2 = self.betas
        self.m += (1 - b1) * (grads - self.m)
        self.v += (1 - b2) * (grads * grads - self.v)
        params -= lr * (self.direction(grads) + decay * params)

    def direction(self, grads):
        """The mean of the gradients, each over the root of its own mean square."""
        b1, b2 = self.betas
        m = self.m / (1 - b1 ** self.n)     # as means that started at 0, both are too small
        v = self.v / (1 - b2 ** self.n)
        return m / (xp.sqrt(v) + self.eps)


class Muon(Adam):
    """Adam, except for the matrices inside the network: each moves by the orthogonal matrix
    nearest to its mean gradient, so that a few steep directions do not hold up all others
    (Muon). A kernel counts as the matrix (9 C, D). The way in, the way out, the embeddings and
    all vectors stay with Adam."""

    def __init__(self, params, betas=(0.9, 0.999), eps=1e-8):
        """params: a UNet's Tree."""
        super().__init__(params.flat, betas, eps)
        self.matrices, end = [], 0
        for name, part in params.layout.items():
            for shape, _ in leaves(part):
                start, end = end, end + math.prod(shape)
                if name == "top" and len(shape) > 1:
                    self.matrices.append((slice(start, end), (-1, shape[-1])))

    def direction(self, grads):
        moves, b1 = super().direction(grads), self.betas[0]
        ahead = b1 * self.m + (1 - b1) * grads      # where the mean is going (Nesterov)
        for where, shape in self.matrices:
            m = orthogonal(ahead[where].reshape(shape))
            # Its mean square is 1 / the longer side; bring it to 0.2, as Adam's often is, so
            # that one learning rate serves both (2502.16982, section 2.2).
            moves[where] = (0.2 * max(m.shape) ** 0.5 * m).ravel()
        return moves


OPTIMIZERS = {"adamw": lambda params, *options: Adam(params.flat, *options), "muon": Muon}


def orthogonal(m):
    """Nearly U V^T of m = U S V^T. Each of five Newton-Schulz steps puts every singular value s
    of m / |m| through 3.4445 s - 4.775 s^3 + 2.0315 s^5, until it is within 0.7 to 1.2 (Muon's
    coefficients)."""
    if len(m) < m.shape[1]:
        return orthogonal(m.T).T        # so that the gram matrix is the smaller of the two
    m = m / (xp.sqrt((m * m).sum()) + 1e-12)
    for _ in range(5):
        gram = m.T @ m
        m = 3.4445 * m - m @ (4.775 * gram - 2.0315 * gram @ gram)
    return m


class EMA:
    """A running mean of the parameters, .flat, whose samples are better than theirs. Its decay
    grows up to `decay`: fixed at 0.9999, the mean would for long be mostly the random start."""

    def __init__(self, params, decay=0.999):
        self.flat, self.decay, self.n = params.copy(), decay, 0

    def step(self, params):
        self.flat += (1 - min(self.decay, (1 + self.n) / (10 + self.n))) * (params - self.flat)
        self.n += 1


@dataclass
class State:
    """All that changes in training and that resuming needs, beside the parameters."""
    adam: Adam
    ema: EMA
    rng: np.random.Generator
    step: int = 0
    loss: float = math.nan      # of the last step
    lr: float = 0.0             # of the last step


def learning_rate(step, steps, highest, warmup):
    """Of step 0..steps-1: the highest, times a linear warm-up, times half a cosine, 1 to 0."""
    rise = min(1, (step + 1) / warmup) if warmup else 1
    return highest * rise * (1 + math.cos(math.pi * step / steps)) / 2


def train(net, diffusion, images, labels=None, *, steps, rng=0, batch=64, kind="v", loss="l2",
          weighting="simple", optimizer="adamw", lr=2e-3, warmup=100, betas=(0.9, 0.99),
          decay=0.0, clip=1.0, ema=0.999, label_drop=0.1, accumulate=1, threads=1, chunk=16,
          state=None):
    """Train net to predict `kind` (DDPM Algorithm 1, CFG Algorithm 1). A generator: it yields
    its State after every step. Draw with net.twin(state.ema.flat); to go on, pass the State.

    images: (N, H, W, C) floats in [-1, 1]. labels: (N,) integers, replaced by the null label at
    a rate of label_drop. rng: a NumPy Generator or a seed. loss: "l2", "l1" or "huber", times
    diffusion.loss_weight(t, kind, weighting). optimizer: "adamw" or "muon", with their betas
    and decay. lr, warmup: see learning_rate. clip: the gradient's largest norm. ema: the EMA's
    decay. accumulate: batches to a step.

    On a CPU each batch is cut over threads, and each part worked through chunk images at a
    time, so that they stay in the cache; let BLAS use one thread then (OPENBLAS_NUM_THREADS=1).
    A loss that is not finite is a FloatingPointError, and the parameters are left at the step
    before; on a GPU it is looked at every 50 steps, so go back to a checkpoint there. With a
    state, rng, optimizer, betas and ema are those it holds, and steps counts those already
    done.
    """
    one_of("loss", loss, LOSSES)
    one_of("kind", kind, KINDS)
    one_of("weighting", weighting, WEIGHTINGS)
    one_of("optimizer", optimizer, OPTIMIZERS)
    for name, n in {"steps": steps, "batch": batch, "accumulate": accumulate,
                    "threads": threads, "chunk": chunk}.items():
        whole(name, n)
    for name, value, high in (("lr", lr, 1000), ("decay", decay, 1000), ("ema", ema, 1),
                              ("label_drop", label_drop, 1), ("warmup", warmup, math.inf),
                              ("clip", clip, math.inf)):
        within(name, value, 0, high)
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas are {betas}; they have to be two numbers from 0 to below 1")
    images, labels = training_data(net, images, labels)
    if state and state.ema.flat.shape != net.params.flat.shape:
        raise ValueError(f"state is of {state.ema.flat.size} parameters; it has to be of the "
                         f"network's {net.params.flat.size}")
    state = state or State(OPTIMIZERS[optimizer](net.params, betas), EMA(net.params.flat, ema),
                           np.random.default_rng(rng))
    rng, on_cpu = state.rng, xp is np
    threads, chunk = (threads, chunk) if on_cpu else (1, batch)
    workers = [net.twin() for _ in range(threads)]

    def gradient(worker, x0, t, y, eps, dropout_rng):
        """Add the gradient of these images' share of the mean loss; return the share."""
        share = 0
        for i in range(0, len(x0), chunk):
            x, e, when = x0[i:i + chunk], eps[i:i + chunk], t[i:i + chunk]
            xt, target = diffusion.q_sample(x, when, e), diffusion.target(x, e, when, kind)
            out, back = worker.forward(xt, when, y[i:i + chunk], dropout_rng)
            value, slope = LOSSES[loss](out - target)
            weight = diffusion.loss_weight(when, kind, weighting)
            weight = factor(weight / (accumulate * batch * math.prod(net.image)), x)
            share += (weight * value).sum()
            back(weight * slope)
        return share

    with ThreadPoolExecutor(threads) as pool:
        run = pool.map if threads > 1 else map
        while state.step < steps:
            for worker in workers:
                worker.grads.flat[:] = 0
            total = 0
            for _ in range(accumulate):
                pick = rng.integers(len(images), size=batch)
                # One t from each of `batch` equal parts of 1..T: uniform, with less noise than
                # independent ones. (The last u can round up to 1.)
                u = (np.arange(batch) + rng.random(batch)) / batch
                t = np.minimum(1 + (diffusion.T * u).astype(int), diffusion.T)
                y = np.where(rng.random(batch) < label_drop, net.null, labels[pick])
                eps = normal(rng, (batch, *net.image), images.dtype)
                seed = rng.integers(2 ** 63)
                rngs = [np.random.default_rng((seed, i)) for i in range(threads)]
                x0 = images[xp.asarray(pick)]
                parts = [module.array_split(a, threads)
                         for module, a in ((xp, x0), (np, t), (np, y), (xp, eps))]
                total += sum(run(gradient, workers, *parts, rngs))
            grads = sum(worker.grads.flat for worker in workers)
            length = xp.sqrt(grads @ grads)
            state.lr = learning_rate(state.step, steps, lr, warmup)
            # A GPU would have to be waited for; there the loss is looked at now and then.
            if (on_cpu or state.step % 50 == 0) and not math.isfinite(float(total + length)):
                raise FloatingPointError(
                    f"the loss is {float(total)} and the gradient's norm {float(length)} at "
                    f"step {state.step + 1}, learning rate {state.lr:.3g}; try a lower one")
            grads *= xp.minimum(1, clip / xp.maximum(length, 1e-12))
            state.adam.step(net.params.flat, grads, state.lr, decay)
            state.ema.step(net.params.flat)
            state.loss = total
            state.step += 1
            yield state


def training_data(net, images, labels):
    """The images on the device and the labels on the host, once they are found to fit."""
    images = xp.asarray(images, net.params.flat.dtype)
    size = largest(images)
    if images.shape[1:] != net.image or not size < 1.001:
        raise ValueError(f"images have shape {images.shape} and sizes up to {size:.4g}; "
                         f"they have to be (N, *{net.image}) with values from -1 to 1")
    if (labels is None) != (net.classes == 0):
        raise ValueError(f"labels are {'missing' if labels is None else 'given'}, and the "
                         f"network has {net.classes} classes")
    labels = np.zeros(len(images), int) if labels is None else asnumpy(labels)
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels have shape {labels.shape}; they have to be {len(images)} "
                         "integers, one for each image")
    return images, checked_labels(labels, net.null)


def largest(images):
    """The largest absolute value, or NaN where there is none."""
    return float(abs(images).max()) if images.size else math.nan


FORMAT = "tinyddpm checkpoint 1"


def save(path, net, state=None, **settings):
    """Write the network, and with a State all of a training run, to one .npz without pickle.

    settings: anything JSON can hold, such as the schedule's name; load gives it back. The file
    is whole or it is not there: it is written beside path, then renamed. Numbers that are not
    finite are a ValueError, and the last good checkpoint stays.
    """
    meta = {"format": FORMAT, "net": net.config, "settings": settings}
    arrays = {"params": net.params.flat}
    if state:
        adam, ema = state.adam, state.ema
        arrays |= {"ema": ema.flat, "m": adam.m, "v": adam.v}
        meta["state"] = {"step": state.step, "loss": float(state.loss), "lr": state.lr,
                         "optimizer": "muon" if isinstance(adam, Muon) else "adamw",
                         "adam": [adam.betas, adam.eps, adam.n], "ema": [ema.decay, ema.n],
                         "rng": state.rng.bit_generator.state}
    meta["arrays"] = list(arrays)
    arrays = {name: asnumpy(a) for name, a in arrays.items()}
    for name, a in arrays.items():
        if not np.isfinite(a).all():
            raise ValueError(f"{name} is not finite everywhere; {path} was left as it was")
    with written(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, meta=json.dumps(meta, default=plain), **arrays)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def written(path):
    """A temporary name beside path, to write to; in the end it is renamed, so that path is
    whole, or as it was. What a killed process left under such a name is removed first."""
    folder, name = os.path.split(os.path.abspath(path))
    for other in os.listdir(folder):
        by = re.fullmatch(rf"\.(\d+)-{re.escape(name)}", other)
        if by and not os.path.exists(f"/proc/{by[1]}"):     # on Linux, a living one's stays
            with contextlib.suppress(FileNotFoundError):    # somebody else was faster
                os.unlink(os.path.join(folder, other))
    temporary = os.path.join(folder, f".{os.getpid()}-{name}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or os.fspath(path)      # a full disk names none
        raise
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def plain(a):
    """A number or an array of NumPy's, as JSON can hold it."""
    if not isinstance(a, (np.generic, np.ndarray)):
        raise TypeError(f"{a!r} is a {type(a).__name__}, which JSON cannot hold")
    return a.tolist()


def load(path):
    """What save wrote: the network, the State (None where there was none), the settings. A file
    that is damaged, or something else, is a ValueError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        meta = json.loads(str(arrays.pop("meta")))
        if meta["format"] == FORMAT and set(meta["arrays"]) == set(arrays):
            return restored(meta, arrays)
    except FileNotFoundError:
        raise
    except Exception as error:      # a damaged archive fails in many ways
        raise ValueError(f"{path} is not a tinyddpm checkpoint, or it is damaged "
                         f"({type(error).__name__}: {str(error)[:100]})") from error
    raise ValueError(f"{path} has the format {meta['format']!r}, or arrays are missing; this "
                     f"version reads {FORMAT!r}")


def restored(meta, arrays):
    """The network, the State and the settings that were in a file."""
    net = UNet(**meta["net"], dtype=arrays["params"].dtype)
    flat = net.params.flat
    for name, a in arrays.items():
        if (a.shape, a.dtype) != (flat.shape, flat.dtype) or not np.isfinite(a).all():
            raise ValueError(f"{name} has {a.size} {a.dtype}; the network needs {flat.size} "
                             f"finite {flat.dtype}")
    arrays = {name: xp.asarray(a) for name, a in arrays.items()}
    net.params.flat[:] = arrays["params"]
    if "state" not in meta:
        return net, None, meta["settings"]
    saved = meta["state"]
    betas, eps, n = saved["adam"]
    adam = OPTIMIZERS[saved.get("optimizer", "adamw")](net.params, tuple(betas), eps)
    ema = EMA(arrays["ema"], saved["ema"][0])
    adam.m, adam.v, adam.n, ema.n = arrays["m"], arrays["v"], n, saved["ema"][1]
    generator = getattr(np.random, saved["rng"]["bit_generator"])()
    generator.state = saved["rng"]
    state = State(adam, ema, np.random.Generator(generator), saved["step"], saved["loss"],
                  saved["lr"])
    return net, state, meta["settings"]


# ------------------------------------------------------------------------ the gradient check

def gradient_errors(layer, p, inputs, h=1e-5, directions=4):
    """Compare a layer's gradients with finite differences, in float64.

    layer(p, *inputs) -> y and back, where back(dy, g) adds to g and returns the gradient of the
    input, or a tuple of them. For random weights c, f = sum(c * y) is one number. Around
    an input or a parameter a, its slope along a random direction u is
    (f(a + h u) - f(a - h u)) / 2h, which has to be sum(u * df/da).
    Yields (name of the gradient, relative error over the directions).
    """
    rng = np.random.default_rng(1)
    g = Tree(p.layout, xp.zeros_like(p.flat))
    y, back = layer(p, *inputs)
    c = normal(rng, y.shape, y.dtype)
    dinputs = back(c, g)
    if len(inputs) == 1:
        dinputs = [dinputs]
    places = [(f"input {i + 1}", a, da) for i, (a, da) in enumerate(zip(inputs, dinputs or []))]
    for name in p.layout:
        a, da = getattr(p, name), getattr(g, name)
        places.append((name, a.flat, da.flat) if isinstance(a, Tree) else (name, a, da))
    for name, a, da in places:
        start, wrong, size = a.copy(), 0.0, 0.0
        for _ in range(directions):
            u, f = normal(rng, a.shape, a.dtype), []
            for shift in (h, -h):
                a[...] = start + shift * u
                f.append(float((c * layer(p, *inputs)[0]).sum()))
            slope = (f[0] - f[1]) / (2 * h)
            wrong, size = wrong + (slope - float((u * da).sum())) ** 2, size + slope ** 2
        a[...] = start
        yield name, (wrong / size if size else wrong) ** 0.5


def gradient_table():
    """Every layer and two whole networks through gradient_errors: (layer, gradient, error)."""
    rng = np.random.default_rng(0)

    def array(*shape):
        return normal(rng, shape, np.float64)

    def tree(layout):
        return Tree(layout, 0.3 * array(size_of(layout)))       # no part of it 0

    def free(layer, *options):              # a layer without parameters
        def with_parameters(p, *inputs):
            y, back = layer(*inputs, *options)
            return y, lambda dy, g: back(dy)
        return with_parameters

    def block(p, x, emb):
        y, back = res_block(p, x, emb, lambda h: dropout(h, 0.3, np.random.default_rng(1)))

        def back_both(dy, g):
            demb = xp.zeros_like(emb)
            return back(dy, g, demb), demb
        return y, back_both

    def network(net, labels):
        t = xp.asarray([1, 40, 999])

        def layer(p, x):
            y, back = net.forward(x, t, labels, np.random.default_rng(1))

            def back_into(dy, g):
                dx = back(dy)
                g.flat += net.grads.flat
                return dx
            return y, back_into
        net.params.flat[:] = tree(net.params.layout).flat
        return layer, net.params, [array(3, *net.image)]

    x, none = array(2, 6, 4, 8), tree({})
    steps, labels = xp.asarray([1, 500]), xp.asarray([0, 3])
    flat = UNet(image=(8, 8, 1), channels=(8, 12), classes=3, attention=(1,), dtype=np.float64)
    folded = UNet(image=(11, 13, 3), channels=(8, 12, 16), blocks=2, classes=0, dropout=0.2,
                  fold=True, dtype=np.float64)
    embed_layout = {"time1": linear_layout(8, 10), "time2": linear_layout(10, 10),
                    "label": ((4, 10), 1)}
    cases = {
        "silu": (free(silu), none, [x]),
        "linear": (linear, tree(linear_layout(8, 5)), [x]),
        "conv3x3": (conv3x3, tree(conv_layout(8, 5)), [x]),
        "group_norm": (free(group_norm, 4), none, [x, array(2, 8), array(2, 8)]),
        "norm": (norm, tree(norm_layout(8)), [x]),
        "dropout": (lambda p, x: free(dropout, 0.3, np.random.default_rng(1))(p, x), none, [x]),
        "fold": (lambda p, x: (fold(x), lambda dy, g: unfold(dy)), none, [x]),
        "unfold": (lambda p, x: (unfold(x), lambda dy, g: fold(dy)), none, [x]),
        "down": (free(down), none, [x]),
        "up": (free(up), none, [x]),
        "attention": (lambda p, x: attention(p, x, 2), tree(attention_layout(8)), [x]),
        "embed": (lambda p: embed(p, steps, labels), tree(embed_layout), []),
        "res_block": (block, tree(block_layout(8, 12, 10)), [x, array(2, 10)]),
        "U-Net": network(flat, xp.asarray([0, 2, 3])),
        "U-Net, folded": network(folded, None),
    }
    for title, case in cases.items():
        for name, error in gradient_errors(*case):
            yield title, name, error


if __name__ == "__main__":
    worst = 0.0
    print(f"{'layer':15}{'gradient of':13}relative error against finite differences, float64")
    for title, name, error in gradient_table():
        print(f"{title:15}{name:13}{error:.1e}{'' if error <= 1e-6 else '   WRONG'}")
        worst = max(worst, error if error == error else math.inf)
    raise SystemExit(f"the worst error is {worst:.1e}: above 1e-6" if worst > 1e-6 else 0)
