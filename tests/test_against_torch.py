"""The layers, the network, the optimisers and whole training steps against PyTorch, in float64.

The layers are written here once more from PyTorch's own functions, on the same parameters; the
network, and with it the layers left out here, in benchmarks/torch_unet.py. Compared are the
values and, by autograd, the gradients of all inputs and of all parameters.

    python tests/test_against_torch.py      what, and its largest relative difference
"""
import math
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "benchmarks")]
torch = pytest.importorskip("torch", reason="PyTorch is not installed: tests/requirements.txt")

import torch.nn.functional as F                                                 # noqa: E402

import tinyddpm as td                                                           # noqa: E402
from torch_unet import Norm, TorchUNet                                          # noqa: E402

pytestmark = pytest.mark.skipif(td.xp is not np, reason="these run with TINYDDPM_BACKEND=numpy")
LARGEST = 1e-10     # allowed, relative; float64's rounding is 1e-16 for each operation


def leaf(a):
    return torch.tensor(a, requires_grad=True)


def numpy(a):
    return a.detach().numpy()


def difference(ours, theirs, least=0.0):
    """The largest difference, relative to the largest value, or to `least` if that is more."""
    assert ours.shape == theirs.shape
    size = max(np.abs(theirs).max(initial=0), least)
    return float(np.abs(ours - theirs).max(initial=0) / size) if size else 0.0


def by_leaves(layout, ours, theirs):
    """The largest difference of any parameter, relative to that parameter's own size, or to a
    thousandth of the largest of all: some gradients are 0 but for rounding, such as a bias's
    just before a norm whose groups are single channels."""
    ends = np.cumsum([math.prod(shape) for _, shape, _ in td.leaves(layout)])[:-1]
    least = 1e-3 * np.abs(theirs).max()
    return max(difference(a, b, least)
               for a, b in zip(np.split(ours, ends), np.split(theirs, ends)))


# ----------------------------------------------------------- the layers again, from PyTorch's

def first(x):
    """(B, H, W, C), tinyddpm's, as (B, C, H, W), PyTorch's."""
    return x.permute(0, 3, 1, 2)


def last(x):
    return x.permute(0, 2, 3, 1)


def linear(q, x):
    return F.linear(x, q.w.T, q.b)


def conv3x3(q, x):
    return last(F.conv2d(first(x), q.w.permute(3, 2, 0, 1), q.b, padding=1))


def group_norm(x, scale, shift, groups=8):
    groups = math.gcd(groups, x.shape[3]) if x.shape[1:3] != (1, 1) else 1
    scale, shift = (a.reshape(-1, 1, 1, x.shape[3]) for a in (scale, shift))
    return last(F.group_norm(first(x), groups)) * (1 + scale) + shift


def norm(q, x):
    return group_norm(x, q.scale, q.shift)


def attention(q, x, heads):
    """nn.MultiheadAttention's own function: all of q, k and v, each head after head."""
    B, H, W, C = x.shape
    h = norm(q.norm, x).reshape(B, H * W, C).transpose(0, 1)
    h, _ = F.multi_head_attention_forward(
        h, h, h, C, heads, q.qkv.w.T, q.qkv.b, None, None, False, 0.0, q.out.w.T, q.out.b)
    return x + h.transpose(0, 1).reshape(B, H, W, C)


# ------------------------------------------------------------------------- both side by side

def layer(ours, theirs, layout, *sizes):
    """The differences of one layer: its value, each input's gradient, the parameters'. With an
    empty layout neither takes parameters."""
    rng = np.random.default_rng(0)
    flat = rng.standard_normal(sum(math.prod(shape) for _, shape, _ in td.leaves(layout)))
    inputs = [rng.standard_normal(size) for size in sizes]
    p = td.Params(layout, flat, 0 * flat)
    y, back = ours(*[p] * bool(layout), *inputs)
    dy = rng.standard_normal(y.shape)
    gradients = back(dy)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    # Params cut up a tensor as they do an array; all gradients gather in its one flat tensor.
    flat, leaves = leaf(flat), [leaf(x) for x in inputs]
    value = theirs(*[td.Params(layout, flat)] * bool(layout), *leaves)
    value.backward(torch.tensor(dy))
    found = {"value": difference(y, numpy(value))}
    for i, (dx, x) in enumerate(zip(gradients, leaves)):
        found[f"input {i + 1}"] = difference(dx, numpy(x.grad))
    if layout:
        found["parameters"] = by_leaves(layout, p.grad.flat, numpy(flat.grad))
    return found


