"""The papers' claims and what the table of results says of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.study.conditions import (
    NESTEROV_IN_PARTS,
    WEIGHTED,
    scaled_label,
    trust_label,
)
from benchmarks.study.conditions_page import GAP_METRIC
from benchmarks.study.curves import generalization_gap
from benchmarks.study.differences import LEVEL, Difference, holm, paired_difference
from benchmarks.study.grid import ACCURACY, Metric, Outcome, Results, Row, Study, outcomes
from benchmarks.study.reduced import (
    COROLLARY,
    CRITEO,
    EXTRAP_SMALL,
    NESTEROV,
    SGD,
    SMOOTHNESS,
    SNGM_THEORY,
    TUNED_SNGM,
    VR_SGD,
)
from benchmarks.study.reduced_page import SMOOTHNESS_METRIC, mean_smoothness
from benchmarks.study.render import with_interval
from benchmarks.study.studies import SLOW_SGD, STUDIES

REPRODUCED, IN_DIRECTION, NOT = "reproduced", "in direction", "not"
_NOT_YET = "not run yet"

Known = Mapping[tuple[str, str, str], Outcome]
Value = Callable[[Row], float | None]
"""What is compared, of a run's row."""


def all_outcomes(results: Mapping[str, Results]) -> Known:
    """What is known of every contender, by names of study, cell and contender."""
    return {
        (name, *key): outcome
        for name, study in STUDIES.items()
        for key, outcome in outcomes(study, results[name]).items()
    }


@dataclass(frozen=True)
class Side:
    """One of the two methods that a comparison is between.

    Attributes:
        study: A key of `STUDIES`.
        cell: The cell's name.
        label: The contender's.
        value: What is compared; the study's metric by default.
    """

    study: str
    cell: str
    label: str
    value: Value | None = None

    def by_seed(self, known: Known) -> dict[int, float]:
        """The values there are, by seed; a run that diverged has the accuracy of chance."""
        outcome = known.get((self.study, self.cell, self.label), Outcome({}, None, [], []))
        if self.value is None:
            return outcome.by_seed(STUDIES[self.study].metric)
        found = {int(row["flags"]["seed"]): self.value(row) for row in outcome.rows}
        return {seed: value for seed, value in found.items() if value is not None}


@dataclass(frozen=True)
class Comparison:
    """What a claim is held against.

    Attributes:
        here: In words.
        first: What is claimed to be ahead.
        second: Of what.
        metric: Of the difference; that of the study by default.
    """

    here: str
    first: Side
    second: Side
    metric: Metric | None = None

    @property
    def unit(self) -> Metric:
        """The metric of the difference."""
        return self.metric or STUDIES[self.first.study].metric

    def difference(self, known: Known) -> Difference | None:
        """Of the seeds that both have."""
        return paired_difference(self.first.by_seed(known), self.second.by_seed(known))


@dataclass(frozen=True)
class Claim:
    """A claim of a paper.

    Attributes:
        paper: Its method.
        text: What is claimed, and where.
        comparisons: In the order of how near they are to the claim's own conditions. The first
            that there are runs for tells the verdict.
        command: What would test it, where nothing here can: of ``python -m official_recipes``.
        seen: The verdict, and what it rests on, of one that no row of the table tells.
    """

    paper: str
    text: str
    comparisons: Sequence[Comparison] = ()
    command: str = ""
    seen: tuple[str, str] = ("", "")


def verdict_on_claim(metric: Metric, difference: Difference, adjusted: float) -> str:
    """One of three words, by the sign, the interval and the p value of Holm's correction."""
    if difference.mean == 0 or (difference.mean < 0) != metric.lower_is_better:
        return NOT
    return REPRODUCED if difference.excludes_zero and adjusted < LEVEL else IN_DIRECTION


