"""The algorithms once more, independently: NumPy, float64, one function per optimizer.

Each base takes initial weights and ``[update][layer]`` gradients and returns the final weights;
`reference` takes ``[update][sub-batch][layer]`` gradients for any optimizer of the registry.
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
    trust_ratio_denominator="norm_of_sum",
    default_trust_ratio=1.0,
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
            decay = (weight_decay or 0.0) * decays[i]
            g = update[i] + decay * w[i]
            denominator = {
                "norm_of_sum": _norm(g),
                "sum_of_norms": _norm(update[i]) + decay * _norm(w[i]),
            }[trust_ratio_denominator]
            rho = default_trust_ratio
            if adapts[i] and _norm(w[i]) > 0 and denominator > 0:
                rho = trust_coefficient * _norm(w[i]) / denominator
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
    default_trust_ratio=1.0,
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
            rho = default_trust_ratio
            if adapts[i] and _norm(w[i]) > 0 and _norm(r) > 0:
                rho = _norm(w[i]) / _norm(r)
            w[i] = w[i] - _rate(learning_rate, t) * rho * r
    return w


def lans(
    weights,
    gradients,
    learning_rate=0.001,
    beta_1=0.9,
    beta_2=0.999,
    epsilon=1e-6,
    weight_decay=0.0,
    default_trust_ratio=1.0,
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
            g = update[i] / _norm(update[i]) if _norm(update[i]) > 0 else 0.0 * update[i]
            m[i] = beta_1 * m[i] + (1 - beta_1) * g
            v[i] = beta_2 * v[i] + (1 - beta_2) * g**2
            root = np.sqrt(v[i] / (1 - beta_2 ** (t + 1)))
            decay = (weight_decay or 0.0) * w[i] * decays[i]
            d = 0.0
            for share, x in ((beta_1, m[i] / (1 - beta_1 ** (t + 1))), (1 - beta_1, g)):
                with np.errstate(invalid="ignore"):
                    part = np.where(x == 0, 0.0, x / (root + epsilon)) + decay
                rho = default_trust_ratio
                if adapts[i] and _norm(w[i]) > 0 and _norm(part) > 0:
                    rho = _norm(w[i]) / _norm(part)
                d = d + share * rho * part
            w[i] = w[i] - _rate(learning_rate, t) * d
    return w


def muon(
    weights,
    gradients,
    learning_rate=0.001,
    momentum=0.95,
    nesterov=True,
    weight_decay=0.004,
    adam_weight_decay=0.004,
    rms_rate=0.2,
):
    """Keras's: matrices by orthogonalized momentum, all others by Adam, without exclusions."""
    w = [np.array(x, np.float64) for x in weights]
    m = [np.zeros_like(x) for x in w]
    v = [np.zeros_like(x) for x in w]
    for t, update in enumerate(gradients):
        rate = _rate(learning_rate, t)
        for i, g in enumerate(update):
            if w[i].ndim != 2:
                w[i] = w[i] * (1 - rate * (adam_weight_decay or 0.0))
                m[i] = 0.9 * m[i] + 0.1 * g
                v[i] = 0.999 * v[i] + 0.001 * g**2
                scale = np.sqrt(1 - 0.999 ** (t + 1)) / (1 - 0.9 ** (t + 1))
                w[i] = w[i] - rate * scale * m[i] / (np.sqrt(v[i]) + 1e-7)
                continue
            w[i] = w[i] * (1 - rate * (weight_decay or 0.0))
            m[i] = momentum * m[i] + g
            x = g + momentum * m[i] if nesterov else m[i]
            x = x.T if x.shape[0] > x.shape[1] else x
            x = x / (_norm(x) + 1e-7)
            for _ in range(5):
                square = x @ x.T
                x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
            x = x if x.shape == w[i].shape else x.T
            size = 1.0 if rms_rate is None else rms_rate * np.sqrt(max(w[i].shape))
            w[i] = w[i] - rate * size * x
    return w


