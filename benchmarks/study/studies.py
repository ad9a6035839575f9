"""The studies there are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from benchmarks.study.conditions import CONDITIONS, TWO_CONV_SETTINGS
from benchmarks.study.grid import Cell, Contender, Metric, Scalar, Study
from benchmarks.study.reduced import REDUCED

_RATES = (0.05, 0.1, 0.2, 0.4)

# --- docs/extrapolation.md ------------------------------------------------------------------------

# Four replicas with 512 images each.
_EXTRAPOLATION: dict[str, Scalar] = {
    "batch_size": 2048,
    "replicas": 4,
    "schedule": "cosine",
    "warmup_epochs": 1.0,
    "weight_decay": 1e-4,
    "augmentation": True,
    "evaluate_every": 0,
}


def _extrap(noise: str, **settings: Scalar) -> dict[str, Scalar]:
    return {"optimizer": "extrap_sgd", "noise": noise, **settings}


def extrapolation_contenders(post_local_start_epoch: float) -> list[Contender]:
    """The methods of the paper's Table 1, and EXTRAP-SGD with post-local SGD of its Table 2.

    As in the paper, all take the learning rate tuned for mini-batch SGD. Random noise has its rate
    tuned on top, post-local SGD its period; past gradients have theirs from the learning rate.
    """
    sgd = "mini-batch SGD"

    def noisy(label: str, noise: str, **settings: Scalar) -> Contender:
        return Contender(
            label,
            _extrap(noise, noise_seed=1, **settings),
            "extrapolation_rate",
            (0.01, 0.03, 0.1),
            takes_from=sgd,
        )

    return [
        Contender(sgd, {"optimizer": "nesterov"}, values=_RATES),
        noisy("SmoothOut", "uniform", shared_noise=True),
        noisy("extrapolated SGD, uniform noise", "uniform"),
        noisy("extrapolated SGD, Gaussian noise", "gaussian"),
        Contender(
            "extrapolated SGD, stochastic noise", _extrap("stochastic_noise"), takes_from=sgd
        ),
        Contender("EXTRAP-SGD", _extrap("past_gradient"), takes_from=sgd),
        Contender(
            "EXTRAP-SGD + post-local SGD",
            _extrap("past_gradient", post_local_start_epoch=post_local_start_epoch),
            "post_local_period",
            (4, 8, 16),
            takes_from=sgd,
        ),
    ]


def _untuned(contender: Contender, **settings: Scalar) -> Contender:
    """The contender at one setting, so that a single expensive run says something."""
    axis = {"extrapolation_rate": 0.03, "post_local_period": 8}
    fixed = {contender.axis: axis[contender.axis]} if contender.axis in axis else {}
    return Contender(contender.label, {**contender.settings, **fixed, **settings})


EXTRAPOLATION = Study(
    "extrapolation",
    [
        (
            Cell(
                "two-conv, B=2048, 6 epochs",
                {**_EXTRAPOLATION, "model": "two_conv", "epochs": 6},
                validation_size=5000,
            ),
            extrapolation_contenders(3.0),
        ),
        (
            Cell(
                "ResNet-20, B=512, 1 epoch",
                {
                    **_EXTRAPOLATION,
                    "model": "resnet20",
                    "epochs": 1,
                    "batch_size": 512,
                    "warmup_epochs": 0.2,
                },
                validation_size=5000,
                final_seeds=(1,),
            ),
            [_untuned(c, learning_rate=0.1) for c in extrapolation_contenders(0.5)],
        ),
    ],
)

# --- docs/evidence.md -----------------------------------------------------------------------------

# VRGD and CLARS take their statistics from k = 8 sub-batches, EXTRAP takes its k points from them.
SUB_BATCHES = 8
# In the middle of each grid at batch 4096 at the beginning; grids grow.
_FIRST_RATES = {
    "momentum": 0.05,
    "momentum, warm-up": 0.05,
    "Nesterov momentum": 0.05,
    "SNGM": 0.2,
    "LARS": 4.0,
    # At CLARS's coefficient.
    "LARS at τ = 0.01": 1.0,
    "VR-Momentum": 0.1,
    "VR-LARS": 4.0,
    "CLARS": 0.5,
    "EXTRAP-SGD": 0.05,
    "Adam": 0.002,
    "LAMB": 0.01,
    "VR-Adam": 0.004,
    "VR-LAMB": 0.01,
    "VR-SGD": 1.0,
    "EXTRAP-ADAM": 0.002,
}
# At 4096 those without warm-up turned out to be held back by its lack, LARS by 14 points.
_FIRST_RATES_WITH_WARMUP = {
    "LARS, warm-up": 4.0,
    "VR-Momentum, warm-up": 0.1,
    "VR-LARS, warm-up": 16.0,
    "SNGM, warm-up": 0.4,
    "CLARS, warm-up": 2.0,
    "LAMB, warm-up": 0.04,
    "VR-LAMB, warm-up": 0.04,
    "Adam, warm-up": 0.004,
    "VR-Adam, warm-up": 0.004,
}
# At other batches every optimizer in one way, momentum in two: those of which the papers say so
# without warm-up. Best at 4096 (with Nesterov, EXTRAP and VR-SGD a guess of it), from which the
# first ones follow by the square-root rule.
_RATES_OF_4096 = {
    "momentum": 0.05,
    "momentum, warm-up": 0.1,
    "Nesterov momentum, warm-up": 0.1,
    "SNGM": 0.4,
    "LARS, warm-up": 16.0,
    "VR-Momentum, warm-up": 0.1,
    "VR-LARS, warm-up": 16.0,
    "CLARS": 1.0,
    "EXTRAP-SGD, warm-up": 0.1,
    "Adam, warm-up": 0.004,
    "LAMB, warm-up": 0.02,
    "VR-Adam, warm-up": 0.008,
    "VR-LAMB, warm-up": 0.02,
    "VR-SGD, warm-up": 0.25,
    "EXTRAP-ADAM, warm-up": 0.004,
}
# Rows of tables by what they stand on; "Adam" is Keras's AdamW.
_ORDER = (
    *("momentum", "Nesterov momentum", "VR-Momentum", "VR-SGD", "EXTRAP-SGD"),
    *("LARS", "LARS at τ = 0.01", "VR-LARS", "SNGM", "CLARS"),
    *("Adam", "VR-Adam", "EXTRAP-ADAM", "LAMB", "VR-LAMB"),
)


def optimizer_and_warmup(label: str) -> tuple[str, bool]:
    """Splits a contender's label, that of one with warm-up has ``, warm-up`` behind it."""
    kind, _, warmup = label.partition(", ")
    return kind, bool(warmup)


