"""PostLocalSGD against its definition, and what is seen of the weights between averages."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import strategy_of
from harness import CASES, Run, initial_weights, sub_batch_gradients
from test_extrapolation import ROWS, assert_close, batches, gradient, initial
from test_extrapolation import reference as extrapolated
from test_extrapolation_fit import dataset, fit

import tf_lbopt
from benchmarks import references

BAD = 1e7  # an input on which the forward pass fails
BY_NAME = {case.name: case for case in CASES}
EXTRAP = {"learning_rate": 0.05, "momentum": 0.8, "extrapolation_rate": 0.2}


def mean_of(values):
    return [np.mean(v, axis=0) for v in zip(*values, strict=True)]


def reference(
    data,
    replicas,
    start,
    period,
    learning_rate=0.05,
    momentum=0.0,
    nesterov=False,
    weight_decay=0.0,
    average_momentum=False,
    trust_coefficient=None,
    extrap=None,
    ends=(),
    missing=(),
):
    """What Python sees after every update, and the replicas' own weights, in float64.

    ``ends``: after which updates a period ends early; ``missing``: ``(update, replica)`` of local
    steps left out; ``extrap``: the arguments of ExtrapSGD, for the first phase too.
    """
    x, v = [w.astype(np.float32).astype(float) for w in initial()], None
    seen, own = [], []
    if extrap:
        first = [a[:start] for a in data]
        seen = extrapolated(first, replicas, **extrap)
        x, v = seen[-1] if seen else (x, None)
        seen = [s for s, _ in seen]
        own = [[s] * replicas for s in seen]
        momentum, nesterov = extrap["momentum"], extrap.get("nesterov", True)
        learning_rate = extrap["learning_rate"]
        weight_decay = extrap.get("weight_decay", 0.0)
        trust_coefficient = extrap.get("trust_coefficient")
    v = [np.zeros_like(w) for w in x] if v is None else v
    xs, vs = [x] * replicas, [v] * replicas
    since = 0
    for t in range(len(seen), len(data[0])):
        eta = learning_rate(t) if callable(learning_rate) else learning_rate
        parts = [np.split(a[t], replicas) for a in data]
        points = [
            [w + momentum * u for w, u in zip(x, v, strict=True)] if extrap and nesterov else x
            for x, v in zip(xs, vs, strict=True)
        ]
        gs = [gradient(p, *batch) for p, *batch in zip(points, *parts, strict=True)]
        local = t >= start and replicas > 1
        if not local:
            gs = [mean_of(gs)] * replicas
        for d in range(replicas):
            if (t, d) in missing:
                continue
            new_x, new_v = [], []
            for w, u, g in zip(xs[d], vs[d], gs[d], strict=True):
                rho = 1.0
                if extrap:
                    g = g + weight_decay * w
                    if trust_coefficient:
                        rho = trust_coefficient * np.linalg.norm(w) / np.linalg.norm(g)
                else:
                    w = w - eta * weight_decay * w
                u = momentum * u - eta * rho * g
                look_ahead = nesterov and not extrap
                new_x.append(w + (momentum * u - eta * g if look_ahead else u))
                new_v.append(u)
            xs[d], vs[d] = new_x, new_v
        since += local
        if not local or since == period or t in ends:
            xs, since = [mean_of(xs)] * replicas, 0
            if average_momentum:
                vs = [mean_of(vs)] * replicas
            average = xs[0]
        elif not seen or t == start:
            average = seen[-1] if seen else x
        seen.append(average)
        own.append(list(xs))
    return seen, own


class Loop:
    """A custom training loop of a linear model under a strategy."""

    def __init__(
        self, optimizer, replicas, run_eagerly=False, weights=None, constraint=None, fails=False
    ):
        self.replicas, self.strategy, self.fails = replicas, strategy_of(replicas), fails
        with self.strategy.scope():
            self.variables = [
                keras.Variable(w, dtype="float32", name=f"w{i}")
                for i, w in enumerate(weights or initial())
            ]
            for variable in self.variables:
                variable.constraint = constraint
            self.optimizer = optimizer()
            self.optimizer.build(self.variables)
        self.step = self._step if run_eagerly else tf.function(self._step)
        self.points = []

    def _step(self, x, y, local):
        def replica_step(x, y):
            with self.optimizer.step(self.variables, local=local):
                with tf.GradientTape() as tape:
                    kernel, bias = (tf.convert_to_tensor(v.value) for v in self.variables)
                    tape.watch([kernel, bias])
                    predicted = x @ kernel + bias
                    if self.fails:
                        with tf.control_dependencies([predicted]):
                            good = tf.debugging.assert_none_equal(x, BAD)
                        with tf.control_dependencies([] if good is None else [good]):
                            predicted = tf.identity(predicted)  # the gradient waits for it too
                    loss = tf.reduce_mean((predicted - y) ** 2) / self.replicas
                gradients = tape.gradient(loss, [kernel, bias])
                self.optimizer.apply_gradients(zip(gradients, self.variables, strict=True))

        self.strategy.run(replica_step, args=(x, y))

    def run(self, data, start=0, stop=None):
        """Updates; returns what is seen after each."""
        seen = []
        for x, y in list(zip(*data, strict=True))[start:stop]:
            arguments = [distributed(self.strategy, a) for a in (x, y)]
            self.step(*arguments, local=self.optimizer.is_local)
            self.optimizer.end_update()
            self.assert_replicas_equal()
            seen.append(self.weights())
        return seen

    def weights(self):
        return [v.numpy() for v in self.variables]

    def assert_replicas_equal(self):
        equal_on_all_replicas(self.strategy, [*self.variables, self.optimizer.iterations])


def equal_on_all_replicas(strategy, variables):
    for variable in variables:
        copies = strategy.experimental_local_results(variable.value)
        for copy in copies[1:]:
            np.testing.assert_array_equal(copies[0].numpy(), copy.numpy())


def distributed(strategy, array):
    if strategy.num_replicas_in_sync == 1:
        return tf.constant(array)
    parts = [tf.constant(part) for part in np.split(array, strategy.num_replicas_in_sync)]
    return strategy.experimental_distribute_values_from_function(
        lambda context: parts[context.replica_id_in_sync_group]
    )


def sgd(start, period, average_momentum=False, **kwargs):
    kwargs = {"learning_rate": 0.05, **kwargs}
    return lambda: tf_lbopt.PostLocalSGD(
        keras.optimizers.SGD(**kwargs), start, period, average_momentum
    )


def extrap_sgd(start, period, average_momentum=False, **kwargs):
    return lambda: tf_lbopt.PostLocalSGD(
        tf_lbopt.ExtrapSGD(**{**EXTRAP, **kwargs}), start, period, average_momentum
    )


def model_of(optimizer, replicas, model_class=keras.Model, **compile_arguments):
    with strategy_of(replicas).scope():
        inputs = keras.Input([5])
        outputs = keras.layers.Dense(3, name="linear")(inputs)
        model = model_class(inputs, outputs)
        model.set_weights(initial())
        model.compile(optimizer=optimizer(), loss="mse", **compile_arguments)
    return model


class Seen(keras.callbacks.Callback):
    """Weights after every update, and the same on all replicas."""

    def __init__(self):
        super().__init__()
        self.weights, self.at_epoch_end = [], []

    def on_train_batch_end(self, batch, logs=None):
        equal_on_all_replicas(self.model.distribute_strategy, self.model.trainable_variables)
        self.weights.append(self.model.get_weights())

    def on_epoch_end(self, epoch, logs=None):
        self.at_epoch_end.append(self.model.get_weights())


def assert_all_close(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b)


# -- the definition --------------------------------------------------------------------------------

VARIANTS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "decay": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.3},
    "averaged momentum": {"momentum": 0.9, "average_momentum": True},
}


@pytest.mark.parametrize(
    ("variant", "replicas", "start", "period"),
    [
        ("decay", 1, 1, 2),
        ("plain", 2, 2, 3),
        ("momentum", 2, 0, 4),
        ("averaged momentum", 2, 1, 2),
        ("momentum", 2, 20, 2),
        ("decay", 2, 1, 3),
        ("nesterov", 4, 3, 2),
        ("momentum", 8, 1, 3),
    ],
)
@pytest.mark.quick(replicas=1)
@pytest.mark.quick(variant=("momentum", "averaged momentum", "decay"), start=(0, 1), replicas=2)
def test_equals_the_reference_after_every_update(variant, replicas, start, period):
    arguments = VARIANTS[variant]
    data = batches(9, ROWS * replicas)
    loop = Loop(sgd(start, period, **arguments), replicas)
    seen = loop.run(data)
    expected, own = reference(data, replicas, start, period, **arguments)
    assert_all_close(seen, expected)
    loop.optimizer.end_period()
    assert_close(loop.weights(), mean_of(own[-1]))
    assert int(loop.optimizer.iterations.numpy()) == 9
    if replicas > 1 and start < 9:
        synchronous, _ = reference(data, replicas, 9, 1, **arguments)
        difference = np.abs(synchronous[-1][0] - mean_of(own[-1])[0]).max()
        assert difference > 1e-3 or (period == 1)


def test_averaging_momentum_makes_a_difference():
    data = batches(9, ROWS * 4)
    one, _ = reference(data, 4, 0, 3, momentum=0.9)
    other, _ = reference(data, 4, 0, 3, momentum=0.9, average_momentum=True)
    assert np.abs(one[-1][0] - other[-1][0]).max() > 1e-4


@pytest.mark.parametrize("replicas", [1, 2, 4])
@pytest.mark.quick(replicas=2)
def test_schedule_counts_every_update(replicas):
    schedule = keras.optimizers.schedules.PolynomialDecay(0.1, 10, 0.01)
    data = batches(8, ROWS * replicas)
    seen = Loop(sgd(2, 3, learning_rate=schedule, momentum=0.9), replicas).run(data)
    expected, _ = reference(
        data, replicas, 2, 3, learning_rate=lambda t: 0.1 + (0.01 - 0.1) * t / 10, momentum=0.9
    )
    assert_all_close(seen, expected)


@pytest.mark.parametrize(
    ("variant", "replicas"), [("plain", 2), ("momentum", 4), ("decay", 2), ("averaged momentum", 2)]
)
@pytest.mark.quick(variant="averaged momentum")
def test_averaged_after_each_step_it_is_synchronous_sgd(variant, replicas):
    arguments = VARIANTS[variant]
    data = batches(6, ROWS * replicas)
    seen = Loop(sgd(0, 1, **arguments), replicas).run(data)
    stock = {key: value for key, value in arguments.items() if key != "average_momentum"}
    variables = [keras.Variable(w, dtype="float32") for w in initial()]
    optimizer = keras.optimizers.SGD(0.05, **stock)
    for (x, y), got in zip(zip(*data, strict=True), seen, strict=True):
        gradients = gradient([v.numpy().astype(float) for v in variables], x, y)
        optimizer.apply([tf.constant(g, tf.float32) for g in gradients], variables)
        assert_close(got, [v.numpy() for v in variables])


@pytest.mark.parametrize(
    ("arguments", "replicas", "start", "period"),
    [
        ({}, 1, 3, 2),
        ({}, 4, 2, 2),
        ({"nesterov": False}, 2, 3, 3),
        ({"weight_decay": 0.2}, 2, 0, 2),
        ({"trust_coefficient": 0.02, "learning_rate": 1.0, "weight_decay": 0.1}, 2, 2, 3),
        ({"noise": "stochastic_noise"}, 2, 3, 4),
    ],
    ids=str,
)
@pytest.mark.quick(replicas=2, start=2, period=3)
def test_extrapolated_sgd_then_nesterovs_on_each_replica(arguments, replicas, start, period):
    data = batches(8, ROWS * replicas)
    loop = Loop(extrap_sgd(start, period, **arguments), replicas)
    seen = loop.run(data)
    if replicas == 1:  # ExtrapSGD at all times
        expected = [x for x, _ in extrapolated(data, 1, **{**EXTRAP, **arguments})]
    else:
        expected, _ = reference(data, replicas, start, period, extrap={**EXTRAP, **arguments})
    assert_all_close(seen, expected)


class LocalRun(Run):
    """Of gradients that are given, so that each replica's steps are the rule's own reference."""

    def __init__(self, inner, start, period, replicas, **kwargs):
        def make():
            return tf_lbopt.PostLocalSGD(inner(), start, period, **kwargs)

        super().__init__(make, replicas, function=lambda step: step)

    def _replica_step(self, local):
        with self.optimizer.step(self.variables, local=self.local):
            self._apply([gradient / self.replicas for gradient in local])

    def update(self, sub_batches):
        self.local = self.optimizer.is_local
        super().update(sub_batches)
        self.optimizer.end_update()
        return self


RULES = {
    "sngm": lambda: BY_NAME["sngm"](),
    "lars": lambda: BY_NAME["lars"](exclude_from_layer_adaptation=[]),
    "lamb": lambda: BY_NAME["lamb"](),
    "compiled lamb": lambda: BY_NAME["lamb"](jit_compile=True),
    "extrap_adam": lambda: BY_NAME["extrap_adam"](extrapolation_rate=0.0),
    "stock adam": lambda: keras.optimizers.AdamW(**BY_NAME["extrap_adam"].arguments),
}


@pytest.mark.parametrize(
    ("rule", "replicas"), [*((rule, 2) for rule in RULES), ("sngm", 4), ("lamb", 4)]
)
@pytest.mark.quick(rule=("lamb", "compiled lamb", "extrap_adam", "stock adam"), replicas=2)
def test_each_replica_takes_the_steps_of_any_rule(rule, replicas):
    case = BY_NAME["extrap_adam" if rule == "stock adam" else rule.removeprefix("compiled ")]
    gradients = sub_batch_gradients(4, replicas)
    run = LocalRun(RULES[rule], 1, 3, replicas).updates(gradients)
    equal_on_all_replicas(run.strategy, [*run.variables, run.optimizer.iterations])
    together, *apart = gradients
    own = [
        references.reference(
            case.name, initial_weights(), [together, *([g[d]] for g in apart)], **case.arguments
        )
        for d in range(replicas)
    ]
    assert_close(run.weights(), mean_of(own))
    synchronous = references.reference(case.name, initial_weights(), gradients, **case.arguments)
    difference = max(np.abs(a - b).max() for a, b in zip(run.weights(), synchronous, strict=True))
    assert difference > 1e-3


@pytest.mark.parametrize(
    ("rule", "averaged"), [("lamb", False), ("lamb", True), ("stock adam", True)]
)
@pytest.mark.quick(rule="lamb", averaged=True)
def test_all_slots_are_averaged_if_momentum_is(rule, averaged):
    run = LocalRun(RULES[rule], 0, 2, 2, average_momentum=averaged)
    run.updates(sub_batch_gradients(2, 2))
    slots = [v for v in run.optimizer.variables if v.path.endswith(("momentum", "velocity"))]
    assert {id(v.value) for v in slots} == {id(v) for v in run.optimizer._local.slots}
    assert len(slots) == 2 * len(run.variables)
    for slot in slots:
        one, two = (c.numpy() for c in run.strategy.experimental_local_results(slot.value))
        assert np.array_equal(one, two) == averaged


@pytest.mark.parametrize("make", [sgd, extrap_sgd])
@pytest.mark.quick(make="extrap_sgd")
def test_fit_equals_the_reference(make):
    data = batches(7, ROWS * 2)
    model = model_of(make(2, 3), 2)
    seen = Seen()
    fit(model, data, callbacks=[seen])
    extrap = EXTRAP if make is extrap_sgd else None
    expected, own = reference(data, 2, 2, 3, extrap=extrap)
    assert_all_close(seen.weights, expected)
    assert_close(model.get_weights(), mean_of(own[-1]))


def test_train_on_batch():
    data = batches(6, ROWS * 2)
    model = model_of(sgd(2, 3, momentum=0.9), 2)
    for x, y in zip(*data, strict=True):  # Keras gives every replica the whole batch
        model.train_on_batch(x, y)
    same = [np.concatenate([a, a], axis=1) for a in data]
    assert_close(model.get_weights(), reference(same, 2, 2, 3, momentum=0.9)[0][-1])


def test_a_second_fit_goes_on():
    data = batches(8, ROWS * 2)
    model = model_of(sgd(3, 2, momentum=0.9), 2)
    fit(model, [a[:4] for a in data])  # ends in mid-period, which ends it
    fit(model, [a[4:] for a in data])
    expected, own = reference(data, 2, 3, 2, momentum=0.9, ends=[3])
    assert_close(model.get_weights(), mean_of(own[-1]))
    assert np.abs(expected[-1][0] - reference(data, 2, 3, 2, momentum=0.9)[0][-1][0]).max() > 1e-4


def test_eager_loop_and_sparse_gradients():
    """An embedding's gradient, with repeated rows, against that of a matrix in NumPy."""

    class Table(keras.Model):
        def __init__(self):
            super().__init__()
            self.table = keras.layers.Embedding(6, 3)

        def call(self, x):
            return keras.ops.sum(self.table(x), axis=1)

    rng = np.random.default_rng(0)
    ids = rng.integers(0, 6, size=(5, 8, 4))
    counts = np.stack([[np.bincount(row, minlength=6) for row in batch] for batch in ids])
    targets = rng.normal(size=(5, 8, 3))
    start = rng.normal(size=(6, 3))
    with strategy_of(2).scope():
        model = Table()
        model(ids[0])
        model.set_weights([start])
        model.compile(optimizer=sgd(2, 2, learning_rate=0.02, momentum=0.9)(), loss="mse")
    model.fit(tf.data.Dataset.from_tensor_slices((ids, targets)), verbose=0)

    own, momenta = [start, start], [0.0, 0.0]
    for t, (c, y) in enumerate(zip(counts, targets, strict=True)):
        halves = zip(own, np.split(c, 2), np.split(y, 2), strict=True)
        gradients = [a.T @ (a @ table - b) * 2 / b.size for table, a, b in halves]
        if t < 2:
            gradients = [np.mean(gradients, axis=0)] * 2
        momenta = [0.9 * v - 0.02 * g for v, g in zip(momenta, gradients, strict=True)]
        own = [table + v for table, v in zip(own, momenta, strict=True)]
        if t in (3, 4):  # a period, and the end of `fit`
            own = [np.mean(own, axis=0)] * 2
    assert_close(model.get_weights(), own[:1])
    assert np.abs(own[0] - start).max() > 1e-2