def clars(
    weights,
    gradients,
    mean_norms,
    learning_rate,
    momentum=0.9,
    trust_coefficient=0.01,
    max_trust_ratio=None,
    nesterov=True,
    weight_decay=0.0,
    default_trust_ratio=1.0,
    decays=None,
    adapts=None,
):
    """The paper's eq. 4 as it stands: v_0 = w_0, w = v_{t+1} + β (v_{t+1} − v_t).

    Without `nesterov` heavy ball: w + β (w_t − w_{t−1}) − γ g.
    """
    w = [np.array(x, np.float64) for x in weights]
    v = [np.array(x, np.float64) for x in weights]
    decays = decays or [True] * len(w)
    adapts = adapts or decays
    for t, (update, norms) in enumerate(zip(gradients, mean_norms, strict=True)):
        for i in range(len(w)):
            g = update[i] + (weight_decay or 0.0) * w[i] * decays[i]
            rho = default_trust_ratio
            if adapts[i]:
                defined = _norm(w[i]) > 0 and norms[i] > 0
                rho = trust_coefficient * _norm(w[i]) / norms[i] if defined else default_trust_ratio
                rho = min(rho, max_trust_ratio or np.inf)
            new_v = w[i] - _rate(learning_rate, t) * rho * g
            if nesterov:
                w[i], v[i] = new_v + momentum * (new_v - v[i]), new_v
            else:
                w[i], v[i] = new_v + momentum * (w[i] - v[i]), w[i]
    return w


def sgd(
    weights, gradients, learning_rate, momentum=0.0, nesterov=False, weight_decay=0.0, decays=None
):
    w = [np.array(x, np.float64) for x in weights]
    u = [np.zeros_like(x) for x in w]
    decays = decays or [True] * len(w)
    for t, update in enumerate(gradients):
        eta = _rate(learning_rate, t)
        for i in range(len(w)):
            g = update[i] + (weight_decay or 0.0) * w[i] * decays[i]
            u[i] = momentum * u[i] - eta * g
            w[i] = w[i] + (momentum * u[i] - eta * g if nesterov else u[i])
    return w


def adascale(
    weights,
    sub_batches,
    learning_rate,
    momentum=0.0,
    nesterov=False,
    weight_decay=0.0,
    clip=lambda layers: layers,
):
    """Final weights, the gains and τ, from ``[update][sub-batch][layer]`` gradients.

    From the paper's equations for the estimates, with the variance by its definition.
    """
    gains, rates, tau, variance, signal = [], [], 0.0, None, None
    for update in sub_batches:
        flat = [np.concatenate([np.ravel(g) for g in layers]).astype(float) for layers in update]
        flat = np.array([g for g in flat if np.any(g)])
        k, mean = len(flat), flat.mean(axis=0)
        new_variance = np.sum((flat - mean) ** 2) / (k - 1)
        new_signal = max(mean @ mean - new_variance / k, 0.0)
        theta = 0.0 if variance is None else max(1 - k / 1000, 0.0)
        variance = theta * (variance or 0.0) + (1 - theta) * new_variance
        signal = theta * (signal or 0.0) + (1 - theta) * new_signal
        gains.append((variance + signal) / (variance / k + signal))
        rates.append(gains[-1] * _rate(learning_rate, int(np.floor(tau))))
        tau += gains[-1]
    means = [clip(layers) for layers in mean_gradients(sub_batches)]
    final = sgd(weights, means, lambda t: rates[t], momentum, nesterov, weight_decay)
    return final, gains, tau


def adam(
    weights,
    gradients,
    learning_rate=0.001,
    beta_1=0.9,
    beta_2=0.999,
    epsilon=1e-7,
    weight_decay=0.0,
    decays=None,
):
    w = [np.array(x, np.float64) for x in weights]
    m = [np.zeros_like(x) for x in w]
    v = [np.zeros_like(x) for x in w]
    decays = decays or [True] * len(w)
    for t, update in enumerate(gradients):
        eta = _rate(learning_rate, t)
        alpha = eta * np.sqrt(1 - beta_2 ** (t + 1)) / (1 - beta_1 ** (t + 1))
        for i in range(len(w)):
            w[i] = w[i] - eta * (weight_decay or 0.0) * w[i] * decays[i]
            m[i] = beta_1 * m[i] + (1 - beta_1) * update[i]
            v[i] = beta_2 * v[i] + (1 - beta_2) * update[i] ** 2
            w[i] = w[i] - alpha * m[i] / (np.sqrt(v[i]) + epsilon)
    return w


