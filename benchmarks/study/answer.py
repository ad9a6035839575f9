"""The answer at the head of docs/evidence.md, its figures from the table of results."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from benchmarks.study.claims import Known
from benchmarks.study.conditions import BASELINES, COEFFICIENTS, CONDITIONS, trust_label
from benchmarks.study.conditions_page import FirstDifferences, claim_differences, verdict
from benchmarks.study.differences import LEAST_SEEDS, Difference, paired_difference
from benchmarks.study.grid import Outcome
from benchmarks.study.reduced import REDUCED
from benchmarks.study.render import shown, with_interval
from benchmarks.study.studies import STUDIES, TWO_CONV

BASE = "momentum, warm-up"
CANDIDATES = ("LARS, warm-up", "SNGM", "CLARS")
"""Of which one is taken where it is ahead of `BASE`; they keep no more than it."""
_METRIC = TWO_CONV.metric
_NOTHING = Outcome({}, None, [], [])


def _of(known: Known, study: str, cell: str, label: str) -> Outcome:
    return known.get((study, cell, label), _NOTHING)


def _two_conv(known: Known, batch: int, label: str) -> Outcome:
    return _of(known, "two_conv", f"two-conv, B={batch}", label)


def _rate(outcome: Outcome) -> str:
    return "–" if outcome.best is None else f"{outcome.best:.3g}"


def _updates(outcome: Outcome) -> str:
    return f"{outcome.rows[0]['updates']:,}" if outcome.rows else "–"


def _between(known: Known, study: str, cell: str, labels: tuple[str, str]) -> Difference | None:
    return paired_difference(*(_of(known, study, cell, label).by_seed(_METRIC) for label in labels))


def _difference(known: Known, study: str, cell: str, labels: tuple[str, str]) -> str:
    """With its interval, of two methods, and what may be said.

    Where the study lists the pair, this is after Holm's correction, as in its table.
    """
    of = STUDIES[study]
    difference = _between(known, study, cell, labels)
    if difference is None:
        begun = all(_of(known, study, cell, label).final for label in labels)
        return "too few seeds yet" if begun else "not run yet"
    outcomes = {(c, label): found for (name, c, label), found in known.items() if name == study}
    place = next(each for each, _ in of.comparisons if each.name == cell)
    _, adjusted = claim_differences(of, outcomes, place).get(labels, (difference, 1.0))
    return f"{with_interval(of.metric, difference)}, {verdict(of.metric, difference, adjusted)}"


def _taken(first: FirstDifferences, batch: int) -> str:
    """The candidate with the largest lead whose interval excludes 0, else the base."""
    ahead = {
        label: first[label, BASE, batch][0]
        for label in CANDIDATES
        if (label, BASE, batch) in first and first[label, BASE, batch][0].low > 0
    }
    return max(ahead, key=lambda label: ahead[label].mean, default=BASE)


def _by_batch(known: Known, first: FirstDifferences) -> str:
    lines = [
        "| batch | updates | take | rate here | test accuracy | points over momentum SGD, warm-up "
        "| how sure |",
        "|---:|---:|---|---:|---:|---:|---|",
    ]
    for batch in sorted({batch for *_, batch in first}):
        label = _taken(first, batch)
        outcome = _two_conv(known, batch, label)
        lead, sure = "–", "LARS, SNGM and CLARS are not ahead of it"
        if label != BASE:
            difference, adjusted = first[label, BASE, batch]
            lead = with_interval(_METRIC, difference)
            sure = f"{verdict(_METRIC, difference, adjusted)}; {difference.seeds} seeds"
        accuracy = shown(_METRIC, outcome.final)
        cells = (f"{batch:,}", _updates(outcome), label, _rate(outcome), accuracy, lead, sure)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _resnet(known: Known, first: FirstDifferences) -> str:
    batch = 8192
    lars = _two_conv(known, batch, "LARS, warm-up")
    found = first.get(("LARS, warm-up", BASE, batch))
    lead = with_interval(_METRIC, found[0]) if found else "not run yet"
    rates = {_rate(_two_conv(known, b, "LARS, warm-up")): None for b in (1024, 4096, batch)}
    resnet = ("resnet20", "ResNet-20, B=4096")
    of_resnet = _of(known, *resnet, "LARS, warm-up")
    return (
        "**A ResNet at batch 8k.** *Some hundred updates*: LARS, warm-up over a tenth of them, "
        f"τ = 0.001, a rate near {' or '.join(rates)} (two-conv) or {_rate(of_resnet)} (ResNet-20) "
        "searched by factors of 2, nothing excluded from the trust ratio. How sure: not tested at "
        f"that size; on two-conv at 8,192 ({_updates(lars)} updates) it differs by {lead} points "
        "from momentum SGD with the same warm-up, on ResNet-20 at 4,096 "
        f"({_updates(of_resnet)} updates) by "
        f"{_difference(known, *resnet, ('LARS, warm-up', BASE))}. *Thousands of updates*: "
        "momentum SGD with warm-up first, then LARS. How sure: not tested here; in the papers "
        "ResNet-50 on ImageNet at 8k (14,000 updates) has 76.26 % with momentum SGD, 76.60 with "
        "LARS, 76.89 with LAMB, 77.36 with VR-LARS (VRGD, Table 2, several sources)."
    )


def _bert(known: Known) -> str:
    seen = [
        f"at {batch} {_difference(known, 'bert', f'BERT-tiny, B={batch}', ('VR-LAMB', 'LAMB'))}"
        for batch in (32, 128)
    ]
    return (
        "**BERT at 32k** (sequences in an update). LAMB with warm-up, or AdamW at a rate of its "
        "own; LAMB from 0.0042, 28 % of phase 1 warm-up, biases and LayerNorm without decay and "
        "trust ratio (configuration `vrgd_32k_phase1` with `type=lbopt_lamb`). How sure: not "
        "tested here; in the papers BERT-large has an F1 on SQuAD of 91.48 with LAMB, 91.58 with "
        "Adam, 91.58 with VR-LAMB (VRGD, Table 1, several sources): no reason to prefer one. On "
        f"BERT-tiny VR-LAMB − LAMB is, in the loss of masked words, {seen[0]}, and {seen[1]}."
    )


def _warmup(known: Known) -> str:
    cell = "two-conv, B=4096"
    gain = _difference(known, "two_conv", cell, (BASE, "momentum"))
    return (
        f"**Warm-up comes first.** At 4,096 two epochs bring momentum SGD, in points: {gain}. "
        "Then the rate, by factors of 2: [one twice too large](#two-convolutions-on-cifar-10) "
        "costs more than one half as large as the best."
    )


def _tau(known: Known) -> str:
    """What the trust study says of τ and of warm-up, as far as it has been run."""
    text = "**τ, and whether LARS needs warm-up:** "
    best = []
    for warmup in (True, False):
        means = {
            tau: statistics.fmean(scores)
            for tau in COEFFICIENTS
            if len(scores := _lars(known, 4096, tau, warmup).by_seed(_METRIC).values())
            >= LEAST_SEEDS
        }
        best += [max(means, key=lambda tau: means[tau])] if means else []
    if len(best) < 2:
        return (
            f"{text}not known yet. The first edition's LARS without warm-up is "
            "[confounded](#lars-without-warm-up-confounded); the study that takes it apart "
            "(`--study=trust`) is being run."
        )
    pair = trust_label("LARS", best[0], warmup=True), trust_label("LARS", best[1])
    differences = [
        f"at {batch:,} {_difference(known, 'trust', cell, pair)}"
        for batch in (1024, 4096, 8192)
        for cell in (f"two-conv, B={batch}",)
        if _between(known, "trust", cell, pair)
    ]
    return (
        f"{text}it is best at τ = {best[0]:g} with warm-up, and without at {best[1]:g} (4,096, "
        f"table below). The first of these − the second, in points: {'; '.join(differences)}."
    )


def _lars(known: Known, batch: int, coefficient: float | None, warmup: bool) -> Outcome:
    label = trust_label("LARS", coefficient, warmup=warmup)
    return _of(known, "trust", f"two-conv, B={batch}", label)


def _by_tau(known: Known) -> str:
    """LARS at 4,096 by τ, with and without warm-up."""
    lines = [
        "| LARS at 4,096 | no warm-up | warm-up | warm-up brings, points |",
        "|---|---:|---:|---|",
    ]
    for tau in (*COEFFICIENTS, None):
        cells = [
            f"τ = {tau:g}" if tau else "zero biases at η τ, not η (ρ = τ): any τ",
            *(shown(_METRIC, _lars(known, 4096, tau, warmup).final) for warmup in (False, True)),
            _difference(
                known,
                "trust",
                "two-conv, B=4096",
                (trust_label("LARS", tau, warmup=True), trust_label("LARS", tau)),
            ),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _others(known: Known, first: FirstDifferences) -> str:
    of_vrgd = [d for (label, *_), (d, _) in first.items() if label.startswith("VR-")]
    above = sum(d.low > 0 for d in of_vrgd)
    below = sum(d.high < 0 for d in of_vrgd)
    warmed = ("EXTRAP-SGD", "Nesterov momentum")
    pair = (f"{warmed[0]}, warm-up", f"{warmed[1]}, warm-up")
    ahead = [
        f"{b:,}" for *of, b in sorted(first) if tuple(of) == pair and first[(*pair, b)][0].low > 0
    ]
    return (
        f"**VRGD and EXTRAP:** with warm-up, of {len(of_vrgd)} intervals of VRGD's forms against "
        f"their tuned bases {above} lie above 0 and {below} below. EXTRAP-SGD is ahead of its "
        f"base, Nesterov's SGD, at {' and '.join(ahead) or 'no batch'} (before the correction); "
        "EXTRAP-SGD − its base at 4,096, in points: "
        f"{_difference(known, 'warmed', 'two-conv, B=4096', warmed)}."
    )


def _baselines(known: Known) -> str:
    ((cell, _),) = BASELINES.comparisons
    differences = "; ".join(
        f"{label} {_difference(known, BASELINES.name, cell.name, (label, base))}"
        for label, base in BASELINES.claims
        if base == "LARS"
    )
    return (
        "**[Baselines of 2026](#baselines-of-2026)** − LARS at 8,192, all with warm-up, in "
        f"points: {differences}. Keras's Muon steps by AdamW wherever a variable is not a matrix."
    )


def state(known: Known) -> str:
    """Returns how much of the second edition has been run, a study a row."""
    lines = ["| study | contenders with a result | of |", "|---|---:|---:|"]
    for study in (*CONDITIONS, *REDUCED):
        keys = [(study.name, cell.name, c.label) for cell, cs in study.comparisons for c in cs]
        done = sum(bool(known[key].final) and not known[key].missing for key in keys)
        lines.append(f"| `{study.name}` | {done} | {len(keys)} |")
    return "\n".join(lines)


def blocks(known: Known, first: FirstDifferences) -> Mapping[str, str]:
    """Returns the blocks of the page by name."""
    also = (_warmup(known), _tau(known), _others(known, first), _baselines(known))
    return {
        "answer": f"{_resnet(known, first)}\n\n{_bert(known)}",
        "answer-by-batch": _by_batch(known, first),
        "answer-also": "\n".join(f"- {each}" for each in also) + "\n\n" + _by_tau(known),
        "state": state(known),
    }