def test_constraints_hold_on_own_weights_and_on_the_average():
    data = batches(5, ROWS * 2)
    loop = Loop(sgd(0, 2, learning_rate=0.3), 2, constraint=keras.constraints.MaxNorm(1.0, axis=0))
    loop.run(data)
    for variable in (*(v.value for v in loop.variables), *loop.optimizer._local.weights):
        for copy in loop.strategy.experimental_local_results(variable):
            assert np.linalg.norm(copy.numpy(), axis=0).max() <= 1.0 + 1e-5


# -- what is exchanged -----------------------------------------------------------------------------


def reductions(function):
    """Elements of what every collective in a graph, or in a function it calls, takes."""
    graph = function.graph.as_graph_def()
    sizes = []

    def nodes():
        yield from function.graph.get_operations()
        for name in {f.signature.name for f in graph.library.function}:
            yield from function.graph._get_function(name).graph.get_operations()

    for operation in nodes():
        kinds = ("Collective", "AllReduce", "NcclReduce", "NcclBroadcast")
        if any(kind in operation.type for kind in kinds) and operation.inputs:
            size = max((i.shape.num_elements() or 10**9) for i in operation.inputs)
            sizes.append(size)
    return sizes


@pytest.mark.parametrize("make", [sgd, extrap_sgd])
@pytest.mark.quick(make="extrap_sgd")
def test_a_local_step_exchanges_nothing(make):
    data = batches(1, ROWS * 2)
    loop = Loop(make(0, 2, momentum=0.9), 2)
    arguments = [distributed(loop.strategy, a[0]) for a in data]
    sizes = {
        local: reductions(loop.step.get_concrete_function(*arguments, local=local))
        for local in (False, True)
    }
    assert max(sizes[False]) >= 15
    assert max(sizes[True], default=0) <= 1
    averaging = reductions(loop.optimizer._averaging.func.get_concrete_function())
    assert len(averaging) == 2  # one, in each of two replicas
    assert min(averaging) >= 15 + 3


