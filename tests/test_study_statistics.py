"""The study's statistics: choosing a rate, paired differences, what counts."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from scipy import stats
from test_study import carry_out

from benchmarks.study.choice import Choice, Rule, choose, standard_error
from benchmarks.study.conditions import CONDITIONS
from benchmarks.study.conditions_page import claims_table, results_table
from benchmarks.study.differences import holm, paired_difference
from benchmarks.study.grid import (
    FINAL,
    TUNING,
    Cell,
    Contender,
    Metric,
    Results,
    Study,
    counted,
    next_runs,
    outcomes,
)
from benchmarks.study.ratio import measure_ratio
from benchmarks.study.runner import parsed
from official_recipes.cifar import train
from official_recipes.cifar.task import ImageTask
from official_recipes.common.flag_parsing import FlagValueError
from official_recipes.common.image_data import ImageData, evenly_spaced, fewer_training_images
from official_recipes.common.keras_options import training_options
from official_recipes.common.keras_training import batches, compiled_model

RULE = Rule()
CELL = Cell(
    "cell",
    {"batch_size": 64},
    validation_size=10,
    tuning_seeds=(11,),
    repeated_seeds=(12, 13),
    more_seeds=(4, 5),
    final_settings={"evaluate_every": 1},
)
RATES = (0.1, 0.2, 0.4)


def test_one_seed_rules_out_and_three_choose():
    first = {0.1: 0.50, 0.2: 0.60, 0.4: 0.615, 0.8: 0.58}
    assert choose(first, {}, RULE) == Choice(None, [0.2, 0.4])
    # Means 0.60 and 0.61; the better one's standard error is 0.02 / √3 = 0.0115.
    repeated = {0.2: [0.60, 0.59, 0.61], 0.4: [0.63, 0.61, 0.59]}
    assert standard_error(repeated[0.4]) == pytest.approx(0.02 / math.sqrt(3))
    assert standard_error(repeated[0.4]) == pytest.approx(stats.sem(repeated[0.4]))
    assert choose(first, repeated, RULE).value == 0.2
    repeated[0.4] = [0.611, 0.61, 0.609]  # Half a standard error of before: no longer within it.
    assert choose(first, repeated, RULE).value == 0.4


def test_a_value_whose_seeds_fall_is_left_for_a_smaller_one():
    first = {0.1: 0.85, 0.2: 0.90, 0.4: 0.93, 0.8: 0.91}
    # MNIST with Nesterov's SGD: one seed of three stays at chance.
    repeated = {0.4: [0.93, 0.11, 0.93], 0.8: [0.91, 0.92, -math.inf]}
    assert choose(first, repeated, RULE) == Choice(None, [0.2, 0.4, 0.8])
    repeated[0.2] = [0.90, 0.91, 0.90]
    assert choose(first, repeated, RULE) == Choice(0.2, [0.2, 0.4, 0.8])


def test_nothing_smaller_is_left():
    first = {0.1: 0.5, 0.2: 0.2}
    assert choose(first, {0.1: [0.5, 0.1, 0.1]}, RULE).value == 0.1
    assert choose({0.1: -math.inf, 0.2: -math.inf}, {}, RULE) == Choice(0.1, [])


def test_not_below_a_collapse_where_there_is_another():
    first = {0.1: 0.655, 0.2: 0.66, 0.4: 0.10}
    repeated = {0.1: [0.655, 0.65, 0.66], 0.2: [0.69, 0.69, 0.69]}
    assert choose(first, repeated, RULE).value == 0.1
    first[0.4] = 0.57
    assert choose(first, repeated, RULE).value == 0.2
    alone = {0.1: 0.60, 0.2: 0.66, 0.4: -math.inf}
    assert choose(alone, {0.2: [0.66, 0.65, 0.66]}, RULE).value == 0.2


def test_paired_differences_are_those_of_scipy():
    one = {1: 0.61, 2: 0.63, 3: 0.62, 4: 0.9}
    other = {3: 0.60, 2: 0.58, 1: 0.59}
    difference = paired_difference(one, other)
    x, y = [0.61, 0.63, 0.62], [0.59, 0.58, 0.60]
    test = stats.ttest_rel(x, y)
    assert difference.seeds == 3
    assert difference.p == pytest.approx(test.pvalue)
    assert (difference.low, difference.high) == pytest.approx(tuple(test.confidence_interval(0.95)))
    # By hand: differences 0.02, 0.05, 0.02; t(0.975, 2) = 4.3027.
    assert difference.mean == pytest.approx(0.03)
    assert difference.high - difference.mean == pytest.approx(4.3027 * 0.01, rel=1e-4)
    assert not difference.excludes_zero
    reverse = paired_difference(other, one)
    assert (reverse.mean, reverse.low) == pytest.approx((-difference.mean, -difference.high))


def test_differences_without_a_t_statistic():
    same = {1: 0.5, 2: 0.6, 3: 0.4}
    assert paired_difference(same, same).p == 1.0
    assert paired_difference({1: 1.5, 2: 2.5, 3: 3.5}, {1: 1.0, 2: 2.0, 3: 3.0}).excludes_zero
    assert paired_difference({1: 0.5, 2: 0.6}, same) is None
    assert paired_difference({**same, 2: -math.inf}, same) is None


def test_holm():
    # 4 · 0.01, 3 · 0.02, 2 · 0.03 (not below the one before), 1 · 0.5.
    assert holm([0.02, 0.5, 0.01, 0.03]) == pytest.approx([0.06, 0.5, 0.04, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def study_of(*contenders, claims=(), **settings):
    return Study("study", [(CELL, contenders)], claims=claims, **settings)


def test_a_study_repeats_what_is_near_and_takes_other_seeds_for_the_result():
    study = study_of(Contender("a", {}, values=RATES))

    def score(run):
        return {0.1: 0.50, 0.2: 0.60, 0.4: 0.61, 0.8: 0.55}[run.value] + 0.001 * (run.seed % 2)

    rows = carry_out(study, score)
    tuning = [(r["value"], r["flags"]["seed"]) for r in rows if r["stage"] == TUNING]
    assert sorted(tuning[:4]) == [(value, 11) for value in (0.1, 0.2, 0.4, 0.8)]
    assert sorted(tuning[4:]) == [(v, s) for v in (0.2, 0.4) for s in (12, 13)]
    final = [row for row in rows if row["stage"] == FINAL]
    assert [(row["value"], row["flags"]["seed"]) for row in final] == [(0.4, s) for s in (1, 2, 3)]
    assert all(row["flags"]["evaluate_every"] == 1 for row in final)
    outcome = outcomes(study, Results(study, rows))["cell", "a"]
    assert set(outcome.by_seed(study.metric)) == {1, 2, 3}
    assert sorted(outcome.repeated) == [0.2, 0.4]


def test_the_choice_of_a_loss():
    metric = Metric("loss", lower_is_better=True, close=0.01)
    study = study_of(Contender("a", {}, values=RATES), metric=metric)
    rows = carry_out(study, lambda run: {0.1: 2.0, 0.2: 1.0, 0.4: 0.99, 0.8: None}[run.value])
    # 0.4 is better and on the edge of divergence; 0.2 is close enough.
    assert outcomes(study, Results(study, rows))["cell", "a"].best == 0.2


@pytest.mark.parametrize(("gain", "seeds"), [(0.05, 3), (0.011, 5), (0.001, 3)])
def test_a_claim_that_three_seeds_do_not_settle_gets_five(gain, seeds):
    """Neither one that they do settle, nor a difference too small to matter."""
    base, better = (Contender(label, {}, values=RATES) for label in ("base", "better"))
    other = Contender("other", {}, values=RATES)
    study = study_of(base, better, other, claims=[("better", "base"), ("better", "missing")])

    def score(run):
        noise = {1: 0.01, 2: -0.01}.get(run.seed, 0.0) if run.label == "better" else 0.0
        return 0.6 - abs(math.log2(run.value / 0.2)) * 0.05 + noise + gain * (run.label == "better")

    rows = carry_out(study, score)
    known = outcomes(study, Results(study, rows))
    numbers = {label: len(known["cell", label].final) for label in ("base", "better", "other")}
    assert numbers == {"base": seeds, "better": seeds, "other": 3}


def test_claims_of_a_cell_take_the_place_of_the_studys():
    contenders = [Contender(label, {}, values=RATES) for label in ("base", "control", "better")]
    cells = CELL, dataclasses.replace(CELL, name="own", claims=[("better", "control")])
    study = Study("study", [(cell, contenders) for cell in cells], claims=[("better", "base")])

    def score(run):
        noise = {1: 0.02, 2: -0.02}.get(run.seed, 0.0) if run.label == "better" else 0.0
        return 0.6 - abs(math.log2(run.value / 0.2)) * 0.05 + noise + 0.02 * (run.label == "better")

    results = Results(study, carry_out(study, score))
    known = outcomes(study, results)
    seeds = {key: len(outcome.final) for key, outcome in known.items()}
    expected = {("cell", "base"): 5, ("cell", "control"): 3, ("cell", "better"): 5}
    expected |= {("own", "base"): 3, ("own", "control"): 5, ("own", "better"): 5}
    assert seeds == expected
    for cell, other in zip(cells, ("base", "control"), strict=True):
        _, _, *rows = claims_table(study, results, cell).splitlines()
        assert [row.split(" | ")[:2] for row in rows] == [["| better", other]]


def test_a_rate_of_another_cell_times_the_mean_ratio():
    small, large = (dataclasses.replace(CELL, name=name, more_seeds=()) for name in ("s", "l"))
    base = Contender("base", {"optimizer": "momentum"}, values=RATES)
    taken = {"takes_from": "base", "takes_from_cell": "s"}
    weighted = Contender("weighted", {"optimizer": "vr_momentum"}, **taken)
    control = Contender("control", {"optimizer": "momentum"}, ratio_of="weighted", **taken)
    study = Study("study", [(small, [base]), (large, [weighted, control])])
    rows = []
    while left := next_runs(study, Results(study, rows)):
        run = left[0]
        split = "validation" if run.stage == TUNING else "test"
        score = 0.6 - 0.1 * abs(math.log2(run.value / 0.2))
        ratios = [{"train_mean_ratio": 0.3}, {"train_mean_ratio": 0.5}]
        final = {f"{split}_accuracy": score}
        rows.append({**run.head(), "diverged": False, "final": final, "evaluations": ratios})
    rates = {row["label"]: row["flags"]["learning_rate"] for row in rows if row["stage"] == FINAL}
    assert rates == {"base": 0.2, "weighted": 0.2, "control": pytest.approx(0.4 * 0.2)}
    heading, _, row, *_ = results_table(study, Results(study, rows), large).splitlines()
    assert heading.endswith("| mean r | seeds |")
    assert row.endswith("| 0.40 | 3 |")


def test_superseded_rows_stay_in_the_table_and_do_not_count():
    study = study_of(Contender("a", {}, values=RATES))
    rows = carry_out(study, lambda run: 0.6 - abs(math.log2(run.value / 0.2)))
    assert counted(rows) == rows
    mark = {"superseded": {"study": "study", "stage": FINAL, "flags": {"seed": 2}}, "reason": "x"}
    left = counted([*rows, mark])
    assert len(left) == len(rows) - 1
    assert [run.seed for run in next_runs(study, Results(study, [*rows, mark]))] == [2]
    # What is run again after the mark counts.
    again = next(row for row in rows if row["stage"] == FINAL and row["flags"]["seed"] == 2)
    assert not next_runs(study, Results(study, [*rows, mark, again]))
    other = {"superseded": {"study": "other"}, "reason": "x"}
    assert counted([*rows, other]) == rows


@pytest.mark.parametrize("study", CONDITIONS, ids=lambda study: study.name)
def test_what_a_study_compares_is_in_it(study):
    labels = {c.label for _, contenders in study.comparisons for c in contenders}
    assert {label for pair in study.claims for label in pair} <= labels
    for cell, contenders in study.comparisons:
        own = {label for pair in cell.claims for label in pair}
        assert own <= {contender.label for contender in contenders}
        assert not {*cell.final_seeds, *cell.more_seeds} & {
            *cell.tuning_seeds,
            *cell.repeated_seeds,
        }


def images(count=40):
    rng = np.random.default_rng(0)
    labels = np.sort(np.arange(count) % 4)
    pixels = rng.integers(0, 256, [count, 32, 32, 3]).astype(np.uint8)
    return ImageData("random", pixels, labels, pixels[::2], labels[::2])


def test_training_images_are_evaluated_as_they_are():
    data = images()
    task = ImageTask(data, "two_conv", evaluated_training_images=20)
    assert task.splits() == ("test", "train")
    model = task.build_model()
    # The test images are every second training image.
    assert task.evaluate(model, "train", final=True) == task.evaluate(model, "test", final=True)
    assert ImageTask(data, "two_conv").splits() == ("test",)


def test_the_mean_ratio_along_a_run():
    """Against its definition on the same sub-batches, whatever the optimizer."""
    plain = ImageTask(images(), "two_conv", augmentation=False, evaluated_training_images=4)
    task = measure_ratio(plain, batch_size=12, sub_batches=3)
    model = task.build_model()
    metrics = task.evaluate(model, "train", final=True)
    assert "mean_ratio" not in task.evaluate(model, "test", final=True)
    gradients = []
    for part in range(3):
        x, y = task.batch(tf.range(4 * part, 4 * part + 4, dtype=tf.int64), tf.zeros([2], tf.int64))
        with tf.GradientTape() as tape:
            loss = task.loss()(y, model(x, training=True))
        gradients.append(tape.gradient(loss, model.trainable_variables))
    total = count = 0
    for parts in zip(*gradients, strict=True):
        g = np.stack(parts).astype(np.float64)
        live = g.var(0) > 0
        ratio = np.divide(g.mean(0) ** 2, g.var(0), where=live, out=np.zeros(live.shape))
        r = np.where(live, np.clip(ratio / ratio[live].mean(), 0.1, 1.0), 0.1)
        total, count = total + r.sum(), count + r.size
    assert metrics["mean_ratio"] == pytest.approx(total / count, rel=1e-3)


def test_fewer_training_images_are_of_all_classes():
    data = fewer_training_images(images(), 8)
    assert data.train_labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert evenly_spaced(10, 4).tolist() == [0, 2, 5, 7]
    assert len(data.test_labels) == 20


def test_methods_share_weights_and_order_of_the_data():
    """Of one seed, however they accumulate: their differences are paired."""
    seen = []
    for optimizer, steps, seed in (("lars", 1, 1), ("clars", 4, 1), ("lars", 1, 2)):
        flags = {"optimizer": optimizer, "gradient_accumulation_steps": steps, "seed": seed}
        flags |= {"batch_size": 16, "epochs": 2, "learning_rate": 1.0, "replicas": 1}
        options = training_options(parsed(train, flags, Path(".")))
        task = ImageTask(images(), "two_conv", augmentation=False)
        model = compiled_model(task, options, tf.distribute.get_strategy())
        # The two updates of the first epoch and the first of the second.
        micro_batches = list(batches(task, options, 0).take(3 * steps))
        pixels = np.concatenate([x.numpy() for x, _ in micro_batches])
        seen.append((pixels, *model.get_weights()))
    for one, other, another in zip(*seen, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.std() == 0 or not np.array_equal(one, another)


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("training_images", 41, "from 4 to the 40 training images"),
        ("training_images", 3, "from 4 to the 40 training images"),
        ("evaluated_training_images", 41, "at most the 40 training images"),
    ],
)
def test_more_training_images_than_there_are(flag, value, expected):
    values = parsed(train, {flag: value}, Path("."))
    with pytest.raises(FlagValueError, match=f"--{flag}: expected {expected}, received {value}"):
        train.task_of(images(), values)
