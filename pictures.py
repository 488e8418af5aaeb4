"""Pictures to train on, from the files that people have them in: load(path) -> Pictures.

Whatever is wrong with a file is a ValueError or a FileNotFoundError that says what would do.
"""
import gzip
import math
import re
import string
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

DIGITS = Path(__file__).parent / "data"
ACCEPTED = ("data may be a folder of PNG, JPEG, GIF or BMP pictures, in one subfolder a class "
            "or in none, or the like in train/ and test/; an .npz of x_train and y_train, "
            "train_images and train_labels, images and labels, or x and y; or IDX files, "
            "train-images-idx3-ubyte and so on, gzipped or not")


@dataclass
class Pictures:
    images: np.ndarray                  # (N, H, W, C) float32 in [-1, 1]; C is 1 or 3
    labels: np.ndarray | None           # (N,) int64 from 0 to K-1; None without classes
    names: list[str]                    # of the K classes
    test_images: np.ndarray | None      # (M, H, W, C); None where the set has no test part
    test_labels: np.ndarray | None      # (M,)
    said: list[str]                     # what was recognised, and what was done about it

    def crc(self):
        """A short name for the training pictures and their labels; other data, another name."""
        crc = zlib.crc32(self.images)
        return f"{crc if self.labels is None else zlib.crc32(self.labels, crc):08x}"


def load(path=DIGITS, size=None):
    """The Pictures at path: a folder, an .npz, an IDX file, or what the names of IDX files
    begin with, as in data/emnist-letters.

    size: of each picture in a folder the middle square, resized to size x size. None leaves
    them as they are if all are alike and no side is over 256; otherwise it is 32.

    Classes are those of the training pictures, numbered anew: labels 2 and 5 become 0 and 1,
    which are named "2" and "5". Test pictures of other classes are left out, which is said.
    """
    path, said, names = Path(path), [], []
    if size is not None and size < 1:
        raise ValueError(f"size is {size}; it has to be at least 1")
    if path.suffix.lower() == ".npz" and path.is_file():
        images, labels, N = read_npz(path)
    elif sets := idx_sets(path):
        images, labels, N = read_idx_set(path, sets, said)
    elif path.is_dir():
        images, labels, N = read_folder(path, size, said)
    elif path.exists():
        raise unknown(path, [path])
    else:
        raise FileNotFoundError(f"{path} does not exist; {ACCEPTED}")

    images = scaled(path, images, said)
    if size and images.shape[1:3] != (size, size):
        raise ValueError(f"{path} has pictures of shape {images.shape[1:]}; size may only be "
                         "given for a folder of pictures")
    if labels is not None:
        if labels.dtype.kind == "U" and np.char.isdecimal(labels).all():
            labels = labels.astype(np.int64)            # folders 1, 2, ..., 10 in this order
        known = np.unique(labels[:N])
        names, trained = list(map(str, known)), np.isin(labels, known)
        if not trained.all():
            said.append(f"left out {np.sum(~trained)} test pictures of untrained classes")
            images, labels = images[trained], labels[trained]
        labels = np.searchsorted(known, labels).astype(np.int64)
    train, test = [(images[rows], labels if labels is None else labels[rows])
                   for rows in (slice(N), slice(N, None))]
    return Pictures(*train, names, *(test if len(images) > N else (None, None)), said)


# Each reader returns images as they are in the file, labels that are integers, strings or None,
# and N: the first N are for training, the others for testing.

# ----------------------------------------------------------------------- a folder of pictures

SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".bmp")
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test",
          "val": "val", "valid": "val", "validation": "val"}


def visible(folder, *patterns):
    """The files in a folder that fit a pattern, sorted, without hidden ones."""
    return sorted(file for pattern in patterns for file in folder.glob(pattern)
                  if not any(part[0] == "." for part in file.relative_to(folder).parts)
                  and file.is_file())


def read_folder(path, size, said):
    files = visible(path, "**/*")
    rows = [file.relative_to(path).parts for file in files if file.suffix.lower() in SUFFIXES]
    if 0 < len(rows) < len(files):
        said.append(f"left out {len(files) - len(rows)} files that are not {', '.join(SUFFIXES)}")
    # train/ and test/ are the two parts of a set; train/ and bus/ are two classes.
    top = int(all(row[0].lower() in SPLITS for row in rows))
    splits = {"train": [], "test": [], "val": []}
    for row in rows:
        splits[SPLITS[row[0].lower()] if top else "train"].append(row)
    rows, N = splits["train"] + splits["test"], len(splits["train"])
    if N == 0:
        raise unknown(path, files)
    if splits["val"]:
        said.append(f"left out {len(splits['val'])} pictures for validation")
    depths = {len(row) - top for row in rows}
    if depths not in ({1}, {2}):
        raise ValueError(f"{path} has {'/'.join(min(rows, key=len))} and "
                         f"{'/'.join(max(rows, key=len))}; all pictures have to lie in one "
                         "subfolder a class, or all in none")

    pictures, sizes = [], set()
    for row in rows:
        picture = read_picture(path.joinpath(*row), said)
        sizes.add(picture.size)
        if size is None and (len(sizes) > 1 or max(picture.size) > 256):
            size = 32
            pictures = [ImageOps.fit(earlier, (size, size)) for earlier in pictures]
        pictures.append(ImageOps.fit(picture, (size, size)) if size else picture)
    if size and sizes != {(size, size)}:
        said.append(f"cropped to the middle square and resized to {size} x {size}")
    images = np.stack(pictures)
    if np.array_equal(images[..., :2], images[..., 1:]):        # red = green = blue: all grey
        images = images[..., :1]
    return images, np.array([row[top] for row in rows]) if depths == {2} else None, N


