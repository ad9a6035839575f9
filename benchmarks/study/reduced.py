"""Studies of the second edition that are reduced: about an hour of one core in all."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.study.conditions import TWO_CONV_SETTINGS, around, tuned_cell
from benchmarks.study.grid import Cell, Contender, Metric, Scalar, Study
from benchmarks.study.tfm_runner import OVER_ALL
from tf_lbopt.schedules import sngm_corollary_2

# --- 5. DLRM on a sample of Criteo ----------------------------------------------------------------
# About 17 minutes: 45 runs of 22 s. Reduced: 5,639 rows to train on, one batch of 256 (22 updates
# an epoch, 4 epochs), k = 8, three seeds and never five, and 1,559 rows to test on, whose standard
# error of the AUC is about 0.015 (differences are paired on the same rows). The folder is made from
# all 8,000 rows by `prepare_data --min_frequency=4 --validation_fraction=0.1 --test_fraction=0.2`.

_BATCH, _EPOCH, _EPOCHS = 256, 22, 4
SGD, VR_SGD = "SGD", "VR-SGD"
VR_ON_THE_MLPS = "VR-SGD on the MLPs, SGD on the embeddings"
VR_BY_ALL = "VR-SGD, layer mean over all elements"


def _criteo() -> tuple[Cell, list[Contender]]:
    steps, rate = _EPOCHS * _EPOCH, "trainer.optimizer_config.learning_rate.plateau_polynomial"
    settings: dict[str, Scalar] = {
        "config": "criteo_sample_cpu",
        "batch_size": _BATCH,
        "replicas": 2,
        "rate_field": "plateau_polynomial.initial_learning_rate",
        "task.train_data.global_batch_size": _BATCH,
        "trainer.train_steps": steps,
        "trainer.steps_per_loop": _EPOCH,
        "trainer.summary_interval": _EPOCH,
        "trainer.checkpoint_interval": steps,
        "trainer.validation_interval": steps,
        f"{rate}.decay_start": steps // 2,
        f"{rate}.decay_steps": steps // 2,
        "trainer.optimizer_config.warmup.linear.warmup_steps": steps // 8,
    }
    reduced: dict[str, Scalar] = {"optimizer": "vr_sgd", "sub_batches": 4}
    contenders: list[tuple[str, dict[str, Scalar]]] = [
        (SGD, {"optimizer": "sgd", "sub_batches": 1}),
        (VR_SGD, reduced),
        (
            VR_ON_THE_MLPS,
            {**reduced, "trainer.optimizer_config.embeddings.optimizer.type": "sgd"},
        ),
        (VR_BY_ALL, {**reduced, "layer_mean": OVER_ALL}),
    ]
    cell = tuned_cell(f"Criteo sample, B={_BATCH}", settings, validation_size=1)
    return replace(cell, more_seeds=(), final_settings={}), [
        Contender(label, flags, values=around(1.0)) for label, flags in contenders
    ]


LOG_LOSS = Metric("log_loss", lower_is_better=True, scale=1.0, unit="", digits=4, label="log loss")
CRITEO = Study(
    "criteo",
    [_criteo()],
    metric=Metric("auc", close=0.005, scale=1.0, unit="", digits=4, label="AUC"),
    task="dlrm",
    claims=[
        (VR_SGD, SGD),
        (VR_ON_THE_MLPS, SGD),
        (VR_ON_THE_MLPS, VR_SGD),
        (VR_BY_ALL, VR_SGD),
    ],
)

# --- 7. SNGM's theory -----------------------------------------------------------------------------
# About 23 minutes: 9 runs of 150 s. Reduced: L and σ on 1,024 training images, at the start, the
# middle and the end of each run; Corollary 1 is evaluated and not run; the tuned rate is that of
# the first edition at 1,024, not tuned again at 1,000. f has kinks (ReLU), between which the
# Hessian is taken. At the start and after 40 updates of SGD it gave L = 318.0 and 62.3, the same by
# 20 and by 60 products; differences of gradients along its eigenvector, ± 0.01 apart, gave 315.3
# and 59.5.

BUDGET = 20 * 50_000
"""C, examples times epochs."""
MOMENTUM = 0.9
_BATCH_OF_THEORY, _RATE_OF_THEORY = sngm_corollary_2(BUDGET)
_TUNED_RATE = 0.2
COROLLARY, COROLLARY_DECAYED = "SNGM, Corollary 2", "SNGM, rate of Corollary 2, decayed"
TUNED_SNGM = "SNGM, tuned rate, decayed"


def _sngm(label: str, rate: float, schedule: str) -> Contender:
    return Contender(
        label,
        {
            "optimizer": "sngm",
            "learning_rate": float(f"{rate:.4g}"),
            "schedule": schedule,
            "constants_at": "0,0.5,1",
        },
    )


SNGM_THEORY = Study(
    "sngm_theory",
    [
        (
            Cell(
                f"two-conv, B={_BATCH_OF_THEORY}",
                {**TWO_CONV_SETTINGS, "batch_size": _BATCH_OF_THEORY},
                validation_size=5000,
            ),
            [
                _sngm(COROLLARY, _RATE_OF_THEORY, "constant"),
                _sngm(COROLLARY_DECAYED, _RATE_OF_THEORY, "polynomial"),
                _sngm(TUNED_SNGM, _TUNED_RATE, "polynomial"),
            ],
        )
    ],
    claims=[(COROLLARY, TUNED_SNGM), (COROLLARY_DECAYED, TUNED_SNGM)],
)

# --- 4. Smoothness along the trajectory -----------------------------------------------------------
# About 20 minutes: 12 runs of 100 s. Reduced: two-conv in the place of ResNet-20; 8 epochs (48
# updates) in the place of 300; at every third update; ∇f of 1,024 training images; one rate for
# all, which the first edition tuned for Nesterov's SGD, and γ̂ not tuned.

_RATE = 0.0707
_POINTS: dict[str, Scalar] = {"optimizer": "extrap_sgd", "sub_batches": 32, "learning_rate": _RATE}
# γ̂ = 0: Keras's own Nesterov shows other weights, x + β v.
NESTEROV, SMALL_RATE = "Nesterov momentum", 0.07
EXTRAP_SMALL = f"EXTRAP-SGD, γ̂ = {SMALL_RATE:g}"
SMOOTHNESS = Study(
    "smoothness",
    [
        (
            Cell(
                "two-conv, B=8192, 8 epochs, constant rate",
                {
                    **TWO_CONV_SETTINGS,
                    "epochs": 8,
                    "schedule": "constant",
                    "batch_size": 8192,
                    "warmup_epochs": 1.0,
                    "smoothness_every": 3,
                },
                validation_size=5000,
            ),
            [
                Contender(NESTEROV, {**_POINTS, "extrapolation_rate": 0.0}),
                Contender("EXTRAP-SGD, γ̂ = η / k", _POINTS),
                Contender(EXTRAP_SMALL, {**_POINTS, "extrapolation_rate": SMALL_RATE}),
                Contender(
                    "SmoothOut, γ̂ = 0.03",
                    {
                        **_POINTS,
                        "noise": "uniform",
                        "shared_noise": True,
                        "noise_seed": 1,
                        "extrapolation_rate": 0.03,
                    },
                ),
            ],
        )
    ],
    claims=[
        ("EXTRAP-SGD, γ̂ = η / k", NESTEROV),
        (EXTRAP_SMALL, NESTEROV),
        ("SmoothOut, γ̂ = 0.03", NESTEROV),
    ],
)

REDUCED = (CRITEO, SNGM_THEORY, SMOOTHNESS)
