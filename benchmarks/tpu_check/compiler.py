"""Compiles programs for a TPU v5e 2x2 by libtpu's own compiler, without a TPU.

    python -m benchmarks.tpu_check.compiler

in the environment of jax and libtpu. Reads lines ``REPLICAS FILE``, and writes for each a line of
JSON: the figures of the program, or ``{"error": ...}``.
"""

import os

os.environ.update(
    TPU_SKIP_MDS_QUERY="1",
    JAX_PLATFORMS="cpu",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    TPU_WORKER_HOSTNAMES="localhost",
)

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from jax._src.interpreters import mlir
from jax.experimental import topologies
from jaxlib import _jax, xla_client
from jaxlib.mlir import ir

from benchmarks.tpu_check.figures import figures


def compiled(topology: Any, program: bytes, replicas: int) -> Any:
    """What libtpu makes of a serialized HloModule."""
    text = xla_client._xla.mlir.xla_computation_to_mlir_module(xla_client.XlaComputation(program))
    text = text.decode() if isinstance(text, bytes) else text
    # TensorFlow's programs are full of copies, in a dialect that the portable form does not have; a
    # reshape to the same shape is none.
    copy = r"mhlo\.copy (%[\w#]+) : (tensor<[^>]*>)"
    text = re.sub(copy, r"stablehlo.reshape \1 : (\2) -> \2", text)
    with mlir.make_ir_context():
        module = ir.Module.parse(text)
    options = xla_client.CompileOptions()
    options.num_replicas, options.num_partitions = replicas, 1
    options.device_assignment = xla_client.DeviceAssignment.create(
        np.arange(replicas).reshape(replicas, 1)
    )
    devices = _jax.DeviceList(tuple(topology.devices[:replicas]))
    return topology.devices[0].client.compile(module, devices, options)


def main() -> None:
    """Compiles what it is told to."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    for line in sys.stdin:
        replicas, file = line.rstrip("\n").split(" ", 1)
        start = time.monotonic()
        try:
            made = compiled(topology, Path(file).read_bytes(), int(replicas))
            text = made.hlo_modules()[0].to_string()
            row = {**figures(text), "bytes": round(made.cost_analysis()["bytes accessed"])}
            if len(sys.argv) > 1:
                Path(sys.argv[1], Path(file).stem + ".txt").write_text(text)
        except Exception as error:  # libtpu's own have no common class
            row = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        print(json.dumps({**row, "seconds": round(time.monotonic() - start, 1)}), flush=True)


if __name__ == "__main__":
    main()
