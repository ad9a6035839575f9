"""Studies of the papers' claims under their own conditions: the second edition of the evidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.study.grid import Cell, Contender, Scalar, Study

# Of every study here. The seeds that choose a rate are none of those that tell the result.
_SUB_BATCHES = 8
_EVALUATION: dict[str, Scalar] = {"evaluate_every": 1, "evaluated_training_images": 10_000}
TWO_CONV_SETTINGS: dict[str, Scalar] = {
    "model": "two_conv",
    "epochs": 20,
    "replicas": 1,
    "schedule": "polynomial",
    "power": 1.1,
    "weight_decay": 1e-4,
    "augmentation": True,
    "evaluate_every": 0,
}
_WARMUP: dict[str, Scalar] = {"warmup_epochs": 2.0}


def tuned_cell(name: str, settings: dict[str, Scalar], validation_size: int | None = 5000) -> Cell:
    """A cell with the seeds and the evaluations that all studies of this edition have."""
    return Cell(
        name,
        settings,
        validation_size=validation_size,
        tuning_seeds=(11,),
        repeated_seeds=(12, 13),
        final_seeds=(1, 2, 3),
        more_seeds=(4, 5),
        final_settings=_EVALUATION,
    )


def around(middle: float) -> tuple[float, ...]:
    """A first grid, a factor of 2 apart."""
    return tuple(float(f"{factor * middle:.3g}") for factor in (0.5, 1.0, 2.0))


# --- 1. The trust coefficient and the bias --------------------------------------------------------

COEFFICIENTS = (0.001, 0.01, 0.1)
ALIKE = "ρ = τ"
"""Zero biases train at η τ, as everything else: then τ changes nothing but the rate's unit."""
EXCLUDED = "excluded"
BEST_COEFFICIENTS = {False: 0.1, True: 0.001}
"""LARS's best τ at 4,096, without warm-up and with it."""


def trust_label(name: str, coefficient: float | None, bias: str = "", warmup: bool = False) -> str:
    """A contender's label.

    Args:
        name: The optimizer.
        coefficient: τ; ``None`` with `ALIKE`, where it does not matter.
        bias: `EXCLUDED`, or nothing for the default ρ = 1 of zero biases.
        warmup: Whether there is one.
    """
    parts = [name, ALIKE if coefficient is None else f"τ = {coefficient:g}"]
    return ", ".join([*parts, *([bias] if bias else []), *(["warm-up"] if warmup else [])])


def _trust(
    name: str,
    product: float = 0.0,
    coefficient: float | None = None,
    bias: str = "",
    warmup: bool = False,
    scale: float = 1.0,
    takes_from: str | None = None,
    **settings: Scalar,
) -> Contender:
    """LARS, VR-LARS or CLARS with rates around that of a given product η τ, or another's rate."""
    tau = coefficient or 0.01
    optimizer = name.split(",")[0].lower().replace("-", "_")
    flags: dict[str, Scalar] = {"optimizer": optimizer, "trust_coefficient": tau}
    if coefficient is None:
        flags["default_trust_ratio"] = tau
    if bias == EXCLUDED:
        flags["exclude_from_weight_decay"] = "/bias$"
    if warmup:
        flags |= _WARMUP
    label = trust_label(name, coefficient, bias, warmup)
    values = () if takes_from else around(scale * product / tau)
    return Contender(label, {**flags, **settings}, values=values, takes_from=takes_from)


def _trust_cell(batch_size: int) -> Cell:
    # All in as many micro-steps, so that all see the same augmented images.
    settings = {"batch_size": batch_size, "gradient_accumulation_steps": _SUB_BATCHES}
    return tuned_cell(f"two-conv, B={batch_size}", {**TWO_CONV_SETTINGS, **settings})


