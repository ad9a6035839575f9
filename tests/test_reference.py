"""Every optimizer against its float64 reference, and against the implementations it must equal."""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf
from harness import (
    CASES,
    KINDS,
    SPLITS,
    THREE_SHAPES,
    Run,
    clipped,
    initial_weights,
    sub_batch_gradients,
)

import tf_lbopt
from benchmarks.references import reference

# ExtrapSGD has a trust ratio only if it is asked for.
LAYERWISE = [
    case
    for case in CASES
    if "default_trust_ratio" in case.cls.arguments and case.name != "extrap_sgd"
]
WEIGHTED = tuple(case.name for case in CASES if case.name.startswith("vr_"))
OTHERS = tuple(case.name for case in CASES if case.name not in (*KINDS, *WEIGHTED))
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}

graph_optimized = pytest.mark.usefixtures("graph_optimizer")


def assert_close(got, expected, **tolerance):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, **(tolerance or TOLERANCE))


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize(("replicas", "micro_steps"), [*SPLITS, (2, 1)])
@pytest.mark.quick(case=KINDS, replicas=(1, 4))
@pytest.mark.quick(case="vr_lamb", replicas=8)
@pytest.mark.quick(case=(*KINDS, *WEIGHTED), micro_steps=4)  # of two, r has no mean to speak of
@pytest.mark.quick(case="extrap_adam", replicas=1)
@pytest.mark.quick(case=OTHERS, micro_steps=1, replicas=2)
@graph_optimized
def test_equals_the_reference_on_every_split(case, replicas, micro_steps):
    weights = initial_weights(THREE_SHAPES)
    gradients = sub_batch_gradients(6, replicas * micro_steps, THREE_SHAPES)
    run = Run(case, replicas, micro_steps, weights).updates(gradients)
    expected = reference(case.name, weights, gradients, **case.arguments)
    assert_close(run.weights(), expected)
    assert run.optimizer.iterations.numpy() == 6
    assert run.optimizer.skipped_updates.numpy() == 0
    # The updates moved the weights by far more than the tolerance.
    assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(run.weights(), weights, strict=True))


VARIANTS = [
    ("sgd", {"momentum": 0.0}),
    ("sgd", {"nesterov": True}),
    ("sgd", {"weight_decay": None}),
    ("adam", {"weight_decay": None, "beta_1": 0.5}),
    ("adamw", {"epsilon": 1e-2}),
    ("sngm", {"momentum": 0.0}),
    ("sngm", {"weight_decay": None}),
    ("lars", {"momentum": 0.0}),
    ("lars", {"nesterov": True}),
    ("lars", {"weight_decay": None}),
    ("lamb", {"weight_decay": None}),
    ("lans", {"weight_decay": None}),
    ("lans", {"beta_1": 0.0, "beta_2": 0.5, "epsilon": 1e-3}),
    ("lans", {"beta_1": 0.95, "beta_2": 0.9}),
    ("lamb", {"beta_1": 0.0, "beta_2": 0.5, "epsilon": 1e-3}),
    ("vr_sgd", {"weight_decay": None, "gamma": 0.5}),
    ("vr_momentum", {"nesterov": False, "momentum": 0.0}),
    ("vr_momentum", {"nesterov": False, "gamma": 0.01}),
    ("vr_adam", {"weight_decay": None, "beta_3": 0.0, "epsilon": 1e-2}),
    ("vr_lars", {"nesterov": True, "weight_decay": None}),
    ("vr_lamb", {"beta_3": 0.5, "gamma": 0.9}),
    ("vr_lans", {"beta_3": 0.5, "gamma": 0.9}),
    ("clars", {"momentum": 0.0}),
    ("clars", {"weight_decay": None, "trust_coefficient": 0.01}),
    ("clars", {"max_trust_ratio": 0.02}),
    ("clars", {"nesterov": False}),
    ("lars", {"trust_ratio_denominator": "sum_of_norms", "weight_decay": 0.2}),
    ("vr_lars", {"trust_ratio_denominator": "sum_of_norms", "weight_decay": 0.2}),
    ("lars", {"trust_ratio_denominator": "sum_of_norms", "weight_decay": None}),
]


@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=str)
def test_variants_equal_the_reference(name, changes):
    case = next(c for c in CASES if c.name == name)
    arguments = {**case.arguments, **changes}
    gradients = sub_batch_gradients(5, sub_batches=2)
    run = Run(case, micro_steps=2, **changes).updates(gradients)
    assert_close(run.weights(), reference(name, initial_weights(), gradients, **arguments))