def test_batch_normalization_trains_and_exchanges_its_statistics_only():
    with strategy_of(2).scope():
        model = keras.Sequential(
            [
                keras.Input([5]),
                keras.layers.Dense(8, use_bias=False, dtype="mixed_bfloat16"),
                keras.layers.BatchNormalization(momentum=0.5),
                keras.layers.Dense(3, use_bias=False),
            ]
        )
        optimizer = sgd(4, 3, momentum=0.9)()
        model.compile(optimizer=optimizer, loss="mse", metrics=["mae"])
    data = [np.tile(a, (10, 1, 1)) for a in batches(4, 32)]
    first = model.evaluate(dataset(data), verbose=0)[0]
    fit(model, data)
    assert model.evaluate(dataset(data), verbose=0)[0] < 0.7 * first
    equal_on_all_replicas(strategy_of(2), model.trainable_variables)
    assert int(optimizer.iterations.numpy()) == 40

    steps = []
    optimizer.wrap_training(model, model.train_step, steps.append)
    batch = tuple(distributed(strategy_of(2), a[0]) for a in data)
    sizes = []
    for step in steps:
        function = tf.function(lambda *data, step=step: strategy_of(2).run(step, args=(data,)))
        sizes.append(reductions(function.get_concrete_function(*batch)))
    synchronous, local = sizes
    assert max(synchronous) >= 40  # the weights of the first layer
    assert max(local, default=0) <= 16  # 8 means and 8 variances


