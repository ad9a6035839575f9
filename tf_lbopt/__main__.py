"""``python -m tf_lbopt``: what a bug report needs, and one update of each optimizer, checked.

Each optimizer makes one update of float32 variables in a `tf.function`, on all GPUs, else on the
TPU, else on the CPU. It is compared with the same update of float64 variables by the same rules,
run eagerly on the CPU. That these are the papers' is what the project's own tests are for.
"""

import argparse
import contextlib
import importlib
import importlib.util
import json
import platform
import sys
import textwrap
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import tf_lbopt
from tf_lbopt.aggregation.replicas import PerReplica

RUN = {
    "2.16": ("3.7", "3.12", "3.15"),
    "2.17": ("3.8",),
    "2.18": ("3.9",),
    "2.19": ("3.10",),
    "2.20": ("3.11", "3.12", "3.15"),
    "2.21": ("3.12", "3.13", "3.14", "3.15"),
}
"""The versions of Keras that the project has run with each TensorFlow: docs/compatibility.json."""

MICRO_STEPS, TOLERANCE = 2, 1e-4
# With this rate every optimizer makes steps that float32 resolves well.
ARGUMENTS = {"learning_rate": 10.0, "weight_decay": 0.01}
_SHAPES = ((6, 5), (5,))
_COLUMNS = 100
_WHEELS = (
    "tensorflow", "tensorflow-cpu", "tensorflow-gpu", "tensorflow-tpu", "tensorflow-rocm",
    "tensorflow-macos", "intel-tensorflow", "tf-nightly", "tf-nightly-cpu",
)  # fmt: skip
_PARTS = {  # module: what it needs, the extra that brings it, its table
    "tf_lbopt.tf_keras": ("tf_keras", "tf-keras", "CLASSES"),
    "tf_lbopt.tfm": ("official", "recipes", "REGISTRATIONS"),
}


def main(argv: Sequence[str]) -> int:
    """Prints the report; returns the exit code, 1 if something failed."""
    parser = argparse.ArgumentParser(
        prog="python -m tf_lbopt",
        description="Prints versions, devices and what is registered, for a bug report, and checks "
        "one update of each optimizer. The exit code is 1 if something failed.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--no-update", action="store_true", help="check no updates")
    options = parser.parse_args(argv)
    report = _report(not options.no_update)
    print(json.dumps(report, indent=1) if options.json else _text(report))
    return 0 if report["ok"] else 1


def _report(with_updates: bool) -> dict[str, Any]:
    sections = {"versions": _versions, "devices": _devices, "registered": _registered}
    if with_updates:
        sections["updates"] = _updates
    report: dict[str, dict[str, str]] = {}
    for name, make in sections.items():
        try:
            found = make()
        except Exception as error:  # the rest is wanted all the more
            found = {"all": _failed(error)}
        report[name] = {key: _without_home(text) for key, text in found.items()}
    results = [result for section in report.values() for result in section.values()]
    return {**report, "ok": not any(result.startswith("FAILED") for result in results)}


def _versions() -> dict[str, str]:
    wheels = [name for name in _WHEELS if _installed(name)]
    build = tf.sysconfig.get_build_info()
    found = {
        "tf_lbopt": tf_lbopt.__version__,
        "TensorFlow": f"{tf.__version__} ({', '.join(wheels) or 'from no known wheel'})",
        "Keras": f"{keras.__version__} (backend {keras.config.backend()})",
        "tf_keras": _installed("tf_keras"),
        "tf-models-official": _installed("tf-models-official"),
        "NumPy": np.__version__,
        "Python": platform.python_version(),
        "combination": _combination(tf.__version__, keras.__version__),
        "platform": platform.platform(),
        "CUDA of the build": build.get("cuda_version"),
        "cuDNN of the build": build.get("cudnn_version"),
        "libtpu": _installed("libtpu"),
    }
    return {name: version or "none" for name, version in found.items()}


