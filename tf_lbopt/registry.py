"""The table of all optimizers; tests and recipes go through it."""

import dataclasses
import fnmatch

from tf_lbopt import _validation, optimizers  # noqa: F401  # enters them in the table
from tf_lbopt.optimizers.base import OPTIMIZERS, LargeBatchOptimizer
from tf_lbopt.optimizers.documentation import paper_of
from tf_lbopt.rules import VARIANCE


@dataclasses.dataclass(frozen=True)
class OptimizerInfo:
    """One optimizer of the package.

    Attributes:
        name: Lower-case name, as recipes and configurations use it.
        cls: The Keras 3 class.
        paper: Where the algorithm is defined.
        slots: Names of the variables kept for each trainable variable.
        statistics: What it needs to know of the sub-batches beyond their mean gradient.
    """

    name: str
    cls: type[LargeBatchOptimizer]
    paper: str
    slots: tuple[str, ...]
    statistics: tuple[str, ...]

    @property
    def needs_sub_batches(self) -> bool:
        """Whether it needs sub-batches (replicas times micro-steps): at least 2, better 8."""
        return VARIANCE in self.statistics


_TABLE = [
    OptimizerInfo(name, cls, paper_of(cls.__doc__), cls.slots, cls.statistics)
    for name, cls in sorted(OPTIMIZERS.items())
]


def list_optimizers(pattern: str = "*") -> list[OptimizerInfo]:
    """The optimizers whose name fits a shell-style pattern, in the order of their names.

    Args:
        pattern: For example ``"la*"``; case does not matter. Defaults to all.

    Returns:
        Frozen rows, possibly none.

    Example:
        >>> [info.name for info in list_optimizers("la*")]
        ['lamb', 'lans', 'lars']
    """
    if not isinstance(pattern, str):
        raise TypeError(
            f"`pattern` must be a string. Received: pattern={_validation.shown(pattern)}"
        )
    return [info for info in _TABLE if fnmatch.fnmatchcase(info.name, pattern.lower())]
