"""VRGD beyond the tables: the variance, special elements, empty replicas, sparse gradients."""

import dataclasses
import functools
import math
import warnings
from typing import ClassVar

import keras
import numpy as np
import pytest
import tensorflow as tf
from harness import (
    CASES,
    Run,
    assert_replicas_identical,
    initial_weights,
    sub_batch_gradients,
)

import tf_lbopt
from benchmarks.references import BETA_3, gsnr, reference
from tf_lbopt import rules
from tf_lbopt.optimizers.base import LargeBatchOptimizer
from tf_lbopt.rules.gsnr import SubBatchStatistics, clipped_gsnr
from tf_lbopt.rules.rule import Rule, Update

GAMMA = 0.1
VR_CASES = [case for case in CASES if case.name.startswith("vr_")]
over_vr = pytest.mark.parametrize("case", VR_CASES, ids=repr)
BY_NAME = {case.name: case for case in CASES}


# -- the variance, as the pipeline computes it -----------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Record(Rule):
    """Writes down what it is told of the sub-batches, and leaves the weights alone."""

    slots: ClassVar[tuple[str, ...]] = ("mean", "variance", "r", "count")
    statistics: ClassVar[tuple[str, ...]] = ("variance",)

    def update(self, parameters, step):
        return Update(tf.constant(True), lambda writer: self._write(parameters))

    def _write(self, parameters):
        statistics = parameters.statistics
        ratios = clipped_gsnr(statistics, GAMMA)
        for index, (mean, deviations) in enumerate(
            zip(statistics.means, statistics.deviations, strict=True)
        ):
            sparse = isinstance(mean, tf.IndexedSlices)
            means, dtype = mean.values if sparse else mean, mean.dtype
            values = {
                "mean": means * tf.cast(statistics.factor, dtype),
                "variance": deviations * tf.cast(tf.math.reciprocal_no_nan(statistics.live), dtype),
                "r": ratios[index],
                "count": tf.cast(tf.fill(tf.shape(means), statistics.live), dtype),
            }
            for name, value in values.items():
                if sparse:
                    elsewhere = tf.fill(
                        parameters.variables[index].shape,
                        tf.constant(GAMMA if name == "r" else 0, value.dtype),
                    )
                    value = tf.tensor_scatter_nd_update(elsewhere, mean.indices[:, None], value)
                parameters.slots[name][index].assign(value)


class Recorder(LargeBatchOptimizer):
    """An optimizer whose slots are the statistics."""

    statistics = _Record.statistics

    def rule(self):
        return _Record()


def recorded(run, name, layer=0):
    """One statistic of the sub-batches."""
    return run.inner.trained.slots[name][layer].numpy().astype(np.float64)


NOISE = (1e-5, 1e-3, 1.0, 1e3)  # σ²/ḡ²
PER_NOISE = 60


def noisy_gradients(sub_batches, noise=NOISE, seed=0):
    """``[sub-batch, noise, element]`` with |ḡ| around 1 and σ²/ḡ² as given, in float64."""
    rng = np.random.default_rng(seed)
    mean = rng.uniform(0.5, 2.0, size=(len(noise), PER_NOISE)) * rng.choice(
        [-1.0, 1.0], size=(len(noise), PER_NOISE)
    )
    deviation = rng.normal(size=(sub_batches, len(noise), PER_NOISE))
    deviation -= deviation.mean(axis=0)
    deviation /= deviation.std(axis=0)
    return mean * (1 + np.sqrt(noise)[:, None] * deviation)


def as_update(gradients):
    """``[sub-batch][layer]`` in float32."""
    return [[np.asarray(g, np.float32)] for g in gradients]


def recorder_of(shape, replicas, micro_steps):
    return Run(
        Recorder, replicas, micro_steps, weights=[np.zeros(shape, np.float32)], learning_rate=0.1
    )


VARIANCE_SPLITS = [(2, 1), (1, 2), (1, 7), (8, 1), (4, 2), (2, 4), (1, 8), (8, 8), (1, 64)]


@pytest.mark.parametrize(("replicas", "micro_steps"), VARIANCE_SPLITS)
@pytest.mark.quick(replicas=1, micro_steps=(2, 7))
@pytest.mark.quick(replicas=2)
def test_variance_is_right_to_a_thousandth(replicas, micro_steps):
    k = replicas * micro_steps
    run = recorder_of((len(NOISE), PER_NOISE), replicas, micro_steps)
    for seed, scale in enumerate([1.0, 1e-8, 1e8]):
        update = as_update(scale * noisy_gradients(k, seed=seed))
        exact = np.asarray(update, np.float64)[:, 0]
        variance, mean = exact.var(axis=0), exact.mean(axis=0)
        np.testing.assert_allclose(  # the test's own inputs
            variance / mean**2, np.broadcast_to(np.array(NOISE)[:, None], mean.shape), rtol=1e-3
        )
        run.update(update)
        np.testing.assert_allclose(recorded(run, "variance"), variance, rtol=1e-3)
        np.testing.assert_allclose(recorded(run, "mean"), mean, rtol=1e-3)
        np.testing.assert_array_equal(recorded(run, "count"), k)
        np.testing.assert_allclose(recorded(run, "r"), gsnr(exact, GAMMA), rtol=2e-3)
    assert_replicas_identical(run)


