import json
import subprocess
from pathlib import Path

import pytest
from forked_python import python
from helpers_benchmarks import assert_bad_flag_ends_in_one_line

ROOT = Path(__file__).resolve().parents[1]


def run_benchmark(*arguments):
    return subprocess.run(
        [*python(), "-m", "benchmarks.per_example_norms", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    "ways",
    ["with_norms,loop", pytest.param("with_norms,loop,vectorized_map", marks=pytest.mark.long)],
)
def test_record_of_a_tiny_run(ways, tmp_path):
    pytest.importorskip("rich")
    path = tmp_path / "record.json"
    done = run_benchmark(
        "--models=tiny",
        f"--ways={ways}",
        "--batch=3",
        "--repeats=3",
        "--naive_repeats=2",
        "--nomemory",
        f"--output={path}",
    )
    assert done.returncode == 0, done.stderr
    assert "tiny: no targets" in done.stdout
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["benchmark"] == "per_example_norms"
    assert record["settings"] == {
        "batch": 3,
        "repeats": 3,
        "naive_repeats": 2,
        "warmup": 1,
        "memory": False,
    }
    (comparison,) = record["comparisons"]
    assert (comparison["model"], comparison["variables"]) == ("tiny", 6)
    assert comparison["parameters"] == 6 * 5 + 5 + 5 * 5 + 5 + 5 * 10 + 10
    rows = {row["name"]: row for row in comparison["rows"]}
    assert set(rows) == {"gradient", *ways.split(",")}
    for name, row in rows.items():
        assert len(row["all_ms"]) == (3 if name in ("gradient", "with_norms") else 2)
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert row["times_gradient"] == row["median_ms"] / rows["gradient"]["median_ms"]
        # All ways find the same norms.
        if name != "gradient":
            assert row["mean_norms"] == pytest.approx(rows["loop"]["mean_norms"], rel=1e-4)
    assert rows["gradient"]["mean_norms"] is None
    assert len(rows["loop"]["mean_norms"]) == 6


@pytest.mark.long
def test_memory_of_one_way(tmp_path):
    pytest.importorskip("rich")
    path = tmp_path / "memory.json"
    done = run_benchmark(
        "--models=tiny", "--ways=with_norms", "--batch=3", "--memory_only", f"--output={path}"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("MiB")
    memory = json.loads(path.read_text(encoding="utf-8"))
    assert 0 < memory["before_bytes"] <= memory["peak_bytes"]


@pytest.mark.parametrize(
    ("flag", "value", "more"),
    [
        ("models", "mlp,bert_huge", ()),
        ("ways", "by_hand", ()),
        ("ways", "loop,gradient", ("--models=tiny", "--memory_only")),
        ("models", "tiny,mlp", ("--ways=loop", "--memory_only")),
        ("batch", "0", ()),
        ("output", "no/such/folder/record.json", ()),
        ("unknown", "1", ()),
    ],
)
def test_bad_flag_ends_in_one_line(flag, value, more, monkeypatch, capsys):
    pytest.importorskip("rich")
    arguments = [f"--{flag}={value}", *more]
    assert_bad_flag_ends_in_one_line("per_example_norms", flag, arguments, monkeypatch, capsys)
