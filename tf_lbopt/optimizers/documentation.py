"""What the docstrings of the optimizers have in common, written once."""

import re
import textwrap
from collections.abc import Iterable

_COMMON = {
    "name": "The optimizer's name. Defaults to the class's.",
    "clipnorm": """Greatest norm of one variable's mean gradient (clipped after the reduction over
            replicas and micro-steps). At most one of the three clips can be set.""",
    "clipvalue": "Greatest magnitude of one element of the mean gradient.",
    "global_clipnorm": "Greatest norm of the mean gradient of all variables together.",
    "use_ema": """Whether to keep an exponential moving average of the weights, which replaces them
            at the end of `fit`. It is float32 for weights in half precision, and averages once per
            update, from the first on.""",
    "ema_momentum": "Momentum of that average. Defaults to 0.99.",
    "ema_overwrite_frequency": "Updates after which the average overwrites the weights.",
    "loss_scale_factor": """Constant that multiplies the loss; gradients are divided by it.""",
    "gradient_accumulation_steps": """Micro-steps (calls) per update, or `None` for no accumulation.
            The attribute `accumulation_steps` changes the number during training (not with
            extrapolation); a batch that is to grow from one micro-step starts with 1. Works under
            every strategy with a copy of the variables on each replica. Schedules and `iterations`
            count updates. All micro-steps weigh alike, whatever their numbers of examples. Those
            left over at the end of an epoch are carried into the next. A variable that has a
            gradient in one micro-step of an update needs one in those that follow, zeros in the
            place of ``None``: without, an error says so, and in a step that XLA compiles the update
            is discarded.""",
    "jit_compile": """Whether XLA compiles the update to one program for each replica, without the
            reductions before it. It has no effect in a step that runs eagerly or that XLA compiles
            as a whole. `True` makes sparse gradients dense. Defaults to `"auto"`, which compiles on
            a GPU only and updates variables with sparse gradients beside the program; with sparse
            gradients it does not compile SNGM and what is around a stock optimizer.""",
    "mesh": "Must be `None`: DTensor is not supported.",
}

_TEXTS = {
    "rate": "A float, a `LearningRateSchedule` or a callable without arguments.",
    "exclude_from_weight_decay": """exclude_from_weight_decay: Variables, or regexes over the
            variable path (``"/bias$"``), that do not decay.""",
    "exclusions": """exclude_from_weight_decay: Variables, or regexes over the variable path
            (``"/bias$"``; ``"bias"`` also fits all in a layer named so), that do not decay: usually
            biases and normalization scales. Defaults to `None`: all decay.
        exclude_from_layer_adaptation: Variables, or regexes, without a trust ratio. Defaults to
            `None`: those excluded from weight decay. `[]` excludes none.""",
    "default_trust_ratio": """default_trust_ratio: ρ > 0 of a variable that is excluded, or
            of whose two norms one is 0. Defaults to 1.0.""",
    "gamma": """gamma: γ in (0, 1], the lower bound of r, where most elements are if there are
            fewer than 8 sub-batches (see `VRSGD`); 1 switches the weighting off. Defaults to 0.1,
            which the paper never tunes.""",
    "raises": """TypeError, ValueError: An argument is of the wrong type or outside its range""",
    "vrgd": """Jiang et al. 2023, "Accelerating Large Batch Training via Gradient Signal to Noise
        Ratio (GSNR)" (arXiv:2309.13681)""",
}


# Of a list: an argument or errors, with their lines.
_ENTRY = re.compile(r"^ {8}(\w+(?:, \w+)*: .*(?:\n {12}.*)*)", re.MULTILINE)


def _filled(entry: str) -> str:
    return textwrap.fill(
        " ".join(entry.split()), 100, initial_indent=" " * 8, subsequent_indent=" " * 12,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def common_texts(names: Iterable[str]) -> str:
    """What takes the place of ``{common_arguments}`` for these of the framework's arguments."""
    return "\n".join(_filled(f"{name}: {_COMMON[name]}") for name in names).lstrip()


def completed(docstring: str | None, common_arguments: Iterable[str], of_base: str | None) -> str:
    """A docstring with the texts in the places that it has for them, ``{gamma}`` and so on.

    Args:
        docstring: With placeholders.
        common_arguments: The names of the framework's arguments, for ``{common_arguments}``.
        of_base: The completed docstring of the base class, for ``{base_arguments}``: its own.
    """
    text, common = docstring or "", common_texts(common_arguments)
    base = (of_base or "").partition("Args:\n")[2].partition(common)[0].strip()
    for key, value in {**_TEXTS, "common_arguments": common, "base_arguments": base}.items():
        text = text.replace("{" + key + "}", value)
    return _ENTRY.sub(lambda entry: _filled(entry[1]), text)


def paper_of(docstring: str | None) -> str:
    """What a docstring refers to."""
    return " ".join((docstring or "").partition("References:")[2].split())
