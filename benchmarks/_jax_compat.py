"""The one place here that touches private names of JAX; checked on jax 0.10.2.

JAX has no public way to run a program that it has not traced itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
from jax._src.interpreters import mlir
from jaxlib import _jax, xla_client
from jaxlib.mlir import ir


def module_of(program: bytes) -> Any:
    """A serialized HloModule as JAX's compilers take it."""
    text = xla_client._xla.mlir.xla_computation_to_mlir_module(xla_client.XlaComputation(program))
    text = text.decode() if isinstance(text, bytes) else text
    # TensorFlow's programs are full of copies, in a dialect that the portable form does not have; a
    # reshape to the same shape is none.
    copy = r"mhlo\.copy (%[\w#]+) : (tensor<[^>]*>)"
    text = re.sub(copy, r"stablehlo.reshape \1 : (\2) -> \2", text)
    with mlir.make_ir_context():
        return ir.Module.parse(text)


class Executable:
    """A serialized HloModule, compiled for one device."""

    def __init__(self, program: bytes, device: jax.Device):
        module = mlir.module_to_bytecode(module_of(program))
        devices, options = _jax.DeviceList((device,)), xla_client.CompileOptions()
        self._executable = device.client.compile_and_load(module, devices, options)

    def __call__(self, arguments: Sequence[jax.Array]) -> list[jax.Array]:
        """Runs it; arguments that results take the memory of are gone then."""
        results = self._executable.execute_sharded(list(arguments))
        return [shards[0] for shards in results.disassemble_into_single_device_arrays()]
