"""Keras's Muon inside `Accumulated` and `VarianceReduced`.

That each gives it the gradient that it should is tested with all of Keras's optimizers, in
`test_accumulated.py` and `test_variance_reduced.py`; here, that matrices get Muon's steps.
"""

import keras
import numpy as np
import pytest
from harness import Run, initial_weights, sub_batch_gradients
from helpers_stock import needs_muon

import tf_lbopt
from benchmarks.references import mean_gradients, muon, variance_reduced

pytestmark = needs_muon

SHAPES = [(6, 5), (4, 9), (5,), (3, 3, 2, 4)]
ARGUMENTS = {"learning_rate": 0.05, "weight_decay": 0.1, "adam_weight_decay": 0.02}


@pytest.mark.parametrize(("replicas", "micro_steps"), [(1, 4), (2, 2), (4, 1)])
@pytest.mark.parametrize("wrapper", ["Accumulated", "VarianceReduced"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.quick(replicas=2, nesterov=True)
def test_equals_the_reference(wrapper, replicas, micro_steps, nesterov):
    """In float64; matrices by Newton and Schulz's iteration, the others by Adam."""
    gradients = sub_batch_gradients(4, 4, SHAPES)
    run = Run(
        lambda **k: getattr(tf_lbopt, wrapper)(
            keras.optimizers.Muon(**ARGUMENTS, nesterov=nesterov), **k
        ),
        replicas,
        micro_steps,
        weights=initial_weights(SHAPES),
    ).updates(gradients)
    seen = variance_reduced if wrapper == "VarianceReduced" else mean_gradients
    expected = muon(initial_weights(SHAPES), seen(gradients), **ARGUMENTS, nesterov=nesterov)
    for got, want in zip(run.weights(), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("wrapper", ["Accumulated", "VarianceReduced"])
@pytest.mark.quick(wrapper="Accumulated")
def test_the_step_of_a_matrix_is_nearly_orthogonal(wrapper):
    """All singular values of a step are of one size, whatever those of the gradient."""
    make = getattr(tf_lbopt, wrapper)
    start = initial_weights([(6, 5)])
    run = Run(
        lambda **k: make(keras.optimizers.Muon(0.05, weight_decay=None, rms_rate=None), **k),
        1,
        4,
        weights=start,
    )
    gradients = sub_batch_gradients(1, 4, [(6, 5)])
    run.updates(gradients)
    step = np.linalg.svd((start[0] - run.weights()[0]) / 0.05, compute_uv=False)
    of_gradient = np.linalg.svd(np.mean([g[0] for g in gradients[0]], 0), compute_uv=False)
    assert of_gradient.max() / of_gradient.min() > 2.5
    assert 0.6 < step.min() <= step.max() < 1.3