def _contender(label: str, middle: float, warmup_epochs: float) -> Contender:
    """An optimizer by its label, with rates around ``middle``."""
    kind, warmup = optimizer_and_warmup(label)
    kind, _, coefficient = kind.partition(" at τ = ")
    name = {"Nesterov momentum": "nesterov"}.get(kind, kind.lower().replace("-", "_"))
    settings: dict[str, Scalar] = {"optimizer": name}
    if coefficient:
        settings["trust_coefficient"] = float(coefficient)
    if warmup:
        settings["warmup_epochs"] = warmup_epochs
    if name.startswith("vr_") or name == "clars":
        settings["gradient_accumulation_steps"] = SUB_BATCHES
    if name.startswith("extrap_"):
        settings["sub_batches"] = SUB_BATCHES
    values = tuple(float(f"{factor * middle:.3g}") for factor in (0.5, 1.0, 2.0))
    return Contender(label, settings, values=values)


def _two_conv(batch_size: int, rates_at_4096: Mapping[str, float]) -> tuple[Cell, list[Contender]]:
    cell = Cell(
        f"two-conv, B={batch_size}",
        {**TWO_CONV_SETTINGS, "batch_size": batch_size},
        validation_size=5000,
    )
    scale = (batch_size / 4096) ** 0.5

    def place(label: str) -> tuple[int, bool]:
        kind, warmup = optimizer_and_warmup(label)
        return _ORDER.index(kind), warmup

    labels = sorted(rates_at_4096, key=place)
    return cell, [_contender(label, scale * rates_at_4096[label], 2.0) for label in labels]


