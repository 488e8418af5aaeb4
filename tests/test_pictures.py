"""Pictures in every layout that people have them in are read back equal; whatever is wrong with
a file is an error that names it and says what would do."""
import gzip
import pickle
import struct

import numpy as np
import pytest
from PIL import Image

from pictures import DIGITS, load, read_idx

X = read_idx(DIGITS / "t10k-images-idx3-ubyte.gz")[:6]                          # (6, 28, 28)
Y = read_idx(DIGITS / "t10k-labels-idx1-ubyte.gz")[:6]
RGB = np.stack([X, X[:, ::-1], X // 2], 3)                                      # (6, 28, 28, 3)


def scaled(x):
    return x.reshape(*x.shape[:3], -1).astype(np.float32) / 127.5 - 1


def same(data, x=X, y=Y):
    """To train on: the bytes x, scaled, of classes that are named as y has them."""
    assert data.images.dtype == np.float32 and data.images.flags.c_contiguous
    assert np.array_equal(data.images, scaled(x))
    if y is None:
        assert data.labels is None and data.names == []
    else:
        assert data.labels.dtype == np.int64 and data.names == [str(k) for k in np.unique(y)]
        assert [data.names[k] for k in data.labels] == [str(k) for k in y]


def refused(path, *texts, kind=ValueError, size=None):
    """Loading fails with just this kind of error, which says all of these texts."""
    with pytest.raises((ValueError, OSError)) as caught:
        load(path, size)
    assert type(caught.value) is kind
    for text in texts:
        assert str(text) in str(caught.value)
    return str(caught.value)


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def idx(array):
    code, kind = (12, ">i4") if array.dtype.kind == "i" else (8, "u1")
    return (struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape)
            + array.astype(kind).tobytes())


def mnist(folder, images="train-images-idx3-ubyte", labels="train-labels-idx1-ubyte", x=X, y=Y):
    put(folder / images, idx(x))
    put(folder / labels, idx(y))
    return folder


def paint(folder, x=X, y=Y, suffix=".png"):
    """A folder of pictures, in one subfolder a class, or in none if y is None."""
    for i, image in enumerate(x):
        path = folder / ("" if y is None else str(y[i])) / f"{i}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def by_class(x=X, y=Y):
    """Pictures and labels in the order in which a folder gives them."""
    order = np.argsort(y, kind="stable")
    return x[order], y[order]


def npz(folder, **arrays):
    np.savez(folder / "some.npz", **arrays)
    return folder / "some.npz"


# ----------------------------------------------------------------------------------- IDX files

def test_the_bundled_digits_are_the_default():
    data = load()
    assert data.images.shape == (10000, 28, 28, 1) and (np.bincount(data.labels) == 1000).all()
    assert len(data.test_images) == 1000 and (np.bincount(data.test_labels) == 100).all()
    assert data.names == list("0123456789") and data.said == []
    assert np.array_equal(data.test_images[:6], scaled(X))
    assert np.array_equal(data.test_labels[:6], Y)


@pytest.mark.parametrize("test", ["t10k", "test"])
@pytest.mark.parametrize("name", [
    "{}-{}-idx{}-ubyte", "{}-{}.idx{}-ubyte", "mnist-{}-{}-idx{}-ubyte",
    "MNIST/raw/{}-{}-idx{}-ubyte", "{0}-{1}-idx{2}-ubyte/{0}-{1}-idx{2}-ubyte"])
def test_idx_files_may_have_any_of_the_names_in_use(tmp_path, name, test):
    for split, part in (("train", slice(4)), (test, slice(4, None))):
        mnist(tmp_path, name.format(split, "images", 3), name.format(split, "labels", 1),
              X[part], Y[part] % 2)
    for path in (tmp_path, tmp_path / name.format("train", "images", 3)):
        data = load(path)
        same(data, X[:4], Y[:4] % 2)
        assert np.array_equal(data.test_images, scaled(X[4:]))
        assert np.array_equal(data.test_labels, Y[4:] % 2)


def test_idx_files_may_be_gzipped_and_have_no_test_part(tmp_path):
    mnist(tmp_path)
    for path in list(tmp_path.iterdir()):
        put(tmp_path / (path.name + ".gz"), gzip.compress(path.read_bytes()))
        path.unlink()
    data = load(tmp_path)
    same(data)
    assert data.test_images is None and data.test_labels is None
    same(load(tmp_path / "train-images-idx3-ubyte.gz"))


def test_qmnist_has_the_class_in_the_first_of_eight_columns(tmp_path):
    y = np.random.default_rng(0).integers(0, 9999, (6, 8)).astype(np.int32)
    y[:, 0] = Y
    same(load(mnist(tmp_path, "qmnist-train-images-idx3-ubyte", "qmnist-train-labels-idx2-int",
                    y=y)))
    same(load(mnist(tmp_path / "one", labels="train-labels-idx1-int", y=y[:, 0])))


def test_idx_files_may_hold_colour(tmp_path):
    same(load(mnist(tmp_path, "train-images-idx4-ubyte", x=RGB)), RGB)


@pytest.mark.parametrize("split, y, names", [
    ("letters", [1, 2, 26, 1, 2, 26], "abzabz"), ("digits", [0, 3, 9, 0, 3, 9], "039039"),
    ("byclass", [0, 9, 10, 35, 36, 61], "09AZaz"),
    ("balanced", [9, 10, 35, 36, 38, 46], "9AZadt"),
    ("bymerge", [46, 36, 39, 40, 41, 42], "taefgh")])
def test_emnist_is_turned_upright_and_named_by_its_letters(tmp_path, split, y, names):
    mnist(tmp_path, f"emnist-{split}-train-images-idx3-ubyte",
          f"emnist-{split}-train-labels-idx1-ubyte", X.swapaxes(1, 2), np.array(y, np.uint8))
    data = load(tmp_path)
    same(data, y=np.array(list(names)))
    assert any("EMNIST" in sentence and "turned" in sentence for sentence in data.said)


def test_of_several_sets_in_one_folder_one_has_to_be_named(tmp_path):
    for name, x in (("letters", X), ("digits", X[::-1])):
        mnist(tmp_path, f"emnist-{name}-train-images-idx3-ubyte",
              f"emnist-{name}-train-labels-idx1-ubyte", x.swapaxes(1, 2))
    refused(tmp_path, tmp_path / "emnist-letters", tmp_path / "emnist-digits", "one of them")
    for name in ("emnist-digits", "emnist-digits-", "emnist-digits-train-labels-idx1-ubyte"):
        data = load(tmp_path / name)
        same(data, X[::-1])
        assert (f"read {tmp_path / 'emnist-digits'}" in data.said) == (name != "emnist-digits")


@pytest.mark.parametrize("missing", ["train-images", "train-labels", "t10k-images",
                                     "t10k-labels"])
def test_half_of_a_set_is_refused_by_the_name_of_what_is_missing(tmp_path, missing):
    mnist(tmp_path)
    mnist(tmp_path, "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    next(tmp_path.glob(missing + "*")).unlink()
    refused(tmp_path, f"no {missing.replace('t10k', 'test')}", kind=FileNotFoundError)


@pytest.mark.parametrize("damage", [
    lambda raw: raw[:-1], lambda raw: raw + b"0", lambda raw: raw[:9], lambda raw: raw[:3],
    lambda raw: b"", lambda raw: gzip.compress(raw)[:-9], lambda raw: gzip.compress(raw)[:20],
    lambda raw: raw[:2] + b"\x0d" + raw[3:], lambda raw: b"PK" + raw[2:],
    lambda raw: raw[:3] + b"\x46" + b"\0\0\0\1" * 70 + b"7"])         # 70 dimensions
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"])
def test_a_damaged_idx_file_is_named(tmp_path, name, damage):
    path = mnist(tmp_path) / name
    path.write_bytes(damage(path.read_bytes()))
    refused(tmp_path, path, "is")


# ------------------------------------------------------------------------ folders of pictures

@pytest.mark.parametrize("suffix", [".png", ".bmp", ".gif", ".PNG"])
@pytest.mark.parametrize("y", [None, Y])
def test_a_folder_of_grey_pictures_has_one_channel(tmp_path, suffix, y):
    data = load(paint(tmp_path, y=y, suffix=suffix))
    same(data, *((X, None) if y is None else by_class()))
    assert data.test_images is None and data.said == []


def test_jpegs_are_read_but_for_what_they_lose(tmp_path):
    data = load(paint(tmp_path, suffix=".jpg"))
    assert data.images.shape == (6, 28, 28, 1)
    assert np.abs(data.images - scaled(by_class()[0])).mean() < 0.05


def test_one_picture_in_colour_makes_all_of_them_rgb(tmp_path):
    paint(tmp_path, X[:5], None)
    Image.fromarray(RGB[5]).quantize(256).save(tmp_path / "5.gif")
    data = load(tmp_path)
    assert data.images.shape == (6, 28, 28, 3)
    assert np.array_equal(data.images[:5], scaled(np.stack([X[:5]] * 3, 3)))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "LA", "1"])
