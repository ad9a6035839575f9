"""Image classification data as folders or archives of image files, one folder for each class.

Known layouts, each possibly inside one folder more:

    train/<class>/...                 images at any depth below
    val/<class>/...                   (or validation/, valid/, test/), may be missing
    val/images/*, val/val_annotations.txt      as in Tiny ImageNet
    <class>/...                       no splits: some images are held out for validation
"""

from __future__ import annotations

import os
import random
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from official_recipes.common.data_format import DataFormatError

SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".gif")
_TRAIN = ("train", "training")
_VALIDATION = ("val", "validation", "valid", "test")
_ANNOTATIONS = "val_annotations.txt"
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
    import zlib

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
class Labelled:
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
    """

    classes: tuple[str, ...]
    train: Labelled
    validation: Labelled


def find_images(files: Files, validation_fraction: float, seed: int) -> ImageTree:
    """Finds out the layout of files and the class of each image.

    Args:
        files: A folder or an archive.
        validation_fraction: What share of the images to hold out where there is no validation
            split.
        seed: Of that choice.

    Raises:
        DataFormatError: The layout is none of the known ones.
    """
    names = sorted(name for name in files.names() if not _hidden(name))
    split = _without_common_folder(names)
    images = {n: p for n, p in split.items() if PurePosixPath(n).suffix.lower() in SUFFIXES}
    train = {n: p[1] for n, p in images.items() if p[0] in _TRAIN and len(p) > 2}
    if train:
        validation = _validation_classes(files, split, images)
    else:
        train = {n: p[0] for n, p in images.items() if len(p) > 1}
        validation = {}
    if not train:
        raise DataFormatError(
            "no images of a known layout: train/<class>/..., or <class>/..., with files ending in "
            + ", ".join(SUFFIXES)
        )
    if not validation:
        held_out = sorted(train)
        random.Random(seed).shuffle(held_out)
        held_out = held_out[: round(len(held_out) * validation_fraction)]
        validation = {name: train.pop(name) for name in held_out}
    classes = tuple(sorted(set(train.values())))
    numbers = {name: number for number, name in enumerate(classes)}
    unknown = sorted(set(validation.values()) - set(classes))
    if unknown:
        raise DataFormatError(
            f"validation images of classes without training images: {unknown[:3]}"
        )
    return ImageTree(classes, _labelled(train, numbers), _labelled(validation, numbers))


def _labelled(images: dict[str, str], numbers: dict[str, int]) -> Labelled:
    return Labelled(tuple(images), tuple(numbers[name] for name in images.values()))


def _hidden(name: str) -> bool:
    return any(part.startswith(".") and part != "." for part in PurePosixPath(name).parts)


def _without_common_folder(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The parts of each path, without folders that all have in common around the splits."""
    split = {name: PurePosixPath(name).parts for name in names}
    while split:
        first = {parts[0] for parts in split.values()}
        below = {parts[1] for parts in split.values() if len(parts) > 2}
        # A folder around classes alone can not be told from a class, but for its having folders.
        nested = all(len(parts) > 2 for parts in split.values())
        if len(first) > 1 or first & {*_TRAIN} or not (nested or below & {*_TRAIN}):
            break
        split = {name: parts[1:] for name, parts in split.items() if len(parts) > 1}
    return split


def _validation_classes(
    files: Files, split: dict[str, tuple[str, ...]], images: dict[str, tuple[str, ...]]
) -> dict[str, str]:
    for folder in _VALIDATION:
        inside = {n: p for n, p in images.items() if p[0] == folder}
        annotations = [n for n, p in split.items() if p == (folder, _ANNOTATIONS)]
        if inside and annotations:
            lines = files.read(annotations[0]).decode("utf-8").splitlines()
            classes = dict(line.split("\t")[:2] for line in lines if "\t" in line)
            missing = [n for n, p in inside.items() if p[-1] not in classes]
            if missing:
                raise DataFormatError(f"{annotations[0]} has no line for {missing[0]}")
            return {n: classes[p[-1]] for n, p in inside.items()}
        found = {n: p[1] for n, p in inside.items() if len(p) > 2}
        if found and set(found.values()) != {"images"}:  # Tiny ImageNet's test/ has no labels
            return found
    return {}
