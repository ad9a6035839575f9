"""`make tpu-check`, but for the compiler, which is not installed here."""

import collections
import json
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers_benchmarks import ROOT, assert_bad_flag_ends_in_one_line
from tensorflow.compiler.xla.service import hlo_pb2

import tf_lbopt
from benchmarks.tpu_check import __main__ as program
from benchmarks.tpu_check._compat import lowered, only_first_copies, tpu_strategy_of
from benchmarks.tpu_check.cases import Update, all_cases
from benchmarks.tpu_check.figures import COMPARED, above, figures
from benchmarks.tpu_check.steps import TrainingStep
from benchmarks.tpu_check.tables import pages

COMPILED = """\
HloModule jit_step, is_scheduled=true

%region (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %add.7 = f32[]{:T(128)} add(%a, %b), metadata={op_name="while (sort)"}
}

%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %all-reduce.3 = bf16[2,8]{1,0:T(8,128)} all-reduce(%x), replica_groups={{0,1}}, to_apply=%region
  ROOT %sort.1 = (f32[8]{0}, s32[8]{0}) sort(%y, %z), dimensions={0}
}

ENTRY %main.0 (XLA_Args.0: f32[8]) -> f32[] {
  %XLA_Args.0 = f32[8]{0:T(128)} parameter(0), metadata={op_name="XLA_Args"}
  %all-reduce.8 = (f32[], f32[1024]{0:T(1024)S(1)}, /*index=2*/f32[3,5]{1,0:T(8,128)S(1)}) all-reduce(%a, %b, %c), to_apply=%region
  %all-reduce-start.1 = f32[4]{0} all-reduce-start(%d), to_apply=%region
  %all-reduce-done.1 = f32[4]{0} all-reduce-done(%all-reduce-start.1)
  %copy-start.1 = (f32[8]{0:T(128)S(1)}, f32[8]{0:T(128)}, u32[]{:S(2)}) copy-start(%XLA_Args.0)
  %copy-done.1 = f32[8]{0:T(128)S(1)} copy-done(%copy-start.1)
  %slice-start.1 = ((f32[8]{0:T(128)}), f32[2]{0:T(128)S(1)}, s32[]{:S(2)}) slice-start(%w)
  %fusion.1 = (f32[8]{0:T(128)}, f32[8]{0:T(128)S(1)}) fusion(%XLA_Args.0, %copy-done.1), kind=kLoop, calls=%region
  %while.2 = (s32[], f32[8]{0}) while(%t), condition=%region, body=%body.1
  ROOT %conditional = f32[] conditional(%p, %q, %r), branch_computations={%region, %region}
}
"""  # noqa: E501


def test_figures_of_a_compiled_program():
    assert figures(COMPILED) == {
        # A scalar and 15 numbers, of which all are on the chip, and 4 of another reduction; those
        # of the computation `body.1`; a copy to the chip, a slice, and a fusion's 8 in and 8 out.
        "memory_bytes": 4 * (1 + 4) + (2 * 2 * 8) + 4 * 16 + 4 * (8 + 2 + 16),
        "all_reduces": 3,
        "reduced_bytes": 2 * 2 * 8 + 4 * (1 + 1024 + 15) + 4 * 4,
        "loops": 1,
        "conditions": 1,
        "sorts": 1,
    }


def test_what_is_above_the_stored_figures():
    row = dict.fromkeys(COMPARED, 5)
    assert above(row, row) == []
    assert above(row, {}) == []
    assert above({**row, "sorts": 4}, row) == []
    assert above({**row, "bytes": 1234567}, row) == ["bytes: 1,234,567, stored 5"]
    assert above({"bytes": 419_775_366}, {"bytes": 419_775_338}) == []
    assert above({"bytes": 420_000_000}, {"bytes": 419_775_338}) != []
    assert above({"error": "not compiled"}, row) == ["not compiled"]


def test_names_are_of_one_case_each():
    cases = all_cases()
    assert len(cases) == len({*cases.values()})
    optimizers = {case.optimizer for case in cases.values()}
    assert {info.name for info in tf_lbopt.list_optimizers()} < optimizers


def test_stored_figures_are_those_of_the_page():
    content = json.loads(program.STORED.read_text())
    page = program.PAGE.read_text()
    assert {*content["rows"]} <= {*all_cases()}
    for name, row in content["rows"].items():
        assert {*COMPARED} <= {*row}, name
    for text in pages(content).values():
        assert text in page
    pins = (ROOT / "benchmarks/tpu_check/requirements.txt").read_text().split()
    assert pins == [f"{name}=={content['versions'][name]}" for name in ("jax", "libtpu")]


def test_updates_of_tf_keras_are_shown_where_they_differ():
    row = {**json.loads(program.STORED.read_text())["rows"]["lamb 4 chips"], "seconds": 1.0}
    other = {**row, "bytes": row["bytes"] + 10_000_000}
    rows = {"lamb": row, "lars": row, "lamb tf_keras": {**row, "seconds": 2.0}}
    blocks = pages({"rows": {**rows, "lars tf_keras": other}, "versions": {}})
    named = [line.split(" | ")[0] for line in blocks["updates"].splitlines()]
    assert named[2:] == ["| lamb", "| lars", "| lars tf_keras"]
    assert blocks["twins"].startswith("Of 2 updates of tf_keras, 1 have")


