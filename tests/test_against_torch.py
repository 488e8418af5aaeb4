"""The layers, the network and the training step against PyTorch's autograd, in float64.

The layers are written here a second time from PyTorch's own functions, on the same parameters;
for the network there is benchmarks/torch_unet.py. What is compared are values, the gradients of
all inputs and of all parameters.

    python tests/test_against_torch.py      what, and its largest relative difference
"""
import math
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "benchmarks")]
torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch")

import torch.nn.functional as F                                                 # noqa: E402

import tinyddpm as td                                                           # noqa: E402
from torch_unet import TorchUNet                                                # noqa: E402

pytestmark = pytest.mark.skipif(td.xp is not np, reason="these run with TINYDDPM_BACKEND=numpy")
LARGEST = 1e-10     # allowed, relative; float64's rounding is 1e-16 for each operation


def tensor(a):
    return torch.tensor(a, requires_grad=a.dtype.kind == "f")


def numpy(a):
    return a.detach().numpy()


def difference(ours, theirs, least=0.0):
    """The largest difference, relative to the largest value, or to `least` if that is more."""
    assert ours.shape == theirs.shape
    size = max(np.abs(theirs).max(initial=0), least)
    return float(np.abs(ours - theirs).max(initial=0) / size) if size else 0.0


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
    y = last(F.group_norm(first(x), math.gcd(groups, x.shape[3])))
    return y * (1 + scale[:, None, None]) + shift[:, None, None]


def norm(q, x):
    return last(F.group_norm(first(x), math.gcd(8, x.shape[3]), 1 + q.scale, q.shift))


def attention(q, x, heads):
    """nn.MultiheadAttention's own function: all of q, k and v, each head after head."""
    B, H, W, C = x.shape
    h = norm(q.norm, x).reshape(B, H * W, C).transpose(0, 1)
    h, _ = F.multi_head_attention_forward(
        h, h, h, C, heads, q.qkv.w.T, q.qkv.b, None, None, False, 0.0, q.out.w.T, q.out.b)
    return x + h.transpose(0, 1).reshape(B, H, W, C)


def res_block(q, x, emb, drop):
    h = conv3x3(q.conv1, F.silu(norm(q.norm1, x)))
    h = group_norm(h, *linear(q.film, emb).chunk(2, 1))
    return conv3x3(q.conv2, drop(F.silu(h))) + (linear(q.skip, x) if hasattr(q, "skip") else x)


