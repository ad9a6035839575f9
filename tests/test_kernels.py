"""The in-place primitives against their pure twins and against float64 NumPy."""

import functools
import os
import pathlib

import numpy as np
import pytest
import tensorflow as tf

from tf_lbopt import _compat
from tf_lbopt.rules.moments import RunningMean, adam, moments
from tf_lbopt.rules.momentum import heavy_ball, velocity
from tf_lbopt.rules.norms import compute_dtype
from tf_lbopt.rules.writer import Writer

SHAPE = (7, 5)
STEPS = 5
# Per dtype, of what is stored: half precision rounds every stored value, and so does the reference.
TOLERANCE = {"float64": 1e-12, "float32": 3e-6, "float16": 2**-10, "bfloat16": 2**-7}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE)
MODES = pytest.mark.parametrize("mode", ["eager", "function", "compiled"])


def writer():
    return Writer(tf.constant(True) if _compat.in_xla_context() else None)


def apply_heavy_ball(variable, slot, d, rate, momentum):
    """By `Writer.heavy_ball`, of numbers in the dtype of the direction."""
    writer().heavy_ball(variable, slot, d, tf.cast(rate, d.dtype), tf.constant(momentum, d.dtype))


def apply_velocity(variable, slot, d, rate, momentum, nesterov=False):
    rate, momentum = tf.cast(rate, d.dtype), tf.constant(momentum, d.dtype)
    writer().velocity(variable, slot, d, rate, momentum, nesterov)


def apply_delta(variable, d, factor):
    writer().subtract(variable, d, tf.cast(-factor, d.dtype))


def apply_adam_moments(m, v, gradient, first, second, epsilon, offset=None):
    epsilon_tensor = tf.constant(epsilon, gradient.dtype)
    return writer().adam(
        m, v, gradient, first, second, epsilon_tensor, offset, least_epsilon=epsilon
    )


def in_mode(mode, function):
    if mode == "eager":
        return function
    return tf.function(function, jit_compile=mode == "compiled", autograph=False)


def stored(value, dtype):
    """What is left of a float64 array when it is stored in a dtype."""
    return np.asarray(value, np.float64).astype(tf.as_dtype(dtype).as_numpy_dtype).astype(float)


def start(dtype, seed=0):
    return stored(np.random.default_rng(seed).normal(size=SHAPE), dtype)


def directions(dtype):
    """One per step, of the dtype that arithmetic is done in."""
    rng = np.random.default_rng(5)
    wide = compute_dtype(tf.as_dtype(dtype)).name
    return [stored((1.0 + t) * rng.normal(size=SHAPE), wide) for t in range(STEPS)], wide


def assert_close(variable, expected, dtype):
    tolerance = TOLERANCE[dtype]
    got = tf.cast(tf.convert_to_tensor(variable), tf.float64).numpy()
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=4 * tolerance)


RATES = [0.3, 0.2, 0.1, 0.0, 0.05]


def heavy_ball_in_numpy(w, u, d, rate, momentum):
    u = momentum * u + d
    return w - rate * u, u


def velocity_in_numpy(w, v, d, rate, momentum, nesterov):
    v = momentum * v - rate * d
    return w + (momentum * v - rate * d if nesterov else v), v


def pure_heavy_ball(u, d, rate, momentum):
    """The new slot, and what is added to the weights."""
    u = heavy_ball(u, d, momentum)
    return u, -rate * u


def pure_velocity(v, d, rate, momentum, nesterov):
    v = velocity(v, d, rate, momentum)
    return v, velocity(v, d, rate, momentum) if nesterov else v


def pure_adam(m, v, gradient, first, second, epsilon):
    m, v = moments(m, v, gradient, first, second)
    return m, v, adam(m, v, first, second, epsilon)


MOMENTA = {
    "heavy_ball": (apply_heavy_ball, heavy_ball_in_numpy, pure_heavy_ball),
    "velocity": (
        apply_velocity,
        functools.partial(velocity_in_numpy, nesterov=False),
        functools.partial(pure_velocity, nesterov=False),
    ),
    "nesterov": (
        functools.partial(apply_velocity, nesterov=True),
        functools.partial(velocity_in_numpy, nesterov=True),
        functools.partial(pure_velocity, nesterov=True),
    ),
}
over_momenta = pytest.mark.parametrize("name", MOMENTA)


@over_momenta
@DTYPES
@MODES
def test_momentum_in_place(name, dtype, mode):
    in_place, in_numpy, _ = MOMENTA[name]
    w, u = start(dtype), start(dtype, seed=1)
    steps, wide = directions(dtype)
    variable, slot = tf.Variable(w, dtype=dtype), tf.Variable(u, dtype=dtype)
    update = in_mode(mode, lambda d, rate: in_place(variable, slot, d, rate, 0.9))
    for d, rate in zip(steps, RATES, strict=True):
        update(tf.constant(d, wide), tf.constant(rate, tf.float32))
        w, u = in_numpy(w, u, d, float(np.float32(rate)), 0.9)
        w, u = stored(w, dtype), stored(u, dtype)
        # float64 computes with a rate that has gone through float32, and so does the reference.
        assert_close(variable, w, dtype)
        assert_close(slot, u, dtype)