def _at_another_batch(batch_size: int) -> tuple[Cell, list[Contender]]:
    """LARS's best τ and rates of 4,096; from 1,024 to 8,192 the first edition's hardly move."""
    return _trust_cell(batch_size), [
        replace(
            _trust(
                name,
                coefficient=tau,
                warmup=warmup,
                takes_from=trust_label("LARS", tau, warmup=warmup),
            ),
            takes_from_cell=_trust_cell(4096).name,
        )
        for name in ("LARS", "CLARS")
        for warmup, tau in BEST_COEFFICIENTS.items()
    ]


def _of_coefficients(warmup: bool, products: Sequence[float]) -> list[Contender]:
    """LARS by τ, and CLARS at its rates: with ρ = τ both have the same best one."""
    lars, clars = [], []
    for tau, product in zip(COEFFICIENTS, products, strict=True):
        lars.append(_trust("LARS", product, tau, warmup=warmup))
        clars.append(_trust("CLARS", 0.0, tau, warmup=warmup, takes_from=lars[-1].label))
    return [*lars, *clars]


_MAIN: list[Contender] = [
    _trust("LARS", 0.008),
    _trust("LARS", 0.016, warmup=True),
    _trust("CLARS", 0.016),
    _trust("CLARS", 0.016, warmup=True),
    *_of_coefficients(False, (0.002, 0.008, 0.008)),
    *_of_coefficients(True, (0.016, 0.016, 0.016)),
]
_OF_CLARS: dict[str, dict[str, Scalar]] = {
    "heavy ball": {"nesterov": False},
    "k = 1": {"gradient_accumulation_steps": 1},
    "k = 64": {"gradient_accumulation_steps": 64},
    "per example": {"norm_estimator": "per_example"},
}
# At the rate of what they vary; a larger mean norm shortens the step, so that one is tuned, too.
# "per example" is not: of its runs of 15 minutes it would take some ten.
_TUNED_CLARS = {"k = 64": 0.032}


def _own_rate(text: str) -> str:
    return f"CLARS, {text}, own rate"


_VARIANTS: list[Contender] = [
    _trust("LARS, Nesterov", takes_from=trust_label("LARS", None), nesterov=True),
    *(
        _trust(f"CLARS, {text}", takes_from=trust_label("CLARS", None), **settings)
        for text, settings in _OF_CLARS.items()
    ),
    *(
        _trust(_own_rate(text), product, **_OF_CLARS[text])
        for text, product in _TUNED_CLARS.items()
    ),
    *(
        _trust("VR-LARS", warmup=warmup, takes_from=trust_label("LARS", None, warmup=warmup))
        for warmup in (False, True)
    ),
]
# Biases at the raw rate η: one that they take as momentum SGD's is small beside 0.016 / τ.
_EXCLUDING: list[Contender] = [
    _trust("LARS", 0.001, 0.001, EXCLUDED, warmup=True),
    _trust("LARS", 0.016, 0.1, EXCLUDED, warmup=True),
]


def _trust_claims() -> Sequence[tuple[str, str]]:
    both = ("LARS", "CLARS")
    every = (None, *COEFFICIENTS)

    def best(name: str, warmup: bool) -> str:
        return trust_label(name, BEST_COEFFICIENTS[warmup], warmup=warmup)

    return [
        *((trust_label(n, t, warmup=True), trust_label(n, t)) for n in both for t in every),
        *((trust_label("CLARS", t), trust_label("LARS", t)) for t in every),
        *((trust_label(n, None), trust_label(n, t)) for n in both for t in COEFFICIENTS),
        *((best(n, True), best(n, False)) for n in both),
        (best("CLARS", True), best("LARS", True)),
        (trust_label("CLARS", None), trust_label("LARS", None, warmup=True)),
        (trust_label("LARS, Nesterov", None), trust_label("LARS", None)),
        (trust_label("CLARS", None), trust_label("CLARS, heavy ball", None)),
        (trust_label("CLARS", None), trust_label("LARS, Nesterov", None)),
        *(
            (trust_label(_own_rate(text), None), trust_label(base, None))
            for text in _TUNED_CLARS
            for base in ("CLARS", "LARS, Nesterov")
        ),
        *(
            (trust_label("VR-LARS", None, warmup=w), trust_label("LARS", None, warmup=w))
            for w in (False, True)
        ),
    ]


