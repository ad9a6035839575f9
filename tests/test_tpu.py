"""Under TPUStrategy: everything traces, and a replica computes what MirroredStrategy's would.

Traced by the real `tf.distribute.TPUStrategy`, on devices that do not exist; run by threads, whose
sums stand for the TPU's. Nothing here is evidence about a TPU itself.
"""

import numpy as np
import pytest
import tensorflow as tf
from harness import CASES, assert_replicas_identical, initial_weights, sub_batch_gradients
from harness_tpu import TPURun, operations
from references import reference
from tensorflow.core.framework import types_pb2

KINDS = [case for case in CASES if case.name in ("lamb", "vr_lamb", "clars", "extrap_adam")]


def _check(function):
    """That a traced step sums over the replicas, and has nothing that TPUs are bad at."""
    nodes = operations(function)
    assert any(node.op == "CrossReplicaSum" for node in nodes)
    # XLA emulates divisions of 64-bit integers, and looks for repeated indices in a loop.
    of_int64 = [n.op for n in nodes if n.attr["T"].type == types_pb2.DT_INT64]
    assert not {"FloorMod", "FloorDiv", "Mod", "Div", "TruncateDiv"} & set(of_int64)
    assert not any(node.op.startswith("Unique") for node in nodes)


def _gradients(micro_steps, sparse):
    gradients = sub_batch_gradients(3, 2 * micro_steps)
    if sparse:
        for sub_batch in (layers for update in gradients for layers in update):
            rows = [0, 3, 3, 1] if sub_batch is gradients[0][0] else [5, 1, 3, 5]
            values = tf.constant(sub_batch[0][: len(rows)])
            sub_batch[0] = tf.IndexedSlices(values, tf.constant(rows), tf.constant([6, 5]))
    return gradients


def _dense(gradient):
    return np.array(tf.convert_to_tensor(gradient))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("micro_steps", [1, 2])
@pytest.mark.parametrize("case", KINDS, ids=repr)
def test_values(case, micro_steps, sparse):
    gradients = _gradients(micro_steps, sparse)
    run = TPURun(case, 2, micro_steps).updates(gradients)
    assert_replicas_identical(run)
    dense = [[[_dense(g) for g in layers] for layers in update] for update in gradients]
    expected = reference(case.name, initial_weights(), dense, **case.arguments)
    for value, reference_value in zip(run.weights(), expected, strict=True):
        np.testing.assert_allclose(value, reference_value, rtol=2e-5, atol=2e-6)
    _check(run.function)
