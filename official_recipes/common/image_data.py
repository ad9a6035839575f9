"""Readers for MNIST (IDX files) and CIFAR-10 (JPEG archive or the original pickles).

A reader is found from a folder's content with :func:`find_source`, which only looks at names and
headers. Loading the arrays is a second step, because decoding tens of thousands of images takes
a while. TensorFlow is imported only where JPEG images are decoded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import math
import pickle
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, cast

import numpy as np

from official_recipes.common.data_format import DataFormatError, data_of_flag

ProgressCallback = Callable[[int, int], None]
"""Receives the number of items read so far and the total."""

CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)

KNOWN_FORMS = (
    "MNIST (train-images-idx3-ubyte[.gz] and its three companions), CIFAR-10 "
    "(cifar10_jpeg.tar.gz, or data_batch_1 ... data_batch_5 and test_batch) or CIFAR-100 (train "
    "and test)"
)


@dataclass(frozen=True)
class ImageData:
    """Images as uint8 ``[count, height, width, channels]`` with int64 labels, in two splits.

    Attributes:
        name: How results on this data are to be labeled.
        train_images: Training images.
        train_labels: Training labels, from 0.
        test_images: Test images.
        test_labels: Test labels.
        max_value: The largest value a pixel can have.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    max_value: int = 255

    @property
    def classes(self) -> int:
        """The number of classes."""
        return int(self.train_labels.max()) + 1


class ImageSource(Protocol):
    """Image data found in a folder (or in a package) and not read yet."""

    @property
    def kind(self) -> str:
        """A short key: ``digits``, ``mnist``, ``cifar10`` or ``cifar100``."""

    @property
    def name(self) -> str:
        """How results on this data are to be labeled."""

    @property
    def train_size(self) -> int:
        """The number of training images."""

    def load(self, progress: ProgressCallback | None = None) -> ImageData:
        """Reads all images and labels."""


def find_source(folder: Path) -> ImageSource:
    """Finds out which data a folder holds.

    Args:
        folder: The folder to look at.

    Returns:
        A source for the data found.

    Raises:
        DataFormatError: The folder is missing or holds no known data.
    """
    if not folder.is_dir():
        raise DataFormatError(f"{folder} is not a folder")
    if _plain_or_gzip(folder, "train-images-idx3-ubyte") is not None:
        return MnistSource(folder)
    for name in ("cifar10_jpeg.tar.gz", "cifar10_jpeg.tar"):
        if (folder / name).is_file():
            return CifarJpegSource(folder / name)
    for candidate in (folder, folder / "cifar-10-batches-py"):
        if (candidate / "data_batch_1").is_file():
            return CifarPickleSource(candidate)
    for candidate in (folder, folder / "cifar-100-python"):
        if (candidate / "train").is_file() and (candidate / "test").is_file():
            return Cifar100PickleSource(candidate)
    raise DataFormatError(f"{folder} has no known data")


def source_in(data_dir: str | None) -> ImageSource:
    """Returns the data that ``--data_dir`` names, the digits where it names none.

    Raises:
        FlagValueError: The folder is missing or holds no known data.
    """
    if data_dir is None:
        return DigitsSource()
    with data_of_flag("data_dir", f"a folder with {KNOWN_FORMS}", data_dir):
        return find_source(Path(data_dir))


# --- digits ------------------------------------------------------------------------------------

# Fixed, so that a recipe's --seed changes the training and never the split.
_SPLIT_SEED = 0
_DIGITS_TEST_SIZE = 360