def claims_of_papers(known: Known, claims: Sequence[Claim] | None = None) -> str:
    """Returns a table of claims, one a row, and one of those that can not be tested here.

    Holm's correction is for all that have runs.
    """
    claims = CLAIMS if claims is None else claims
    found: list[tuple[Comparison, Difference] | None] = []
    for claim in claims:
        told = ((each, each.difference(known)) for each in claim.comparisons)
        found.append(next(((c, d) for c, d in told if d is not None), None))
    tested = [each[1] for each in found if each is not None]
    adjusted = iter(holm([difference.p for difference in tested]))
    lines = [
        "| claim | compared here | difference [95 % interval] | seeds | verdict |",
        "|---|---|---:|---:|---|",
    ]
    untested = ["| not testable here | the command that would test it |", "|---|---|"]
    paper = ""
    for claim, told in zip(claims, found, strict=True):
        if claim.command:
            command = f"`python -m official_recipes.{claim.command}`"
            untested.append(f"| {claim.paper}, {claim.text} | {command} |")
            continue
        verdict, here, difference, seeds = *claim.seen, "–", "–"
        if told is not None:
            metric = told[0].unit
            here, seeds = told[0].here + _unit(metric), str(told[1].seeds)
            difference = with_interval(metric, told[1])
            verdict = verdict_on_claim(metric, told[1], next(adjusted))
        elif claim.comparisons:
            nearest = claim.comparisons[0]
            verdict, here = _NOT_YET, f"{nearest.here} (`--study={nearest.first.study}`)"
        if claim.paper != paper:
            paper = claim.paper
            lines.append(f"| **{paper}** | | | | |")
        verdict = verdict if verdict == _NOT_YET else f"**{verdict}**"
        lines.append(f"| {claim.text} | {here} | {difference} | {seeds} | {verdict} |")
    counted = f"Holm's correction is for the {len(tested)} comparisons that have runs."
    return "\n".join([*lines, "", counted, "", *untested])


def _unit(metric: Metric) -> str:
    """Behind what is compared, if it is no accuracy in points."""
    return "" if metric.unit == ACCURACY.unit else f"; {metric.title}"


# --- What is compared besides the metric ----------------------------------------------------------

TRAINING_LOSS = Metric(
    "train_loss", lower_is_better=True, scale=1.0, unit="", label="training loss"
)


def last_training_loss(row: Row) -> float | None:
    """The mean over the last epoch, in training mode."""
    return None if row["diverged"] else row["train_loss"][-1]


