"""The code of docs/migrate.md: ours gives the weights that the other package's computed.

migrate_vectors.py runs the other packages' blocks and wrote migrate_vectors.json. Where the page
says that weights differ, they must, and an independent formula says how.
"""

import ast
import json
import pathlib
import re

import keras
import migrate_vectors
import numpy as np
import pytest
import tensorflow as tf
from migrate_vectors import UPDATES, VECTORS, float32, gradients_of, of_ours, package_of, pairs

import tf_lbopt

PAGE = migrate_vectors.PAGE.read_text(encoding="utf-8")
DATA = json.loads(VECTORS.read_text(encoding="utf-8"))
PAIRS = {pair.name: pair for pair in pairs()}
TOLERANCE = 5e-6


def weights_of(pair, code=None):
    return of_ours(code or pair.ours, float32(DATA["weights"]), gradients_of(pair, DATA))


def far(found, name):
    """How far each variable is from the other package's, in units of the tolerance."""
    return {
        variable: np.max(np.abs(found[variable] - value) / (TOLERANCE * (1 + np.abs(value))))
        for variable, value in float32(DATA["cases"][name]["weights"]).items()
    }


@pytest.mark.parametrize("pair", PAIRS.values(), ids=lambda pair: pair.name)
def test_ours_computes_what_theirs_does(pair):
    distances = far(weights_of(pair), pair.name)
    for variable, distance in distances.items():
        if pair.differs and (pair.differs == "all" or variable.startswith(pair.differs)):
            assert distance > 1000, (variable, distance)
        else:
            assert distance <= 1, (variable, distance)


def test_vectors_are_of_the_code_and_the_versions_on_the_page():
    assert list(DATA["cases"]) == list(PAIRS)
    versions = dict(re.findall(r"^\| ([\w-]+) \| ([\d.]+) \|$", PAGE, re.MULTILINE))
    for name, pair in PAIRS.items():
        case = DATA["cases"][name]
        assert case["code"] == pair.theirs, f"{name}: run migrate_vectors.py {package_of(pair)}"
        package, version = case["package"].split()
        assert {k.lower(): v for k, v in versions.items()}[package] == version
    assert migrate_vectors.start() == {key: DATA[key] for key in ("weights", "gradients")}


def test_every_block_is_held():
    """A misspelt comment would silently leave blocks out."""
    runs = len(re.findall("<!-- run: ", PAGE))
    assert PAGE.count("<!-- vectors: ") == len(PAIRS)
    assert PAGE.count("```python\n") == 2 * len(PAIRS) + runs
    assert f"{TOLERANCE:.0e}".replace("e-0", "e-") in PAGE


def test_links_lead_somewhere():
    titles = re.findall(r"^#+ (.*)$", PAGE, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    for path, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", PAGE):
        assert not path or (pathlib.Path(migrate_vectors.PAGE).parent / path).exists(), path
        assert path or anchor in anchors, anchor


def variants():
    """Our blocks with one argument of the optimizer left out."""
    for pair in PAIRS.values():
        tree = ast.parse(pair.ours)
        calls = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and re.match(r"tf_lbopt\.\w+$", ast.unparse(node.func))
        ]
        for call in calls:
            for keyword in list(call.keywords):
                index = call.keywords.index(keyword)
                call.keywords.remove(keyword)
                yield pytest.param(pair, ast.unparse(tree), id=f"{pair.name}-{keyword.arg}")
                call.keywords.insert(index, keyword)


# What the argument's default is too, or what rounding hides.
IDLE = {"momentum", "epsilon"}


@pytest.mark.long
@pytest.mark.parametrize(("pair", "code"), list(variants()))
def test_every_argument_counts(pair, code, request):
    if request.node.callspec.id.rpartition("-")[2] in IDLE or pair.differs:
        pytest.skip("need not be seen in these vectors")
    assert max(far(weights_of(pair, code), pair.name).values()) > 100


def ratio_of(w, length):
    """‖w‖ / length; 1 where the variable is zero."""
    return np.linalg.norm(w) / length if np.any(w) else 1.0


def by_momentum(rate, direction):
    """The rate outside the momentum; float64."""
    w, m = {k: np.array(v) for k, v in DATA["weights"].items()}, dict.fromkeys(DATA["weights"], 0.0)
    for t, gradients in enumerate(DATA["gradients"][:UPDATES]):
        for k, g in gradients.items():
            m[k] = 0.9 * m[k] + direction(np.array(g), w[k])
            w[k] = w[k] - rate(t) * m[k]
    return w