def sinusoids(t, E):
    angle = t[:, None] / 10000 ** torch.linspace(0, 1, E // 2, dtype=torch.float64)
    return torch.cat([angle.sin(), angle.cos()], 1)


def embed(q, t, labels):
    h = linear(q.time1, sinusoids(t, len(q.time1.w)))
    return F.silu(linear(q.time2, F.silu(h)) + F.embedding(labels, q.label))


def fold(x):
    """pixel_unshuffle has all four pixels of one channel together, tinyddpm all channels of one
    pixel."""
    x = F.pixel_unshuffle(first(x), 2)
    return last(x.unflatten(1, (-1, 4)).transpose(1, 2).flatten(1, 2))


# ------------------------------------------------------------------------- both side by side

RATE, SEED = 0.3, 5


def free(layer, *options):
    """A layer of ours without parameters, called as if it had some."""
    def with_parameters(p, *inputs):
        y, back = layer(*inputs, *options)
        return y, lambda dy, g: back(dy)
    return with_parameters


def ours_dropped(x):
    return td.dropout(x, RATE, np.random.default_rng(SEED))


def dropped(x):
    """PyTorch's formula with the mask that tinyddpm draws; F.dropout draws one of its own."""
    kept = np.random.default_rng(SEED).random(tuple(x.shape), dtype=np.float32) >= RATE
    return torch.where(torch.tensor(kept), x / (1 - RATE), 0)


def ours_block(p, x, emb):
    y, back = td.res_block(p, x, emb, ours_dropped)

    def back_both(dy, g):
        demb = np.zeros_like(emb)
        return back(dy, g, demb), demb
    return y, back_both


def layer(ours, theirs, layout, *sizes):
    """The differences of one layer: its value, each input's gradient, the parameters'."""
    rng = np.random.default_rng(0)
    p = td.Tree(layout, rng.standard_normal(td.size_of(layout)))
    inputs, g = [rng.standard_normal(size) for size in sizes], td.Tree(layout, 0 * p.flat)
    y, back = ours(p, *inputs)
    dy = rng.standard_normal(y.shape)
    gradients = back(dy, g)
    gradients = gradients if isinstance(gradients, tuple) else [gradients] * len(inputs)
    # A Tree cuts up a tensor as it does an array; all gradients gather in its one flat tensor.
    flat, leaves = tensor(p.flat), [tensor(x) for x in inputs]
    value = theirs(td.Tree(layout, flat), *leaves)
    value.backward(torch.tensor(dy))
    found = {"value": difference(y, numpy(value))}
    for i, (dx, leaf) in enumerate(zip(gradients, leaves)):
        found[f"input {i + 1}"] = difference(dx, numpy(leaf.grad))
    if layout:
        found["parameters"] = by_leaves(layout, g.flat, numpy(flat.grad))
    return found


def by_leaves(layout, ours, theirs):
    """The largest difference of any parameter's gradient, relative to that parameter's own, or
    to a thousandth of the largest of all: some are 0 but for rounding, such as a bias's just
    before a norm whose groups are single channels."""
    cuts = np.cumsum([math.prod(shape) for shape, _ in td.leaves(layout)])[:-1]
    least = 1e-3 * np.abs(theirs).max()
    return max(difference(a, b, least)
               for a, b in zip(np.split(ours, cuts), np.split(theirs, cuts)))


def embedding(E, D, classes=3):
    t, labels = np.array([1, 50, 999, 1000]), np.array([2, 0, 3, 2])
    layout = {"time1": td.linear_layout(E, D), "time2": td.linear_layout(D, D),
              "label": ((classes + 1, D), 1)}
    return layer(lambda p: td.embed(p, t, labels),
                 lambda q: embed(q, torch.tensor(t), torch.tensor(labels)), layout)


def sinusoidal(E):
    """Steps are whole numbers: there is no gradient."""
    t = np.arange(0, 1001, 50)
    return {"value": difference(td.sinusoids(t, E), numpy(sinusoids(torch.tensor(t), E)))}


def block(C, D, E=6):
    return layer(ours_block, lambda q, x, emb: res_block(q, x, emb, dropped),
                 td.block_layout(C, D, E), (2, 5, 4, C), (2, E))


def attended(C, heads, H=3, W=4):
    return layer(lambda p, x: td.attention(p, x, heads),
                 lambda q, x: attention(q, x, heads), td.attention_layout(C), (2, H, W, C))


def adaptive(C, groups):
    return layer(free(td.group_norm, groups), lambda q, *inputs: group_norm(*inputs, groups),
                 {}, (3, 4, 5, C), (3, C), (3, C))


X = (2, 4, 6, 5)
LAYERS = {
    "silu": lambda: layer(free(td.silu), lambda q, x: F.silu(x), {}, X),
    "linear": lambda: layer(td.linear, linear, td.linear_layout(5, 7), X),
    "linear, rows": lambda: layer(td.linear, linear, td.linear_layout(5, 7), (3, 5)),
    "conv3x3": lambda: layer(td.conv3x3, conv3x3, td.conv_layout(5, 7), X),
    "conv3x3, 1x1 picture": lambda: layer(td.conv3x3, conv3x3, td.conv_layout(3, 2),
                                          (2, 1, 1, 3)),
    "conv3x3, in portions": lambda: layer(td.conv3x3, conv3x3, td.conv_layout(32, 24),
                                          (5, 16, 16, 32)),
    "group_norm": lambda: adaptive(16, 8),
    "group_norm, 3 groups of 2": lambda: adaptive(6, 3),
    "group_norm, 1 group of 5": lambda: adaptive(5, 8),
    "group_norm, 4 groups of 1": lambda: adaptive(4, 8),
    "norm": lambda: layer(td.norm, norm, td.norm_layout(24), (2, 4, 6, 24)),
    "dropout, one mask": lambda: layer(free(ours_dropped), lambda q, x: dropped(x), {}, X),
    "down": lambda: layer(free(td.down), lambda q, x: last(F.avg_pool2d(first(x), 2)), {}, X),
    "up": lambda: layer(free(td.up), lambda q, x: last(F.interpolate(
        first(x), scale_factor=2.0, mode="nearest")), {}, X),
    "fold": lambda: layer(lambda p, x: (td.fold(x), lambda dy, g: td.unfold(dy)),
                          lambda q, x: fold(x), {}, X),
    "attention, 1 head": lambda: attended(6, 1),
    "attention, 4 heads": lambda: attended(12, 4),
    "attention, 8 heads of 1": lambda: attended(8, 8),
    "attention, 1 pixel": lambda: attended(6, 3, 1, 1),
    "res_block, C = D": lambda: block(12, 12),
    "res_block, C != D": lambda: block(5, 12),
    "sinusoids, width 32": lambda: sinusoidal(32),
    "sinusoids, width 4": lambda: sinusoidal(4),
    "embed": lambda: embedding(8, 10),
}


THEIR_LOSS = {"l2": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss}


def loss(name):
    """Element by element, and the slope by autograd. No error is at a kink."""
    d = np.linspace(-3, 3, 41) + 0.01
    value, slope = td.LOSSES[name](d)
    x = tensor(d)
    y = THEIR_LOSS[name](x, torch.zeros_like(x), reduction="none")
    y.sum().backward()
    return {"value": difference(value, numpy(y)), "input 1": difference(slope, numpy(x.grad))}


LOSSES = {f"loss {name}": lambda name=name: loss(name) for name in THEIR_LOSS}


# ------------------------------------------------------------------------------- the network

def random_net(**changes):
    """A small network, none of whose parameters is 0, so that nothing hides behind a zero."""
    net = td.UNet(**dict(image=(8, 4, 1), channels=(12, 24), classes=3, dtype=np.float64)
                  | changes)
    net.params.flat[:] = 0.3 * np.random.default_rng(1).standard_normal(net.params.flat.size)
    return net


def network(dtype=np.float64, **changes):
    """Output, gradient of the picture, gradient of every parameter, for four steps and labels.
    The twin computes in float64 whatever the dtype."""
    net, rng = random_net(**changes), np.random.default_rng(2)
    x, dy = rng.standard_normal((2, 4, *net.image)).astype(dtype)
    t, y = np.array([1, 37, 500, 1000]), np.array([0, 2, 3, 1]) % (net.classes + 1)
    net.params.flat[:] = net.params.flat.astype(dtype)
    mine = td.UNet(**net.config, dtype=dtype)
    mine.params.flat[:] = net.params.flat
    out, back = mine.forward(x, t, y)
    dx, twin, picture = back(dy), TorchUNet(net), tensor(x.astype(np.float64))
    assert difference(twin.flat(net), net.params.flat) < 1e-14      # the weights came across
    other = twin(picture, torch.tensor(t), torch.tensor(y))
    other.backward(torch.tensor(dy).double())
    return {"value": difference(out, numpy(other)),
            "input 1": difference(dx, numpy(picture.grad)),
            "parameters": by_leaves(net.params.layout, mine.grads.flat, twin.gradients(net))}


NETWORKS = {
    "U-Net": dict(),
    "U-Net, one level": dict(channels=(16,)),
    "U-Net, three levels": dict(channels=(12, 6, 10), blocks=2),
    "U-Net, blocks 1, 3, 2": dict(channels=(6, 6, 12), blocks=(1, 3, 2)),
    "U-Net, attention": dict(attention=(0, 1), heads=4),
    "U-Net, attention below, 1 head": dict(attention=(1,), heads=1, blocks=2),
    "U-Net, no classes": dict(classes=0),
    "U-Net, 3 channels": dict(image=(4, 8, 3)),
    "U-Net, groups of all channels": dict(channels=(10, 9, 7), image=(4, 4, 2)),
    "U-Net, groups of one channel": dict(channels=(4, 8)),
    "U-Net, folded": dict(fold=True, image=(8, 8, 3)),
    "U-Net, padded": dict(image=(5, 7, 2), channels=(6, 10, 12), attention=(2,), heads=2),
    "U-Net, padded and folded": dict(image=(11, 5, 3), fold=True, attention=(1,), heads=3),
}
NETS = {name: lambda changes=changes: network(**changes) for name, changes in NETWORKS.items()}


# ------------------------------------------------------------------------------- the training

def adam(decay, steps=8):
    """AdamW, another learning rate at every step. PyTorch's decay is times the rate, too."""
    rng = np.random.default_rng(0)
    params = rng.standard_normal(50)
    theirs = torch.nn.Parameter(torch.tensor(params))
    optimiser = torch.optim.AdamW([theirs], betas=(0.8, 0.95), eps=1e-6, weight_decay=decay)
    mine, worst = td.Adam(params, (0.8, 0.95), 1e-6), 0.0
    for n in range(steps):
        gradient = 10.0 ** rng.uniform(-8, 2, 50) * rng.standard_normal(50)     # eps matters
        rate = 0.1 / (n + 1)
        mine.step(params, gradient, rate, decay)
        optimiser.param_groups[0]["lr"], theirs.grad = rate, torch.tensor(gradient)
        optimiser.step()
        worst = max(worst, difference(params, numpy(theirs)))
    state = optimiser.state[theirs]
    return {"parameters": worst, "first moment": difference(mine.m, numpy(state["exp_avg"])),
            "second moment": difference(mine.v, numpy(state["exp_avg_sq"]))}


def running_mean():
    """PyTorch's AveragedModel, its decay made to climb as ours does. (It has a first step of
    its own, which copies; it is given the start.)"""
    module = torch.nn.Linear(5, 5).double()
    params = numpy(module.weight).copy()
    ema, worst = td.EMA(params, 0.7), 0.0
    average = torch.optim.swa_utils.AveragedModel(module, avg_fn=lambda mean, new, n: mean.lerp(
        new, 1 - min(0.7, n.item() / (9 + n.item()))))      # n counts the copy, so it is n + 1
    average.update_parameters(module)
    for n in range(60):
        with torch.no_grad():
            module.weight += torch.sin(torch.arange(25.0).double().reshape(5, 5) * (n + 1))
        params[:] = numpy(module.weight)
        ema.step(params)
        average.update_parameters(module)
        worst = max(worst, difference(ema.flat, numpy(average.module.weight)))
    return {"parameters": worst}


class Noting(td.UNet):
    """A network that notes what it is asked, its twins into the same list."""
    def forward(self, x, t, y=None, rng=None):
        self.asked.append((x, t, y))
        return super().forward(x, t, y, rng)


def training(loss, weighting, kind, clip, decay, accumulate, steps=4):
    """Whole steps of td.train, and the same in PyTorch from the same x_t: loss, backward, clip,
    AdamW, EMA. There is one picture only, so that x_t tells which noise was drawn."""
    net, d = random_net(channels=(12, 6)), td.Diffusion(td.linear_betas(10, 0.02, 0.4))
    net.__class__, net.asked = Noting, []
    x0 = np.tanh(np.random.default_rng(3).standard_normal((1, *net.image)))
    twin = TorchUNet(net)
    parameters = list(twin.parameters())
    mean = [p.detach().clone() for p in parameters]
    # A norm's weight is 1 more than our scale: our decay draws it to 1, AdamW's to 0.
    norms = [m.weight for m in twin.modules() if isinstance(m, torch.nn.GroupNorm)]
    rest = [p for p in parameters if not any(p is weight for weight in norms)]
    optimiser = torch.optim.AdamW([{"params": rest, "weight_decay": decay},
                                   {"params": norms, "weight_decay": 0}], betas=(0.9, 0.99))
    run = td.train(net, d, x0, np.zeros(1, int), steps=steps, batch=8, kind=kind, loss=loss,
                   weighting=weighting, lr=0.02, warmup=2, decay=decay, clip=clip, ema=0.6,
                   label_drop=0.5, accumulate=accumulate)
    worst = dict.fromkeys(["value", "parameters", "mean"], 0.0)
    for n, state in enumerate(run):
        optimiser.zero_grad()
        assert len(net.asked) == accumulate
        total = 0.0
        while net.asked:
            share = loss_of(twin, d, x0, *net.asked.pop(), loss, weighting, kind) / accumulate
            share.backward()
            total += share.item()
        length = float(torch.nn.utils.get_total_norm([p.grad for p in parameters]))
        assert clip == math.inf or length > clip        # it has to clip, to be compared
        # PyTorch divides by the norm + 1e-6; this clip makes up for it.
        torch.nn.utils.clip_grad_norm_(parameters, clip * (1 + 1e-6 / length))
        with torch.no_grad():
            for weight in norms:
                weight -= state.lr * decay * (weight - 1)
        for group in optimiser.param_groups:
            group["lr"] = state.lr
        optimiser.step()
        torch._foreach_lerp_(mean, [p.detach() for p in parameters],
                             1 - min(0.6, (1 + n) / (10 + n)))
        for what, a, b in [("value", np.array(state.loss), np.array(total)),
                           ("parameters", net.params.flat, twin.flat(net)),
                           ("mean", state.ema.flat, twin.flat(net, mean))]:
            worst[what] = max(worst[what], difference(a, b))
    assert n == steps - 1
    return worst


def loss_of(twin, d, x0, x, t, y, loss, weighting, kind):
    """The mean loss of one batch: its noise is what x0 leaves of x_t; Min-SNR weights."""
    abar = d.abar[t][:, None, None, None]
    eps = (x - abar ** 0.5 * x0) / (1 - abar) ** 0.5
    target = {"eps": eps, "v": abar ** 0.5 * eps - (1 - abar) ** 0.5 * x0, "x0": x0 + 0 * x}
    snr = d.abar[t] / (1 - d.abar[t])
    weight = {"eps": 1 / snr, "v": 1 / (snr + 1), "x0": 1}[kind] * np.minimum(snr, 5)
    weight = np.ones_like(snr) if weighting == "simple" else weight
    out = twin(torch.tensor(x), torch.tensor(t), torch.tensor(y))
    each = THEIR_LOSS[loss](out, torch.tensor(target[kind]), reduction="none")
    return (torch.tensor(weight) * each.mean((1, 2, 3))).mean()


TRAINING = {
    "AdamW, no decay": lambda: adam(0.0),
    "AdamW, decay 0.1": lambda: adam(0.1),
    "EMA": running_mean,
    "training, l2 of v, clipped": lambda: training("l2", "simple", "v", 0.5, 0.0, 1),
    "training, huber of eps, decay": lambda: training("huber", "min_snr", "eps", math.inf, 0.1,
                                                      1),
    "training, l1 of x0, in 2 parts": lambda: training("l1", "min_snr", "x0", 0.1, 0.01, 2),
}
ROWS = LAYERS | LOSSES | NETS | TRAINING


# ------------------------------------------------------------------------------------- tests

@pytest.mark.parametrize("what", ROWS)
def test_same_as_pytorch(what):
    differences = ROWS[what]()
    assert all(value <= LARGEST for value in differences.values()), differences


def test_float32_is_float64_to_its_rounding():
    """The type that is trained in, against PyTorch in float64."""
    differences = network(np.float32, attention=(1,), blocks=2)
    assert all(1e-8 < value < 2e-5 for value in differences.values()), differences


def test_decay_is_not_in_the_gradient():
    """torch.optim.Adam adds decay to the gradient, where its size is lost; AdamW and ours do
    not. The comparison tells the two apart."""
    params = np.array([2.0, -3.0])
    theirs = torch.nn.Parameter(torch.tensor(params))
    theirs.grad = torch.zeros(2).double()
    torch.optim.Adam([theirs], lr=0.1, weight_decay=0.5).step()
    td.Adam(params).step(params, np.zeros(2), 0.1, 0.5)
    np.testing.assert_allclose(numpy(theirs), [1.9, -2.9], rtol=1e-6)       # by the rate
    np.testing.assert_allclose(params, [1.9, -2.85], rtol=1e-12)            # by 1 - lr decay


def test_pytorch_clips_a_millionth_harder():
    """It divides by the norm + 1e-6, so that the clipped norm is just below the clip."""
    gradient = torch.nn.Parameter(torch.zeros(2).double())
    gradient.grad = torch.tensor([3.0, -4.0]).double()
    torch.nn.utils.clip_grad_norm_([gradient], 1.0)
    np.testing.assert_allclose(numpy(gradient.grad), np.array([3, -4]) / (5 + 1e-6), rtol=1e-15)


def test_decay_draws_a_norm_to_doing_nothing():
    """Our scale is 0 where GroupNorm's weight is 1, so that decay leads there. AdamW over all
    parameters, as often written, would lead the weight to 0 and the layer to silence."""
    net = random_net(channels=(12, 6))
    twin, start = TorchUNet(net), net.params.norm.scale.copy()
    twin.norm.weight.grad = torch.zeros(12).double()
    torch.optim.AdamW([twin.norm.weight], lr=0.1, weight_decay=0.5).step()
    td.Adam(net.params.flat).step(net.params.flat, 0 * net.params.flat, 0.1, 0.5)
    np.testing.assert_allclose(numpy(twin.norm.weight), 0.95 * (1 + start), rtol=1e-12)
    np.testing.assert_allclose(1 + net.params.norm.scale, 1 + 0.95 * start, rtol=1e-12)


def test_by_leaves_finds_an_error_in_a_small_part():
    """One number of one bias among thousands, off by a millionth."""
    net = random_net(channels=(12, 6))
    flat, other = net.params.flat, net.params.flat.copy()
    td.Tree(net.params.layout, other).top.below.enter[0].norm1.scale[0] *= 1 + 1e-6
    assert by_leaves(net.params.layout, flat, flat) == 0
    assert by_leaves(net.params.layout, other, flat) > 1e-8


def report():
    """Print the table; return whether everything in it is small enough."""
    print(f"PyTorch {torch.__version__}, NumPy {np.__version__}, float64: the largest "
          "difference, relative to the largest value\n")
    print(f"{'what':34}{'value':>10}{'inputs':>10}{'parameters':>12}")
    worst = 0.0
    for title, compare in ROWS.items():
        cells = {}
        for part, size in compare().items():
            part = part if part == "value" else "inputs" if "input" in part else "parameters"
            cells[part] = max(size, cells.get(part, 0.0))
        print(f"{title:34}" + "".join(
            f"{f'{cells[part]:.1e}' if part in cells else '':>{width}}"
            for part, width in [("value", 10), ("inputs", 10), ("parameters", 12)]))
        worst = max(worst, *cells.values())
    print(f"\nthe largest of all: {worst:.1e}; allowed: {LARGEST:.0e}")
    return worst <= LARGEST


if __name__ == "__main__":
    raise SystemExit(0 if report() else 1)