@pytest.mark.parametrize(("replicas", "micro_steps"), [(8, 1), (2, 4), (1, 7)])
@pytest.mark.quick(micro_steps=(4, 7))
def test_variance_is_never_negative(replicas, micro_steps):
    """Where sub-batches agree, or nearly, down to the last bit."""
    k = replicas * micro_steps
    rng = np.random.default_rng(5)
    run = recorder_of((3, 500), replicas, micro_steps)
    mean = rng.normal(size=500)
    for _ in range(4):
        update = as_update(
            [
                np.stack([mean, mean * (1 + 1e-7 * rng.normal(size=500)), rng.normal(size=500)])
                for _ in range(k)
            ]
        )
        run.update(update)
        variance = recorded(run, "variance")
        assert (variance >= 0).all()
        # What is left of rounding counts as agreement.
        np.testing.assert_allclose(recorded(run, "r")[:2], 1.0, rtol=1e-6)


def differences_of_r(replicas, micro_steps, scales):
    """By scale: how much r changes where all gradients are multiplied by it."""
    k = replicas * micro_steps
    rng = np.random.default_rng(2)
    mean = rng.uniform(0.6, 1.2, size=80) * rng.choice([-1.0, 1.0], size=80)
    signs = rng.permuted(np.where(np.arange(k) % 2, -1.0, 1.0)[:, None].repeat(80, 1), axis=0)
    deviation = signs * rng.uniform(0.8, 1.4, size=(k, 80))
    deviation -= deviation.mean(axis=0)
    update = as_update(mean + deviation)
    exact = np.asarray(update, np.float64)[:, 0]
    magnitudes = np.abs([exact.mean(axis=0), *(exact - exact.mean(axis=0))])
    run = recorder_of((80,), replicas, micro_steps).update(update)
    plain = recorded(run, "r")
    np.testing.assert_allclose(plain, gsnr(exact, GAMMA), rtol=1e-4)
    assert len(np.unique(plain)) > 20
    differences = {}
    for scale in scales:
        assert 1e-18 < scale * magnitudes.min() < scale * magnitudes.max() < 1e18
        run.update([[g * np.float32(scale)] for (g,) in update])
        differences[scale] = np.abs(recorded(run, "r") - plain).max()
    return differences


def assert_no_difference(differences, below=1e-6):
    assert not {scale: d for scale, d in differences.items() if not d < below}


# Powers of two do not round: about 1e-15, 1e-8, 1e8 and 1e15; at the ends of the range below, all
# |ḡ| and |g_d − ḡ| still lie between 1e-18 and 1e18.
@pytest.mark.parametrize(("replicas", "micro_steps"), [(8, 1), (1, 7), (8, 8)])
@pytest.mark.quick(micro_steps=7)
def test_r_does_not_depend_on_a_common_scale(replicas, micro_steps):
    scales = [2.0**-50, 2.0**-27, 2.0**27, 2.0**50]
    assert_no_difference(differences_of_r(replicas, micro_steps, scales))


@pytest.mark.parametrize(("replicas", "micro_steps"), [(1, 7), (8, 8), (1, 64)])
@pytest.mark.parametrize("scale", [2.0**-59, 2.0**59], ids=["least", "greatest"])
@pytest.mark.quick(micro_steps=7)
def test_r_at_the_ends_of_its_range(replicas, micro_steps, scale):
    # Deviations from a running mean can be smaller than those from the mean; their squares, below
    # 1.2e-38, are flushed to 0. What is promised of σ² is a thousandth.
    assert_no_difference(differences_of_r(replicas, micro_steps, [scale]), below=1e-3)


# -- special elements ------------------------------------------------------------------------------

LARGE = 70_000  # beyond 65,536 the usual case has a branch of its own
K = 4