@over_momenta
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_pure_momentum(name, dtype):
    _, in_numpy, pure = MOMENTA[name]
    w, u, d = (start(dtype, seed) for seed in range(3))
    slot, delta = pure(tf.constant(u, dtype), tf.constant(d, dtype), tf.constant(0.3, dtype), 0.9)
    new_w, new_u = in_numpy(w, u, d, 0.3, 0.9)
    assert_close(slot, new_u, dtype)
    assert_close(w + tf.cast(delta, tf.float64), new_w, dtype)


@over_momenta
@DTYPES
@MODES
def test_in_place_equals_its_pure_twin(name, dtype, mode):
    in_place, _, pure = MOMENTA[name]
    (d, *_), wide = directions(dtype)
    variable, slot = (tf.Variable(start(dtype, seed), dtype=dtype) for seed in (0, 1))
    rate = tf.constant(0.3, wide)
    pure_slot, delta = pure(tf.cast(slot, wide), tf.constant(d, wide), rate, 0.9)
    pure_weights = tf.cast(tf.cast(variable, wide) + delta, dtype)
    in_mode(mode, lambda g: in_place(variable, slot, g, rate, 0.9))(tf.constant(d, wide))
    assert_close(slot, tf.cast(tf.cast(pure_slot, dtype), tf.float64), dtype)
    assert_close(variable, tf.cast(pure_weights, tf.float64), dtype)


@pytest.mark.parametrize("in_place", [apply_heavy_ball, apply_velocity])
@DTYPES
def test_no_slot_without_momentum(in_place, dtype):
    w = start(dtype)
    (d, *_), wide = directions(dtype)
    variable = tf.Variable(w, dtype=dtype)
    in_place(variable, None, tf.constant(d, wide), tf.constant(0.25), 0.0)
    assert_close(variable, stored(w - 0.25 * d, dtype), dtype)


@DTYPES
@MODES
def test_apply_delta(dtype, mode):
    w = start(dtype)
    steps, wide = directions(dtype)
    variable = tf.Variable(w, dtype=dtype)
    update = in_mode(mode, lambda d, factor: apply_delta(variable, d, factor))
    for d, factor in zip(steps, (-0.5, 0.25, 0.0, 2.0, -1.0), strict=True):
        update(tf.constant(d, wide), tf.constant(factor))
        w = stored(w + factor * d, dtype)
        assert_close(variable, w, dtype)


# -- Adam ------------------------------------------------------------------------------------------

BETAS = (0.9, 0.999)
EPSILON = 1e-3  # large enough to show where it is added


def adam_in_numpy(m, v, g, step, wide):
    # The coefficients as the dtype has them: 1 − 0.999 is off by 1e-5 in float32.
    beta_1, beta_2 = (float(np.asarray(beta, wide)) for beta in BETAS)
    m = beta_1 * m + (1 - beta_1) * g
    v = beta_2 * v + (1 - beta_2) * g * g
    m_hat, v_hat = m / (1 - beta_1**step), v / (1 - beta_2**step)
    return m, v, m_hat / (np.sqrt(v_hat) + EPSILON)


def means(step, betas=BETAS):
    """The running means of both moments, of tensors for a tensor and of floats for a float."""
    if isinstance(step, tf.Tensor):
        betas = [tf.constant(beta, step.dtype) for beta in betas]
    return [RunningMean(beta, step) for beta in betas]


def assert_direction(got, direction, offset, wide):
    # Bias correction: 1 − β₂ᵗ is known to one rounding of β₂ᵗ, 6e-8 of 1e-3 in float32.
    tolerance = 1e-11 if wide == "float64" else 3e-5
    error = np.abs(got.numpy() - (direction + offset))
    assert np.max(error / (np.abs(direction) + np.abs(offset))) < tolerance


@pytest.mark.parametrize("with_offset", [False, True])
@DTYPES
@MODES
def test_adam_in_place(with_offset, dtype, mode):
    m, v = np.zeros(SHAPE), np.zeros(SHAPE)
    gradients, wide = directions(dtype)
    # Slots are of the dtype of the arithmetic, those of half-precision variables too.
    first, second = tf.Variable(m, dtype=wide), tf.Variable(v, dtype=wide)
    offset = start(wide, seed=9) if with_offset else None

    def update(gradient, step):
        return apply_adam_moments(
            first, second, gradient, *means(step), EPSILON,
            offset=None if offset is None else tf.constant(offset, wide),
        )  # fmt: skip

    update = in_mode(mode, update)
    for step, gradient in enumerate(gradients, start=1):
        m, v = (tf.cast(s, tf.float64).numpy() for s in (first, second))
        got = update(tf.constant(gradient, wide), tf.constant(step, wide))
        m, v, expected = adam_in_numpy(m, v, gradient, step, wide)
        assert got.dtype == tf.as_dtype(wide)
        assert_direction(got, expected, 0.0 if offset is None else offset, wide)
        for slot, value in ((first, m), (second, v)):
            np.testing.assert_allclose(
                tf.cast(slot, tf.float64).numpy(), value, rtol=TOLERANCE[wide], atol=1e-12
            )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@MODES
