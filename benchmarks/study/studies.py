"""The studies there are."""

from __future__ import annotations

from benchmarks.study.grid import Cell, Contender, Scalar, Study

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

STUDIES = {study.name: study for study in (EXTRAPOLATION,)}
