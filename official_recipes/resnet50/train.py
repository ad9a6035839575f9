"""Entry point of ``python -m official_recipes.resnet50.train``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from official_recipes.common.tfm_training import run_program, train_from_command_line

PROGRAM = "python -m official_recipes.resnet50.train"
SUMMARY = (
    "Trains ResNet-50 (or ResNet-18) as tf-models-official does, at large batches and with any\n"
    "optimizer of this package. The flags are those of the tf-models command line,\n"
    "and --cpu_replicas, --sub_batches and --seed."
)
EXPERIMENT = "large_batch_resnet"


def main(argv: Sequence[str]) -> int:
    """Trains, evaluates, or both.

    Args:
        argv: The command line, program name first.

    Returns:
        The exit code.
    """
    return train_from_command_line(
        argv,
        program=PROGRAM,
        summary=SUMMARY,
        register=_register,
        default_experiment=EXPERIMENT,
        configs=Path(__file__).parent / "configs",
    )


def _register() -> None:
    import official.vision.registry_imports  # noqa: F401

    import tf_lbopt.tfm  # noqa: F401
    from official_recipes.resnet50 import experiments  # noqa: F401


if __name__ == "__main__":
    run_program(main, sys.argv)
