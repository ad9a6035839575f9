"""Programs as files: what is in them, and what JAX makes of them where it is installed."""

import dataclasses
import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
from helpers_benchmarks import ROOT, assert_bad_flag_ends_in_one_line

from benchmarks import checked_updates, run_programs, xla_programs
from benchmarks.program_files import Argument, Expected, NotAProgramError, read, write

SHAPES = [(6, 5), (5,)]


def python_with_jax():
    of_tpu_check = ROOT / ".venv-tpu" / "bin" / "python"
    if of_tpu_check.exists():
        return of_tpu_check
    if importlib.util.find_spec("jax"):
        return sys.executable
    pytest.skip("jax is not installed; `make tpu-check` makes an environment that has it")


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("programs")
    made = [xla_programs.update(name, "small", SHAPES) for name in ("keras_lamb", "lamb")]
    made.append(xla_programs.update("vr_lars", "small", SHAPES))
    made.append(xla_programs.step("lamb", "bert_small"))
    return {program.name + program.kind: write(folder, program) for program in made}


def test_numbers_are_the_same_everywhere():
    argument = Argument("x", "input", (3,), "float32", ((7, -1.0, 1.0), (0, 0.5, 0.5)))
    np.testing.assert_array_equal(argument.values(), np.float32([1.3898098, 0.75019085, 0.8683598]))
    assert argument.bytes == 12
    ids = Argument("x", "input", (1000,), "int32", ((7, 0, 3),)).values()
    assert set(ids) == {0, 1, 2}


def test_sub_batches_differ_everywhere():
    of_sub_batches = [checked_updates.gradient(4, (5, 4), j).values() for j in range(4)]
    for i in range(4):
        for j in range(i):
            assert np.abs(of_sub_batches[i] - of_sub_batches[j]).min() > 0.04
    one, other = of_sub_batches[:2]
    mean = Argument("mean", "input", (5, 4), "float32", ((13, -0.1, 0.1),)).values()
    np.testing.assert_allclose((one + other) / 2, mean, atol=1e-8)


def test_error_of_a_result():
    start = np.zeros([1000])
    end = start + np.linspace(0.5, 1, 1000)
    expected = Expected.of(0, start, end, least=0.0)
    assert expected.scale == 1
    assert expected.error(start, end) < 1e-12
    wrong = end.copy()
    wrong[999] += 0.25
    assert expected.error(start, wrong) == 0.25
    # An element that is not stored shows in the norm.
    wrong = end.copy()
    wrong[1] += 10
    assert expected.error(start, wrong) > 0.05
    assert np.isnan(expected.error(start, np.full([1000], np.nan)))


def test_what_is_in_a_file(programs):
    program = read(programs["vr_larsupdate"])
    assert (program.name, program.group, program.kind) == ("vr_lars", "small", "update")
    assert program.base == "lars_2_micro_steps"
    assert program.parameters == 35
    roles = [a.role for a in program.arguments]
    assert roles[:4] == ["input"] * 4
    assert roles.count("weight") == 2
    assert roles.count("slot") == 2
    # Two sets of gradients read; weights and momenta read and written.
    assert program.least_bytes == 4 * 35 * (2 + 2 + 2)
    taken = [argument for argument in program.results if argument >= 0]
    assert len(taken) == len({*taken})
    assert {e.argument for e in program.expected} == {
        i for i, role in enumerate(roles) if role == "weight"
    }
    assert read(write(programs["vr_larsupdate"].parent, program)) == program


def test_a_step_has_its_batch_and_counters(programs):
    program = read(programs["lambstep"])
    inputs = [a for a in program.arguments if a.role == "input"]
    assert [(a.shape, a.dtype) for a in inputs] == [((4, 8), "int32"), ((4, 2), "int32")]
    assert -1 in program.results  # the loss
    assert program.least_bytes is None
    # Of a key's bias the gradient is zero.
    checked = {program.arguments[e.argument].name for e in program.expected}
    weights = {a.name for a in program.arguments if a.role == "weight"}
    assert all("key/bias" in name for name in weights - checked)
    assert len(weights - checked) == 1


def test_runs_by_jax_as_in_float64(programs, tmp_path):
    python = python_with_jax()
    program = read(programs["lambupdate"])
    wrong = Expected(**{**dataclasses.asdict(program.expected[0]), "change": 1.0})
    program = dataclasses.replace(program, name="wrong", expected=(wrong,))
    files = [*programs.values(), write(tmp_path, program)]
    output = tmp_path / "record.json"
    done = subprocess.run(
        [python, "-m", "benchmarks.run_programs", *files, "--rounds=2", f"--output={output}"],
        cwd=ROOT,
        env={"JAX_PLATFORMS": "cpu", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    small, steps = json.loads(output.read_text())["groups"]
    rows = {row["name"]: row for row in (*small["rows"], *steps["rows"])}
    assert {name for name, row in rows.items() if not row["right"]} == {"wrong"}
    assert "WRONG" in done.stdout
    by_name = {row["name"]: row for row in small["rows"]}
    ratio = by_name["lamb"]["median_ms"] / by_name["keras_lamb"]["median_ms"]
    assert by_name["lamb"]["times_base"] == pytest.approx(ratio)
    assert by_name["lamb"]["times_floor"] > 0
    assert "times_floor" not in steps["rows"][0]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format": "another"}'])
def test_a_file_that_is_no_program_ends_in_one_line(content, tmp_path, capsys):
    file = tmp_path / "file.json"
    file.write_text(content)
    assert run_programs.main(["run_programs", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(str(file))
    assert error.count("\n") == 1


def test_files_that_are_missing_or_of_another_program(programs, tmp_path):
    with pytest.raises(NotAProgramError, match="no such file"):
        read(tmp_path / "absent.json")
    path = write(tmp_path, read(programs["lambupdate"]))
    path.with_suffix(".hlo.pb").write_bytes(b"another")
    with pytest.raises(NotAProgramError, match="not the program"):
        read(path)
    path.with_suffix(".hlo.pb").unlink()
    with pytest.raises(NotAProgramError, match="no such file"):
        read(path)


def test_without_jax_one_line(programs, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jax", None)
    assert run_programs.main(["run_programs", str(programs["lambupdate"])]) == 2
    error = capsys.readouterr().err
    assert error.startswith("needs JAX: pip install")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flag", "arguments"),
    [
        ("output_dir", []),
        ("shapes", ["--output_dir=.", "--shapes=vgg"]),
        ("steps", ["--output_dir=.", "--steps=vgg"]),
        ("optimizers", ["--output_dir=.", "--optimizers=adagrad"]),
    ],
)
def test_bad_flags(flag, arguments, monkeypatch, capsys):
    assert_bad_flag_ends_in_one_line("xla_programs", flag, arguments, monkeypatch, capsys)
