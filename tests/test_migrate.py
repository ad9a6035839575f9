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


def theirs_by_formula(name):
    """What can not be matched, with what the page says would be needed; float64."""
    w = {k: np.array(v, np.float64) for k, v in DATA["weights"].items()}
    slots = {k: (np.zeros_like(v), np.zeros_like(v)) for k, v in w.items()}
    norm = np.linalg.norm
    for t, gradients in enumerate(DATA["gradients"][:UPDATES]):
        g = {k: np.array(v) for k, v in gradients.items()}
        if name == "timm_lambc":
            total = np.sqrt(sum(np.sum(x**2) for x in g.values()))
            g = {k: x / max(total, 1.0) for k, x in g.items()}
        for k in w:
            m, v = slots[k]
            if name in ("torch_sgd_schedule", "timm_lars_schedule"):
                d = g[k]
                if name == "timm_lars_schedule":
                    d = d + 0.5 * w[k]
                    if norm(w[k]):
                        d = d * 0.1 * norm(w[k]) / (norm(g[k]) + 0.5 * norm(w[k]))
                m = 0.9 * m + d
                rate = 0.5 if name == "timm_lars_schedule" else 0.1
                w[k] = w[k] - rate * 0.1 ** (t // 2) * m
            else:
                m, v = 0.9 * m + 0.1 * g[k], 0.999 * v + 0.001 * g[k] ** 2
                clipped = name == "timm_lambc"
                c1, c2 = (1 - 0.9 ** (t + 1), 1 - 0.999 ** (t + 1)) if clipped else (1.0, 1.0)
                d = m / c1 / (np.sqrt(v / c2) + 1e-6)
                if not clipped or w[k].ndim > 1:
                    d = d + 0.1 * w[k]
                ratio = norm(w[k]) / norm(d) if norm(w[k]) else 1.0
                w[k] = w[k] - 0.1 * (min(ratio, 1.0) if clipped else ratio) * d
            slots[k] = m, v
    return w


@pytest.mark.parametrize(
    "name",
    ["torch_sgd_schedule", "timm_lars_schedule", "timm_lambc", "pytorch_optimizer_lamb_coupled"],
)
def test_what_is_needed_is_what_the_page_says(name):
    assert PAIRS[name].differs
    assert max(far(theirs_by_formula(name), name).values()) <= 1


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