TWO_CONV = Study(
    "two_conv",
    [
        _two_conv(4096, {**_FIRST_RATES, **_FIRST_RATES_WITH_WARMUP}),
        *(_two_conv(batch_size, _RATES_OF_4096) for batch_size in (1024, 8192, 128)),
    ],
)

_WITHOUT_BIASES: dict[str, Scalar] = {"exclude_from_weight_decay": "/bias$"}
_FIRST_CELL = TWO_CONV.comparisons[0][0]


def _excluding(label: str, trust_coefficient: float, **settings: Scalar) -> Contender:
    """LARS with warm-up, at the rate that has the best product with τ in the study above."""
    rate = float(f"{0.016 / trust_coefficient:.3g}")
    return Contender(
        label,
        {
            "optimizer": "lars",
            "trust_coefficient": trust_coefficient,
            "learning_rate": rate,
            "warmup_epochs": 1.0,
            **settings,
        },
    )


EXCLUSIONS = Study(
    "exclusions",
    [
        (
            Cell(_FIRST_CELL.name, {**_FIRST_CELL.settings, "epochs": 5}, validation_size=5000),
            [
                _excluding("τ = 0.001", 0.001),
                _excluding("τ = 0.001, excluded", 0.001, **_WITHOUT_BIASES),
                _excluding("τ = 0.1, excluded", 0.1, **_WITHOUT_BIASES),
            ],
        )
    ],
)

RESNET20 = Study(
    "resnet20",
    [
        (
            Cell(
                "ResNet-20, B=4096",
                {
                    "model": "resnet20",
                    "batch_size": 4096,
                    "epochs": 5,
                    "replicas": 1,
                    # 4,096 images at once take more memory than a step needs to.
                    "gradient_accumulation_steps": SUB_BATCHES,
                    "schedule": "polynomial",
                    "power": 1.1,
                    "weight_decay": 1e-4,
                    "augmentation": True,
                    "evaluate_every": 0,
                },
                validation_size=5000,
            ),
            [
                replace(
                    _contender("momentum, warm-up", 0.8, 1.0),
                    # Equal to Keras's momentum, which did not accumulate in the recipes.
                    settings={"optimizer": "vr_momentum", "gamma": 1.0, "warmup_epochs": 1.0},
                ),
                _contender("LARS, warm-up", 8.0, 1.0),
                _contender("SNGM", 0.8, 1.0),
            ],
        )
    ],
)


def _mnist(batch_size: int) -> tuple[Cell, list[Contender]]:
    cell = Cell(
        f"MNIST CNN, B={batch_size}",
        {
            "model": "sigmoid_cnn",
            "batch_size": batch_size,
            "epochs": 10,
            "replicas": 1,
            "schedule": "polynomial",
            "power": 1.1,
            "augmentation": False,
            "evaluate_every": 0,
        },
        validation_size=5000,
    )
    lars = {"optimizer": "lars", "momentum": 0.9}
    clars: dict[str, Scalar] = {"optimizer": "clars", "momentum": 0.9}
    rates = (0.5, 1.0, 2.0)
    return cell, [
        Contender("Nesterov momentum", {"optimizer": "nesterov"}, values=(0.1, 0.2, 0.4)),
        Contender(
            "Nesterov momentum, warm-up",
            {"optimizer": "nesterov", "warmup_epochs": 2.0},
            values=(0.1, 0.2, 0.4),
        ),
        Contender("LARS", {**lars, "trust_coefficient": 0.01}, values=rates),
        Contender(
            "LARS, warm-up",
            {**lars, "trust_coefficient": 0.01, "warmup_epochs": 2.0},
            values=rates,
        ),
        Contender(
            "CLARS",
            {**clars, "trust_coefficient": 0.01, "gradient_accumulation_steps": SUB_BATCHES},
            values=rates,
        ),
    ]


