"""An update of VRSGD from a sparse gradient takes memory for its rows, not for the table."""

import gc
import json
import math
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROWS, WIDTH, LOOKED_UP = 1_000_000, 16, 1_000
TABLE_MIB = ROWS * WIDTH * 4 / 2**20
LEARNING_RATE = 0.1
WARM_UP, MEASURED = 3, 10
MEMORY_CAN_BE_MEASURED = all(
    pathlib.Path(f"/proc/self/{name}").exists() for name in ("clear_refs", "smaps")
)


# -- in a process of its own -----------------------------------------------------------------------


def forget_touched_pages():
    pathlib.Path("/proc/self/clear_refs").write_text("1", encoding="utf-8")


def touched_mib():
    """How much of the process's own memory was read or written since.

    With oneDNN TensorFlow keeps freed buffers of this size for the next operation that wants one,
    so neither the resident nor the peak memory shows whether an update makes tables: the pages
    touched do.
    """
    own, touched = False, 0
    for line in pathlib.Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        name, *values = line.split()
        if "-" in name and not name.endswith(":"):
            own = len(values) < 5  # no file behind it
        elif name == "Referenced:" and own:
            touched += int(values[0])
    return touched / 1024


def random_rows(rng):
    """Rows of one sub-batch, some of them twice, and their gradients.

    All lie in a twentieth of the table, so that few of its pages are touched.
    """
    indices = rng.integers(0, ROWS // 20, size=LOOKED_UP)
    indices[:100] = indices[100:200]
    values = 1.0 + rng.normal(size=(LOOKED_UP, WIDTH))
    return indices, values.astype("float32")


def table_sized_outputs(concrete_function):
    """Operations, in the function and those it calls, that produce a tensor of the table's size."""
    from harness import graph_nodes

    nodes = graph_nodes(concrete_function, add_shapes=True)
    assert sum(bool(node.attr["_output_shapes"].list.shape) for node in nodes) > len(nodes) // 2
    found = []
    for node in nodes:
        for shape in node.attr["_output_shapes"].list.shape:
            sizes = [dimension.size for dimension in shape.dim]
            if sizes and -1 not in sizes and np.prod(sizes) >= ROWS:
                found.append(f"{node.op} {node.name} {sizes}")
    return found


def expected_rows(weights, updates):
    """The rows that were looked up, by the reference, on no more than these rows."""
    from benchmarks.references import reference

    rows = np.unique([indices for update in updates for indices, _ in update])
    dense = []
    for update in updates:
        sub_batches = []
        for indices, values in update:
            gradient = np.zeros((len(rows), WIDTH))
            np.add.at(gradient, np.searchsorted(rows, indices), values)
            sub_batches.append([gradient])
        dense.append(sub_batches)
    (result,) = reference("vr_sgd", [weights[rows]], dense, learning_rate=LEARNING_RATE)
    return rows, result


def measure(replicas, micro_steps, weight_decay):
    import tensorflow as tf
    from harness import Run

    import tf_lbopt

    rng = np.random.default_rng(0)
    number = WARM_UP + (1 if weight_decay else MEASURED)  # one touches the whole table
    updates = [[random_rows(rng) for _ in range(replicas * micro_steps)] for _ in range(number)]
    weights = rng.standard_normal((ROWS, WIDTH), dtype=np.float32)
    run = Run(
        tf_lbopt.VRSGD,
        replicas,
        micro_steps,
        weights=[weights],
        learning_rate=LEARNING_RATE,
        weight_decay=weight_decay,
    )

    def slices(indices, values):
        return tf.IndexedSlices(
            tf.constant(values), tf.constant(indices), tf.constant([ROWS, WIDTH], tf.int64)
        )

    def do(some):
        for update in some:
            run.update([[slices(*sub_batch)] for sub_batch in update])

    # The first scatter into a variable may copy it, once and for all.
    do(updates[:WARM_UP])
    record = {"traces": run.traces}
    gc.disable()  # a full collection, due now and then, touches all of Python's objects
    if MEMORY_CAN_BE_MEASURED:
        forget_touched_pages()
    do(updates[WARM_UP:])
    if MEMORY_CAN_BE_MEASURED:
        record["touched"] = touched_mib()
    gc.enable()
    record["retraced"] = run.traces != record["traces"]
    functions = run._step._list_all_concrete_functions()
    record["table_sized"] = [op for function in functions for op in table_sized_outputs(function)]
    record["functions"] = len(functions)

    got = run.weights()[0]
    rows, expected = expected_rows(weights, updates)
    untouched = np.ones(ROWS, bool)
    untouched[rows] = False
    record["rows"] = len(rows)
    record["untouched_rows_are_equal"] = bool(np.array_equal(got[untouched], weights[untouched]))
    record["error"] = float(np.abs(got[rows] - expected).max())
    record["moved"] = float(np.abs(got[rows] - weights[rows]).max(axis=1).min())
    return record


# -- tests -----------------------------------------------------------------------------------------


SPLITS = {"1 x 2": (1, 2), "2 x 1": (2, 1)}


@pytest.fixture(scope="module")
def records():
    """Of both splits, and of weight decay, which is known to need a table."""
    runs = [(*split, None) for split in SPLITS.values()]
    *records, decayed = measured([*runs, (1, 2, 0.01)])
    return {**dict(zip(SPLITS, records, strict=True)), "weight decay": decayed}


def measured(runs):
    # oneDNN's allocator keeps freed memory, the other one gives it back, and it counts no more.
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(runs)],
        env={**os.environ, "TF_ENABLE_ONEDNN_OPTS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(params=SPLITS)
def record(request, records):
    return records[request.param]


def test_updates_are_right(record):
    assert not record["retraced"]
    assert record["rows"] > 10 * LOOKED_UP
    assert record["untouched_rows_are_equal"]
    assert record["moved"] > 1e-3
    assert record["error"] < 2e-5


def test_no_operation_makes_a_tensor_of_the_size_of_the_table(record):
    assert record["functions"] >= 1
    assert record["table_sized"] == []


def test_no_memory_of_the_size_of_a_table_is_touched(record):
    if "touched" not in record:
        pytest.skip("no /proc/self/clear_refs to see with which memory is touched")
    assert record["touched"] < 0.75 * TABLE_MIB


def test_the_measurement_sees_a_table(records):
    record = records["weight decay"]
    assert record["table_sized"]
    assert record.get("touched", math.inf) > 2 * TABLE_MIB


if __name__ == "__main__":
    print(json.dumps([measure(*run) for run in json.loads(sys.argv[1])]))
