"""Norms, the guards built on them, merging of sparse rows and clipping, against float64 NumPy."""

import functools
import math

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_lbopt import _compat
from tf_lbopt.aggregation.sparse import divide, merge_repeated_indices
from tf_lbopt.rules.clip import clip, scale
from tf_lbopt.rules.norms import all_finite, compute_dtype, global_norm, norms
from tf_lbopt.rules.trust_ratio import trust_ratio

LARGE = 20_000  # above the size from which one pass is tried first

pytestmark = pytest.mark.usefixtures("graph_optimizer")


eager = norms
traced = tf.function(norms)
compiled = tf.function(norms, jit_compile=True)


@functools.partial(tf.function, jit_compile=True, autograph=False)
def compiled_for_tpu(tensors):
    """As on a TPU, which has no float64, but by the XLA of CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_compat, "in_tpu_replica", lambda: True)
        return norms(tensors)


MODES = pytest.mark.parametrize(
    "mode",
    [eager, traced, compiled, compiled_for_tpu],
    ids=["eager", "function", "compiled", "tpu"],
)
MAGNITUDES = [10.0**e for e in (-35, -30, -25, -20, -10, -1, 0, 1, 10, 18, 20, 25, 30, 35)]


def reference(value):
    """In float64 and scaled, so that nothing can be lost."""
    value = np.asarray(value, np.float64).ravel()
    greatest = np.max(np.abs(value), initial=0.0)
    return greatest * np.sqrt(np.sum((value / greatest) ** 2)) if greatest else 0.0


def normal(size, magnitude, dtype=np.float32, seed=0):
    return (magnitude * np.random.default_rng(seed).normal(size=size)).astype(dtype)


# Elements of one magnitude or of several at once.
elements = st.tuples(st.floats(-1, 1), st.integers(-30, 30)).map(lambda x: x[0] * 10.0 ** x[1])
same_magnitude = st.tuples(
    st.integers(-30, 30), st.lists(st.floats(-1, 1), min_size=0, max_size=12)
).map(lambda x: [v * 10.0 ** x[0] for v in x[1]])


@settings(max_examples=150, deadline=None)
@given(st.one_of(same_magnitude, st.lists(elements, max_size=12)))
def test_any_elements(values):
    value = np.asarray(values, np.float32)
    got = norms([tf.constant(value)])[0]
    assert got.dtype == tf.float32
    # What float32 itself can not hold (below 1e-38) is allowed to be lost.
    np.testing.assert_allclose(float(got), reference(value), rtol=1e-6, atol=1e-37)


@settings(max_examples=100, deadline=None)
@given(same_magnitude)
def test_any_float64_elements(values):
    got = norms([tf.constant(values, tf.float64)])[0]
    assert got.dtype == tf.float64
    np.testing.assert_allclose(float(got), reference(values), rtol=1e-13, atol=1e-150)


@MODES
@pytest.mark.parametrize("size", [7, LARGE])
def test_magnitudes(mode, size):
    for magnitude in MAGNITUDES:
        value = normal(size, magnitude)
        (got,) = mode([tf.constant(value)])
        np.testing.assert_allclose(float(got), reference(value), rtol=2e-6)


@MODES
@pytest.mark.parametrize("dtype", [tf.bfloat16, tf.float16])
@pytest.mark.parametrize("size", [7, LARGE])
def test_half_precision_is_computed_in_float32(mode, dtype, size):
    for magnitude in (1e-3, 1.0, 1e3):  # squares of 1e3 overflow float16
        value = tf.cast(normal(size, magnitude), dtype)
        (got,) = mode([value])
        assert got.dtype == tf.float32
        exact = reference(tf.cast(value, tf.float64))
        np.testing.assert_allclose(float(got), exact, rtol=2e-6)


@MODES
@pytest.mark.parametrize("size", [7, LARGE])
def test_float64(mode, size):
    for magnitude in (1e-300, 1e-150, 1e-100, 1e-30, 1.0, 1e30, 1e100, 1e160, 1e300):
        value = normal(size, magnitude, np.float64)
        (got,) = mode([tf.constant(value)])
        assert got.dtype == tf.float64
        np.testing.assert_allclose(float(got), reference(value), rtol=1e-12)


@MODES
def test_large_tensors_of_all_magnitudes_at_once(mode):
    mixed = np.concatenate([normal(LARGE, 1e-25), normal(LARGE, 1.0), normal(3, 1e25)])
    values = [
        normal(LARGE, 1e-25),
        normal((100, 200), 1e25),
        mixed,
        mixed[: 2 * LARGE],
        np.zeros(LARGE, np.float32),
        normal(5, 1e-28),
        np.zeros(3, np.float32),
        normal(LARGE, 3.0),
        np.float32(-2.5),
    ]
    got = mode([tf.constant(value) for value in values])
    expected = [reference(value) for value in values]
    np.testing.assert_allclose([float(g) for g in got], expected, rtol=2e-6)


@MODES
def test_sum_of_squares_at_the_bounds_of_one_pass(mode):
    for total in (1e-21, 0.9e-20, 1.1e-20, 0.9e37, 1.1e37, 1e38, 1e39):
        value = np.full(LARGE, math.sqrt(total / LARGE), np.float32)
        (got,) = mode([tf.constant(value)])
        np.testing.assert_allclose(float(got), reference(value), rtol=2e-6)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_unknown_shape(jit_compile):
    traced_norm = tf.function(
        lambda value: norms([value])[0],
        input_signature=[tf.TensorSpec(None, tf.float32)],
        jit_compile=jit_compile,
    )
    for value in (normal((2, 3), 1e-28), normal((4, 5, 6), 1e28), np.zeros(3, np.float32)):
        np.testing.assert_allclose(float(traced_norm(value)), reference(value), rtol=2e-6)


@MODES
def test_sparse(mode):
    values = normal((4, 3), 1e-26)
    slices = tf.IndexedSlices(tf.constant(values), tf.constant([5, 1, 0, 9]), tf.constant([10, 3]))
    empty = tf.IndexedSlices(
        tf.zeros([0, 3]), tf.zeros([0], tf.int64), tf.constant([10, 3], tf.int64)
    )
    got = mode([slices, empty])
    np.testing.assert_allclose(float(got[0]), reference(values), rtol=2e-6)
    assert float(got[1]) == 0.0


def with_elements(size, fill, *others):
    value = np.full(size, fill, np.float32)
    for index, other in others:
        value[index] = other
    return value


NOT_FINITE = {
    f"{bad}-{label}": value
    for bad in (math.nan, math.inf, -math.inf)
    for label, value in {
        "alone": with_elements(1, bad),
        "all": with_elements(3, bad),
        "all, large": with_elements(LARGE, bad),
        "first of zeros": with_elements(2, 0.0, (0, bad)),
        "last of zeros": with_elements(2, 0.0, (-1, bad)),
        "amid ones": with_elements(5, 1.0, (2, bad)),
        "first of zeros, large": with_elements(LARGE, 0.0, (0, bad)),
        "last of zeros, large": with_elements(LARGE, 0.0, (-1, bad)),
        "amid tiny, large": with_elements(LARGE, 1e-25, (99, bad)),
        "amid ones, large": with_elements(LARGE, 1.0, (99, bad)),
        "amid huge, large": with_elements(LARGE, 1e25, (99, bad)),
    }.items()
}
NOT_FINITE["nan-and inf"] = np.array([0.0, math.nan, math.inf], np.float32)


@MODES
@pytest.mark.parametrize("name", NOT_FINITE)
def test_not_finite(mode, name):
    (got,) = mode([tf.constant(NOT_FINITE[name])])
    assert not math.isfinite(float(got)), f"{float(got)}: a non-finite gradient goes unnoticed"


@MODES
@pytest.mark.parametrize("dtype", [tf.float64, tf.float16, tf.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite_in_other_dtypes(mode, dtype, bad):
    for value in ([bad], [bad, 0.0], [0.0, bad], [1.0, bad, 2.0]):
        (got,) = mode([tf.constant(value, dtype)])
        assert not math.isfinite(float(got))


def test_a_bad_layer_does_not_spoil_the_others_norm():
    bad, good = with_elements(LARGE, 1.0, (7, math.nan)), normal(LARGE, 2.0)
    got = norms([tf.constant(bad), tf.constant(good)])
    assert math.isnan(float(got[0]))
    np.testing.assert_allclose(float(got[1]), reference(good), rtol=2e-6)


@pytest.mark.parametrize(
    ("layer_norms", "expected"),
    [
        ([0.0, 1.0, 3e38], True),
        ([0.0], True),
        ([math.nan], False),
        ([1.0, math.inf, 2.0], False),
        ([1.0, 2.0, math.nan], False),
    ],
)
def test_all_finite(layer_norms, expected):
    assert bool(all_finite(tf.constant(layer_norms))) is expected
    assert bool(all_finite(norms([tf.constant(1.0, tf.float64), layer_norms]))) is expected


@pytest.mark.parametrize("jit_compile", [None, False, True])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-20, 1.0, 1e20, 1e30])
def test_global_norm(jit_compile, magnitude):
    function = global_norm
    if jit_compile is not None:
        function = tf.function(global_norm, jit_compile=jit_compile)
    layer_norms = [3.0 * magnitude, 4.0 * magnitude, 0.0, 12.0 * magnitude]
    got = function(tf.constant(layer_norms))
    np.testing.assert_allclose(float(got), 13.0 * magnitude, rtol=1e-6)


def test_global_norm_of_zeros_and_of_mixed_dtypes():
    assert float(global_norm(tf.zeros([3]))) == 0.0
    got = global_norm(norms([tf.constant(3.0), tf.constant(4.0, tf.float64)]))
    assert got.dtype == tf.float64
    assert float(got) == pytest.approx(5.0, rel=1e-15)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [3, LARGE])
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-12, 1.0, 1e25])
@pytest.mark.parametrize("on_tpu", [False, True])
def test_compiled_norms_of_what_the_compiler_knows(value, size, dtype, on_tpu, monkeypatch):
    monkeypatch.setattr(_compat, "in_tpu_replica", lambda: on_tpu)
    known = np.full(size, value, dtype)
    of_known = tf.function(lambda x: norms([tf.constant(known), x]), jit_compile=True)
    for other in ([3.0, 4.0], [3e30, 4e30]):
        got = of_known(tf.constant(other, dtype))
        np.testing.assert_allclose(got[0], reference(known), rtol=1e-6)
        np.testing.assert_allclose(got[1], reference(other), rtol=1e-6)
    assert math.isnan(float(of_known(tf.constant([math.nan, 1.0], dtype))[1]))


def test_compute_dtype():
    expected = {"bfloat16": "float32", "float16": "float32", "float32": "float32",
                "float64": "float64"}  # fmt: skip
    for dtype, result in expected.items():
        assert compute_dtype(tf.as_dtype(dtype)) == tf.as_dtype(result)


# -- sparse rows -----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 5), max_size=12),
    st.integers(1, 3),
    st.sampled_from([tf.int32, tf.int64]),
)
def test_merging_repeated_indices(indices, width, dtype):
    values = normal((len(indices), width), 1.0)
    merged = merge_repeated_indices(
        tf.IndexedSlices(
            tf.constant(values), tf.constant(indices, dtype), tf.constant([6, width], dtype)
        )
    )
    got = merged.indices.numpy().tolist()
    assert sorted(got) == sorted(set(indices))
    table = np.zeros((6, width))
    np.add.at(table, np.asarray(indices, int), values)
    np.testing.assert_allclose(merged.values.numpy(), table[got], rtol=1e-5, atol=1e-6)
    assert merged.dense_shape.numpy().tolist() == [6, width]
    np.testing.assert_allclose(float(norms([merged])[0]), reference(table), rtol=1e-5, atol=1e-6)


def test_dense_gradients_are_not_merged():
    gradient = tf.constant([1.0, 1.0])
    assert merge_repeated_indices(gradient) is gradient


def test_division_and_scaling():
    slices = tf.IndexedSlices(tf.constant([[2.0], [4.0]]), tf.constant([3, 1]), tf.constant([5, 1]))
    for got in (divide(slices, tf.constant(2.0)), scale(slices, tf.constant(0.5))):
        assert got.values.numpy().tolist() == [[1.0], [2.0]]
        assert got.indices.numpy().tolist() == [3, 1]
        assert got.dense_shape.numpy().tolist() == [5, 1]
    got = divide(tf.constant([2.0], tf.float64), tf.constant(2.0))
    assert got.dtype == tf.float64
    assert got.numpy().tolist() == [1.0]


# -- trust ratio -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [tf.float32, tf.float64])
@pytest.mark.parametrize(
    ("weight_norm", "update_norm", "coefficient", "expected"),
    [
        (3.0, 2.0, 1.0, 1.5),
        (3.0, 2.0, 0.001, 0.0015),
        (0.0, 2.0, 0.001, 1.0),
        (3.0, 0.0, 0.001, 1.0),
        (0.0, 0.0, 0.001, 1.0),
        (1e-20, 1e-25, 1.0, 1e5),
        (1e-25, 1e-20, 0.5, 0.5e-5),
        (1e25, 1e20, 1.0, 1e5),
    ],
)
def test_trust_ratio(dtype, weight_norm, update_norm, coefficient, expected):
    arguments = tf.constant(weight_norm, dtype), tf.constant(update_norm, dtype)
    ratio = functools.partial(trust_ratio, coefficient=coefficient)
    for function in (ratio, tf.function(ratio), tf.function(ratio, jit_compile=True)):
        got = function(*arguments)
        assert got.dtype == dtype
        assert float(got) == pytest.approx(expected, rel=1e-6)


# -- clipping --------------------------------------------------------------------------------------


def layers(sparse):
    values = [normal((4, 3), 2.0), normal((5,), 0.01, seed=1), np.zeros((2, 2), np.float32)]
    gradients = [tf.constant(v) for v in values]
    if sparse:
        gradients[0] = tf.IndexedSlices(
            gradients[0], tf.constant([7, 2, 0, 5]), tf.constant([9, 3])
        )
    return [v.astype(np.float64) for v in values], gradients


def clip_in_numpy(values, clipnorm=None, clipvalue=None, global_clipnorm=None):
    if clipvalue is not None:
        return [np.clip(v, -clipvalue, clipvalue) for v in values]
    sizes = [np.linalg.norm(v) for v in values]
    if clipnorm is not None:
        return [v * min(1.0, clipnorm / s) if s else v for v, s in zip(values, sizes, strict=True)]
    if global_clipnorm is not None:
        factor = min(1.0, global_clipnorm / np.sqrt(np.sum(np.square(sizes))))
        return [v * factor for v in values]
    return values


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("kind", ["clipnorm", "clipvalue", "global_clipnorm", None])
@pytest.mark.parametrize("limit", [1e-3, 0.5, 1e3])
def test_clip(sparse, kind, limit):
    values, gradients = layers(sparse)
    limits = {kind: limit} if kind else {}
    expected = clip_in_numpy(values, **limits)
    for jit_compile in (None, False, True):
        function = functools.partial(clip, **limits)
        if jit_compile is not None:
            function = tf.function(function, jit_compile=jit_compile)
        clipped, clipped_norms = function(gradients, norms(gradients))
        assert isinstance(clipped[0], tf.IndexedSlices) is sparse
        if sparse:
            assert clipped[0].indices.numpy().tolist() == [7, 2, 0, 5]
            assert clipped[0].dense_shape.numpy().tolist() == [9, 3]
        got = [c.values if isinstance(c, tf.IndexedSlices) else c for c in clipped]
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_allclose(one.numpy(), other, rtol=2e-6)
        sizes = [np.linalg.norm(e) for e in expected]
        np.testing.assert_allclose(clipped_norms, sizes, rtol=2e-6)


@pytest.mark.parametrize("kind", ["clipnorm", "clipvalue", "global_clipnorm"])
@pytest.mark.parametrize("dtype", [tf.float32, tf.float64])
@pytest.mark.parametrize("magnitude", [1e-28, 1e28])
def test_clip_at_extreme_magnitudes_keeps_the_dtype(kind, dtype, magnitude):
    gradient = tf.constant([3.0 * magnitude, -4.0 * magnitude], dtype)
    clipped, _ = clip([gradient], norms([gradient]), **{kind: 1.0})
    assert clipped[0].dtype == dtype
    expected = clip_in_numpy([np.array([3.0, -4.0]) * magnitude], **{kind: 1.0})
    np.testing.assert_allclose(clipped[0].numpy(), expected[0], rtol=2e-6)


def test_global_clip_of_mixed_dtypes():
    gradients = [tf.constant([3.0]), tf.constant([4.0], tf.float64)]
    clipped, clipped_norms = clip(gradients, norms(gradients), global_clipnorm=1.0)
    assert [c.dtype for c in clipped] == [tf.float32, tf.float64]
    assert [float(c[0]) for c in clipped] == pytest.approx([0.6, 0.8], rel=1e-6)
    assert [float(n) for n in clipped_norms] == pytest.approx([0.6, 0.8], rel=1e-6)
