"""Exports updates as XLA programs, which `benchmarks.run_programs` runs where there is JAX.

Entry point of ``python -m benchmarks.xla_programs``; see docs/accelerators.md.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from rich.console import Console

from benchmarks.command_line import as_given, listed_names, progress_bar, run_benchmark
from benchmarks.program_files import Argument, Expected, Program, write
from benchmarks.shapes import Shape
from official_recipes.common.flag_parsing import FlagValueError, parse_unless_help
from official_recipes.common.interruption import run_program
from official_recipes.common.replicas import quiet_tensorflow

PROGRAM = "python -m benchmarks.xla_programs"
SUMMARY = (
    "Writes updates and whole training steps as XLA programs, with the weights that must come out\n"
    "in float64. `python -m benchmarks.run_programs` runs such files, without TensorFlow."
)
UPDATES = 3
TOLERANCE = 1e-4
"""Of a weight's change; float32 weights alone can be off by a part of 1e-5 of these changes."""

_TWICE = "_2_micro_steps"
# Each after its base. An update of which a variance is taken has two micro-steps, and so has the
# base that it is compared with.
_BASES = {
    "keras_sgd": "",
    "keras_lamb": "",
    "sngm": "keras_sgd",
    "lars": "keras_sgd",
    "lamb": "keras_lamb",
    "lars" + _TWICE: "",
    "lamb" + _TWICE: "",
    "vr_lars": "lars" + _TWICE,
    "vr_lamb": "lamb" + _TWICE,
}
# What recipes leave out of layer adaptation.
_VECTORS = ["bias", "gamma", "beta"]
_SHAPES = ("eight", "resnet50", "bert_base")
_STEPS = {"resnet20": 32, "bert_tiny": 16, "resnet_tiny": 4, "bert_small": 4}
"""Of which models whole steps are exported, and how many examples they have."""
STEP_TOLERANCE, VR_STEP_TOLERANCE = 0.1, 0.5
"""In float32 an activation is now and then on another side of a ReLU's kink than in float64, which
later updates amplify. Where the gradients of two sub-batches are nearly equal their variance is one
of rounding errors, and VRGD's weights are relative to a layer's mean, to which such elements add
most: that tells whether a step is a wrong one, no more."""


def define_flags() -> flags.FlagValues:
    """Returns the program's flags."""
    values = flags.FlagValues()
    flags.DEFINE_string("output_dir", None, "A folder for the files.", flag_values=values)
    flags.DEFINE_list(
        "shapes",
        ",".join(_SHAPES),
        f"Whose variables are updated: of {', '.join(_SHAPES)}, tiny.",
        flag_values=values,
    )
    flags.DEFINE_list(
        "steps",
        "resnet20,bert_tiny",
        f"Whose whole training steps are exported: of {', '.join(_STEPS)}.",
        flag_values=values,
    )
    flags.DEFINE_list(
        "optimizers",
        ",".join(_BASES),
        "Any of tf_lbopt.list_optimizers(), with _2_micro_steps or without, keras_sgd, keras_lamb.",
        flag_values=values,
    )
    return values


def main(argv: Sequence[str]) -> int:
    """Exports what a command line asks for, program name first; returns the exit code."""
    return run_benchmark(argv, _parse, _run)


def _parse(argv: Sequence[str]) -> flags.FlagValues | None:
    values = define_flags()
    if not parse_unless_help(values, argv, PROGRAM, SUMMARY):
        return None
    if values.output_dir is None or not Path(values.output_dir).is_dir():
        raise FlagValueError("output_dir", "a folder that exists", repr(values.output_dir))
    known = (*_SHAPES, "tiny")
    for flag, names in (("shapes", known), ("steps", tuple(_STEPS))):
        if not {*listed_names(values[flag].value)} <= {*names}:
            given = as_given(values[flag].value)
            raise FlagValueError(flag, f"some of {', '.join(names)}", given)
    return values


