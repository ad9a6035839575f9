"""What a GPU would have to do for one update, counted in its graph; no GPU is needed.

    python -m benchmarks.graph_counts [--shapes=resnet50,bert_base] [--only=REGEX] [--output=FILE]

A *launch* is an operation with a GPU kernel that computes something (`Unpack` launches one for each
output, but none where these are rows of whole 64 bytes, which stay where they are); what only
renames, reads or hands over memory is none. A *wait* is a condition or loop: the host must know its
predicate, which is on the device, before it can go on. *On the host* are operations without a GPU
kernel. Of a condition the branch with more launches counts, but for those named ``rarely`` (a norm
that under- or overflows, a rate above 1/λ); of an update with micro-steps all calls count, all but
the last with the branch that adds to accumulators. Weights decay, so that as much is done by all.
Compiled, the update is one program, launched once; what XLA makes of it is not counted here.

It needs a TensorFlow that was built for GPUs, whose list of kernels says which there are; the wheel
`tensorflow` for Linux is one.
"""

import argparse
import dataclasses
import functools
import gc
import pathlib
import re
import sys
import unittest.mock
from collections.abc import Iterable, Mapping
from typing import Any

import tensorflow as tf
from rich.console import Console
from rich.table import Table
from tensorflow.python.framework import kernels

from benchmarks.contenders import Contender, contenders
from benchmarks.shapes import MODELS
from official_recipes.common.files import write_json
from tf_lbopt.rules import gsnr

WEIGHT_DECAY = 0.01
NO_WORK = {
    *("Placeholder", "Const", "Identity", "IdentityN", "NoOp", "StopGradient", "ReadVariableOp"),
    *("AssignVariableOp", "VarHandleOp", "Reshape", "ExpandDims", "Squeeze", "Shape", "ShapeN"),
    *("Rank", "Size"),
}
CONDITIONS = ("If", "StatelessIf", "Case", "StatelessCase", "While", "StatelessWhile")
CALLS = ("PartitionedCall", "StatefulPartitionedCall")


@dataclasses.dataclass(frozen=True)
class Counts:
    """What one call does.

    Attributes:
        launches: Of kernels.
        waits: For the device.
        on_host: Operations without a GPU kernel.
        programs: Compiled by XLA.
    """

    launches: int = 0
    waits: int = 0
    on_host: int = 0
    programs: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Counts(*(a + b for a, b in pairs))


def counted(function: Any, largest: bool = True) -> Counts:
    """Counts what a concrete function does.

    Args:
        function: It.
        largest: Whether of a condition the branch with most launches counts, or that with fewest.
    """
    definition = function.graph.as_graph_def(add_shapes=True)
    bodies = {body.signature.name: body.node_def for body in definition.library.function}
    return _of_nodes(definition.node, bodies, largest)


def _of_nodes(nodes: Iterable[Any], bodies: Mapping[str, Any], largest: bool) -> Counts:
    total = Counts()
    for node in nodes:
        called = [
            _of_nodes(bodies[function.name], bodies, largest)
            for attribute in node.attr.values()
            for function in (attribute.func, *attribute.list.func)
            if function.name in bodies
        ]
        if node.attr["_XlaMustCompile"].b:
            total += Counts(launches=1, programs=1)
        elif node.op in CONDITIONS:
            rare = node.name.rpartition("/")[2].startswith("rarely")
            choose = max if largest and not rare else min
            total += Counts(waits=1) + choose(called, key=lambda counts: counts.launches)
        elif node.op in CALLS:
            total += called[0]
        elif node.op not in NO_WORK:
            launches = _of_unpack(node) if node.op == "Unpack" else 1
            on_gpu = _has_gpu_kernel(node.op)
            total += Counts(launches=launches) if on_gpu else Counts(on_host=1)
    return total


def _of_unpack(node: Any) -> int:
    row = tf.TensorShape(node.attr["_output_shapes"].list.shape[0])
    in_place = node.attr["axis"].i == 0 and row.is_fully_defined()
    size = tf.as_dtype(node.attr["T"].type).size
    return 0 if in_place and row.num_elements() * size % 64 == 0 else node.attr["num"].i


@functools.cache
def _has_gpu_kernel(operation: str) -> bool:
    found = kernels.get_registered_kernels_for_op(operation).kernel
    return any(kernel.device_type == "GPU" for kernel in found)


def of_update(contender: Contender, shapes: list[tuple[int, ...]], compiled: bool) -> Counts:
    """Counts of one update on one device.

    Args:
        contender: The optimizer.
        shapes: Of the variables.
        compiled: Whether it is created with ``jit_compile=True``, as ours can be.
    """
    import keras

    variables = [keras.Variable(tf.zeros(shape)) for shape in shapes]
    gradients = [tf.zeros(shape) for shape in shapes]
    create = contender.create
    if not contender.legacy and contender.name in _ours():
        chosen = dataclasses.replace(
            contender, create=lambda **more: create(jit_compile=compiled, **more)
        )
    else:
        chosen = contender
    optimizer = chosen.optimizer(variables)
    one_call = dataclasses.replace(chosen, micro_steps=1)
    with unittest.mock.patch.object(gsnr, "_host_waits", return_value=True):  # as on a GPU
        step = tf.function(
            lambda gradients: one_call.apply(optimizer, [gradients], variables), autograph=False
        ).get_concrete_function(gradients)
    total = counted(step)
    for _ in range(contender.micro_steps - 1):
        total += counted(step, largest=False)
    return total


def _ours() -> set[str]:
    import tf_lbopt

    names = {info.name for info in tf_lbopt.list_optimizers()}
    return names | {f"{name}_2_micro_steps" for name in names}


def main(argv: list[str]) -> int:
    """Counts what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="resnet50,bert_base", help=", ".join(MODELS))
    parser.add_argument("--only", default="", help="regular expression over the optimizers' names")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file to write")
    options = parser.parse_args(argv)
    models = options.shapes.split(",")
    if not set(models) <= set(MODELS):
        parser.error(f"--shapes: expected some of {', '.join(MODELS)}, received {options.shapes}")
    if not _has_gpu_kernel("MatMul"):
        print("This TensorFlow was built without GPU kernels: nothing to count.", file=sys.stderr)
        return 1
    known, skipped = contenders(WEIGHT_DECAY, replicas=1)
    rows = []
    console = Console() if sys.stdout.isatty() else Console(width=120)
    for contender in known:
        if not re.search(options.only, contender.name):
            continue
        for compiled in (False, True) if contender.name in _ours() else (False,):
            for model in models:
                counts = of_update(contender, MODELS[model](), compiled)
                rows.append(
                    {
                        "optimizer": contender.name,
                        "compiled": compiled,
                        "model": model,
                        **dataclasses.asdict(counts),
                    }
                )
                print(*rows[-1].values(), file=sys.stderr, flush=True)
                gc.collect()  # a graph and its variables refer to each other
    table = Table("optimizer", "compiled", "model", "launches", "waits", "on the host", "programs")
    for row in rows:
        table.add_row(*map(str, row.values()))
    console.print(table)
    for name, reason in skipped:
        console.print(f"{name} is skipped: {reason}")
    if options.output:
        write_json(options.output, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
