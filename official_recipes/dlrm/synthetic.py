"""Made-up click logs in Criteo's form, of which the best possible AUC is known.

The log-odds of a click are a sum of planted effects: of each category, of log(1 + x) of each
integer, and of products of latent vectors of pairs of columns, which is what DLRM's interaction
can express. Missing values are categories like others; a missing integer counts as 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from official_recipes.dlrm.raw_rows import CATEGORIES, DENSE_FEATURES, Lines, mix

ROWS_AT_A_TIME = 10_000
CLICK_RATE = 0.25

_SIZES = np.geomspace(4, 1000, CATEGORIES).astype(int)  # values of each column, a missing one first
_PAIRS = [(column, (column + 7) % CATEGORIES) for column in range(0, CATEGORIES, 4)]
_LATENT = 3
_CATEGORY_EFFECT, _PAIR_EFFECT, _DENSE_EFFECT = 0.3, 0.35, 0.25
_BINS, _WIDEST = 2**16, 30.0


class ClickModel:
    """Planted weights, and rows that follow them.

    Args:
        seed: Of weights and rows.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        rng = np.random.default_rng([seed, 0])
        self._shares, self._effects, self._tokens = [], [], []
        for column, size in enumerate(_SIZES):
            share = 1 / np.arange(1, size + 1)  # Zipf's law
            share[0] = rng.choice([0.0, 0.1, 0.3]) * share[1:].sum()
            self._shares.append(np.cumsum(share) / share.sum())
            self._effects.append(rng.normal(0, _CATEGORY_EFFECT, size))
            hashes = mix(np.arange(size, dtype=np.uint64), 100 + column) >> np.uint64(32)
            tokens = [b"", *(b"%08x" % int(h) for h in hashes[1:])]
            self._tokens.append(np.array(tokens, dtype="S8"))
        scale = np.sqrt(_PAIR_EFFECT / np.sqrt(_LATENT))
        self._latent = {
            column: rng.normal(0, scale, (_SIZES[column], _LATENT))
            for pair in _PAIRS
            for column in pair
        }
        self._dense_weights = rng.normal(0, _DENSE_EFFECT, DENSE_FEATURES)
        self._dense_mean = rng.uniform(0, 3, DENSE_FEATURES)
        self._dense_missing = rng.choice([0.0, 0.1, 0.4], DENSE_FEATURES)
        self._bias = 0.0
        self._bias = self._calibrated()

    def lines(self, rows: int, progress: Callable[[int], None]) -> Iterator[Lines]:
        """Rows as Criteo's files have them, with the log-odds; the same every time.

        Args:
            rows: How many.
            progress: Called with the number of rows made since the last call.
        """
        for part, start in enumerate(range(0, rows, ROWS_AT_A_TIME)):
            size = min(ROWS_AT_A_TIME, rows - start)
            rng = np.random.default_rng([self._seed, 1 + part])
            dense, categories, logits = self._sample(rng, size)
            clicks = rng.random(size) < 1 / (1 + np.exp(-logits))
            columns: list[list[bytes]] = [[b"1" if click else b"0" for click in clicks]]
            for index in range(DENSE_FEATURES):
                columns.append(
                    [b"" if np.isnan(x) else b"%d" % int(x) for x in dense[index].tolist()]
                )
            for index in range(CATEGORIES):
                columns.append(self._tokens[index][categories[index]].tolist())
            lines = [b"\t".join(fields) for fields in zip(*columns, strict=True)]
            yield Lines("synthetic rows", start + 1, lines, logits)
            progress(size)

    def _sample(
        self, rng: np.random.Generator, rows: int
    ) -> tuple[npt.NDArray[np.float64], list[npt.NDArray[np.int64]], npt.NDArray[np.float64]]:
        dense = np.floor(np.exp(rng.normal(self._dense_mean[:, None], 1, (DENSE_FEATURES, rows))))
        dense -= 1  # Criteo has a few -1, which count as 0.
        dense[rng.random(dense.shape) < self._dense_missing[:, None]] = np.nan
        logits = self._bias + self._dense_weights @ np.log1p(np.maximum(np.nan_to_num(dense), 0))
        categories = []
        for share, effect in zip(self._shares, self._effects, strict=True):
            values = np.searchsorted(share, rng.random(rows), side="right")
            categories.append(values)
            logits += effect[values]
        for first, second in _PAIRS:
            vectors = self._latent[first][categories[first]], self._latent[second]
            logits += (vectors[0] * vectors[1][categories[second]]).sum(1)
        return dense, categories, logits

    def _calibrated(self) -> float:
        """The bias with which about a quarter of the rows are clicks."""
        _, _, logits = self._sample(np.random.default_rng([self._seed, 0, 1]), 20_000)
        low, high = -30.0, 30.0
        for _ in range(50):
            middle = (low + high) / 2
            too_many = np.mean(1 / (1 + np.exp(-logits - middle))) > CLICK_RATE
            low, high = (low, middle) if too_many else (middle, high)
        return low


class BayesAUC:
    """The AUC of the true log-odds: no model can do better but by chance.

    Kept as a histogram of fine bins, so memory does not grow with the rows.
    """

    def __init__(self) -> None:
        self._clicks = np.zeros((2, _BINS))
        self._expected = np.zeros((2, _BINS))

    def add(self, logits: npt.NDArray[np.float64], clicks: npt.NDArray[np.bool_]) -> None:
        """Counts some rows."""
        bins = ((np.clip(logits / _WIDEST, -1, 1) + 1) / 2 * (_BINS - 1)).astype(int)
        chance = 1 / (1 + np.exp(-logits))
        for table, weights in ((self._clicks, clicks), (self._expected, chance)):
            table[1] += np.bincount(bins, weights, _BINS)
            table[0] += np.bincount(bins, 1 - weights, _BINS)

    @property
    def of_these_clicks(self) -> float:
        """With the clicks that there were: what to compare a model's AUC on these rows with."""
        return _auc(*self._clicks)

    @property
    def expected(self) -> float:
        """On average over what clicks there could have been."""
        return _auc(*self._expected)


def _auc(negatives: npt.NDArray[np.float64], positives: npt.NDArray[np.float64]) -> float:
    below = np.cumsum(negatives) - negatives / 2
    pairs = negatives.sum() * positives.sum()
    return float((positives * below).sum() / pairs) if pairs else float("nan")
