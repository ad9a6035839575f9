import gzip
import io
import os
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest

from official_recipes.common import image_data
from official_recipes.common.data_format import DataFormatError
from official_recipes.common.files import atomic_write
from official_recipes.common.image_data import CIFAR10_CLASSES, DigitsSource
from official_recipes.quickstart.settings import validation_size

REAL_DATA = Path(
    os.environ.get("TF_LBOPT_DATA", Path(__file__).resolve().parents[1] / ".." / "shared" / "data")
)


def real_folder(name):
    folder = REAL_DATA / name
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set TF_LBOPT_DATA to the folder that has {name}/")
    return folder


def idx_bytes(array):
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_mnist(folder, compress, train=30, test=10):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", train), ("t10k", test)):
        arrays[f"{split}-images-idx3-ubyte"] = rng.integers(0, 256, (count, 28, 28), np.uint8)
        arrays[f"{split}-labels-idx1-ubyte"] = (np.arange(count) % 10).astype(np.uint8)
    for stem, array in arrays.items():
        if compress:
            (folder / f"{stem}.gz").write_bytes(gzip.compress(idx_bytes(array)))
        else:
            (folder / stem).write_bytes(idx_bytes(array))
    return arrays


def jpeg(color):
    image_module = pytest.importorskip("PIL.Image")
    buffer = io.BytesIO()
    image_module.new("RGB", (32, 32), color).save(buffer, "JPEG", quality=75)
    return buffer.getvalue()


def color_of(label, index):
    """A flat color that survives JPEG and tells class and index apart."""
    return (20 * label + 10, 60 * index + 20, 128)


def write_cifar_jpeg(folder, labels, *, with_labels=True):
    """The archive and label files, with ``labels`` in the original order for both splits."""
    with tarfile.open(folder / "cifar10_jpeg.tar.gz", "w:gz") as archive:
        for split in ("test", "train"):
            seen = [0] * 10
            members = []
            for label in labels:
                members.append((label, seen[label]))
                seen[label] += 1
            for label, index in sorted(members):
                content = jpeg(color_of(label, index))
                member = tarfile.TarInfo(f"{split}/{CIFAR10_CLASSES[label]}/{index:04d}.jpg")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            if with_labels:
                np.array(labels, np.uint8).tofile(folder / f"{split}_labels_original_order.u8")


LABELS = [6, 9, 9, 4, 1, 1, 2, 7, 8, 3, 0, 5, 6]


@pytest.mark.parametrize("compress", [True, False])
def test_mnist_round_trip(tmp_path, compress):
    arrays = write_mnist(tmp_path, compress)
    source = image_data.find_source(tmp_path)
    assert (source.kind, source.name, source.train_size) == ("mnist", "MNIST", 30)
    steps = []
    data = source.load(lambda done, total: steps.append((done, total)))
    np.testing.assert_array_equal(data.train_images[..., 0], arrays["train-images-idx3-ubyte"])
    np.testing.assert_array_equal(data.test_labels, arrays["t10k-labels-idx1-ubyte"])
    assert data.train_images.shape == (30, 28, 28, 1)
    assert data.train_labels.dtype == np.int64
    assert data.classes == 10
    assert steps[-1] == (4, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"\x00\x00\x0d\x01" + bytes(8), "not an IDX file"),
        (b"\x00\x00\x08\x03" + bytes(5), "ends inside its header"),
        (idx_bytes(np.zeros((4, 5)))[:-1], "19 data bytes; its header promises 20"),
        (idx_bytes(np.zeros((4, 5))) + b"x", "21 data bytes"),
    ],
)
def test_damaged_idx_is_refused(tmp_path, content, message):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(DataFormatError, match=message):
        image_data.read_idx(path)


def test_cut_gzip_is_refused(tmp_path):
    path = tmp_path / "file.gz"
    path.write_bytes(gzip.compress(idx_bytes(np.arange(250)))[:-20])
    with pytest.raises(DataFormatError, match="damaged gzip"):
        image_data.read_idx(path)


def test_missing_mnist_companion_is_named(tmp_path):
    write_mnist(tmp_path, compress=True)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataFormatError, match="t10k-labels-idx1-ubyte"):
        image_data.find_source(tmp_path).load()


@pytest.mark.parametrize("with_labels", [True, False])
def test_cifar_jpeg_order(tmp_path, with_labels):
    write_cifar_jpeg(tmp_path, LABELS, with_labels=with_labels)
    source = image_data.find_source(tmp_path)
    assert (source.kind, source.name) == ("cifar10", "CIFAR-10 (JPEG)")
    assert source.train_size == len(LABELS)
    data = source.load()
    expected = LABELS if with_labels else sorted(LABELS)
    seen = [0] * 10
    for split_images, split_labels in (
        (data.train_images, data.train_labels),
        (data.test_images, data.test_labels),
    ):
        assert split_labels.tolist() == expected
        assert split_images.shape == (len(LABELS), 32, 32, 3)
        seen = [0] * 10
        for image, label in zip(split_images, split_labels, strict=True):
            color = color_of(label, seen[label])
            seen[label] += 1
            np.testing.assert_allclose(image.mean((0, 1)), color, atol=4)


