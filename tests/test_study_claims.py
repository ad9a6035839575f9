"""The papers' claims: their verdicts, and the answer at the head of docs/evidence.md."""

import math
import re
from pathlib import Path

import pytest
from test_study import carry_out

from benchmarks.study import answer
from benchmarks.study.claims import (
    CLAIMS,
    IN_DIRECTION,
    NOT,
    REPRODUCED,
    Claim,
    Comparison,
    Side,
    all_outcomes,
    claims_of_papers,
    verdict_on_claim,
)
from benchmarks.study.conditions import BASELINES, BEST_COEFFICIENTS, TRUST
from benchmarks.study.conditions_page import claim_differences, first_differences, verdict
from benchmarks.study.differences import Difference
from benchmarks.study.grid import ACCURACY, FINAL, Metric, Outcome, Results, outcomes
from benchmarks.study.studies import STUDIES, TWO_CONV

ROOT = Path(__file__).parents[1]
NATS = Metric("nats", scale=1.0, unit="", digits=3)
LOSS = Metric("loss", lower_is_better=True, scale=1.0, unit="")


@pytest.mark.parametrize(
    ("mean", "half", "adjusted", "verdict"),
    [
        (0.02, 0.01, 0.04, REPRODUCED),
        (0.02, 0.01, 0.06, IN_DIRECTION),
        (0.02, 0.03, 0.5, IN_DIRECTION),
        (0.0, 0.03, 1.0, NOT),
        (-0.02, 0.03, 0.5, NOT),
        (-0.02, 0.01, 0.01, NOT),
    ],
)
def test_a_verdict_is_by_the_sign_the_interval_and_the_correction(mean, half, adjusted, verdict):
    difference = Difference(mean, mean - half, mean + half, 0.01, 3)
    assert verdict_on_claim(ACCURACY, difference, adjusted) == verdict
    turned = Difference(-mean, -mean - half, -mean + half, 0.01, 3)
    assert verdict_on_claim(LOSS, turned, adjusted) == verdict


def outcome(*scores, **fields):
    rows = [
        {"flags": {"seed": seed}, "diverged": not math.isfinite(score), **fields}
        for seed, score in enumerate(scores, start=1)
    ]
    return Outcome({}, 0.1, list(scores), [], rows)


def side(label, value=None):
    return Side("two_conv", "cell", label, value)


def test_a_table_of_claims():
    known = {
        ("two_conv", "cell", "a"): outcome(0.60, 0.61, 0.62, train_loss=[2.0, 1.0]),
        ("two_conv", "cell", "b"): outcome(0.50, 0.51, 0.521, train_loss=[2.0, 1.5]),
        ("two_conv", "cell", "c"): outcome(-math.inf, 0.65, 0.66, train_loss=[2.0, 1.5]),
    }
    missing = Comparison("there", side("missing"), side("b"))
    claims = [
        Claim("P", "a over b", [missing, Comparison("here", side("a"), side("b"))]),
        Claim("P", "b over a", [Comparison("here", side("b"), side("a"))]),
        Claim("P", "a over c", [Comparison("here", side("a"), side("c"), NATS)]),
        Claim("P", "d over b", [missing]),
        Claim("P", "large", command="cifar.train --config_file=large"),
        Claim("P", "elsewhere", seen=(IN_DIRECTION, "a page")),
    ]
    lines = claims_of_papers(known, claims).splitlines()
    assert lines[2] == "| **P** | | | | |"
    assert lines[3] == "| a over b | here | +10.0 [+9.8, +10.1] | 3 | **reproduced** |"
    assert lines[4].endswith("| 3 | **not** |")
    # One of c's runs diverged: 10 %.
    assert lines[5].startswith("| a over c | here; nats | +0.140 [")
    assert lines[6] == "| d over b | there (`--study=two_conv`) | – | – | not run yet |"
    assert lines[7] == "| elsewhere | a page | – | – | **in direction** |"
    assert lines[9] == "Holm's correction is for the 3 comparisons that have runs."
    command = "`python -m official_recipes.cifar.train --config_file=large`"
    assert lines[-1] == f"| P, large | {command} |"


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: f"{claim.paper}: {claim.text}")
def test_what_a_claim_is_held_against_exists(claim):
    assert sum(map(bool, (claim.comparisons, claim.command, claim.seen[0]))) == 1
    for comparison in claim.comparisons:
        for each in (comparison.first, comparison.second):
            found = [cs for cell, cs in STUDIES[each.study].comparisons if cell.name == each.cell]
            assert each.label in [contender.label for cs in found for contender in cs]
    if claim.command:
        program, name = claim.command.split(" --config_file=")
        recipe = ROOT / "official_recipes" / program.split(".")[0]
        assert (recipe / "train.py").is_file()
        assert (recipe / "configs" / f"{name}.yaml").is_file()


