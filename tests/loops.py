"""The network again, in plain loops over images and pixels: every layer, and the U-Net as its
drawing has it. Slow, and with nothing of tinyddpm's but the names of the parameters."""
import math

import numpy as np


def silu(x):
    return x / (1 + np.exp(-x))


def linear(p, x):
    y = np.zeros((*x.shape[:-1], p.w.shape[1]))
    for place in np.ndindex(x.shape[:-1]):
        y[place] = sum(x[*place, c] * p.w[c] for c in range(x.shape[-1])) + p.b
    return y


def conv3x3(p, x):
    """Each pixel of the answer is a sum over the pixels around it, nothing lying outside."""
    B, H, W, _ = x.shape
    y = np.zeros((B, H, W, p.w.shape[3])) + p.b
    for b, i, j, di, dj in np.ndindex(B, H, W, 3, 3):
        u, v = i + di - 1, j + dj - 1
        if 0 <= u < H and 0 <= v < W:
            y[b, i, j] += x[b, u, v] @ p.w[di, dj]
    return y


def group_norm(x, scale, shift, groups=8):
    """As many groups as divide both numbers; a single pixel is one group."""
    B, H, W, C = x.shape
    groups = max(n for n in range(1, groups + 1) if groups % n == C % n == 0)
    groups = 1 if H * W == 1 else groups
    y, size = np.zeros_like(x), C // groups
    for b, k in np.ndindex(B, groups):
        group = x[b, :, :, k * size:(k + 1) * size]
        centred = group - group.sum() / group.size
        deviation = math.sqrt((centred ** 2).sum() / group.size + 1e-5)
        y[b, :, :, k * size:(k + 1) * size] = centred / deviation
    return y * (1 + scale.reshape(-1, 1, 1, C)) + shift.reshape(-1, 1, 1, C)


def norm(p, x):
    return group_norm(x, p.scale, p.shift)


def attention(p, x, heads):
    """Columns of qkv: all of q, then of k, then of v; in each, head after head."""
    B, H, W, C = x.shape
    size, y = C // heads, np.zeros_like(x)
    qkv = linear(p.qkv, norm(p.norm, x)).reshape(B, H, W, 3, heads, size)
    for b, i, j, head in np.ndindex(B, H, W, heads):
        q, total = qkv[b, i, j, 0, head], 0
        for u, v in np.ndindex(H, W):
            weight = math.exp(q @ qkv[b, u, v, 1, head] / math.sqrt(size))
            y[b, i, j, head * size:(head + 1) * size] += weight * qkv[b, u, v, 2, head]
            total += weight
        y[b, i, j, head * size:(head + 1) * size] /= total
    return x + linear(p.out, y)


def space_to_depth(x):
    """Channels: those of the upper left pixel, upper right, lower left, lower right."""
    B, H, W, C = x.shape
    y = np.zeros((B, H // 2, W // 2, 4 * C))
    for i, j in np.ndindex(H, W):
        k = C * (2 * (i % 2) + j % 2)
        y[:, i // 2, j // 2, k:k + C] = x[:, i, j]
    return y


def depth_to_space(y):
    B, H, W, C = y.shape[0], 2 * y.shape[1], 2 * y.shape[2], y.shape[3] // 4
    x = np.zeros((B, H, W, C))
    for i, j in np.ndindex(H, W):
        k = C * (2 * (i % 2) + j % 2)
        x[:, i, j] = y[:, i // 2, j // 2, k:k + C]
    return x


def average_pool(x):
    y = np.zeros((len(x), x.shape[1] // 2, x.shape[2] // 2, x.shape[3]))
    for i, j in np.ndindex(x.shape[1:3]):
        y[:, i // 2, j // 2] += x[:, i, j] / 4
    return y


def upsample(x):
    y = np.zeros((len(x), 2 * x.shape[1], 2 * x.shape[2], x.shape[3]))
    for i, j in np.ndindex(y.shape[1:3]):
        y[:, i, j] = x[:, i // 2, j // 2]
    return y


def timestep_embedding(t, width):
    """Sines of the step itself, of less and less of it, of a ten-thousandth; then cosines."""
    half = width // 2
    angles = [[step / 10000 ** (k / (half - 1)) for k in range(half)] for step in t]
    return np.array([[f(a) for f in (math.sin, math.cos) for a in row] for row in angles])


def embed(p, t, y):
    """Without a table, labels count for nothing."""
    h = linear(p.time2, silu(linear(p.time1, timestep_embedding(t, len(p.time1.w)))))
    return silu(h if y is None else h + np.array([p.label[one] for one in y]))


def res_block(p, x, emb, drop, heads=None):
    """With heads, attention follows; where the channels change, a product goes along with x."""
    h = conv3x3(p.conv1, silu(norm(p.norm1, x)))
    both, D = linear(p.scale_shift, emb), h.shape[3]
    h = silu(group_norm(h, both[:, :D], both[:, D:]))
    y = conv3x3(p.conv2, drop(h)) + (x if x.shape[3] == D else linear(p.skip, x))
    return attention(p.attention, y, heads) if heads else y


def unet(net, x, t, y, drop):
    """Down the left side of the U, level by level, then up the right: on every level but the
    lowest, where up follows on down, we go on with what came from below plus what we had."""
    (B, H, W, C), p, levels = x.shape, net.params, len(net.channels)
    counts = [net.blocks] * levels if isinstance(net.blocks, int) else net.blocks
    multiple = 2 ** (levels if net.space_to_depth else levels - 1)
    h = np.zeros((B, math.ceil(H / multiple) * multiple, math.ceil(W / multiple) * multiple, C))
    h[:, :H, :W] = x
    h = conv3x3(p.stem, space_to_depth(h) if net.space_to_depth else h)
    emb = embed(p, t, y if net.classes else None)

    def side(blocks, i, h):
        for k in range(counts[i]):
            h = res_block(blocks[k], h, emb, drop, net.heads if i in net.attention else None)
            assert h.shape[3] == net.channels[i]
        return h

    level, had = p.top, []
    for i in range(levels):
        if i > 0:
            level, h = level.inner, average_pool(h)
        h = side(level.down, i, h)
        had.append((level, h))
    for i in reversed(range(levels)):
        level, before = had[i]
        if i < levels - 1:
            h = before + upsample(linear(level.match, h))
        h = side(level.up, i, h)
    h = conv3x3(p.out, silu(norm(p.norm, h)))
    return (depth_to_space(h) if net.space_to_depth else h)[:, :H, :W]