# -- what is seen in mid-period --------------------------------------------------------------------


def in_mid_period(make=sgd, updates=4, replicas=2, **kwargs):
    """A model after some local updates, in mid-period, with its data."""
    data = batches(10, ROWS * replicas)
    model = model_of(make(1, 4, momentum=0.9, **kwargs), replicas)
    go_on(model, data, 0, updates)
    return model, data


def go_on(model, data, start, stop):
    """Updates without the end of an epoch."""
    model.make_train_function()
    for batch in list(zip(*data, strict=True))[start:stop]:
        batch = tuple(distributed(model.distribute_strategy, a) for a in batch)
        model.train_function(iter([batch]))


def save_by_callback(model, path):
    callback = keras.callbacks.ModelCheckpoint(str(path / "m.weights.h5"), save_weights_only=True)
    callback.set_model(model)
    callback.on_epoch_end(0, {})


def by_checkpoint(model, path):
    tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(str(path / "checkpoint"))


USES = {
    "evaluate": lambda model, path: model.evaluate(np.ones([4, 5]), np.ones([4, 3]), verbose=0),
    "test_on_batch": lambda model, path: model.test_on_batch(np.ones([4, 5]), np.ones([4, 3])),
    "save": lambda model, path: model.save(path / "m.keras"),
    "save_model": lambda model, path: keras.saving.save_model(model, path / "m.keras"),
    "save_weights": lambda model, path: model.save_weights(path / "m.weights.h5"),
    "ModelCheckpoint": save_by_callback,
    "Checkpoint": by_checkpoint,
}
UNNOTICED = {
    "predict": lambda model, path: model.predict(np.ones([4, 5]), verbose=0),
    "get_weights": lambda model, path: model.get_weights(),
}


