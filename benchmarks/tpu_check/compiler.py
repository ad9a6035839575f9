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
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from jax.experimental import topologies
from jaxlib import _jax, xla_client

from benchmarks._jax_compat import module_of
from benchmarks.tpu_check.figures import figures


def compiled(topology: Any, program: bytes, replicas: int) -> Any:
    """What libtpu makes of a serialized HloModule."""
    module = module_of(program)
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
