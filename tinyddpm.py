"""Denoising diffusion in one file: NumPy, CuPy where there is a GPU, every gradient by hand.

The idea. Mix an image x0 with noise eps, standard normal in every pixel:

    x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps

where abar_t falls from 1 at t = 0, the image, to about 0 at t = T, noise that anybody can draw.
A network sees x_t and t and answers what eps was, or x0: with x_t, either gives the other. Its
loss is the mean squared error over random images, steps and noise. That is all of training.

To draw a new image, start from noise x_T and go back. If x0 were known, Bayes' rule would say
where x_t came from: an earlier x_s is normal, with a mean linear in x0 and x_t, and a variance
that does not depend on x0. In a short step it is nearly so with x0 unknown; as the mean is
linear in x0, the expected x0 is all that it takes, and that is what least squares teaches. So:
guess x0 from x_t, step back to x_s, guess again. First guesses are a blur, the last an image.

Notation, in the code and in the papers
    t, s      t, t-1       the step, an integer 1..T, and the one to go to next; 0 is clean data
    x0, xt    x_0, x_t     clean and noisy images (B, H, W, C), floats in [-1, 1] when clean
    beta      beta_t       the variance of the noise that step t adds                  (T+1,)
    alpha     alpha_t      1 - beta_t                                                  (T+1,)
    abar      alpha-bar_t  alpha_1 ... alpha_t: the share of x0's variance left in xt  (T+1,)
    snr       SNR(t)       abar_t / (1 - abar_t)                                       (T+1,)
    eta, w                 DDIM's noise, from 0 to DDPM's at 1; guidance weight, 1 for none
    p, y                   parameters; labels, and among the layers a layer's value
    dx                     the gradient of the loss with respect to x, for any x
    B, H, W, C, D, E       batch, height, width, channels in, channels out, embedding
Arrays are float32 or float64, t and labels integers; an rng is a NumPy Generator or a seed.

Papers, by the names used below, on arXiv
    diffusion 1503.03585   SDE 2011.13456     EDM 2206.00364       DPM-Solver++ 2211.01095
    attention 1706.03762   iDDPM 2102.09672   CFG 2207.12598       Diffusion-LM 2205.14217
    FiLM 1709.07871        ADM 2105.05233     Imagen 2205.11487    v-prediction 2202.00512
    AdamW 1711.05101       VDM 2107.00630     Min-SNR 2303.09556   flow 2209.03003, 2210.02747
    group norm 1803.08494  LDM 2112.10752     ZeroSNR 2305.08891   GeoDiff 2203.02923
    DDPM 2006.11239        DDIM 2010.02502    interval 2404.07724  Muon kellerjordan.github.io
"""
import contextlib
import copy
import json
import math
import os
import warnings
from dataclasses import InitVar, dataclass, fields
from functools import partial
from itertools import accumulate as running_sums, pairwise

import numpy as np

def check(condition, message):
    """A ValueError with this message, unless the condition holds."""
    if not condition:
        raise ValueError(message)

xp, wanted = np, os.environ.get("TINYDDPM_BACKEND", "")     # xp computes: numpy or cupy
check(wanted in ("", "numpy", "cupy"), f"TINYDDPM_BACKEND is {wanted!r}, not numpy or cupy")
if wanted != "numpy":
    try:
        import cupy
        (cupy.ones((2, 2)) @ cupy.ones((2, 2))).get()       # an import alone needs no GPU
        xp = cupy
    except Exception as error:      # no CuPy, no GPU, a driver without its libraries, ...
        if wanted == "cupy":
            raise RuntimeError(f"TINYDDPM_BACKEND is 'cupy', but it fails: {error}") from error

def asnumpy(a):
    """The array in the host's memory, as NumPy, wherever it is."""
    return a.get() if hasattr(a, "get") else np.asarray(a)

def normal(rng, shape, dtype=np.float32):
    """Standard normal noise. Drawn on the host, so that a CPU and a GPU have the same."""
    return xp.asarray(np.random.default_rng(rng).standard_normal(shape, dtype=dtype))

def checked_labels(y, last):
    """Labels on the host, int64, if they are integers of 0..last."""
    y = asnumpy(y)
    check(y.dtype.kind in "iu" and np.all((0 <= y) & (y <= last)),
          f"labels are {y.dtype} {y}; they have to be integers of 0..{last}")
    return y.astype(np.int64)           # in a smaller type, a null label could wrap around

# --------------------------------------------------------------------------- noise schedules
# Each returns beta_1..beta_T, float64 (T,) on the host. Betas that are no shares of variance,
# as come of odd arguments or of a T too short for the formula, are a ValueError.

def checked_betas(betas):
    """The betas as float64 (T,), if all are above 0 and at most 1, and only the last is 1."""
    betas = np.asarray(betas, np.float64)
    check(betas.ndim == 1 and len(betas), f"betas have shape {betas.shape}, not (T,), T >= 1")
    alpha = 1 - betas
    right = (0 <= alpha) & (alpha < 1)
    right[:-1] &= alpha[:-1] > 0            # after a beta of 1 no signal is left
    i = np.argmin(right)
    check(right[i], f"beta_{i + 1} of {len(betas)} is {betas[i]:.4g}, no share of variance")
    return betas

def betas_from_abar(abar, max_beta=1.0):
    """beta_t = 1 - abar_t / abar_{t-1}, at most max_beta, from abar_0 to abar_T (T+1,)."""
    abar = np.maximum(abar, 0)
    return checked_betas(np.minimum(1 - abar[1:] / np.maximum(abar[:-1], 1e-300), max_beta))

def linear_betas(T, start=1e-4, end=0.02):
    """Equal steps of beta (DDPM section 4), made for T = 1000."""
    return checked_betas(np.linspace(start, end, T))

def scaled_linear_betas(T, start=1e-4, end=0.02):
    """linear_betas with both ends times 1000/T, so that x_T is noise for any T; at least 20,
    where the last beta is 1 (iDDPM's code). In diffusers this name means quadratic_betas."""
    return checked_betas(np.linspace(start, end, T) * 1000 / T)

def quadratic_betas(T, start=1e-4, end=0.02):
    """Equal steps of sqrt(beta) (DDIM's code; LDM's "linear", diffusers' "scaled_linear")."""
    return checked_betas(np.linspace(math.sqrt(start), math.sqrt(end), T) ** 2)

def cosine_betas(T, s=0.008, max_beta=0.999):
    """abar_t = f(t) / f(0), f(t) = cos^2((t/T + s) / (1 + s) pi/2) (iDDPM eq. 17)."""
    u = np.linspace(0, 1, T + 1)
    f = np.cos((u + s) / (1 + s) * np.pi / 2) ** 2
    return betas_from_abar(f / f[0], max_beta)

def sigmoid_betas(T, start=1e-4, end=0.02):
    """beta, not abar, follows a sigmoid from -6 to 6 (GeoDiff's code)."""
    rise = 1 / (1 + np.exp(-np.linspace(-6, 6, T)))
    return checked_betas(start + (end - start) * rise)

def sqrt_betas(T, s=1e-4, max_beta=0.999):
    """abar_t = 1 - sqrt(t/T + s) (Diffusion-LM appendix A; its code also divides by abar_0)."""
    abar = 1 - np.sqrt(np.linspace(0, 1, T + 1) + s)
    return betas_from_abar(np.concatenate([[1], abar[1:]]), max_beta)

