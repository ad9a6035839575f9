import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_benchmarks import assert_bad_flag_ends_in_one_line

ROOT = Path(__file__).resolve().parents[1]


def run_benchmark(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.step_time", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.long
def test_record_of_a_tiny_run(tmp_path):
    pytest.importorskip("rich")
    path = tmp_path / "record.json"
    done = run_benchmark(
        "--model=tiny",
        "--replicas=2",
        "--batch_per_replica=4",
        "--optimizers=vr_sgd,vr_lars",
        "--repeats=3",
        "--warmup=1",
        f"--output={path}",
    )
    assert done.returncode == 0, done.stderr
    assert "target at most 1.05" in done.stdout
    assert "retracing" not in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == [path.name]

    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["benchmark"] == "step_time"
    assert record["versions"]["tensorflow"].startswith("2.")
    assert record["settings"] == {
        "model": "tiny",
        "width": 1,
        "batch_per_replica": 4,
        "repeats": 3,
        "warmup": 1,
    }
    (comparison,) = record["comparisons"]
    assert (comparison["replicas"], comparison["micro_steps"]) == (2, 1)
    rows = {row["name"]: row for row in comparison["rows"]}
    assert list(rows) == ["keras_sgd", "vr_sgd", "keras_momentum", "lars", "vr_lars"]
    floor = comparison["forward_backward"]
    for row in (floor, *rows.values()):
        assert len(row["all_ms"]) == 3
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
        # All train the same weights on the same images.
        assert row["loss"] == pytest.approx(floor["loss"], rel=1e-5)
    reductions = {name: row["collective_reductions_per_replica"] for name, row in rows.items()}
    assert floor["collective_reductions_per_replica"] == 0
    assert reductions == {name: 2 if name.startswith("vr_") else 1 for name in rows}

    pairs = {(pair["name"], pair["base"]): pair for pair in comparison["pairs"]}
    assert set(pairs) == {("vr_sgd", "keras_sgd"), ("vr_lars", "lars"), ("lars", "keras_momentum")}
    for (name, base), pair in pairs.items():
        assert pair["ratio"] == pytest.approx(rows[name]["median_ms"] / rows[base]["median_ms"])
        assert pair["p10_of_ratios"] <= pair["median_of_ratios"] <= pair["p90_of_ratios"]


@pytest.mark.parametrize(
    ("flag", "value", "more"),
    [
        ("model", "resnet21", ()),
        ("optimizers", "vr_sgd,adamant", ()),
        ("replicas", "2,none", ()),
        ("batch_per_replica", "3", ("--replicas=1",)),
        ("width", "0", ()),
        ("output", "no/such/folder/record.json", ()),
        ("unknown", "1", ()),
    ],
)
def test_bad_flag_ends_in_one_line(flag, value, more, monkeypatch, capsys):
    pytest.importorskip("rich")
    arguments = [f"--{flag}={value}", *more]
    assert_bad_flag_ends_in_one_line("step_time", flag, arguments, monkeypatch, capsys)


def test_resnet20_has_the_parameters_of_the_paper():
    pytest.importorskip("rich")
    from benchmarks import step_time

    model = step_time.build_model(step_time.MODELS["resnet20"])
    # Without the normalizations' scales and shifts: 3x3 convolutions and the dense layer.
    convolutions = 9 * (3 * 16 + 6 * 16**2 + 16 * 32 + 5 * 32**2 + 32 * 64 + 5 * 64**2)
    normalizations = 2 * (7 * 16 + 6 * 32 + 6 * 64)
    parameters = sum(variable.numpy().size for variable in model.trainable_variables)
    assert parameters == convolutions + normalizations + 64 * 10 + 10 == 269_722
    assert len(model.trainable_variables) == 19 + 2 * 19 + 2