def attended(C, heads):
    return layer(partial(td.attention, heads=heads), partial(attention, heads=heads),
                 td.attention_layout(C), (2, 3, 4, C))


def adaptive(C, groups, H=4):
    return layer(partial(td.group_norm, groups=groups), partial(group_norm, groups=groups), {},
                 (3, H, H, C), (3, C), (3, C))


X = (2, 4, 6, 8)
LAYERS = {
    "silu": lambda: layer(td.silu, F.silu, {}, X),
    "linear": lambda: layer(td.linear, linear, td.product_layout(8, 7), X),
    "conv3x3": lambda: layer(td.conv3x3, conv3x3, td.product_layout(3, 3, 8, 7), X),
    "conv3x3, in portions": lambda: layer(td.conv3x3, conv3x3, td.product_layout(3, 3, 32, 24),
                                          (5, 16, 16, 32)),
    "group_norm": lambda: adaptive(16, 8),
    "group_norm, 1 group of 5": lambda: adaptive(5, 8),
    "group_norm, a single pixel": lambda: adaptive(8, 8, 1),
    "norm": lambda: layer(td.norm, norm, td.norm_layout(24), (2, 4, 6, 24)),
    "attention, 1 head": lambda: attended(6, 1),
    "attention, 4 heads": lambda: attended(12, 4),
}


# ------------------------------------------------------------------------------- the network

def random_net(cls=td.UNet, dtype=np.float64, **changes):
    """A small network, none of whose parameters is 0, so that nothing hides behind a zero."""
    net = cls(**dict(image=(8, 4, 1), channels=(12, 24), classes=3, dtype=dtype) | changes)
    net.params.flat = 0.3 * np.random.default_rng(1).standard_normal(net.params.flat.size)
    return net


def network(dtype=np.float64, **changes):
    """Output, gradient of the picture, gradient of every parameter, for four steps and labels.
    The twin computes in float64 whatever the dtype."""
    net, rng = random_net(**changes), np.random.default_rng(2)
    net.params.flat = net.params.flat.astype(dtype)
    mine = random_net(dtype=dtype, **changes)
    x, dy = rng.standard_normal((2, 4, *net.image)).astype(dtype)
    t, y = np.array([1, 37, 500, 1000]), np.array([0, 2, 3, 1]) % (net.classes + 1)
    out, back = mine.forward(x, t, y)
    dx, twin, picture = back(dy), TorchUNet(net), leaf(x.astype(np.float64))
    assert difference(twin.flat(net), net.params.flat) < 1e-14      # the weights came across
    other = twin(picture, torch.tensor(t), torch.tensor(y))
    other.backward(torch.tensor(dy).double())
    return {"value": difference(out, numpy(other)),
            "input 1": difference(dx, numpy(picture.grad)),
            "parameters": by_leaves(net.params.layout, mine.grads.flat, twin.gradients(net))}


NETWORKS = {
    "U-Net": dict(),
    "U-Net, three levels": dict(channels=(12, 6, 10), blocks=2),
    "U-Net, blocks 1, 3, 2": dict(channels=(6, 6, 12), blocks=(1, 3, 2)),
    "U-Net, attention": dict(attention=(0, 1), heads=4),
    "U-Net, no classes": dict(classes=0),
    "U-Net, groups of all channels": dict(channels=(10, 9, 7), image=(4, 4, 2)),
    "U-Net, groups of one channel": dict(channels=(4, 8)),
    "U-Net, padded": dict(image=(5, 7, 2), channels=(6, 10, 12), attention=(2,), heads=2),
    "U-Net, all of it": dict(image=(11, 5, 3), space_to_depth=True, attention=(1,), heads=3),
    "U-Net, down to a single pixel": dict(image=(2, 2, 1), channels=(8, 16), attention=(1,)),
}
NETS = {name: partial(network, **changes) for name, changes in NETWORKS.items()}