@pytest.mark.parametrize("name", [case.name for case in LAYERWISE])
@pytest.mark.parametrize("adaptation", [None, [], ["layer_2"]], ids=str)
@pytest.mark.quick(adaptation=(["layer_2"],))
@pytest.mark.quick(name=("lars", "vr_lamb"))
def test_exclusions_equal_the_reference(name, adaptation):
    case = next(c for c in CASES if c.name == name)
    weights = initial_weights(THREE_SHAPES)
    gradients = sub_batch_gradients(4, 2, THREE_SHAPES)
    run = Run(
        case,
        micro_steps=2,
        weights=weights,
        exclude_from_weight_decay=["layer_1"],
        exclude_from_layer_adaptation=adaptation,
    ).updates(gradients)
    adapts = {None: [True, False, True], "[]": [True] * 3, "['layer_2']": [True, True, False]}
    expected = reference(
        name,
        weights,
        gradients,
        **case.arguments,
        decays=[True, False, True],
        adapts=adapts[adaptation if adaptation is None else str(adaptation)],
    )
    assert_close(run.weights(), expected)


@pytest.mark.parametrize("case", LAYERWISE, ids=repr)
def test_trust_ratio_of_layers_that_have_none(case):
    """The first layer's weights start at 0, the second is excluded, the third has no gradient."""
    changes = {"default_trust_ratio": 0.03}
    if case.name == "lars":
        changes["trust_ratio_denominator"] = "sum_of_norms"
    if case.name == "clars":
        changes["max_trust_ratio"] = 0.02
    weights = initial_weights(THREE_SHAPES)
    weights[0][:] = 0.0
    gradients = sub_batch_gradients(3, 2, THREE_SHAPES)
    for update in gradients:
        for layers in update:
            layers[2][:] = 0.0
    run = Run(
        case,
        micro_steps=2,
        weights=weights,
        exclude_from_layer_adaptation=["layer_1"],
        **changes,
    )
    arguments = {**case.arguments, **changes, "adapts": [True, False, True]}
    expected = reference(case.name, weights, gradients, **arguments)
    assert_close(run.updates(gradients).weights(), expected)
    plain = reference(case.name, weights, gradients, **{**arguments, "default_trust_ratio": 1.0})
    assert np.abs(plain[1] - expected[1]).max() > 1e-3


def test_trust_ratio_of_extrapolated_layers_that_have_none():
    arguments = {"learning_rate": 0.5, "trust_coefficient": 0.1, "default_trust_ratio": 0.03}
    gradients = sub_batch_gradients(3, sub_batches=2)
    run = Run(tf_lbopt.ExtrapSGD, 2, exclude_from_layer_adaptation=["layer_1"], **arguments)
    run.updates(gradients)
    # Of gradients that do not depend on where they are taken.
    expected = reference("lars", initial_weights(), gradients, **arguments, adapts=[True, False])
    assert_close(run.weights(), expected)


@pytest.mark.parametrize("name", ["lars", "vr_lars"])
def test_the_denominators_differ_under_weight_decay(name):
    case = next(c for c in CASES if c.name == name)
    gradients = sub_batch_gradients(5, sub_batches=2)
    weights = [
        reference(
            name,
            initial_weights(),
            gradients,
            **{**case.arguments, "weight_decay": 0.2, "trust_ratio_denominator": denominator},
        )
        for denominator in ("norm_of_sum", "sum_of_norms")
    ]
    assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize(("replicas", "micro_steps"), [(4, 1), (2, 2), (1, 4)])
@pytest.mark.quick(case=("vr_lamb", "extrap_sgd"), replicas=2)
def test_schedules_count_updates(case, replicas, micro_steps):
    decay = keras.optimizers.schedules.PolynomialDecay(0.1, 6, end_learning_rate=0.0, power=2.0)
    schedule = tf_lbopt.schedules.Warmup(decay, steps=2)
    gradients = sub_batch_gradients(7, sub_batches=4)
    run = Run(case, replicas, micro_steps, learning_rate=schedule).updates(gradients)

    def rate(t):
        return 0.1 * t / 2 if t < 2 else 0.1 * (1 - (t - 2) / 6) ** 2

    expected = reference(
        case.name, initial_weights(), gradients, **{**case.arguments, "learning_rate": rate}
    )
    assert_close(run.weights(), expected)