def test_every_kind_of_png_is_read_alike(tmp_path, mode):
    x = X // 128 * 255
    for i, image in enumerate(x):
        Image.fromarray(image).convert(mode).save(tmp_path / f"{i}.png")
    same(load(tmp_path), x, None)


def test_sixteen_bits_are_rounded_to_eight(tmp_path):
    Image.fromarray(np.array([[0, 128, 129, 32768, 65535]], np.uint16)).save(tmp_path / "a.png")
    same(load(tmp_path), np.array([[[0, 0, 1, 128, 255]]]), None)


def test_transparent_pictures_lie_on_white(tmp_path):
    black = np.zeros((2, 28, 28, 4), np.uint8)
    black[..., 3] = X[:2]
    data = load(paint(tmp_path, black, None))
    same(data, 255 - X[:2], None)
    assert data.said == ["laid transparent pictures on white"]


def test_a_jpeg_that_its_exif_turns_is_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                        # the camera was held upright
    picture = np.zeros((16, 32), np.uint8)
    picture[:, :16] = 255                   # white on the left, which becomes the top
    Image.fromarray(picture).save(tmp_path / "a.jpg", exif=exif)
    images = load(tmp_path).images
    assert images.shape == (1, 32, 16, 1)
    assert images[0, :16].min() > 0.9 and images[0, 16:].max() < -0.9


