"""Runs `tests/smoke.py` in an environment for each combination of versions; `make matrix`.

    python -m tests.matrix [--only=PATTERN] [--list]

Environments are made by uv, one at a time, and removed afterwards. Interpreters are those on PATH
and under pyenv. Results go to `docs/compatibility.json`, from which `docs/compatibility.md` is
written; cells that are not run again keep their result.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
TABLE = ROOT / "docs" / "compatibility.json"
PAGE = ROOT / "docs" / "compatibility.md"
SECONDS = 1800
UV = str(pathlib.Path(sys.executable).with_name("uv"))


@dataclasses.dataclass(frozen=True)
class Cell:
    """One combination.

    Attributes:
        python: Version of Python.
        tensorflow: Of tensorflow-cpu; of tensorflow where there is tf-models, which requires that.
        keras: Version of Keras.
        tf_keras: Version of tf_keras, or nothing.
        tf_models: Version of tf-models-official, or nothing.
    """

    python: str
    tensorflow: str
    keras: str
    tf_keras: str = ""
    tf_models: str = ""

    @property
    def name(self) -> str:
        """What `--only` is matched against."""
        parts = [f"python-{self.python}", f"tensorflow-{self.tensorflow}", f"keras-{self.keras}"]
        parts += [f"tf_keras-{self.tf_keras}"] if self.tf_keras else []
        parts += [f"tf-models-{self.tf_models}"] if self.tf_models else []
        return "/".join(parts)


# Corners first, then what is between; Keras 3.13 and later need Python 3.11, TensorFlow 2.20 and
# later has wheels for 3.13, and TensorFlow 2.21 requires Keras 3.12.
CELLS = (
    Cell("3.10", "2.16.2", "3.7.0", "2.16.0"),
    Cell("3.12", "2.16.2", "3.7.0"),
    Cell("3.12", "2.16.2", "3.15.1"),
    Cell("3.10", "2.21.0", "3.12.4"),
    Cell("3.13", "2.21.0", "3.12.4"),
    Cell("3.13", "2.21.0", "3.15.1", "2.21.0"),
    Cell("3.11", "2.17.1", "3.8.0", "2.17.0"),
    Cell("3.11", "2.18.1", "3.9.2", "2.18.0"),
    Cell("3.11", "2.19.1", "3.10.0", "2.19.0"),
    Cell("3.12", "2.20.0", "3.11.3", "2.20.1"),
    Cell("3.11", "2.20.0", "3.12.4"),
    Cell("3.12", "2.21.0", "3.13.2"),
    Cell("3.12", "2.21.0", "3.14.1"),
    Cell("3.11", "2.16.2", "3.12.4", "2.16.0", "2.16.0"),
    Cell("3.12", "2.20.0", "3.15.1", "2.20.1", "2.20.0"),
)


def interpreter(version: str) -> str | None:
    """A Python of this version, from PATH or pyenv."""
    root = pathlib.Path(os.environ.get("PYENV_ROOT", pathlib.Path.home() / ".pyenv"))
    found = shutil.which(f"python{version}")
    candidates = [found] if found else []
    candidates += map(str, root.glob(f"versions/{version}.*/bin/python"))
    for candidate in candidates:
        works = subprocess.run([candidate, "--version"], capture_output=True, check=False)
        if works.returncode == 0:
            return candidate
    return None


def run(cell: Cell, wheel: pathlib.Path) -> dict[str, object]:
    """Makes the cell's environment and runs the smoke program in it.

    Returns:
        A row of the table: versions and result of each check, or why there is none.
    """
    python = interpreter(cell.python)
    if python is None:
        return {"error": f"no Python {cell.python} here"}
    with tempfile.TemporaryDirectory(prefix="tf-lbopt-matrix-") as folder:
        environment, output = pathlib.Path(folder, "env"), pathlib.Path(folder, "smoke.json")

        def uv(*arguments: str) -> str:
            done = subprocess.run(
                [UV, *arguments],
                capture_output=True,
                text=True,
                env={**os.environ, "VIRTUAL_ENV": str(environment)},
                check=False,
            )
            if done.returncode:
                raise RuntimeError(done.stderr.strip()[-500:])
            return done.stdout

        try:
            uv("venv", "--quiet", "--python", python, str(environment))
            if cell.tf_models:
                versions = (f"tensorflow=={cell.tensorflow}", f"keras=={cell.keras}")
                models = f"tf-models-official=={cell.tf_models}"
                uv("pip", "install", *versions, models, f"{wheel}[recipes]")
            else:
                tensorflow = f"tensorflow-cpu=={cell.tensorflow}"
                uv("pip", "install", tensorflow, f"keras=={cell.keras}")
                if cell.tf_keras:  # without its requirement, which is another wheel of TensorFlow
                    uv("pip", "install", "--no-deps", f"tf_keras=={cell.tf_keras}")
                before = uv("pip", "freeze").splitlines()
                uv("pip", "install", str(wheel))
                added = set(uv("pip", "freeze").splitlines()) ^ set(before)
                if not all(line.startswith("tf-lbopt") for line in added):
                    raise RuntimeError(f"installing tf-lbopt changed {sorted(added)}")
        except RuntimeError as error:
            return {"error": f"no environment: {error}"}
        start = time.monotonic()
        # From another folder, so that the installed package is imported.
        command = [environment / "bin" / "python", ROOT / "tests" / "smoke.py", f"--json={output}"]
        try:
            done = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {SECONDS} s"}
        if not output.exists():
            return {"error": done.stderr.strip()[-500:]}
        row = json.loads(output.read_text())
        if done.returncode:
            print(done.stderr[-4000:], file=sys.stderr)
        return {**row, "seconds": round(time.monotonic() - start)}


def render(rows: dict[str, dict]) -> str:
    """The page."""
    lines = [
        "# Compatibility",
        "",
        "What `make matrix` has run: in each environment the program `tests/smoke.py`, which uses",
        "every optimizer on one device and on two replicas with accumulation, by `fit`, compiled",
        "by XLA, from `.keras` files and checkpoints, with loss scaling and in the wrappers, and",
        "compares values. tf_keras and tf-models are used where the row has them. All on CPUs.",
        "",
        "| Python | TensorFlow | Keras | NumPy | tf_keras | tf-models | result | run |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell in CELLS:
        row = rows.get(cell.name)
        if row is None:
            continue
        versions, results = row.get("versions", {}), row.get("results", {})
        failed = [name for name, result in results.items() if result == "failed"]
        result = row.get("error", "").splitlines()[:1] or [
            f"failed: {', '.join(failed)}" if failed else f"ok ({row['seconds']} s)"
        ]
        columns = [
            versions.get("python", cell.python),
            versions.get("tensorflow", cell.tensorflow),
            versions.get("keras", cell.keras),
            versions.get("numpy", "–"),
            versions.get("tf_keras", "–"),
            versions.get("tf-models-official", "–"),
            result[0],
            row["date"],
        ]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines) + "\n\n" + NOTES


NOTES = """\
Notes:

