"""The code of README.md and of docs/loops.md, run as it stands there."""

import pathlib
import re
import textwrap
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import strategy_of

import tf_lbopt

ROOT = pathlib.Path(__file__).parents[1]
README, LOOPS_PAGE = ROOT / "README.md", ROOT / "docs" / "loops.md"
BLOCKS = [
    block
    for page in (README, LOOPS_PAGE)
    for block in re.findall(
        r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S
    )
]
X = np.random.default_rng(0).normal(size=(64, 5)).astype("float32")
Y = np.arange(64) % 3


def block(part):
    """The one block that has this part."""
    (found,) = [code for code in BLOCKS if part in code]
    return found


LOOP = block("loss_fn = keras.losses")


def with_step(fragment):
    """The loop for many replicas with another `replica_step`."""
    head, rest = LOOP.split("    def replica_step", 1)
    _, tail = rest.split("\n    return strategy.reduce", 1)
    return f"{head}{fragment}\n    return strategy.reduce{tail}"


LOOPS = {
    "loss object": LOOP,
    "function": with_step(block("losses = keras.losses")),
    "extrapolated": with_step(block("optimizer.extrapolated")),
    "loss scaling": with_step(block("optimizer.scale_loss")),
    "regularization": LOOP.replace(
        "training=True))",
        "training=True)) + sum(model.losses) / strategy.num_replicas_in_sync",
    ),
}


def make_model(regularizer=None):
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.Input([5]),
            keras.layers.Dense(4, activation="tanh", kernel_regularizer=regularizer),
            keras.layers.Dense(3, activation="softmax"),
        ]
    )


def momentum():
    return tf_lbopt.VRMomentum(0.5, gamma=1.0)  # momentum SGD, under which sizes matter


def lars():
    return tf_lbopt.LARS(0.5, trust_coefficient=0.1, weight_decay=0.01)


def clars():
    return tf_lbopt.CLARS(0.5, trust_coefficient=0.1, weight_decay=0.01)


def batches():
    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(32)


def run(code, path, **namespace):
    """What the code defines; AutoGraph reads what it traces from a file."""
    path.write_text(code)
    namespace |= {"keras": keras, "tf": tf, "tf_lbopt": tf_lbopt}
    exec(compile(code, str(path), "exec"), namespace)
    return namespace