@pytest.mark.parametrize("use", [*USES, *UNNOTICED])
@pytest.mark.quick(use=("evaluate", "Checkpoint"))
def test_a_use_in_mid_period_sees_the_last_average_and_warns_once(use, tmp_path):
    model, data = in_mid_period()  # one synchronous update, three local steps
    expected, own = reference(data, 2, 1, 4, momentum=0.9)
    messages = []
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = {**USES, **UNNOTICED}[use](model, tmp_path)
        messages += [str(w.message) for w in caught if "steps of PostLocalSGD" in str(w.message)]
        assert_close(model.get_weights(), expected[3])
    kernel, bias = expected[3]
    if use in ("evaluate", "test_on_batch"):
        assert result == pytest.approx(np.mean((np.ones([4, 5]) @ kernel + bias - 1) ** 2))
    if use in UNNOTICED:
        assert not messages
    else:
        (message,) = messages
        assert "(3 on each replica)" in message
        assert ("evaluated" if "test" in use or use == "evaluate" else "saved") in message
    model.optimizer.end_period()
    assert_close(model.get_weights(), mean_of(own[3]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.evaluate(np.ones([4, 5]), np.ones([4, 3]), verbose=0)


def test_no_warning_where_nothing_is_missing(tmp_path):
    model, data = in_mid_period(updates=1)  # before the local phase
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        USES["evaluate"](model, tmp_path)
        USES["save_weights"](model, tmp_path)
        go_on(model, data, 1, 5)  # a whole period
        USES["evaluate"](model, tmp_path)
        USES["save_weights"](model, tmp_path)


def test_the_next_period_is_a_whole_one():
    model, data = in_mid_period()
    model.evaluate(
        np.ones([4, 5]), np.ones([4, 3]), verbose=0, callbacks=[tf_lbopt.callbacks.EndPeriod()]
    )
    expected, _ = reference(data, 2, 1, 4, momentum=0.9, ends=[3])
    for update in range(4, 9):
        go_on(model, data, update, update + 1)
        assert_close(model.get_weights(), expected[update])


@pytest.mark.parametrize("validated", [False, True])
def test_the_callback_averages_before_validation_and_callbacks_after_it(validated):
    data = batches(4, ROWS * 2)
    model = model_of(sgd(1, 2, momentum=0.9), 2)
    before, after = Seen(), Seen()
    arguments = {"validation_data": dataset(data)} if validated else {}
    callbacks = [before, tf_lbopt.callbacks.EndPeriod(), after]
    history = fit(model, data, epochs=2, callbacks=callbacks, **arguments).history
    twice = [np.concatenate([a, a]) for a in data]
    expected, _ = reference(twice, 2, 1, 2, momentum=0.9, ends=[3, 7])
    assert_all_close(after.at_epoch_end, [expected[3], expected[7]])
    if not validated:
        assert_close(before.at_epoch_end[0], expected[2])
    for (kernel, bias), loss in zip(after.at_epoch_end, history.get("val_loss", []), strict=False):
        assert loss == pytest.approx(np.mean((data[0] @ kernel + bias - data[1]) ** 2), rel=1e-4)


def test_without_the_callback_fit_averages_at_its_end_only():
    data = batches(4, ROWS * 2)
    model = model_of(sgd(1, 2, momentum=0.9), 2)
    seen = Seen()
    with pytest.warns(UserWarning, match="1 on each replica") as caught:
        history = fit(model, data, epochs=2, callbacks=[seen], validation_data=dataset(data))
    assert sum("steps of PostLocalSGD" in str(w.message) for w in caught) == 1
    twice = [np.concatenate([a, a]) for a in data]
    expected, own = reference(twice, 2, 1, 2, momentum=0.9)
    assert_all_close(seen.at_epoch_end, [expected[3], expected[7]])
    assert_close(model.get_weights(), mean_of(own[7]))
    kernel, bias = expected[3]
    loss = np.mean((data[0] @ kernel + bias - data[1]) ** 2)
    assert history.history["val_loss"][0] == pytest.approx(loss, rel=1e-4)


def test_the_callback_is_of_this_optimizer():
    model = model_of(lambda: tf_lbopt.SNGM(0.1), 1)
    with pytest.raises(ValueError, match=r"PostLocalSGD\. Received: SNGM"):
        fit(model, batches(2, ROWS), callbacks=[tf_lbopt.callbacks.EndPeriod()])


# -- saving and resuming ---------------------------------------------------------------------------


def loops(make, data, stop, replicas=2, others=None):
    one = Loop(make, replicas)
    one.run(data, 0, stop)
    return one, Loop(make, others or replicas)


def _by_checkpoint(one, other, tmp_path):
    path = tf.train.Checkpoint(variables=one.variables, optimizer=one.optimizer).save(
        str(tmp_path / "checkpoint")
    )
    tf.train.Checkpoint(variables=other.variables, optimizer=other.optimizer).restore(path)


def _by_store(one, other, tmp_path):
    store = {}
    one.optimizer.save_own_variables(store)
    other.optimizer.load_own_variables(store)
    for a, b in zip(one.variables, other.variables, strict=True):
        b.assign(a.numpy())


@pytest.mark.parametrize(
    ("make", "save", "stop"),
    [
        (sgd, _by_checkpoint, 1),
        (sgd, _by_checkpoint, 4),  # in mid-period
        (sgd, _by_checkpoint, 6),  # averaged
        (sgd, _by_store, 4),
        (extrap_sgd, _by_checkpoint, 1),
        (extrap_sgd, _by_checkpoint, 4),
    ],
)
@pytest.mark.quick(make="extrap_sgd", stop=4)
@pytest.mark.quick(save="_by_store")
def test_resumes_in_lockstep(save, make, stop, tmp_path):
    data = batches(9, ROWS * 2)
    one, other = loops(make(2, 4, momentum=0.9), data, stop)
    save(one, other, tmp_path)
    before = one.weights()
    assert_close(other.weights(), before, rtol=0, atol=0)
    histories = [loop.run(data, stop) for loop in (one, other)]
    for a, b in zip(*histories, strict=True):
        assert_close(a, b, rtol=0, atol=0)
    extrap = {**EXTRAP, "momentum": 0.9} if make is extrap_sgd else None
    expected, _ = reference(data, 2, 2, 4, momentum=0.9, extrap=extrap)
    assert_all_close(histories[1], expected[stop:])
    for a, b in zip(one.optimizer.variables, other.optimizer.variables, strict=True):
        for copies in zip(
            *(one.strategy.experimental_local_results(v.value) for v in (a, b)), strict=True
        ):
            np.testing.assert_array_equal(*(copy.numpy() for copy in copies))


def test_a_checkpoint_is_restored_into_an_optimizer_that_went_on(tmp_path):
    data = batches(9, ROWS * 2)
    loop = Loop(sgd(2, 4, momentum=0.9), 2)
    loop.run(data, 0, 4)
    checkpoint = tf.train.Checkpoint(variables=loop.variables, optimizer=loop.optimizer)
    path = checkpoint.save(str(tmp_path / "checkpoint"))
    first = loop.run(data, 4)
    checkpoint.restore(path)
    # Saved again before any step, restored again.
    path = checkpoint.save(str(tmp_path / "checkpoint"))
    checkpoint.restore(path)
    for a, b in zip(first, loop.run(data, 4), strict=True):
        assert_close(a, b, rtol=0, atol=0)


def test_a_checkpoint_of_the_first_phase_is_restored_in_the_second(tmp_path):
    data = batches(9, ROWS * 2)
    loop = Loop(sgd(2, 4, momentum=0.9), 2)
    loop.run(data, 0, 1)
    checkpoint = tf.train.Checkpoint(variables=loop.variables, optimizer=loop.optimizer)
    path = checkpoint.save(str(tmp_path / "checkpoint"))
    first = loop.run(data, 1)
    checkpoint.restore(path)
    for a, b in zip(first, loop.run(data, 1), strict=True):
        assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("replicas", [1, 4])
@pytest.mark.quick(replicas=4)
def test_another_number_of_replicas_begins_at_the_average(replicas, tmp_path, caplog):
    data = batches(6, ROWS * 4)
    two, other = loops(sgd(1, 4, momentum=0.9), data, 4, 2, replicas)
    _by_checkpoint(two, other, tmp_path)
    seen = other.run(data, 4)
    assert "2 replicas, 3 updates after the last average" in caplog.text
    assert f"here there are {replicas} replicas" in caplog.text
    # The same from scratch: the last average, the mean of the momenta, three updates lost.
    other = Loop(lambda: sgd(1, 4, momentum=0.9)(), replicas, weights=two.weights())
    momenta = two.optimizer.inner_optimizer.momentums
    for mine, theirs in zip(other.optimizer.inner_optimizer.momentums, momenta, strict=True):
        copies = two.strategy.experimental_local_results(theirs.value)
        assert np.abs(copies[0].numpy() - copies[1].numpy()).max() > 1e-3
        mine.assign(np.mean([copy.numpy() for copy in copies], axis=0))
    other.optimizer.iterations.assign(4)
    assert_all_close(seen, other.run(data, 4))


@pytest.mark.parametrize("make", [sgd, extrap_sgd])
@pytest.mark.quick(make="extrap_sgd")
def test_model_file_goes_on_as_the_model(make, tmp_path):
    model, data = in_mid_period(make)
    model.save(tmp_path / "model.keras")
    with strategy_of(2).scope():
        loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    for m in (model, loaded):
        go_on(m, data, 4, 10)
        m.optimizer.end_period()
    assert_close(model.get_weights(), loaded.get_weights(), rtol=0, atol=0)
    extrap = {**EXTRAP, "momentum": 0.9} if make is extrap_sgd else None
    _, own = reference(data, 2, 1, 4, momentum=0.9, extrap=extrap)
    assert_close(model.get_weights(), mean_of(own[-1]))


def test_backup_and_restore_in_mid_epoch(tmp_path):
    data = batches(8, ROWS * 2)

    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 4:
                raise KeyboardInterrupt

    make = sgd(1, 4, momentum=0.9)
    backup = {"backup_dir": tmp_path / "backup", "save_freq": 3, "delete_checkpoint": False}
    model = model_of(make, 2)
    with pytest.raises(KeyboardInterrupt):
        fit(model, data, callbacks=[keras.callbacks.BackupAndRestore(**backup), Stop()])
    again = model_of(make, 2)
    callback = keras.callbacks.BackupAndRestore(**backup)
    callback.set_model(again)
    callback.on_train_begin()
    assert int(again.optimizer.iterations.numpy()) == 3
    go_on(again, data, 3, 8)
    expected, _ = reference(data, 2, 1, 4, momentum=0.9)
    assert_close(again.get_weights(), expected[-1])


def test_configuration_round_trip():
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)
    for inner in (
        keras.optimizers.SGD(schedule, momentum=0.9, nesterov=True, weight_decay=0.1),
        tf_lbopt.ExtrapSGD(schedule, noise="uniform", noise_seed=3, trust_coefficient=0.01),
    ):
        optimizer = tf_lbopt.PostLocalSGD(inner, 5, 2, average_momentum=True, name="mine")
        again = keras.saving.deserialize_keras_object(
            keras.saving.serialize_keras_object(optimizer)
        )
        assert type(again) is tf_lbopt.PostLocalSGD
        assert again.get_config() == optimizer.get_config()
        assert type(again.inner_optimizer) is type(inner)
        assert again.get_config()["name"] == "mine"


# -- weights that are loaded -----------------------------------------------------------------------


def by_set_weights(model, weights, path):
    model.set_weights(weights)


def by_assign(model, weights, path):
    for variable, value in zip(model.variables, weights, strict=True):
        variable.assign(value)


def by_layer(model, weights, path):
    model.get_layer("linear").set_weights(weights)


def by_file(model, weights, path):
    with strategy_of(2).scope():
        other = keras.Sequential([keras.Input([5]), keras.layers.Dense(3, name="linear")])
        other = keras.Model(other.inputs, other.outputs)
    other.set_weights(weights)
    other.save_weights(path / "other.weights.h5")
    model.load_weights(path / "other.weights.h5")


@pytest.mark.parametrize(
    ("make", "load"),
    [
        (sgd, by_set_weights),
        (sgd, by_assign),
        (sgd, by_layer),
        (sgd, by_file),
        (extrap_sgd, by_assign),
    ],
)
@pytest.mark.quick(load="by_file")
def test_training_goes_on_from_loaded_weights(load, make, tmp_path):
    model, data = in_mid_period(make)
    kernel, _ = initial()
    # One variable is as it was at the last average: its local updates are gone all the same.
    weights = [kernel + 1, model.get_weights()[1]]
    load(model, weights, tmp_path)
    rate = model.optimizer.learning_rate
    rate.assign(0.0)
    momenta = [v for v in model.optimizer.variables if "momentum" in v.path]
    for variable in momenta:
        variable.assign(np.zeros(variable.shape))
    go_on(model, data, 4, 8)
    assert_close(model.get_weights(), weights)
    rate.assign(0.05)
    go_on(model, data, 8, 9)
    model.optimizer.end_period()
    assert np.abs(model.get_weights()[0] - weights[0]).max() > 1e-3


def test_weights_that_are_set_are_what_a_period_ends_with():
    model, _ = in_mid_period()
    kernel, bias = model.get_weights()
    weights = [np.full_like(kernel, 3e38), bias]  # of which a sum overflows
    model.set_weights(weights)
    model.optimizer.end_period()
    assert_close(model.get_weights(), weights, rtol=0, atol=0)


@pytest.mark.parametrize(("period", "warned"), [(4, 1), (1, 0)])
@pytest.mark.quick(period=4)
def test_a_callback_that_changes_weights_in_mid_period_is_told(period, warned):
    model = model_of(sgd(0, period), 2)

    def change(batch, logs=None):
        kernel = model.trainable_variables[0]
        kernel.assign(kernel * 0.999)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callback = keras.callbacks.LambdaCallback(on_train_batch_end=change)
        fit(model, batches(8, 4), callbacks=[callback])
    found = [str(w.message) for w in caught if "between two local steps" in str(w.message)]
    assert len(found) == warned


# -- errors in mid-step ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "replica", "run_eagerly"),
    [(sgd, 0, False), (sgd, 1, False), (extrap_sgd, 1, False), (sgd, 1, True)],
)
@pytest.mark.quick(make="extrap_sgd")
@pytest.mark.quick(run_eagerly=True)
def test_an_error_in_a_local_step_leaves_all_as_it_was(make, replica, run_eagerly):
    data = batches(8, ROWS * 2)
    loop = Loop(make(1, 4, momentum=0.9), 2, run_eagerly=run_eagerly, fails=True)
    loop.run(data, 0, 3)
    seen = loop.weights()
    bad = [a[3:4].copy() for a in data]
    bad[0][0, ROWS * replica] = BAD
    with pytest.raises(tf.errors.InvalidArgumentError):
        loop.run(bad)
    if not run_eagerly:
        with pytest.raises(ValueError, match="recover"):
            _ = loop.optimizer.is_local
    loop.optimizer.recover()
    loop.assert_replicas_equal()
    assert_close(loop.weights(), seen, rtol=0, atol=0)
    extrap = {**EXTRAP, "momentum": 0.9} if make is extrap_sgd else None
    expected, _ = reference(data, 2, 1, 4, momentum=0.9, extrap=extrap)
    assert_all_close(loop.run(data, 3), expected[3:])


