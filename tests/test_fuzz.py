"""Random optimizers, arguments, models and gradients of any magnitude, with a fixed seed.

After each update weights and slots are finite, and either it was made as the reference in float64
makes it, or it was discarded and counted; and that for a reason.
"""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf
from harness import Run
from harness_tf_keras import NAMES as TF_KERAS_NAMES
from harness_tf_keras import TfKerasRun

import tf_lbopt
import tf_lbopt.tf_keras
from benchmarks.references import reference

CONFIGURATIONS = 300
UPDATES = 5
# Beyond these, an update may be discarded; within, none is.
MODERATE = 1e15
NAMES = [info.name for info in tf_lbopt.list_optimizers()]
CLASSES = {info.name: info.cls for info in tf_lbopt.list_optimizers()}
SHAPES = [(), (1,), (7,), (3, 5), (2, 2, 3), (150, 120)]  # the last one goes through fused kernels
ARGUMENTS = {
    "sngm": {"momentum": [0.0, 0.9], "weight_decay": [None, 1e-2, 3.0]},
    "lars": {
        "momentum": [0.0, 0.9],
        "nesterov": [False, True],
        "trust_coefficient": [1e-3, 1.0],
        "weight_decay": [None, 1e-2, 3.0],
        "trust_ratio_denominator": ["norm_of_sum", "sum_of_norms"],
    },
    "lamb": {
        "beta_1": [0.5, 0.9],
        "beta_2": [0.8, 0.9, 0.999],  # the first is less than 0.9²
        "epsilon": [1e-6, 1e-15, 0.0],
        "weight_decay": [None, 1e-2, 3.0],
    },
    "clars": {"momentum": [0.0, 0.9], "nesterov": [False, True], "weight_decay": [None, 1e-2]},
    "vr_sgd": {"weight_decay": [None, 1e-2, 3.0]},
}
ARGUMENTS["vr_momentum"] = {**ARGUMENTS["vr_sgd"], "momentum": [0.5], "nesterov": [False, True]}
ARGUMENTS["extrap_sgd"] = {"momentum": [0.0, 0.9], "weight_decay": [None, 1e-2, 3.0]}
ARGUMENTS["vr_adam"] = ARGUMENTS["extrap_adam"] = ARGUMENTS["lamb"]
ARGUMENTS["vr_lars"], ARGUMENTS["vr_lamb"] = ARGUMENTS["lars"], ARGUMENTS["lamb"]
ARGUMENTS["vr_lans"] = ARGUMENTS["lamb"]
ARGUMENTS["sgd"] = {**ARGUMENTS["vr_sgd"], "momentum": [0.0, 0.9], "nesterov": [False, True]}
ARGUMENTS["adam"] = ARGUMENTS["adamw"] = ARGUMENTS["lans"] = ARGUMENTS["lamb"]


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One of `CONFIGURATIONS`, drawn from its number."""

    name: str
    arguments: dict
    rates: list
    magnitudes: list
    weights: list
    dtype: str
    micro_steps: int
    mode: str
    wrapper: str
    seed: int

    def optimizer(self, rate, **kwargs):
        if self.wrapper == "around stock":
            stock = keras.optimizers.Adam if "adam" in self.name else keras.optimizers.SGD
            return tf_lbopt.VarianceReduced(stock(rate.read_value), **kwargs)
        package = tf_lbopt.tf_keras if self.wrapper == "tf_keras" else tf_lbopt
        return getattr(package, CLASSES[self.name].__name__)(
            rate.read_value, **self.arguments, **kwargs
        )

    def gradients(self):
        """``[update][sub-batch][layer]``; layers differ in size, sub-batches in part."""
        rng = np.random.default_rng(self.seed)
        of_layers = [10.0 ** rng.uniform(-2, 0) for _ in self.weights]
        return [
            [
                [
                    (magnitude * of_layer * _around(rng, mean)).astype("float32")
                    for of_layer, mean in zip(of_layers, means, strict=True)
                ]
                for _ in range(self.micro_steps)
            ]
            for magnitude in self.magnitudes
            for means in [[rng.normal(size=w.shape) for w in self.weights]]
        ]


def _around(rng, mean):
    return mean + 0.5 * rng.normal(size=mean.shape)


def draw(seed):
    rng = np.random.default_rng(seed)
    wrapper = rng.choice(["none", "tf_keras", "loss scale", "around stock"], p=[0.5, 0.2, 0.2, 0.1])
    name = str(rng.choice(TF_KERAS_NAMES if wrapper == "tf_keras" else NAMES))
    if wrapper == "around stock":
        name = str(rng.choice(["vr_sgd", "vr_adam"]))
    choices = ARGUMENTS[name]
    arguments = {key: values[rng.integers(len(values))] for key, values in choices.items()}
    if rng.random() < 0.2:
        arguments[str(rng.choice(["clipnorm", "clipvalue", "global_clipnorm"]))] = 1.0
    if wrapper == "around stock":
        arguments = {}
    extreme = 10.0 ** rng.uniform(-25, 38.2, size=UPDATES)
    magnitudes = np.where(rng.random(UPDATES) < 0.4, extreme, 10.0 ** rng.uniform(-3, 1, UPDATES))
    usual = float(10.0 ** rng.uniform(-4, 0))
    rates = [usual] * UPDATES
    if rng.random() < 0.4:
        rates[rng.integers(UPDATES)] = float(rng.choice([np.nan, -1.0, 0.0, 1e10, 1e30, 1e38]))
    weights = []
    for index in rng.integers(len(SHAPES), size=rng.integers(1, 4)):
        size = rng.choice([0.0, 1e-3, 1.0, 1.0, 1e3, 1e25], p=[0.1, 0.1, 0.35, 0.3, 0.1, 0.05])
        weights.append((size * rng.normal(size=SHAPES[index])).astype("float32"))
    dtype = str(rng.choice(["float32", "float64", "bfloat16", "float16"], p=[0.6, 0.1, 0.15, 0.15]))
    if dtype == "float16":
        weights = [np.clip(w, -6e4, 6e4) for w in weights]
    if wrapper == "around stock":  # which is guarded against gradients only
        rates, dtype = [usual] * UPDATES, "float32"
    varies = name.startswith("vr_")
    return Configuration(
        name, arguments, rates, list(magnitudes), weights, dtype,
        micro_steps=int(rng.integers(2, 5)) if varies else int(rng.integers(1, 4)),
        mode=str(rng.choice(["eager", "graph", "compiled"], p=[0.9, 0.05, 0.05])),
        wrapper=str(wrapper), seed=seed,
    )  # fmt: skip


MODES = {
    "eager": lambda step: step,
    "graph": tf.function,
    "compiled": lambda step: tf.function(step, jit_compile=True),
}


def numbers_of(run):
    """All floating numbers of the variables and the optimizer, in float64."""
    tensors = [tf.convert_to_tensor(v) for v in (*run.variables, *run.inner.variables)]
    return [tf.cast(t, tf.float64).numpy() for t in tensors if t.dtype.is_floating]


def is_moderate(configuration, number, before):
    """Whether nothing up to an update is extreme, so that it must be made."""
    upto = slice(number + 1)
    rates, sizes = configuration.rates[upto], configuration.magnitudes[upto]
    return (
        all(0 <= rate < 2 for rate in rates)
        and max(sizes) < MODERATE
        and configuration.dtype != "float16"
        and all(np.max(np.abs(x), initial=0) < MODERATE for x in before)
    )


def is_referred(configuration):
    """Whether the reference computes the same to rounding."""
    return (
        configuration.dtype in ("float32", "float64")
        and not any("clip" in key for key in configuration.arguments)
        # Squares vanish, of which GSNR and second moments are made; so do rates that are no more
        # finite.
        and not (
            (configuration.name.startswith("vr_") or configuration.arguments.get("epsilon") == 0)
            and min(configuration.magnitudes) < MODERATE**-1
        )
        and not (max(configuration.rates) > 1e6 and min(configuration.magnitudes) < 1e-6)
    )


def expected(configuration, made):
    """Weights of the reference, after the updates of these numbers."""
    arguments = dict(configuration.arguments)
    rates = [float(np.float32(configuration.rates[number])) for number in made]
    gradients = configuration.gradients()
    if configuration.name == "extrap_sgd":
        arguments["nesterov"] = False
    if configuration.wrapper == "around stock":
        arguments["beta_3"] = None
    return reference(
        configuration.name,
        configuration.weights,
        [gradients[number] for number in made],
        learning_rate=rates.__getitem__,
        **arguments,
    )


def test_enough_is_referred():
    referred = [c for c in map(draw, range(CONFIGURATIONS)) if is_referred(c)]
    assert len(referred) > 100
    assert {c.wrapper for c in referred} == {"none", "tf_keras", "loss scale", "around stock"}


@pytest.mark.long
@pytest.mark.parametrize("seed", range(CONFIGURATIONS))
def test_random_configurations(seed):
    configuration = draw(seed)
    scaled = configuration.wrapper == "loss scale"
    rate = tf.Variable(0.0)
    run = (TfKerasRun if configuration.wrapper == "tf_keras" else Run)(
        configuration.optimizer, 1, configuration.micro_steps, weights=configuration.weights,
        dtype=configuration.dtype, function=MODES[configuration.mode], rate=rate,
        wrap=(lambda o: tf_lbopt.LossScaleOptimizer(o, 8.0)) if scaled else lambda o: o,
        **({"extrapolation_rate": 0.0} if configuration.name.startswith("extrap") else {}),
    )  # fmt: skip
    made, greatest = [], max(np.max(np.abs(w), initial=0) for w in configuration.weights)
    for number, update in enumerate(configuration.gradients()):
        before = numbers_of(run)
        counts = int(run.inner.iterations.numpy()), int(run.inner.skipped_updates.numpy())
        scale = float(run.optimizer.dynamic_scale.numpy()) if scaled else 1.0
        rate.assign(configuration.rates[number])
        with np.errstate(over="ignore"):
            run.update([[g * np.float32(scale) for g in layers] for layers in update])
        updates = int(run.inner.iterations.numpy()) - counts[0]
        skipped = int(run.inner.skipped_updates.numpy()) - counts[1]
        after = numbers_of(run)
        assert all(np.isfinite(x).all() for x in after)
        assert updates + skipped in ((1, 2) if configuration.dtype == "float16" else (1,))
        if not updates:
            for old, new in zip(before, after, strict=True):
                np.testing.assert_array_equal(old, new)
        if is_moderate(configuration, number, before):
            assert not skipped
        made += [number] * updates
        weights = [tf.cast(v, tf.float64).numpy() for v in run.variables]
        if made and is_referred(configuration):
            with np.errstate(all="ignore"):
                values = expected(configuration, made)
            greatest = max(greatest, *(np.max(np.abs(v)) for v in values))
            for weight, value in zip(weights, values, strict=True):
                np.testing.assert_allclose(weight, value, rtol=2e-3, atol=1e-4 * greatest)
