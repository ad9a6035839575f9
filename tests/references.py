"""The algorithms once more, independently: NumPy, float64, one function per optimizer.

Each takes initial weights and ``[update][layer]`` mean gradients and returns the final weights.
"""

from collections.abc import Callable, Sequence

import numpy as np


def _norm(x):
    return np.sqrt(np.sum(np.square(x)))


def _rate(learning_rate, t):
    return learning_rate(t) if callable(learning_rate) else learning_rate


def sngm(weights, gradients, learning_rate, momentum=0.9, weight_decay=0.0, decays=None):
    w = [np.array(x, np.float64) for x in weights]
    u = [np.zeros_like(x) for x in w]
    decays = decays or [True] * len(w)
    for t, update in enumerate(gradients):
        g = [
            gi + (weight_decay or 0.0) * wi * d for gi, wi, d in zip(update, w, decays, strict=True)
        ]
        norm = np.sqrt(sum(np.sum(gi**2) for gi in g))
        for i in range(len(w)):
            u[i] = momentum * u[i] + (g[i] / norm if norm else 0.0)
            w[i] = w[i] - _rate(learning_rate, t) * u[i]
    return w


def lars(
    weights,
    gradients,
    learning_rate,
    momentum=0.9,
    trust_coefficient=0.001,
    nesterov=False,
    weight_decay=0.0,
    decays=None,
    adapts=None,
):
    w = [np.array(x, np.float64) for x in weights]
    u = [np.zeros_like(x) for x in w]
    decays = decays or [True] * len(w)
    adapts = adapts or decays
    for t, update in enumerate(gradients):
        eta = _rate(learning_rate, t)
        for i in range(len(w)):
            g = update[i] + (weight_decay or 0.0) * w[i] * decays[i]
            rho = 1.0
            if adapts[i] and _norm(w[i]) > 0 and _norm(g) > 0:
                rho = trust_coefficient * _norm(w[i]) / _norm(g)
            u[i] = momentum * u[i] + eta * rho * g
            w[i] = w[i] - (momentum * u[i] + eta * rho * g if nesterov else u[i])
    return w


def lamb(
    weights,
    gradients,
    learning_rate=0.001,
    beta_1=0.9,
    beta_2=0.999,
    epsilon=1e-6,
    weight_decay=0.0,
    decays=None,
    adapts=None,
):
    w = [np.array(x, np.float64) for x in weights]
    m = [np.zeros_like(x) for x in w]
    v = [np.zeros_like(x) for x in w]
    decays = decays or [True] * len(w)
    adapts = adapts or decays
    for t, update in enumerate(gradients):
        for i in range(len(w)):
            m[i] = beta_1 * m[i] + (1 - beta_1) * update[i]
            v[i] = beta_2 * v[i] + (1 - beta_2) * update[i] ** 2
            m_hat = m[i] / (1 - beta_1 ** (t + 1))
            v_hat = v[i] / (1 - beta_2 ** (t + 1))
            r = m_hat / (np.sqrt(v_hat) + epsilon)
            r = r + (weight_decay or 0.0) * w[i] * decays[i]
            rho = 1.0
            if adapts[i] and _norm(w[i]) > 0 and _norm(r) > 0:
                rho = _norm(w[i]) / _norm(r)
            w[i] = w[i] - _rate(learning_rate, t) * rho * r
    return w


REFERENCES: dict[str, Callable[..., Sequence[np.ndarray]]] = {
    "sngm": sngm,
    "lars": lars,
    "lamb": lamb,
}