@dataclass(frozen=True)
class DigitsSource:
    """The 1,797 8x8 digits inside scikit-learn, with a fixed stratified split."""

    kind: str = "digits"
    name: str = "scikit-learn digits"
    train_size: int = 1797 - _DIGITS_TEST_SIZE

    def load(self, progress: ProgressCallback | None = None) -> ImageData:
        """Reads all images and labels."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        train_images, test_images, train_labels, test_labels = train_test_split(
            digits.images.astype(np.uint8)[..., np.newaxis],
            digits.target.astype(np.int64),
            test_size=_DIGITS_TEST_SIZE,
            stratify=digits.target,
            random_state=_SPLIT_SEED,
        )
        if progress is not None:
            progress(1, 1)
        return ImageData(
            self.name, train_images, train_labels, test_images, test_labels, max_value=16
        )


def hold_out_validation(data: ImageData, size: int) -> ImageData:
    """Replaces the test split with a stratified part of the training split.

    What is chosen by it (a learning rate) is chosen without the test images.

    Args:
        data: The data.
        size: How many training images are set apart.
    """
    from sklearn.model_selection import train_test_split

    train_images, images, train_labels, labels = train_test_split(
        data.train_images,
        data.train_labels,
        test_size=size,
        stratify=data.train_labels,
        random_state=_SPLIT_SEED,
    )
    return dataclasses.replace(
        data,
        train_images=train_images,
        train_labels=train_labels,
        test_images=images,
        test_labels=labels,
    )


def evenly_spaced(number: int, count: int) -> np.ndarray:
    """Indices of ``count`` of ``number`` images, from all over a split that may be sorted."""
    return np.arange(count) * number // count


def fewer_training_images(data: ImageData, count: int) -> ImageData:
    """Leaves only evenly spaced ones of the training images.

    Args:
        data: The data.
        count: How many stay.
    """
    some = evenly_spaced(len(data.train_labels), count)
    return dataclasses.replace(
        data, train_images=data.train_images[some], train_labels=data.train_labels[some]
    )


# --- MNIST -------------------------------------------------------------------------------------


def read_idx(path: Path) -> np.ndarray:
    """Reads an IDX file of unsigned bytes, gzip-compressed or not.

    Args:
        path: The file.

    Returns:
        A uint8 array of the shape in the file's header.

    Raises:
        DataFormatError: The file is damaged or holds another type.
    """
    try:
        with _open_maybe_gzip(path) as file:
            shape = _read_idx_shape(file, path)
            payload = file.read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataFormatError(f"{path} is a damaged gzip file: {error}") from error
    if len(payload) != math.prod(shape):
        raise DataFormatError(
            f"{path} has {len(payload)} data bytes; its header promises {math.prod(shape)}"
        )
    return np.frombuffer(payload, np.uint8).reshape(shape)


@dataclass(frozen=True)
class MnistSource:
    """The four MNIST files in one folder."""

    folder: Path
    kind: str = "mnist"
    name: str = "MNIST"

    @property
    def train_size(self) -> int:
        """The number of training images."""
        path = self._path("train-labels-idx1-ubyte")
        with _open_maybe_gzip(path) as file:
            return _read_idx_shape(file, path)[0]

    def load(self, progress: ProgressCallback | None = None) -> ImageData:
        """Reads all images and labels."""
        stems = (
            "train-images-idx3-ubyte",
            "train-labels-idx1-ubyte",
            "t10k-images-idx3-ubyte",
            "t10k-labels-idx1-ubyte",
        )
        arrays = []
        for index, stem in enumerate(stems):
            arrays.append(read_idx(self._path(stem)))
            if progress is not None:
                progress(index + 1, len(stems))
        for images, labels in (arrays[:2], arrays[2:]):
            if images.ndim != 3 or labels.shape != images.shape[:1]:
                raise DataFormatError(
                    f"{self.folder}: images of shape {images.shape} and labels of shape "
                    f"{labels.shape} do not belong together"
                )
        return ImageData(
            self.name,
            arrays[0][..., np.newaxis],
            arrays[1].astype(np.int64),
            arrays[2][..., np.newaxis],
            arrays[3].astype(np.int64),
        )

    def _path(self, stem: str) -> Path:
        path = _plain_or_gzip(self.folder, stem)
        if path is None:
            raise DataFormatError(f"{self.folder} has no {stem} or {stem}.gz")
        return path


def _plain_or_gzip(folder: Path, stem: str) -> Path | None:
    for name in (f"{stem}.gz", stem):
        if (folder / name).is_file():
            return folder / name
    return None


def _open_maybe_gzip(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _read_idx_shape(file: IO[bytes], path: Path) -> tuple[int, ...]:
    magic = file.read(4)
    if len(magic) != 4 or magic[:3] != b"\x00\x00\x08" or magic[3] == 0:
        raise DataFormatError(f"{path} is not an IDX file of unsigned bytes")
    header = file.read(4 * magic[3])
    if len(header) != 4 * magic[3]:
        raise DataFormatError(f"{path} ends inside its header")
    return tuple(int(size) for size in np.frombuffer(header, ">u4"))


# --- CIFAR-10 as JPEG --------------------------------------------------------------------------


@dataclass(frozen=True)
class CifarJpegSource:
    """CIFAR-10 as an archive of ``{train,test}/<class>/<NNNN>.jpg``.

    JPEG is lossy, so results are labeled apart from those on the original pixels. Where the
    files ``{train,test}_labels_original_order.u8`` lie beside the archive, the images come in the
    original order of CIFAR-10; without them, class by class.
    """

    archive: Path
    kind: str = "cifar10"
    name: str = "CIFAR-10 (JPEG)"

    @property
    def train_size(self) -> int:
        """The number of training images."""
        labels = self._original_order("train")
        return len(self._encoded()["train"]) if labels is None else len(labels)

    def load(self, progress: ProgressCallback | None = None) -> ImageData:
        """Reads all images and labels."""
        encoded = self._encoded()
        total = sum(len(images) for images in encoded.values())
        splits: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        done = 0
        for split in ("train", "test"):
            keys, labels = self._ordered_keys(split, encoded[split])
            jpegs = [encoded[split][key] for key in keys]
            images = _decode_jpegs(jpegs, self.archive, done, total, progress)
            done += len(jpegs)
            splits[split] = (images, labels)
        return ImageData(self.name, *splits["train"], *splits["test"])

    def _original_order(self, split: str) -> np.ndarray | None:
        path = self.archive.parent / f"{split}_labels_original_order.u8"
        return np.fromfile(path, np.uint8) if path.is_file() else None

    def _encoded(self) -> dict[str, dict[tuple[int, int], bytes]]:
        """Reads the archive into ``{split: {(class, index in the class): JPEG}}``."""
        encoded: dict[str, dict[tuple[int, int], bytes]] = {"train": {}, "test": {}}
        class_index = {name: index for index, name in enumerate(CIFAR10_CLASSES)}
        try:
            with tarfile.open(self.archive) as archive:
                for member in archive:
                    parts = Path(member.name).parts
                    if not member.isfile() or len(parts) != 3 or not parts[2].endswith(".jpg"):
                        continue
                    split, class_name, file_name = parts
                    if split not in encoded or class_name not in class_index:
                        raise DataFormatError(f"{self.archive}: unexpected member {member.name}")
                    key = (class_index[class_name], int(Path(file_name).stem))
                    encoded[split][key] = cast(IO[bytes], archive.extractfile(member)).read()
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataFormatError(f"{self.archive} is a damaged archive: {error}") from error
        except ValueError as error:
            if isinstance(error, DataFormatError):
                raise
            raise DataFormatError(f"{self.archive}: a file name is not a number") from error
        if not all(encoded.values()):
            raise DataFormatError(f"{self.archive} has no train/ or no test/ images")
        return encoded

    def _ordered_keys(
        self, split: str, encoded: dict[tuple[int, int], bytes]
    ) -> tuple[list[tuple[int, int]], np.ndarray]:
        labels = self._original_order(split)
        if labels is None:
            keys = sorted(encoded)
            return keys, np.array([label for label, _ in keys], np.int64)
        next_index = [0] * len(CIFAR10_CLASSES)
        keys = []
        for label in labels.tolist():
            if label >= len(CIFAR10_CLASSES):
                raise DataFormatError(f"{split} label {label} is not a class of CIFAR-10")
            keys.append((label, next_index[label]))
            next_index[label] += 1
        if set(keys) != set(encoded):
            raise DataFormatError(
                f"{self.archive}: {len(encoded)} {split} images do not match the "
                f"{len(keys)} labels beside the archive"
            )
        return keys, labels.astype(np.int64)


def _decode_jpegs(
    jpegs: list[bytes], archive: Path, done: int, total: int, progress: ProgressCallback | None
) -> np.ndarray:
    import tensorflow as tf

    def decode(jpeg: tf.Tensor) -> tf.Tensor:
        # The default method is faster and darkens red and blue by about 1 in 255 on average.
        return tf.io.decode_jpeg(jpeg, channels=3, dct_method="INTEGER_ACCURATE")

    images = np.empty((len(jpegs), 32, 32, 3), np.uint8)
    dataset = (
        tf.data.Dataset.from_tensor_slices(jpegs)
        .map(decode, num_parallel_calls=tf.data.AUTOTUNE)
        .batch(500)
        .prefetch(tf.data.AUTOTUNE)
    )
    start = 0
    try:
        for batch in dataset.as_numpy_iterator():
            if batch.shape[1:] != images.shape[1:]:
                raise DataFormatError(f"{archive}: images of {batch.shape[1:]}, not 32x32x3")
            images[start : start + len(batch)] = batch
            start += len(batch)
            if progress is not None:
                progress(done + start, total)
    except tf.errors.InvalidArgumentError as error:
        raise DataFormatError(f"{archive} holds a damaged or odd-sized image") from error
    return images


# --- CIFAR-10 as pickles -----------------------------------------------------------------------


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles NumPy arrays and plain containers only: a pickle can run any code otherwise."""

    _ALLOWED = frozenset(
        {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> object:
        """Returns an allowed class; anything else is an error."""
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong in CIFAR-10 data")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


@dataclass(frozen=True)
class CifarPickleSource:
    """The original ``cifar-10-batches-py`` folder."""

    folder: Path
    kind: str = "cifar10"
    name: str = "CIFAR-10"

    @property
    def train_size(self) -> int:
        """The number of training images."""
        return sum(len(self._batch(f"data_batch_{index}")[1]) for index in range(1, 6))

    def load(self, progress: ProgressCallback | None = None) -> ImageData:
        """Reads all images and labels."""
        names = [f"data_batch_{index}" for index in range(1, 6)] + ["test_batch"]
        batches = []
        for index, name in enumerate(names):
            batches.append(self._batch(name))
            if progress is not None:
                progress(index + 1, len(names))
        images = np.concatenate([batch[0] for batch in batches[:-1]])
        labels = np.concatenate([batch[1] for batch in batches[:-1]])
        return ImageData(self.name, images, labels, *batches[-1])

    def _batch(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        return _read_pickle(self.folder / name, b"labels")


@dataclass(frozen=True)
class Cifar100PickleSource:
    """The original ``cifar-100-python`` folder, with the 100 fine labels."""

    folder: Path
    kind: str = "cifar100"
    name: str = "CIFAR-100"

    @property
    def train_size(self) -> int:
        """The number of training images."""
        return len(_read_pickle(self.folder / "train", b"fine_labels")[1])

    def load(self, progress: ProgressCallback | None = None) -> ImageData:
        """Reads all images and labels."""
        splits = []
        for index, name in enumerate(("train", "test")):
            splits.append(_read_pickle(self.folder / name, b"fine_labels"))
            if progress is not None:
                progress(index + 1, 2)
        return ImageData(self.name, *splits[0], *splits[1])


def _read_pickle(path: Path, labels_key: bytes) -> tuple[np.ndarray, np.ndarray]:
    if not path.is_file():
        raise DataFormatError(f"{path.parent} has no {path.name}")
    # A damaged pickle can raise nearly anything; all of it means the same to the caller.
    with path.open("rb") as file, _as_format_error(path):
        content = _ArrayUnpickler(file, encoding="bytes").load()
        data = np.asarray(content[b"data"], np.uint8).reshape(-1, 3, 32, 32)
        labels = np.asarray(content[labels_key], np.int64)
    if len(data) != len(labels):
        raise DataFormatError(f"{path}: {len(data)} images but {len(labels)} labels")
    return np.ascontiguousarray(data.transpose(0, 2, 3, 1)), labels


@contextlib.contextmanager
def _as_format_error(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise DataFormatError(f"{path} is not a batch of CIFAR: {error}") from error


# --- TensorFlow Datasets -----------------------------------------------------------------------


@dataclass(frozen=True)
class TfdsSource:
    """A data set of TensorFlow Datasets with images, labels and the splits train and test.

    Args:
        dataset: Its name, such as ``cifar10`` or ``cifar100``.
        data_dir: TFDS's folder, or ``None`` for its own default; downloaded if it is not there.
    """

    dataset: str
    data_dir: Path | None = None

    @property
    def kind(self) -> str:
        """The data set's name."""
        return self.dataset

    @property
    def name(self) -> str:
        """How results on this data are to be labeled."""
        return {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "mnist": "MNIST"}.get(
            self.dataset, self.dataset
        )

    @property
    def train_size(self) -> int:
        """The number of training images."""
        return int(self._builder().info.splits["train"].num_examples)

    def load(self, progress: ProgressCallback | None = None) -> ImageData:
        """Reads all images and labels, downloading them first where needed."""
        import tensorflow_datasets as tfds

        builder = self._builder()
        with _as_tfds_error(self.dataset):
            builder.download_and_prepare()
            arrays: list[np.ndarray] = []
            for index, split in enumerate(("train", "test")):
                batches = list(
                    tfds.as_numpy(
                        builder.as_dataset(split=split, batch_size=1000, as_supervised=True)
                    )
                )
                arrays.append(np.concatenate([images for images, _ in batches]))
                arrays.append(np.concatenate([labels for _, labels in batches]).astype(np.int64))
                if progress is not None:
                    progress(index + 1, 2)
        return ImageData(self.name, arrays[0], arrays[1], arrays[2], arrays[3])

    def _builder(self) -> Any:
        import tensorflow_datasets as tfds

        with _as_tfds_error(self.dataset):
            folder = None if self.data_dir is None else str(self.data_dir)
            return tfds.builder(self.dataset, data_dir=folder)


@contextlib.contextmanager
def _as_tfds_error(dataset: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # TFDS raises its own, those of the network and of files.
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataFormatError(f"TFDS cannot provide {dataset!r}: {first}") from error