TRUST = Study(
    "trust",
    [
        (_trust_cell(4096), _MAIN),
        (_trust_cell(4096), _VARIANTS),
        (_trust_cell(4096), _EXCLUDING),
        _at_another_batch(8192),
        _at_another_batch(1024),
    ],
    claims=_trust_claims(),
)

# No rate is tuned: one product η τ is the first edition's best, and one half as large.
_RESNET20_PRODUCTS = (0.008, 0.004)
_LARS, _LARS_WARMED = (trust_label("LARS", 0.001, warmup=warmup) for warmup in (False, True))
_LARS_ALIKE, _LARS_ALIKE_WARMED = (
    trust_label("LARS", None, warmup=warmup) for warmup in (False, True)
)


def _at_product(label: str, product: float) -> str:
    return f"{label}, η τ = {product:g}"


TRUST_RESNET20 = Study(
    "trust_resnet20",
    [
        (
            replace(
                tuned_cell(
                    "ResNet-20, B=4096",
                    {
                        **TWO_CONV_SETTINGS,
                        "model": "resnet20",
                        "epochs": 3,
                        "batch_size": 4096,
                        "gradient_accumulation_steps": _SUB_BATCHES,
                    },
                ),
                more_seeds=(),
            ),
            [
                Contender(
                    _at_product(label, product),
                    {
                        "optimizer": "lars",
                        "trust_coefficient": tau,
                        "default_trust_ratio": ratio,
                        "learning_rate": float(f"{product / tau:.3g}"),
                        "warmup_epochs": 0.5 if warmup else 0.0,
                    },
                )
                for product in _RESNET20_PRODUCTS
                for label, tau, ratio, warmup in (
                    (_LARS, 0.001, 1.0, False),
                    (_LARS_ALIKE, 0.01, 0.01, False),
                    (_LARS_WARMED, 0.001, 1.0, True),
                    (_LARS_ALIKE_WARMED, 0.01, 0.01, True),
                )
            ],
        )
    ],
    claims=[
        (_at_product(first, product), _at_product(second, product))
        for product in _RESNET20_PRODUCTS
        for first, second in (
            (_LARS_WARMED, _LARS),
            (_LARS_ALIKE_WARMED, _LARS_ALIKE),
            (_LARS_ALIKE, _LARS),
        )
    ],
)

# --- 8. With warm-up at 4,096 ---------------------------------------------------------------------

WARMED = Study(
    "warmed",
    [
        (
            tuned_cell("two-conv, B=4096", {**TWO_CONV_SETTINGS, **_WARMUP, "batch_size": 4096}),
            [
                # Those of the first edition, at its rates.
                Contender("momentum", {"optimizer": "momentum", "learning_rate": 0.1}),
                Contender("Adam", {"optimizer": "adam", "learning_rate": 0.004}),
                Contender("Nesterov momentum", {"optimizer": "nesterov"}, values=around(0.1)),
                # As in the paper, at the rate of what they extrapolate.
                Contender(
                    "EXTRAP-SGD",
                    {"optimizer": "extrap_sgd", "sub_batches": _SUB_BATCHES},
                    takes_from="Nesterov momentum",
                ),
                Contender(
                    "EXTRAP-ADAM",
                    {
                        "optimizer": "extrap_adam",
                        "sub_batches": _SUB_BATCHES,
                        "learning_rate": 0.004,
                    },
                ),
                Contender(
                    "VR-SGD",
                    {"optimizer": "vr_sgd", "gradient_accumulation_steps": _SUB_BATCHES},
                    values=around(0.25),
                ),
            ],
        )
    ],
    claims=[
        ("EXTRAP-SGD", "Nesterov momentum"),
        ("EXTRAP-SGD", "momentum"),
        ("EXTRAP-ADAM", "Adam"),
        ("momentum", "Nesterov momentum"),
        ("momentum", "VR-SGD"),
    ],
)