def made_up(gains):
    """Outcomes of the first edition's runs at 4,096, with what methods have above the others."""

    def score(run):
        noise = 0.001 * math.sin(run.seed * len(run.label))
        return 0.5 + gains.get(run.label, 0.0) + noise - 0.01 * abs(math.log2(run.value))

    rows = []
    if gains:
        rows = carry_out(TWO_CONV, score, limit=5000, at_once=5000)
    for row in rows:
        if row["stage"] == FINAL:
            row["updates"] = 240
    results = {study.name: Results(study, []) for study in STUDIES.values()}
    results["two_conv"] = Results(TWO_CONV, rows)
    return all_outcomes(results), first_differences(TWO_CONV, results["two_conv"])


def test_the_answer_follows_the_rows():
    for gains, taken in (
        ({"LARS, warm-up": 0.04, "SNGM": 0.05}, "| SNGM |"),
        ({"LARS, warm-up": -0.05, "SNGM": -0.05, "CLARS": -0.05}, "| momentum, warm-up |"),
    ):
        blocks = answer.blocks(*made_up(gains))
        assert blocks["answer-by-batch"].count(taken) == 4
        assert "A ResNet at batch 8k" in blocks["answer"]
        assert "BERT at 32k" in blocks["answer"]


def test_the_answer_says_which_coefficient_is_best_with_warmup_and_without():
    best = {"LARS, τ = 0.01": 0.1, "LARS, τ = 0.1, warm-up": 0.3}

    def score(run):
        noise = 0.001 * math.sin(run.seed * len(run.label) ** 2)
        return 0.5 + noise + best.get(run.label, 0.0)

    rows = carry_out(TRUST, score, limit=5000, at_once=5000)
    known, first = made_up({})
    known |= {("trust", *key): o for key, o in outcomes(TRUST, Results(TRUST, rows)).items()}
    text = answer.blocks(known, first)["answer-also"]
    assert "best at τ = 0.1 with warm-up, and without at 0.01" in text
    # Nothing of these two was run at other batches.
    assert re.search(r"in points: at 4,096 \+(19.9|20.0|20.1) \[[^;]*$", text, re.MULTILINE)
    (row,) = [line for line in text.splitlines() if line.startswith("| τ = 0.1 |")]
    means = [float(cell.split()[0]) for cell in row.split("|")[2:5]]
    assert means == pytest.approx([50, 80, 30], abs=0.2)


def test_the_answer_compares_the_baselines_with_lars():
    gains = {"Muon": 0.02, "Lion": -0.1}
    rows = carry_out(
        BASELINES,
        lambda run: (
            0.5 + gains.get(run.label, 0.0) + 0.001 * math.sin(run.seed * ord(run.label[1]))
        ),
        limit=5000,
        at_once=5000,
    )
    known, first = made_up({})
    found = outcomes(BASELINES, Results(BASELINES, rows))
    ((cell, _),) = BASELINES.comparisons
    known |= {("baselines", *key): outcome for key, outcome in found.items()}
    text = answer.blocks(known, first)["answer-also"]
    (line,) = [line for line in text.splitlines() if "Baselines of 2026" in line]
    assert re.search(r"Muon \+(1.9|2.0|2.1) \[[^]]*\], ahead;", line)
    assert re.search(r"Lion −(9.9|10.0|10.1) \[[^]]*\], behind;", line)
    # What the answer says of a pair, its table says too, after the correction.
    for pair, (difference, p) in claim_differences(BASELINES, found, cell).items():
        if pair[1] == "LARS":
            assert f"], {verdict(ACCURACY, difference, p)}" in line.split(pair[0], 1)[1][:40]


def test_other_batches_have_the_coefficients_that_the_page_finds_best():
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    best = BEST_COEFFICIENTS
    assert f"best at τ = {best[True]:g} with warm-up, and without at {best[False]:g}" in page


def test_an_answer_without_rows():
    known, first = made_up({})
    blocks = answer.blocks(known, first)
    assert "not run yet" in blocks["answer"]
    assert blocks["answer-by-batch"].count("\n") == 1
    assert "| `warmed` | 0 | 6 |" in blocks["state"]
    assert "reproduced" not in claims_of_papers(known)