MNIST = Study("mnist", [_mnist(128), _mnist(1024)])

WIKITEXT2 = Study(
    "wikitext2",
    [
        (
            Cell(
                "LSTM, B=64",
                {
                    # With 256 windows an epoch has 21 updates; six epochs ended at perplexity 679.
                    "batch_size": 64,
                    "hidden": 64,
                    "epochs": 4,
                    "replicas": 1,
                    "schedule": "constant",
                    "warmup_epochs": 0.5,
                    "global_clipnorm": 1.0,
                    "evaluate_every": 0,
                },
                # A tenth of the windows.
                validation_size=622,
            ),
            [
                _contender("Nesterov momentum", 4.0, 0.5),
                _contender("EXTRAP-SGD", 4.0, 0.5),
                _contender("Adam", 0.01, 0.5),
                _contender("EXTRAP-ADAM", 0.01, 0.5),
            ],
        )
    ],
    metric=Metric("perplexity", lower_is_better=True, close=10.0, scale=1.0, unit=""),
    task="wikitext2",
)

MULTI30K = Study(
    "multi30k",
    [
        (
            Cell(
                "transformer, B=512",
                {
                    "batch_size": 512,
                    "epochs": 4,
                    "replicas": 1,
                    "schedule": "inverse_sqrt",
                    "warmup_epochs": 1.0,
                    "layers": 1,
                    "width": 64,
                    "inner": 256,
                    "pieces": 2000,
                    "longest": 32,
                    "evaluate_every": 0,
                },
                validation_size=None,
            ),
            [
                _contender("Adam", 0.01, 1.0),
                _contender("EXTRAP-ADAM", 0.01, 1.0),
            ],
        )
    ],
    metric=Metric("loss", lower_is_better=True, close=0.02, scale=1.0, unit=""),
    task="multi30k",
)

_CLICKS = 900_000  # of which a million made-up rows leave as many to train on


def _dlrm(batch_size: int) -> tuple[Cell, list[Contender]]:
    """One epoch of `synthetic_8k_cpu`, with its proportions of warm-up, plateau and decay."""
    steps = _CLICKS // batch_size
    decay = steps // 4
    rate = "trainer.optimizer_config.learning_rate.plateau_polynomial"
    cell = Cell(
        f"DLRM, B={batch_size}",
        {
            "config": "synthetic_8k_cpu",
            "batch_size": batch_size,
            "replicas": 2,
            "rate_field": "plateau_polynomial.initial_learning_rate",
            "task.train_data.global_batch_size": batch_size,
            "trainer.train_steps": steps,
            "trainer.steps_per_loop": steps // 5,
            "trainer.summary_interval": steps // 5,
            "trainer.checkpoint_interval": steps,
            "trainer.validation_interval": steps,
            f"{rate}.decay_start": steps - decay,
            f"{rate}.decay_steps": decay,
            "trainer.optimizer_config.warmup.linear.warmup_steps": steps // 8,
        },
        validation_size=1,
    )
    rates = (1.0, 2.0, 4.0)
    return cell, [
        Contender("SGD", {"optimizer": "sgd", "sub_batches": 1}, values=rates),
        Contender("VR-SGD", {"optimizer": "vr_sgd", "sub_batches": 4}, values=rates),
    ]


DLRM = Study(
    "dlrm",
    [_dlrm(batch_size) for batch_size in (512, 2048, 8192)],
    metric=Metric("auc", close=0.005, scale=1.0, unit="", digits=4, label="AUC"),
    task="dlrm",
)


