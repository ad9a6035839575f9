"""The one place here that touches private names of TensorFlow.

It makes a `tf.distribute.TPUStrategy` of devices that do not exist. Their variables fall back to
the CPU, and what runs on a replica can be traced, and lowered to XLA. Checked on TensorFlow 2.20.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import tensorflow as tf
from tensorflow.compiler.tf2xla.ops import gen_xla_ops
from tensorflow.compiler.xla import xla_data_pb2
from tensorflow.compiler.xla.service import hlo_pb2
from tensorflow.python.distribute import tpu_strategy, tpu_util, tpu_values
from tensorflow.python.ops import resource_variable_ops
from tensorflow.python.tpu.ops import tpu_ops
from tensorflow.python.tpu.tpu_system_metadata import TPUSystemMetadata

_NUMPY_NAMES = {
    xla_data_pb2.PRED: "bool",
    xla_data_pb2.S32: "int32",
    xla_data_pb2.S64: "int64",
    xla_data_pb2.U32: "uint32",
    xla_data_pb2.U64: "uint64",
    xla_data_pb2.F32: "float32",
    xla_data_pb2.F64: "float64",
    xla_data_pb2.BF16: "bfloat16",
    xla_data_pb2.F16: "float16",
}
_LONG = (xla_data_pb2.S64, xla_data_pb2.U64)


class _Device:
    device_type = "TPU"

    def __init__(self, name: str):
        self.name = name


class _Resolver:
    """Names one host's cores."""

    tpu_hardware_feature = 0

    def __init__(self, cores: int):
        self._cores = cores

    def get_tpu_system_metadata(self) -> TPUSystemMetadata:
        names = [f"/job:localhost/replica:0/task:0/device:TPU:{i}" for i in range(self._cores)]
        return TPUSystemMetadata(
            num_cores=self._cores,
            num_hosts=1,
            num_of_cores_per_host=self._cores,
            topology=None,
            devices=[_Device(name) for name in names],
        )

    def cluster_spec(self) -> None:
        return None

    def master(self) -> str:
        return ""


@functools.cache
def tpu_strategy_of(replicas: int, packed: bool = True) -> tf.distribute.TPUStrategy:
    """The process's TPUStrategy for a number of replicas.

    Args:
        replicas: How many.
        packed: Whether a variable's copies have one handle, as they have on a TPU. Without, eager
            writes from outside of replicas (restoring) reach all copies, also on absent devices.
    """
    strategy = tf.distribute.TPUStrategy(_Resolver(replicas))
    strategy._enable_packed_variable_in_eager_mode = packed
    return strategy


@contextlib.contextmanager
def only_first_copies() -> Iterator[None]:
    """Within this block only the first copy of each new variable has memory.

    It is all that a program is lowered with. The strategy's scope is to be entered inside.
    """

    def create(next_creator: Callable[..., tf.Variable], **kwargs: Any) -> tf.Variable:
        if "/replica_" not in (kwargs.get("name") or ""):
            return next_creator(**kwargs)
        value = kwargs["initial_value"]
        value = tf.convert_to_tensor(value() if callable(value) else value, kwargs.get("dtype"))
        return resource_variable_ops.UninitializedVariable(
            trainable=kwargs["trainable"], shape=value.shape, dtype=value.dtype, name=kwargs["name"]
        )

    with tf.variable_creator_scope(create):
        yield


@contextlib.contextmanager
def _on_first_replica(strategy: tf.distribute.TPUStrategy) -> Iterator[None]:
    """Within this block code is traced as in a function that `strategy.run` is given.

    The kernel that sums over replicas is a TPU's; XLA's own operation stands for it.
    """
    groups = [list(range(strategy.num_replicas_in_sync))]

    def all_reduce(value: Any, *_: Any, **__: Any) -> tf.Tensor:
        return gen_xla_ops.xla_all_reduce(
            input=tf.convert_to_tensor(value),
            group_assignment=tf.constant(groups),
            reduce_op="Add",
            mode="CrossReplica",
        )

    first_handle = property(lambda variable: variable._values[0].handle)
    with (
        mock.patch.object(tpu_util, "enclosing_tpu_context", object),
        mock.patch.object(tpu_values.TPUVariableMixin, "handle", first_handle),
        mock.patch.object(tpu_ops, "cross_replica_sum", all_reduce),
        # By which TPUStrategy gives all what the first one writes: Keras's counters of updates.
        mock.patch.object(tpu_ops, "all_to_all", lambda values, **_: values),
        strategy.scope(),
        tpu_strategy._TPUReplicaContext(strategy, tf.constant(0)),
    ):
        yield


def lowered(
    strategy: tf.distribute.TPUStrategy,
    on_replica: Callable[..., Any],
    arguments: Sequence[tf.Tensor],
) -> tuple[bytes, int]:
    """The XLA program of what a replica of `TPUStrategy.run` does, as a serialized `HloModule`.

    Args:
        strategy: Of `tpu_strategy_of`.
        on_replica: What `strategy.run` would be given.
        arguments: Its arguments; their values do not matter.

    Returns:
        The program, without the names that Python gave it, and how many divisions of 64-bit
        integers it has.
    """

    def step(*arguments: tf.Tensor) -> Any:
        with _on_first_replica(strategy):
            return on_replica(*arguments)

    lowered_step = of_function(step, arguments)
    return lowered_step.program, lowered_step.long_divisions


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A function as an XLA program.

    Attributes:
        program: A serialized `HloModule`, without the names that Python gave it.
        long_divisions: How many divisions of 64-bit integers it has.
        arguments: Shapes and dtypes of the program's.
        variables: Which it uses, in the order of the arguments, after the function's own.
        results: For each of the program's results the argument whose memory it takes over, or -1.
    """

    program: bytes
    long_divisions: int
    arguments: list[tuple[tuple[int, ...], str]]
    variables: list[tf.Variable]
    results: list[int]


def of_function(function: Callable[..., Any], arguments: Sequence[tf.Tensor]) -> Lowered:
    """Lowers a function.

    Args:
        function: It.
        arguments: Its arguments; their values do not matter.
    """
    step = tf.function(function, jit_compile=True, autograph=False)
    serialized = step.experimental_get_compiler_ir(*arguments)(stage="hlo_serialized")
    program = hlo_pb2.HloModuleProto.FromString(serialized)
    program.ClearField("stack_frame_index")
    # Numbers of this process are in these names; without them the same update is the same bytes.
    program.name, program.id = "step", 0
    long_divisions = 0
    for number, computation in enumerate(program.computations):
        if computation.id == program.entry_computation_id:
            program.entry_computation_name = f"computation_{number}"
        computation.name = f"computation_{number}"
        for instruction in computation.instructions:
            instruction.ClearField("metadata")
            divides = instruction.opcode in ("divide", "remainder")
            long_divisions += divides and instruction.shape.element_type in _LONG
    traced = step.get_concrete_function(*arguments)
    of_handle = {id(variable.handle): variable for variable in traced.graph.variables}
    # A single result is no tuple.
    results = [-1] * max(1, len(program.host_program_shape.result.tuple_shapes))
    for entry in program.input_output_alias.entries:
        results[sum(entry.output_shape_index)] = entry.parameter_number
    return Lowered(
        program.SerializeToString(deterministic=True),
        long_divisions,
        [
            (tuple(shape.dimensions), _NUMPY_NAMES[shape.element_type])
            for shape in program.host_program_shape.parameters
        ],
        [of_handle[id(h)] for h in traced.captured_inputs if id(h) in of_handle],
        results,
    )