@pytest.mark.filterwarnings("ignore:.*sub-batches")
@pytest.mark.parametrize(
    ("loop", "make_optimizer"),
    [
        ("loss object", momentum),
        pytest.param("loss object", lars, marks=pytest.mark.long),
        pytest.param("function", momentum, marks=pytest.mark.long),
        pytest.param("function", clars, marks=pytest.mark.long),
        pytest.param("regularization", momentum, marks=pytest.mark.long),
        ("extrapolated", lambda: tf_lbopt.ExtrapSGD(0.5, momentum=0.9)),
        ("loss scaling", lambda: tf_lbopt.LossScaleOptimizer(clars())),
    ],
)
def test_loops_on_replicas_do_what_fit_does(tmp_path, loop, make_optimizer):
    strategy = strategy_of(2)
    regularizer = keras.regularizers.L2(0.1) if loop == "regularization" else None
    own = run(
        LOOPS[loop],
        tmp_path / "loop.py",
        strategy=strategy,
        make_model=lambda: make_model(regularizer),
        make_optimizer=make_optimizer,
    )
    with strategy.scope():
        fitted = make_model(regularizer)
        fitted.compile(make_optimizer(), "sparse_categorical_crossentropy")
    start = fitted.get_weights()
    # One update, then two more, each on other data on every replica.
    for epochs, data in ((1, batches().take(1)), (2, batches().skip(1))):
        history = fitted.fit(data, epochs=epochs, verbose=0).history["loss"]
        inputs = strategy.experimental_distribute_dataset(data.repeat(epochs))
        losses = [float(own["train_step"](each)) for each in inputs]
        np.testing.assert_allclose(losses, history, rtol=1e-4)
        for a, b, before in zip(
            own["model"].get_weights(), fitted.get_weights(), start, strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
            assert np.abs(a - before).max() > 1e-3


@pytest.mark.long
def test_the_loop_of_post_local_sgd_does_what_fit_does(tmp_path):
    text = textwrap.dedent(tf_lbopt.PostLocalSGD.step.__doc__.split("\n", 1)[1])
    code = re.search(r"^ +@tf.function\n.*?optimizer.end_period\(\)", text, re.M | re.S)
    strategy = strategy_of(4)
    with strategy.scope():
        models = [make_model(), make_model()]
        for model in models:
            inner = keras.optimizers.SGD(0.5, momentum=0.9)
            model.compile(
                tf_lbopt.PostLocalSGD(inner, start=1, period=2), "sparse_categorical_crossentropy"
            )
    model, fitted = models
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(16)
    fitted.fit(data, verbose=0)
    model.optimizer.build(model.trainable_variables)
    run(
        textwrap.dedent(code.group()),
        tmp_path / "loop.py",
        strategy=strategy,
        model=model,
        optimizer=model.optimizer,
        loss_fn=keras.losses.SparseCategoricalCrossentropy(),
        data=strategy.experimental_distribute_dataset(data),
    )
    assert int(model.optimizer.iterations.numpy()) == 4
    for own, expected in zip(model.get_weights(), fitted.get_weights(), strict=True):
        np.testing.assert_allclose(own, expected, rtol=1e-4, atol=1e-6)


def test_the_programs_run(tmp_path, monkeypatch):
    strategy = strategy_of(2)
    monkeypatch.setattr(tf.distribute, "MirroredStrategy", lambda: strategy)
    path = tmp_path / "program.py"
    data = {"x_train": np.concatenate([X] * 16), "y_train": np.concatenate([Y] * 16)}
    model = make_model()
    # 1,024 examples are 4 updates an epoch before, and one of four micro-batches after.
    for part, updates in (("keras.optimizers.SGD(schedule", 80), ("import tf_lbopt\n\ndecay", 5)):
        made = run(block(part), path, model=model, **data)
        assert int(made["optimizer"].iterations.numpy()) == updates
    made = run(
        block("strategy.scope():\n    model = make_model()\n"), path, make_model=make_model, **data
    )
    assert int(made["optimizer"].iterations.numpy()) == 5
    loss_fn = keras.losses.SparseCategoricalCrossentropy()
    made = run(block("tf_lbopt.LAMB("), tmp_path / "lamb.py", model=model, loss_fn=loss_fn)
    losses = [float(made["train_step"](X, Y)) for _ in range(6)]
    assert losses[-1] < losses[0]
    assert not made["optimizer"].decays(model.layers[0].bias)


def test_what_accumulation_does_with_parts():
    """Leftover micro-batches go into the next epoch; unequal ones weigh alike."""
    layer = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")
    model = keras.Sequential([keras.Input([1]), layer])
    # γ = 1: plain SGD. The gradient of (w − y)²/2 at w = 0 is −y.
    optimizer = tf_lbopt.VRSGD(1.0, gamma=1.0, gradient_accumulation_steps=2)
    model.compile(optimizer, keras.losses.Huber(delta=1e3))
    x, y = np.ones([5, 1], "float32"), np.array([[1.0], [1.0], [2.0], [2.0], [6.0]], "float32")
    model.fit(x, y, batch_size=2, epochs=1, shuffle=False, verbose=0)
    np.testing.assert_allclose(layer.kernel.numpy(), [[1.5]], rtol=1e-6)  # ((1) + (2)) / 2
    assert int(optimizer.iterations.numpy()) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.fit(x[:2], y[:2], batch_size=2, epochs=1, shuffle=False, verbose=0)
    # The micro-batch of one example, left over at 6 − 1.5, and one of two at 1 − 1.5.
    np.testing.assert_allclose(layer.kernel.numpy(), [[1.5 + (4.5 - 0.5) / 2]], rtol=1e-6)
    with pytest.warns(UserWarning, match="an update was due.* 1 of accumulation_steps=2 are"):
        model.fit(x[:2], y[:2], batch_size=2, epochs=1, verbose=0)
    np.testing.assert_allclose(layer.kernel.numpy(), [[3.5]], rtol=1e-6)


def test_relative_links_lead_to_files():
    for path in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README.read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), path


def test_the_first_screen_counts_updates_right():
    """Images, batch, epochs and the lengths of the schedules belong together."""
    text = README.read_text(encoding="utf-8")
    images, epochs = 49_152, 20
    assert f"{images:,} images for {epochs} epochs" in text
    assert f"PolynomialDecay(0.035, {images // 256 * epochs}," in text
    updates = images // (4 * 1024) * epochs
    decay, warmup = map(int, re.search(r"\(16\.0, (\d+),.*?steps=(\d+)", text, re.S).groups())
    assert decay + warmup == 10 * warmup == updates
    assert f"{images // 256 * epochs:,} updates become {updates}, and {warmup} of them" in text


def test_blocks_are_python():
    for code in BLOCKS:
        compile(textwrap.dedent(code), "README", "exec")