def _run(values: flags.FlagValues) -> None:
    quiet_tensorflow()
    from benchmarks import shapes
    from benchmarks.checked_updates import NAMES, OURS
    from benchmarks.tpu_check.cases import MODELS

    models = {**MODELS, "tiny": shapes.tiny}
    known = [*NAMES, *(name + _TWICE for name in OURS)]
    optimizers = listed_names(values.optimizers)
    if not optimizers or not {*optimizers} <= {*known}:
        raise FlagValueError("optimizers", f"some of {', '.join(known)}", as_given(optimizers))
    warnings.filterwarnings("ignore", category=UserWarning)  # of few sub-batches
    chosen: list[tuple[str, str, Callable[[], Program]]] = [
        (model, name, functools.partial(update, name, model, models[model]()))
        for model in listed_names(values.shapes)
        for name in optimizers
    ]
    chosen += [
        (model, name, functools.partial(step, name, model))
        for model in listed_names(values.steps)
        for name in optimizers
        # Their gradients are taken elsewhere than the reference's.
        if not name.startswith("extrap_")
    ]
    console = Console(stderr=True)
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(chosen))
        for model, name, make in chosen:
            progress.update(task, description=f"{model} {name}")
            path = write(Path(values.output_dir), make())
            gc.collect()  # variables are in cycles
            progress.advance(task)
            print(path, flush=True)


def update(name: str, model: str, shapes: Sequence[Shape]) -> Program:
    """One update as a program.

    Args:
        name: Of the optimizer; with "_2_micro_steps" it has so many.
        model: Whose variables they are.
        shapes: Of the variables.
    """
    import keras
    import tensorflow as tf

    from benchmarks import checked_updates as checked

    optimizer_name, sub_batches = _parts(name)
    weights = [checked.weight(i, shape) for i, shape in enumerate(shapes)]
    gradients = [
        [checked.gradient(i, shape, j) for i, shape in enumerate(shapes)]
        for j in range(sub_batches)
    ]
    variables = [keras.Variable(tf.zeros(shape), name=f"v{i}") for i, shape in enumerate(shapes)]
    optimizer = _optimizer(name, variables)

    def one_update(*arguments: tf.Tensor) -> None:
        for j in range(sub_batches):
            moved = hasattr(optimizer, "extrapolated")
            with optimizer.extrapolated(variables) if moved else contextlib.nullcontext():
                part = arguments[j * len(shapes) : (j + 1) * len(shapes)]
                optimizer.apply(list(part), variables)

    def end(chosen: Sequence[int]) -> list[np.ndarray]:
        return checked.expected(
            optimizer_name,
            [weights[i].values() for i in chosen],
            [[[g[i].values() for i in chosen] for g in gradients]] * UPDATES,
        )

    # But for SNGM's one norm a layer's update is its own, and float64 needs much memory.
    groups = [range(len(shapes))] if optimizer_name == "sngm" else [[i] for i in range(len(shapes))]
    return _program(
        one_update,
        [a for of_sub_batch in gradients for a in of_sub_batch],
        {id(v.value): weight for v, weight in zip(variables, weights, strict=True)},
        {id(v.value) for v in optimizer.variables},
        {weights[i].name: w for chosen in groups for i, w in zip(chosen, end(chosen), strict=True)},
        name=name,
        group=model,
        base=_BASES.get(name, ""),
        kind="update",
        tolerance=TOLERANCE,
    )


def _parts(name: str) -> tuple[str, int]:
    """The optimizer's name, and how many micro-steps it has."""
    from benchmarks.checked_updates import OURS

    optimizer_name = name.removesuffix(_TWICE)
    info = OURS.get(optimizer_name)
    twice = name != optimizer_name or (info is not None and info.needs_sub_batches)
    return optimizer_name, 2 if twice else 1


def _optimizer(name: str, variables: Sequence[Any], **arguments: Any) -> Any:
    from benchmarks.checked_updates import create

    optimizer_name, micro_steps = _parts(name)
    if micro_steps > 1:
        arguments["gradient_accumulation_steps"] = micro_steps
    optimizer = create(optimizer_name, **arguments)
    optimizer.build(variables)
    return optimizer