CLIPS = [{"clipnorm": 0.3}, {"clipvalue": 0.05}, {"global_clipnorm": 0.5}]


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize("clip", CLIPS, ids=lambda c: next(iter(c)))
@pytest.mark.parametrize(("replicas", "micro_steps"), [(4, 1), (2, 2)])
@pytest.mark.quick(case=("vr_lamb", "clars"), replicas=2, clip=CLIPS[2])
@pytest.mark.quick(case="lamb", replicas=2)
def test_clips_the_mean_gradient(case, clip, replicas, micro_steps):
    # Every replica's own gradient is far beyond the limit, so clipping them first would show.
    gradients = sub_batch_gradients(4, sub_batches=4)
    run = Run(case, replicas, micro_steps, **clip).updates(gradients)
    expected = reference(
        case.name,
        initial_weights(),
        gradients,
        clip=lambda layers: clipped(layers, **clip),
        **case.arguments,
    )
    assert_close(run.weights(), expected)
    unclipped = reference(case.name, initial_weights(), gradients, **case.arguments)
    differs = any(np.abs(a - b).max() > 1e-4 for a, b in zip(expected, unclipped, strict=True))
    # LANS divides out again what multiplies a whole gradient.
    assert differs == (case.name not in ("lans", "vr_lans") or "clipvalue" in clip)


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize(("replicas", "micro_steps"), [(1, 1), (2, 2)])
@pytest.mark.quick(case="vr_lamb", replicas=2)
@pytest.mark.quick(case="extrap_sgd", replicas=1)
def test_loss_scale_factor_is_taken_out_again(case, replicas, micro_steps):
    gradients = sub_batch_gradients(4, sub_batches=replicas * micro_steps)
    scaled = [[[g * np.float32(1024) for g in ls] for ls in update] for update in gradients]
    run = Run(case, replicas, micro_steps, loss_scale_factor=1024.0).updates(scaled)
    plain = Run(case, replicas, micro_steps).updates(gradients)
    assert_close(run.weights(), plain.weights(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12, 1e25])
@pytest.mark.quick(case=KINDS)
@graph_optimized
def test_tiny_and_huge_gradients(case, scale):
    """Squares of these underflow or overflow in float32."""
    gradients = sub_batch_gradients(3, sub_batches=2)
    scaled = [[[g * np.float32(scale) for g in ls] for ls in update] for update in gradients]
    # LANS has them of normalized gradients.
    has_second_moment = "velocity" in case.cls.slots and "lans" not in case.name
    arguments = {"weight_decay": None, **({"epsilon": 0.0} if has_second_moment else {})}
    if not 1e-11 < scale < 1e15 and (has_second_moment or "variance" in case.cls.statistics):
        pytest.skip("second moments and variances themselves are no float32 numbers here")
    run = Run(case, micro_steps=2, **arguments).updates(scaled)
    expected = reference(case.name, initial_weights(), scaled, **{**case.arguments, **arguments})
    assert_close(run.weights(), expected)


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.quick(
    case=("sngm", "lars", "lamb", "lans", "vr_sgd", "vr_lamb", "vr_adam", "clars", "extrap_sgd")
)
def test_zero_gradients_do_no_harm(case):
    gradients = [[[np.zeros_like(w) for w in initial_weights()]] * 2] * 2
    run = Run(case, micro_steps=2).updates(gradients)
    expected = reference(case.name, initial_weights(), gradients, **case.arguments)
    assert_close(run.weights(), expected)
    assert all(np.isfinite(w).all() for w in run.weights())


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
@pytest.mark.parametrize(("replicas", "micro_steps"), [(1, 2), (2, 2)])
@pytest.mark.quick(case=KINDS, dtype=("bfloat16", "float16"), replicas=1)
@pytest.mark.quick(case="vr_lamb", replicas=1)
@graph_optimized
def test_other_dtypes(case, dtype, replicas, micro_steps):
    gradients = sub_batch_gradients(4, sub_batches=replicas * micro_steps)
    run = Run(case, replicas, micro_steps, dtype=dtype)
    cast = [[[tf.cast(g, dtype) for g in ls] for ls in update] for update in gradients]
    run.updates(cast)
    assert all(v.dtype == dtype for v in run.variables)
    tolerance = {"float64": 1e-7, "bfloat16": 3e-2, "float16": 5e-3}[dtype]
    rounded = [[[tf.cast(g, tf.float64).numpy() for g in ls] for ls in update] for update in cast]
    expected = reference(case.name, initial_weights(), rounded, **case.arguments)
    for got, want in zip(run.variables, expected, strict=True):
        np.testing.assert_allclose(
            tf.cast(got.value, tf.float64), want, rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.quick(case=("vr_lamb", "clars"))
def test_layers_of_different_dtypes(case):
    """Norms, rates and decays are computed for all layers of a dtype at once."""
    dtypes = ["float64", "bfloat16", "float32"]
    gradients = [
        [[tf.cast(g, dtype) for g, dtype in zip(layers, dtypes, strict=True)] for layers in update]
        for update in sub_batch_gradients(4, 4, THREE_SHAPES)
    ]
    weights = initial_weights(THREE_SHAPES)
    run = Run(case, 2, 2, weights, dtype=dtypes).updates(gradients)
    rounded = [[[tf.cast(g, tf.float64).numpy() for g in ls] for ls in u] for u in gradients]
    expected = reference(case.name, weights, rounded, **case.arguments)
    # The roundings of one layer reach the others through SNGM's norm alone.
    for variable, want, tolerance in zip(run.variables, expected, (1e-5, 3e-2, 1e-4), strict=True):
        got = tf.cast(variable.value, tf.float64)
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)
    assert [variable.dtype for variable in run.variables] == dtypes


