"""What the count of launches says of graphs whose launches are known."""

import numpy as np
import pytest
import tensorflow as tf

from benchmarks import graph_counts
from benchmarks.contenders import contenders
from benchmarks.shapes import tiny

pytestmark = pytest.mark.skipif(
    not graph_counts._has_gpu_kernel("MatMul"), reason="this TensorFlow knows no GPU kernels"
)


def counted(function, *arguments, **options):
    return graph_counts.counted(tf.function(function).get_concrete_function(*arguments), **options)


def test_operations_conditions_and_programs():
    x = tf.ones([3])
    assert counted(lambda x: tf.exp(x) + x, x) == graph_counts.Counts(launches=2)
    assert counted(lambda x: tf.unstack(x), x) == graph_counts.Counts(launches=3)
    assert counted(tf.strings.as_string, x) == graph_counts.Counts(on_host=1)
    rows, columns = (lambda x, axis=axis: tf.unstack(x, axis=axis) for axis in (0, 1))
    assert counted(rows, tf.ones([2, 16])) == graph_counts.Counts()
    assert counted(rows, tf.ones([2, 15])) == graph_counts.Counts(launches=2)
    assert counted(columns, tf.ones([16, 2])) == graph_counts.Counts(launches=2)
    compiled = tf.function(lambda x: tf.exp(x) + x, jit_compile=True)
    assert counted(compiled, x) == graph_counts.Counts(launches=1, programs=1)


def test_rows_of_whole_64_bytes_are_where_they_were():
    rows = tf.unstack(tf.ones([2, 16]))
    first, second = (np.asarray(memoryview(row)).ctypes.data for row in rows)
    assert second - first == 64


@pytest.mark.parametrize(
    ("largest", "rare", "launches"), [(True, 0, 3), (False, 0, 0), (True, 1, 0)]
)
def test_of_a_condition_one_branch_counts(largest, rare, launches):
    def either(x):
        name = "rarely" if rare else None
        return tf.cond(x[0] > 0, lambda: tf.exp(tf.exp(tf.exp(x))), lambda: x, name=name)

    outside = counted(lambda x: x[0] > 0, tf.ones([3]))
    found = counted(either, tf.ones([3]), largest=largest)
    assert found == outside + graph_counts.Counts(launches=launches, waits=1)


def test_updates():
    known = {contender.name: contender for contender in contenders(0.0, replicas=1)[0]}
    shapes = tiny()
    sgd = graph_counts.of_update(known["keras_sgd"], shapes, compiled=False)
    # Four for each variable, and two of the rate and the counter.
    assert sgd == graph_counts.Counts(launches=4 * len(shapes) + 2)
    for name in ("lars", "vr_lamb"):
        compiled = graph_counts.of_update(known[name], shapes, compiled=True)
        plain = graph_counts.of_update(known[name], shapes, compiled=False)
        assert compiled.launches < plain.launches / 3
        assert compiled.programs >= 1
        assert plain.programs == 0


@pytest.mark.parametrize(
    ("name", "waits"), [("sngm", 2), ("lars", 2), ("adam", 3), ("lamb", 3), ("vr_lamb", 8)]
)
def test_waits(name, waits):
    """For norms that are taken together, for the update, and what docs/accelerators.md lists."""
    known = {contender.name: contender for contender in contenders(0.01, replicas=1)[0]}
    found = graph_counts.of_update(known[name], [(300, 300), (9,)], compiled=False)
    assert found.waits == waits
