"""tinyddpm's U-Net once more, in PyTorch, from the same weights: the yardstick of benchmarks
and of tests/test_against_torch.py. Layer by layer what tinyddpm.py does, under the same names,
as PyTorch users would write it; (B, C, H, W) inside, (B, H, W, C) outside."""
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
    """Of 3x3; or, where the weight is (C, D), linear on the channels of every pixel."""
    w = p.w.reshape(-1, *p.w.shape[-2:])        # (9 or 1, C, D)
    k = math.isqrt(len(w))
    layer = nn.utils.skip_init(nn.Conv2d, w.shape[1], w.shape[2], k, padding=k // 2)
    kernel = tensor(w).reshape(k, k, *w.shape[1:]).permute(3, 2, 0, 1).contiguous()
    layer.weight, layer.bias = nn.Parameter(kernel), nn.Parameter(tensor(p.b))
    return layer


def groups(x):
    return math.gcd(8, x.shape[1]) if x.shape[2] * x.shape[3] > 1 else 1


class Norm(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(tensor(a)) for a in (1 + p.scale, p.shift))

    def forward(self, x):
        return F.group_norm(x, groups(x), self.weight, self.bias)


class Attention(nn.Module):
    def __init__(self, p, heads):
        super().__init__()
        self.norm, self.heads = Norm(p.norm), heads
        self.qkv, self.out = conv(p.qkv), conv(p.out)

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, H * W)
        h = F.scaled_dot_product_attention(*qkv.transpose(3, 4).unbind(1))
        return x + self.out(h.transpose(2, 3).reshape(B, C, H, W))


class Block(nn.Module):
    def __init__(self, p, heads):
        super().__init__()
        self.norm1, self.conv1, self.conv2 = Norm(p.norm1), conv(p.conv1), conv(p.conv2)
        self.scale_shift = linear(p.scale_shift)
        self.skip = conv(p.skip) if hasattr(p, "skip") else nn.Identity()
        self.attention = (Attention(p.attention, heads) if hasattr(p, "attention")
                          else nn.Identity())

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.scale_shift(emb)[:, :, None, None].chunk(2, 1)
        h = F.group_norm(h, groups(h)) * (1 + scale) + shift
        return self.attention(self.conv2(F.silu(h)) + self.skip(x))


class Level(nn.Module):
    def __init__(self, p, heads):
        super().__init__()
        self.down = nn.ModuleList(Block(one, heads) for one in p.down)
        self.up = nn.ModuleList(Block(one, heads) for one in p.up)
        self.inner = None
        if hasattr(p, "inner"):
            self.inner, self.match = Level(p.inner, heads), conv(p.match)

    def forward(self, x, emb):
        for block in self.down:
            x = block(x, emb)
        if self.inner is not None:
            h = self.match(self.inner(F.avg_pool2d(x, 2), emb))
            x = x + F.interpolate(h, scale_factor=2.0, mode="nearest")
        for block in self.up:
            x = block(x, emb)
        return x


def space_to_depth(x):
    """All channels of one pixel, then those of the next; pixel_unshuffle has all pixels of one
    channel, then those of the next."""
    return F.pixel_unshuffle(x, 2).unflatten(1, (-1, 4)).transpose(1, 2).flatten(1, 2)


def depth_to_space(x):
    return F.pixel_shuffle(x.unflatten(1, (4, -1)).transpose(1, 2).flatten(1, 2), 2)


class TorchUNet(nn.Module):
    """The PyTorch twin of a td.UNet without dropout."""

    def __init__(self, net):
        super().__init__()
        assert not net.dropout
        p, half = net.params, len(net.params.time1.w) // 2
        self.null, self.space_to_depth, self.sides = net.null, net.space_to_depth, net.image[:2]
        multiple = 2 ** (len(net.channels) - 1 + net.space_to_depth)
        self.pad = (0, -net.image[1] % multiple, 0, -net.image[0] % multiple)
        powers = torch.arange(half, dtype=torch.float64) / (half - 1)
        self.register_buffer("frequency", 10000 ** -powers)
        self.time1, self.time2 = linear(p.time1), linear(p.time2)
        if net.classes:
            self.label = nn.Embedding.from_pretrained(tensor(p.label), freeze=False)
        self.stem, self.top = conv(p.stem), Level(p.top, net.heads)
        self.norm, self.out = Norm(p.norm), conv(p.out)

    def forward(self, x, t, y):
        angle = t[:, None] * self.frequency     # in float64, as 1000 radians need it
        h = self.time1(torch.cat([angle.sin(), angle.cos()], 1).to(x.dtype))
        h = self.time2(F.silu(h))
        emb = F.silu(h + self.label(y) if hasattr(self, "label") else h)
        x = x.permute(0, 3, 1, 2)
        x = F.pad(x, self.pad) if any(self.pad) else x
        h = self.top(self.stem(space_to_depth(x) if self.space_to_depth else x), emb)
        h = self.out(F.silu(self.norm(h)))
        h = depth_to_space(h) if self.space_to_depth else h
        return h[..., :self.sides[0], :self.sides[1]].permute(0, 2, 3, 1)

    def gradients(self, net):
        """What backward() found, in the order of net.grads.flat."""
        found = td.Params(net.params.layout, net.params.flat.copy())
        for array, parameter, axes, _ in pairs(self, found):
            array[...] = turned(parameter.grad, axes, array.shape)
        return found.flat

    def flat(self, net, values=None):
        """These parameters, or other values in their order such as an EMA's, as net.params.flat
        has them."""
        found = td.Params(net.params.layout, net.params.flat.copy())
        values = dict(zip(self.parameters(), values or self.parameters()))
        for array, parameter, axes, more in pairs(self, found):
            array[...] = turned(values[parameter].detach(), axes, array.shape) - more
        return found.flat


def turned(w, axes, shape):
    return td.xp.asarray(w.permute(axes).cpu().numpy()).reshape(shape)


def pairs(module, p):
    """For every array of the Params: the array, the parameter of the module that it stands for,
    this one's axes in the array's order, and how much larger this one is."""
    for name in p.layout:
        part = getattr(p, name)
        if isinstance(part, list):
            for block, one in zip(getattr(module, name), part, strict=True):
                yield from pairs(block, one)
        elif isinstance(part, td.Params):
            yield from pairs(getattr(module, name), part)
        elif name == "label":
            yield part, module.label.weight, (0, 1), 0
        elif name == "w":               # input and output channels last
            yield part, module.weight, (2, 3, 1, 0)[-module.weight.ndim:], 0
        elif name == "scale":           # tinyddpm multiplies by 1 + scale
            yield part, module.weight, (0,), 1
        else:
            yield part, module.bias, (0,), 0
