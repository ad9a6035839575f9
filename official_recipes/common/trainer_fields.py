"""Checks of `trainer`'s numbers, which tf-models takes as they come or refuses in mid-run."""

from __future__ import annotations

from typing import Any

from official_recipes.common.flag_parsing import FlagValueError


def check_trainer(trainer: Any, trains: bool, evaluates: bool) -> None:
    """Checks the numbers and switches that a mode needs.

    Args:
        trainer: Of the parameters.
        trains: Whether the mode includes training.
        evaluates: Whether it includes evaluation.

    Raises:
        FlagValueError: One can not be used.
    """
    keep = trainer.max_to_keep
    checks = [
        ("max_to_keep", "a positive integer, or null for all", keep is None or _positive(keep))
    ]
    if trains:
        checks += [
            (name, "a positive integer", _positive(getattr(trainer, name)))
            for name in (
                "train_steps",
                "steps_per_loop",
                "checkpoint_interval",
                "summary_interval",
            )
        ]
        checks.append(
            (
                "summary_interval",
                f"a multiple of trainer.steps_per_loop = {trainer.steps_per_loop}",
                not trainer.steps_per_loop
                or trainer.summary_interval % trainer.steps_per_loop == 0,
            )
        )
        checks += _loops(trainer, "train")
        checks.append(
            (
                "allow_tpu_summary",
                "false without trainer.train_tf_while_loop",
                trainer.train_tf_while_loop or not trainer.allow_tpu_summary,
            )
        )
    if evaluates:
        checks += _loops(trainer, "eval")
        checks.append(
            (
                "validation_steps",
                "a positive integer, or -1 for the whole split",
                trainer.validation_steps == -1 or _positive(trainer.validation_steps),
            )
        )
        checks.append(
            (
                "validation_steps",
                "a positive integer, since trainer.eval_tf_while_loop is true",
                trainer.validation_steps != -1 or not trainer.eval_tf_while_loop,
            )
        )
        timeout = trainer.continuous_eval_timeout
        checks.append(
            (
                "continuous_eval_timeout",
                "seconds, or null for no limit",
                timeout is None or timeout >= 0,
            )
        )
        checks.append(
            (
                "best_checkpoint_metric_comp",
                "one of higher, lower",
                trainer.best_checkpoint_metric_comp in ("higher", "lower"),
            )
        )
    if trains and evaluates:
        interval = trainer.validation_interval
        checks.append(("validation_interval", "an integer >= 0", interval is None or interval >= 0))
    for name, expected, good in checks:
        if not good:
            raise FlagValueError(
                "params_override", f"trainer.{name}: {expected}", getattr(trainer, name)
            )


def _positive(value: Any) -> bool:
    return value is not None and value >= 1


def _loops(trainer: Any, which: str) -> list[tuple[str, str, bool]]:
    name, loop = f"{which}_tf_function", f"{which}_tf_while_loop"
    good = getattr(trainer, name) or not getattr(trainer, loop)
    return [(name, f"true with trainer.{loop}", good)]
