"""The table of all optimizers; tests and recipes go through it."""

import dataclasses
import fnmatch

from tf_lbopt import _validation, optimizers
from tf_lbopt.optimizers.base import LargeBatchOptimizer
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


def _row(name: str, cls: type[LargeBatchOptimizer], paper: str) -> OptimizerInfo:
    return OptimizerInfo(name, cls, paper, cls.slots, cls.statistics)


_VRGD = "Jiang et al. 2023, arXiv:2309.13681"
_CLARS = (
    "Large Batch Optimization for Deep Learning Using New Complete Layer-Wise Adaptive Rate Scaling"
)

_TABLE = (
    _row("sngm", optimizers.SNGM, "Zhao et al., arXiv:2007.13985, Algorithm 1"),
    _row("lars", optimizers.LARS, "You, Gitman, Ginsburg 2017, arXiv:1708.03888, eq. 6"),
    _row("lamb", optimizers.LAMB, "You et al. 2020, arXiv:1904.00962, Algorithm 2"),
    _row("vr_sgd", optimizers.VRSGD, f"{_VRGD}, Algorithm 1"),
    _row("vr_momentum", optimizers.VRMomentum, f"{_VRGD}, section 4.2"),
    _row("vr_adam", optimizers.VRAdam, f"{_VRGD}, section 4.2"),
    _row("vr_lars", optimizers.VRLARS, f"{_VRGD}, section 4.2"),
    _row("vr_lamb", optimizers.VRLAMB, f"{_VRGD}, section 4.2"),
    _row("extrap_sgd", optimizers.ExtrapSGD, "Lin et al. 2020, arXiv:2006.05720, Algorithm 1"),
    _row("extrap_adam", optimizers.ExtrapAdam, "Lin et al. 2020, arXiv:2006.05720, section 5.2"),
    _row("clars", optimizers.CLARS, f"{_CLARS}, Algorithm 1, eq. 4 and 5"),
)


def list_optimizers(pattern: str = "*") -> list[OptimizerInfo]:
    """The optimizers whose name fits a shell-style pattern, in the order of the table.

    Args:
        pattern: For example ``"la*"``; case does not matter. Defaults to all.

    Returns:
        Frozen rows, possibly none.

    Example:
        >>> [info.name for info in list_optimizers("la*")]
        ['lars', 'lamb']
    """
    if not isinstance(pattern, str):
        raise TypeError(
            f"`pattern` must be a string. Received: pattern={_validation.shown(pattern)}"
        )
    return [info for info in _TABLE if fnmatch.fnmatchcase(info.name, pattern.lower())]
