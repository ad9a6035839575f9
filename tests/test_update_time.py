import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_benchmarks import assert_bad_flag_ends_in_one_line

import tf_lbopt
from benchmarks.shapes import count, tiny

ROOT = Path(__file__).resolve().parents[1]
OURS = {info.name: info for info in tf_lbopt.list_optimizers()}
SLOTS = {name: len(info.slots) for name, info in OURS.items()} | {
    "sgd": 1,  # with momentum
    "keras_sgd": 1,
    "keras_adam": 2,
    "keras_lamb": 2,
    "keras_lion": 1,
    # One for matrices and two for all else.
    "keras_muon": 1 + count([s for s in tiny() if len(s) != 2]) / count(tiny()),
    "tf_models_lars": 1,
    "tf_models_lamb": 2,
}
# On one replica, two bases once more with the micro-steps that VRGD needs there.
AGAIN = {"lars_2_micro_steps": "lars", "lamb_2_micro_steps": "lamb"}


def run_benchmark(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.update_time", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((2, "lamb,vr_lamb,keras_lamb"), marks=pytest.mark.long),
        pytest.param((1, ""), marks=pytest.mark.long),
        pytest.param((2, ""), marks=pytest.mark.long),
    ],
    ids=["some", "one replica", "two replicas"],
)
def record(request, tmp_path_factory):
    replicas, optimizers = request.param
    pytest.importorskip("rich")
    path = tmp_path_factory.mktemp("update_time") / "record.json"
    done = run_benchmark(
        "--shapes=tiny",
        "--repeats=3",
        "--warmup=1",
        f"--replicas={replicas}",
        f"--optimizers={optimizers}",
        f"--output={path}",
    )
    assert done.returncode == 0, done.stderr
    assert "× momentum floor" in done.stdout
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    chosen = optimizers.split(",") if optimizers else list(SLOTS)
    return {**json.loads(path.read_text(encoding="utf-8")), "chosen": chosen}


def rows_of(record):
    (comparison,) = record["comparisons"]
    return {row["name"]: row for row in comparison["optimizers"]}


def test_record_says_what_was_measured(record):
    assert record["machine"]["cores"] >= 1
    assert record["versions"]["tensorflow"].startswith("2.")
    assert record["settings"]["repeats"] == 3
    (comparison,) = record["comparisons"]
    assert comparison["variables"] == len(comparison["shapes"]) == 7
    assert comparison["memory_copy"]["median_ms"] > 0
    assert comparison["resident_bytes"]["peak"] > 0


def test_every_optimizer_has_a_row_or_a_reason(record):
    rows = rows_of(record)
    skipped = {entry["name"]: entry["reason"] for entry in record["skipped"]}
    again = set(AGAIN) if record["settings"]["replicas"] == 1 else set()
    assert set(rows) | set(skipped) == set(record["chosen"]) | again
    assert set(skipped) <= {"tf_models_lars", "tf_models_lamb", "keras_muon"}
    for row in rows.values():
        assert len(row["all_ms"]) == 3
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert (row["times_keras_lamb"] is not None) == ("lamb" in row["name"])


def test_slots_are_as_documented(record):
    for name, row in rows_of(record).items():
        assert row["slots_per_parameter"] == SLOTS[AGAIN.get(name, name)], name
        assert row["times_momentum_floor"] == pytest.approx(
            row["times_own_floor"] * (3 + 2 * SLOTS[AGAIN.get(name, name)]) / 5
        )


def test_accumulation_adds_one_accumulator_and_vrgd_two(record):
    for name, row in rows_of(record).items():
        variance = name in OURS and OURS[name].needs_sub_batches
        expected = None if name.startswith("tf_models") else 2 if variance else 1
        assert row["accumulators_per_parameter"] == expected, name


def test_reductions_are_packed(record):
    replicas = record["settings"]["replicas"]
    for name, row in rows_of(record).items():
        rounds = 2 if name in OURS and OURS[name].needs_sub_batches else 1
        expected = rounds if replicas > 1 else 0
        assert row["collective_reductions_per_replica"] == expected, name


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("shapes", "resnet51"),
        ("optimizers", "sngm,adamant"),
        ("repeats", "0"),
        ("weight_decay", "-1"),
        ("replicas", "none"),
        ("output", "no/such/folder/record.json"),
        ("unknown", "1"),
    ],
)
def test_bad_flag_ends_in_one_line(flag, value, monkeypatch, capsys):
    pytest.importorskip("rich")
    arguments = [f"--{flag}={value}"]
    assert_bad_flag_ends_in_one_line("update_time", flag, arguments, monkeypatch, capsys)


def test_shapes_are_those_of_the_models():
    from benchmarks import shapes

    assert (len(shapes.resnet50()), shapes.count(shapes.resnet50())) == (161, 25_557_032)
    # Without its masked-language head BERT-base has 199 variables and 109 482 240 parameters.
    head = 768 * 768 + 3 * 768 + 30522
    assert len(shapes.bert_base()) == 199 + 5
    assert shapes.count(shapes.bert_base()) == 109_482_240 + head
