"""The studies that run reduced: their estimators, and their sections of docs/evidence.md."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_study import DLRM_FLAGS, carry_out

from benchmarks.study import layer_mean
from benchmarks.study.grid import FINAL, Results
from benchmarks.study.reduced import CRITEO, REDUCED, SMOOTHNESS, SNGM_THEORY
from benchmarks.study.reduced_page import blocks, mean_smoothness, plots
from benchmarks.study.smoothness import (
    Objective,
    Watch,
    largest_eigenvalue,
    largest_msgd_rate,
    msgd_limits,
    noise,
    smoothness_along,
)
from benchmarks.study.studies import STUDIES
from benchmarks.study.tfm_runner import OVER_ALL, TfmRunner
from official_recipes.dlrm import train as dlrm
from tf_lbopt.rules import vrgd
from tf_lbopt.rules.gsnr import SubBatchStatistics, clipped_gsnr

GENERATOR = np.random.default_rng(3)
# Rotated, so that no axis is an eigenvector.
ROTATION = np.linalg.qr(GENERATOR.standard_normal((6, 6)))[0]


@pytest.mark.parametrize("values", [(5.0, 1.0, 2.0, 0.5, 3.0, 0.1), (1.0, -7.0, 2.0, 3.0, 0, 4)])
def test_the_smoothness_of_a_quadratic(values):
    hessian = ROTATION @ np.diag(values) @ ROTATION.T
    largest = max(map(abs, values))
    assert largest_eigenvalue(lambda v: hessian @ v, 6, 60) == pytest.approx(largest, rel=1e-6)
    update = 0.01 * ROTATION[:, 1]
    point = GENERATOR.standard_normal(6)
    along = smoothness_along(lambda x: hessian @ x, point, update)
    assert along == pytest.approx(abs(values[1]), rel=1e-6)


def test_nothing_to_estimate():
    assert largest_eigenvalue(np.zeros_like, 3) == 0.0
    assert np.isnan(smoothness_along(lambda x: x, np.ones(3), np.zeros(3)))


def test_smoothness_is_the_largest_of_eight_points():
    """Of f = x⁴ / 4, whose ratio rises to the last point."""
    point, update = np.array([1.0]), np.array([0.5])
    last = 1.0 + 2.4 * 0.5
    expected = (last**3 - 1.0) / (last - 1.0)
    assert smoothness_along(lambda x: x**3, point, update) == pytest.approx(expected)
    # Towards 0 the first one is it.
    first = 1.0 - 0.3 * 0.5
    expected = (1.0 - first**3) / (1.0 - first)
    assert smoothness_along(lambda x: x**3, point, -update) == pytest.approx(expected)


def test_the_noise_of_a_quadratic():
    """Of f_i = ½ ‖w − a_i‖², whose gradients have the deviation of the a_i, of every sub-batch."""
    deviations = np.array([1.0, 2.0, 0.5])
    examples = deviations * GENERATOR.standard_normal((40_000, 3))
    expected = np.sqrt(np.sum(deviations**2))
    for size in (1, 8, 40):
        gradients = np.ones(3) - examples.reshape(-1, size, 3).mean(1)
        assert noise(gradients, size) == pytest.approx(expected, rel=0.05)
    assert noise([np.ones(3)] * 4, 2) == pytest.approx(0.0, abs=1e-6)


def test_the_limits_of_momentum_sgd():
    of_rate, of_budget = msgd_limits(1e6, 100.0, 0.9)
    assert largest_msgd_rate(100.0, 0.9) == pytest.approx(0.01 / 190.0)
    assert of_rate == pytest.approx(1000 * 0.01 / 190.0)
    assert of_budget == pytest.approx(31.6228, rel=1e-5)


class LinearTask:
    """Linear regression: f is quadratic, its Hessian known."""

    def __init__(self):
        inputs = np.array([3.0, 1.0, 0.5]) * GENERATOR.standard_normal((1024, 3))
        self.inputs = tf.constant(inputs, tf.float32)
        self.labels = tf.constant(GENERATOR.standard_normal((1024, 1)), tf.float32)

    def build_model(self):
        return keras.Sequential([keras.layers.Input([3]), keras.layers.Dense(1, use_bias=False)])

    def loss(self):
        return keras.losses.MeanSquaredError()

    def batch(self, indices, seed):
        del seed
        return tf.gather(self.inputs, indices), tf.gather(self.labels, indices)

    @property
    def hessian(self):
        return 2.0 / 1024 * self.inputs.numpy().T @ self.inputs.numpy()


def test_what_a_run_measures():
    task = LinearTask()
    watch = Watch({"smoothness_every": 2, "constants_at": "0,0.5,1"})
    model = watch.on(task).build_model()
    (kernel,) = model.trainable_variables
    start = kernel.numpy()
    weights = [start]
    for done in range(1, 6):
        kernel.assign_add(0.1 * GENERATOR.standard_normal((3, 1)))
        weights.append(kernel.numpy())
        watch.after_update(done, 5)
        np.testing.assert_array_equal(kernel.numpy(), weights[-1])
    fields = watch.fields()
    assert fields["smoothness"]["updates"] == [2, 4]
    for update, value in zip((2, 4), fields["smoothness"]["values"], strict=True):
        step = weights[update] - weights[update - 1]
        expected = np.linalg.norm(task.hessian @ step) / np.linalg.norm(step)
        assert value == pytest.approx(expected, rel=1e-3)
    assert [each["part"] for each in fields["constants"]] == [0.0, 0.4, 1.0]
    errors = task.inputs.numpy() @ start - task.labels.numpy()
    gradients = 2 * errors * task.inputs.numpy()
    first = fields["constants"][0]
    assert first["smoothness"] == pytest.approx(np.linalg.norm(task.hessian, 2), rel=1e-3)
    variances = np.var(gradients.reshape(32, 32, 3).mean(1), axis=0, ddof=1)
    assert first["noise"] == pytest.approx(np.sqrt(32 * variances.sum()), rel=1e-3)
    mean = np.linalg.norm(gradients.mean(0))
    assert first["gradient_norm"] == pytest.approx(mean, rel=1e-3)
    assert first["loss"] == pytest.approx(np.mean(errors**2), rel=1e-3)
    assert Watch({}).on(LinearTask()).build_model() is not None
    assert Watch({}).fields() == {}


def test_every_update_may_be_measured():
    watch = Watch({"smoothness_every": 1})
    (kernel,) = watch.on(LinearTask()).build_model().trainable_variables
    for done in (1, 2):
        kernel.assign_add(tf.ones([3, 1]))
        watch.after_update(done, 2)
    assert watch.fields()["smoothness"]["updates"] == [1, 2]


def test_a_hessian_with_a_curve():
    """Of a network with a hidden layer, against differences of gradients."""
    task = LinearTask()
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(4, "tanh"), keras.layers.Dense(1)]
    objective = Objective(task, keras.Sequential([keras.layers.Input([3]), *layers]), 256)
    vector = GENERATOR.standard_normal(objective.size)
    vector /= np.linalg.norm(vector)
    at, width = objective.weights, 1e-2
    ends = [objective.gradient_at(at + sign * width * vector) for sign in (1, -1)]
    expected = (ends[0] - ends[1]) / (2 * width)
    np.testing.assert_allclose(objective.hessian_product(vector), expected, atol=2e-3)
    np.testing.assert_array_equal(objective.weights, at)


def statistics_of(gradients, table=None):
    """Of sub-batches' gradients [k, rows, width]; ``table``: they are rows of one with so many."""
    mean = gradients.mean(0)
    deviations = np.sum((gradients - mean) ** 2, 0)
    means = tf.constant(mean, tf.float32)
    if table is not None:
        rows = tf.range(len(mean), dtype=tf.int64)
        means = tf.IndexedSlices(means, rows, tf.constant([table, mean.shape[1]], tf.int64))
    one = tf.constant(1.0)
    return SubBatchStatistics(
        [means], [tf.constant(deviations, tf.float32)], len(gradients) * one, one
    )