def by_lamb(clipnorm, corrected, most, decays):
    """LAMB with a bound on the trust ratio, or without bias correction; float64."""
    w = {k: np.array(v) for k, v in DATA["weights"].items()}
    m, v = dict.fromkeys(w, 0.0), dict.fromkeys(w, 0.0)
    for t, gradients in enumerate(DATA["gradients"][:UPDATES]):
        total = np.linalg.norm(np.concatenate([np.ravel(g) for g in gradients.values()]))
        c_1, c_2 = (1 - 0.9 ** (t + 1), 1 - 0.999 ** (t + 1)) if corrected else (1.0, 1.0)
        for k, g in gradients.items():
            g = np.array(g) / max(total / clipnorm, 1.0)
            m[k], v[k] = 0.9 * m[k] + 0.1 * g, 0.999 * v[k] + 0.001 * g**2
            d = m[k] / c_1 / (np.sqrt(v[k] / c_2) + 1e-6) + 0.1 * w[k] * decays(w[k])
            w[k] = w[k] - 0.1 * min(ratio_of(w[k], np.linalg.norm(d)), most) * d
    return w


def lars(eta=None):
    """The direction of LARS with the paper's denominator; ρ / η bounded by 1 with a rate η."""

    def direction(g, w):
        ratio = ratio_of(w, (np.linalg.norm(g) + 0.5 * np.linalg.norm(w)) / 0.1)
        return (ratio if eta is None else min(ratio / eta, 1.0)) * (g + 0.5 * w)

    return direction


# What can not be matched, by what the page says would be needed.
NEEDED = {
    "torch_sgd_schedule": lambda: by_momentum(lambda t: 0.1 * 0.1 ** (t // 2), lambda g, w: g),
    "timm_lars_schedule": lambda: by_momentum(lambda t: 0.5 * 0.1 ** (t // 2), lars()),
    "timm_lambc": lambda: by_lamb(1.0, True, 1.0, lambda w: w.ndim > 1),
    "timm_larc_clipped": lambda: by_momentum(lambda t: 0.04, lars(0.04)),
    "pytorch_optimizer_lamb_coupled": lambda: by_lamb(np.inf, False, np.inf, lambda w: True),
}


@pytest.mark.parametrize("name", NEEDED)
def test_what_is_needed_is_what_the_page_says(name):
    assert PAIRS[name].differs
    assert max(far(NEEDED[name](), name).values()) <= 1


def test_apply_if_finite_counts_as_theirs():
    pair = PAIRS["optax_apply_if_finite"]
    variables = migrate_vectors.keras_variables(float32(DATA["weights"]))
    optimizer = tf_lbopt.LAMB(0.1, weight_decay=0.1)
    for each in gradients_of(pair, DATA):
        optimizer.apply([tf.constant(each[name]) for name in each], variables)
    assert int(optimizer.skipped_updates) == 1
    assert int(optimizer.iterations.numpy()) == UPDATES - 1


@pytest.mark.parametrize("how", ["file", "checkpoint"])
def test_lamb_goes_on_from_where_keras_lamb_was(tmp_path, monkeypatch, how):
    """The block on checkpoints, with the state from a file, or restored from a checkpoint."""
    (code,) = re.findall(r"<!-- run: keras checkpoint -->\n\n```python\n(.*?)```", PAGE, re.DOTALL)
    random = np.random.default_rng(0)

    def made():
        model = keras.Sequential([keras.Input([4]), keras.layers.Dense(3), keras.layers.Dense(2)])
        model.compile(keras.optimizers.Lamb(0.07), "mse")
        model.optimizer.build(model.trainable_variables)
        return model

    theirs = made()
    gradients = [
        [tf.constant(random.normal(size=v.shape), "float32") for v in theirs.trainable_variables]
        for _ in range(UPDATES)
    ]
    for each in gradients[:3]:
        theirs.optimizer.apply(each, theirs.trainable_variables)
    monkeypatch.chdir(tmp_path)
    theirs.save("model.keras")
    if how == "checkpoint":

        def checkpoint(model):
            return tf.train.Checkpoint(model=model, optimizer=model.optimizer)

        path = checkpoint(theirs).save(str(tmp_path / "checkpoint"))
        restored = made()
        checkpoint(restored).restore(path).assert_consumed()
        monkeypatch.setattr(keras.models, "load_model", lambda _: restored)
    namespace = {"keras": keras, "tf_lbopt": tf_lbopt}
    exec(code, namespace)
    ours, optimizer = namespace["model"], namespace["optimizer"]
    assert isinstance(optimizer, tf_lbopt.LAMB)
    assert ours.optimizer is optimizer
    assert int(optimizer.iterations.numpy()) == 3
    np.testing.assert_allclose(float(optimizer.learning_rate.numpy()), 0.07, rtol=1e-6)
    for each in gradients[3:]:
        theirs.optimizer.apply(each, theirs.trainable_variables)
        optimizer.apply(each, ours.trainable_variables)
    for a, b in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)