def test_recovery_leaves_one_count_where_some_replicas_have_ended_their_step():
    data = batches(6, ROWS * 2)
    loop = Loop(sgd(1, 3), 2)
    loop.run(data, 0, 3)
    seen, optimizer = loop.weights(), loop.optimizer
    since = next(v for v in optimizer.variables if "since_average" in v.path)
    for counter in (optimizer.iterations, since):
        loop.strategy.experimental_local_results(counter.value)[0].assign_add(1)
    optimizer.recover()
    equal_on_all_replicas(loop.strategy, [optimizer.iterations, since])
    assert int(optimizer.iterations.numpy()) == 3
    assert_close(loop.weights(), seen, rtol=0, atol=0)
    assert_all_close(loop.run(data, 3), reference(data, 2, 1, 3)[0][3:])


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.quick(error=KeyboardInterrupt)
def test_fit_puts_the_average_back(error):
    """In mid-step of the local phase; with the local updates made before."""
    data = batches(8, ROWS * 2)
    steps = []

    class Interrupted(keras.Model):
        def compute_loss(self, *args, **kwargs):
            context = tf.distribute.get_replica_context()
            if context is not None and int(context.replica_id_in_sync_group) == 1:
                steps.append(1)
                if len(steps) == 4:
                    raise error
            return super().compute_loss(*args, **kwargs)

    model = model_of(sgd(1, 4, momentum=0.9), 2, Interrupted, run_eagerly=True)
    with pytest.raises(error):
        fit(model, data)
    expected, _ = reference(data, 2, 1, 4, momentum=0.9)
    assert int(model.optimizer.iterations.numpy()) == 3
    assert_close(model.get_weights(), expected[2])
    equal_on_all_replicas(strategy_of(2), model.trainable_variables)
    go_on(model, data, 3, 8)
    assert_close(model.get_weights(), expected[-1])


