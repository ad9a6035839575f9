"""Image classification data as folders or archives of image files, one folder for each class.

Known layouts, each possibly inside folders more:

    train/<class>/...                 images at any depth below
    val/<class>/...                   may be missing
    val/*, and a file of labels       as in ImageNet and Tiny ImageNet
    <class>/...                       no splits: some images are held out for validation

Splits have names such as Train, training_set, seg_train/seg_train, valid, Test. What can be read in
two ways is an error.
"""

from __future__ import annotations

import io
import os
import random
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from official_recipes.common.data_format import DataFormatError
from official_recipes.common.flag_parsing import FlagValueError

SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".gif")
_OTHER_SUFFIXES = (".webp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2", ".jfif", ".ppm")
_SPLITS = {
    "train": {"train", "training", "trainset", "traindata"},
    "validation": {"val", "valid", "validation", "dev", "eval", "evaluation", "valset"},
    "test": {"test", "testing", "testset", "testdata"},
    "unlabelled": {"pred", "predict", "prediction", "unlabelled", "unlabeled"},
}
"""Words in the names of folders that are splits, in any case and beside any other words."""

_LABELS = (
    "val_annotations.txt",
    "imagenet_2012_validation_synset_labels.txt",
    "LOC_val_solution.csv",
)
"""Files with the classes of a split without folders, as Tiny ImageNet and ImageNet have them."""

_GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_META = "meta.mat"
"""Of ImageNet's development kit: a number for each validation image, and the classes' names."""

_FLAGS = (
    "say by --train_folder and --validation_folder (both inside the source) whose folders are the "
    "classes"
)
_CHUNK = 1 << 20

Progress = Callable[[int, int], None]
"""Receives what is done and the total."""


class Files(Protocol):
    """Files that can be read in any order."""

    def names(self) -> list[str]:
        """All of them, as paths with slashes."""

    def read(self, name: str) -> bytes:
        """The content of one."""


@dataclass(frozen=True)
class Folder:
    """The files below a folder."""

    path: Path

    def names(self) -> list[str]:
        """All files, as paths with slashes, relative to the folder."""
        found = []
        for folder, _, names in os.walk(self.path, followlinks=True):
            relative = Path(folder).relative_to(self.path)
            found += [(relative / name).as_posix() for name in names]
        return found

    def read(self, name: str) -> bytes:
        """The content of one file."""
        return (self.path / name).read_bytes()


class Archive:
    """The files in a tar archive that is not compressed.

    Args:
        path: The archive.

    Raises:
        DataFormatError: It is none.
    """

    def __init__(self, path: Path):
        try:
            self._tar = tarfile.open(path, "r:")  # noqa: SIM115  # read from until the end
            self._members = {m.name: m for m in self._tar if m.isfile()}
        except (tarfile.TarError, EOFError) as error:
            raise DataFormatError(f"{path} is no readable tar archive: {error}") from error
        self._path = path

    def names(self) -> list[str]:
        """All files, by their names in the archive."""
        return list(self._members)

    def read(self, name: str) -> bytes:
        """The content of one file."""
        member = self._tar.extractfile(self._members[name])
        content = b"" if member is None else member.read()
        if len(content) != self._members[name].size:
            raise DataFormatError(f"{self._path} ends inside {name}")
        return content


def open_files(path: Path, scratch: Path, progress: Progress | None = None) -> Files:
    """The files of a folder or of a tar archive, compressed or not.

    Args:
        path: The folder or archive.
        scratch: A folder into which a compressed archive is decompressed first, since it can not
            be read in any order.
        progress: Told the bytes decompressed so far and, as a guess, their total.

    Raises:
        DataFormatError: The path is neither.
    """
    if path.is_dir():
        return Folder(path)
    if not path.is_file():
        raise DataFormatError(f"{path} does not exist")
    try:
        with tarfile.open(path, "r:"):
            return Archive(path)
    except tarfile.TarError:
        pass
    return Archive(_decompressed(path, scratch / "archive.tar", progress))