def gsnr(sub_batches, gamma):
    """R of one layer from its ``[sub-batch, ...]`` gradients, by the definitions of the package."""
    g = np.asarray(sub_batches, np.float64)
    if len(g) < 2:
        return np.ones(g.shape[1:])
    mean, variance = g.mean(axis=0), g.var(axis=0)
    live = np.any(g != 0, axis=0)
    resolved = live & (variance > 1e-7 * np.mean(g**2, axis=0))
    r = np.where(resolved, mean**2 / np.where(resolved, variance, 1.0), 0.0)
    layer_mean = r[resolved].mean() if resolved.any() else 1.0
    r = np.clip(r / (layer_mean or 1.0), gamma, 1.0)
    return np.where(resolved, r, np.where(live, 1.0, gamma))


def variance_reduced(gradients, gamma=0.1, beta_3=None, clip=lambda layers: layers):
    """``[update][layer]`` gradients r ḡ (or p̂ ḡ) from ``[update][sub-batch][layer]``."""
    p = None
    results = []
    for t, update in enumerate(gradients):
        live = [layers for layers in update if any(np.any(g) for g in layers)] or update
        r = [gsnr(layer, gamma) for layer in zip(*live, strict=True)]
        if beta_3 is not None:
            p = p or [np.zeros_like(x) for x in r]
            p = [beta_3 * a + (1 - beta_3) * b for a, b in zip(p, r, strict=True)]
            r = [a / (1 - beta_3 ** (t + 1)) for a in p]
        means = clip(mean_gradients([update])[0])
        results.append([a * b for a, b in zip(r, means, strict=True)])
    return results


def mean_gradients(gradients):
    """``[update][layer]`` in float64, from ``[update][sub-batch][layer]``."""
    return [
        [np.mean(np.asarray(layer, np.float64), axis=0) for layer in zip(*update, strict=True)]
        for update in gradients
    ]


def adasum(gradients):
    """``[update][layer]`` in float64, from ``[update][replica][layer]``, neighbors first."""
    results = []
    for update in gradients:
        level = [[np.asarray(g, np.float64) for g in layers] for layers in update]
        while len(level) > 1:
            level = [
                [_adasum_of_two(a, b) for a, b in zip(*pair, strict=True)]
                for pair in zip(level[::2], level[1::2], strict=True)
            ]
        results.append(level[0])
    return results


def _adasum_of_two(a, b):
    dot = np.sum(a * b)
    of_a = dot / (2 * np.sum(a * a)) if np.any(a) else 0.0
    of_b = dot / (2 * np.sum(b * b)) if np.any(b) else 0.0
    return (1 - of_a) * a + (1 - of_b) * b


def mean_norms(sub_batches):
    """``[update][layer]`` N over the live sub-batches, from ``[update][sub-batch][layer]``."""
    results = []
    for update in sub_batches:
        live = [layers for layers in update if any(np.any(g) for g in layers)] or update
        norms = [[_norm(np.asarray(g, np.float64)) for g in layers] for layers in live]
        results.append(np.mean(norms, axis=0))
    return results


# Optimizers that have no function of their name here.
BASES: dict[str, Callable[..., Sequence[np.ndarray]]] = {
    "adamw": lambda *a, **k: adam(*a, **{"weight_decay": 0.004, **k}),
    "vr_sgd": sgd,
    "vr_momentum": lambda *a, **k: sgd(*a, **{"momentum": 0.9, **k}),
    "vr_adam": adam,
    "vr_lars": lars,
    "vr_lamb": lamb,
    "vr_lans": lans,
    # Of gradients that do not depend on where they are taken.
    "extrap_sgd": lambda *a, **k: sgd(*a, **{"momentum": 0.9, **k}),
    "extrap_adam": adam,
}
BETA_3 = {"vr_adam": 0.9, "vr_lamb": 0.9, "vr_lans": 0.9}


def reference(name, weights, sub_batches, clip=lambda layers: layers, **arguments):
    """Final weights of an optimizer of the registry.

    Args:
        name: Its name there.
        weights: Initial weights.
        sub_batches: ``[update][sub-batch][layer]`` gradients.
        clip: Clips the mean gradient, a list of layers.
        **arguments: The optimizer's.
    """
    if name.startswith("vr_"):
        gamma = arguments.pop("gamma", 0.1)
        beta_3 = arguments.pop("beta_3", BETA_3.get(name))
        gradients = variance_reduced(sub_batches, gamma, beta_3, clip)
    else:
        gradients = [clip(layers) for layers in mean_gradients(sub_batches)]
    if name == "clars":
        arguments["mean_norms"] = mean_norms(sub_batches)
    function = BASES[name] if name in BASES else globals()[name]
    return function(weights, gradients, **arguments)
