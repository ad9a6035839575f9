"""The quickstart's data: digits by default, MNIST or CIFAR-10 from a folder."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from official_recipes.common.image_data import (
    ImageData,
    ImageSource,
    ProgressCallback,
    find_source,
)

# Fixed, so that --seed changes the training and never the split.
_SPLIT_SEED = 0
_DIGITS_TEST_SIZE = 360
_VALIDATION_FRACTION = 0.2


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


def choose_source(data_dir: Path | None) -> ImageSource:
    """Returns the digits, or what is found in ``data_dir``.

    Raises:
        DataFormatError: ``data_dir`` is missing or holds no known data.
    """
    return DigitsSource() if data_dir is None else find_source(data_dir)


def validation_size(train_size: int) -> int:
    """Returns how many training images :func:`hold_out_validation` sets apart."""
    return round(train_size * _VALIDATION_FRACTION)


def hold_out_validation(data: ImageData) -> ImageData:
    """Replaces the test split with a stratified part of the training split.

    Learning rates are tuned on this, so that the test images play no part in the choice.
    """
    from sklearn.model_selection import train_test_split

    train_images, images, train_labels, labels = train_test_split(
        data.train_images,
        data.train_labels,
        test_size=validation_size(len(data.train_labels)),
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