def _installed(distribution: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(distribution)
    return None


def _combination(tensorflow: str, keras_version: str) -> str:
    """Whether the project has run these two together."""
    minor, keras_minor = (".".join(v.split(".")[:2]) for v in (tensorflow, keras_version))
    ran = RUN.get(minor, ())
    text = f"TensorFlow {minor} with Keras {keras_minor}"
    if keras_minor in ran:
        return f"{text}: run by the project"
    others = f"Keras {', '.join(ran)}" if ran else f"TensorFlow {', '.join(RUN)}"
    return f"{text}: not run by the project, which ran {others}"


def _devices() -> dict[str, str]:
    """Physical devices, then how many logical ones each kind has; a GPU's memory is not taken."""
    found = {}
    for device in tf.config.list_physical_devices():
        notes = []
        if device.device_type == "GPU":
            details = tf.config.experimental.get_device_details(device)
            notes = [f"{name} {value}" for name, value in details.items()]
            growth = tf.config.experimental.get_memory_growth(device)
            notes.append(f"memory growth {'on' if growth else 'off'}")
            with contextlib.suppress(RuntimeError):  # the device is in use already
                tf.config.experimental.set_memory_growth(device, True)
        found[device.name.removeprefix("/physical_device:")] = ", ".join(notes)
    kinds = [device.device_type for device in tf.config.list_logical_devices()]
    found["logical"] = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    return found


def _registered() -> dict[str, str]:
    """How many optimizers Keras, tf_keras and tf-models know."""
    classes = [info.cls for info in tf_lbopt.list_optimizers()]
    known = [keras.saving.get_registered_object(f"tf_lbopt>{c.__name__}") is c for c in classes]
    counts = f"{sum(known)} of {len(known)} optimizers"
    found = {"Keras 3": counts if all(known) else f"FAILED: {counts}"}
    for module, (needed, extra, table) in _PARTS.items():
        if importlib.util.find_spec(needed) is None:
            found[module] = f"not there: pip install 'tf-lbopt[{extra}]'"
            continue
        try:
            found[module] = f"{len(getattr(importlib.import_module(module), table))} optimizers"
        except Exception as error:
            found[module] = _failed(error)
    return found


def _failed(error: Exception) -> str:
    return f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:500]}"


# -- one update ------------------------------------------------------------------------------------


def _updates() -> dict[str, str]:
    strategy, devices = _strategy()
    return {"on": devices, **check_updates(strategy)}


def _strategy() -> tuple[tf.distribute.Strategy, str]:
    """Of all GPUs, or of the TPU, or of the CPU; and what these are."""
    gpus = len(tf.config.list_logical_devices("GPU"))
    if gpus > 1:
        return tf.distribute.MirroredStrategy(), f"{gpus} GPUs"
    if not gpus and tf.config.list_physical_devices("TPU"):
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu="local")
        tf.tpu.experimental.initialize_tpu_system(resolver)
        strategy = tf.distribute.TPUStrategy(resolver)
        return strategy, f"{strategy.num_replicas_in_sync} replicas on a TPU"
    return tf.distribute.get_strategy(), "a GPU" if gpus else "the CPU"


def check_updates(strategy: tf.distribute.Strategy) -> dict[str, str]:
    """Compares an update of each optimizer with one in float64: "ok…" or "FAILED…" by name."""
    results = {}
    for info in tf_lbopt.list_optimizers():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of few sub-batches
                results[info.name] = _check_update(info.cls, strategy)
        except Exception as error:
            results[info.name] = _failed(error)
    return results


def _check_update(cls: type[keras.optimizers.Optimizer], strategy: tf.distribute.Strategy) -> str:
    start, sub_batches = inputs(MICRO_STEPS * strategy.num_replicas_in_sync)
    right = expected(cls, start, sub_batches)
    found = _updated(cls, start, sub_batches, strategy)
    worst = 0.0
    for number, (end, before, copies) in enumerate(zip(right, start, found, strict=True)):
        step = np.abs(end - before).max()
        if not 0 < step < np.inf:
            return f"FAILED: expected in float64 a step of layer {number}, got one of {step}"
        for replica, copy in enumerate(copies):
            error = np.abs(copy - end)
            at = np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error)), error.shape)
            if not error[at] <= TOLERANCE * step:
                element = f"[{', '.join(map(str, at))}] of layer {number} on replica {replica}"
                return f"FAILED: expected {end[at]:.7g}, got {copy[at]:.7g} for {element}"
            worst = max(worst, float(error[at] / step))
        if not all(np.array_equal(copy, copies[0]) for copy in copies):
            return f"FAILED: expected equal weights on all replicas, got others in layer {number}"
    return f"ok, error {worst:.0e} of the step"