@pytest.mark.parametrize(
    ("ours", "theirs", "arguments"),
    [
        (tf_lbopt.SGD, keras.optimizers.SGD, {}),
        (tf_lbopt.SGD, keras.optimizers.SGD, {"momentum": 0.8}),
        (tf_lbopt.SGD, keras.optimizers.SGD, {"momentum": 0.8, "nesterov": True}),
        (tf_lbopt.Adam, keras.optimizers.Adam, {"beta_1": 0.8, "beta_2": 0.95, "epsilon": 1e-3}),
        (tf_lbopt.Adam, keras.optimizers.Adam, {"weight_decay": 0.1}),
        (tf_lbopt.AdamW, keras.optimizers.AdamW, {}),
    ],
)
def test_equals_the_optimizer_of_its_name_in_keras(ours, theirs, arguments):
    gradients = sub_batch_gradients(10, sub_batches=1)
    run, expected = (Run(make, learning_rate=0.02, **arguments) for make in (ours, theirs))
    assert_close(run.updates(gradients).weights(), expected.updates(gradients).weights())
    defaults = {name: p.default for name, p in inspect.signature(theirs).parameters.items()}
    for name, parameter in inspect.signature(ours).parameters.items():
        if name != "jit_compile":  # which Keras has not
            assert parameter.default == defaults.get(name), name


def test_lamb_equals_keras_lamb():
    gradients = sub_batch_gradients(10, sub_batches=1)
    ours = Run(tf_lbopt.LAMB, learning_rate=0.02, epsilon=1e-7).updates(gradients)
    theirs = Run(keras.optimizers.Lamb, learning_rate=0.02, epsilon=1e-7).updates(gradients)
    assert_close(ours.weights(), theirs.weights())


@pytest.mark.parametrize("name", ["lars", "lamb"])
@pytest.mark.parametrize("excluded", [None, ["layer_1"]], ids=str)
def test_equals_tf_models(name, excluded):
    """With weight decay and exclusions; tf-models-official 2.20."""
    if name == "lars":
        module = pytest.importorskip("official.modeling.optimization.lars")
        arguments = {"learning_rate": 0.3, "momentum": 0.9, "nesterov": False}
        theirs = module.LARS(
            eeta=0.05,
            weight_decay_rate=0.02,
            exclude_from_weight_decay=excluded,
            **arguments,
        )
        make = tf_lbopt.LARS
        arguments["trust_coefficient"] = 0.05
    else:
        module = pytest.importorskip("official.modeling.optimization.lamb")
        arguments = {"learning_rate": 0.02, "beta_1": 0.9, "beta_2": 0.99, "epsilon": 1e-6}
        theirs = module.LAMB(
            weight_decay_rate=0.02, exclude_from_weight_decay=excluded, **arguments
        )
        make = tf_lbopt.LAMB
    gradients = sub_batch_gradients(10, sub_batches=1)
    variables = [tf.Variable(w, name=f"layer_{i}") for i, w in enumerate(initial_weights())]
    for (layers,) in gradients:
        theirs.apply_gradients(zip([tf.constant(g) for g in layers], variables, strict=True))
    ours = Run(make, weight_decay=0.02, exclude_from_weight_decay=excluded, **arguments)
    ours.updates(gradients)
    assert_close(ours.weights(), [v.numpy() for v in variables])