def test_the_layer_mean_over_all_elements():
    gradients = 1.0 + GENERATOR.standard_normal((8, 5, 2))
    usual = statistics_of(gradients)
    np.testing.assert_allclose(
        layer_mean.ratios_by_the_mean_of_all(usual, 0.1)[0], clipped_gsnr(usual, 0.1)[0], rtol=1e-5
    )
    gradients[:, 4] = 0.0  # A row that no sub-batch has a gradient of,
    gradients[:, 3, 1] = 2.0  # and an element on which all agree.
    mean, variance = gradients.mean(0), gradients.var(0)
    ratio = np.divide(mean**2, variance, out=np.zeros_like(mean), where=variance > 1e-9)
    for table, number in ((None, 10), (50, 100)):
        expected = np.clip(ratio / (ratio.sum() / number), 0.1, 1.0)
        expected[3, 1] = 1.0
        (r,) = layer_mean.ratios_by_the_mean_of_all(statistics_of(gradients, table), 0.1)
        np.testing.assert_allclose(r, expected, rtol=1e-4)
    same = statistics_of(np.ones((8, 2, 2)))
    np.testing.assert_array_equal(layer_mean.ratios_by_the_mean_of_all(same, 0.1)[0], 1.0)


def test_a_run_with_the_other_layer_mean(tmp_path, monkeypatch):
    made = TfmRunner("dlrm", tmp_path, 2)
    flags = {**DLRM_FLAGS, "validation_size": 0}
    assert made.command(flags, tmp_path)[2] == "official_recipes.dlrm.train"
    command = made.command({**flags, "layer_mean": OVER_ALL}, tmp_path)
    assert command[2] == "benchmarks.study.layer_mean"
    assert not [a for a in command if "layer_mean=" in a]
    seen = []
    monkeypatch.setattr(dlrm, "main", lambda argv: seen.append(vrgd.clipped_gsnr) or 0)
    assert layer_mean.main(["program"]) == 0
    assert seen == [layer_mean.ratios_by_the_mean_of_all]
    assert vrgd.clipped_gsnr is clipped_gsnr