def karras_betas(T, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """abar_t = 1 / (1 + sigma_t^2), sigma being noise over signal, in equal steps of
    sigma^(1/rho) (EDM eq. 5, made as a sampling grid, from sigma_max down)."""
    sigma = np.linspace(sigma_min ** (1 / rho), sigma_max ** (1 / rho), T) ** rho
    return betas_from_abar(np.concatenate([[1], 1 / (1 + sigma ** 2)]))

def flow_betas(T):
    """The straight path (1 - u) x0 + u eps, u = t/T (rectified flow, flow matching), at unit
    variance: abar = (1-u)^2 / ((1-u)^2 + u^2), and 0 at T."""
    u = np.linspace(0, 1, T + 1)
    return betas_from_abar((1 - u) ** 2 / ((1 - u) ** 2 + u ** 2))

SCHEDULES = {"linear": linear_betas, "scaled_linear": scaled_linear_betas,
             "quadratic": quadratic_betas, "cosine": cosine_betas, "sigmoid": sigmoid_betas,
             "sqrt": sqrt_betas, "karras": karras_betas, "flow": flow_betas}

def zero_terminal_snr(betas):
    """The schedule with sqrt(abar) shifted to end at 0 and stretched to start where it did
    (ZeroSNR Algorithm 1). Not for models of eps: at T they would only have to return x_T."""
    root = np.sqrt(np.cumprod(1 - checked_betas(betas)))
    check(len(root) > 1, "zero_terminal_snr was given 1 beta; it needs at least 2")
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return betas_from_abar(np.concatenate([[1], root ** 2]))

# ------------------------------------------------------------------------- the forward process
# x_t is a mix signal x0 + noise eps, of signal = sqrt(abar_t) and noise = sqrt(1 - abar_t).
# What a model answers is another, a x0 + b eps: two equations for x0 and eps. Here are a and b.
PREDICTS = {
    "eps": lambda signal, noise: (0, 1),
    "x0": lambda signal, noise: (1, 0),
    "v": lambda signal, noise: (-noise, signal),    # v-prediction section 4
    "flow": lambda signal, noise: (-1, 1),          # eps - x0, the straight path's velocity
}

class Diffusion:
    """The process that turns an image into noise (diffusion), and what a model of it predicts.
    betas: (T,), from a schedule. predicts: "eps", "x0", "v" or "flow"; training, samplers and
    likelihood read it here. Tables .beta .alpha .abar .snr are host float64 of length T+1;
    index 0 is clean data: beta 0, abar 1, snr infinite. In every method t is an integer of
    1..T, or (B,) of them on the host; x0, xt, eps and a model's answer `out` are of one shape
    (B, ...). Steps out of range, other shapes, half precision and bytes are a ValueError."""
    def __init__(self, betas, predicts="eps"):
        check(predicts in PREDICTS, f"predicts is {predicts!r}; it may be {list(PREDICTS)}")
        self.predicts = predicts
        self.beta = np.concatenate([[0.0], checked_betas(betas)])
        self.alpha = 1 - self.beta
        self.abar = np.cumprod(self.alpha)
        self.T = len(self.beta) - 1
        check(self.abar[-2] > 1e-300,
              f"abar_{self.T - 1} is {self.abar[-2]:.2g}; below 1e-300 it has lost its digits")
        check(predicts != "eps" or self.abar[-1] > 0, "predicts is 'eps' for betas that end at "
              "zero SNR, where x_T is eps whatever x0 is; it may be 'x0', 'v' or 'flow'")
        with np.errstate(divide="ignore"):
            self.snr = self.abar / (1 - self.abar)

    def q_sample(self, x0, t, eps):
        """x_t in one go: sqrt(abar_t) x0 + sqrt(1 - abar_t) eps (DDPM eq. 4)."""
        signal, noise = self._weights(self.abar, t, x0, eps)
        return signal * x0 + noise * eps

    def q_step(self, x_prev, t, eps):
        """x_t from x_{t-1}: sqrt(1 - beta_t) x_prev + sqrt(beta_t) eps (DDPM eq. 2)."""
        signal, noise = self._weights(self.alpha, t, x_prev, eps)
        return signal * x_prev + noise * eps

    def q_posterior(self, x0, xt, t, s=None):
        """Mean and variance of q(x_s | x_t, x0), s = t-1 unless given (DDPM eqs. 6, 7). The
        steps in a longer jump act as one of alpha = abar_t / abar_s. The variance, ready to
        multiply images, is (1, 1, ...) or (B, 1, ...), and 0 at s = 0."""
        s = t - 1 if s is None else s
        check(np.all((0 <= s) & (s < t) & (t <= self.T)), f"s is {s}, t is {t}; not s < t <= T")
        check(x0.shape == xt.shape, f"shapes are {x0.shape} and {xt.shape}, not the same")
        abar, abar_s = self.abar[t], self.abar[s]
        alpha = abar / abar_s
        of_x0 = abar_s ** 0.5 * (1 - alpha) / (1 - abar)
        of_xt = alpha ** 0.5 * (1 - abar_s) / (1 - abar)
        var = (1 - alpha) * (1 - abar_s) / (1 - abar)
        return per_image(of_x0, x0) * x0 + per_image(of_xt, xt) * xt, per_image(var, x0)

    def target(self, x0, eps, t):
        """What the model should answer to the mix of this x0 and this eps."""
        a, b = PREDICTS[self.predicts](*self._weights(self.abar, t, x0, eps))
        return a * x0 + b * eps

    def to_x0(self, xt, t, out, clip=None):
        """x0 from the model's answer: xt = signal x0 + noise eps and out = a x0 + b eps, solved
        for x0 (where out is eps, DDPM eq. 15). clip: bounds for it, or a function of it."""
        signal, noise = self._weights(self.abar, t, xt, out)
        a, b = PREDICTS[self.predicts](signal, noise)
        x0 = (b * xt - noise * out) / (b * signal - a * noise)
        if callable(clip):
            return clip(x0)
        return x0 if clip is None else xp.clip(x0, *clip)

    def to_eps(self, xt, t, x0):
        """The eps that with this x0 makes xt."""
        signal, noise = self._weights(self.abar, t, xt, x0)
        return (xt - signal * x0) / noise

    def score(self, xt, t, x0):
        """The gradient of log q(x_t), -eps / sqrt(1 - abar_t), that this x0 means: for the true
        x0 that of log q(x_t | x0), for the expected x0 that of log q(x_t) itself (SDE)."""
        return -self.to_eps(xt, t, x0) / self._weights(self.abar, t, xt, x0)[1]

    def loss_weight(self, t, weighting, gamma=5.0):
        """Factor for the squared error of the model's answer at t; float64, of t's shape.
        "simple" is 1. "snr" makes of it the error of eps, DDPM eq. 14: 1 for eps, the SNR for
        x0, abar for v. (An error d of `out` makes, up to sign, noise d / (b signal - a noise)
        in x0, and signal / noise times that in eps.)
        "min_snr" is "snr" times gamma / max(SNR, gamma) (Min-SNR section 3.4)."""
        check(np.all((1 <= t) & (t <= self.T)), f"t is {t}; it has to be of 1..{self.T}")
        signal, noise = self.abar[t] ** 0.5, (1 - self.abar[t]) ** 0.5
        a, b = PREDICTS[self.predicts](signal, noise)
        weight = (signal / (b * signal - a * noise)) ** 2
        weights = {"simple": np.ones_like(weight), "snr": weight,
                   "min_snr": weight * gamma / np.maximum(self.snr[t], gamma)}
        check(weighting in weights, f"weighting is {weighting!r}; it may be {list(weights)}")
        return weights[weighting]

    def bits_per_dim(self, model, x0, rng):
        """Bits per dimension of images under a model: see variational_bound, near the end."""
        return variational_bound(self, model, x0, rng)

    def _weights(self, share, t, x, other):
        """sqrt(share_t) and sqrt(1 - share_t), ready to multiply x and another of its shape."""
        check(np.all((1 <= t) & (t <= self.T)), f"t is {t}; it has to be of 1..{self.T}")
        check(x.shape == other.shape, f"shapes are {x.shape} and {other.shape}, not the same")
        return per_image(share[t] ** 0.5, x), per_image((1 - share[t]) ** 0.5, x)

def per_image(value, x):
    """A coefficient, one or (B,), ready to multiply x (B, ...): in x's type, on its device. (A
    NumPy float64 as it is would make x float64.)"""
    check(x.dtype in ("f4", "f8"), f"an array is {x.dtype}; it has to be float32 or float64")
    return xp.asarray(value, x.dtype).reshape(-1, *[1] * (x.ndim - 1))

# ---------------------------------------------------------------------- samplers and guidance
# A model is any callable model(x, t) -> answer, x (B, ...), t (B,) integers. A sampler is a
# generator: it yields (t, x_t) after every step, so that a progress bar, a film, an early stop
# or inpainting (write into x_t) is a `for` loop in the caller's code. x: usually normal noise.
# steps: how many, or which; see timesteps. Each turns the answer into x0 first; clip: bounds of
# that x0, or a function of it, or None. Give training's: it counts no error beyond the bounds.

def timesteps(T, steps, spacing="trailing"):
    """`steps` of the T steps, descending, integers (steps,) (ZeroSNR Table 2). "trailing"
    starts at T, where x is noise; "linspace" has both ends, T and 1; "leading", long the usual
    one, starts below T (unless steps = T). A descending list of steps is kept as it is."""
    if np.ndim(steps) == 0:
        i = np.arange(steps)
        spaced = {"trailing": T - i * T / steps, "leading": T // steps * i[::-1] + 1,
                  "linspace": np.linspace(T, 1, steps)}
        check(spacing in spaced, f"spacing is {spacing!r}; it may be {list(spaced)}")
        steps = np.round(spaced[spacing]).astype(int)
    check(np.diff([*steps, 0]).max() < 0, f"steps are {steps}; they have to descend to above 0")
    return np.asarray(steps)

def ddpm(model, diffusion, x, rng, steps=None, spacing="trailing", variance="small",
         clip=(-1, 1)):
    """Ancestral sampling: x_s ~ N(posterior mean of x_s given x_t and the model's x0, var).
    With clip=None and all steps (None) this is DDPM Algorithm 2: its mean is the same, written
    with eps. variance: "small", the posterior's, is best for data of a single point; "large",
    beta_t or 1 - abar_t/abar_s, for standard normal data (DDPM section 3.2)."""
    check(variance in ("small", "large"), f"variance is {variance!r}, not 'small' or 'large'")
    rng, steps = np.random.default_rng(rng), diffusion.T if steps is None else steps
    for t, s in pairwise([*timesteps(diffusion.T, steps, spacing), 0]):
        x0 = diffusion.to_x0(x, t, model(x, xp.full(len(x), t)), clip)
        x, var = diffusion.q_posterior(x0, x, t, s)
        if variance == "large":
            var = float(1 - diffusion.abar[t] / diffusion.abar[s])
        if s:
            x = x + var ** 0.5 * normal(rng, x.shape, x.dtype)
        yield s, x

def ddim(model, diffusion, x, rng=None, steps=50, eta=0.0, spacing="trailing", clip=(-1, 1)):
    """Implicit sampling (DDIM eqs. 12, 16): to the x_s that x0 and eps point at, with eta times
    DDPM's noise. At eta = 0 it is deterministic, and Euler's method on the straight path of
    "flow"; at eta = 1 it is ddpm."""
    check(0 <= eta <= 1, f"eta is {eta}; it has to be from 0 (no noise) to 1 (DDPM)")
    rng = np.random.default_rng(rng)
    for t, s in pairwise([*timesteps(diffusion.T, steps, spacing), 0]):
        x0 = diffusion.to_x0(x, t, model(x, xp.full(len(x), t)), clip)
        abar, abar_s = diffusion.abar[[t, s]].tolist()
        eps = (x - abar ** 0.5 * x0) / (1 - abar) ** 0.5    # of the clipped x0: the two agree
        sigma = eta * ((1 - abar_s) / (1 - abar) * (1 - abar / abar_s)) ** 0.5
        z = normal(rng, x.shape, x.dtype) if sigma else 0
        x = abar_s ** 0.5 * x0 + max(0, 1 - abar_s - sigma ** 2) ** 0.5 * eps + sigma * z
        yield s, x

def dpm_solver(model, diffusion, x, rng=None, steps=20, spacing="trailing", clip=(-1, 1)):
    """DPM-Solver++(2M) (DPM-Solver++ Algorithm 2): DDIM's step, towards an x0 extrapolated from
    this guess and the one before, D = (1 + 1/2r) x0 - x0_before / 2r. One call of the model a
    step, an error of second order, no noise: rng is there so that all are called alike."""
    with np.errstate(divide="ignore"):
        lam = np.log(diffusion.snr) / 2             # in which x0 is taken as linear
    x0_before = lam_before = None
    for t, s in pairwise([*timesteps(diffusion.T, steps, spacing), 0]):
        x0 = D = diffusion.to_x0(x, t, model(x, xp.full(len(x), t)), clip)
        if x0_before is not None and s:             # at s = 0, lambda is infinite
            r = float((lam[t] - lam_before) / (lam[s] - lam[t]))    # after zero SNR: inf
            D = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * x0_before
        abar_s = float(diffusion.abar[s])
        x = abar_s ** 0.5 * D + (1 - abar_s) ** 0.5 * diffusion.to_eps(x, t, D)
        x0_before, lam_before = x0, lam[t]
        yield s, x

def heun(model, diffusion, x, rng=None, steps=10, spacing="trailing", clip=(-1, 1)):
    """Heun's method on the probability-flow ODE (SDE section 4.3): an Euler step to s; then the
    step from t again, with the mean of the slopes at t and s. 2 * steps - 1 calls, no noise.
    With abar = cos(phi)^2, x = cos(phi) x0 + sin(phi) eps, and dx/dphi is v. In phi pure noise
    is at pi/2, in sigma = tan(phi) at infinity. It is EDM Algorithm 1 with that sigma and the
    scale cos(phi); but the last step is Euler's in sigma at scale 1, which ends at x0."""
    for t, s in pairwise([*timesteps(diffusion.T, steps, spacing), 0]):
        x0 = diffusion.to_x0(x, t, model(x, xp.full(len(x), t)), clip)
        if s:
            phi, phi_s = (math.acos(diffusion.abar[i] ** 0.5) for i in (t, s))
            v = (math.cos(phi) * x - x0) / math.sin(phi)
            ahead = x + (phi_s - phi) * v
            x0_s = diffusion.to_x0(ahead, s, model(ahead, xp.full(len(x), s)), clip)
            v_s = (math.cos(phi_s) * ahead - x0_s) / math.sin(phi_s)
            x = x + (phi_s - phi) * (v + v_s) / 2
        else:
            x = x0
        yield s, x

def sample(sampler):
    """Run a sampler to its end; x_0."""
    for _, x in sampler:
        pass
    return x

def dynamic_threshold(x0, share=0.995):
    """A clip for networks trained with clip=None: each image is clipped at +-bound and divided
    by it, against saturation; bound is the quantile `share` of its absolute values, at least 1
    (Imagen section 2.3)."""
    bound = xp.quantile(xp.abs(x0).reshape(len(x0), -1), share, axis=1)
    bound = per_image(xp.maximum(bound, 1), x0)
    return xp.clip(x0, -bound, bound) / bound

def guided(model, labels, null, w, rescale=0.0, interval=None):
    """model(x, t, y) -> a model(x, t): unconditional + w (conditional - unconditional), both of
    them from one call on a doubled batch. In CFG eq. 6 the weight is w - 1. labels: (B,)
    integers; null: the one that stands for none. rescale: how far to bring each image's
    deviation back to the conditional answer's, 0 to 1 (ZeroSNR section 3.4). interval: (low,
    high), the steps at which to guide; at others w is 1. Without guidance at the highest noise,
    samples vary more (the interval paper)."""
    labels, (low, high) = checked_labels(labels, 2 ** 62), interval or (1, 2 ** 62)
    check(1 <= low <= high and low % 1 == high % 1 == 0,
          f"interval is {interval}; it has to be two steps, 1 <= low <= high, or None")
    nulls = np.full_like(labels, null)
    if w == 1 or (w == 0 and not (interval or rescale)):    # one of the two is not needed
        return lambda x, t: model(x, t, labels if w else nulls)
    both = np.concatenate([labels, nulls])

    def guided_model(x, t):
        inside = (low <= t) & (t <= high)
        if xp is np and not inside.any():       # to ask this, a GPU would have to wait
            return model(x, t, labels)
        out = model(xp.concatenate([x, x]), xp.concatenate([t, t]), both)
        cond, uncond = out[:len(x)], out[len(x):]
        out = uncond + per_image(xp.where(inside, w, 1), x) * (cond - uncond)
        if rescale:
            axes = tuple(range(1, x.ndim))
            cond_std, std = (a.std(axes, keepdims=True) + 1e-20 for a in (cond, out))
            out = out * (rescale * cond_std / std + 1 - rescale)    # where both are flat, 1
        return out
    return guided_model

# ---------------------------------------------------------------------- parameters and layers
class Params:
    """Names for the parts of one flat buffer: p.stem.w is a view of p.flat, and p.stem.grad.w
    the place of its gradient. Zeroing, clipping, AdamW, EMA, saving, adding up over machines
    are one line each, on .flat. layout: a dict of dicts, lists, or (shape, deviation)."""
    def __init__(self, layout, flat, *grad):
        needed = sum(math.prod(shape) for _, shape, _ in leaves(layout))
        check(flat.shape == (needed,), f"parameters are {flat.shape}, not ({needed},)")
        vars(self).update(zip(layout, cut(list(layout.values()), flat, *grad)),
                          layout=layout, flat=flat, buffers=(flat, *grad))
        if grad:
            vars(self)["grad"] = Params(layout, *grad)

    def __setattr__(self, name, value):     # p.w = a, and the end of p.w += a, write into flat
        getattr(self, name)[...] = value

    def __reduce__(self):                   # copies and pickles build the names anew
        return Params, (self.layout, *self.buffers)

def leaves(layout, name=""):
    """The (name, shape, deviation) of every parameter, in the order of the flat buffer."""
    if isinstance(layout, tuple):
        yield name, *layout
    else:
        for key, part in layout.items() if isinstance(layout, dict) else enumerate(layout):
            yield from leaves(part, f"{name}.{key}" if name else str(key))

def cut(layout, *buffers):
    """The buffers by the layout: a dict is Params, a list a list, (shape, ...) a view."""
    if isinstance(layout, dict):
        return Params(layout, *buffers)
    if isinstance(layout, tuple):
        return buffers[0].reshape(layout[0])
    sizes = (sum(math.prod(shape) for _, shape, _ in leaves(part)) for part in layout)
    ends = pairwise(running_sums(sizes, initial=0))
    return [cut(part, *(a[i:j] for a in buffers)) for part, (i, j) in zip(layout, ends)]

def initial(layout, rng, dtype=np.float32):
    """Random Params of the deviations that the layout asks for, and room for gradients."""
    rng = np.random.default_rng(rng)
    flat = np.concatenate([deviation * rng.standard_normal(math.prod(shape))
                           for _, shape, deviation in leaves(layout)])
    return Params(layout, xp.asarray(flat, dtype), xp.zeros(len(flat), dtype))

# A layer returns its value y and a function `back`, nested in it. back(dy) returns dx (a tuple
# where there are several inputs), and adds the gradients of the parameters p to p.grad. Read it
# as the forward from the last line to the first: a product becomes one with the transpose, a
# broadcast a sum, a fork an addition. Above a layer stands the layout of its parameters.

def sequential(x, layers):
    """x through one layer after the other, and back through all in reverse."""
    backs = []
    for layer in layers:
        x, layer_back = layer(x)
        backs.append(layer_back)

    def back(dy):
        for layer_back in reversed(backs):
            dy = layer_back(dy)
        return dy
    return x, back

def silu(x):
    """x sigmoid(x), also called swish."""
    s = 0.5 * xp.tanh(0.5 * x) + 0.5        # the sigmoid, without the overflow of exp(-x)
    y = x * s
    return y, lambda dy: dy * (s + y * (1 - s))

def product_layout(*shape, gain=1.0):
    """That of linear, (C, D), or conv3x3, (3, 3, C, D). The power -1/2 keeps the variance of x.
    With gain=0, what a block adds to x starts at 0, and so does the network's answer."""
    return {"w": (shape, gain * math.prod(shape[:-1]) ** -0.5), "b": (shape[-1:], 0)}

def linear(p, x):
    """x @ w + b on the last axis: (..., C) -> (..., D)."""
    rows = x.reshape(-1, x.shape[-1])
    y = rows @ p.w
    y += p.b

    def back(dy):
        dy = dy.reshape(y.shape)
        p.grad.w += rows.T @ dy
        p.grad.b += xp.ones(len(dy), dy.dtype) @ dy     # one b served every row
        return (dy @ p.w.T).reshape(x.shape)
    return y.reshape(*x.shape[:-1], -1), back

def im2col(x, budget=2 ** 18):
    """The 3x3 windows around the pixels of x (B, H, W, C), zero beyond the edge, as rows.
    Yields a slice of the B H W pixels and its windows (n, 9 C): a few images at a time, about
    `budget` numbers, which stay in a CPU's cache until they are multiplied."""
    B, H, W, C = x.shape
    padded = xp.zeros((B, H + 2, W + 2, C), x.dtype)
    padded[:, 1:-1, 1:-1] = x
    b, h, w, c = padded.strides             # bytes from one number to the next along each axis
    # Three neighbours in a row are 3 C numbers in a row, so a window is three runs of memory.
    runs = xp.lib.stride_tricks.as_strided(padded, (B, H, W, 3, 3 * C), (b, h, w, h, c))
    few = max(1, budget // (9 * C * H * W)) if xp is np else B
    for i in range(0, B, few):
        some = runs[i:i + few]
        yield slice(i * H * W, (i + len(some)) * H * W), some.reshape(-1, 9 * C)

def conv3x3(p, x):
    """3x3 convolution, (B, H, W, C) -> (B, H, W, D): each window times the kernel (9 C, D)."""
    B, H, W, C = x.shape
    D = p.w.shape[3]
    y = xp.empty((B * H * W, D), x.dtype)
    for rows, windows in im2col(x):
        xp.matmul(windows, p.w.reshape(9 * C, D), out=y[rows])
    long_rows = y.reshape(-1, W * D)        # faster, see group_norm
    long_rows += xp.tile(p.b, W)

    def back(dy):
        # x_n met the weight w_k on its way to y_{n-k}. So dx_n is the sum of dy_{n-k} w_k^T, a
        # convolution of dy by the kernel turned by half a turn, and dw_k^T the sum of
        # dy_{n-k}^T x_n: both read the same windows of dy.
        turned = p.w[::-1, ::-1].transpose(0, 1, 3, 2).reshape(9 * D, C)
        pixels = x.reshape(-1, C)
        dx, dw = xp.empty_like(pixels), 0
        for rows, windows in im2col(dy):
            xp.matmul(windows, turned, out=dx[rows])
            dw = dw + windows.T @ pixels[rows]
        p.grad.w += dw.reshape(3, 3, D, C).transpose(0, 1, 3, 2)[::-1, ::-1]
        p.grad.b += xp.ones(B * H * W, dy.dtype) @ dy.reshape(-1, D)    # faster than .sum
        return dx.reshape(x.shape)
    return y.reshape(B, H, W, D), back

def group_norm(x, scale, shift, groups=8, tiny=1e-5):
    """Each of gcd(groups, C) groups of channels of each image at mean 0 and variance 1, times
    1 + scale, plus shift, (B, C) or (C,) (group norm). back(dy) returns dx, dscale and dshift,
    these (B, C). A single pixel is one group: alone, each channel would be 0 whatever x is."""
    B, H, W, C = x.shape
    check(H * W * C > 1, f"x has shape {x.shape}; a single value is always normalised to 0")
    groups = math.gcd(groups, C) if H * W > 1 else 1
    ones = xp.ones((1, H * W), x.dtype)

    def sums(a):                # over the pixels: (B, C)
        return (ones @ a.reshape(B, H * W, C))[:, 0]

    def group_mean(a):          # over each group's pixels and channels, at each channel: (B, C)
        total = a.reshape(B, groups, -1).sum(2) / (H * W * C // groups)
        return total.repeat(C // groups, 1)

    def rows(a):                # (B, C) -> (B, 1, W C): NumPy broadcasts few long rows faster
        return a.repeat(W, 0).reshape(-1, 1, W * C)         # than many short ones

    x = x.reshape(B, H, W * C)
    centred = x - rows(group_mean(sums(x)))
    r = 1 / xp.sqrt(group_mean(sums(centred * centred)) + tiny)
    scale = 1 + scale.reshape(-1, C)
    y = centred * rows(r * scale)
    y += rows(shift.reshape(-1, C))

    def back(dy):
        dy = dy.reshape(B, H, W * C)
        dshift, dscale = sums(dy), r * sums(dy * centred)
        # Mean and r depend on all of x. They remove from r scale dy the two directions in which
        # x can move and y (but for tiny) stay: a shift of the group, and r centred itself.
        dx = dy * rows(r * scale)
        dx -= rows(r * group_mean(scale * dshift))
        dx -= centred * rows(r * r * group_mean(scale * dscale))
        return dx.reshape(B, H, W, C), dscale, dshift
    return y.reshape(B, H, W, C), back

def norm_layout(C):
    return {"scale": ((C,), 0), "shift": ((C,), 0)}

def norm(p, x):
    """Group norm with a learned scale and shift for each channel."""
    y, norm_back = group_norm(x, p.scale, p.shift)

    def back(dy):
        dx, dscale, dshift = norm_back(dy)
        p.grad.scale += dscale.sum(0)       # one scale served the whole batch
        p.grad.shift += dshift.sum(0)
        return dx
    return y, back

def dropout(x, rate, rng):
    """Zero a share `rate` of x at random and scale up the rest; without an rng, do nothing."""
    if rng is None or not rate:
        return x, lambda dy: dy
    random = np.random.default_rng(rng).random(x.shape, dtype=np.float32)
    keep = xp.asarray(random >= rate) / x.dtype.type(1 - rate)
    return x * keep, lambda dy: dy * keep

def attention_layout(C):
    return {"norm": norm_layout(C), "qkv": product_layout(C, 3 * C),
            "out": product_layout(C, C, gain=0)}

def attention(p, x, heads):
    """x + multi-head self-attention over its pixels (attention eq. 1): every pixel takes a mean
    of the values v, weighted by how its query q meets the keys k."""
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

    def back(dy):
        dh = out_back(dy).reshape(B, H * W, heads, C // heads).transpose(0, 2, 1, 3)
        da, dv = dh @ v.swapaxes(2, 3), a.swapaxes(2, 3) @ dh
        # Softmax: the derivative of a_i by logit_j is a_i ((i = j) - a_j).
        dlogits = a * (da - (da * a).sum(3, keepdims=True))
        dq, dk = c * (dlogits @ k), c * (dlogits.swapaxes(2, 3) @ q)
        dqkv = xp.stack([dq, dk, dv]).transpose(1, 3, 0, 2, 4).reshape(B, H, W, 3 * C)
        return dy + norm_back(qkv_back(dqkv))           # x went two ways
    return x + h, back

# Of the next four, two and two are each other's backward; the last two but for a factor of 4.

def space_to_depth(x):
    """2x2 pixels into channels: (B, H, W, C) -> (B, H/2, W/2, 4 C)."""
    B, H, W, C = x.shape
    y = x.reshape(B, H // 2, 2, W // 2, 2, C).transpose(0, 1, 3, 2, 4, 5)
    return y.reshape(B, H // 2, W // 2, 4 * C)

def depth_to_space(y):
    """Channels back into 2x2 pixels: (B, H, W, 4 C) -> (B, 2H, 2W, C)."""
    B, H, W, C = y.shape
    x = y.reshape(B, H, W, 2, 2, C // 4).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, 2 * H, 2 * W, C // 4)

def average_pool(x):
    """The mean of every 2x2 pixels: (B, H, W, C) -> (B, H/2, W/2, C)."""
    return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4

def upsample(x):
    """Every pixel becomes 2x2 of the same value: (B, H, W, C) -> (B, 2H, 2W, C)."""
    B, H, W, C = x.shape
    y = xp.empty((B, H, 2, W, 2, C), x.dtype)
    y[:] = x[:, :, None, :, None]
    return y.reshape(B, 2 * H, 2 * W, C)

# -------------------------------------------------------------------------------------- U-Net
#     x (B, H, W, C)                                    answer (B, H, W, C)
#         v                                                     ^
#     stem: conv3x3                                norm, silu, out: conv3x3
#         v                                                     ^
#     down: res_blocks ---------------- + ------------> up: res_blocks            H x W
#         v                             ^
#     average_pool               match: linear, upsample
#         v                             ^
#     down: res_blocks ------- + ---> up: res_blocks       inner level        H/2 x W/2
#         v                    ^
#        ...                  ...     and so on; in the lowest, up follows on down at once

def timestep_embedding(t, width):
    """Steps (B,) as sines, then cosines, of wavelengths 2 pi to 20,000 pi: (B, width). The last
    frequency is 1/10,000, as in DDPM's code; others divide by half itself."""
    half = width // 2
    frequency = xp.exp(xp.arange(half) * (-math.log(10000) / (half - 1)))
    angle = t[:, None] * frequency
    return xp.concatenate([xp.sin(angle), xp.cos(angle)], 1)

def embed(p, t, y):
    """The steps t (B,) and the labels y (B,) as one vector (B, E), for every res_block."""
    h = timestep_embedding(t, len(p.time1.w)).astype(p.time1.w.dtype)
    h, time_back = sequential(h, [partial(linear, p.time1), silu, partial(linear, p.time2)])
    if labelled := hasattr(p, "label"):
        onehot = (y[:, None] == xp.arange(len(p.label))).astype(h.dtype)
        h = h + onehot @ p.label            # row y of the table
    emb, silu_back = silu(h)

    def back(demb):
        dh = silu_back(demb)
        if labelled:
            p.grad.label += onehot.T @ dh
        time_back(dh)
    return emb, back

def res_block_layout(C, D, E, attended):
    return {"norm1": norm_layout(C), "conv1": product_layout(3, 3, C, D),
            "scale_shift": product_layout(E, 2 * D),
            "conv2": product_layout(3, 3, D, D, gain=0),
            **({"skip": product_layout(C, D)} if C != D else {}),
            **({"attention": attention_layout(D)} if attended else {})}

def res_block(p, x, emb, demb, drop, heads):
    """Two convolutions, and x straight past them: (B, H, W, C) -> (B, H, W, D); then attention,
    where p has some. Before the second, the embedding scales and shifts the channels (FiLM;
    ADM's adaptive group norm). As emb went to every block, every back adds to demb."""
    h, first_back = sequential(x, [partial(norm, p.norm1), silu, partial(conv3x3, p.conv1)])
    scale_shift, scale_shift_back = linear(p.scale_shift, emb)
    h, norm_back = group_norm(h, *xp.split(scale_shift, 2, axis=1))
    h, second_back = sequential(h, [silu, drop, partial(conv3x3, p.conv2)])
    past, past_back = linear(p.skip, x) if hasattr(p, "skip") else (x, lambda dy: dy)
    y, attention_back = h + past, lambda dy: dy
    if hasattr(p, "attention"):
        y, attention_back = attention(p.attention, y, heads)

    def back(dy):
        dy = attention_back(dy)
        dh, dscale, dshift = norm_back(second_back(dy))
        demb[:] += scale_shift_back(xp.concatenate([dscale, dshift], 1))
        return first_back(dh) + past_back(dy)           # x went two ways
    return y, back

def level_layout(C, channels, counts, attended, E):
    """C channels come in. Of each level from here on: channels, counts of blocks, attention."""
    D, *rest = channels

    def blocks(first):
        return [res_block_layout(c, D, E, attended[0]) for c in [first] + [D] * (counts[0] - 1)]
    inner = {"inner": level_layout(D, rest, counts[1:], attended[1:], E),
             "match": product_layout(rest[0], D)} if rest else {}
    return {"down": blocks(C), **inner, "up": blocks(D)}

def level(p, x, block):
    """One level of the U and all below it: blocks; the level below, on a picture of half the
    size; blocks on its answer plus what we had (a skip connection; DDPM's concatenates)."""
    x, down_back = sequential(x, [partial(block, q) for q in p.down])
    if inner := hasattr(p, "inner"):        # and `match`, to as many channels as x has
        h, inner_back = sequential(average_pool(x), [partial(level, p.inner, block=block),
                                                     partial(linear, p.match)])
        x = x + upsample(h)
    y, up_back = sequential(x, [partial(block, q) for q in p.up])

    def back(dy):
        dx = up_back(dy)
        if inner:
            dx = dx + upsample(inner_back(4 * average_pool(dx))) / 4    # x went two ways
        return down_back(dx)
    return y, back

@dataclass(eq=False)
class UNet:
    """The network: images (B, H, W, C), steps (B,), labels (B,) -> answer (B, H, W, C).
    x may have more channels than an image, and the answer more images: condition, answers."""
    image: tuple = (28, 28, 1)      # of any size; inside, it is padded to what the levels halve
    channels: tuple = (32, 64)      # of each level, half the size each; the first even, above 3
    classes: int = 10               # labels are 0..classes-1; classes itself stands for none
    blocks: object = 1              # on each side of a level: for all levels, or for each one
    attention: tuple = ()           # levels, 0 on top, whose blocks end in self-attention
    heads: int = 4                  # of the attention; they divide its channels
    dropout: float = 0.0            # its rate, in every block
    space_to_depth: bool = False    # 2x2 pixels become channels inside: a quarter of the work
    condition: int = 0              # channels of x behind the image's, for a picture to go by
    answers: int = 1                # images in the answer: 2 where it says variances, too
    rng: InitVar = 0                # for the parameters
    dtype: InitVar = np.float32     # of the parameters, and so of all computing; or float64
    res_block = staticmethod(res_block)     # for a subclass with blocks of its own

    def __post_init__(self, rng, dtype):
        for name in ("image", "channels", "attention"):     # lists, as a checkpoint has them
            setattr(self, name, tuple(getattr(self, name)))
        levels, C, E = len(self.channels), self.channels[0], 4 * self.channels[0]
        blocks = [self.blocks] * levels if np.ndim(self.blocks) == 0 else self.blocks
        check(len(blocks) == levels and min(blocks) > 0, f"blocks are {blocks} for {levels}")
        check(C > 3 and C % 2 == 0, f"channels begin with {C}; the first is even and above 3")
        check({*self.attention} <= {*range(levels)}, f"attention is at {self.attention}")
        check(0 <= self.dropout < 1, f"dropout is {self.dropout}; it has to be below 1")
        check(np.dtype(dtype) in ("f4", "f8"), f"dtype is {dtype}, not float32 or float64")
        self.null, pixel = self.classes, 4 ** self.space_to_depth
        self.input = (*self.image[:2], self.image[2] + self.condition)
        attended = [i in self.attention for i in range(levels)]
        self.params = initial({
            "time1": product_layout(C, E), "time2": product_layout(E, E),
            **({"label": ((self.classes + 1, E), 1)} if self.classes else {}),
            "stem": product_layout(3, 3, pixel * self.input[2], C),
            "top": level_layout(C, self.channels, blocks, attended, E),
            "norm": norm_layout(C),
            "out": product_layout(3, 3, C, pixel * self.answers * self.image[2], gain=0),
        }, rng, dtype)
        self.grads = self.params.grad       # by the same names

    def with_params(self, params):
        """The same network on other Params, or on a flat buffer of them: not a copy of it, so
        where the buffer goes on changing, so does the network."""
        if not isinstance(params, Params):
            params = Params(self.params.layout, params, xp.zeros_like(params))
        net = copy.copy(self)
        net.params, net.grads = params, params.grad
        return net

    def forward(self, x, t, y=None, rng=None):
        """The answer, and back(dy), which adds to .grads and returns dx. t and the labels y are
        integers (B,), or one for all; y None is the null label. An rng turns dropout on."""
        check(x.shape[1:] == self.input and x.dtype.kind in "fc",       # c: complex, in tests
              f"x is {x.dtype} {x.shape}; it has to be floats (B, *{self.input})")
        p, t = self.params, xp.broadcast_to(xp.asarray(t), len(x))
        check(t.dtype.kind in "iu", f"t is {t.dtype}; it has to be integers of 1..T")
        y = xp.asarray(checked_labels(self.null if y is None else y, self.null))
        y, rng = xp.broadcast_to(y, len(x)), rng if rng is None else np.random.default_rng(rng)
        emb, embed_back = embed(p, t, y)
        demb = xp.zeros_like(emb)
        block = partial(self.res_block, emb=emb, demb=demb, heads=self.heads,
                        drop=partial(dropout, rate=self.dropout, rng=rng))
        h, unet_back = sequential(
            self._enter(x.astype(p.flat.dtype, copy=False)),
            [partial(conv3x3, p.stem), partial(level, p.top, block=block),
             partial(norm, p.norm), silu, partial(conv3x3, p.out)])

        def back(dy):
            demb[:] = 0
            dx = unet_back(self._enter(dy))
            embed_back(demb)
            return self._leave(dx)
        return self._leave(h), back

    def __call__(self, x, t, y=None):
        return self.forward(x, t, y)[0]

    def _enter(self, x):
        """Pad with 0 to what halves at every level. _leave crops it again: its backward."""
        multiple = 2 ** (len(self.channels) - 1 + self.space_to_depth)
        x = xp.pad(x, [(0, 0), *((0, -n % multiple) for n in self.image[:2]), (0, 0)])
        return space_to_depth(x) if self.space_to_depth else x

    def _leave(self, x):
        x = depth_to_space(x) if self.space_to_depth else x
        return x[:, :self.image[0], :self.image[1]]

# ----------------------------------------------------------------------------------- training
LOSSES = {      # of the error d, element by element: the loss and its slope
    "l2": lambda d: (d * d, 2 * d),
    "l1": lambda d: (abs(d), xp.sign(d)),
    "huber": lambda d: (xp.where(abs(d) < 1, d * d / 2, abs(d) - 0.5), xp.clip(d, -1, 1)),
}

def draw_batch(diffusion, images, labels, null, rng, batch, label_drop):
    """DDPM Algorithm 1's x0, t, y, eps; at a rate of label_drop y is null (CFG Algorithm 1)."""
    pick = rng.integers(len(images), size=batch)
    # One t from each of `batch` equal parts of 1..T: the loss varies less (as in VDM).
    u = (np.arange(batch) + rng.random(batch)) / batch
    t = np.minimum(1 + (diffusion.T * u).astype(int), diffusion.T)      # u can round up to 1
    y = np.where(rng.random(batch) < label_drop, null, labels[pick])
    x0 = images[xp.asarray(pick)]
    return x0, t, y, normal(rng, x0.shape, x0.dtype)

def add_gradient(net, diffusion, x0, t, y, eps, total, loss="l2", weighting="simple", rng=None,
                 clip=(-1, 1)):
    """The rest of Algorithm 1, on a batch or a part of one: adds to net.grads the gradient of
    its loss, the sum over all values / total, and returns the loss. rng is for dropout. One
    departure: as samplers clip x0, a value that clipping puts right is no error. Black may be
    guessed below -1, and comes out black; with "l2" the best answer, clipped, is still the
    expected x0. This makes the loss much smaller. clip=None counts every error."""
    xt = diffusion.q_sample(x0, t, eps)
    out, back = net.forward(xt, t, y, rng)
    right = diffusion.to_x0(xt, t, out, clip) == x0
    error, slope = LOSSES[loss](xp.where(right, 0, out - diffusion.target(x0, eps, t)))
    weight = per_image(diffusion.loss_weight(t, weighting) / total, x0)
    back(weight * slope)
    return float((weight * error).sum())

class AdamW:
    """Adam with weight decay (AdamW Algorithm 2; the decay is times the learning rate, as is
    usual). momentum: of the running means of gradients and of squares. With muon the matrices
    inside a UNet, kernels as (9 C, D), move by the orthogonal matrix nearest to their mean
    gradient, so that a few steep directions do not hold up all others (Muon)."""
    def __init__(self, params, momentum=(0.9, 0.999), muon=False):
        self.m, self.v, self.n = xp.zeros_like(params.flat), xp.zeros_like(params.flat), 0
        self.momentum, self.muon, self.matrices, end = momentum, muon, [], 0
        for name, shape, _ in leaves(params.layout):
            start, end = end, end + math.prod(shape)
            if muon and name.startswith("top.") and len(shape) > 1:     # of the UNet's levels
                self.matrices.append((slice(start, end), (-1, shape[-1])))

    def step(self, params, grads, lr, weight_decay=0.0):
        """Move params, flat, in place. The decay shrinks them directly, not by the gradient."""
        self.n += 1
        b1, b2 = self.momentum
        self.m += (1 - b1) * (grads - self.m)
        self.v += (1 - b2) * (grads * grads - self.v)
        m, v = self.m / (1 - b1 ** self.n), self.v / (1 - b2 ** self.n)     # both started at 0
        move = m / (xp.sqrt(v) + 1e-8)
        ahead = b1 * self.m + (1 - b1) * grads      # where the mean is going (Nesterov)
        for where, shape in self.matrices:
            u = orthogonal(ahead[where].reshape(shape))
            # Its root mean square is the longer side's ^-1/2; bring it to 0.2, as Adam's often
            # is, so that one lr serves these and all others (2502.16982 section 2.2).
            move[where] = (0.2 * max(u.shape) ** 0.5 * u).ravel()
        params -= lr * (move + weight_decay * params)

def orthogonal(m):
    """Nearly U V^T of m = U S V^T, by five Newton-Schulz steps on m / |m|, which take its
    singular values s to 3.4445 s - 4.775 s^3 + 2.0315 s^5. They end in .68..1.21, if they were
    .002 or more; .001 ends at .47 (Muon)."""
    if len(m) < m.shape[1]:
        return orthogonal(m.T).T        # so that m^T m is smaller than m
    m = m / (xp.sqrt((m * m).sum()) + 1e-12)
    # A step is m @ step, a polynomial of m^T m, which is smaller. So follow that, and multiply
    # m by all steps at the end.
    gram, eye = m.T @ m, xp.eye(m.shape[1], dtype=m.dtype)
    steps = eye
    for _ in range(5):
        step = 3.4445 * eye - 4.775 * gram + 2.0315 * gram @ gram
        gram, steps = step @ gram @ step, steps @ step
    return m @ steps

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
    optimizer: AdamW
    ema: EMA
    rng: np.random.Generator
    step: int = 0
    loss: float = math.nan      # of the last step
    lr: float = 0.0             # of the last step

def train(net, diffusion, images, labels=None, *, steps, rng=0, batch=64, loss="l2",
          weighting="simple", optimizer="adamw", lr=2e-3, warmup=100, momentum=(0.9, 0.99),
          weight_decay=0.0, max_norm=1.0, ema=0.999, label_drop=0.1, accumulate=1, chunk=16,
          clip=(-1, 1), gradient=add_gradient, state=None):
    """Train net to predict what the diffusion says. A generator of its State after every step,
    always the same one, whose ema.flat goes on changing: copy what you keep. To draw,
    net.with_params(state.ema.flat). To go on, pass the State: rng, optimizer, momentum and ema
    are then its own, and steps includes those it has done.
    images: (N, H, W, C) floats within clip, to which samplers will clip x0; clip=None: any.
    labels: (N,) integers of 0..classes-1, at a rate of label_drop made the null label. loss:
    "l2", "l1" or "huber", times diffusion.loss_weight(t, weighting). optimizer: "adamw" or
    "muon". lr: times a linear warmup and half a cosine to 0. max_norm: the gradient's, at most.
    accumulate: batches to a step. chunk: images that a CPU works on at a time, so that they
    stay in its cache. gradient: called as add_gradient is, to share a chunk among the cores
    (cores.py), or for a loss of your own, which net.condition needs: images then have its
    channels behind their own. A loss that is not finite is a FloatingPointError, and the
    parameters stay as they were."""
    check(loss in LOSSES, f"loss is {loss!r}; it may be {list(LOSSES)}")
    check(optimizer in ("adamw", "muon"), f"optimizer is {optimizer!r}, not 'adamw' or 'muon'")
    diffusion.loss_weight(1, weighting)         # refuses a name that it does not know
    images = xp.asarray(images, net.params.flat.dtype)
    low, high = float(images.min()), float(images.max())
    least, most = clip or (-math.inf, math.inf)
    check(images.shape[1:] == net.input and least - 0.001 < low <= high < most + 0.001,
          f"images are {images.shape} from {low:.4g} to {high:.4g}; they have to be "
          f"(N, *{net.input}), and within {clip or 'what is finite'}")
    if clip == (-1, 1) and low >= 0:
        warnings.warn("no image is below 0: is it [0, 1]? It should be [-1, 1]", stacklevel=2)
    labels = np.zeros(len(images), int) if labels is None and not net.classes else labels
    labels = checked_labels(labels, max(net.classes - 1, 0))    # the null label is not for data
    check(labels.shape == images.shape[:1], f"labels are {labels.shape}, not ({len(images)},)")
    state = state or State(AdamW(net.params, momentum, optimizer == "muon"),
                           EMA(net.params.flat, ema), np.random.default_rng(rng))
    check(state.ema.flat.size == net.params.flat.size, "the state is of another network")
    chunk, total = (chunk if xp is np else batch), accumulate * batch * math.prod(net.image)

    def run():      # apart, so that the checks above run at the call, not at the first next()
        while state.step < steps:
            net.grads.flat = 0
            mean_loss = 0.0
            for _ in range(accumulate):
                drawn = draw_batch(diffusion, images, labels, net.null, state.rng, batch,
                                   label_drop)
                drop_rng = np.random.default_rng(state.rng.integers(2 ** 63))
                for i in range(0, batch, chunk):
                    part = (a[i:i + chunk] for a in drawn)
                    mean_loss += gradient(net, diffusion, *part, total, loss, weighting,
                                          drop_rng, clip)
            grads = net.grads.flat
            norm = float(xp.sqrt(grads @ grads))
            warm = min(1, (state.step + 1) / max(warmup, 1))
            state.lr = lr * warm * (1 + math.cos(math.pi * state.step / steps)) / 2
            if not math.isfinite(mean_loss + norm):
                raise FloatingPointError(f"the loss is {mean_loss}, the gradient's norm "
                                         f"{norm}; try a lower lr than {lr}")
            grads *= min(1, max_norm / max(norm, 1e-12))
            state.optimizer.step(net.params.flat, grads, state.lr, weight_decay)
            state.ema.step(net.params.flat)
            state.loss, state.step = mean_loss, state.step + 1
            yield state
    return run()

# -------------------------------------------------------------------------------- checkpoints
FORMAT = "tinyddpm checkpoint 2"

def save(path, net, diffusion, state=None, **notes):
    """Write all that drawing needs, and with a State all that going on with training needs, to
    one .npz without pickle. A save that fails, or of numbers that are not finite, leaves the
    old file. notes: anything JSON can hold, for load to give back."""
    meta = {"format": FORMAT, "net": {f.name: getattr(net, f.name) for f in fields(net)},
            "predicts": diffusion.predicts, "notes": notes}
    arrays = {"betas": diffusion.beta[1:], "params": net.params.flat}
    if state:
        adam, ema = state.optimizer, state.ema
        arrays |= {"ema": ema.flat, "m": adam.m, "v": adam.v}
        meta |= {"optimizer": [adam.momentum, adam.muon, adam.n], "ema": [ema.decay, ema.n],
                 "rng": state.rng.bit_generator.state,
                 "state": [state.step, state.loss, state.lr]}
    arrays = {name: asnumpy(a) for name, a in arrays.items()}
    check(all(np.isfinite(a).all() for a in arrays.values()),
          f"not all of {[*arrays]} is finite; {path} is as it was")
    meta = json.dumps(meta, default=lambda a: a.tolist())       # NumPy's numbers and arrays
    with written(path) as file:
        np.savez(file, meta=meta, **arrays)

@contextlib.contextmanager
def written(path):
    """A file to write to, in the end renamed to path, or to what path, as a link, points to."""
    path = os.path.realpath(path)
    check(os.path.isfile(path) or not os.path.exists(path), f"{path} is not a regular file")
    try:
        with open(f"{path}.tmp", "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(f"{path}.tmp")
        if isinstance(error, OSError):
            error.filename = error.filename or path     # a full disk names none
        raise

def load(path):
    """What save wrote: network, diffusion, State or None, notes. float16 weights are widened. A
    file that is damaged, or something else, is a ValueError."""
    with open(path, "rb") as file:
        try:
            with np.load(file, allow_pickle=False) as archive:
                return restored(**archive)
        except Exception as error:      # a damaged archive fails in many ways
            raise ValueError(f"{path} is not a tinyddpm checkpoint, or it is damaged "
                             f"({type(error).__name__}: {str(error)[:99]})") from error

def restored(meta, betas, params, **arrays):
    """What the arrays of a file hold; any that is missing or of another size is an error."""
    meta = json.loads(str(meta))
    check(meta["format"] == FORMAT, f"its format is {meta['format']!r}, not {FORMAT!r}")
    check(all(np.isfinite(a).all() for a in (params, *arrays.values())), "not all is finite")
    net = UNet(**meta["net"], dtype=np.promote_types(params.dtype, np.float32))
    net = net.with_params(xp.asarray(params, net.params.flat.dtype))
    diffusion, state = Diffusion(betas, meta["predicts"]), None
    if "state" in meta:
        momentum, muon, n = meta["optimizer"]
        adam, ema = AdamW(net.params, momentum, muon), EMA(net.params.flat)
        for place, name in ((adam.m, "m"), (adam.v, "v"), (ema.flat, "ema")):
            check(place.shape == arrays[name].shape, f"{name} is {arrays[name].shape}")
            place[:] = xp.asarray(arrays[name])
        adam.n, (ema.decay, ema.n) = n, meta["ema"]
        bits = getattr(np.random, meta["rng"]["bit_generator"])()
        bits.state = meta["rng"]
        state = State(adam, ema, np.random.Generator(bits), *meta["state"])
    return net, diffusion, state, meta["notes"]

# --------------------------------------------------------------------------------- likelihood
def variational_bound(diffusion, model, x0, rng):
    """The variational bound on -log2 p(x0) per pixel and channel (DDPM eqs. 5, 13), from one
    draw of x_t at every step. x0: (B, ...), bytes scaled to [-1, 1]. The reverse variance is
    the posterior's. A dict of means over the batch, in bits: "prior", KL(q(x_T|x0) || N(0, 1));
    "steps", KL(q(x_{t-1}|x_t,x0) || p(x_{t-1}|x_t)) for t = 2..T, float64 (T-1,); "decoder",
    -log2 p(x0|x_1), the Gaussian integrated over x0's bin; "total", their sum."""
    check(abs(x0).max() < 1.001, f"x0 reaches {abs(x0).max()}; it has to be within -1 and 1")
    rng, T, abar = np.random.default_rng(rng), diffusion.T, float(diffusion.abar[-1])
    prior = float((abar * x0 ** 2 - abar - math.log1p(-abar)).mean()) / 2
    kl = np.zeros(T + 1)
    for t in range(T, 0, -1):
        xt = diffusion.q_sample(x0, t, normal(rng, x0.shape, x0.dtype))
        guess = diffusion.to_x0(xt, t, model(xt, xp.full(len(xt), t)), clip=(-1, 1))
        if t > 1:
            mean, var = diffusion.q_posterior(x0, xt, t)
            error = diffusion.q_posterior(guess, xt, t)[0] - mean
            kl[t] = float((error ** 2 / (2 * var)).mean())
    # guess is now that of t = 1, whose posterior has no variance; take t = 2's (DDPM's code).
    var = diffusion.beta[1] * (1 if T == 1 else diffusion.beta[2] / (1 - diffusion.abar[2]))
    decoder = -float(np.log(bin_probability(x0, guess, var ** 0.5)).mean())
    prior, kl, decoder = (nats / math.log(2) for nats in (prior, kl, decoder))
    return dict(prior=prior, steps=kl[2:], decoder=decoder, total=prior + kl.sum() + decoder)

def bin_probability(x, mean, std):
    """Probability that a normal variable of this mean and standard deviation falls in the bin
    of byte x, scaled to [-1, 1] (DDPM eq. 13). The bins of -1 and 1 take the whole tail."""
    def above(z):               # P(normal > z); for z > 0 it keeps its digits
        return 0.5 * np.frompyfunc(math.erfc, 1, 1)(z / 2 ** 0.5).astype(np.float64)
    x, mean = asnumpy(x).astype(np.float64), asnumpy(mean).astype(np.float64)
    d, h = (x - mean) / std, 1 / 255 / std
    p = above(abs(d) - h) - above(abs(d) + h)
    p = np.where(x > 0.999, above(d - h), np.where(x < -0.999, above(-d - h), p))
    return np.maximum(p, 1e-300)        # of which the logarithm is finite

# ------------------------------------------------------------------------- the gradient check
def gradient_errors(layer, p, inputs, h=1e-5):
    """Compare a layer's gradients with finite differences, in float64 whatever it is given.
    layer(p, *inputs), or layer(*inputs) where p is None, -> y and back. For random weights c,
    f = sum(c * y) is a number. Along a random direction u of an input or a parameter a, its
    slope (f(a + h u) - f(a - h u)) / 2h has to be sum(u * df/da). Yields the name of each and
    the error, relative to the length of df/da, the slope's usual size."""
    rng = np.random.default_rng(1)
    args = inputs = [xp.array(a, np.float64) for a in inputs]
    if p is not None:
        p = Params(p.layout, p.flat.astype(np.float64), xp.zeros(p.flat.shape))
        args = [p, *inputs]
    y, back = layer(*args)
    c = normal(rng, y.shape, y.dtype)
    dinputs = back(c)
    dinputs = dinputs if isinstance(dinputs, tuple) else (dinputs,)
    pairs, end = [(f"input {i + 1}", *pair) for i, pair in enumerate(zip(inputs, dinputs))], 0
    for name, shape, _ in leaves(p.layout) if p else ():
        start, end = end, end + math.prod(shape)
        pairs.append((name, p.flat[start:end], p.grad.flat[start:end]))
    for name, a, da in pairs:
        start, u, f = a.copy(), normal(rng, a.shape, a.dtype), []
        for shift in (h, -h, 0):                # 0 puts it back
            a[...] = start + shift * u
            f.append(float((c * layer(*args)[0]).sum()))
        error = abs((f[0] - f[1]) / (2 * h) - float((u * da).sum()))
        yield name, error / max(float(xp.sqrt((da ** 2).sum())), 1e-3)

def gradient_table():
    """All gradients of a network that has every kind of layer: names and errors."""
    net = UNet((11, 13, 3), (12, 16), classes=3, blocks=2, attention=(1,), dropout=0.2,
               space_to_depth=True)
    net.params.flat = 0.3 * normal(0, net.params.flat.shape)        # no part of it 0
    t, y, x = xp.asarray([1, 40, 999]), np.array([0, 2, 3]), normal(0, (3, *net.image))
    return gradient_errors(lambda p, x: net.with_params(p).forward(x, t, y, 1), net.params, [x])

if __name__ == "__main__":
    errors = dict(gradient_table())
    print("gradient of                           error, relative to its length")
    for name, error in errors.items():
        print(f"{name:38}{error:.1e}{'' if error <= 1e-6 else '   WRONG'}")
    raise SystemExit(not all(error <= 1e-6 for error in errors.values()))