def test_the_middle_square_is_resized(tmp_path):
    wide = np.full((1, 28, 48), 99, np.uint8)
    wide[:, :, 10:38] = X[:1]
    same(load(paint(tmp_path, wide, None), size=28), X[:1], None)
    assert load(tmp_path).images.shape == (1, 28, 48, 1)
    assert load(tmp_path, size=7).images.shape == (1, 7, 7, 1)
    paint(tmp_path / "two", X[:2], None)
    paint(tmp_path / "two", wide, None, ".gif")
    data = load(tmp_path / "two")
    assert data.images.shape == (3, 32, 32, 1) and "32 x 32" in data.said[0]
    assert load(paint(tmp_path / "large", np.zeros((1, 9, 300), np.uint8), None)
                ).images.shape == (1, 32, 32, 1)


@pytest.mark.parametrize("train, test", [("train", "test"), ("training", "testing"),
                                         ("Train", "Test")])
def test_a_folder_of_train_and_test_is_one_set_in_two_parts(tmp_path, train, test):
    paint(tmp_path / train, X[:4], Y[:4])
    paint(tmp_path / test, X[4:], Y[[0, 1]])
    paint(tmp_path / "val", X[:1], Y[:1])
    data = load(tmp_path)
    same(data, *by_class(X[:4], Y[:4]))
    x, y = by_class(X[4:], Y[[0, 1]])
    assert np.array_equal(data.test_images, scaled(x))
    assert [data.names[k] for k in data.test_labels] == [str(k) for k in y]
    assert "1 pictures for validation" in data.said[0]


