"""Entry point of ``python -m official_recipes.resnet50.prepare_data``."""

from __future__ import annotations

import math
import os
import random
import sys
from collections.abc import Callable, Sequence
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
    Labelled,
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
    "Turns a folder or tar archive of images (one folder for each class, or Tiny ImageNet's\n"
    "layout) into TFRecord files in a new folder, which appears when all is written."
)
_IMAGES_PER_SHARD = 1250
_MOST_SHARDS = 1024
_JPEG = b"\xff\xd8\xff"


@dataclass(frozen=True)
class Options:
    """A checked command line.

    Attributes:
        source: Folder or archive.
        output_dir: The folder to make.
        shards: Training files, or ``None`` for one per 1250 images.
        validation_fraction: Held out where there is no validation split.
        seed: Of the shuffling.
    """

    source: Path
    output_dir: Path
    shards: int | None
    validation_fraction: float
    seed: int


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
    if not parse_unless_help(values, argv, PROGRAM, SUMMARY):
        return None
    if not values.source:
        raise FlagValueError("source", "a path", repr(values.source))
    source = Path(values.source)
    if not source.exists():
        raise FlagValueError("source", "a folder or tar archive that exists", repr(str(source)))
    output_dir = check_output_dir(values.output_dir)
    return Options(source, output_dir, values.shards, values.validation_fraction, values.seed)


def _prepare(options: Options) -> None:
    with writing(options.output_dir) as (partial, progress, stop):
        task = progress.add_task("reading the list of files", total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)
            stop.check()

        files = open_files(options.source, partial, show)
        tree = find_images(files, options.validation_fraction, options.seed)
        writer = _Writer(files, partial, options.seed, show)
        splits = {"train": tree.train, "validation": tree.validation}
        record: dict[str, Any] = {"classes": len(tree.classes), "splits": {}}
        for name, split in splits.items():
            progress.update(task, description=f"writing {name} images")
            shards = _shards(len(split.names), options.shards if name == "train" else None)
            writer.write(name, split, shards)
            record["splits"][name] = {"images": len(split.names), "shards": shards}
        record["converted_to_jpeg"] = writer.converted
        _write_texts(partial, tree, record)
        (partial / "archive.tar").unlink(missing_ok=True)
    described = ", ".join(
        f"{split['images']} {name} images in {split['shards']} files"
        for name, split in record["splits"].items()
    )
    print(f"wrote {described}, {record['classes']} classes, to {options.output_dir}")


def _shards(images: int, wanted: int | None) -> int:
    if not images:
        return 0
    return min(images, wanted or min(_MOST_SHARDS, math.ceil(images / _IMAGES_PER_SHARD)))


class _Writer:
    """Writes splits as TFRecord files, each in an order of its own."""

    def __init__(
        self, files: Files, folder: Path, seed: int, progress: Callable[[int, int], None]
    ) -> None:
        self.converted = 0
        self._files = files
        self._folder = folder
        self._seed = seed
        self._progress = progress

    def write(self, split: str, images: Labelled, shards: int) -> None:
        import tensorflow as tf

        pairs = list(zip(images.names, images.labels, strict=True))
        random.Random(self._seed).shuffle(pairs)
        done = 0
        for shard in range(shards):
            path = self._folder / f"{split}-{shard:05d}-of-{shards:05d}"
            with tf.io.TFRecordWriter(str(path)) as out:
                for name, label in pairs[shard::shards]:
                    out.write(self._example(name, label))
                    done += 1
                    self._progress(done, len(pairs))

    def _example(self, name: str, label: int) -> bytes:
        import tensorflow as tf

        encoded = self._jpeg(name)
        feature = {
            "image/encoded": tf.train.Feature(bytes_list=tf.train.BytesList(value=[encoded])),
            "image/class/label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
            "image/filename": tf.train.Feature(
                bytes_list=tf.train.BytesList(value=[name.encode()])
            ),
        }
        return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()

    def _jpeg(self, name: str) -> bytes:
        content = self._files.read(name)
        if content.startswith(_JPEG):
            return content
        import tensorflow as tf

        try:
            image = tf.io.decode_image(content, channels=3, expand_animations=False)
        except tf.errors.InvalidArgumentError as error:
            raise DataFormatError(f"{name} is no image that can be read") from error
        self.converted += 1
        return tf.io.encode_jpeg(image, quality=95).numpy()


def _write_texts(folder: Path, tree: ImageTree, record: dict[str, Any]) -> None:
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in tree.classes), "utf-8")
    write_json(folder / "dataset.json", record)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.exit(main(sys.argv))
