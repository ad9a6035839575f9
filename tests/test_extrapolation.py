"""ExtrapSGD and ExtrapAdam against their definition, in custom loops and in `fit`."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import strategy_of

import tf_lbopt

ROWS, INPUTS, OUTPUTS = 4, 5, 3
SPLITS = [(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (2, 2), (1, 8), (2, 4)]  # replicas, sub-batches


def initial():
    rng = np.random.default_rng(1)
    return [rng.normal(size=(INPUTS, OUTPUTS)), rng.normal(size=(OUTPUTS,))]


def batches(count, rows, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, rows, INPUTS))
    y = x @ rng.normal(size=(INPUTS, OUTPUTS)) + rng.normal(size=(count, rows, OUTPUTS))
    return x.astype("float32"), y.astype("float32")


def gradient(weights, x, y):
    """Of the mean squared error, in float64."""
    kernel, bias = weights
    error = 2 * (x.astype(float) @ kernel + bias - y) / y.size
    return [x.T.astype(float) @ error, error.sum(axis=0)]


def reference(
    data,
    points,
    learning_rate,
    momentum=0.9,
    nesterov=True,
    extrapolation_rate=None,
    noise="past_gradient",
    trust_coefficient=None,
    weight_decay=0.0,
    micro_steps=1,
    random=None,
    adam=None,
):
    """Algorithm 1 and section 3.2 of the paper; returns x and v after every update."""
    x = [w.astype(np.float32).astype(float) for w in initial()]
    v = [np.zeros_like(w) for w in x]
    past = [[np.zeros_like(w) for w in x] for _ in range(points)]
    history = []
    features, targets = data
    m = [np.zeros_like(w) for w in x]
    s = [np.zeros_like(w) for w in x]
    for t in range(len(features) // micro_steps):
        eta = learning_rate(t) if callable(learning_rate) else learning_rate
        rate = extrapolation_rate
        rate = eta / points if rate is None else rate(t) if callable(rate) else rate
        if random is not None:
            past = random(t, x)
        own = []
        for d in range(points):
            zeta = past[d]
            if adam:
                zeta = [
                    z * np.sqrt(1 - adam["beta_2"] ** t) / (np.sqrt(a) + adam["epsilon"])
                    for z, a in zip(zeta, s, strict=True)
                ]
            point = [
                w - rate * z + (momentum * u if nesterov else 0)
                for w, z, u in zip(x, zeta, v, strict=True)
            ]
            parts = [
                gradient(
                    point,
                    np.split(features[t * micro_steps + i], points)[d],
                    np.split(targets[t * micro_steps + i], points)[d],
                )
                for i in range(micro_steps)
            ]
            own.append([np.mean(g, axis=0) for g in zip(*parts, strict=True)])
        mean = [np.mean(g, axis=0) for g in zip(*own, strict=True)]
        if noise == "stochastic_noise":
            past = [[g - a for g, a in zip(gs, mean, strict=True)] for gs in own]
        else:
            past = own
        for i in range(len(x)):
            g = mean[i] + weight_decay * x[i]
            if adam:
                m[i] = adam["beta_1"] * m[i] + (1 - adam["beta_1"]) * g
                s[i] = adam["beta_2"] * s[i] + (1 - adam["beta_2"]) * g**2
                alpha = np.sqrt(1 - adam["beta_2"] ** (t + 1)) / (1 - adam["beta_1"] ** (t + 1))
                x[i] = x[i] - eta * alpha * m[i] / (np.sqrt(s[i]) + adam["epsilon"])
                continue
            rho = 1.0
            if trust_coefficient:
                rho = trust_coefficient * np.linalg.norm(x[i]) / np.linalg.norm(g)
            v[i] = momentum * v[i] - eta * rho * g
            x[i] = x[i] + v[i]
        history.append(([w.copy() for w in x], [u.copy() for u in v]))
    return history


class Loop:
    """A custom training loop of a linear model under a strategy."""

    def __init__(self, optimizer, replicas=1, wrap=lambda o: o, run_eagerly=False, dtype=None):
        self.replicas, self.strategy = replicas, strategy_of(replicas)
        with self.strategy.scope():
            self.variables = [keras.Variable(w, dtype=dtype or "float32") for w in initial()]
            self.optimizer = optimizer()
            self.outer = wrap(self.optimizer)
            self.outer.build(self.variables)
        self.step = self._step if run_eagerly else tf.function(self._step)
        self.points = {}

    def _step(self, x, y):
        parts = self.optimizer.sub_batches

        def replica_step(x, y):
            for part, (own_x, own_y) in enumerate(
                zip(tf.split(x, parts), tf.split(y, parts), strict=True)
            ):
                with self.optimizer.extrapolated(self.variables, part):
                    with tf.GradientTape() as tape:
                        kernel, bias = (tf.cast(v.value, tf.float32) for v in self.variables)
                        loss = tf.reduce_mean((own_x @ kernel + bias - own_y) ** 2)
                        loss = self.outer.scale_loss(loss / self.replicas)
                    gradients = tape.gradient(loss, [v.value for v in self.variables])
                    self.outer.apply_gradients(zip(gradients, self.variables, strict=True))

        self.strategy.run(replica_step, args=(x, y))

    def run(self, data, start=0, stop=None):
        for x, y in list(zip(*data, strict=True))[start:stop]:
            self.step(*(self._distributed(a) for a in (x, y)))
        return self

    def _distributed(self, array):
        if self.replicas == 1:
            return tf.constant(array)
        parts = [tf.constant(part) for part in np.split(array, self.replicas)]
        return self.strategy.experimental_distribute_values_from_function(
            lambda context: parts[context.replica_id_in_sync_group]
        )

    def weights(self):
        return [v.numpy() for v in self.variables]

    def assert_replicas_identical(self):
        for variable in [*self.variables, *self.outer.variables]:
            copies = self.strategy.experimental_local_results(variable.value)
            for copy in copies[1:]:
                np.testing.assert_array_equal(copies[0].numpy(), copy.numpy())


def assert_close(got, expected, rtol=2e-5, atol=2e-6):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


ARGUMENTS = {"learning_rate": 0.05, "extrapolation_rate": 0.2}
VARIANTS = {
    "defaults": {},
    "local rate": {"extrapolation_rate": None},
    "without nesterov": {"nesterov": False},
    "without momentum": {"momentum": 0.0},
    "decay": {"weight_decay": 0.1},
    "lars": {"trust_coefficient": 0.02, "learning_rate": 1.0, "weight_decay": 0.1},
    "stochastic noise": {"noise": "stochastic_noise"},
}


@pytest.mark.parametrize(("replicas", "sub_batches"), SPLITS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.quick(variant="defaults", replicas=(2, 4))
@pytest.mark.quick(variant="defaults", sub_batches=2)
@pytest.mark.quick(replicas=1, sub_batches=1)
@pytest.mark.quick(variant=("local rate", "stochastic noise"), replicas=2, sub_batches=2)
def test_equals_the_reference(variant, replicas, sub_batches):
    if (replicas, sub_batches) not in [(1, 1), (4, 1), (2, 2)] and variant != "defaults":
        pytest.skip("one code path for all splits")
    arguments = {**ARGUMENTS, **VARIANTS[variant]}
    points = replicas * sub_batches
    data = batches(8, ROWS * points)
    loop = Loop(lambda: tf_lbopt.ExtrapSGD(sub_batches=sub_batches, **arguments), replicas)
    loop.run(data)
    expected = reference(data, points, **arguments)
    assert_close(loop.weights(), expected[-1][0])
    loop.assert_replicas_identical()
    assert int(loop.optimizer.iterations.numpy()) == 8
    if variant != "stochastic noise" or points > 1:  # alone, the noise is 0
        plain = reference(data, points, **{**arguments, "extrapolation_rate": 0.0})
        assert np.abs(plain[-1][0][0] - expected[-1][0][0]).max() > 1e-3


@pytest.mark.parametrize(("replicas", "sub_batches"), [(1, 1), (4, 1), (2, 2)])
@pytest.mark.parametrize("rate", [0.02, None])
@pytest.mark.quick(rate=None, replicas=2)
@pytest.mark.quick(rate=0.02, replicas=1)
def test_adam_equals_the_reference(replicas, sub_batches, rate):
    points = replicas * sub_batches
    data = batches(8, ROWS * points)
    adam = {"beta_1": 0.8, "beta_2": 0.95, "epsilon": 1e-5}
    loop = Loop(
        lambda: tf_lbopt.ExtrapAdam(0.05, extrapolation_rate=rate, sub_batches=sub_batches, **adam),
        replicas,
    ).run(data)
    arguments = {"learning_rate": 0.05, "momentum": 0.0, "adam": adam}
    expected = reference(data, points, extrapolation_rate=rate, **arguments)
    assert_close(loop.weights(), expected[-1][0])
    plain = reference(data, points, extrapolation_rate=0.0, **arguments)
    assert np.abs(plain[-1][0][0] - expected[-1][0][0]).max() > 1e-3


@pytest.mark.parametrize(("replicas", "sub_batches"), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("noise", ["past_gradient", "stochastic_noise"])
@pytest.mark.quick(sub_batches=2, noise="stochastic_noise")
@pytest.mark.quick(replicas=1, noise="past_gradient")
def test_accumulation_keeps_one_past_gradient(replicas, sub_batches, noise):
    points = replicas * sub_batches
    data = batches(12, ROWS * points)
    arguments = {**ARGUMENTS, "noise": noise}
    loop = Loop(
        lambda: tf_lbopt.ExtrapSGD(
            sub_batches=sub_batches, gradient_accumulation_steps=3, **arguments
        ),
        replicas,
    ).run(data)
    expected = reference(data, points, micro_steps=3, **arguments)
    assert_close(loop.weights(), expected[-1][0])
    assert int(loop.optimizer.iterations.numpy()) == 4


@pytest.mark.parametrize("replicas", [1, 4])
@pytest.mark.quick(replicas=1)
def test_schedules_of_both_rates(replicas):
    schedule = keras.optimizers.schedules.PolynomialDecay
    data = batches(6, ROWS * replicas)
    loop = Loop(
        lambda: tf_lbopt.ExtrapSGD(schedule(0.1, 10), extrapolation_rate=schedule(0.3, 5, 0.1)),
        replicas,
    ).run(data)
    expected = reference(
        data,
        replicas,
        learning_rate=lambda t: 0.1 + (0.0001 - 0.1) * t / 10,
        extrapolation_rate=lambda t: 0.3 + (0.1 - 0.3) * min(t, 5) / 5,
    )
    assert_close(loop.weights(), expected[-1][0])


@pytest.mark.parametrize("replicas", [1, 4])
@pytest.mark.quick(replicas=1)
def test_without_extrapolation_it_is_nesterovs_sgd(replicas):
    """Keras stores x + β v where x is stored here."""
    data = batches(10, ROWS * replicas)
    loop = Loop(
        lambda: tf_lbopt.ExtrapSGD(0.05, momentum=0.9, extrapolation_rate=0.0), replicas
    ).run(data)
    variables = [keras.Variable(w, dtype="float32") for w in initial()]
    stock = keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True)
    for x, y in zip(*data, strict=True):
        gradients = gradient([v.numpy().astype(float) for v in variables], x, y)
        stock.apply([tf.constant(g, tf.float32) for g in gradients], variables)
    velocities = [v.numpy() for v in loop.optimizer.variables if v.path.endswith("momentum")]
    points = [w + 0.9 * v for w, v in zip(loop.weights(), velocities, strict=True)]
    assert_close(points, [v.numpy() for v in variables])


# -- random noise ----------------------------------------------------------------------------------


def points_of(optimizer, replicas, updates=2, variables=None):
    """``[update][point][variable]`` weights within the step, and x before it."""
    strategy = strategy_of(replicas)
    with strategy.scope():
        values = variables or [("dense/kernel", initial()[0]), ("dense/bias", initial()[1])]
        made = []
        for path, value in values:
            scope, name = path.split("/")
            with keras.name_scope(scope):
                made.append(keras.Variable(value, dtype="float32", name=name))
        optimizer = optimizer()
        optimizer.build(made)

    @tf.function
    def step():
        def replica_step():
            seen = []
            for part in range(optimizer.sub_batches):
                with optimizer.extrapolated(made, part):
                    seen.append([tf.identity(v.value) for v in made])
                    optimizer.apply([v * 0.01 for v in made], made)
            return seen

        return strategy.run(replica_step)

    history = []
    for _ in range(updates):
        x = [v.numpy() for v in made]
        seen = step()
        local = [
            [
                [strategy.experimental_local_results(w)[r].numpy() for w in part]
                for r in range(replicas)
            ]
            for part in seen
        ]
        # Replica by replica, the parts of one after another.
        points = [local[part][r] for r in range(replicas) for part in range(len(seen))]
        history.append((x, points))
    return history


@pytest.mark.parametrize("noise", ["gaussian", "uniform"])
@pytest.mark.parametrize(("replicas", "sub_batches"), [(1, 1), (4, 1), (2, 2)])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.quick(noise="gaussian", replicas=2)
@pytest.mark.quick(noise="uniform", replicas=1)
def test_random_noise_has_the_norm_of_the_filters(noise, replicas, sub_batches, shared):
    history = points_of(
        lambda: tf_lbopt.ExtrapSGD(
            0.1,
            momentum=0.0,
            extrapolation_rate=0.25,
            noise=noise,
            shared_noise=shared,
            noise_seed=3,
            sub_batches=sub_batches,
        ),
        replicas,
    )
    drawn = []
    for x, points in history:
        assert len(points) == replicas * sub_batches
        for point in points:
            kernel, bias = ((w - p) / 0.25 for w, p in zip(x, point, strict=True))
            np.testing.assert_allclose(
                np.linalg.norm(kernel, axis=0), np.linalg.norm(x[0], axis=0), rtol=1e-4
            )
            np.testing.assert_allclose(np.linalg.norm(bias), np.linalg.norm(x[1]), rtol=1e-4)
            drawn.append(np.round(kernel / np.linalg.norm(kernel, axis=0), 3).tobytes())
    per_update = 1 if shared else replicas * sub_batches
    assert len(set(drawn)) == 2 * per_update  # other noise for every update and every point


def test_filters_of_other_layers():
    rng = np.random.default_rng(0)
    variables = [
        ("embedding/embeddings", rng.normal(size=(7, 4))),
        ("depthwise_conv2d/kernel", rng.normal(size=(3, 3, 5, 2))),
        ("conv2d/kernel", rng.normal(size=(3, 3, 5, 6))),
        ("conv2d_transpose/kernel", rng.normal(size=(3, 3, 5, 6))),
    ]
    ((x, (point,)),) = points_of(
        lambda: tf_lbopt.ExtrapSGD(0.1, extrapolation_rate=1.0, noise="gaussian", noise_seed=1),
        1,
        updates=1,
        variables=variables,
    )
    for w, p, axes in zip(x, point, [(1,), (0, 1), (0, 1, 2), (0, 1, 3)], strict=True):
        np.testing.assert_allclose(
            np.sqrt(np.sum((w - p) ** 2, axis=axes)), np.sqrt(np.sum(w**2, axis=axes)), rtol=1e-4
        )


def test_fit_knows_the_filters_by_their_layers():
    layers = [
        keras.Input([8, 8, 4]),
        keras.layers.DepthwiseConv2D(3, name="spatial"),
        keras.layers.Flatten(),
        keras.layers.Dense(2),
    ]
    seen = []

    class Model(keras.Sequential):
        def train_step(self, data):
            seen.append(self.layers[0].kernel.numpy())
            return super().train_step(data)

    model = Model(layers)
    start = model.layers[0].kernel.numpy()
    optimizer = tf_lbopt.ExtrapSGD(0.0, extrapolation_rate=1.0, noise="gaussian")
    model.compile(optimizer=optimizer, loss="mse", run_eagerly=True)
    model.fit(np.ones((4, 8, 8, 4)), np.ones((4, 2)), batch_size=4, verbose=0)
    np.testing.assert_allclose(
        np.linalg.norm((seen[0] - start)[..., 0], axis=(0, 1)),
        np.linalg.norm(start[..., 0], axis=(0, 1)),
        rtol=1e-4,
    )
    np.testing.assert_array_equal(model.layers[0].kernel.numpy(), start)


def test_the_seed_that_was_drawn_is_saved(tmp_path):
    def make():
        return tf_lbopt.ExtrapSGD(0.1, noise="gaussian")

    one = Loop(make)
    path = tf.train.Checkpoint(optimizer=one.optimizer).save(str(tmp_path / "a"))
    other = Loop(make)
    tf.train.Checkpoint(optimizer=other.optimizer).restore(path)
    data = batches(3, ROWS)
    assert_close(one.run(data).weights(), other.run(data).weights(), rtol=0, atol=0)
    third = Loop(make).run(data)
    assert np.abs(third.weights()[0] - one.weights()[0]).max() > 1e-5
