"""Breaks lines of the package, one at a time, and runs the tests that must notice.

    python -m tests.mutants [--only=PATTERN] [--list]

Each mutant names the test files that are to catch it; they are run with ``-x`` on a copy of the
package. First they are run on the package as it is, where they must pass. Results go to
`docs/mutants.json`, from which the table in `docs/testing.md` is written.
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
TABLE = ROOT / "docs" / "mutants.json"
PAGE = ROOT / "docs" / "testing.md"
BEGIN, END = "<!-- mutants -->", "<!-- end of mutants -->"
SECONDS = 1200


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One line that is broken.

    Attributes:
        name: What is wrong then.
        file: In `tf_lbopt`.
        old: Text that occurs once in it.
        new: What is put in its place.
        tests: Files, or files and patterns for ``-k``: ``"test_guard.py"``,
            ``"test_guard.py:halves"``.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTANTS = (
    Mutant(
        "the trust coefficient is left out",
        "rules/trust_ratio.py",
        "ratio = coefficient * tf.math",
        "ratio = tf.math",
        "test_norms.py:trust_ratio",
    ),
    Mutant(
        "Nesterov's step has no momentum",
        "rules/writer.py",
        "step = velocity(step, direction, learning_rate, momentum)",
        "step = step - learning_rate * direction",
        "test_kernels.py:momentum",
    ),
    Mutant(
        "the second moment has no bias correction",
        "rules/moments.py",
        "root = tf.sqrt(v / second.correction)",
        "root = tf.sqrt(v)",
        "test_kernels.py:adam",
    ),
    Mutant(
        "LAMB decays what is excluded",
        "rules/lamb.py",
        "offset=decay[w.dtype] * w if decayed else None",
        "offset=decay[w.dtype] * w if self.weight_decay else None",
        "test_reference.py:exclusions",
    ),
    Mutant(
        "LARS's two denominators are exchanged",
        "rules/lars.py",
        'self.trust_ratio_denominator == "norm_of_sum"',
        'self.trust_ratio_denominator != "norm_of_sum"',
        "test_reference.py:variants",
    ),
    Mutant(
        "SNGM does not normalize",
        "rules/sngm.py",
        "writer.heavy_ball(variable, buffer, gradient / by, rate",
        "writer.heavy_ball(variable, buffer, gradient, rate",
        "test_reference.py",
    ),
    Mutant(
        "CLARS bounds the rate of excluded variables too",
        "rules/clars.py",
        "ratios = tf.where(list(parameters.adapted), bounded, ratios)",
        "ratios = bounded",
        "test_clars.py",
    ),
    Mutant(
        "r is not clipped at 1",
        "rules/gsnr.py",
        "tf.where(ratio > low, tf.minimum(ratio, mean), low) / mean",
        "tf.where(ratio > low, ratio, low) / mean",
        "test_vrgd.py:special",
    ),
    Mutant(
        "elements on which all sub-batches agree are part of the layer mean",
        "rules/gsnr.py",
        "resolved = tf.cast(ratio < tf.cast(limit, ratio.dtype), ratio.dtype)",
        "resolved = tf.cast(tf.math.is_finite(ratio), ratio.dtype)",
        "test_vrgd.py:special",
    ),
    Mutant(
        "r's running mean has no bias correction",
        "rules/vrgd.py",
        "dense(g) * of[g.dtype].corrected(p)",
        "dense(g) * p",
        "test_reference.py",
    ),
    Mutant(
        "norms of tiny gradients vanish",
        "rules/norms.py",
        "factors = tf.where(squares < safe.least, ones * safe.factor, down)",
        "factors = down",
        "test_norms.py",
    ),
    Mutant(
        "the deviation of a further micro-step has the wrong weight",
        "aggregation/accumulators.py",
        "return tf.math.divide_no_nan(float(replicas), count), -count / (count + 1.0)",
        "return tf.math.divide_no_nan(float(replicas), count), -tf.ones_like(count)",
        "test_vrgd.py:variance",
    ),
    Mutant(
        "replicas' deviations from the common mean count once, not for each micro-step",
        "aggregation/accumulators.py",
        "squares = deviations + squares * tf.cast(own.live, dtype)",
        "squares = deviations + squares",
        "test_vrgd.py:variance",
    ),
    Mutant(
        "an empty sub-batch counts as one",
        "aggregation/accumulation.py",
        "live = any_nonzero(list(gradients)) if counted else tf.constant(True)",
        "live = tf.constant(True)",
        "test_vrgd.py:empty",
    ),
    Mutant(
        "micro-steps that are pending survive a reset of the state",
        "aggregation/accumulation.py",
        "return tf.where(belongs, count, 0)",
        "return count",
        "test_state.py:pending",
    ),
    Mutant(
        "the first micro-step adds to what was there",
        "aggregation/pipeline.py",
        "lambda: made(True, advance)",
        "lambda: made(False, advance)",
        "test_reference.py",
    ),
    Mutant(
        "the update comes a micro-step late",
        "aggregation/pipeline.py",
        "return tf.cond(tf.equal(count, steps - 1), last, advance)",
        "return tf.cond(tf.equal(count, steps), last, advance)",
        "test_reference.py",
    ),
    Mutant(
        "a constant gradient is not summed over the replicas",
        "aggregation/pipeline.py",
        "own.append(tf.identity(tf.cast(gradient, dtype)))",
        "own.append(tf.cast(gradient, dtype))",
        "test_replicas.py",
    ),
    Mutant(
        "gradients are averaged over the replicas, not summed",
        "aggregation/replicas.py",
        "tf.distribute.ReduceOp.SUM, [(values[i]",
        "tf.distribute.ReduceOp.MEAN, [(values[i]",
        "test_reference.py",
    ),
    Mutant(
        "repeated rows of a sparse gradient are not summed",
        "aggregation/sparse.py",
        "if not isinstance(gradient, tf.IndexedSlices):\n        return gradient\n    indices, pos",
        "return gradient\n    indices, pos",
        "test_norms.py",
    ),
    Mutant(
        "rows of a sparse accumulator do not count their micro-steps",
        "aggregation/accumulators.py",
        "self.touched.assign(tf.tensor_scatter_nd_add(touched, update_at, ones))",
        "self.touched.assign(touched)",
        "test_replicas.py:sparse",
    ),
    Mutant(
        "steps that overflow are written",
        "optimizers/algorithm.py",
        "return sound & update.sound, write",
        "return sound, write",
        "test_guard.py:overflow or large or squares",
    ),
    Mutant(
        "what is beside the compiled program is written though that is not",
        "optimizers/algorithm.py",
        "complete &= tf.cond(sound, write_sparse",
        "complete &= tf.cond(sparse_judged, write_sparse",
        "test_jit_compile.py:beside",
    ),
    Mutant(
        "a gradient that is not finite is written",
        "optimizers/algorithm.py",
        "sound=finite & is_rate(learning_rate),",
        "sound=is_rate(learning_rate),",
        "test_guard.py:whose_sum",
    ),
    Mutant(
        "a float16 weight that overflows becomes infinite",
        "rules/writer.py",
        "new = tf.where(finite, new, old)",
        "new = tf.where(True, new, old)",
        "test_guard.py:overflow",
    ),
    Mutant(
        "compiled by XLA, a bad update is written",
        "rules/writer.py",
        "return new if self._sound is None else tf.where(self._sound, new, old)",
        "return new",
        "test_guard.py:compiled_by_xla",
    ),
    Mutant(
        "compiled by XLA, a bad update of a stock optimizer is written",
        "rules/writer.py",
        "variable.assign(tf.where(self._sound, variable, value))",
        "pass",
        "test_guard.py:compiled_by_xla",
    ),
    Mutant(
        "clipping enlarges short gradients",
        "rules/clip.py",
        "factor = limit / tf.maximum(norm, limit)",
        "factor = limit / norm",
        "test_norms.py:clip",
    ),
    Mutant(
        "the norms of clipped gradients are those before",
        "rules/clip.py",
        "return clipped, gradient_norms * factors",
        "return clipped, gradient_norms",
        "test_norms.py:clip",
    ),
    Mutant(
        "every replica is given what replica 0 had saved",
        "aggregation/replica_state.py",
        'variable.assign(arrays[f"{name}.{replica}"])',
        'variable.assign(arrays[f"{name}.0"])',
        "test_state.py:keras_file_in_mid",
    ),
    Mutant(
        "a loaded optimizer begins an update anew",
        "optimizers/saved_state.py",
        "pending.assign(arrays.get(_PENDING, 0) if own else 0)",
        "pending.assign(0)",
        "test_state.py:keras_file_in_mid",
    ),
    Mutant(
        "exclusions are lost where loading renames the variables",
        "optimizers/exclusion.py",
        "if numbers is not None:",
        "if paths == self._built['built'] and numbers is not None:",
        "test_exclusion.py:other_names",
    ),
    Mutant(
        "products of Gram matrices lose their signs",
        "per_example/contributions.py",
        "return [tf.maximum(tf.reduce_sum(tf.multiply(*grams), axis=[1, 2, 3]), 0.0)]",
        "return [tf.maximum(tf.reduce_sum(tf.abs(tf.multiply(*grams)), axis=[1, 2, 3]), 0.0)]",
        "test_per_example_layers.py:test_layer",
    ),
    Mutant(
        "rows that an example looks up twice are not summed",
        "per_example/contributions.py",
        "merged = _summed_by(numbers, gradients, tf.shape(indices)[1])",
        "merged = gradients",
        "test_per_example_layers.py:embedding",
    ),
    Mutant(
        "the extrapolation rate is not divided by the number of points",
        "optimizers/extrapolation.py",
        "return self._read_learning_rate() / self.points",
        "return self._read_learning_rate()",
        "test_extrapolation.py:equals_the_reference",
    ),
    Mutant(
        "replicas keep the mean gradient as their past one",
        "optimizers/extrapolation.py",
        "self.past_of(dense(merge_repeated_indices(gradient)), dense(mean))",
        "self.past_of(dense(mean), dense(mean))",
        "test_extrapolation.py:equals_the_reference",
    ),
    Mutant(
        "a replica whose weights overflow is not counted",
        "optimizers/local_state.py",
        "            slot.assign(tf.zeros_like(slot))\n        self.skipped.assign_add(1)",
        "            slot.assign(tf.zeros_like(slot))",
        "test_post_local_sgd.py:overflows",
    ),
    Mutant(
        "in tf_keras the wrapper's count of a discarded step stays",
        "tf_keras/base.py",
        "self.iterations.assign_sub(tf.cast(~finite, self.iterations.dtype))",
        "pass",
        "test_tf_keras.py:skips",
    ),
    Mutant(
        "in tf_keras gradients that were summed are summed again",
        "tf_keras/base.py",
        "after=self._take_back_step, summed=summed)()",
        "after=self._take_back_step)()",
        "test_tf_keras.py:summed",
    ),
    Mutant(
        "an optimizer around another counts updates apart from it",
        "optimizers/around.py",
        "return _compat.counter(self.inner_optimizer)",
        "return _compat.counter(self)",
        "test_accumulated.py:move_the_schedule",
    ),
    Mutant(
        "an update whose assertion XLA drops is made",
        "_compat.py",
        "1.0 / tf.cast(condition, tf.float32)",
        "1.0 + 0.0 * tf.cast(condition, tf.float32)",
        "test_per_example_fit.py:overridden",
    ),
    Mutant(
        "a summed loss of single examples is divided by the replicas",
        "per_example/model.py",
        "examples *= tf.distribute.get_strategy().num_replicas_in_sync",
        "examples *= 1",
        "test_per_example_fit.py:is_a_sum",
    ),
    Mutant(
        "Adasum is of gradients that are divided by the number of replicas",
        "aggregation/adasum.py",
        "tf.cast(float(replicas), g.dtype)",
        "tf.cast(1.0, g.dtype)",
        "test_adasum.py:fit",
    ),
    Mutant(
        "Adasum of sparse gradients does not match their rows",
        "aggregation/adasum.py",
        "rows_at(other, b.values, rows)",
        "rows_at(own, b.values, rows)",
        "test_adasum.py:equals",
    ),
)


def broken(mutant: Mutant, folder: pathlib.Path) -> None:
    """Makes a copy of the package with a mutant in it."""
    shutil.copytree(ROOT / "tf_lbopt", folder / "tf_lbopt", dirs_exist_ok=True)
    path = folder / "tf_lbopt" / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        raise ValueError(
            f"{mutant.name}: `old` must occur once in {mutant.file}. "
            f"Received: {mutant.old!r}, {text.count(mutant.old)} times"
        )
    path.write_text(text.replace(mutant.old, mutant.new))


def fails(tests: str, package: pathlib.Path) -> tuple[bool, float]:
    """Whether tests fail on a package, and after how many seconds.

    Raises:
        RuntimeError: There are no such tests, or they take too long.
    """
    file, _, pattern = tests.partition(":")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += ["-c", str(ROOT / "pyproject.toml"), "-m", "not long", str(ROOT / "tests" / file)]
    command += ["-k", pattern] if pattern else []
    start = time.monotonic()
    done = subprocess.run(
        command,
        cwd=package,  # which `-m` puts first on the path
        env={**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{tests}: {(done.stdout + done.stderr)[-1000:]}")
    return done.returncode == 1, time.monotonic() - start


def render(rows: dict[str, dict]) -> str:
    """The table."""
    lines = [
        "| what is broken | in | caught by | result | s |",
        "|---|---|---|---|---|",
    ]
    for mutant in MUTANTS:
        if mutant.name in rows:
            row = rows[mutant.name]
            result = "caught" if row["caught"] else "**survives**"
            lines.append(
                f"| {mutant.name} | {mutant.file} | {mutant.tests.replace(':', ', ')} | {result} "
                f"| {row['seconds']} |"
            )
    return "\n".join(lines)


def main() -> int:
    """Runs what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="regular expression over names, files, tests")
    parser.add_argument("--list", action="store_true", help="name the mutants and end")
    arguments = parser.parse_args()
    chosen = [m for m in MUTANTS if re.search(arguments.only, f"{m.name} {m.file} {m.tests}")]
    if arguments.list or not chosen:
        print("\n".join(m.name for m in (chosen or MUTANTS)))
        return 0 if chosen else 2
    rows = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    survivors = 0
    for tests in dict.fromkeys(m.tests for m in chosen):
        print(f"{tests} on the package as it is ...", flush=True)
        failed, seconds = fails(tests, ROOT)
        if failed:
            print(f"    {tests} fails without a mutant", file=sys.stderr)
            return 1
        print(f"    passes ({seconds:.0f} s)", flush=True)
    for number, mutant in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}] {mutant.name} ...", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            broken(mutant, pathlib.Path(folder))
            caught, seconds = fails(mutant.tests, pathlib.Path(folder))
        survivors += not caught
        print(f"    {'caught' if caught else 'SURVIVES'} ({seconds:.0f} s)", flush=True)
        rows[mutant.name] = {
            "caught": caught,
            "seconds": round(seconds),
            "date": datetime.date.today().isoformat(),
        }
        TABLE.write_text(json.dumps(rows, indent=1) + "\n")
        if PAGE.exists() and BEGIN in PAGE.read_text():
            before, rest = PAGE.read_text().split(BEGIN)
            after = rest.split(END)[1]
            PAGE.write_text(f"{before}{BEGIN}\n\n{render(rows)}\n\n{END}{after}")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
