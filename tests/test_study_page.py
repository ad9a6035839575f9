"""Tables and plots of the study's second edition."""

import dataclasses
import math

import pytest
from matplotlib.figure import Figure
from PIL import Image
from test_study import carry_out

from benchmarks.study.conditions import CONDITIONS
from benchmarks.study.conditions_page import (
    FIRST_CLAIMS,
    blocks,
    claims_table,
    differences_by_batch,
    plots,
    results_table,
    verdict,
)
from benchmarks.study.curves import examples_to, generalization_gap, mean_curve, updates_to
from benchmarks.study.differences import Difference
from benchmarks.study.grid import ACCURACY, FINAL, Cell, Contender, Metric, Results, Study
from benchmarks.study.panels import (
    Interval,
    Line,
    Panel,
    _draw,
    plot_intervals,
    plot_panels,
    spaced,
    spread_out,
)
from benchmarks.study.render import with_interval
from benchmarks.study.studies import STUDIES


def row(accuracies, seed=1):
    evaluations = [
        {"epoch": float(epoch), "test_accuracy": a, "train_accuracy": a + 0.1}
        for epoch, a in enumerate(accuracies, start=1)
    ]
    return {
        "evaluations": evaluations,
        "final": evaluations[-1],
        "updates": 12 * len(accuracies),
        "batch_size": 4096,
        "flags": {"seed": seed},
    }


def test_updates_and_examples_to_a_target():
    run = row([0.3, 0.5, 0.45, 0.6])
    assert updates_to(run, "test_accuracy", 0.5) == 24
    assert examples_to(run, "test_accuracy", 0.5) == 24 * 4096
    assert updates_to(run, "test_accuracy", 0.55) == 48
    assert updates_to(run, "test_accuracy", 0.61) == math.inf


def test_the_gap_is_test_minus_training():
    assert generalization_gap(row([0.5])) == pytest.approx(-0.1)
    assert generalization_gap({"final": {"test_accuracy": 0.5}}) is None


def test_mean_curves_have_the_epochs_of_all_seeds():
    epochs, means, deviations = mean_curve([row([0.3, 0.5, 0.6]), row([0.5, 0.5])], "test_accuracy")
    assert epochs == [1.0, 2.0]
    assert means == pytest.approx([0.4, 0.5])
    assert deviations == pytest.approx([0.2 / math.sqrt(2), 0.0])
    assert mean_curve([], "test_accuracy") == ([], [], [])


def test_what_may_be_said_of_a_difference():
    ahead, behind = Difference(0.02, 0.01, 0.03, 0.001, 3), Difference(-0.02, -0.03, -0.01, 0.01, 3)
    assert verdict(ACCURACY, ahead, 0.01) == "ahead"
    assert verdict(ACCURACY, behind, 0.2) == "behind, before the correction"
    unclear = Difference(0.02, -0.011, 0.05, 0.1, 3)
    assert verdict(ACCURACY, unclear, 0.1) == "not told apart"
    assert with_interval(ACCURACY, unclear) == "+2.0 [−1.1, +5.0]"
    loss = Metric("loss", lower_is_better=True, scale=1.0, unit="", digits=3)
    assert verdict(loss, behind, 0.01) == "ahead"
    assert with_interval(loss, behind) == "−0.020 [−0.030, −0.010]"


CELL = Cell("two-conv, B=4096", {"batch_size": 4096}, 10)
CONTENDERS = [Contender(label, {}, values=(0.1, 0.2, 0.4)) for label in ("a", "b", "c")]
STUDY = Study("study", [(CELL, CONTENDERS)], claims=[("a", "b"), ("a", "c"), ("a", "missing")])


def rows_of(study, gains, seeds_differ=0.01):
    """Made-up runs; a method's seeds are its gain above those of the others."""

    def score(run):
        common = seeds_differ * math.sin(run.seed) + 0.001 * (run.label == "a") * run.seed
        return 0.6 + gains.get(run.label, 0.0) + common - 0.05 * abs(math.log2(run.value / 0.2))

    rows = carry_out(study, score, limit=1000, at_once=1000)
    for made in rows:
        if made["stage"] == FINAL:
            curve = row([made["final"]["test_accuracy"] - 0.1, made["final"]["test_accuracy"]])
            flags = {"learning_rate": made["value"], **made["flags"]}
            made |= {**curve, "flags": flags}
            made["final"]["train_loss"] = 1.5
            made["evaluations"][0]["train_loss"] = 2.0
    return rows


