"""The quickstart's data: digits by default, MNIST or CIFAR from a folder."""

from __future__ import annotations

from pathlib import Path

from official_recipes.common import image_data
from official_recipes.common.image_data import (
    DigitsSource,
    ImageData,
    ImageSource,
    find_source,
)

_VALIDATION_FRACTION = 0.2


def choose_source(data_dir: Path | None) -> ImageSource:
    """Returns the digits, or what is found in ``data_dir``.

    Raises:
        DataFormatError: ``data_dir`` is missing or holds no known data.
    """
    if data_dir is None:
        return DigitsSource()
    return find_source(data_dir)


def validation_size(train_size: int) -> int:
    """Returns how many training images :func:`hold_out_validation` sets apart."""
    return round(train_size * _VALIDATION_FRACTION)


def hold_out_validation(data: ImageData) -> ImageData:
    """Replaces the test split with a stratified fifth of the training split.

    Learning rates are tuned on this, so that the test images play no part in the choice.
    """
    return image_data.hold_out_validation(data, validation_size(len(data.train_labels)))