def _training_loss_at_half(row: Row) -> float | None:
    losses = row["train_loss"]
    return None if row["diverged"] else losses[len(losses) // 2 - 1]


def _accuracy_at_half(row: Row) -> float | None:
    if row["diverged"]:
        return ACCURACY.chance
    evaluations = row["evaluations"]
    return evaluations[len(evaluations) // 2 - 1]["test_accuracy"]


def _log_loss_at_half(row: Row) -> float | None:
    """After half of the updates, or the first kept update behind it."""
    curve = row.get("curve")
    if curve is None:
        return None
    half = curve["steps"][-1] / 2
    pairs = zip(curve["steps"], curve["test_loss"], strict=True)
    return math.log10(next(loss for step, loss in pairs if step >= half))


# --- The claims -----------------------------------------------------------------------------------

_LARS, _NESTEROV = "LARS at τ = 0.01", "Nesterov momentum, warm-up"
_POINTS = "EXTRAP-SGD, γ̂ = η / k"
_PLAIN, _WARM = trust_label("LARS", None), trust_label("LARS", None, warmup=True)
_LSTM, _TRANSFORMER = ("wikitext2", "LSTM, B=64"), ("multi30k", "transformer, B=512")
_UNIFORM = ("regression", "uniform inputs, label noise 0, 100 updates")
_SMALL = ("extrapolation", "two-conv, B=2048, 6 epochs")


def _only_cell(study: Study) -> tuple[str, str]:
    return (study.name, study.comparisons[0][0].name)


def _first(batch_size: int) -> tuple[str, str]:
    """A cell of the first edition."""
    return ("two_conv", f"two-conv, B={batch_size}")


def _in(
    cell: tuple[str, str],
    here: str,
    first: str,
    second: str,
    value: Value | None = None,
    other_value: Value | None = None,
    metric: Metric | None = None,
) -> Comparison:
    """Of two labels in a cell, by the same value of both if no other is given."""
    sides = Side(*cell, first, value), Side(*cell, second, other_value or value)
    return Comparison(here, *sides, metric)


def _scaled(name: str, batch_size: int, what: str = "", value: Value | None = None) -> Comparison:
    """VRGD against its base at the rate of 256 times √(B / 256), with warm-up."""
    labels = [scaled_label(label, True) for label in (f"{WEIGHTED[name][0]}, k = 8", name)]
    here = f"two-conv, {batch_size:,}, scaled rate{what}"
    return _in(("scaled", f"two-conv, B={batch_size}"), here, *labels, value)


def _by_half(here: str, label: str) -> Comparison:
    sides = Side(*_UNIFORM, "VR-SGD", _log_loss_at_half), Side(*_UNIFORM, label)
    return Comparison(f"uniform inputs, {here}", *sides)


def _half_of_the_updates(cell: tuple[str, str], here: str, first: str, second: str) -> Comparison:
    values = _training_loss_at_half, last_training_loss
    return _in(cell, f"{here}, at half against the end", first, second, *values, TRAINING_LOSS)


def _extrap(first: str, second: str, rate: str) -> Comparison:
    cell = ("extrap", f"two-conv, B=8192, {rate} rate")
    return _in(cell, f"two-conv, 8,192, k = 32, {rate} rate", first, second)


def _extrap_sgd(batch_size: int) -> Comparison:
    here = f"two-conv, {batch_size:,}, k = 8, both tuned, warm-up"
    return _in(_first(batch_size), here, "EXTRAP-SGD, warm-up", _NESTEROV)


def _trust(here: str, first: str, second: str) -> Comparison:
    return _in(("trust", "two-conv, B=4096"), f"two-conv, 4,096, {here}", first, second)


def _across(note: str, first: str, batches: tuple[int, int], *by: Any) -> Comparison:
    """The first edition's method against momentum SGD, at two batch sizes."""
    sides = (
        Side(*_first(batches[0]), first, *by[:1]),
        Side(*_first(batches[1]), "momentum", *by[:1]),
    )
    return Comparison(f"two-conv{note}", *sides, *by[1:])


_CLAIMS: dict[str, list[tuple[str, Comparison | Sequence[Comparison] | str]]]
# fmt: off
_CLAIMS = {
    "SNGM": [
        ("Figure 1: momentum SGD has a higher test accuracy at 128 than at 4,096",
         _across("", "momentum", (128, 4096))),
        ("Figure 1: momentum SGD has a lower training loss at 128 than at 4,096",
         _across("", "momentum", (128, 4096), last_training_loss, TRAINING_LOSS)),
        ("Table 2: at 4,096 SNGM is ahead of momentum SGD, both without warm-up",
         _in(_first(4096), "two-conv, 4,096", "SNGM", "momentum")),
        ("Table 2: at 4,096 SNGM is ahead of LARS without warm-up",
         _in(_first(4096), "two-conv, 4,096, LARS at τ = 0.01", "SNGM", _LARS)),
        ("Table 2: at 4,096 SNGM is ahead of LARS with warm-up",
         _in(_first(4096), "two-conv, 4,096, LARS at τ = 0.001", "SNGM", "LARS, warm-up")),
        ("Figure 2: at 4,096 SNGM has a lower training loss than LARS",
         _in(_first(4096), "two-conv, 4,096, LARS at τ = 0.01", "SNGM", _LARS,
             last_training_loss, metric=TRAINING_LOSS)),
        ("Table 2: SNGM at 4,096 is as good as momentum SGD at 128",
         _across(", 240 against 7,800 updates", "SNGM", (4096, 128))),
        ("Corollary 2: the batch and the rate that it gives are as good as a tuned rate",
         _in(_only_cell(SNGM_THEORY), "two-conv, 1,000", COROLLARY, TUNED_SNGM)),
        ("Table 2: ResNet-20 and ResNet-56, 160 epochs",
         "cifar.train --config_file=sngm_table2_resnet20_sngm"),
        ("Table 3: ResNet-50 on ImageNet at 8k is as good as momentum SGD at 256",
         "resnet50.train --config_file=sngm_8k"),
    ],
    "VRGD": [
        *((f"Table 5: at 8k and a rate scaled by √B, {WEIGHTED[name][0]} is ahead of {name}",
           _scaled(name, 8192)) for name in WEIGHTED),
        *((f"Figure 2: {WEIGHTED[name][0]} converges faster than {name}, 1.7 to 4 times",
           _scaled(name, 2048, ", test accuracy at half of the epochs", _accuracy_at_half))
          for name in WEIGHTED),
        *((f"Table 5: VR-{name} is ahead of {base} at 8k",
           _in(_first(8192), "two-conv, 8,192, both tuned, warm-up",
               f"VR-{name}, warm-up", f"{base}, warm-up"))
          for name, base in (("Momentum", "momentum"), ("Adam", "Adam"), ("LAMB", "LAMB"),
                             ("LARS", "LARS"))),
        ("Table 3: VR-LARS has a smaller generalization gap (test − training) than LARS",
         _in(("gap", "5,000 images, B=2048"), "two-conv, 5,000 images, 2,048", "VR-LARS", "LARS",
             generalization_gap, metric=GAP_METRIC)),
        ("Table 4: VR-SGD is ahead of SGD on DLRM, the more the larger the batch",
         _in(("dlrm", "DLRM, B=8192"), "made-up clicks, 8,192, both tuned", "VR-SGD", "SGD")),
        ("Table 4: VR-SGD is ahead of SGD on DLRM, on rows of Criteo",
         _in(_only_cell(CRITEO), "Criteo sample, 256, both tuned", VR_SGD, SGD)),
        ("Table 1: VR-LAMB is ahead of LAMB on BERT",
         _in(("bert", "BERT-tiny, B=128"), "BERT-tiny, 128, both tuned", "VR-LAMB", "LAMB")),
        ("§7.2: on linear regression VR-SGD has after 50 updates the loss of SGD after 100",
         _by_half("both tuned", "SGD")),
        ("§7.2, if SGD's rate, which the paper does not tell, was half of its best",
         _by_half("SGD at half of its best rate", SLOW_SGD)),
        ("Figure 3: γ in (0.04, 0.2) is better than γ near 1",
         _in(_UNIFORM, "uniform inputs, γ = 0.1 against 1", "VR-SGD", "VR-SGD, γ = 1")),
        ("Figure 3: γ in (0.04, 0.2) is better than a smaller γ",
         _in(_UNIFORM, "uniform inputs, γ = 0.1 against 0.01", "VR-SGD", "VR-SGD, γ = 0.01")),
        ("Figure 3: k in [32, 256] is better than a smaller k",
         _in(_UNIFORM, "uniform inputs, k = 32 against 4", "VR-SGD", "VR-SGD, k = 4")),
        ("Table 5: ResNet-56 on CIFAR-10, 256 to 8k",
         "cifar.train --config_file=vrgd_table5_vr_lars"),
        ("Table 1: BERT-large up to 128k/64k without loss of F1",
         "bert.train --config_file=vrgd_128k_64k_phase1"),
        ("Tables 2 and 3: ResNet-50 on ImageNet at 96k, 0.52 points over LARS",
         "resnet50.train --config_file=vrgd_96k"),
        ("Table 4: DLRM on Criteo at 512k", "dlrm.train --config_file=vrgd_512k"),
    ],
    # Where the second edition's runs are missing, the first one's tell.
    "CLARS": [
        ("Figure 1: at 8,192 LARS has a lower training loss than Nesterov's SGD",
         _in(_first(8192), "two-conv, 8,192, warm-up", "LARS, warm-up", _NESTEROV,
             last_training_loss, metric=TRAINING_LOSS)),
        ("Eq. 3: LARS is better with warm-up than without", _trust("ρ = τ", _WARM, _PLAIN)),
        ("Figure 4, Table 1: CLARS without warm-up is ahead of LARS with it",
         (_trust("ρ = τ", trust_label("CLARS", None), _WARM),
          _in(_first(4096), "two-conv, 4,096, τ = 0.01 and 0.001", "CLARS", "LARS, warm-up"))),
        ("Without warm-up and at τ = 0.01 CLARS is ahead of LARS, which diverges",
         (_trust("τ = 0.01", trust_label("CLARS", 0.01), trust_label("LARS", 0.01)),
          _in(_first(4096), "two-conv, 4,096, τ = 0.01", "CLARS", _LARS))),
        ("On another network, too, CLARS is ahead of LARS, both without warm-up",
         _in(("mnist", "MNIST CNN, B=1024"), "MNIST CNN, 1,024, τ = 0.01", "CLARS", "LARS")),
        ("Figure 3: CLARS without warm-up is ahead of Nesterov's SGD with it",
         _in(_first(8192), "two-conv, 8,192", "CLARS", _NESTEROV)),
        ("Figure 3: ResNet-56 on CIFAR-100, CLARS ahead of frozen last layers, too",
         "cifar.train --config_file=clars_figure3_resnet56_fc_freeze"),
        ("Table 1: ResNet-50 on ImageNet at 16k, better than LARS",
         "resnet50.train --config_file=clars_16k"),
    ],
    "EXTRAP": [
        ("Figure 2a: at 8k and a constant rate EXTRAP-SGD ends ahead of SGD",
         _extrap(_POINTS, "Nesterov momentum", "constant")),
        ("Figure 2a: at 8k and a constant rate it needs at most half of SGD's updates",
         _half_of_the_updates(("extrap", "two-conv, B=8192, constant rate"),
                              "two-conv, 8,192, k = 32", _POINTS, "Nesterov momentum")),
        ("Figure 2a: with BatchNormalization, at a constant rate, EXTRAP-SGD ends ahead of SGD",
         _in(("extrap", "ResNet-8, B=2048, constant rate"), "ResNet-8, 2,048, k = 32 for both",
             _POINTS, NESTEROV_IN_PARTS)),
        ("Figure 2b: at 8k and a constant rate EXTRAP-SGD's trajectory is smoother than SGD's",
         _in(_only_cell(SMOOTHNESS), "two-conv, 8,192, k = 32, mean along it", EXTRAP_SMALL,
             NESTEROV, mean_smoothness, metric=SMOOTHNESS_METRIC)),
        ("Table 1: at 8k, decayed, with LARS, EXTRAP-SGD is ahead of SGD",
         _extrap("EXTRAP-SGD with LARS", "LARS, Nesterov", "decayed")),
        ("Table 1: at 8k, decayed, without LARS, EXTRAP-SGD is ahead of SGD",
         (_extrap(_POINTS, "Nesterov momentum", "decayed"), _extrap_sgd(8192))),
        ("EXTRAP-SGD is ahead of SGD at a smaller batch, too", _extrap_sgd(1024)),
        ("Table 1: uniform noise in the place of past gradients is ahead of SGD",
         _in(_SMALL, "two-conv, 2,048, k = 4", "extrapolated SGD, uniform noise",
             "mini-batch SGD")),
        ("Table 2: EXTRAP-SGD with post-local SGD is ahead of SGD",
         _in(_SMALL, "two-conv, 2,048, k = 4", "EXTRAP-SGD + post-local SGD", "mini-batch SGD")),
        ("Figure 3: EXTRAP-SGD needs at most half of SGD's updates, LSTM",
         _half_of_the_updates(_LSTM, "WikiText-2, 64, k = 8", "EXTRAP-SGD", "Nesterov momentum")),
        ("Figure 3: EXTRAP-SGD ends at a lower perplexity, LSTM",
         _in(_LSTM, "WikiText-2, 64, k = 8", "EXTRAP-SGD", "Nesterov momentum")),
        ("Figure 4: EXTRAP-ADAM needs at most half of Adam's updates, transformer",
         _half_of_the_updates(_TRANSFORMER, "Multi30k, 512, k = 8", "EXTRAP-ADAM", "Adam")),
        ("Figure 4: EXTRAP-ADAM ends ahead of Adam, transformer",
         _in(_TRANSFORMER, "Multi30k, 512, k = 8", "EXTRAP-ADAM", "Adam")),
        ("Tables 1 and 2: ResNet-20 at 8k, 32 workers, 300 epochs",
         "cifar.train --config_file=extrap_table1_resnet20"),
    ],
}
# fmt: on
_SEEN = {
    "CLARS": (
        "Figure 2: M_k is largest in the top layers in the first epochs",
        (
            IN_DIRECTION,
            "[clars.md](clars.md#which-layers-gradients-vary-figure-2-of-the-paper), by hand, one "
            "seed: 12 to 18 times the first layer's",
        ),
    ),
}


def _claims() -> Iterator[Claim]:
    for paper, claims in _CLAIMS.items():
        for text, told in claims:
            if isinstance(told, str):
                yield Claim(paper, text, command=told)
            else:
                yield Claim(paper, text, [told] if isinstance(told, Comparison) else told)
        if paper in _SEEN:
            text, seen = _SEEN[paper]
            yield Claim(paper, text, seen=seen)


CLAIMS = tuple(_claims())
