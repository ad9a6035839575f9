"""Programs of pages, in processes of their own."""

import os
import pathlib
import subprocess

from forked_python import python

ROOT = pathlib.Path(__file__).parents[1]


def run_program(
    code: str, folder: pathlib.Path, timeout: float, **variables: str
) -> subprocess.CompletedProcess:
    """Runs code as a script in a folder, on the CPU, where it may set up TensorFlow's devices.

    It finds the package even where that is not installed, and must end with exit code 0.
    """
    script = folder / "program.py"
    script.write_text(code, encoding="utf-8")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    own = {"PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    inherited = {k: v for k, v in os.environ.items() if k not in ("TF_CONFIG", "XLA_FLAGS")}
    done = subprocess.run(
        [*python(), str(script)],
        cwd=folder,
        env={**inherited, **own, **variables},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done