def inputs(sub_batches: int) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """Weights, and gradients by sub-batch and layer, in float32."""
    draw = np.random.default_rng(0)
    weights = [draw.normal(scale=0.05, size=shape).astype("float32") for shape in _SHAPES]
    gradients = [
        [
            draw.normal(10.0**-i, 10.0**-i, shape).astype("float32")
            for i, shape in enumerate(_SHAPES)
        ]
        for _ in range(sub_batches)
    ]
    return weights, gradients


def expected(
    cls: type[keras.optimizers.Optimizer],
    weights: Sequence[np.ndarray],
    sub_batches: Sequence[Sequence[np.ndarray]],
) -> list[np.ndarray]:
    """Weights after one update in float64, eagerly, on the CPU; each sub-batch is a micro-step."""
    with tf.device("CPU:0"):
        variables, optimizer = _made(cls, weights, "float64", len(sub_batches), jit_compile=False)
        for gradients in sub_batches:
            _apply(optimizer, variables, [tf.constant(g, tf.float64) for g in gradients])
    return [variable.numpy() for variable in variables]


def _updated(
    cls: type[keras.optimizers.Optimizer],
    weights: Sequence[np.ndarray],
    sub_batches: Sequence[Sequence[np.ndarray]],
    strategy: tf.distribute.Strategy,
) -> list[list[np.ndarray]]:
    """Each replica's weights after one update in float32, by layer."""
    replicas = strategy.num_replicas_in_sync
    with strategy.scope():
        variables, optimizer = _made(cls, weights, "float32", MICRO_STEPS)

    @tf.function(autograph=False)
    def step(gradients: list[PerReplica]) -> None:
        strategy.run(lambda own: _apply(optimizer, variables, own), (gradients,))

    for micro_step in range(MICRO_STEPS):
        of_replicas = sub_batches[micro_step * replicas : (micro_step + 1) * replicas]
        step([_distributed(strategy, layer) for layer in zip(*of_replicas, strict=True)])
    return [
        [copy.numpy() for copy in strategy.experimental_local_results(variable.value)]
        for variable in variables
    ]


def _distributed(strategy: tf.distribute.Strategy, values: Sequence[np.ndarray]) -> PerReplica:
    """Each replica's share of the mean of these."""
    shares = [tf.constant(value / np.float32(len(values))) for value in values]
    return strategy.experimental_distribute_values_from_function(
        lambda context: shares[context.replica_id_in_sync_group]
    )


def _made(
    cls: type[keras.optimizers.Optimizer],
    weights: Sequence[np.ndarray],
    dtype: str,
    micro_steps: int,
    **more: bool,
) -> tuple[list[keras.Variable], keras.optimizers.Optimizer]:
    variables = [keras.Variable(w, dtype=dtype, name=f"layer_{i}") for i, w in enumerate(weights)]
    optimizer = cls(**ARGUMENTS, gradient_accumulation_steps=micro_steps, **more)
    optimizer.build(variables)
    return variables, optimizer


def _apply(
    optimizer: keras.optimizers.Optimizer,
    variables: Sequence[keras.Variable],
    gradients: Sequence[tf.Tensor],
) -> None:
    moves = hasattr(optimizer, "extrapolated")
    with optimizer.extrapolated(variables) if moves else contextlib.nullcontext():
        optimizer.apply(gradients, variables)


# -- how it is shown -------------------------------------------------------------------------------


def _without_home(text: str) -> str:
    """Without the path of the user's home, which paths in messages begin with."""
    home = str(Path.home())
    return text if home == "/" else text.replace(home, "~")


def _text(report: dict[str, Any]) -> str:
    titles = {
        "versions": "Versions",
        "devices": "Devices",
        "registered": "Registered",
        "updates": "One update of each optimizer, against float64 on the CPU",
    }
    lines = []
    for key in filter(report.__contains__, titles):
        lines.append(titles[key])
        width = max(map(len, report[key]))
        for name, value in report[key].items():
            first, *others = textwrap.wrap(value, _COLUMNS - width - 4) or [""]
            lines.append(f"  {name.ljust(width)}  {first}".rstrip())
            lines += [" " * (width + 4) + other for other in others]
        lines.append("")
    return "\n".join([*lines, "ok" if report["ok"] else "FAILED: see above"])


if __name__ == "__main__":
    tf.get_logger().setLevel("ERROR")
    sys.exit(main(sys.argv[1:]))