def _bert(batch_size: int) -> tuple[Cell, list[Contender]]:
    """About one pass over the Wikipedia sample, a tenth of it warm-up, then linear decay."""
    steps = 8640 // batch_size
    warmup = max(1, steps // 10)
    rate = "trainer.optimizer_config.learning_rate.polynomial"
    cell = Cell(
        f"BERT-tiny, B={batch_size}",
        {
            "config": "bert_tiny_wikipedia_phase1",
            "batch_size": batch_size,
            "replicas": 2,
            "rate_field": "polynomial.initial_learning_rate",
            "task.train_data.global_batch_size": batch_size,
            "trainer.train_steps": steps,
            "trainer.steps_per_loop": steps,
            "trainer.summary_interval": steps,
            "trainer.checkpoint_interval": steps,
            "trainer.validation_interval": steps,
            f"{rate}.decay_steps": steps - warmup,
            f"{rate}.offset": warmup,
            "trainer.optimizer_config.warmup.linear.warmup_steps": warmup,
        },
        validation_size=1,
    )
    rates = (0.01, 0.02, 0.04)
    return cell, [
        Contender("LAMB", {"optimizer": "lbopt_lamb", "sub_batches": 1}, values=rates),
        Contender("VR-LAMB", {"optimizer": "vr_lamb", "sub_batches": 4}, values=rates),
    ]


BERT = Study(
    "bert",
    [_bert(batch_size) for batch_size in (32, 128)],
    metric=Metric(
        "lm_example_loss",
        lower_is_better=True,
        close=0.02,
        scale=1.0,
        unit="",
        digits=3,
        label="loss of masked words",
    ),
    task="bert",
)

# The true inputs of the paper's experiment are not told, nor whether its labels have noise.
_REGRESSION: dict[str, Scalar] = {"batch_size": 2048, "sub_batches": 32}
GAMMAS = (0.01, 0.02, 0.04, 0.1, 0.2, 0.5, 1.0)
SLOW_SGD = "SGD, slow rate"
SUB_BATCH_NUMBERS = (2, 4, 8, 16, 64, 128, 256, 1024)


def _regression(
    inputs: str, noise: float, rates: tuple[float, ...], steps: int = 100
) -> tuple[Cell, list[Contender]]:
    cell = Cell(
        f"{inputs} inputs, label noise {noise:g}, {steps} updates",
        {**_REGRESSION, "steps": steps, "inputs": inputs, "noise": noise, "gamma": 0.1},
        validation_size=1,
    )
    reduced: dict[str, Scalar] = {"optimizer": "vr_sgd"}
    return cell, [
        Contender("SGD", {"optimizer": "sgd", "curve": True}, values=rates),
        Contender("VR-SGD", {**reduced, "curve": True}, values=rates),
        Contender("VR-SGD at SGD's rate", {**reduced, "curve": True}, takes_from="SGD"),
        # What a comparison at a rate that was not tuned would have seen.
        Contender(SLOW_SGD, {"optimizer": "sgd", "curve": True, "learning_rate": rates[1] / 2}),
        *(
            Contender(f"VR-SGD, γ = {gamma:g}", {**reduced, "gamma": gamma}, values=rates)
            for gamma in GAMMAS
            if gamma != 0.1
        ),
        *(
            Contender(f"VR-SGD, k = {k}", {**reduced, "sub_batches": k}, values=rates)
            for k in SUB_BATCH_NUMBERS
        ),
    ]


REGRESSION = Study(
    "regression",
    [
        # Neighbors are a factor of 2^(1/4) apart: the best rate lies just below the largest.
        _regression("uniform", 0.0, (0.28, 0.336, 0.4)),
        _regression("uniform", 1.0, (0.28, 0.336, 0.4)),
        # After a few more updates nothing but rounding is left.
        _regression("normal", 0.0, (0.4, 0.48, 0.576), steps=6),
        _regression("normal", 1.0, (0.04, 0.048, 0.057)),
    ],
    metric=Metric(
        "log10_loss", lower_is_better=True, close=0.1, scale=1.0, unit="", label="log₁₀ loss"
    ),
    task="regression",
)

STUDIES = {
    study.name: study
    for study in (
        EXTRAPOLATION,
        TWO_CONV,
        EXCLUSIONS,
        RESNET20,
        MNIST,
        WIKITEXT2,
        MULTI30K,
        DLRM,
        BERT,
        REGRESSION,
        *CONDITIONS,
        *REDUCED,
    )
}
