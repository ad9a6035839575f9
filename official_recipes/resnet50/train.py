"""Entry point of ``python -m official_recipes.resnet50.train``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from official_recipes.common.data_format import data_of_flag
from official_recipes.common.files import read_json
from official_recipes.common.flag_parsing import FlagValueError
from official_recipes.common.tfm_training import Options, run_program, train_from_command_line
from official_recipes.resnet50.prepare_data import CLASSES, RECORD

if TYPE_CHECKING:
    from official_recipes.common.tfm_export import Uses

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
        check=check,
        uses=_uses,
    )


def _uses() -> Uses:
    from official_recipes.resnet50.serving import USES

    return USES


def _register() -> None:
    import official.vision.registry_imports  # noqa: F401

    import tf_lbopt.tfm  # noqa: F401
    from official_recipes.resnet50 import experiments  # noqa: F401


def check(params: Any, options: Options) -> None:
    """Checks what would else go unnoticed, and says which weight decay the run trains with.

    Args:
        params: Of the experiment.
        options: The command line.

    Raises:
        FlagValueError: The data has another number of classes, or there are two weight decays.
    """
    from official_recipes.resnet50.experiments import LargeBatchResNet, weight_decay_of

    task = params.task
    if hasattr(getattr(task, "model", None), "num_classes"):
        splits = ((options.trains, "train_data"), (options.evaluates, "validation_data"))
        _check_classes(
            task.model.num_classes,
            {name: getattr(task, name).input_path for needed, name in splits if needed},
        )
    if not options.trains or not isinstance(task, LargeBatchResNet):
        return
    optimizer = params.trainer.optimizer_config.optimizer
    decay = weight_decay_of(params.trainer.optimizer_config, task)
    if decay.value and task.losses.l2_weight_decay:
        raise FlagValueError(
            "params_override",
            "one weight decay: task.weight_decay, or task.losses.l2_weight_decay with "
            "task.weight_decay=0",
            f"{decay.value:g} and {task.losses.l2_weight_decay:g}",
        )
    said = (
        f"weight decay {task.losses.l2_weight_decay:g} in the loss"
        if task.losses.l2_weight_decay
        else decay
    )
    print(f"optimizer {optimizer.type}, {said}")


def _check_classes(classes: int, paths_of: dict[str, Any]) -> None:
    """Compares the model, and the splits, with what is recorded beside data of prepare_data.py."""
    names: dict[str, Path] = {}
    for paths in paths_of.values():
        for path in [paths] if isinstance(paths, str) else paths if isinstance(paths, list) else []:
            file = Path(path.split(",")[0].strip()).parent / RECORD
            if "://" in path or not file.is_file():
                continue
            with data_of_flag("params_override", f"{RECORD} as prepare_data.py writes it"):
                prepared = read_json(file).get("classes")
            if prepared is not None and prepared != classes:
                raise FlagValueError(
                    "params_override", f"task.model.num_classes: {prepared} as in {file}", classes
                )
            listed = file.with_name(CLASSES)
            if listed.is_file():
                names.setdefault(listed.read_text("utf-8", "surrogateescape"), listed)
    if len(names) > 1:
        raise FlagValueError(
            "params_override",
            "data of the same classes for training and validation",
            f"other names in {' than in '.join(map(str, names.values()))}",
        )


if __name__ == "__main__":
    run_program(main, sys.argv)