# --- 2. VRGD at rates that are scaled, not tuned --------------------------------------------------

_SMALL_BATCH = 256
SCALED_BATCHES = (256, 2048, 8192)
CONTROL = "mean r"
"""What the base's rate is multiplied by, to tell a weighting from a smaller step."""
# γ = 0.1, k = 8 and k = 32 are in the comparison before, γ = 1 is the base.
GAMMAS = (0.01, 0.3)
SUB_BATCH_NUMBERS = (2, 128)
# VRGD's base with nothing of it: γ = 1 weighs nothing, and accumulates as the others do.
_BASES: dict[str, tuple[str, float]] = {"momentum": ("vr_momentum", 0.035), "LAMB": ("lamb", 0.01)}
WEIGHTED = {"momentum": ("VR-Momentum", "vr_momentum"), "LAMB": ("VR-LAMB", "vr_lamb")}


def scaled_label(name: str, warmup: bool) -> str:
    """A contender's label."""
    return f"{name}, warm-up" if warmup else name


def _base(name: str, warmup: bool, **settings: Scalar) -> Contender:
    optimizer, middle = _BASES[name]
    flags: dict[str, Scalar] = {"optimizer": optimizer, "gradient_accumulation_steps": _SUB_BATCHES}
    if optimizer == "vr_momentum":
        flags["gamma"] = 1.0
    values = () if settings else around(middle)
    flags |= {**(_WARMUP if warmup else {}), **settings}
    return Contender(scaled_label(name, warmup), flags, values=values)


def _at_the_scaled_rate(contender: Contender, name: str) -> Contender:
    """At the rate that is tuned with warm-up, with and without it."""
    return replace(
        contender,
        takes_from=scaled_label(name, warmup=True),
        takes_from_cell=_scaled_cell(_SMALL_BATCH).name,
    )


def _scaled_cell(batch_size: int) -> Cell:
    settings = {"batch_size": batch_size, "base_batch_size": _SMALL_BATCH}
    return tuned_cell(f"two-conv, B={batch_size}", {**TWO_CONV_SETTINGS, **settings})


def _scaled(batch_size: int) -> tuple[Cell, list[Contender]]:
    """Base, VRGD and control at the small batch's rate times √(B / 256)."""
    small = batch_size == _SMALL_BATCH
    contenders = [_base(name, warmup=True) for name in _BASES] if small else []
    for name in _BASES:
        for warmup in (True,) if small else (False, True):
            base = _base(name, warmup, ratio_sub_batches=_SUB_BATCHES)
            label, optimizer = WEIGHTED[name]
            reduced = [
                Contender(
                    scaled_label(f"{label}, k = {k}", warmup),
                    {
                        "optimizer": optimizer,
                        "gradient_accumulation_steps": k,
                        "ratio_sub_batches": k,
                        **(_WARMUP if warmup else {}),
                    },
                )
                for k in ((8, 32) if warmup and not small else (8,))
            ]
            control = scaled_label(f"{name} × {CONTROL}", warmup)
            group = [*reduced]
            if not small:
                group += [base, replace(base, label=control, ratio_of=reduced[0].label)]
            contenders += [_at_the_scaled_rate(each, name) for each in group]
    return _scaled_cell(batch_size), contenders


def _of_gamma_and_k(batch_size: int = 2048) -> tuple[Cell, list[Contender]]:
    settings: dict[str, Scalar] = {"optimizer": "vr_momentum", **_WARMUP}
    numbers: list[tuple[str, dict[str, Scalar]]] = []
    for gamma in GAMMAS:
        numbers.append((f"γ = {gamma:g}", {"gamma": gamma, "gradient_accumulation_steps": 8}))
    for k in SUB_BATCH_NUMBERS:
        numbers.append((f"k = {k}", {"gradient_accumulation_steps": k}))
    return _scaled_cell(batch_size), [
        _at_the_scaled_rate(
            Contender(f"VR-Momentum, {text}, warm-up", {**settings, **chosen}), "momentum"
        )
        for text, chosen in numbers
    ]