def test_cifar_labels_that_do_not_match_are_refused(tmp_path):
    write_cifar_jpeg(tmp_path, LABELS)
    np.array([*LABELS, 3], np.uint8).tofile(tmp_path / "train_labels_original_order.u8")
    with pytest.raises(DataFormatError, match="do not match"):
        image_data.find_source(tmp_path).load()


def test_cut_cifar_archive_is_refused(tmp_path):
    write_cifar_jpeg(tmp_path, LABELS)
    archive = tmp_path / "cifar10_jpeg.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-700])
    with pytest.raises(DataFormatError, match="damaged archive"):
        image_data.find_source(tmp_path).load()


def write_cifar_pickles(folder):
    rng = np.random.default_rng(0)
    batches = {}
    for name in [*(f"data_batch_{index}" for index in range(1, 6)), "test_batch"]:
        data = rng.integers(0, 256, (7, 3072), np.uint8)
        batches[name] = {b"data": data, b"labels": [int(i) for i in rng.integers(0, 10, 7)]}
        (folder / name).write_bytes(pickle.dumps(batches[name], protocol=2))
    return batches


def test_cifar_pickles(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    batches = write_cifar_pickles(folder)
    source = image_data.find_source(tmp_path)
    assert (source.kind, source.name, source.train_size) == ("cifar10", "CIFAR-10", 35)
    data = source.load()
    first = batches["data_batch_1"][b"data"][0]
    np.testing.assert_array_equal(data.train_images[0, :, :, 1].ravel(), first[1024:2048])
    np.testing.assert_array_equal(data.test_labels, batches["test_batch"][b"labels"])


class Intruder:
    def __reduce__(self):
        return (os.getcwd, ())


def test_pickle_that_would_run_code_is_refused(tmp_path):
    write_cifar_pickles(tmp_path)
    (tmp_path / "data_batch_3").write_bytes(pickle.dumps({b"data": Intruder()}))
    with pytest.raises(DataFormatError, match="does not belong in CIFAR-10 data"):
        image_data.find_source(tmp_path).load()


def test_unknown_folders_are_refused(tmp_path):
    with pytest.raises(DataFormatError, match="no known data"):
        image_data.find_source(tmp_path)
    with pytest.raises(DataFormatError, match="not a folder"):
        image_data.find_source(tmp_path / "missing")


def test_digits_split_is_fixed_and_stratified():
    source = DigitsSource()
    data, again = source.load(), source.load()
    np.testing.assert_array_equal(data.test_images, again.test_images)
    assert len(data.train_labels) == source.train_size == 1437
    assert len(data.test_labels) == 360
    counts = np.bincount(data.test_labels)
    assert counts.min() >= 34
    assert counts.max() <= 38
    assert data.train_images.max() == data.max_value == 16


def test_validation_part_comes_from_the_training_split():
    data = DigitsSource().load()
    size = validation_size(len(data.train_labels))
    held_out = image_data.hold_out_validation(data, size)
    assert len(held_out.test_labels) == size == 287
    assert len(held_out.train_labels) + len(held_out.test_labels) == len(data.train_labels)
    train = {image.tobytes() for image in data.train_images}
    assert all(image.tobytes() in train for image in held_out.test_images)


def test_real_mnist():
    data = image_data.find_source(real_folder("mnist")).load()
    assert data.train_images.shape == (60000, 28, 28, 1)
    assert data.test_images.shape == (10000, 28, 28, 1)
    assert np.bincount(data.test_labels).tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009,
    ]  # fmt: skip
    assert data.train_images.mean() == pytest.approx(33.32, abs=0.01)


@pytest.mark.long
def test_real_cifar_jpeg_test_split():
    source = image_data.find_source(real_folder("cifar10-jpeg"))
    assert source.train_size == 50000
    data = source.load()
    assert np.bincount(data.train_labels).tolist() == [5000] * 10
    assert data.test_labels[:8].tolist() == [3, 8, 8, 0, 6, 6, 1, 6]
    mean = data.train_images[::10].mean((0, 1, 2))
    np.testing.assert_allclose(mean, [125.27, 122.93, 113.86], atol=1.0)


def test_atomic_write_keeps_the_old_file_on_failure(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")

    def fail_halfway():
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with atomic_write(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]
