"""Schedules and scaling rules against formulas, the corollaries against the bound they minimize."""

import json
import math

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_lbopt
from tf_lbopt import schedules

keras_schedules = keras.optimizers.schedules
AFTER = {
    "constant": (0.4, lambda t: 0.4),
    "zero": (0, lambda t: 0.0),
    "polynomial": (
        keras_schedules.PolynomialDecay(1.6, 7, end_learning_rate=0.1, power=1.1),
        lambda t: 0.1 + 1.5 * (1 - min(t / 7, 1)) ** 1.1,
    ),
    "cosine": (
        keras_schedules.CosineDecay(0.3, 4, alpha=0.1),
        lambda t: 0.3 * (0.9 * (1 + math.cos(math.pi * min(t / 4, 1))) / 2 + 0.1),
    ),
    "steps": (
        keras_schedules.PiecewiseConstantDecay([2], [0.5, 0.05]),
        lambda t: [0.5, 0.05][t > 2],
    ),
    "steps of whole numbers": (
        keras_schedules.PiecewiseConstantDecay([2], [16, 8]),
        lambda t: [16.0, 8.0][t > 2],
    ),
    "warm-up": (schedules.Warmup(0.7, 2), lambda t: 0.7 * min(t / 2, 1)),
}
WARMUPS = [
    {"steps": 0},
    {"steps": 1},
    {"steps": 5},
    {"steps": 3, "start": 0.2},
    {"steps": 4, "start": 2.0},
    {"steps": 0, "start": 2.0},
]
over_cases = pytest.mark.parametrize(
    ("after", "arguments"),
    [(after, arguments) for after in AFTER for arguments in WARMUPS],
    ids=str,
)
STEPS = [*range(14), 1000, 10**6]


def formula(after, step, steps, start=0.0):
    rate = AFTER[after][1]
    if step >= steps:
        return rate(step - steps)
    return start + (rate(0) - start) * step / steps


@over_cases
def test_values(after, arguments):
    schedule = schedules.Warmup(AFTER[after][0], **arguments)
    for step in STEPS:
        expected = formula(after, step, **arguments)
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-5, abs=1e-7), step


@over_cases
@pytest.mark.parametrize("dtype", [tf.int64, tf.int32, tf.float32])
@pytest.mark.quick(dtype="int64")
@pytest.mark.quick(after="polynomial")
def test_inside_a_function(after, arguments, dtype):
    schedule = schedules.Warmup(AFTER[after][0], **arguments)
    traced = tf.function(schedule, input_signature=[tf.TensorSpec([], dtype)])
    got = [traced(tf.constant(step, dtype)) for step in STEPS]
    assert all(rate.shape == () and rate.dtype == tf.float32 for rate in got)
    expected = [formula(after, step, **arguments) for step in STEPS]
    np.testing.assert_allclose([float(rate) for rate in got], expected, rtol=1e-5, atol=1e-7)


@over_cases
def test_after_the_warmup_every_bit_is_the_schedules(after, arguments):
    decay = AFTER[after][0]
    schedule = schedules.Warmup(decay, **arguments)
    for step in range(14):
        expected = decay(step) if callable(decay) else tf.constant(decay, tf.float32)
        assert float(schedule(step + arguments["steps"])) == float(expected)


@over_cases
def test_round_trips(after, arguments):
    schedule = schedules.Warmup(AFTER[after][0], **arguments, name="rate")
    config = schedule.get_config()
    assert config["name"] == "rate"
    assert config["steps"] == arguments["steps"]
    assert config["start"] == arguments.get("start", 0.0)
    text = json.dumps(keras.saving.serialize_keras_object(schedule))
    for again in (
        schedules.Warmup.from_config(json.loads(json.dumps(config))),
        keras.saving.deserialize_keras_object(json.loads(text)),
        keras_schedules.deserialize(json.loads(text)),
    ):
        assert type(again) is schedules.Warmup
        assert again.get_config() == config
        for step in (1, 4, 9):
            assert float(again(step)) == float(schedule(step))


@pytest.mark.parametrize("info", tf_lbopt.list_optimizers(), ids=lambda info: info.name)
def test_in_an_optimizers_configuration(info):
    schedule = schedules.Warmup(AFTER["polynomial"][0], steps=4)
    optimizer = info.cls(learning_rate=schedule)
    text = json.dumps(keras.saving.serialize_keras_object(optimizer))
    again = keras.saving.deserialize_keras_object(json.loads(text))
    for step in (0, 3, 4, 9, 14):
        for one in (optimizer, again):
            one.iterations.assign(step)
            expected = formula("polynomial", step, steps=4)
            assert float(one.learning_rate) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    ("base_batch_size", "batch_size", "factor"), [(256, 8192, 32), (256, 64, 0.25), (7, 7, 1)]
)
def test_scaling_rules(base_batch_size, batch_size, factor):
    linear = schedules.linear_scaling(0.4, base_batch_size, batch_size)
    root = schedules.sqrt_scaling(0.4, base_batch_size, batch_size)
    assert linear == pytest.approx(0.4 * factor, rel=1e-12)
    assert root == pytest.approx(0.4 * math.sqrt(factor), rel=1e-12)