SCALED = Study(
    "scaled",
    # The largest batch, which the claims are about, before the middle one.
    [*(_scaled(batch_size) for batch_size in (256, 8192, 2048)), _of_gamma_and_k()],
    claims=[
        (scaled_label(first, warmup), scaled_label(second, warmup))
        for name in _BASES
        for warmup in (False, True)
        for first, second in (
            (f"{WEIGHTED[name][0]}, k = 8", name),
            *([(f"{WEIGHTED[name][0]}, k = 32", name)] if warmup else []),
            (f"{WEIGHTED[name][0]}, k = 8", f"{name} × {CONTROL}"),
        )
    ],
)

# --- 3. A gap to narrow ---------------------------------------------------------------------------

GAP_IMAGES = 5000


def _gap(batch_size: int) -> tuple[Cell, list[Contender]]:
    """On few images, so that the base over-fits; the VR form has its rate, as in the paper."""
    settings: dict[str, Scalar] = {
        **TWO_CONV_SETTINGS,
        "epochs": 100,
        "augmentation": False,
        "training_images": GAP_IMAGES,
        "batch_size": batch_size,
        "gradient_accumulation_steps": _SUB_BATCHES,
        "warmup_epochs": 10.0,
    }
    cell = tuned_cell(f"5,000 images, B={batch_size}", settings)
    scale = (batch_size / 4096) ** 0.5
    tau: dict[str, Scalar] = {"trust_coefficient": 0.01, "default_trust_ratio": 0.01}
    bases: list[tuple[str, dict[str, Scalar], float]] = [
        ("momentum", {"optimizer": "vr_momentum", "gamma": 1.0}, 0.1),
        ("LARS", {"optimizer": "lars", **tau}, 1.6),
    ]
    contenders = []
    for name, flags, rate in bases:
        weighted: dict[str, Scalar] = {**flags, "optimizer": f"vr_{name.lower()}"}
        weighted.pop("gamma", None)
        contenders += [
            Contender(name, flags, values=around(scale * rate)),
            Contender(f"VR-{name[0].upper()}{name[1:]}", weighted, takes_from=name),
        ]
    return replace(
        cell,
        final_settings={"evaluate_every": 5, "evaluated_training_images": GAP_IMAGES},
    ), contenders


GAP = Study(
    "gap",
    [_gap(batch_size) for batch_size in (2048, 128)],
    claims=[("VR-Momentum", "momentum"), ("VR-LARS", "LARS")],
)

# --- 4. EXTRAP with as many sub-batches as its paper has ------------------------------------------
# The smoothness along the trajectory (Figure 2b) is a study of its own, in `reduced.py`.

_EXTRAP_POINTS = 32
NESTEROV_IN_PARTS = f"Nesterov momentum, k = {_EXTRAP_POINTS}"
# γ̂ = η / k where nothing is given; else about the rate that momentum SGD has at 128, and twice it.
_SMALL_BATCH_RATES = (0.035, 0.07)


def _extrap_cell(model: str, batch_size: int, epochs: int, schedule: str) -> Cell:
    settings: dict[str, Scalar] = {**TWO_CONV_SETTINGS, "model": model, "epochs": epochs}
    settings |= {"schedule": schedule, "batch_size": batch_size, "warmup_epochs": epochs / 10}
    name = {"two_conv": "two-conv", "resnet8": "ResNet-8"}[model]
    rate = "constant" if schedule == "constant" else "decayed"
    return tuned_cell(f"{name}, B={batch_size}, {rate} rate", settings)