def special_columns(name, rng):
    """Sub-batch gradients of a few elements, ``[sub-batch, element]``."""
    noise = rng.normal(size=(K, 3))
    return {
        "usual": 1.0 + noise,
        "dead": np.zeros((K, 3)),
        "agreeing": np.broadcast_to(rng.normal(size=3), (K, 3)),
        "nearly agreeing": rng.normal(size=3) * (1 + 1e-6 * noise),
        "zero mean": np.array([1.0, -1.0, 0.5, -0.5])[:, None] * [1.0, 1e-3, 1e3],
        "one sub-batch only": np.array([1.0, 0.0, 0.0, 0.0])[:, None] * [1.0, -1e-3, 1e3],
    }[name]


SPECIAL = {
    **{
        name: [name]
        for name in (
            "usual", "dead", "agreeing", "nearly agreeing", "zero mean", "one sub-batch only",
        )
    },
    "usual and dead": ["usual", "dead"],
    "usual and agreeing": ["usual", "agreeing"],
    "dead and agreeing": ["dead", "agreeing"],
    "zero mean and agreeing": ["zero mean", "agreeing"],
    "everything": [
        "usual", "dead", "agreeing", "nearly agreeing", "zero mean", "one sub-batch only",
    ],
}  # fmt: skip


def special_gradients(names, size=None, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    columns = np.concatenate([special_columns(name, rng) for name in names], axis=1)
    if size is not None:
        columns = np.tile(columns, -(-size // columns.shape[1]))[:, :size]
    return columns.astype(dtype)


def r_of(gradients, gamma=GAMMA, factor=1.0):
    """`clipped_gsnr` with exact moments."""
    exact = gradients.astype(np.float64)
    dtype = gradients.dtype
    statistics = SubBatchStatistics(
        [tf.constant(exact.mean(axis=0), dtype)],
        [tf.constant(factor**2 * len(exact) * exact.var(axis=0), dtype)],
        tf.constant(float(len(exact))),
        tf.constant(factor),
    )
    return clipped_gsnr(statistics, gamma)[0].numpy()


def expected_specials(names):
    """What r must be where the definition leaves no choice, NaN elsewhere."""
    alone = {"dead": GAMMA, "agreeing": 1.0, "nearly agreeing": 1.0, "zero mean": GAMMA}
    return np.repeat([alone.get(name, np.nan) for name in names], 3)


@pytest.mark.parametrize("names", SPECIAL.values(), ids=SPECIAL)
@pytest.mark.parametrize("size", [None, LARGE])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_special_elements(names, size, dtype):
    gradients = special_gradients(names, size, dtype)
    r = r_of(gradients)
    assert r.dtype == dtype
    np.testing.assert_allclose(r, gsnr(gradients, GAMMA), rtol=1e-4)
    for factor in (2.0**-40, 0.125, 2.0**15, 2.0**40):  # the units of the deviations are no matter
        np.testing.assert_allclose(r, r_of(gradients, factor=factor), rtol=1e-6)
    expected = expected_specials(names)
    expected = expected if size is None else np.resize(expected, size)
    fixed = ~np.isnan(expected)
    np.testing.assert_allclose(r[fixed], expected[fixed], rtol=1e-6)
    assert (r >= GAMMA * (1 - 1e-6)).all()
    assert (r <= 1).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["dead", "agreeing", "zero mean", "one sub-batch only"])
def test_one_special_element_in_a_large_layer(kind, dtype):
    """It turns the whole layer away from the fast branch, and nothing else about it changes."""
    usual = special_gradients(["usual"], LARGE, dtype)
    rng = np.random.default_rng(1)
    mixed = usual.copy()
    mixed[:, 12_345] = special_columns(kind, rng)[:, 0]
    r = r_of(mixed)
    np.testing.assert_allclose(r, gsnr(mixed, GAMMA), rtol=1e-4)
    others = np.arange(LARGE) != 12_345
    np.testing.assert_allclose(r[others], r_of(usual)[others], rtol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("column", "expected"),
    [([1.0, 3.0], 1.0), ([2.0, 2.0], 1.0), ([0.0, 0.0], GAMMA), ([1.0, -1.0], GAMMA)],
    ids=["usual", "agreeing", "dead", "zero mean"],
)
def test_layer_of_one_element(column, expected, dtype):
    gradients = np.array(column, dtype)[:, None]
    np.testing.assert_allclose(r_of(gradients), [expected], rtol=1e-6)
    np.testing.assert_allclose(gsnr(gradients, GAMMA), [expected])


@pytest.mark.parametrize("size", [7, LARGE])
def test_gamma_one_is_one_everywhere(size):
    for seed in range(20):
        usual = 1.0 + np.random.default_rng(seed).normal(size=(K, size)).astype("float32")
        np.testing.assert_array_equal(r_of(usual, gamma=1.0), 1.0, err_msg=f"seed {seed}")
    special = special_gradients(SPECIAL["everything"], size)
    np.testing.assert_array_equal(r_of(special, gamma=1.0), 1.0)


@pytest.mark.parametrize("count", [0.0, 1.0])
@pytest.mark.parametrize("size", [7, LARGE])
def test_without_two_live_sub_batches_nothing_is_weighted(count, size):
    total = np.random.default_rng(0).normal(size=size).astype("float32") * count
    statistics = SubBatchStatistics(
        [tf.constant(total)], [tf.zeros(size)], tf.constant(count), tf.constant(1.0)
    )
    expected = 1.0 if count else GAMMA  # nothing at all is live: every element is dead
    (r,) = clipped_gsnr(statistics, GAMMA)
    np.testing.assert_allclose(r, expected, rtol=1e-6)


SPECIAL_LAYERS = ["dead", "agreeing", "zero mean", "dead and agreeing", "everything"]


@pytest.mark.parametrize(
    ("replicas", "micro_steps", "weight_decay"), [(4, 1, 0.01), (2, 2, None), (1, 4, 0.01)]
)
@pytest.mark.quick(replicas=(1, 2))
def test_special_elements_through_the_pipeline(replicas, micro_steps, weight_decay):
    update = [special_gradients(SPECIAL[name], seed=3) for name in SPECIAL_LAYERS]
    update.append(special_gradients(["usual", "dead"], LARGE, seed=4))
    update.append(np.array([[2.0], [1.0], [0.5], [4.0]], np.float32))
    weights = [w + 1.0 for w in initial_weights([g.shape[1:] for g in update])]
    sub_batches = [[g[d] for g in update] for d in range(K)]
    arguments = {"learning_rate": 0.1, "weight_decay": weight_decay}
    run = Run(tf_lbopt.VRSGD, replicas, micro_steps, weights=weights, **arguments)
    got = run.update(sub_batches).weights()
    expected = reference("vr_sgd", weights, [sub_batches], **arguments)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
    # A dead layer moves by decay only.
    np.testing.assert_allclose(got[0], weights[0] * (1 - 0.1 * (weight_decay or 0.0)), rtol=1e-6)
    if weight_decay is None:
        np.testing.assert_array_equal(got[0], weights[0])


# -- gamma = 1 -------------------------------------------------------------------------------------


class _Plain(LargeBatchOptimizer):
    """A rule without any weighting, through the same pipeline."""

    def __init__(self, rule, learning_rate, **kwargs):
        super().__init__(learning_rate, **kwargs)
        self._rule = rule

    def rule(self):
        return self._rule


# One layer is large, and 3 is no power of two.
GAMMA_ONE_SHAPES = [(6, 5), (LARGE,)]
GAMMA_ONE_SPLITS = [(1, 3), (2, 3)]


def gamma_one_pair(make, base, replicas, micro_steps, **arguments):
    weights = initial_weights(GAMMA_ONE_SHAPES)
    gradients = sub_batch_gradients(4, replicas * micro_steps, GAMMA_ONE_SHAPES)
    return [
        Run(cls, replicas, micro_steps, weights=weights, **arguments, **extra)
        .updates(gradients)
        .weights()
        for cls, extra in ((make, {"gamma": 1.0}), (base, {}))
    ]


def assert_equal_weights(got, expected):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("replicas", "micro_steps"), GAMMA_ONE_SPLITS)
@pytest.mark.parametrize("name", ["vr_sgd", "vr_momentum", "nesterov"])
@pytest.mark.quick(replicas=2, name=("vr_sgd", "nesterov"))
def test_gamma_one_is_the_base_bit_by_bit(name, replicas, micro_steps):
    if name == "vr_sgd":
        make, rule, own = tf_lbopt.VRSGD, rules.SGD(), {}
    else:
        nesterov = name == "nesterov"
        make, rule = tf_lbopt.VRMomentum, rules.SGD(0.9, nesterov)
        own = {"momentum": 0.9, "nesterov": nesterov}

    def with_own(**kwargs):
        return make(**kwargs, **own)

    def plain(**kwargs):
        return _Plain(rule, **kwargs)

    assert_equal_weights(*gamma_one_pair(with_own, plain, replicas, micro_steps, learning_rate=0.1))


@pytest.mark.parametrize(("replicas", "micro_steps"), GAMMA_ONE_SPLITS)
@pytest.mark.parametrize("weight_decay", [None, 0.01])
@pytest.mark.quick(replicas=2, weight_decay=0.01)
def test_gamma_one_is_lars_bit_by_bit(replicas, micro_steps, weight_decay):
    assert_equal_weights(
        *gamma_one_pair(
            tf_lbopt.VRLARS,
            tf_lbopt.LARS,
            replicas,
            micro_steps,
            learning_rate=0.5,
            trust_coefficient=0.1,
            weight_decay=weight_decay,
            exclude_from_weight_decay=["layer_1"],
        )
    )


@pytest.mark.parametrize(("replicas", "micro_steps"), [(2, 1), (1, 3)])
@pytest.mark.quick(replicas=1)
def test_gamma_one_is_lamb(replicas, micro_steps):
    got, expected = gamma_one_pair(
        tf_lbopt.VRLAMB, tf_lbopt.LAMB, replicas, micro_steps, learning_rate=0.02, weight_decay=0.01
    )
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


KERAS_TWINS = {
    "vr_sgd": (keras.optimizers.SGD, {"learning_rate": 0.1}, {}),
    "vr_momentum": (keras.optimizers.SGD, {"learning_rate": 0.1, "momentum": 0.9}, {}),
    "nesterov": (
        keras.optimizers.SGD, {"learning_rate": 0.1, "momentum": 0.9, "nesterov": True}, {},
    ),
    "vr_adam": (keras.optimizers.Adam, {"learning_rate": 0.02}, {}),
    "adamw": (keras.optimizers.AdamW, {"learning_rate": 0.02, "weight_decay": 0.1}, {}),
    "vr_lamb": (keras.optimizers.Lamb, {"learning_rate": 0.02, "epsilon": 1e-7}, {}),
}  # fmt: skip
TWIN_OF = {"nesterov": "vr_momentum", "adamw": "vr_adam"}


@pytest.mark.parametrize("name", KERAS_TWINS)
@pytest.mark.parametrize(("replicas", "micro_steps"), [(2, 1), (1, 2)])
@pytest.mark.quick(replicas=1)
def test_gamma_one_is_keras(name, replicas, micro_steps):
    theirs, arguments, own = KERAS_TWINS[name]
    make = BY_NAME[TWIN_OF.get(name, name)].cls
    gradients = sub_batch_gradients(6, sub_batches=2)
    means = [
        [[np.mean(layer, axis=0) for layer in zip(*update, strict=True)]] for update in gradients
    ]
    one = Run(make, replicas, micro_steps, gamma=1.0, **arguments, **own).updates(gradients)
    other = Run(theirs, **arguments).updates(means)
    for a, b in zip(one.weights(), other.weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


# -- replicas without any gradient -----------------------------------------------------------------

# [update] of (replica, micro-step) that are all zero; on 4 × 2, 2 × 4 and 1 × 8 sub-batches.
EMPTY = {
    (2, 3): [
        [(1, 0)],
        [(0, 1)],
        [(1, 2)],
        [(0, 0), (1, 1), (0, 2)],
        [(1, 0), (1, 1), (1, 2)],
        [(0, 0), (0, 1), (0, 2), (1, 0), (1, 2)],  # k' = 1
        [],
    ],
    (4, 1): [[(0, 0)], [(3, 0), (1, 0)], [(0, 0), (1, 0), (2, 0)], []],
    (1, 4): [[(0, 0)], [(0, 1), (0, 2)], [(0, 3)], [(0, 0), (0, 2), (0, 3)], []],
}


def with_empty(gradients, replicas, empty):
    return [
        [
            [np.zeros_like(g) for g in layers] if (d % replicas, d // replicas) in where else layers
            for d, layers in enumerate(update)
        ]
        for update, where in zip(gradients, empty, strict=True)
    ]


def check_against_reference(case, replicas, micro_steps, gradients):
    run = Run(case, replicas, micro_steps).updates(gradients)
    expected = reference(case.name, initial_weights(), gradients, **case.arguments)
    for a, b in zip(run.weights(), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
    assert run.optimizer.skipped_updates.numpy() == 0
    return expected


@pytest.mark.parametrize(
    ("case", "replicas", "micro_steps"),
    [
        *((case, 2, 3) for case in VR_CASES),
        *((BY_NAME[name], *split) for name in ("vr_sgd", "vr_adam") for split in [(4, 1), (1, 4)]),
    ],
    ids=str,
)
@pytest.mark.quick(case="vr_lamb")
@pytest.mark.quick(case="vr_adam", replicas=(1, 4))
def test_empty_sub_batches_are_left_out(case, replicas, micro_steps):
    empty = EMPTY[replicas, micro_steps]
    full = sub_batch_gradients(len(empty), replicas * micro_steps)
    expected = check_against_reference(
        case, replicas, micro_steps, with_empty(full, replicas, empty)
    )
    # Counted as sub-batches, they would have given something else.
    nearly = [[[g + np.float32(1e-30) for g in layers] for layers in u] for u in full]
    counted = with_empty(nearly, replicas, empty)
    counted = [[[g + 1e-30 for g in layers] for layers in update] for update in counted]
    other = reference(case.name, initial_weights(), counted, **case.arguments)
    assert any(np.abs(a - b).max() > 1e-4 for a, b in zip(expected, other, strict=True))


@over_vr
@pytest.mark.parametrize(("replicas", "micro_steps"), [(2, 1), (1, 2)])
@pytest.mark.quick(case=("vr_sgd", "vr_lamb"))
def test_an_update_without_any_gradient(case, replicas, micro_steps):
    """Momentum, moments, decay and r's mean act as for any dead element; the updates after too."""
    empty = [[], [(d % replicas, d // replicas) for d in range(2)], [], []]
    gradients = with_empty(sub_batch_gradients(4, 2), replicas, empty)
    check_against_reference(case, replicas, micro_steps, gradients)


@pytest.mark.parametrize(("replicas", "micro_steps"), [(2, 1), (2, 2), (1, 3)])
def test_statistics_of_one_live_sub_batch(replicas, micro_steps):
    rng = np.random.default_rng(0)
    k = replicas * micro_steps
    run = recorder_of((40,), replicas, micro_steps)
    for where in range(k):
        update = as_update(np.where(np.arange(k)[:, None] == where, rng.normal(size=40), 0.0))
        update[where][0][:5] = 0.0  # some elements are dead even there
        run.update(update)
        np.testing.assert_array_equal(recorded(run, "count"), 1)
        np.testing.assert_array_equal(recorded(run, "r"), 1.0)
        np.testing.assert_allclose(recorded(run, "mean"), update[where][0], rtol=1e-6)


# -- sparse gradients ------------------------------------------------------------------------------

ROWS, WIDTH = 12, 3


def slices(indices, values, dtype="int64"):
    return tf.IndexedSlices(
        tf.constant(np.reshape(values, (-1, WIDTH)), tf.float32),
        tf.constant(np.asarray(indices, dtype)),
        tf.constant([ROWS, WIDTH], tf.int64),
    )


def random_slices(rng, index_sets, dtype="int64"):
    """One per index set; values with a mean per row, so that r differs from row to row."""
    means = np.random.default_rng(99).normal(size=(ROWS, WIDTH))
    return [
        slices(i, means[list(i)] + 0.5 * rng.normal(size=(len(i), WIDTH)), dtype)
        for i in index_sets
    ]


INDEX_SETS = {
    "repeated within": [[0, 0, 0, 5], [5, 5, 0], [2, 2], [0, 2, 0]],
    "repeated between": [[1, 4, 7], [7, 4, 1], [4, 1, 7], [1, 7, 4]],
    "own rows each": [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]],
    "some": [[3], [3, 8, 8], [8, 0], [11]],
    "none on the first": [[], [3, 8], [8, 3], [11, 3, 3]],
    "none on the second": [[3, 8], [], [8, 3, 3], [11]],
    "none on the last": [[3, 8], [8], [8, 3, 3], []],
    "all rows": [list(range(ROWS))] * 4,
}


def twins(names, shift=0, dtype="int64"):
    """``[sub-batch][layer]``, one layer for each set of indices: sparse, and their dense twins."""
    rng = np.random.default_rng(shift)
    layers = [
        random_slices(rng, [[(i + shift) % ROWS for i in rows] for rows in INDEX_SETS[name]], dtype)
        for name in names
    ]
    sparse = list(zip(*layers, strict=True))
    return sparse, [[tf.convert_to_tensor(g).numpy() for g in sub_batch] for sub_batch in sparse]


@pytest.mark.parametrize(
    ("replicas", "micro_steps", "dtype"),
    [(4, 1, "int64"), (2, 2, "int32"), (1, 4, "int64")],
)
@pytest.mark.quick(replicas=1)
def test_sparse_statistics_equal_those_of_the_dense_twin(replicas, micro_steps, dtype):
    """Two updates, so that the rows of one are gone by the next."""
    weights = [np.zeros((ROWS, WIDTH), np.float32)] * len(INDEX_SETS)
    of_any_length = tf.IndexedSlicesSpec([ROWS, WIDTH], tf.float32, dtype, tf.int64)
    function = tf.function
    if replicas == 1:  # one trace for all micro-steps
        signature = [[of_any_length] * len(INDEX_SETS)]
        function = functools.partial(tf.function, input_signature=signature)
    run = Run(
        Recorder, replicas, micro_steps, weights=weights, function=function, learning_rate=0.1
    )
    for shift in (0, 5):
        sparse, dense = twins(INDEX_SETS, shift, dtype)
        run.update(sparse)
        for layer, (name, index_sets) in enumerate(INDEX_SETS.items()):
            exact = np.asarray([layers[layer] for layers in dense], np.float64)
            same = {"rtol": 1e-5, "atol": 1e-12, "err_msg": name}
            np.testing.assert_allclose(recorded(run, "variance", layer), exact.var(axis=0), **same)
            np.testing.assert_allclose(recorded(run, "mean", layer), exact.mean(axis=0), **same)
            np.testing.assert_allclose(
                recorded(run, "r", layer), gsnr(exact, GAMMA), rtol=1e-4, err_msg=name
            )
            touched = sorted({(i + shift) % ROWS for rows in index_sets for i in rows})
            np.testing.assert_array_equal(recorded(run, "count", layer)[touched], 4)
    assert_replicas_identical(run)


@pytest.mark.parametrize(
    ("case", "replicas", "micro_steps"),
    [*((case, 4, 1) for case in VR_CASES), (BY_NAME["vr_sgd"], 1, 4), (BY_NAME["vr_adam"], 2, 2)],
    ids=str,
)
@pytest.mark.quick(case="vr_adam", replicas=2)
def test_sparse_weights_equal_those_of_the_dense_twin(case, replicas, micro_steps):
    names = ["repeated within", "none on the second"]
    weights = initial_weights([(ROWS, WIDTH)] * 2)
    updates = [twins(names, shift) for shift in (0, 5, 8)]
    run = Run(case, replicas, micro_steps, weights=weights)
    run.updates([sparse for sparse, _ in updates])
    expected = reference(case.name, weights, [dense for _, dense in updates], **case.arguments)
    for a, b in zip(run.weights(), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_seven_micro_steps_with_different_rows_each():
    """Some rows in one micro-step only, some in all, some repeated; and the dense twin beside."""
    rng = np.random.default_rng(4)
    index_sets = [[11, 11, m, m + 1, m % 3, *rng.integers(0, 11, size=3)] for m in range(7)]
    gradients = random_slices(rng, index_sets)
    run = Run(Recorder, 1, 7, weights=[np.zeros((ROWS, WIDTH), np.float32)] * 2, learning_rate=0.1)
    dense = [tf.convert_to_tensor(g) for g in gradients]
    run.update(list(zip(gradients, dense, strict=True)))
    exact = np.asarray(dense, np.float64)
    for layer in range(2):
        variance = recorded(run, "variance", layer)
        assert (variance >= 0).all()
        np.testing.assert_allclose(variance, exact.var(axis=0), rtol=1e-5, atol=1e-12)
        np.testing.assert_allclose(recorded(run, "r", layer), gsnr(exact, GAMMA), rtol=1e-4)


@pytest.mark.parametrize(
    ("replicas", "micro_steps", "empty"),
    [(1, 7, [[], [0], [3], [6], [0, 3, 4]]), (2, 3, [[0], [5], [0, 2, 4], [1, 2]])],
)
def test_variance_beside_empty_sub_batches(replicas, micro_steps, empty):
    """Which still name rows, as a batch does whose examples all have weight 0."""
    k = replicas * micro_steps
    weights = [np.zeros((ROWS, WIDTH), np.float32)] * 2
    run = Run(Recorder, replicas, micro_steps, weights=weights, learning_rate=0.1)
    wrong = {}
    for where in empty:
        live = np.array([d not in where for d in range(k)])
        values = np.empty((live.sum(), ROWS, WIDTH))
        for row in range(ROWS):
            values[:, row] = noisy_gradients(live.sum(), NOISE, seed=row)[:, row % 4, :WIDTH]
        gradients = np.zeros((k, ROWS, WIDTH), np.float32)
        gradients[live] = values
        exact = gradients[live].astype(np.float64)
        run.update([[slices(range(ROWS), g), g] for g in gradients])
        for layer, kind in enumerate(["sparse", "dense"]):
            np.testing.assert_array_equal(recorded(run, "count", layer), live.sum())
            variance = recorded(run, "variance", layer)
            error = np.abs(variance / exact.var(axis=0) - 1).max()
            if not (error <= 1e-3 and (variance >= 0).all()):
                wrong[kind, str(where)] = error
    assert not wrong


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("empty", [0, 1, 2])
def test_agreement_beside_an_empty_micro_step(sparse, empty):
    """r = 1 on all rows: the live micro-steps agree, the empty one names the same rows."""
    run = recorder_of((ROWS, WIDTH), 1, 3)
    values = np.random.default_rng(8).normal(size=(ROWS, WIDTH)).astype("float32")
    update = [values * (m != empty) for m in range(3)]
    run.update([[slices(range(ROWS), g) if sparse else g] for g in update])
    np.testing.assert_array_equal(recorded(run, "count"), 2)
    assert (recorded(run, "variance") >= 0).all()
    np.testing.assert_allclose(recorded(run, "r"), 1.0, rtol=1e-6)


# -- too few sub-batches, and arguments ------------------------------------------------------------

ADVICE = r"(?s)(?=.*gradient_accumulation_steps)(?=.*replicas)"


@over_vr
def test_one_sub_batch_is_refused(case):
    variables = [keras.Variable(w) for w in initial_weights()]
    gradients = [tf.ones_like(v.value) for v in variables]
    case().build(variables)  # of a model that is only used
    unbuilt = case()
    with pytest.raises(ValueError, match=ADVICE):
        unbuilt.apply(gradients, variables)
    traced = case()
    with pytest.raises(ValueError, match=ADVICE):
        tf.function(lambda: traced.apply(gradients, variables))()
    for variable, before in zip(variables, initial_weights(), strict=True):
        np.testing.assert_array_equal(variable.numpy(), before)
    # Either of the two ways out.
    case(gradient_accumulation_steps=2).apply(gradients, variables)
    assert Run(case, replicas=2).optimizer.built


def test_one_sub_batch_is_refused_by_fit():
    model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
    model.compile(tf_lbopt.VRSGD(0.1), "mse")
    with pytest.raises(ValueError, match=ADVICE):
        model.fit(np.ones([4, 2]), np.ones([4, 1]), verbose=0)


WRONG = {
    "gamma": (
        "(0, 1]",
        {ValueError: [0, 0.0, -0.1, 1.5, math.nan, math.inf], TypeError: ["0.1", True, None]},
    ),
    "beta_3": ("[0, 1)", {ValueError: [1.0, -0.1, math.nan], TypeError: ["0.9", True, None]}),
}


@pytest.mark.parametrize(
    ("case", "argument", "value", "error", "interval"),
    [
        pytest.param(case, argument, value, error, interval, id=f"{case}-{argument}={value!r}")
        for case in VR_CASES
        for argument, (interval, wrong) in WRONG.items()
        for error, values in wrong.items()
        for value in values
        if argument == "gamma" or case.name in BETA_3
    ],
)
def test_arguments_out_of_range(case, argument, value, error, interval):
    with pytest.raises(error) as caught:
        case(**{argument: value})
    message = str(caught.value)
    assert argument in message
    assert interval in message
    assert repr(value) in message.partition("Received")[2]


@over_vr
def test_the_ends_of_the_intervals_are_accepted(case):
    assert case(gamma=1).gamma == 1.0
    assert case(gamma=1e-12).gamma == 1e-12
    if case.name in BETA_3:
        assert case(beta_3=0).beta_3 == 0.0
        assert case(beta_3=0.999).beta_3 == 0.999
        assert case().get_config()["beta_3"] == BETA_3[case.name]
    else:
        assert "beta_3" not in case().get_config()
    assert case().get_config()["gamma"] == 0.1


# -- how many sub-batches --------------------------------------------------------------------------


@pytest.mark.parametrize("make", [*VR_CASES, None], ids=str)
@pytest.mark.quick(make=("vr_sgd", None))
def test_few_sub_batches_are_warned_of_once(make, recwarn):
    if make is None:
        make = lambda **k: tf_lbopt.VarianceReduced(keras.optimizers.SGD(0.1), **k)  # noqa: E731
    run = Run(make, replicas=2, micro_steps=2)
    warnings.simplefilter("always")
    run.updates(sub_batch_gradients(2, sub_batches=4))
    of_few = [w for w in recwarn if "4 sub-batches" in str(w.message)]
    assert len(of_few) == 1
    assert of_few[0].category is UserWarning


@pytest.mark.parametrize(("micro_steps", "gamma"), [(8, 0.1), (2, 1.0)])
def test_enough_sub_batches(micro_steps, gamma):
    run = Run(tf_lbopt.VRSGD, micro_steps=micro_steps, learning_rate=0.1, gamma=gamma)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run.updates(sub_batch_gradients(1, sub_batches=micro_steps))


@pytest.mark.parametrize(
    ("sub_batches", "low", "high"),
    [(2, 0.90, 0.99), (3, 0.50, 0.70), (4, 0.37, 0.37), (8, 0.28, 0.28)],
)
def test_shares_of_gaussian_noise_at_gamma(sub_batches, low, high):
    """The figures of VRSGD's docstring."""
    rng = np.random.default_rng(1)
    for size, times in ((500, 200), (50_000, 5)):
        ratios = [gsnr(rng.normal(size=(sub_batches, size)), 0.1) for _ in range(times)]
        assert low - 0.02 < np.mean(np.array(ratios) <= 0.1) < high + 0.02
