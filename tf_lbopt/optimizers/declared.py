"""An optimizer's arguments, declared once: from one table follows all that depends on them."""

import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from tf_lbopt import _validation
from tf_lbopt.optimizers.hyperparameters import Arguments, checked
from tf_lbopt.rules.rule import Rule

REQUIRED = inspect.Parameter.empty
"""Stands for the default of an argument that has none."""

# Arguments as TensorFlow Addons, tf-models-official, PyTorch or another optimizer here call them.
_NAMES_ELSEWHERE = {
    "betas": ("beta_1", "beta_2"),
    "eeta": ("trust_coefficient",),
    "eps": ("epsilon",),
    "eta": ("trust_coefficient",),
    "lr": ("learning_rate",),
    "max_grad_norm": ("global_clipnorm",),
    "momentum": ("beta_1",),
    "trust_coeff": ("trust_coefficient",),
    "wd": ("weight_decay",),
    "weight_decay_rate": ("weight_decay",),
}

# What is no plain attribute of an optimizer.
_NO_ATTRIBUTES = ("learning_rate", "exclude_from_weight_decay", "exclude_from_layer_adaptation")


class Declared:
    """Base of classes whose constructor is a table of its arguments.

    A subclass has a docstring and

        rule_class = rules.SNGM
        arguments = {"learning_rate": REQUIRED, "momentum": 0.9, "weight_decay": None}

    From that follow the signature, the checks (by name, in `tf_lbopt.optimizers.hyperparameters`),
    attributes of the arguments' names, which may be assigned, `rule` and `get_config`. The values
    of `rule_class`'s fields are those of the arguments of the same names.
    """

    rule_class: ClassVar[type[Rule]]
    """The algorithm."""

    arguments: ClassVar[Mapping[str, object]] = {"learning_rate": REQUIRED, "weight_decay": None}
    """The class's own, with their defaults, in the order of the signature."""

    common_arguments: ClassVar[Mapping[str, object]] = {}
    """Those of the framework's base class, by name only."""

    former_names: ClassVar[Mapping[str, str]] = {}
    """Of arguments in configurations that older versions have saved, with the names of today."""

    slots: ClassVar[tuple[str, ...]] = ()
    """Names of the variables kept for each trainable variable, with the default arguments."""

    statistics: ClassVar[tuple[str, ...]] = ()
    """What must be known of the sub-batches beyond their mean gradient."""

    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        first = next(
            vars(base) for base in cls.__mro__ if {"arguments", "__init__"} & vars(base).keys()
        )
        if "arguments" in first:
            cls.__signature__ = cls._declared_signature()
        else:
            of_function = inspect.signature(first["__init__"])
            _, *parameters = of_function.parameters.values()
            cls.__signature__ = of_function.replace(parameters=parameters)
        if "arguments" in vars(cls) and hasattr(cls, "rule_class"):
            rule = cls.rule_of(dict(cls.arguments))
            cls.slots = rule.slot_names()
            cls.statistics = tuple(dict.fromkeys((*cls.statistics, *rule.statistics)))

    def __init__(self, *args: Any, **kwargs: Any):
        line = type(self).__mro__
        definers = line[: line.index(Declared)]
        if not any({"rule_class", "rule_of", "rule"} & vars(base).keys() for base in definers):
            raise TypeError(
                f"Can't instantiate abstract class {type(self).__name__} without a `rule_class` or "
                "a method `rule`"
            )
        self._set_up(self._given(args, kwargs))

    def _set_up(self, values: Arguments) -> None:
        """The rest of the constructor, with the checked values of all arguments."""
        raise NotImplementedError

    @classmethod
    def _declared_signature(cls) -> inspect.Signature:
        by_name = {n: v for n, v in cls.common_arguments.items() if n not in cls.arguments}
        if "weight_decay" in cls.arguments and "exclude_from_weight_decay" not in cls.arguments:
            by_name = {"exclude_from_weight_decay": None, **by_name}
        return inspect.Signature(
            [
                *_parameters(cls.arguments, inspect.Parameter.POSITIONAL_OR_KEYWORD),
                *_parameters(by_name, inspect.Parameter.KEYWORD_ONLY),
            ]
        )

    @classmethod
    def _given(cls, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Arguments:
        """All arguments by name, checked.

        Raises:
            TypeError: There is no such argument, one is missing or of the wrong type.
            ValueError: One is outside of its range.
        """
        signature = cls._declared_signature()
        known = signature.parameters
        for name, value in kwargs.items():
            if name not in known:
                raise TypeError(
                    f"{cls.__name__} has no argument `{name}`. Expected: "
                    f"{_meant(name, [*cls.__signature__.parameters, *known])}. "
                    f"Received: {name}={_validation.shown(value)}"
                )
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{cls.__name__}: {error}") from None
        given.apply_defaults()
        return {
            name: checked(name, value, known[name].default)
            for name, value in given.arguments.items()
        }

    # -- the rule ----------------------------------------------------------------------------------

    @classmethod
    def rule_of(cls, values: Arguments) -> Rule:
        """The algorithm with these values of the hyper-parameters."""
        return made_of(cls.rule_class, values)

    def rule(self) -> Rule:
        """The algorithm with the current hyper-parameters."""
        return self.rule_of(self.hyperparameters())

    def hyperparameters(self) -> Arguments:
        """The current values of its own arguments, without the learning rate and exclusions."""
        names = [name for name in self.arguments if name not in _NO_ATTRIBUTES]
        return {name: getattr(self, name) for name in names}


def made_of(rule_class: type[Rule], values: Arguments) -> Rule:
    """A rule whose fields have these values, those that there are; other values are left out."""
    fields = inspect.signature(rule_class).parameters
    return rule_class(**{name: values[name] for name in fields if name in values})


def _parameters(arguments: Mapping[str, object], kind: Any) -> list[inspect.Parameter]:
    return [inspect.Parameter(name, kind, default=value) for name, value in arguments.items()]


def _meant(name: str, known: Iterable[str]) -> str:
    """The arguments that a wrong name is likely to mean, or all that there are."""
    known = [each for each in dict.fromkeys(known) if each not in ("args", "kwargs")]
    if name in _NAMES_ELSEWHERE:
        meant = [each for each in _NAMES_ELSEWHERE[name] if each in known]
    else:
        meant = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return " and ".join(f"`{each}`" for each in meant) or f"one of {', '.join(known)}"