def test_a_train_beside_a_bus_is_a_class(tmp_path):
    data = load(paint(tmp_path, X[:3], ["bus", "test", "train"]))
    same(data, X[:3], ["bus", "test", "train"])


def test_hidden_files_and_those_that_are_no_pictures_do_not_count(tmp_path):
    paint(tmp_path)
    for name in (".DS_Store", "3/._7.png", ".cache/1.png", "3/Thumbs.db", "readme.txt"):
        put(tmp_path / name, b"nothing")
    data = load(tmp_path)
    same(data, *by_class())
    assert any("left out 2 files" in line for line in data.said)


def test_folders_named_by_numbers_are_in_their_order(tmp_path):
    y = np.array([2, 10, 1, 10, 2, 1])
    data = load(paint(tmp_path, y=y))
    assert data.names == ["1", "2", "10"] and [*data.labels] == [0, 0, 2, 2, 1, 1]


def test_a_folder_is_refused_in_words(tmp_path):
    refused(tmp_path, tmp_path, "no pictures", "a folder of PNG", ".npz", "IDX")
    paint(tmp_path)
    path = put(tmp_path / "7" / "broken.jpg", b"nothing")
    refused(tmp_path, path, "cannot be read as a picture")
    path.write_bytes((tmp_path / "7" / "0.png").read_bytes()[:150])
    refused(tmp_path, path, "cannot be read as a picture")
    path.unlink()
    paint(tmp_path, X[:1], None)
    refused(tmp_path, "0.png", "one subfolder a class, or all in none")
    refused(tmp_path.parent / "nowhere", "does not exist", "IDX", kind=FileNotFoundError)
    refused(put(tmp_path / "a.csv", b"1,2"), "a.csv", "IDX")
    refused(tmp_path, "at least 1", size=0)


def test_cifar_10_is_refused_with_lines_that_make_an_npz(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8)
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        rows = x[2 * i:2 * i + 2].transpose(0, 3, 1, 2).reshape(2, -1)
        put(tmp_path / "it's" / name, pickle.dumps({"data": rows, "labels": [1, 0]}))
    put(tmp_path / "it's" / "batches.meta", pickle.dumps({"label_names": ["plane", "car"]}))
    refused(tmp_path / "it's" / "data_batch_2", "pickle")
    said = refused(tmp_path, "pickle")
    for lines in (said, " ".join(said.split())):        # the demo prints an error as one line
        exec(lines[lines.index("import pathlib"):], {})
        data = load("cifar10.npz")
        same(data, x[:10], ["car", "plane"] * 5)
        assert np.array_equal(data.test_images, scaled(x[10:]))
        (tmp_path / "cifar10.npz").unlink()


# --------------------------------------------------------------------------------------- .npz

@pytest.mark.parametrize("x, y, x_test, y_test", [
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("images", "labels", "test_images", "test_labels"), ("x", "y", "x_test", "y_test")])
def test_an_npz_may_have_any_of_the_names_in_use(tmp_path, x, y, x_test, y_test):
    same(load(npz(tmp_path, **{x: X, y: Y[:, None], "val_images": X[:2]})))
    same(load(npz(tmp_path, **{x: X})), y=None)
    data = load(npz(tmp_path, **{x: X, y: Y, x_test: X[4:], y_test: Y[4:]}))
    same(data)
    assert np.array_equal(data.test_images, scaled(X[4:]))
    assert np.array_equal(data.test_labels, data.labels[4:])


@pytest.mark.parametrize("x, equal", [
    (X[..., None], X), (RGB, RGB), (X[:, None], X), (RGB.transpose(0, 3, 1, 2), RGB)])
def test_channels_may_come_last_or_first_or_not_at_all(tmp_path, x, equal):
    same(load(npz(tmp_path, images=x, labels=Y)), equal)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_floats_may_go_from_0_or_from_minus_1(tmp_path, kind):
    for low in (0, -1):
        x = (low + X.astype(np.float64) / 255 * (1 - low)).astype(kind)
        data = load(npz(tmp_path, x=x))
        assert np.abs(data.images - scaled(X)).max() < 2e-7 + np.finfo(kind).eps
        assert f"[{low}, 1]" in data.said[0]


