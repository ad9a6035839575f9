"""Logical CPU devices, and one strategy per set of them.

Several MirroredStrategy objects in a process share collective keys and break each other, so every
number of replicas has one strategy, with devices and keys of its own.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import functools
import gc
import pathlib
import random
import sys

import forked_python
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.framework import config as tensorflow_config

from official_recipes.common.input_pipeline import without_autotuning

# For `benchmarks`, which is not installed; at the end, so that the installed package is tested.
sys.path.append(str(pathlib.Path(__file__).parents[1]))

_FIRST_DEVICE = {2: 1, 4: 3, 8: 7}
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0],
    [tf.config.LogicalDeviceConfiguration() for _ in range(15)],
)


def _prepared_without_autotuning(prepare):
    """Of what tf.data does to a dataset for which an iterator is made (TensorFlow 2.20)."""
    return functools.wraps(prepare)(lambda dataset: without_autotuning(prepare(dataset)))


tf.data.Dataset._apply_debug_options = _prepared_without_autotuning(
    tf.data.Dataset._apply_debug_options
)


QUICK = "not long"  # what `make test` gives as `-m`


def pytest_configure(config: pytest.Config) -> None:
    # It takes a third of the time of a short run. Where the numbers are at stake it stays on, by
    # the fixture below.
    if config.option.markexpr == QUICK:
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
        # As many processes as cores run side by side, and tensors are small.
        tf.config.threading.set_intra_op_parallelism_threads(1)
        forked_python.use(shared=bool(getattr(config.option, "numprocesses", None)))


def pytest_collection_finish() -> None:
    # Traces make many objects; without this the collector takes a tenth of the time, most of it to
    # look again at what was imported. Functions that nobody uses must go now and then: the more
    # there are, the slower TensorFlow makes new ones.
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 10, 5)


@pytest.fixture
def graph_optimizer():
    """TensorFlow's optimizer of graphs, which `make test` does without elsewhere."""
    before = tf.config.optimizer.get_experimental_options()
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": False})
    yield
    tf.config.optimizer.set_experimental_options(before)


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a test with `quick` marks, what none of them names is `long` (see docs/testing.md)."""
    some_are_quick: dict[str, bool] = {}
    for item in items:
        marks = list(item.iter_markers("quick"))
        if not marks:
            continue
        is_quick = any(_has(item.callspec.params, mark.kwargs) for mark in marks)
        if not is_quick:
            item.add_marker(pytest.mark.long)
        test = item.nodeid.split("[")[0]
        some_are_quick[test] = some_are_quick.get(test, False) or is_quick
    never = [test for test, is_quick in some_are_quick.items() if not is_quick]
    if never and not any("::" in argument for argument in config.args):
        raise pytest.UsageError(f"`quick` names no parametrization of {', '.join(never)}")


def _has(parameters: dict[str, object], chosen: dict[str, object]) -> bool:
    """Whether every parameter named has the value given, or the name, or one of several."""
    for key, values in chosen.items():
        values = values if isinstance(values, tuple) else (values,)
        parameter = parameters[key]
        name = getattr(parameter, "name", getattr(parameter, "__name__", parameter))
        if parameter not in values and name not in values:
            return False
    return True


@pytest.fixture(scope="session")
def quick_configurations():
    """tf-models looks up the types of a configuration's fields anew for each value it sets.

    That is nine tenths of what it takes to make one.
    """
    config = pytest.importorskip("official.modeling.hyperparams.base_config").Config
    types_of = functools.cache(config._get_annotations.__func__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "_get_annotations", classmethod(lambda cls: types_of(cls)))
        yield


@functools.cache
def strategy_of(replicas: int) -> tf.distribute.Strategy:
    """The process's strategy for a number of replicas: 1 (none at all), 2, 4 or 8."""
    if replicas == 1:
        return tf.distribute.get_strategy()
    first = _FIRST_DEVICE[replicas]
    # TensorFlow's own hook for tests: without it all strategies number their groups from 1.
    tf.distribute.MirroredStrategy._collective_key_base = 100_000 * replicas
    return tf.distribute.MirroredStrategy([f"CPU:{first + i}" for i in range(replicas)])


@pytest.fixture(autouse=True)
def _seeds():
    # Where Keras takes the seeds from that are not given. `keras.utils.set_random_seed` would also
    # empty TensorFlow's caches of kernels, which takes a fifth of the time.
    random.seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def _fresh_keras_state():
    import keras

    yield
    keras.config.set_dtype_policy("float32")


@pytest.fixture(scope="module")
def determinism():
    tf.config.experimental.enable_op_determinism()
    tf.random.set_seed(0)  # without which TensorFlow then refuses to shuffle
    yield
    tensorflow_config.disable_op_determinism()  # there is no public way back


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of real data sets; skips where it is absent."""
    default = pathlib.Path(__file__).parents[2] / "shared" / "data"
    folder = pathlib.Path(os.environ.get("TF_LBOPT_DATA", default))
    if not folder.is_dir():
        pytest.skip("no real data: set TF_LBOPT_DATA to a folder of data sets")
    return folder
