"""Entry point of ``python -m official_recipes.resnet50.prepare_data``."""

from __future__ import annotations

import math
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import flags

from official_recipes.common.data_format import DataFormatError, data_of_flag
from official_recipes.common.files import write_json
from official_recipes.common.flag_parsing import (
    FlagValueError,
    define_integer,
    parse_unless_help,
)
from official_recipes.common.image_folders import (
    Files,
    ImageTree,
    Labeled,
    Layout,
    find_images,
    open_files,
)
from official_recipes.common.output_folder import (
    check_output_dir,
    exit_code_of,
    writing,
)

PROGRAM = "python -m official_recipes.resnet50.prepare_data"
SUMMARY = (
    "Turns a folder or tar archive of images (one folder for each class, or the layouts of\n"
    "ImageNet and Tiny ImageNet) into TFRecord files in a new folder, which appears when all is\n"
    "written."
)
RECORD = "dataset.json"
"""What the prepared folder has, for programs."""

CLASSES = "classes.txt"
"""The names of the classes in the order of their numbers."""

_IMAGES_PER_SHARD = 1250
_MOST_SHARDS = 1024
_DECODED_AT_A_TIME = 64
_JPEG = b"\xff\xd8\xff"
_BROKEN = "broken.txt"


@dataclass(frozen=True)
class Options:
    """A checked command line.

    Attributes:
        source: Folder or archive.
        output_dir: The folder to make.
        shards: Training files, or ``None`` for one per 1250 images.
        validation_fraction: Held out where there is no validation split.
        seed: Of the shuffling.
        layout: What is said of the source's layout.
        skip_broken: Whether images that can not be decoded are left out.
    """

    source: Path
    output_dir: Path
    shards: int | None
    validation_fraction: float
    seed: int
    layout: Layout
    skip_broken: bool


def main(argv: Sequence[str]) -> int:
    """Writes the TFRecords.

    Args:
        argv: The command line, program name first.

    Returns:
        The exit code: 0, 2 for flags or data that cannot be used, 130 or 143 when interrupted.
    """
    return exit_code_of(lambda: _main(argv))


def _main(argv: Sequence[str]) -> None:
    options = _parse_options(argv)
    if options is None:
        return
    with data_of_flag("source", "a folder or tar archive of images"):
        _prepare(options)


def _parse_options(argv: Sequence[str]) -> Options | None:
    values = flags.FlagValues()
    flags.DEFINE_string("source", None, "Folder or tar archive of images.", flag_values=values)
    flags.DEFINE_string(
        "output_dir", None, "Folder to make; must be empty if it exists.", flag_values=values
    )
    define_integer(
        values,
        "shards",
        None,
        f"Training files [default: one per {_IMAGES_PER_SHARD} images, at most {_MOST_SHARDS}].",
    )
    flags.DEFINE_float(
        "validation_fraction",
        0.05,
        "Share of the images to hold out where the source has no validation split.",
        lower_bound=0.0,
        upper_bound=0.9,
        flag_values=values,
    )
    define_integer(values, "seed", 1, "Of the shuffling and of what is held out.", minimum=0)
    for name, text in (
        ("train_folder", "Folder inside the source whose folders are the classes"),
        ("validation_folder", "The same of the validation split; empty for none"),
        ("validation_labels", "File with a class, or an image's name and its class, in each line"),
    ):
        flags.DEFINE_string(name, None, f"{text} [default: found by names].", flag_values=values)
    flags.DEFINE_boolean(
        "skip_broken",
        False,
        f"Leave out images that can not be decoded; they are counted, and listed in {_BROKEN}.",
        flag_values=values,
    )
    if not parse_unless_help(values, argv, PROGRAM, SUMMARY):
        return None
    if not values.source:
        raise FlagValueError("source", "a path", repr(values.source))
    source = Path(values.source)
    if not source.exists():
        raise FlagValueError("source", "a folder or tar archive that exists", repr(str(source)))
    labels = None if values.validation_labels is None else Path(values.validation_labels)
    if labels is not None and not labels.is_file():
        raise FlagValueError("validation_labels", "a file that exists", repr(str(labels)))
    layout = Layout(values.train_folder, values.validation_folder, labels)
    return Options(
        source,
        check_output_dir(values.output_dir),
        values.shards,
        values.validation_fraction,
        values.seed,
        layout,
        values.skip_broken,
    )