def test_a_table_of_results_and_one_of_claims():
    rows = rows_of(STUDY, {"a": 0.05, "c": 0.0525})
    results = Results(STUDY, rows)
    table = results_table(STUDY, results, CELL).splitlines()
    assert "updates (examples) to 55 %" in table[0]
    assert table[2].startswith("| a | 0.2 | 65.")
    assert table[2].endswith("| 1.500 | −10.0 | 12 (0.05 M) | 3 |")
    claims = claims_table(STUDY, results, CELL).splitlines()
    assert len(claims) == 4
    assert "2 comparisons" in claims[0]
    assert claims[2].startswith("| a | b | +5.2 [+5.0, +5.4] |")
    assert claims[2].endswith("| 3 | ahead |")
    assert claims[3].endswith("| 3 | not told apart |")
    started = Results(STUDY, [made for made in rows if made["label"] == "a"])
    assert results_table(STUDY, started, CELL).endswith("\n\nNot run yet: b; c.")
    for table in (results_table, claims_table):
        assert table(STUDY, Results(STUDY, []), CELL) == "Not run yet."


def test_differences_by_batch():
    first, second = FIRST_CLAIMS[0]
    contenders = [Contender(label, {}, values=(0.1, 0.2, 0.4)) for label in (first, second)]
    cells = [dataclasses.replace(CELL, name=f"B={b}", settings={"batch_size": b}) for b in (8, 4)]
    study = Study("study", [(cells[0], contenders), (cells[1], contenders[:1])])
    lines = differences_by_batch(study, Results(study, rows_of(study, {first: 0.05}))).splitlines()
    assert lines[0] == "| method | against | B = 4 | B = 8 |"
    assert lines[2] == f"| {first} | {second} | – | **+5.0 [+5.0, +5.0]** \\*\\* |"
    assert len(lines) == 2 + len(FIRST_CLAIMS)


@pytest.mark.parametrize("study", CONDITIONS, ids=lambda study: study.name)
def test_a_section_of_the_page(study, tmp_path):
    """With all runs made up, then with one contender's only."""
    nothing = {other.name: Results(other, []) for other in STUDIES.values()}
    assert blocks(nothing)[study.name] == "Not run yet."
    assert plots(nothing, tmp_path) == []
    rows = rows_of(study, {})
    known = {**nothing, study.name: Results(study, rows)}
    text = blocks(known)[study.name]
    assert "Not run yet" not in text
    images = plots(known, tmp_path)
    assert len(images) == text.count("![")
    for path in images:
        with Image.open(path) as image:
            assert image.width <= 1400
    for cell, _ in study.comparisons:
        assert f"**{cell.name}**" in text
    if study.name == "gap":
        assert "gap, difference" in text
    cell, contenders = study.comparisons[0]
    one = [
        made for made in rows if (made["cell"], made["label"]) == (cell.name, contenders[0].label)
    ]
    text = blocks({**nothing, study.name: Results(study, one)})[study.name]
    assert f"| {contenders[0].label} |" in text
    assert text.count("**") == 2


def test_no_panel_has_more_lines_than_can_be_told_apart(tmp_path):
    lines = [Line(str(i), [1.0, 2.0], [i, i], color=i % 6) for i in range(7)]
    with pytest.raises(ValueError, match="at most 6 lines, not 7"):
        plot_panels(tmp_path / "a.png", [[Panel("title", "x", "y", lines)]])
    panel = Panel("t", "x", "y", lines[:6], log=True, zero="nothing")
    with pytest.raises(ValueError, match="at most 2 panels beside each other, not 3"):
        plot_panels(tmp_path / "a.png", [[panel] * 3])
    assert plot_panels(tmp_path / "b.png", [[panel], [panel]])
    assert not plot_panels(tmp_path / "c.png", [[Panel("t", "x", "y", [Line("a", (), ())])]])
    assert [path.name for path in tmp_path.iterdir()] == ["b.png"]
    with Image.open(tmp_path / "b.png") as image:
        assert image.width == 1200


def test_a_line_without_points_moves_no_other():
    axis = Figure().subplots()
    lines = [Line("not run", (), ()), Line("run", [1.0, 2.0], [0.0, 0.0], [0.1, 0.1])]
    _draw(axis, Panel("t", "x", "y", lines, log=True), ticks=3)
    assert list(axis.lines[0].get_xdata()) == [1.0, 2.0]
    empty = Figure().subplots()
    _draw(empty, Panel("t", "x", "y", lines[:1]), ticks=3)
    assert [text.get_text() for text in empty.texts] == ["not run yet"]
    assert not len(empty.get_xticks())


def test_intervals_beside_0(tmp_path):
    assert not plot_intervals(tmp_path / "a.png", [], "x")
    found = [Interval("a", 1.0, -0.5, 2.5, color) for color in (0, 1)]
    assert plot_intervals(tmp_path / "a.png", found, "x", ("first", "second"))
    assert (tmp_path / "a.png").stat().st_size > 5_000


def test_labels_are_spread_out():
    assert spread_out([0.5, 0.1, 0.51], 0.1) == pytest.approx([0.455, 0.1, 0.555])
    assert spread_out([0.99, 0.98], 0.1) == pytest.approx([0.97, 0.87])
    assert spread_out([], 0.1) == []


def test_ticks_have_room():
    assert spaced([]) == []
    assert spaced([1.0, 1.1, 2.0, 4.0]) == [4.0, 2.0, 1.1]
    assert len(spaced(2.0**i for i in range(20))) <= 6