def _instructions(program):
    module = hlo_pb2.HloModuleProto.FromString(program)
    return [i for computation in module.computations for i in computation.instructions]


SMALL = [(6, 5), (5,)]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(Update, "shapes", SMALL)


@pytest.mark.parametrize(
    "case",
    [
        Update("lamb", chips=1),
        Update("vr_lamb", micro_steps=2),
        Update("keras_lamb"),
        Update("extrap_sgd", framework="tf_keras", dtype="bfloat16"),
    ],
    ids=lambda case: case.name,
)
def test_lowers_an_update(case, small):
    lowered, long_divisions = case.lower()
    opcodes = collections.Counter(i.opcode for i in _instructions(lowered))
    assert long_divisions == 0
    assert not {"while", "sort"} & {*opcodes}
    assert bool(opcodes["all-reduce"]) == (case.chips > 1)
    assert case.lower() == (lowered, long_divisions)


@pytest.mark.long
def test_lowers_a_training_step():
    """With the update in it: the gradients' all-reduce, that of the deviations, and the model's."""
    lowered, long_divisions = TrainingStep("vr_lamb", "bert").lower()
    opcodes = collections.Counter(i.opcode for i in _instructions(lowered))
    assert long_divisions == 0
    assert not {"while", "sort"} & {*opcodes}
    assert opcodes["dot"] > 20
    assert opcodes["all-reduce"] >= 2


def test_an_embedding_is_given_as_rows(monkeypatch):
    monkeypatch.setattr(Update, "shapes", [(64, 5), (5,)])
    lowered, _ = Update("sngm", gradient="embedding").lower()
    parameters = [i.shape for i in _instructions(lowered) if i.opcode == "parameter"]
    assert [1024, 5] in [list(shape.dimensions) for shape in parameters]


def test_sums_and_long_divisions_of_a_program():
    strategy = tpu_strategy_of(2)
    with only_first_copies(), strategy.scope():
        variable = keras.Variable(np.zeros([3], "float32"))

    def on_replica(x):
        context = tf.distribute.get_replica_context()
        variable.assign_add(context.all_reduce(tf.distribute.ReduceOp.SUM, x))
        return tf.constant(7, tf.int64) // tf.cast(x[0], tf.int64)

    program, long_divisions = lowered(strategy, on_replica, [tf.zeros([3])])
    assert long_divisions > 0
    (reduction,) = [i for i in _instructions(program) if i.opcode == "all-reduce"]
    assert list(reduction.shape.dimensions) == [3]


class _Compiler:
    """Says that so many bytes are moved."""

    def __init__(self, moved):
        self.moved = moved

    def __call__(self, *_):
        counts = dict.fromkeys(COMPARED, 0)
        return {**counts, "program_bytes": 9, "bytes": self.moved, "seconds": 1.0}

    def versions(self):
        return {"jax": "1", "libtpu": "2"}

    def end(self):
        pass


def test_fails_where_a_figure_is_above_the_stored_one(small, monkeypatch, tmp_path, capsys):
    stored, page = tmp_path / "stored.json", tmp_path / "page.md"
    page.write_text(re.sub(r"-->\n.*?<!--", "-->\n<!--", program.PAGE.read_text(), flags=re.S))
    monkeypatch.setattr(program, "STORED", stored)
    monkeypatch.setattr(program, "PAGE", page)
    python = tmp_path / "python"
    python.touch()

    def run(moved, *flags):
        monkeypatch.setattr(program, "Compiler", lambda *_: _Compiler(moved))
        arguments = ["--only=^keras_sgd 1 chip$", f"--python={python}", *flags]
        return program.main(["tpu_check", *arguments])

    assert run(2_000_000, "--update") == 0
    assert "| keras_sgd 1 chip | 2 | 0 | 0 |" in page.read_text()
    assert run(2_000_000) == 0
    assert run(1_000_000) == 0
    capsys.readouterr()
    assert run(3_000_000) == 1
    printed = capsys.readouterr()
    assert "3 (+1.0)" in printed.out
    assert "keras_sgd 1 chip: bytes: 3,000,000, stored 2,000,000" in printed.err
    monkeypatch.setattr(_Compiler, "versions", lambda _: {"jax": "1", "libtpu": "3"})
    assert run(3_000_000) == 0
    assert "not compared" in capsys.readouterr().err


def test_a_compiler_that_dies_is_an_error(tmp_path):
    file = tmp_path / "program"
    file.write_bytes(b"x")
    compiler = program.Compiler("false", tmp_path, False)
    assert "ended with code" in compiler(file, 1)["error"]


@pytest.mark.parametrize(
    ("flag", "arguments"),
    [
        ("only", ["--only=("]),
        ("python", ["--python=absent"]),
        ("keep", ["--keep=absent", "--python=README.md"]),
    ],
)
def test_bad_flags(flag, arguments, monkeypatch, capsys):
    assert_bad_flag_ends_in_one_line("tpu_check.__main__", flag, arguments, monkeypatch, capsys)
