"""tinyddpm's U-Net once more, in PyTorch, from the same weights: the yardstick of benchmarks
and of tests/test_against_torch.py. Layer by layer what tinyddpm.py does, as PyTorch users would
write it; (B, C, H, W) inside, (B, H, W, C) outside."""
import math

import torch
import torch.nn.functional as F
from torch import nn

import tinyddpm as td


def tensor(a):
    return torch.from_numpy(td.asnumpy(a).copy())


def linear(p):
    layer = nn.utils.skip_init(nn.Linear, *p.w.shape)
    layer.weight, layer.bias = nn.Parameter(tensor(p.w.T)), nn.Parameter(tensor(p.b))
    return layer


def conv(p):
    w = p.w.reshape(-1, *p.w.shape[-2:])        # (9 or 1, C, D)
    k = math.isqrt(len(w))
    layer = nn.utils.skip_init(nn.Conv2d, w.shape[1], w.shape[2], k, padding=k // 2)
    kernel = tensor(w).reshape(k, k, *w.shape[1:]).permute(3, 2, 0, 1).contiguous()
    layer.weight, layer.bias = nn.Parameter(kernel), nn.Parameter(tensor(p.b))
    return layer


def norm(p):
    C = len(p.scale)
    layer = nn.GroupNorm(math.gcd(8, C), C)
    layer.weight, layer.bias = nn.Parameter(1 + tensor(p.scale)), nn.Parameter(tensor(p.shift))
    return layer


class Block(nn.Module):
    """A residual block and the attention after it, if there is any."""

    def __init__(self, p, heads):
        super().__init__()
        self.norm1, self.conv1, self.film = norm(p.norm1), conv(p.conv1), linear(p.film)
        self.conv2 = conv(p.conv2)
        self.groups = math.gcd(8, self.conv2.in_channels)
        self.skip = conv(p.skip) if hasattr(p, "skip") else nn.Identity()
        self.heads, self.attended = heads, hasattr(p, "attention")
        if self.attended:
            self.norm3, self.qkv = norm(p.attention.norm), conv(p.attention.qkv)
            self.out = conv(p.attention.out)

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.film(emb)[:, :, None, None].chunk(2, 1)
        h = F.group_norm(h, self.groups) * (1 + scale) + shift
        x = self.conv2(F.silu(h)) + self.skip(x)
        if not self.attended:
            return x
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm3(x)).reshape(B, 3, self.heads, C // self.heads, H * W)
        q, k, v = qkv.transpose(3, 4).unbind(1)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(h.transpose(2, 3).reshape(B, C, H, W))


class Level(nn.Module):
    def __init__(self, p, heads):
        super().__init__()
        self.enter = nn.ModuleList(Block(one, heads) for one in p.enter)
        self.below = None
        if hasattr(p, "below"):
            self.below, self.match = Level(p.below, heads), conv(p.match)
            self.leave = nn.ModuleList(Block(one, heads) for one in p.leave)

    def forward(self, x, emb):
        for block in self.enter:
            x = block(x, emb)
        if self.below is None:
            return x
        h = self.match(self.below(F.avg_pool2d(x, 2), emb))
        x = x + F.interpolate(h, scale_factor=2.0, mode="nearest")
        for block in self.leave:
            x = block(x, emb)
        return x


def fold(x):
    """2x2 pixels into channels, all channels of one pixel before those of the next;
    pixel_unshuffle has all pixels of one channel before those of the next."""
    return F.pixel_unshuffle(x, 2).unflatten(1, (-1, 4)).transpose(1, 2).flatten(1, 2)


def unfold(x):
    return F.pixel_shuffle(x.unflatten(1, (4, -1)).transpose(1, 2).flatten(1, 2), 2)


class TorchUNet(nn.Module):
    """The PyTorch twin of a td.UNet without dropout."""

    def __init__(self, net):
        super().__init__()
        assert not net.dropout
        p, half = net.params, len(net.params.time1.w) // 2
        self.null, self.fold, (H, W) = net.null, net.fold, net.image[:2]
        self.sides, self.pad = (H, W), (0, -W % net.multiple, 0, -H % net.multiple)
        powers = torch.arange(half, dtype=torch.float64) / (half - 1)
        self.register_buffer("frequency", 10000 ** -powers)
        self.time1, self.time2 = linear(p.time1), linear(p.time2)
        if net.classes:
            self.label = nn.Embedding.from_pretrained(tensor(p.label), freeze=False)
        self.stem, self.top = conv(p.stem), Level(p.top, net.heads)
        self.norm, self.out = norm(p.norm), conv(p.out)

    def forward(self, x, t, y):
        angle = t[:, None] * self.frequency     # in float64, as 1000 radians need it
        h = self.time1(torch.cat([angle.sin(), angle.cos()], 1).to(x.dtype))
        h = self.time2(F.silu(h))
        emb = F.silu(h + self.label(y) if hasattr(self, "label") else h)
        x = x.permute(0, 3, 1, 2)
        x = F.pad(x, self.pad) if any(self.pad) else x
        h = self.top(self.stem(fold(x) if self.fold else x), emb)
        h = self.out(F.silu(self.norm(h)))
        h = unfold(h) if self.fold else h
        return h[..., :self.sides[0], :self.sides[1]].permute(0, 2, 3, 1)

    def gradients(self, net):
        """What backward() found, in the order of net.grads.flat."""
        tree = td.Tree(net.params.layout, net.params.flat.copy())
        for array, parameter, turned, _ in pairs(self, tree):
            array[...] = on_device(turned(parameter.grad).reshape(array.shape))
        return tree.flat

    def flat(self, net, values=None):
        """These parameters, or other values in their order such as an EMA's, as net.params.flat
        has them."""
        tree = td.Tree(net.params.layout, net.params.flat.copy())
        values = dict(zip(self.parameters(), values or self.parameters()))
        for array, parameter, turned, less in pairs(self, tree):
            value = turned(values[parameter].detach()).reshape(array.shape)
            array[...] = on_device(value - less)
        return tree.flat


def on_device(a):
    return td.xp.asarray(a.cpu().numpy())


def same(w):
    return w


def channels_to_the_end(w):
    return w.permute(2, 3, 1, 0) if w.ndim == 4 else w.T


def pairs(module, tree):
    """For every array of the Tree: the array, the parameter of the module that it stands for,
    the turn from this one's axes to the array's, and how much larger this one is."""
    for name in tree.layout:
        part = getattr(tree, name)
        if isinstance(part, list):
            for one, block in zip(part, getattr(module, name)):
                yield from pairs(block, one)
        elif name == "attention":
            for name, layer in (("norm", "norm3"), ("qkv", "qkv"), ("out", "out")):
                yield from pairs(getattr(module, layer), getattr(part, name))
        elif isinstance(part, td.Tree):
            yield from pairs(getattr(module, name), part)
        elif name == "label":
            yield part, module.label.weight, same, 0
        elif name == "w":
            yield part, module.weight, channels_to_the_end, 0
        elif name == "scale":
            yield part, module.weight, same, 1          # tinyddpm multiplies by 1 + scale
        else:
            yield part, module.bias, same, 0