def test_adam_equals_its_pure_twin(dtype, mode):
    gradients, wide = directions(dtype)
    first, second = (tf.Variable(tf.zeros(SHAPE, dtype)) for _ in range(2))
    m, v = tf.zeros(SHAPE, dtype), tf.zeros(SHAPE, dtype)
    update = in_mode(
        mode, lambda g, step: apply_adam_moments(first, second, g, *means(step), EPSILON)
    )
    for number, gradient in enumerate(gradients, start=1):
        gradient, step = tf.constant(gradient, wide), tf.constant(number, wide)
        m, v, expected = pure_adam(m, v, gradient, *means(step), EPSILON)
        got = update(gradient, step)
        tolerance = 1e-12 if dtype == "float64" else 2e-6
        np.testing.assert_allclose(got.numpy(), expected.numpy(), rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(first.numpy(), m.numpy(), rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(second.numpy(), v.numpy(), rtol=tolerance, atol=tolerance)


@MODES
def test_adams_first_direction_is_the_sign(mode):
    first, second = tf.Variable(tf.zeros([4])), tf.Variable(tf.zeros([4]))
    update = in_mode(
        mode,
        lambda g: apply_adam_moments(first, second, g, *means(tf.constant(1.0)), 0.0),
    )
    got = update(tf.constant([1e-3, -7.0, 1e4, -1e-8]))
    np.testing.assert_allclose(got.numpy(), [1.0, -1.0, 1.0, -1.0], rtol=1e-5)


@pytest.mark.parametrize("mode", ["eager", "function"])
def test_two_layers_do_not_share_scratch_memory(mode):
    """Each call has scratch memory of its own, even of equal shape in one graph."""
    slots = [tf.Variable(tf.zeros([3])) for _ in range(4)]

    def update(one, other):
        shared = means(tf.constant(1.0))
        a = apply_adam_moments(slots[0], slots[1], one, *shared, 0.0)
        b = apply_adam_moments(slots[2], slots[3], other, *shared, 0.0, offset=10.0 * one)
        return a, b

    update = in_mode(mode, update)
    for _ in range(3):
        a, b = update(tf.constant([1.0, 1.0, 1.0]), tf.constant([-2.0, -2.0, -2.0]))
        np.testing.assert_allclose(a.numpy(), [1.0] * 3, rtol=1e-3)
        np.testing.assert_allclose(b.numpy(), [9.0] * 3, rtol=1e-3)
        for slot in slots:
            slot.assign(tf.zeros([3]))


def resident_bytes():
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(
    not pathlib.Path("/proc/self/statm").exists(), reason="no /proc to read the memory in use from"
)
@pytest.mark.parametrize("mode", ["eager", "function"])
def test_scratch_memory_is_given_back(mode):
    size = 1_000_000
    first, second = tf.Variable(tf.zeros([size])), tf.Variable(tf.zeros([size]))
    gradient, step = tf.ones([size]), tf.constant(1.0)
    update = in_mode(mode, lambda g: apply_adam_moments(first, second, g, *means(step), EPSILON))
    for _ in range(10):
        update(gradient)
    before = resident_bytes()
    for _ in range(200):
        update(gradient)
    grown = resident_bytes() - before
    assert grown < 20 * 4 * size, f"{grown / 2**20:.0f} MiB more after 200 updates"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("offset", [False, True], ids=["alone", "with offset"])
@pytest.mark.parametrize("function", [lambda f: f, tf.function], ids=["eager", "traced"])
def test_adam_of_a_large_variable_equals_its_pure_twin(dtype, offset, function):
    """Large ones go through the fused kernel and a scratch variable, small ones do not."""
    rng = np.random.default_rng(0)
    shape = (150, 200)
    m, v = (tf.Variable(tf.zeros(shape, dtype)) for _ in range(2))
    pure_m, pure_v = np.zeros(shape), np.zeros(shape)

    @function
    def step(gradient, number, added):
        return apply_adam_moments(
            m, v, gradient, *means(number, (0.9, 0.99)), 1e-4, offset=added if offset else None
        )

    tolerance = {"float32": 2e-5, "float64": 1e-12}[dtype]
    for t in range(1, 5):
        gradient = rng.normal(size=shape).astype(dtype)
        added = rng.normal(size=shape).astype(dtype)
        got = step(tf.constant(gradient), tf.constant(t, dtype), tf.constant(added))
        pure_m, pure_v, direction = pure_adam(
            pure_m, pure_v, gradient.astype("float64"), *means(t, (0.9, 0.99)), 1e-4
        )
        expected = direction + added if offset else direction
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(m, pure_m, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(v, pure_v, rtol=tolerance, atol=tolerance)
