"""The table of all optimizers; tests and recipes go through it."""

import dataclasses
import fnmatch
import html
import re
from collections.abc import Iterable

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
        slots: Names of the variables kept for each trainable variable, with the default arguments.
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


_COLUMNS = ("name", "class", "slots", "statistics", "sub-batches", "paper")


class _Table(list[OptimizerInfo]):
    """A list that a terminal and a notebook show as a table."""

    def __repr__(self) -> str:
        if not self:
            return super().__repr__()
        rows = [_COLUMNS, *map(_cells, self)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(map(str.ljust, cells, widths)).rstrip()
            for cells in (rows[0], ["-" * width for width in widths], *rows[1:])
        )

    def _repr_html_(self) -> str:
        def row(cells: Iterable[str], tag: str) -> str:
            return "".join(["<tr>", *(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells), "</tr>"])

        body = "".join(row(_cells(info), "td") for info in self)
        return f"<table><thead>{row(_COLUMNS, 'th')}</thead><tbody>{body}</tbody></table>"


def _cells(info: OptimizerInfo) -> tuple[str, ...]:
    return (
        info.name,
        info.cls.__name__,
        str(len(info.slots)),
        ", ".join(info.statistics).replace("_", " ") or "-",
        "2 or more" if info.needs_sub_batches else "any",
        _short(info.paper),
    )


def _short(paper: str) -> str:
    """The first authors, the year and the place of the first reference, where they are told."""
    found = re.match(r'([^"]+?)(?: (\d{4}))?, ".*?" \(([^)]+)\)', paper)
    if not found:
        return paper.partition('"')[2].partition('"')[0] or "-"
    authors = found[1].split(", ")
    if len(authors) > 2:
        authors = [f"{authors[0]} et al."]
    return f"{', '.join(authors)}{f' {found[2]}' if found[2] else ''}, {found[3]}"


_ALL = [
    OptimizerInfo(name, cls, paper_of(cls.__doc__), cls.slots, cls.statistics)
    for name, cls in sorted(OPTIMIZERS.items())
]


def list_optimizers(pattern: str = "*") -> list[OptimizerInfo]:
    """The optimizers whose name fits a shell-style pattern, in the order of their names.

    Args:
        pattern: For example ``"la*"``; case does not matter. Defaults to all.

    Returns:
        A list of frozen rows, possibly none. A terminal and a notebook show it as a table: how many
        `slots` are kept for each parameter; the `statistics` of the sub-batches (one for each
        replica and micro-step) that are needed beyond their mean gradient; how many sub-batches an
        update must have.

    Example:
        >>> list_optimizers("la*")
        name  class  slots  statistics  sub-batches  paper
        ----  -----  -----  ----------  -----------  -----------------------------------
        lamb  LAMB   2      -           any          You et al. 2020, arXiv:1904.00962
        lans  LANS   2      -           any          Zheng et al. 2020, arXiv:2006.13484
        lars  LARS   1      -           any          You et al. 2017, arXiv:1708.03888
        >>> [info.name for info in list_optimizers("vr_*") if len(info.slots) < 2]
        ['vr_lars', 'vr_momentum', 'vr_sgd']
    """
    if not isinstance(pattern, str):
        raise TypeError(
            f"`pattern` must be a string. Received: pattern={_validation.shown(pattern)}"
        )
    return _Table(info for info in _ALL if fnmatch.fnmatchcase(info.name, pattern.lower()))
