"""What the demo reads, and what it writes, each file whole or not at all: sheets of pictures,
films, curves; and MNIST, fetched."""
import contextlib
import gzip
import hashlib
import http.client
import io
import textwrap
import urllib.request
import zlib

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

import pictures
import tinyddpm as td

DPI = 130


def read(path, size=None):
    """The Pictures at this path; prints in words what they are."""
    data = pictures.load(path, size)
    tests = "" if data.test_images is None else f" and {len(data.test_images):,} for tests"
    print(f"{path}: {len(data.images):,} pictures{tests}, "
          + words(data.images.shape[1:], data.names))
    for line in data.said:
        print(f"  {line}")
    return data


def words(image, names):
    size = f"{image[0]} x {image[1]} pixels, {'grey' if image[2] == 1 else 'in colour'}, "
    listed = textwrap.shorten(" ".join(names), 50, placeholder=" ...")
    many = f"{len(names)} class{'es' * (len(names) > 1)}: "
    return size + (many + listed if names else "without classes")


@contextlib.contextmanager
def written(path):
    """A file to write to, in the end renamed to path; the directory is made where it lacks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with td.written(path) as file:
        yield file


def tile(images):
    """(rows, columns, H, W, C) in [-1, 1] to one page in [0, 1] with a thin line between."""
    images = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-1)
    rows, columns, H, W, C = images.shape
    page = images.transpose(0, 2, 1, 3, 4).reshape(rows * H, columns * W, C)
    page = np.clip((page + 1) / 2, 0, 1)
    return page if C == 3 else page[:, :, 0]


def columns(names, asked=None):
    """For the columns of a sheet, labels and the names to write above: the classes asked for,
    or the first 30; of one class, or without classes, ten columns."""
    for name in asked or ():
        if name not in names:
            known = f"there are {' '.join(names)}" if names else "these pictures have no classes"
            raise ValueError(f"there is no class {name}; {known}")
    heads = asked or names[:30]
    if len(heads) == 1:
        heads = 10 * heads
    return np.array([names.index(name) for name in heads] or [0] * 10), heads


def show(ax, images, heads=(), names=(), cell=90):
    """Draw rows of images, each about `cell` pixels wide, with a heading above each column and
    a name before each row."""
    n, m, H, W = images.shape[:4]
    ax.imshow(tile(images), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set_xticks((np.arange(m) + 0.5) * (W + 2) - 0.5 if len(heads) else [], heads)
    ax.set_yticks((np.arange(n) + 0.5) * (H + 2) - 0.5 if len(names) else [], names)
    ax.tick_params(length=0, top=False, bottom=False, labeltop=True, labelbottom=False,
                   labelsize=9)
    if max(map(len, "\n".join(heads).split("\n"))) > cell / 12:     # wider than a column
        ax.tick_params(axis="x", rotation=90)
    for side in ax.spines.values():
        side.set_visible(False)


def sheet(path, images, heads=(), names=(), cell=90, say=True):
    """Write a picture of rows of images, each about `cell` pixels wide."""
    n, m, H, W = images.shape[:4]
    scale = max(1, round(cell / (W + 2))) / DPI     # whole, so that all pixels are alike
    figure = Figure((scale * m * (W + 2), scale * n * (H + 2)))
    show(figure.add_axes((0, 0, 1, 1)), images, heads, names, cell)
    keep(figure, path, say)


def plot(path, *curves, **labels):
    """Write a picture of curves, each (x, y, label, style)."""
    figure = Figure((6, 3.4), layout="constrained")
    ax = figure.subplots()
    for x, y, label, style in curves:
        ax.plot(x, y, label=label, **style)
    ax.set(**labels)
    ax.grid(alpha=0.3, which="both")
    ax.legend()
    keep(figure, path)


def keep(figure, path, say=True):
    with written(path) as file:
        figure.savefig(file, format="png", dpi=DPI, bbox_inches="tight")
    if say:
        print(f"wrote {path}")


def film(path, pages):
    """Write a GIF of the pages, over and over with a rest at the end, as large as 1.5 MB allow.
    Noise cannot be packed, so 64 colours to a page have to do."""
    pages = [Image.fromarray(np.uint8(255 * page + 0.5)).convert("RGB") for page in pages]
    for scale in (2, 1, 0.5, 0.25, 0.125):
        size = [max(1, round(scale * side)) for side in pages[0].size]
        first, *others = [page.resize(size, Image.Resampling.BOX).quantize(
            64, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE) for page in pages]
        gif = io.BytesIO()
        first.save(gif, "GIF", save_all=True, append_images=others, loop=0,
                   duration=[150] * len(others) + [3000])
        if len(gif.getvalue()) < 1.5e6:
            break
    with written(path) as file:
        file.write(gif.getvalue())
    print(f"wrote {path}")


MNIST_URL = "https://storage.googleapis.com/cvdf-datasets/mnist/"
MNIST_SHA256 = {    # of the unpacked files: one file can be packed in many ways
    "train-images-idx3-ubyte":
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte":
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte":
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte":
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"}


def download(args):
    """Fetch the full MNIST, 60,000 and 10,000 digits, and check it."""
    for name, digest in MNIST_SHA256.items():
        url, path = f"{args.url.rstrip('/')}/{name}.gz", args.data / f"{name}.gz"
        try:
            with urllib.request.urlopen(url, timeout=30) as reply:  # seconds without a byte
                packed = reply.read()
            found = hashlib.sha256(gzip.decompress(packed)).hexdigest()
        except (OSError, EOFError, zlib.error, http.client.HTTPException) as error:
            raise ValueError(f"{url} could not be fetched: {error}") from error
        if found != digest:
            raise ValueError(f"{url} is not the file that was asked for: its SHA-256 is "
                             f"{found}, not {digest}")
        with written(path) as file:
            file.write(packed)
        print(f"{path}: {len(packed):,} bytes, SHA-256 as it should be")
    print(f"train on it: python demo.py --data {args.data}")