def step(name: str, model_name: str) -> Program:
    """A whole training step as a program: forward and backward pass and update.

    Args:
        name: Of the optimizer; with "_2_micro_steps" each has half of the batch.
        model_name: One of `benchmarks.models.WORKLOADS`.
    """
    import keras
    import tensorflow as tf

    from benchmarks.checked_updates import OURS, expected
    from benchmarks.models import WORKLOADS
    from benchmarks.step_time import loss_and_gradients, training_step

    workload, examples = WORKLOADS[model_name], _STEPS[model_name]
    optimizer_name, micro_steps = _parts(name)
    model = workload.model()
    variables = model.trainable_variables
    weights = [_weight_of(i, v) for i, v in enumerate(variables)]
    dtype, low, high = ("int32", 0, workload.tokens) if workload.tokens else ("float32", -1, 1)
    batch = [
        Argument("inputs", "input", (examples, *workload.inputs), dtype, ((1, low, high),)),
        Argument(
            "labels", "input", (examples, *workload.labels), "int32", ((2, 0, workload.classes),)
        ),
    ]

    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float64")
    try:
        exact = workload.model()
    finally:
        keras.config.set_dtype_policy(policy)
    exactly = tf.function(lambda *part: loss_and_gradients(exact, *part))
    parts = list(zip(*(np.split(a.values(), micro_steps) for a in batch), strict=True))
    excluded, adapts = {}, {}
    cls = OURS[optimizer_name].cls if optimizer_name in OURS else None
    if cls and "exclude_from_layer_adaptation" in inspect.signature(cls).parameters:
        excluded["exclude_from_layer_adaptation"] = _VECTORS
        adapts["adapts"] = [not any(part in v.path for part in _VECTORS) for v in variables]
    start = [a.values().astype(np.float64) for a in weights]
    ends, gradients = start, []
    for _ in range(UPDATES):
        for v, value in zip(exact.trainable_variables, ends, strict=True):
            v.assign(value)
        gradients.append([[g.numpy() for g in exactly(*part)[1]] for part in parts])
        ends = expected(optimizer_name, start, gradients, **adapts)

    optimizer = _optimizer(name, variables, **excluded)
    return _program(
        training_step(model, optimizer, micro_steps, tf.distribute.get_strategy()).python_function,
        batch,
        {id(v.value): weight for v, weight in zip(variables, weights, strict=True)},
        {id(v.value) for v in optimizer.variables},
        {a.name: end for a, end in zip(weights, ends, strict=True)},
        name=name,
        group=f"{model_name}_step",
        base=_BASES.get(name, ""),
        kind="step",
        tolerance=VR_STEP_TOLERANCE if name.startswith("vr_") else STEP_TOLERANCE,
    )


def _weight_of(number: int, variable: Any) -> Argument:
    """What a model's weight starts with: about as much as Keras would make it."""
    shape = tuple(variable.shape)
    low, high = -0.05, 0.05
    if "gamma" in variable.name:
        low, high = 0.9, 1.1
    elif "kernel" in variable.name:
        high = math.sqrt(6 / math.prod(shape[:-1]))
        low = -high
    terms = ((10 + number, low, high),)
    return Argument(f"{variable.path}_{number}", "weight", shape, "float32", terms)


def _program(
    function: Callable[..., Any],
    inputs: Sequence[Argument],
    weights: dict[int, Argument],
    slots: set[int],
    ends: dict[str, np.ndarray],
    **more: Any,
) -> Program:
    """A function as a program.

    Args:
        function: It; it reads and writes variables.
        inputs: Its arguments.
        weights: Those that start with what they say, by the variables' ids.
        slots: Ids of the optimizer's variables.
        ends: What weights must be after `UPDATES` calls, by their names.
        **more: Other fields of `Program`.
    """
    import keras
    import tensorflow as tf

    from benchmarks.tpu_check._compat import of_function

    lowered = of_function(function, [tf.zeros(a.shape, a.dtype) for a in inputs])
    arguments = list(inputs)
    for variable in lowered.variables:
        if id(variable) in weights:
            arguments.append(weights[id(variable)])
            continue
        values = np.unique(variable.numpy())
        if len(values) != 1:
            raise ValueError(f"{variable.name} starts with different values: {values}")
        shape = tuple(variable.shape)
        role = "slot" if id(variable) in slots and shape else "other"
        start = float(values[0])
        arguments.append(
            Argument(variable.name, role, shape, variable.dtype.name, ((0, start, start),))
        )
    if [(a.shape, a.dtype) for a in arguments] != lowered.arguments:
        raise ValueError("the program's arguments are not the function's and its variables")
    updated = [(i, a.values(), ends[a.name]) for i, a in enumerate(arguments) if a.name in ends]
    most = max(np.abs(end - start).max() for _, start, end in updated)
    expected = [
        Expected.of(number, start, end, least=0.01 * most)
        for number, start, end in updated
        # Some gradients are zero but for rounding: those of an attention's key bias.
        if np.abs(end - start).max() > 1e-6 * most
    ]
    versions = {"tensorflow": tf.__version__, "keras": keras.__version__}
    return Program(
        versions=versions,
        arguments=tuple(arguments),
        results=tuple(lowered.results),
        updates=UPDATES,
        expected=tuple(expected),
        code=lowered.program,
        **more,
    )


if __name__ == "__main__":
    run_program(main, sys.argv)