def read_picture(file, said):
    """A Pillow image in RGB, upright, on white where it is transparent."""
    try:
        with Image.open(file) as image:
            image = ImageOps.exif_transpose(image)
    except Exception as error:          # a damaged picture fails in many ways
        raise ValueError(f"{file} cannot be read as a picture: {error}") from error
    if image.mode.startswith("I"):      # 16-bit grey, which Pillow's own convert clips at 255
        image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        if "laid transparent pictures on white" not in said:
            said.append("laid transparent pictures on white")
    return image.convert("RGB")


# The lines end in semicolons, so that they also run when they are printed as one.
CIFAR = """{} is CIFAR-10 as a pickle, which is a program and is not run here; if you trust it,
these lines of Python make an .npz of it:
import pathlib, pickle, numpy as np;
load = lambda name: pickle.loads(pathlib.Path({!r}, name).read_bytes(), encoding="latin1");
parts = [load(name) for name in [*map("data_batch_{{}}".format, range(1, 6)), "test_batch"]];
x = [part["data"].reshape(-1, 3, 32, 32) for part in parts];
y = [np.array(load("batches.meta")["label_names"])[part["labels"]] for part in parts];
np.savez("cifar10.npz", x_train=np.concatenate(x[:5]), y_train=np.concatenate(y[:5]),
x_test=x[5], y_test=y[5])"""


def unknown(path, files):
    """The ValueError for files among which there are no pictures."""
    for file in files:
        if re.fullmatch(r"data_batch_\d|test_batch", file.name):
            return ValueError(CIFAR.format(file, str(file.parent)))
    return ValueError(f"{path} has no pictures to train on; {ACCEPTED}")


# ------------------------------------------------------------------------------------- an .npz

NPZ = (("x_train", "y_train", "x_test", "y_test"),                              # Keras
       ("train_images", "train_labels", "test_images", "test_labels"),          # MedMNIST
       ("images", "labels", "test_images", "test_labels"),
       ("x", "y", "x_test", "y_test"))


def read_npz(path):
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            given = ", ".join(file)
            found = [[file[name] if name in file else None for name in names]
                     for names in NPZ if names[0] in file]
    except Exception as error:          # a damaged archive fails in many ways
        raise ValueError(f"{path} is damaged, or holds more than plain arrays; {ACCEPTED}"
                         ) from error
    if len(found) != 1:
        raise ValueError(f"{path} has arrays named {given or 'nothing'}; {ACCEPTED}")
    images, labels, test_images, test_labels = found[0]
    test = [] if test_images is None else [(test_images, test_labels)]
    return join(path, [(images, labels), *test])


# ----------------------------------------------------------------------------------- IDX files

IDX = re.compile(r"(.*?)[-_.]?(train|test|t10k)-(images|labels)[-.]idx\d-\w+(\.gz)?")
CAPITALS = string.digits + string.ascii_uppercase
MERGED = CAPITALS + "abdefghnqrt"       # the other small letters look like their capitals
EMNIST = {"emnist-letters": " " + string.ascii_lowercase,       # labels 1 to 26
          "emnist-byclass": CAPITALS + string.ascii_lowercase,
          "emnist-bymerge": MERGED, "emnist-balanced": MERGED}


def idx_sets(path):
    """All sets in a folder and below, or the one that path is a file or the beginning of:
    {data/emnist-letters: {"train-images": data/emnist-letters-train-images-idx3-ubyte, ...}}"""
    def home(file):         # Kaggle unpacks each file into a folder of the same name
        return file.parent.parent if IDX.fullmatch(file.parent.name) else file.parent
    sets, whole = {}, path.is_dir()
    for file in visible(path, "**/*") if whole else visible(home(path), "*", "*/*"):
        if match := IDX.fullmatch(file.name):
            part = f"{match[2]}-{match[3]}".replace("t10k", "test")
            sets.setdefault(home(file) / match[1], {})[part] = file
    wanted = home(path) / IDX.sub(r"\1", path.name).rstrip("-")
    return {name: sets[name] for name in sets if whole or name == wanted}