# -- SNGM, Theorem 1 -------------------------------------------------------------------------------

CONSTANTS = [
    {"gradient_budget": 1e8, "smoothness": 1.0, "noise": 5.0, "initial_gap": 1.0, "momentum": 0.9},
    {"gradient_budget": 5e7, "smoothness": 20.0, "noise": 30.0, "initial_gap": 2.3, "momentum": 0},
    {"gradient_budget": 1e9, "smoothness": 3.0, "noise": 0.7, "initial_gap": 0.1, "momentum": 0.5},
]


def bound(batch_size, learning_rate, gradient_budget, smoothness, noise, initial_gap, momentum):
    """The right-hand side of eq. 9, with T = C/B."""
    updates = gradient_budget / batch_size
    kappa = (1 + momentum) / (1 - momentum) ** 2
    return (
        2 * (1 - momentum) * initial_gap / (learning_rate * updates)
        + smoothness * kappa * learning_rate
        + 2 * noise / np.sqrt(batch_size)
    )


def minimize_by_search(**constants):
    """The least value of the bound over a grid that is narrowed again and again."""
    low, high = np.array([0.0, -12.0]), np.array([math.log10(constants["gradient_budget"]), 3.0])
    for _ in range(25):
        batch_sizes = 10 ** np.linspace(low[0], high[0], 41)
        rates = 10 ** np.linspace(low[1], high[1], 41)
        values = bound(batch_sizes[:, None], rates[None, :], **constants)
        i, j = np.unravel_index(np.argmin(values), values.shape)
        best, span = np.log10([batch_sizes[i], rates[j]]), (high - low) / 4
        low, high = best - span, best + span
    return 10 ** best[0], 10 ** best[1], values.min()


@pytest.mark.parametrize("constants", CONSTANTS)
def test_corollary_1_minimizes_the_bound(constants):
    batch_size, learning_rate = schedules.sngm_corollary_1(**constants)
    best_batch_size, best_rate, least = minimize_by_search(**constants)
    assert isinstance(batch_size, int)
    assert 100 < batch_size < constants["gradient_budget"] / 10
    assert batch_size == pytest.approx(best_batch_size, rel=5e-3)
    assert learning_rate == pytest.approx(best_rate, rel=5e-3)
    assert bound(batch_size, learning_rate, **constants) == pytest.approx(least, rel=1e-5)
    ratio = (1 + constants["momentum"]) / (1 - constants["momentum"])
    in_the_paper = 2 * math.sqrt(2) * (
        8 * constants["smoothness"] * ratio * constants["initial_gap"]
        * constants["noise"] ** 2 / constants["gradient_budget"]
    ) ** 0.25  # fmt: skip
    assert least == pytest.approx(in_the_paper, rel=1e-6)


@pytest.mark.parametrize("constants", [*CONSTANTS, {**CONSTANTS[0], "gradient_budget": 3e3}])
def test_corollary_1_rate_is_the_best_for_the_rounded_batch(constants):
    batch_size, learning_rate = schedules.sngm_corollary_1(**constants)
    at = bound(batch_size, learning_rate, **constants)
    rates = learning_rate * 10 ** np.linspace(-3, 3, 6001)
    assert at <= bound(batch_size, rates, **constants).min() * (1 + 1e-12)


def test_corollary_1_batch_is_at_least_one_example():
    batch_size, learning_rate = schedules.sngm_corollary_1(10.0, 100.0, 1e-3, 10.0, momentum=0.9)
    assert batch_size == 1
    assert learning_rate == pytest.approx(math.sqrt(2 * 0.1**3 * 10.0 / (1.9 * 100.0 * 10.0)))


@pytest.mark.parametrize(
    ("budget", "batch_size", "rate"),
    [
        (1e8, 10000, 1e-2),
        (50000 * 160, 2828, math.sqrt(2828 / 8e6)),
        (2, 1, math.sqrt(0.5)),
        (0.04, 1, 5.0),
    ],
)
def test_corollary_2(budget, batch_size, rate):
    got = schedules.sngm_corollary_2(budget)
    assert got == (batch_size, pytest.approx(rate, rel=1e-12))
    assert isinstance(got[0], int)