def _prepare(options: Options) -> None:
    with writing(options.output_dir) as (partial, progress, stop):
        task = progress.add_task("reading the list of files", total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)
            stop.check()

        files = open_files(options.source, partial, show)
        tree = find_images(files, options.validation_fraction, options.seed, options.layout)
        writer = _Writer(files, partial, options, show)
        splits = {"train": tree.train, "validation": tree.validation}
        record: dict[str, Any] = {"classes": len(tree.classes), "splits": {}}
        for name, split in splits.items():
            progress.update(task, description=f"writing {name} images")
            shards = _shards(len(split.names), options.shards if name == "train" else None)
            images = writer.write(name, split, shards)
            record["splits"][name] = {"images": images, "shards": shards}
        record["converted_to_jpeg"] = writer.converted
        record["left_out"] = {
            **tree.left_out,
            **({"images that can not be decoded": len(writer.broken)} if writer.broken else {}),
        }
        _write_texts(partial, tree, record, writer.broken)
        (partial / "archive.tar").unlink(missing_ok=True)
    described = ", ".join(
        f"{split['images']} {name} images in {split['shards']} files"
        for name, split in record["splits"].items()
    )
    print(tree.found)
    print(f"wrote {described}, {record['classes']} classes, to {options.output_dir}")
    if record["left_out"]:
        print("left out: " + ", ".join(f"{n} {what}" for what, n in record["left_out"].items()))


def _shards(images: int, wanted: int | None) -> int:
    if not images:
        return 0
    return min(images, wanted or min(_MOST_SHARDS, math.ceil(images / _IMAGES_PER_SHARD)))


class _Writer:
    """Writes splits as TFRecord files, each in an order of its own."""

    def __init__(
        self, files: Files, folder: Path, options: Options, progress: Callable[[int, int], None]
    ) -> None:
        self.converted = 0
        self.broken: list[str] = []
        self._files = files
        self._folder = folder
        self._options = options
        self._progress = progress

    def write(self, split: str, images: Labeled, shards: int) -> int:
        """Writes a split, and returns how many images it has.

        Raises:
            DataFormatError: An image can not be decoded and is not to be left out, or none can.
        """
        import tensorflow as tf

        pairs = list(zip(images.names, images.labels, strict=True))
        random.Random(self._options.seed).shuffle(pairs)
        read = done = 0
        for shard in range(shards):
            path = self._folder / f"{split}-{shard:05d}-of-{shards:05d}"
            with tf.io.TFRecordWriter(str(path)) as out:
                for name, label, encoded in self._encoded(pairs[shard::shards]):
                    if encoded is not None:
                        out.write(_example(name, label, encoded))
                        done += 1
                    read += 1
                    self._progress(read, len(pairs))
        if pairs and not done:
            raise DataFormatError(f"none of the {len(pairs)} {split} images can be decoded")
        return done

    def _encoded(self, pairs: list[tuple[str, int]]) -> Iterator[tuple[str, int, bytes | None]]:
        """Name, label and JPEG of each image; no JPEG for one that is to be left out."""
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(pairs), _DECODED_AT_A_TIME):
                chunk = pairs[start : start + _DECODED_AT_A_TIME]
                contents = [self._files.read(name) for name, _ in chunk]
                for (name, label), content, jpeg in zip(
                    chunk, contents, pool.map(_jpeg, contents), strict=True
                ):
                    if jpeg is None:
                        self._leave_out(name)
                    self.converted += jpeg is not None and jpeg is not content
                    yield name, label, jpeg

    def _leave_out(self, name: str) -> None:
        if not self._options.skip_broken:
            raise DataFormatError(
                f"{name} is no image that can be decoded (--skip_broken leaves such ones out)"
            )
        self.broken.append(name)


def _jpeg(content: bytes) -> bytes | None:
    """The image as JPEG, the same where it is one already; ``None`` if it can not be decoded."""
    import tensorflow as tf

    try:
        if content.startswith(_JPEG):
            tf.io.decode_jpeg(content, channels=3)  # as training will do, and only to see
            return content
        image = tf.io.decode_image(content, channels=3, expand_animations=False)
        return tf.io.encode_jpeg(image, quality=95).numpy()
    except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError):
        return None


def _example(name: str, label: int, encoded: bytes) -> bytes:
    import tensorflow as tf

    feature = {
        "image/encoded": tf.train.Feature(bytes_list=tf.train.BytesList(value=[encoded])),
        "image/class/label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
        "image/filename": tf.train.Feature(
            bytes_list=tf.train.BytesList(value=[os.fsencode(name)])
        ),
    }
    return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()


def _write_texts(folder: Path, tree: ImageTree, record: dict[str, Any], broken: list[str]) -> None:
    (folder / CLASSES).write_text(
        "".join(f"{name}\n" for name in tree.classes), "utf-8", "surrogateescape"
    )
    if broken:
        (folder / _BROKEN).write_text(
            "".join(f"{name}\n" for name in broken), "utf-8", "surrogateescape"
        )
    write_json(folder / RECORD, record)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.exit(main(sys.argv))