# -- gradients that are not finite -----------------------------------------------------------------


# The last one's gradient is finite, but not the square that a stock optimizer might keep.
@pytest.mark.parametrize(("make", "bad_value"), [(sgd, np.nan), (extrap_sgd, np.inf), (sgd, 1e25)])
@pytest.mark.quick(make="extrap_sgd")
def test_a_replica_leaves_out_a_step_without_finite_gradient(make, bad_value):
    data = batches(8, ROWS * 2)
    bad = [a.copy() for a in data]
    missing = [(3, 1), (4, 0), (4, 1)]
    for update, replica in missing:
        bad[1][update, ROWS * replica] = bad_value
    loop = Loop(make(2, 3, momentum=0.9), 2)
    seen = loop.run(bad, 0, 4)
    assert int(loop.optimizer.skipped_updates.numpy()) == 0
    seen += loop.run(bad, 4)
    extrap = {**EXTRAP, "momentum": 0.9} if make is extrap_sgd else None
    expected, _ = reference(data, 2, 2, 3, momentum=0.9, extrap=extrap, missing=missing)
    assert_all_close(seen, expected)
    assert int(loop.optimizer.skipped_updates.numpy()) == 3
    assert int(loop.optimizer.iterations.numpy()) == 8


@pytest.mark.parametrize("make", [sgd, extrap_sgd])
def test_the_first_phase_discards_the_whole_update(make):
    data = batches(5, ROWS * 2)
    bad = [a.copy() for a in data]
    bad[1][1, -1] = np.nan
    loop = Loop(make(10, 3, momentum=0.9), 2)
    loop.run(bad)
    good = [np.delete(a, 1, axis=0) for a in data]
    extrap = {**EXTRAP, "momentum": 0.9} if make is extrap_sgd else None
    expected, _ = reference(good, 2, 4, 3, momentum=0.9, extrap=extrap)
    assert_close(loop.weights(), expected[-1])
    assert int(loop.optimizer.skipped_updates.numpy()) == 1
    assert int(loop.optimizer.iterations.numpy()) == 4


# Squares of gradients that overflow: two steps are left out. One step that overflows: the replica
# goes back when weights are averaged.
@pytest.mark.parametrize(
    ("learning_rate", "value", "steps", "skipped"), [(5.0, 3e38, (1, 2), 2), (1e25, 1e18, (0,), 1)]
)
def test_what_overflows_on_a_replica_does_not_reach_the_average(
    learning_rate, value, steps, skipped
):
    x, y = (a.copy() for a in batches(max(steps) + 1, ROWS * 2))
    for step in steps:
        y[step, -1] = value
    loop = Loop(sgd(0, len(x), learning_rate=learning_rate, momentum=0.9), 2)
    loop.run((x, y))
    momenta = loop.optimizer.inner_optimizer.momentums
    for variable in (*loop.variables, *momenta):
        for copy in loop.strategy.experimental_local_results(variable.value):
            assert np.isfinite(copy.numpy()).all()
    assert int(loop.optimizer.skipped_updates.numpy()) == skipped


# -- iterations and use ----------------------------------------------------------------------------


def test_iterations_set_back_unite_the_replicas():
    data = batches(10, ROWS * 2)
    loop = Loop(sgd(3, 4, momentum=0.9), 2)
    loop.run(data, 0, 5)
    loop.optimizer.iterations.assign(0)
    assert not loop.optimizer.is_local
    momenta = loop.optimizer.inner_optimizer.momentums
    equal_on_all_replicas(loop.strategy, [*loop.variables, *momenta])
    loop.run(data, 5, 8)
    equal_on_all_replicas(loop.strategy, [*loop.variables, *momenta])
    assert loop.optimizer.is_local


def test_counters_are_shared_with_the_inner_optimizer():
    loop = Loop(extrap_sgd(1, 2), 2)
    loop.run(batches(4, ROWS * 2))
    inner = loop.optimizer.inner_optimizer
    assert inner.iterations is loop.optimizer.iterations
    assert int(inner.iterations.numpy()) == 4
    variables = loop.optimizer.variables
    assert len({id(v) for v in variables}) == len(variables)
    loop.optimizer.learning_rate = 0.5
    assert float(inner.learning_rate.numpy()) == 0.5