def _decompressed(path: Path, target: Path, progress: Progress | None) -> Path:
    import bz2
    import gzip
    import lzma

    openers: dict[bytes, Callable[..., Any]] = {
        b"\x1f\x8b": gzip.open,
        b"BZ": bz2.open,
        b"\xfd7": lzma.open,
    }
    with path.open("rb") as file:
        opener = openers.get(file.read(2))
    if opener is None:
        raise DataFormatError(f"{path} is neither a folder nor a tar archive")
    total, done = path.stat().st_size, 0
    try:
        with opener(path, "rb") as source, target.open("wb") as out:
            while chunk := source.read(_CHUNK):
                out.write(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(done, max(total, done))
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        raise DataFormatError(f"{path} is damaged: {error}") from error
    return target


@dataclass(frozen=True)
class Labeled:
    """A split: names of files and the number of each one's class."""

    names: tuple[str, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class ImageTree:
    """What was found among files.

    Attributes:
        classes: Their names, in the order of their numbers.
        train: The training split.
        validation: The validation split.
        found: In words, where the splits are.
        left_out: How many images are in no split, by what they are.
    """

    classes: tuple[str, ...]
    train: Labeled
    validation: Labeled
    found: str
    left_out: Mapping[str, int]


@dataclass(frozen=True)
class Layout:
    """What a user says of the layout, where it can not be told by names.

    Attributes:
        train_folder: The folder, inside the source, whose folders are the classes.
        validation_folder: Likewise; empty for none.
        validation_labels: A file with the classes of validation images. A line has an image's name
            and its class, or there is one class in each line, in the order of the images' names.
    """

    train_folder: str | None = None
    validation_folder: str | None = None
    validation_labels: Path | None = None


_Parts = tuple[str, ...]
_Images = Mapping[str, _Parts]


def find_images(
    files: Files, validation_fraction: float, seed: int, layout: Layout | None = None
) -> ImageTree:
    """Finds out the layout of files and the class of each image.

    Args:
        files: A folder or an archive.
        validation_fraction: What share of the images to hold out where there is no validation
            split.
        seed: Of that choice.
        layout: What is known of it.

    Raises:
        DataFormatError: The layout is none of the known ones, or can be read in two ways.
        FlagValueError: `layout` names what is not there.
    """
    layout = layout or Layout()
    names = sorted(name for name in files.names() if not _hidden(name))
    images = {n: PurePosixPath(n).parts for n in names if _suffix(n) in SUFFIXES}
    left_out = Counter(f"{_suffix(n)} files" for n in names if _suffix(n) in _OTHER_SUFFIXES)
    root, train_folder, validation_folder = _splits(images, layout, left_out)
    inside = "/".join(filter(None, (*root, train_folder))) or "the source"
    train = _classes(_below(images, root, train_folder), inside, left_out)
    if not train:
        said = "".join(f", {number} {kind}" for kind, number in left_out.items())
        raise DataFormatError(
            f"no images of a known layout in {inside}: train/<class>/..., or <class>/..., with "
            f"files ending in {', '.join(SUFFIXES)} (found: {len(images)} such files{said})"
        )
    if layout.train_folder is None:
        _check_level(_below(images, root, train_folder), inside)
    classes = tuple(sorted(set(train.values())))
    if len(classes) < 2 and layout.train_folder is None:
        raise DataFormatError(f"there is one class only, {classes[0]}, in {inside}; {_FLAGS}")
    validation: dict[str, str] = {}
    if validation_folder:
        where = "/".join((*root, validation_folder))
        validation = _validation_classes(
            files, names, _below(images, root, validation_folder), where, layout, classes, left_out
        )
        found = f"classes are the folders of {inside}; validation images are those of {where}"
    else:
        given = layout.validation_labels
        if given is not None:
            raise FlagValueError(
                "validation_labels", "no file where there is no validation split", str(given)
            )
        held_out = sorted(train)
        random.Random(seed).shuffle(held_out)
        held_out = held_out[: round(len(held_out) * validation_fraction)]
        validation = {name: train.pop(name) for name in held_out}
        classes = tuple(sorted(set(train.values())))
        found = f"classes are the folders of {inside}; {len(held_out)} of their images are held out"
    numbers = {name: number for number, name in enumerate(classes)}
    unknown = sorted(set(validation.values()) - set(classes))
    if unknown:
        raise DataFormatError(
            f"validation images of classes without training images: {unknown[:3]}"
        )
    return ImageTree(
        classes,
        _labeled(train, numbers),
        _labeled(validation, numbers),
        found,
        dict(left_out),
    )


def _labeled(images: dict[str, str], numbers: dict[str, int]) -> Labeled:
    return Labeled(tuple(images), tuple(numbers[name] for name in images.values()))


def _hidden(name: str) -> bool:
    return any(part.startswith(".") and part != "." for part in PurePosixPath(name).parts)


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _kind(folder: str) -> str | None:
    """Which split a folder is by its name; ``None`` for none, and for several."""
    words = set(re.findall("[a-z]+", folder.casefold()))
    kinds = [kind for kind, known in _SPLITS.items() if words & known]
    return kinds[0] if len(kinds) == 1 else None


def _below(images: _Images, root: _Parts, folder: str) -> dict[str, _Parts]:
    """The images of a folder, with the rest of their paths."""
    path = (*root, *PurePosixPath(folder).parts)
    return {n: p[len(path) :] for n, p in images.items() if p[: len(path)] == path}


def _folders(parts: Iterable[_Parts]) -> list[str]:
    return sorted({p[0] for p in parts if len(p) > 1})


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _splits(images: _Images, layout: Layout, left_out: Counter[str]) -> tuple[_Parts, str, str]:
    """The folder in which the splits are, and the folders of the training and validation split."""
    if layout.train_folder is not None:
        for flag, folder in (
            ("train_folder", layout.train_folder),
            ("validation_folder", layout.validation_folder or "."),
        ):
            if not _below(images, (), folder):
                raise FlagValueError(flag, "a folder with images inside the source", repr(folder))
        return (), layout.train_folder, layout.validation_folder or ""
    if layout.validation_folder:
        raise FlagValueError("train_folder", "a folder, as --validation_folder has one", None)
    root = _common_root(images)
    inside = _below(images, root, "")
    folders = _folders(inside.values())
    kinds = {folder: _kind(folder) for folder in folders}
    of_kind = {k: [f for f in folders if kinds[f] == k] for k in (*_SPLITS, None)}
    alike = [f for f in folders if kinds[f]]
    if any(_kind(part) in ("validation", "test") for part in root):
        raise DataFormatError(f"the only split is {'/'.join(root)}; {_FLAGS}")
    has_classes = {p[0] for p in inside.values() if len(p) > 2}
    if not has_classes & {*of_kind["train"]} and (len(alike) < 2 or len(alike) < len(folders)):
        # A class may be called `train`; one called `test` would be the first.
        if len(alike) > 1 or any(
            f.casefold() in _SPLITS[kinds[f] or ""] - {"train"} for f in alike
        ):
            raise DataFormatError(
                f"of the folders {_listed(folders)} some look like splits ({_listed(alike)}), the "
                f"others like classes; {_FLAGS}"
            )
        return root, "", ""
    chosen = of_kind["validation"] or of_kind["test"]
    if len(of_kind["train"]) != 1 or len(chosen) > 1 or of_kind[None]:
        raise DataFormatError(
            f"the folders {_listed(folders)} look like splits, but not like one of training and at "
            f"most one of validation; {_FLAGS}"
        )
    used = of_kind["train"] + (chosen if layout.validation_folder is None else [])
    for folder in folders:
        if folder not in used:
            left_out[f"images in {'/'.join((*root, folder))}"] += len(_below(images, root, folder))
    train, validation = (_inner(images, root, f) for f in [*used, ""][:2])
    return root, train, validation


def _common_root(images: _Images) -> _Parts:
    """The folders that all have in common around the splits, or around the classes."""
    root: _Parts = ()
    while True:
        inside = _below(images, root, "")
        folders = _folders(inside.values())
        kinds = {_kind(p[1]) for p in inside.values() if len(p) > 2}
        # A folder around classes alone can not be told from a class, but for its having folders.
        nested = all(len(p) > 2 for p in inside.values()) or "train" in kinds
        if len(folders) != 1 or not nested:
            return root
        if _kind(folders[0]) == "train" and (None in kinds or not kinds):
            return root
        root = (*root, folders[0])


def _inner(images: _Images, root: _Parts, folder: str) -> str:
    """The folder, or the only one in it where that is called the same split again."""
    while folder:
        inside = _below(images, root, folder)
        folders = _folders(inside.values())
        if len(folders) != 1 or _kind(folders[0]) != _kind(folder.split("/")[-1]):
            break
        folder = f"{folder}/{folders[0]}"
    return folder


def _classes(images: _Images, where: str, left_out: Counter[str]) -> dict[str, str]:
    direct = sum(len(parts) == 1 for parts in images.values())
    if direct:
        left_out[f"images in {where} itself, in no class"] += direct
    return {name: parts[0] for name, parts in images.items() if len(parts) > 1}


def _check_level(images: _Images, where: str) -> None:
    """Checks that the folders which would be classes are not folders of classes."""
    below = {folder: set[str]() for folder in _folders(images.values())}
    for parts in images.values():
        if len(parts) > 1:
            below[parts[0]].add(parts[1] if len(parts) > 2 else "")
    # One folder in each class with the same name as in all others is Tiny ImageNet's `images`.
    inner = set[str]().union(*below.values())
    if "" not in inner and len(inner) > 1:
        raise DataFormatError(
            f"the folders of {where} ({_listed(below)}) have no images but only folders "
            f"({_listed(sorted(inner))}), so either may be the classes; {_FLAGS}"
        )


def _validation_classes(
    files: Files,
    names: list[str],
    images: _Images,
    where: str,
    layout: Layout,
    classes: tuple[str, ...],
    left_out: Counter[str],
) -> dict[str, str]:
    given = layout.validation_labels
    found = [
        name
        for known in _LABELS
        for name in names
        if PurePosixPath(name).name == known
        and PurePosixPath(name).parent in (PurePosixPath(where), *PurePosixPath(where).parents)
    ]
    folders = _folders(images.values())
    found += [name for name in names if PurePosixPath(name).name == _GROUND_TRUTH]
    flat = not folders or (len(folders) == 1 and folders[0] not in classes)
    if given is not None:
        beside: Files = Folder(given.parent)
        return _read_labels(beside, given.name, str(given), images, classes)
    if flat and found:
        return _read_labels(files, found[0], found[0], images, classes)
    if flat:
        raise DataFormatError(
            f"the {len(images)} images of {where} are in no folders of classes: give their classes "
            "by --validation_labels=FILE, or --validation_folder= (empty) to hold training images "
            "out instead"
        )
    return _classes(images, where, left_out)


def _read_labels(
    files: Files, file: str, where: str, images: _Images, classes: tuple[str, ...]
) -> dict[str, str]:
    """The class of each image by a file of labels; its lines may be fewer than the images."""
    try:
        content = files.read(file)
        lines = [line.strip() for line in content.decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataFormatError(f"{where} is no text in UTF-8") from error
    by_name = sorted(images, key=lambda name: PurePosixPath(name).name)
    if PurePosixPath(file).name == _GROUND_TRUTH:
        lines = _names_of_numbers(lines, files, file, where, classes)
    if all(line in classes for line in lines):
        if len(lines) != len(images):
            raise DataFormatError(
                f"{where} has {len(lines)} lines with a class in each for {len(images)} images"
            )
        return dict(zip(by_name, lines, strict=True))
    of_stem = {}
    for line in lines:
        name, _, rest = re.sub(r"[\t,]", "\t", line, count=1).partition(
            "\t" if re.search(r"[\t,]", line) else " "
        )
        rest = rest.strip()
        of_stem[PurePosixPath(name).stem] = rest if rest in classes else re.split(r"[\s,]", rest)[0]
    for name in by_name:
        label = of_stem.get(PurePosixPath(name).stem)
        if label is None:
            raise DataFormatError(f"{where} has no line for {name}")
        if label not in classes:
            raise DataFormatError(
                f"{where} has the class {label!r} for {name}, which is none of the training images'"
            )
    return {name: of_stem[PurePosixPath(name).stem] for name in by_name}


def _names_of_numbers(
    lines: list[str], files: Files, file: str, where: str, classes: tuple[str, ...]
) -> list[str]:
    """The classes for the development kit's numbers, by the meta.mat beside them."""
    path = str(PurePosixPath(file).with_name(_META))
    meta = str(PurePosixPath(where).with_name(_META))
    try:
        content = files.read(path)
    except (OSError, KeyError) as error:
        raise DataFormatError(
            f"{where} needs the development kit's {_META} beside it: no {meta}"
        ) from error
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError as error:
        raise DataFormatError(f"reading {meta} needs scipy: pip install scipy") from error
    try:
        rows = loadmat(io.BytesIO(content), squeeze_me=True)["synsets"].ravel()
        name_of = {str(int(row["ILSVRC2012_ID"])): str(row["WNID"]) for row in rows}
    except (
        *(KeyError, IndexError, ValueError, TypeError, OSError, NotImplementedError),
        MatReadError,
        zlib.error,
    ) as error:
        raise DataFormatError(
            f"{meta} is no {_META} of ImageNet's development kit, with ILSVRC2012_ID and WNID of "
            f"`synsets`: {error}"
        ) from error
    for number, line in enumerate(lines, 1):
        if line not in name_of:
            raise DataFormatError(f"line {number} of {where} is no number of {meta}: {line!r}")
        if name_of[line] not in classes:
            raise DataFormatError(
                f"line {number} of {where} is the class {name_of[line]}, which is none of the "
                "training images'"
            )
    return [name_of[line] for line in lines]