def rows_of(study):
    """Made-up runs, with what each study measures."""
    rows = carry_out(study, lambda run: 0.7 + 0.01 * np.sin(run.seed * len(run.label)) / run.value)
    for row in rows:
        if row["stage"] == FINAL:
            seed = row["flags"]["seed"]
            row["flags"] = {"learning_rate": row["value"], **row["flags"]}
            row["final"]["test_log_loss"] = 0.5 + 0.01 * seed
            updates = list(range(3, 61, 3))
            values = [seed + len(row["label"]) / (1 + u) for u in updates]
            row["smoothness"] = {"updates": updates, "values": values}
            row["constants"] = [
                {"part": p, "smoothness": 9.0 - p, "noise": 4, "gradient_norm": 1.0, "loss": 2 - p}
                for p in (0.0, 0.5, 1.0)
            ]
    return rows


@pytest.mark.parametrize("study", REDUCED, ids=lambda study: study.name)
def test_a_section_of_the_page(study, tmp_path):
    nothing = {other.name: Results(other, []) for other in STUDIES.values()}
    assert set(blocks(nothing).values()) == {"Not run yet."}
    assert plots(nothing, tmp_path) == []
    rows = rows_of(study)
    known = {**nothing, study.name: Results(study, rows)}
    text = blocks(known)[study.name]
    assert "Not run yet" not in text
    for contender in study.comparisons[0][1]:
        assert f"| {contender.label} |" in text
    for first, second in study.claims:
        assert f"| {first} | {second} |" in text
    images = plots(known, tmp_path)
    assert [path.name for path in images] == (
        ["evidence_smoothness.png"] if study is SMOOTHNESS else []
    )
    # With one contender's first seed alone.
    one = next(row for row in rows if row["stage"] == FINAL)
    kept = [row for row in rows if row["label"] == one["label"] and row["stage"] != FINAL]
    text = blocks({**nothing, study.name: Results(study, [*kept, one])})[study.name]
    assert f"| {one['label']} |" in text
    assert "Not run yet: " in text


def test_the_table_of_the_theory():
    nothing = {other.name: Results(other, []) for other in STUDIES.values()}
    known = {**nothing, SNGM_THEORY.name: Results(SNGM_THEORY, rows_of(SNGM_THEORY))}
    text = blocks(known)[SNGM_THEORY.name]
    assert "| Corollary 2 | C = 1,000,000 | 1,000 | 0.0316 | " in text
    # √(10⁶ · 0.1 · 16 / (2 · 9 · 1.9 · 2)) and √(2 · 0.001 · 2 · 153 / (1.9 · 9 · 10⁶))
    assert "L = 9, σ = 4, F(w₀) − 0 = 2 | 153 | 0.00019 | not run |" in text
    assert "| ≤ min(0.58, 31.6) | ≤ 0.00058 | not run |" in text


def test_the_mean_smoothness_of_a_run():
    curve = {"updates": [1, 2, 3], "values": [None, 2.0, 8.0]}
    assert mean_smoothness({"smoothness": curve}) == pytest.approx(4.0)
    assert mean_smoothness({"smoothness": curve, "diverged": True}) is None
    assert mean_smoothness({}) is None


def test_three_seeds_and_no_more():
    assert not [cell for study in REDUCED for cell, _ in study.comparisons if cell.more_seeds]
    assert CRITEO.task == "dlrm"