# ------------------------------------------------------------------------------- the training

def same_steps(ours, theirs, shape, decay=0.1):
    """Some steps, each of another learning rate, of gradients of all sizes."""
    rng = np.random.default_rng(0)
    p = td.initial({"top.w": (shape, 1)}, rng, np.float64)
    parameter = torch.nn.Parameter(torch.tensor(p.flat).reshape(shape))
    mine, theirs, worst = ours(p), theirs([parameter]), 0.0
    for n in range(8):
        gradient = 10.0 ** rng.uniform(-8, 2, shape) * rng.standard_normal(shape)
        rate = 0.1 / (n + 1)
        mine.step(p.flat, gradient.ravel(), rate, decay)
        theirs.param_groups[0]["lr"], parameter.grad = rate, torch.tensor(gradient)
        theirs.step()
        worst = max(worst, difference(p.flat.reshape(shape), numpy(parameter)))
    return {"parameters": worst}


def adam():
    return same_steps(partial(td.AdamW, momentum=(0.8, 0.95)), partial(
        torch.optim.AdamW, betas=(0.8, 0.95), weight_decay=0.1), (7, 5))


def muon(*shape):
    """PyTorch's, which iterates in bfloat16, made to do so in float64."""
    with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone):
        return same_steps(partial(td.AdamW, muon=True, momentum=(0.95, 0.9)), partial(
            torch.optim.Muon, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"), shape)


class Noting(td.UNet):
    """A network that notes what it is asked, its copies with other parameters too."""
    def forward(self, x, t, y=None, rng=None):
        self.asked.append((x, t, y))
        return super().forward(x, t, y, rng)


def training(loss, weighting, predicts, max_norm, decay, accumulate):
    """Whole steps of td.train, and the same in PyTorch from the same x_t: loss, backward, clip,
    AdamW, EMA. There is one picture only, so that x_t tells which noise was drawn."""
    net, d = random_net(Noting, channels=(12, 6)), td.Diffusion(FEW_BETAS, predicts)
    net.asked, twin = [], TorchUNet(net)
    x0 = np.tanh(np.random.default_rng(3).standard_normal((1, *net.image)))
    parameters = [*twin.parameters()]
    mean = [p.detach().clone() for p in parameters]
    # A norm's weight is 1 more than our scale: our decay draws it to 1, AdamW's to 0.
    norms = [module.weight for module in twin.modules() if isinstance(module, Norm)]
    rest = [p for p in parameters if not any(p is weight for weight in norms)]
    optimiser = torch.optim.AdamW([{"params": rest, "weight_decay": decay},
                                   {"params": norms, "weight_decay": 0}], betas=(0.9, 0.99))
    worst = {}
    for n, state in enumerate(td.train(
            net, d, x0, np.zeros(1, int), steps=4, batch=8, loss=loss, weighting=weighting,
            lr=0.02, warmup=2, weight_decay=decay, max_norm=max_norm, ema=0.6, label_drop=0.5,
            accumulate=accumulate)):
        optimiser.zero_grad()
        losses = [loss_of(twin, d, x0, *asked, loss, weighting) for asked in net.asked]
        net.asked.clear()
        total = sum(losses) / accumulate
        total.backward()
        length = float(torch.nn.utils.get_total_norm([p.grad for p in parameters]))
        assert max_norm == math.inf or length > max_norm    # it has to clip, to be compared
        # PyTorch divides by the norm + 1e-6; this max_norm makes up for it.
        torch.nn.utils.clip_grad_norm_(parameters, max_norm * (1 + 1e-6 / length))
        with torch.no_grad():
            for weight in norms:
                weight -= state.lr * decay * (weight - 1)
        for group in optimiser.param_groups:
            group["lr"] = state.lr
        optimiser.step()
        torch._foreach_lerp_(mean, [p.detach() for p in parameters],
                             1 - min(0.6, (1 + n) / (10 + n)))
        for what, pair in {"value": (np.array(state.loss), numpy(total)),
                           "parameters": (net.params.flat, twin.flat(net)),
                           "mean": (state.ema.flat, twin.flat(net, mean))}.items():
            worst[what] = max(worst.get(what, 0), difference(*pair))
    return worst


FEW_BETAS = td.linear_betas(10, 0.02, 0.4)
THEIR_LOSS = {"l2": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss}


def loss_of(twin, d, x0, x, t, y, loss, weighting):
    """The mean loss of one batch: its noise is what x0 leaves of x_t; Min-SNR weights."""
    abar = np.cumprod(1 - FEW_BETAS)[t - 1]
    snr, signal, noise = abar / (1 - abar), *(a[:, None, None, None] ** 0.5
                                              for a in (abar, 1 - abar))
    eps = (x - signal * x0) / noise
    target, weight = {"eps": (eps, 1 / snr), "v": (signal * eps - noise * x0, 1 / (snr + 1)),
                      "x0": (x0 + 0 * x, 1), "flow": (eps - x0, (1 + snr ** 0.5) ** -2.0)
                      }[d.predicts]
    weight = snr ** 0 if weighting == "simple" else weight * np.minimum(snr, 5)
    out = twin(torch.tensor(x), torch.tensor(t), torch.tensor(y))
    each = THEIR_LOSS[loss](out, torch.tensor(target), reduction="none")
    return (torch.tensor(weight) * each.mean((1, 2, 3))).mean()


TRAINING = {
    "AdamW": adam,
    "Muon, more rows": partial(muon, 9, 4),
    "Muon, more columns": partial(muon, 4, 9),
    "training, l2 of v, clipped": partial(training, "l2", "simple", "v", 0.5, 0.0, 1),
    "training, huber of eps": partial(training, "huber", "min_snr", "eps", math.inf, 0.1, 1),
    "training, l1 of x0, in 2 parts": partial(training, "l1", "min_snr", "x0", 0.1, 0.01, 2),
    "training, l2 of flow": partial(training, "l2", "min_snr", "flow", 0.1, 0.0, 1),
}
ROWS = LAYERS | NETS | TRAINING


@pytest.mark.parametrize("what", ROWS)
def test_same_as_pytorch(what):
    differences = ROWS[what]()
    assert all(value <= LARGEST for value in differences.values()), differences


def test_float32_is_float64_to_its_rounding():
    """The type that is trained in, against PyTorch in float64."""
    differences = network(np.float32, attention=(1,), blocks=2)
    assert all(1e-8 < value < 2e-5 for value in differences.values()), differences


def test_the_comparison_sees_a_small_part():
    """One number among thousands, off by a millionth."""
    net = random_net(channels=(12, 6))
    flat, other = net.params.flat, net.params.flat.copy()
    td.Params(net.params.layout, other).top.inner.down[0].norm1.scale[0] *= 1 + 1e-6
    assert by_leaves(net.params.layout, flat, flat) == 0
    assert by_leaves(net.params.layout, other, flat) > 1e-8


def report():
    """Print the table; return whether everything in it is small enough."""
    print(f"PyTorch {torch.__version__}: largest differences, relative to the largest value\n")
    worst = 0.0
    for what, compare in ROWS.items():
        found = compare()
        print(f"{what:33}" + "  ".join(f"{part} {size:.0e}" for part, size in found.items()))
        worst = max(worst, *found.values())
    print(f"\nthe largest of all: {worst:.1e}; allowed: {LARGEST:.0e}")
    return worst <= LARGEST


if __name__ == "__main__":
    raise SystemExit(not report())
