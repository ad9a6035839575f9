"""The answer at the head of docs/evidence.md, its figures from the table of results."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.study.claims import Known
from benchmarks.study.conditions import CONDITIONS, trust_label
from benchmarks.study.conditions_page import FirstDifferences, verdict
from benchmarks.study.differences import paired_difference
from benchmarks.study.grid import Metric, Outcome
from benchmarks.study.render import shown, with_interval
from benchmarks.study.studies import STUDIES, TWO_CONV

BASE = "momentum, warm-up"
CANDIDATES = ("LARS, warm-up", "SNGM", "CLARS")
"""Of which one is taken where it is ahead of `BASE`; they keep no more than it."""
_METRIC = TWO_CONV.metric
_NOTHING = Outcome({}, None, [], [])


def answer(known: Known, first: FirstDifferences) -> str:
    """Returns the answer: a table by batch size, and two questions in full."""
    return "\n\n".join([_by_batch(known, first), _resnet(known, first), _bert(known), _tau(known)])


def _of(known: Known, study: str, cell: str, label: str) -> Outcome:
    return known.get((study, cell, label), _NOTHING)


def _two_conv(known: Known, batch: int, label: str) -> Outcome:
    return _of(known, "two_conv", f"two-conv, B={batch}", label)


def _rate(outcome: Outcome) -> str:
    return "–" if outcome.best is None else f"{outcome.best:.3g}"


def _updates(outcome: Outcome) -> str:
    return f"{outcome.rows[0]['updates']:,}" if outcome.rows else "–"


def _difference(known: Known, study: str, cell: str, labels: tuple[str, str]) -> str:
    """With its interval, of two methods, and what may be said; outside of any correction."""
    metric: Metric = STUDIES[study].metric
    both = [_of(known, study, cell, label).by_seed for label in labels]
    difference = paired_difference(*both)
    if difference is None:
        return "not run yet"
    return f"{with_interval(metric, difference)} ({verdict(metric, difference, 1.0)})"


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
    rates = [_rate(_two_conv(known, b, "LARS, warm-up")) for b in (1024, 4096, batch)]
    resnet = ("resnet20", "ResNet-20, B=4096")
    of_resnet = _of(known, *resnet, "LARS, warm-up")
    rest = ", ".join(dict.fromkeys(rates))
    return (
        "**A ResNet at batch 8k.** Not tested here at that size. The nearest runs: the two-conv "
        f"network at 8,192 ({_updates(lars)} updates), where LARS with warm-up is {lead} points "
        f"from momentum SGD with it; ResNet-20 at 4,096 ({_updates(of_resnet)} updates), "
        f"{_difference(known, *resnet, ('LARS, warm-up', BASE))}. So with *hundreds of updates or "
        "fewer* take LARS: warm-up over a tenth of the updates, τ = 0.001, a search by factors of "
        f"2 about the best rates here ({rest} on two-conv, {_rate(of_resnet)} with ResNet-20), "
        "nothing excluded from the trust ratio. With *thousands of updates* the papers, not tested "
        "here, have little between the optimizers: ResNet-50 on ImageNet at 8k (14,000 updates) "
        "ends at 76.26 % with momentum SGD, 76.60 with LARS, 76.89 with LAMB, 77.36 with VR-LARS "
        "(VRGD, Table 2, from several sources), and at 75.42 % with SNGM, where momentum SGD at "
        "256 has 75.70 (SNGM, Table 3). There begin with momentum SGD and warm-up, and try LARS "
        "next."
    )


def _bert(known: Known) -> str:
    seen = []
    for batch in (32, 128):
        cell = f"BERT-tiny, B={batch}"
        rate = _rate(_of(known, "bert", cell, "LAMB"))
        text = _difference(known, "bert", cell, ("VR-LAMB", "LAMB"))
        seen.append(f"{text} at {batch} (LAMB's best rate: {rate})")
    return (
        "**BERT at 32k** (sequences in an update). Not tested here. In the papers BERT-large, "
        "fine-tuned on SQuAD, has an F1 of 91.48 with LAMB, 91.58 with Adam and 91.58 with VR-LAMB "
        "at 32k, 15,625 updates (VRGD, Table 1; the first two cited there): too close to choose "
        "by. Take LAMB with warm-up, or AdamW with a rate of its own. For LAMB begin at 0.0042 in "
        "phase 1, 28 % of it warm-up, biases and LayerNorm without decay and trust ratio: the "
        "configuration `vrgd_32k_phase1` with `type=lbopt_lamb`, which nobody has run here. What "
        "VR-LAMB claims is at 64k and more. The nearest runs: on BERT-tiny VR-LAMB − LAMB is, in "
        f"the loss of masked words, {seen[0]} and {seen[1]}."
    )


def _tau(known: Known) -> str:
    """What the trust study says of τ and of warm-up, as far as it has been run."""
    cell = "two-conv, B=4096"
    plain, warm = trust_label("LARS", None), trust_label("LARS", None, warmup=True)
    parts = ["**τ, and whether LARS needs warm-up.**"]
    if not _of(known, "trust", cell, warm).final or not _of(known, "trust", cell, plain).final:
        parts.append(
            "Not known yet: the first edition's LARS without warm-up is "
            "[confounded](#lars-without-warm-up-confounded), and the study that takes it apart "
            "(`--study=trust`) is being run."
        )
    else:
        text = _difference(known, "trust", cell, (warm, plain))
        parts.append(
            f"With zero biases at η τ, as everything else (ρ = τ), warm-up brings LARS {text} "
            "points at 4,096."
        )
        for tau in (0.001, 0.01, 0.1):
            of_tau = trust_label("LARS", tau)
            if _of(known, "trust", cell, of_tau).final:
                gain = _difference(known, "trust", cell, (of_tau, plain))
                parts.append(f"At τ = {tau:g} with ρ = 1 it is, without warm-up, {gain} from that.")
    return " ".join(parts)


def state(known: Known) -> str:
    """Returns how much of the second edition has been run, a study a row."""
    lines = ["| study | contenders with a result | of |", "|---|---:|---:|"]
    for study in CONDITIONS:
        keys = [(study.name, cell.name, c.label) for cell, cs in study.comparisons for c in cs]
        done = sum(bool(known[key].final) and not known[key].missing for key in keys)
        lines.append(f"| `{study.name}` | {done} | {len(keys)} |")
    return "\n".join(lines)


def blocks(known: Known, first: FirstDifferences) -> Mapping[str, str]:
    """Returns the blocks of the page by name."""
    return {"answer": answer(known, first), "state": state(known)}