- Keras 3.6 and older are not supported, and neither is TensorFlow before 2.16.
- Keras 3.13 and later need Python 3.11; TensorFlow 2.21 requires Keras 3.12 or later;
  tf-models-official has no release for TensorFlow 2.21.
- Keras before 3.8 does not divide the loss of `fit` by the number of replicas: on n replicas its
  gradients, for every optimizer, are n times those of the mean loss. The optimizers of this package
  warn of it. With Keras 3.8 and later, or in a loop of your own, they are right.
- `keras.optimizers.MultiOptimizer` is in Keras 3.15, `RMSNormalization` in 3.9.
"""


def main() -> int:
    """Runs what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="regular expression over the names of cells")
    parser.add_argument("--list", action="store_true", help="name the cells and end")
    arguments = parser.parse_args()
    cells = [cell for cell in CELLS if re.search(arguments.only, cell.name)]
    if arguments.list or not cells:
        print("\n".join(cell.name for cell in (cells or CELLS)))
        return 0 if cells else 2
    rows = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "build", "--wheel", "--outdir", folder, ROOT],
            check=True,
            capture_output=True,
        )
        (wheel,) = pathlib.Path(folder).glob("*.whl")
        for number, cell in enumerate(cells, 1):
            print(f"[{number}/{len(cells)}] {cell.name} ...", flush=True)
            row = run(cell, wheel)
            row["date"] = datetime.date.today().isoformat()
            bad = row.get("error") or [k for k, v in row["results"].items() if v == "failed"]
            failed += bool(bad)
            print(f"    {bad or 'ok'}", flush=True)
            rows[cell.name] = row
            TABLE.write_text(json.dumps(rows, indent=1) + "\n")
            PAGE.write_text(render(rows))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
