"""Makes tests/migrate_vectors.json anew: what other packages' code on docs/migrate.md computes.

Not a test. Each package needs an environment that has it, and other cases are kept as they are:

    python -m venv .venv-migrate
    .venv-migrate/bin/pip install optax timm pytorch_optimizer
    .venv-migrate/bin/python tests/migrate_vectors.py optax torch timm pytorch_optimizer
    .venv/bin/python tests/migrate_vectors.py keras tf_models
"""

import importlib
import importlib.metadata
import json
import pathlib
import re
import sys
import types
from typing import NamedTuple

import numpy as np

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "migrate.md"
VECTORS = pathlib.Path(__file__).with_suffix(".json")
SHAPES = {"dense/kernel": (6, 5), "dense/bias": (5,), "head/bias": (5,)}
UPDATES = 5
DISTRIBUTIONS = {"tf_models": "tf-models-official"}
_PAIR = re.compile(
    r"<!-- vectors: (?P<name>\w+)(?:, gradients: (?P<gradients>[^,]+?))?"
    r"(?:, differs: (?P<differs>[^,]+?))? -->\n\n"
    r"```python\n(?P<theirs>.*?)```\n\n```python\n(?P<ours>.*?)```\n",
    re.DOTALL,
)


class Pair(NamedTuple):
    """Two blocks of the page: what another package has, and what it is here."""

    name: str
    gradients: str | None
    differs: str | None
    theirs: str
    ours: str


def pairs() -> list[Pair]:
    return [Pair(**match.groupdict()) for match in _PAIR.finditer(PAGE.read_text("utf-8"))]


def start() -> dict:
    """Weights and gradients, ``[update][variable]``; short numbers, the same on every machine."""
    random = np.random.RandomState(0)

    def values(scale):
        return {
            name: np.round(scale * random.normal(size=shape), 3).tolist()
            for name, shape in SHAPES.items()
        }

    weights = values(0.5) | {"head/bias": [0.0] * 5}
    return {"weights": weights, "gradients": [values(1.0) for _ in range(2 * UPDATES)]}


def gradients_of(pair: Pair, data: dict) -> list[dict[str, np.ndarray]]:
    """The gradients of each call, as the page's comment says."""
    gradients = [
        {name: np.array(value, "float32") for name, value in each.items()}
        for each in data["gradients"]
    ]
    if pair.gradients == "two a step":
        return gradients
    if pair.gradients == "a NaN in the third":
        gradients[2]["head/bias"][1] = np.nan
    elif pair.gradients is not None:
        raise ValueError(f"Unknown gradients on the page: {pair.gradients}")
    return gradients[:UPDATES]


def of_jax(code: str, weights: dict, gradients: list[dict]) -> dict:
    import jax
    import optax

    params = {name: jax.numpy.array(value) for name, value in weights.items()}
    namespace = {"jax": jax, "optax": optax, "params": params}
    exec(code, namespace)
    optimizer = namespace["optimizer"]
    state = optimizer.init(params)
    for each in gradients:
        updates, state = optimizer.update(each, state, params)
        params = optax.apply_updates(params, updates)
    return params


def of_torch(code: str, weights: dict, gradients: list[dict]) -> dict:
    import pytorch_optimizer
    import timm.optim
    import torch

    model = torch.nn.Module()
    parameters = {}
    for name, value in weights.items():
        layer, _, own = name.partition("/")
        if not hasattr(model, layer):
            setattr(model, layer, torch.nn.Module())
        parameters[name] = torch.nn.Parameter(torch.tensor(value))
        setattr(getattr(model, layer), own, parameters[name])
    namespace = {
        "model": model, "pytorch_optimizer": pytorch_optimizer, "timm": timm, "torch": torch
    }  # fmt: skip
    exec(code, namespace)
    for each in gradients:
        for name, parameter in parameters.items():
            parameter.grad = torch.tensor(each[name])
        namespace.get("update", namespace["optimizer"].step)()
        if "scheduler" in namespace:
            namespace["scheduler"].step()
    return {name: parameter.detach().numpy() for name, parameter in parameters.items()}


def of_tensorflow(code: str, weights: dict, gradients: list[dict]) -> dict:
    import keras
    import tensorflow as tf

    namespace = {"keras": keras}
    if "keras." in code:
        variables = keras_variables(weights)
    else:
        for name in ("lamb", "lars"):
            namespace[name] = importlib.import_module(f"official.modeling.optimization.{name}")
        variables = [tf.Variable(value, name=name) for name, value in weights.items()]
    exec(code, namespace)
    for each in gradients:
        tensors = [tf.constant(each[name]) for name in weights]
        namespace["optimizer"].apply_gradients(zip(tensors, variables, strict=True))
    return {name: v.numpy() for name, v in zip(weights, variables, strict=True)}


def keras_variables(weights: dict) -> list:
    """Variables with the paths ``dense/kernel`` and so on."""
    import keras

    variables = []
    for name, value in weights.items():
        layer, _, own = name.partition("/")
        with keras.name_scope(layer):
            variables.append(keras.Variable(value, name=own))
    return variables


def of_ours(code: str, weights: dict, gradients: list[dict]) -> dict:
    """What our block computes."""
    import keras
    import tensorflow as tf

    import tf_lbopt

    variables = keras_variables(weights)
    model = types.SimpleNamespace(trainable_variables=variables)
    namespace = {"keras": keras, "model": model, "tf_lbopt": tf_lbopt}
    exec(code, namespace)
    for each in gradients:
        namespace["optimizer"].apply([tf.constant(each[name]) for name in weights], variables)
    return {name: v.numpy() for name, v in zip(weights, variables, strict=True)}


RUNNERS = {
    "optax": of_jax,
    "torch": of_torch,
    "timm": of_torch,
    "pytorch_optimizer": of_torch,
    "keras": of_tensorflow,
    "tf_models": of_tensorflow,
}


def package_of(pair: Pair) -> str:
    """The package whose case it is: its name begins with it."""
    return next(package for package in RUNNERS if pair.name.startswith(f"{package}_"))


def float32(values: dict) -> dict[str, np.ndarray]:
    return {name: np.array(value, "float32") for name, value in values.items()}


def _listed(array: np.ndarray) -> list:
    """Nine digits, which are all that float32 has."""
    if array.ndim > 1:
        return [_listed(row) for row in array]
    return [float(f"{x:.9g}") for x in array]


def main(packages: list[str]) -> None:
    data = start()
    stored = json.loads(VECTORS.read_text("utf-8"))["cases"] if VECTORS.exists() else {}
    cases = {}
    for pair in pairs():
        package = package_of(pair)
        if package not in packages:
            cases[pair.name] = stored.get(pair.name)
            continue
        weights = RUNNERS[package](pair.theirs, float32(data["weights"]), gradients_of(pair, data))
        version = importlib.metadata.version(DISTRIBUTIONS.get(package, package))
        cases[pair.name] = {
            "package": f"{DISTRIBUTIONS.get(package, package)} {version.partition('+')[0]}",
            "code": pair.theirs,
            "weights": {name: _listed(np.array(value)) for name, value in weights.items()},
        }
        print(pair.name)
    lines = [f"{json.dumps(name)}: {json.dumps(case)}" for name, case in cases.items()]
    head = json.dumps(data)[:-1]
    VECTORS.write_text(head + ',\n"cases": {\n' + ",\n".join(lines) + "\n}}\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