def _pairs_of_extrap(
    small_batch_rates: Sequence[float] = (), *, with_lars: bool = False, in_parts: bool = False
) -> list[Contender]:
    """As in the paper, EXTRAP-SGD takes the rate over that was tuned for mini-batch SGD."""
    points: dict[str, Scalar] = {"optimizer": "extrap_sgd", "sub_batches": _EXTRAP_POINTS}
    # γ̂ = 0 is Nesterov's momentum, in EXTRAP-SGD's parts and with its trust ratio.
    unmoved: dict[str, Scalar] = {**points, "extrapolation_rate": 0.0}
    tau: dict[str, Scalar] = {"trust_coefficient": 0.01}
    pair = (
        Contender("LARS, Nesterov", {**unmoved, **tau}, values=around(1.6)),
        Contender("EXTRAP-SGD with LARS", {**points, **tau}, takes_from="LARS, Nesterov"),
    )
    base_in_parts = Contender(NESTEROV_IN_PARTS, unmoved, takes_from="Nesterov momentum")
    return [
        Contender("Nesterov momentum", {"optimizer": "nesterov"}, values=around(0.07)),
        *([base_in_parts] if in_parts else ()),
        Contender("EXTRAP-SGD, γ̂ = η / k", points, takes_from="Nesterov momentum"),
        *(
            Contender(
                f"EXTRAP-SGD, γ̂ = {rate:g}",
                {**points, "extrapolation_rate": rate},
                takes_from="Nesterov momentum",
            )
            for rate in small_batch_rates
        ),
        *(pair if with_lars else ()),
    ]


EXTRAP = Study(
    "extrap",
    [
        (_extrap_cell("two_conv", 8192, 20, "constant"), _pairs_of_extrap(_SMALL_BATCH_RATES)),
        (
            _extrap_cell("two_conv", 8192, 20, "polynomial"),
            _pairs_of_extrap(_SMALL_BATCH_RATES, with_lars=True),
        ),
        # BatchNormalization normalizes over a part, and its averages move once for each: the base
        # that EXTRAP-SGD is told apart from has to be taken in parts, too.
        (
            replace(
                _extrap_cell("resnet8", 2048, 5, "constant"),
                claims=[
                    ("EXTRAP-SGD, γ̂ = η / k", NESTEROV_IN_PARTS),
                    (NESTEROV_IN_PARTS, "Nesterov momentum"),
                ],
            ),
            _pairs_of_extrap(in_parts=True),
        ),
    ],
    claims=[
        *(
            (f"EXTRAP-SGD, γ̂ = {rate}", "Nesterov momentum")
            for rate in ("η / k", *(f"{rate:g}" for rate in _SMALL_BATCH_RATES))
        ),
        ("EXTRAP-SGD with LARS", "LARS, Nesterov"),
    ],
)

# --- 6. Baselines of 2026 -------------------------------------------------------------------------
# Reduced: one batch; WikiText-2 and BERT-tiny are not declared.

_BASELINES: dict[str, tuple[dict[str, Scalar], float]] = {
    "AdamW": ({"optimizer": "adam"}, 0.0057),
    "Lion": ({"optimizer": "lion"}, 0.00057),
    "Muon": ({"optimizer": "muon"}, 0.0057),
    "LANS": ({"optimizer": "lans"}, 0.028),
}
"""Flags, and the rate in the middle of the first grid."""


def _baselines() -> tuple[Cell, list[Contender]]:
    settings: dict[str, Scalar] = {**TWO_CONV_SETTINGS, **_WARMUP, "batch_size": 8192}
    lars: dict[str, Scalar] = {"optimizer": "lars", "trust_coefficient": 0.001}
    return tuned_cell("two-conv, B=8192", settings), [
        # At the rates of the first edition.
        Contender("momentum", {"optimizer": "momentum", "learning_rate": 0.141}),
        Contender("LARS", {**lars, "learning_rate": 11.3}),
        *(
            Contender(label, flags, values=around(middle))
            for label, (flags, middle) in _BASELINES.items()
        ),
    ]


BASELINES = Study(
    "baselines",
    [_baselines()],
    claims=[(label, base) for base in ("momentum", "LARS") for label in _BASELINES],
)

CONDITIONS = (TRUST, WARMED, SCALED, GAP, TRUST_RESNET20, EXTRAP, BASELINES)
"""In order of their value."""