def read_idx_set(path, sets, said):
    if len(sets) > 1:
        raise ValueError(f"{path} has several sets in it; give one of them: "
                         + ", ".join(map(str, sorted(sets))))
    (name, files), = sets.items()
    if name != path:
        said.append(f"read {name}")
    parts = []
    for split in ("train", "test") if any("test" in part for part in files) else ("train",):
        for what in (f"{split}-images", f"{split}-labels"):
            if what not in files:
                beside = ", ".join(sorted(file.name for file in files.values()))
                raise FileNotFoundError(f"{name} has no {what} (IDX) beside {beside}")
        images, labels = read_idx(files[f"{split}-images"]), read_idx(files[f"{split}-labels"])
        # QMNIST's labels are rows: the class, then the writer, and more.
        parts.append((images, labels if labels.ndim < 2 else labels[:, :1]))
    images, labels, N = join(name, parts)
    if "emnist" in name.name.lower():
        said.append("EMNIST: turned upright; its files hold the pictures transposed")
        images = images.swapaxes(1, 2)
    letters = EMNIST.get(name.name.lower(), "")
    if labels.max() < len(letters):
        labels = np.array([*letters])[labels]
    return images, labels, N


def read_idx(path):
    """The array in an IDX file of bytes or int32, gzipped or not. Damaged: a ValueError."""
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    kinds = {b"\0\0\x08": np.dtype("u1"), b"\0\0\x0c": np.dtype(">i4")}
    if len(raw) < 4 or raw[:3] not in kinds or raw[3] > 4:
        raise ValueError(f"{path} is not an IDX file of bytes or int32: it starts with "
                         f"{raw[:4].hex(' ') or 'nothing'}, not 00 00 08 03 or the like")
    kind, start = kinds[raw[:3]], 4 + 4 * raw[3]
    shape = tuple(int.from_bytes(raw[i:i + 4], "big") for i in range(4, start, 4))
    promised = start + math.prod(shape) * kind.itemsize
    if len(raw) != promised:
        raise ValueError(f"{path} is damaged: its header promises {promised} bytes in all, of "
                         f"shape {shape}, and it has {len(raw)}")
    return np.frombuffer(raw, kind, offset=start).reshape(shape)


# ----------------------------------------------------------------- what all pictures have to be

def join(path, parts):
    """[(images, labels)] of the training part and, perhaps, the test part -> images
    (N + M, H, W, C), labels (N + M,) or None, and N."""
    shapes = " and ".join(str(x.shape) for x, _ in parts)
    first, unlabelled = parts[0][0], parts[0][1] is None
    for x, y in parts:
        if (x.ndim not in (3, 4) or x.ndim == 4 and not {1, 3} & {x.shape[1], x.shape[3]}
                or x.shape[1:] != first.shape[1:] or first.size == 0):
            raise ValueError(f"{path} has pictures of shape {shapes}; they have to be of one "
                             "size, (N, H, W), (N, H, W, C) or (N, C, H, W), N > 0, C = 1 or 3")
        if (y is None) != unlabelled or y is not None and (
                y.dtype.kind not in "iuU" or y.shape not in ((len(x),), (len(x), 1))):
            given = "no labels" if y is None else f"labels {y.dtype} {y.shape}"
            raise ValueError(f"{path} has {given} beside pictures {x.shape}; there has to be "
                             "one integer or string a picture, or no labels at all")
    images = np.concatenate([x for x, _ in parts])
    if images.ndim == 3:
        images = images[..., None]
    elif images.shape[3] not in (1, 3):         # channels came first
        images = images.transpose(0, 2, 3, 1)
    labels = None if unlabelled else np.concatenate([y.ravel() for _, y in parts])
    return images, labels, len(first)


def scaled(path, images, said):
    """Bytes, or floats in [0, 1] or [-1, 1] -> float32 in [-1, 1]."""
    floats = images.dtype.kind == "f"
    low, high = (images.min(), images.max()) if floats else (math.nan, math.nan)
    if images.dtype == np.uint8:
        half = 127.5
    elif 0 <= low and high <= 1:
        half = 0.5
        said.append("floats in [0, 1] brought to [-1, 1]")
    elif -1 <= low and high <= 1:
        said.append("floats in [-1, 1] taken as they are")
        return images.astype(np.float32, order="C")
    else:
        given = f"floats from {low:g} to {high:g}" if floats else images.dtype
        raise ValueError(f"{path} has pictures of {given}; they may be uint8, or floats in "
                         "[0, 1] or [-1, 1]")
    images = images.astype(np.float32, order="C")
    images /= half          # in place: all of EMNIST takes 2 GB
    images -= 1
    return images