@pytest.mark.parametrize("x", [
    X.astype(np.float32), X.astype(np.int64), X / 255 * 4 - 2, np.where(X > 9, np.nan, 0.5),
    X > 9, X.astype(str), X + 1j])
def test_other_numbers_are_refused(tmp_path, x):
    refused(npz(tmp_path, x=x), "some.npz", "uint8, or floats in [0, 1] or [-1, 1]")


@pytest.mark.parametrize("x", [
    X.reshape(6, -1), RGB[..., :2], np.concatenate([RGB, X[..., None]], 3), X[:0],
    X[None, None], np.uint8(3)])
def test_other_shapes_are_refused(tmp_path, x):
    refused(npz(tmp_path, x=x), "some.npz", x.shape, "(N, H, W)")


@pytest.mark.parametrize("y", [Y[:5], Y / 2, np.eye(10)[Y], np.eye(10, dtype=int)[Y]])
def test_other_labels_are_refused(tmp_path, y):
    refused(npz(tmp_path, x=X, y=y), "some.npz", y.shape, "one integer or string a picture")


def test_a_test_part_of_another_kind_is_refused(tmp_path):
    refused(npz(tmp_path, x=X, x_test=X[:, 2:]), X[:, 2:].shape, "(N, H, W)")
    refused(npz(tmp_path, x=X, y=Y, x_test=X), "no labels")
    refused(npz(tmp_path, x=X, x_test=X / 255), "uint8, or floats")


def test_a_file_that_is_no_npz_is_named(tmp_path):
    path = npz(tmp_path, images=X, labels=Y)
    refused(path, path, "folder of pictures", size=32)
    for raw in (path.read_bytes()[:-30], b"", b"nothing", X.tobytes()):
        refused(put(path, raw), path, "is damaged, or holds more than plain arrays")
    refused(npz(tmp_path, pixels=X), path, "pixels", "x_train")
    refused(npz(tmp_path, x=X, images=X), path, "images")
    refused(npz(tmp_path, x=np.array([None])), path, "more than plain arrays")
    np.save(tmp_path / "a.npy", X)
    refused((tmp_path / "a.npy").rename(path), path, "is damaged, or holds more than plain arrays")


# ------------------------------------------------------------------------------------- classes

def test_labels_that_skip_numbers_are_numbered_anew(tmp_path):
    y = np.array([5, 0, 200, 5, 0, 200])
    data = load(npz(tmp_path, x=X, y=y))
    same(data, y=y)
    assert data.labels.tolist() == [1, 0, 2, 1, 0, 2] and data.names == ["0", "5", "200"]


def test_test_pictures_of_untrained_classes_are_left_out_and_that_is_said(tmp_path):
    data = load(npz(tmp_path, x=X[:3], y=[4, 7, 4], x_test=X[3:], y_test=[4, 5, 7]))
    same(data, X[:3], [4, 7, 4])
    assert np.array_equal(data.test_images, scaled(X[[3, 5]]))
    assert data.test_labels.tolist() == [0, 1] and "left out 1 test picture" in data.said[0]
    data = load(npz(tmp_path, x=X[:3], y=[4, 7, 4], x_test=X[3:], y_test=[5, 5, 5]))
    assert data.test_images is None and data.test_labels is None


def test_the_crc_tells_sets_apart_and_not_layouts(tmp_path):
    crc = load(npz(tmp_path, x=X, y=Y)).crc()
    assert crc == load(mnist(tmp_path / "a")).crc()
    assert crc == load(npz(tmp_path, x=X, y=Y, x_test=X, y_test=Y)).crc()
    others = [dict(x=X, y=Y[::-1]), dict(x=X[::-1], y=Y), dict(x=X), dict(x=X[:5], y=Y[:5])]
    assert len({crc, *(load(npz(tmp_path, **other)).crc() for other in others)}) == 5