def test_no_retracing():
    data = batches(8, ROWS * 2)
    loop = Loop(sgd(2, 2), 2)
    loop.run(data)
    assert loop.step.experimental_get_tracing_count() == 2
    assert loop.optimizer._averaging.func.experimental_get_tracing_count() == 1


def test_a_forgotten_end_of_update_is_noticed():
    data = batches(3, ROWS * 2)
    loop = Loop(sgd(0, 2), 2)
    loop.optimizer.end_update = lambda: None
    with pytest.raises(ValueError, match=r"optimizer\.end_update"):
        loop.run(data)


def test_gradients_from_outside_are_refused():
    variable = keras.Variable(np.ones(2), dtype="float32")
    optimizer = sgd(1, 2)()
    with (
        pytest.raises(ValueError, match="`variables` must be given"),
        optimizer.step(local=False),
    ):
        pass
    optimizer.build([variable])
    with pytest.raises(ValueError, match=r"with optimizer\.step"):
        optimizer.apply([tf.ones(2)], [variable])
    with optimizer.step(local=False):
        optimizer.apply([tf.ones(2)], [variable])
        with pytest.raises(ValueError, match="once"):
            optimizer.apply([tf.ones(2)], [variable])
        with pytest.raises(ValueError, match="nested"), optimizer.step(local=False):
            pass
    with pytest.raises(TypeError, match="`local`"), optimizer.step(local=tf.constant(True)):
        pass
    np.testing.assert_allclose(variable.numpy(), [0.95, 0.95])

    @tf.function
    def inside():
        optimizer.end_period()

    with pytest.raises(ValueError, match=r"outside of `tf\.function`"):
        inside()


def test_a_block_without_an_update_changes_nothing():
    loop = Loop(sgd(0, 2), 2)
    data = batches(2, ROWS * 2)
    loop.run(data, 0, 1)
    before = loop.weights()

    @tf.function
    def look():
        def replica():
            with loop.optimizer.step(loop.variables, local=True):
                return tf.identity(loop.variables[0].value)

        return loop.strategy.run(replica)

    one, two = (copy.numpy() for copy in loop.strategy.experimental_local_results(look()))
    own = loop.strategy.experimental_local_results(loop.optimizer._local.weights[0])
    own = [copy.numpy() for copy in own]
    assert_close([one, two], own, rtol=0, atol=0)
    assert np.abs(one - two).max() > 1e-3
    assert_close(loop.weights(), before, rtol=0, atol=0)
    loop.assert_replicas_equal()


def test_blocks_belong_into_the_replica_function():
    loop = Loop(sgd(0, 2), 2)
    with (
        loop.strategy.scope(),
        pytest.raises(ValueError, match=r"strategy\.run"),
        loop.optimizer.step(local=True),
    ):
        pass


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"start": -1}, ValueError, "`start` must be an integer >= 0"),
        ({"period": 0}, ValueError, "`period` must be an integer >= 1"),
        ({"period": 2.0}, TypeError, "`period` must be an integer >= 1"),
        ({"average_momentum": 1}, TypeError, "`average_momentum` must be True or False"),
        (
            {"inner_optimizer": "sgd"},
            TypeError,
            "`inner_optimizer` must be an optimizer of tf_lbopt",
        ),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match="Received") as caught:
        tf_lbopt.PostLocalSGD(
            **{"inner_optimizer": keras.optimizers.SGD(0.1), "start": 1, "period": 2, **arguments}
        )
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (lambda: tf_lbopt.VRSGD(0.1), "statistics over sub-batches, and those around others"),
        (lambda: tf_lbopt.CLARS(0.1), "not supported in local steps. Received: CLARS"),
        (
            lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)),
            "not supported in local steps. Received: LossScaleOptimizer",
        ),
        (lambda: sgd(1, 2)(), "not supported in local steps. Received: PostLocalSGD"),
        (lambda: keras.optimizers.SGD(0.1, clipnorm=1.0), "`clipnorm` is not supported"),
        (lambda: keras.optimizers.SGD(0.1, clipvalue=1.0), "`clipvalue` is not supported"),
        (lambda: tf_lbopt.ExtrapSGD(0.1, global_clipnorm=1.0), "`global_clipnorm` is not"),
        (lambda: keras.optimizers.SGD(0.1, use_ema=True), "`use_ema` is not supported"),
        (lambda: keras.optimizers.SGD(0.1, loss_scale_factor=2.0), "`loss_scale_factor` is not"),
        (
            lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=2),
            "`gradient_accumulation_steps` is not supported",
        ),
        (lambda: tf_lbopt.ExtrapSGD(0.1, sub_batches=2), "`sub_batches` > 1 is not supported"),
    ],
)
def test_inner_optimizers_that_are_refused(inner, message):
    with pytest.raises(ValueError, match="Received") as caught:
        tf_lbopt.PostLocalSGD(inner(), 1, 2)
    assert message in str(caught.value)


def test_what_else_is_refused():
    built = keras.optimizers.SGD(0.1)
    built.build([keras.Variable(np.ones(2))])
    with pytest.raises(ValueError, match="must not be built"):
        tf_lbopt.PostLocalSGD(built, 1, 2)
    outside = keras.optimizers.SGD(0.1)
    with strategy_of(2).scope(), pytest.raises(ValueError, match="same strategy"):
        tf_lbopt.PostLocalSGD(outside, 1, 2)
    for wrapper in (keras.optimizers.LossScaleOptimizer, tf_lbopt.LossScaleOptimizer):
        with pytest.raises(ValueError, match="mixed_bfloat16"):
            wrapper(sgd(1, 2)())
    with pytest.raises(ValueError, match="PostLocalSGD"):
        tf_lbopt.VarianceReduced(sgd(1, 2)())
    with pytest.raises(ValueError, match="steps_per_execution=2"):
        fit(model_of(sgd(1, 2), 1, steps_per_execution=2), batches(2, 4))


@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.quick(start=0)
def test_a_saved_model(start, tmp_path):
    with strategy_of(2).scope():
        model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
        model.compile(tf_lbopt.PostLocalSGD(keras.optimizers.SGD(0.1), start, 2), loss="mse")
    model.fit(np.ones([4, 2]), np.ones([4, 1]), batch_size=4, verbose=0)
    tf.saved_model.save(model, str(tmp_path))
    stored = tf.train.load_checkpoint(str(tmp_path / "variables" / "variables"))
    kernels = [
        stored.get_tensor(name)
        for name, shape in stored.get_variable_to_shape_map().items()
        if shape == [2, 1]
    ]
    model.optimizer.end_period()
    assert any(np.allclose(kernel, model.layers[0].kernel) for kernel in kernels)
