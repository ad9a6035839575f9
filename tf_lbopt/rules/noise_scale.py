"""The gradient noise scale, from the squared norms of sub-batches' gradients and of their mean."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def unbiased_estimates(mean_of_squares: Any, square_of_mean: Any, sub_batches: Any) -> Any:
    """The variance of a sub-batch's gradient and the squared norm of the expected gradient.

    With ``m = (1/k) Σ ‖g_d‖²`` and ``q = ‖ḡ‖²``

        σ̂² = k/(k − 1) (m − q),    μ̂² = q − σ̂²/k

    are unbiased if the k sub-batches are independent and of one size. ``b σ̂²`` estimates tr Σ, the
    trace of the covariance of a single example's gradient, where a sub-batch has b examples. μ̂² may
    be negative. Numbers or arrays of NumPy or TensorFlow, of floating point.

    Args:
        mean_of_squares: m.
        square_of_mean: q.
        sub_batches: k ≥ 2.

    Returns:
        σ̂² and μ̂².

    References:
        McCandlish, Kaplan, Amodei et al. 2018, "An Empirical Model of Large-Batch Training"
        (arXiv:1812.06162), appendix A.1; Johnson, Agrawal, Gu, Guestrin 2020, "AdaScale SGD"
        (arXiv:2007.05105), eq. 5 and 6, in which m − q stands as a difference of the sums.

    Example:
        >>> unbiased_estimates(mean_of_squares=5.0, square_of_mean=2.0, sub_batches=4.0)
        (4.0, 1.0)
    """
    variance = (mean_of_squares - square_of_mean) * (sub_batches / (sub_batches - 1.0))
    return variance, square_of_mean - variance / sub_batches


class RunningNoiseScale:
    """tr Σ / ‖G‖² of n things from their estimates in successive updates, in float64.

    Numerator and denominator are averaged apart, by weights that decrease by a factor from update
    to update into the past: the ratio of one update's estimates is biased, and may be negative.

    The standard error is by the delta method: with numerators x_t, denominators y_t, the ratio R of
    their weighted means, z_t = x_t − R y_t, and weights w_t,

        (W₂ / (1 − W₂/W²) · Σ w_t z_t² / W)^½ / |Σ w_t y_t|,    W = Σ w_t,  W₂ = Σ w_t²

    that is, updates count as independent, with one variance of z.

    Args:
        decay: The factor, in [0, 1).

    Example:
        >>> running = RunningNoiseScale(decay=0.5)
        >>> running.add([6.0], [1.0])
        >>> running.add([3.0], [2.0])
        >>> float(running.ratio()[0])             # (6/2 + 3) / (1/2 + 2)
        2.4
    """

    def __init__(self, decay: float):
        self.decay = decay
        self._weights = self._squared_weights = 0.0
        # Sums of x, y, x², x y, y².
        self._sums: np.ndarray = np.zeros([5, 1])

    def add(self, numerators: ArrayLike, denominators: ArrayLike) -> None:
        """Adds the estimates of one update: tr Σ and ‖G‖², [n] each."""
        x, y = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
        self._weights = self.decay * self._weights + 1.0
        self._squared_weights = self.decay**2 * self._squared_weights + 1.0
        self._sums = self.decay * self._sums + np.stack([x, y, x * x, x * y, y * y])

    def ratio(self) -> np.ndarray:
        """[n], the ratios: NaN without an update or a gradient, infinite where ‖G‖² is not > 0."""
        numerators, denominators = self._sums[:2]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = numerators / denominators
        return np.where((denominators <= 0) & (numerators > 0), np.inf, ratios)

    def standard_error(self) -> np.ndarray:
        """[n], the ratios' standard errors: NaN with fewer than two updates, infinite as they."""
        _, y, xx, xy, yy = self._sums
        ratios = self.ratio()
        with np.errstate(divide="ignore", invalid="ignore"):
            freedom = 1.0 - self._squared_weights / self._weights**2 if self._weights else 0.0
            squares = np.maximum(xx - 2.0 * ratios * xy + ratios**2 * yy, 0.0) / self._weights
            errors = np.sqrt(self._squared_weights * squares / freedom) / np.abs(y)
        errors = np.where(freedom > 0, errors, np.nan)
        return np.where(np.isinf(ratios), np.inf, errors)
