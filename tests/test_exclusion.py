"""What is left out of weight decay and of layer adaptation, however it is said."""

import json
import re

import keras
import numpy as np
import pytest
from harness import taking_gradients
from helpers_arguments import (
    accepts,
    gradients_for,
    make_updates,
    minimal_arguments,
    named_variables,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import tf_lbopt
from tf_lbopt.optimizers.exclusion import Exclusion

INFOS = tf_lbopt.list_optimizers()
LAYERWISE = [info for info in INFOS if accepts(info, "exclude_from_layer_adaptation")]
over_optimizers = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
over_layerwise = pytest.mark.parametrize("info", LAYERWISE, ids=lambda info: info.name)
DECAY = 0.3


@pytest.fixture(autouse=True)
def _fresh_keras_state():
    """In place of the costly one for all tests: nothing here leaves global state behind."""


def copy_by_config(optimizer):
    return type(optimizer).from_config(optimizer.get_config())


def copy_by_json(optimizer):
    text = json.dumps(keras.saving.serialize_keras_object(optimizer))
    return keras.saving.deserialize_keras_object(json.loads(text))


COPIES = pytest.mark.parametrize(
    "copy",
    [lambda optimizer: optimizer, copy_by_config, copy_by_json],
    ids=["itself", "config", "json"],
)


def arguments_of(info, **kwargs):
    arguments = {**minimal_arguments(info), "weight_decay": DECAY, **kwargs}
    # Without this the second list follows the first.
    if accepts(info, "exclude_from_layer_adaptation"):
        arguments.setdefault("exclude_from_layer_adaptation", [])
    return arguments


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


# -- every optimizer: the same exclusion said in different ways ------------------------------------


WAYS = {
    "regex": lambda cls, kw, v: cls(**kw, exclude_from_weight_decay=["dense/b", "gam+a$"]),
    "one regex": lambda cls, kw, v: cls(**kw, exclude_from_weight_decay=("bias|gamma",)),
    "variables": lambda cls, kw, v: cls(**kw, exclude_from_weight_decay=[v[1], v[2]]),
    "tensorflow": lambda cls, kw, v: cls(**kw, exclude_from_weight_decay=[v[1].value, v[2].value]),
    "mixed": lambda cls, kw, v: cls(**kw, exclude_from_weight_decay=["bias", v[2]]),
    "keras var_list": lambda cls, kw, v: _in_keras_way(cls(**kw), var_list=[v[1], v[2]]),
    "keras var_names": lambda cls, kw, v: _in_keras_way(cls(**kw), var_names=["bias", "^gam"]),
    "keras both": lambda cls, kw, v: _in_keras_way(cls(**kw), [v[2]], ["bias"]),
    "argument and keras": lambda cls, kw, v: _in_keras_way(
        cls(**kw, exclude_from_weight_decay=["gamma"]), var_list=[v[1]]
    ),
}


def _in_keras_way(optimizer, var_list=None, var_names=None):
    optimizer.exclude_from_weight_decay(var_list=var_list, var_names=var_names)
    return optimizer


@over_optimizers
@pytest.mark.parametrize("way", WAYS)
@COPIES
def test_all_ways_act_the_same_on_the_weights(info, way, copy):
    variables, others, more = named_variables(), named_variables(), named_variables()
    optimizer = copy(WAYS[way](info.cls, arguments_of(info), variables))
    weights = make_updates(optimizer, variables)
    reference = info.cls(**arguments_of(info), exclude_from_weight_decay=["bias", "gamma"])
    assert same(weights, make_updates(reference, others))
    assert not same(weights, make_updates(info.cls(**arguments_of(info)), more))


@over_optimizers
@COPIES
def test_everything_excluded_is_no_decay(info, copy):
    variables, others = named_variables(), named_variables()
    optimizer = copy(info.cls(**arguments_of(info), exclude_from_weight_decay=[".*"]))
    reference = info.cls(**arguments_of(info, weight_decay=None))
    assert same(make_updates(optimizer, variables), make_updates(reference, others))


@over_optimizers
@COPIES
@pytest.mark.parametrize("nothing", [None, []])
def test_nothing_excluded(info, copy, nothing):
    optimizer = copy(info.cls(**arguments_of(info), exclude_from_weight_decay=nothing))
    assert optimizer.get_config()["exclude_from_weight_decay"] == nothing
    assert all(optimizer.decays(v) for v in named_variables())


@over_optimizers
def test_excluding_after_build(info):
    variables = named_variables()
    optimizer = info.cls(**arguments_of(info))
    optimizer.build(variables)
    with pytest.raises(ValueError, match="before the optimizer is built"):
        optimizer.exclude_from_weight_decay(var_names=["bias"])
    assert all(optimizer.decays(v) for v in variables)


@over_optimizers
def test_one_variable_of_two_with_the_same_path(info):
    variables = [keras.Variable([3.0, 4.0], name="kernel") for _ in range(2)]
    assert variables[0].path == variables[1].path
    kwargs = arguments_of(info)
    optimizer = info.cls(**kwargs, exclude_from_weight_decay=[variables[1]])
    assert [optimizer.decays(v) for v in variables] == [True, False]
    gradient = keras.ops.convert_to_tensor([0.5, -0.5])
    for call in range(kwargs.get("gradient_accumulation_steps", 1)):
        with taking_gradients(optimizer, variables):
            optimizer.apply([(1.0 + call) * gradient] * 2, variables)
    assert not np.array_equal(variables[0].numpy(), variables[1].numpy())


@over_optimizers
def test_a_models_own_variables_survive_a_round_trip(info):
    def model():
        return keras.Sequential(
            [
                keras.Input([3]),
                keras.Sequential([keras.layers.Dense(2, name="inner")], name="block"),
                keras.layers.Dense(1, name="outer"),
            ],
            name="model",
        )

    one, other = model(), model()
    bias = one.get_layer("block").get_layer("inner").bias
    for entry in (bias, bias.value):
        optimizer = copy_by_json(info.cls(**arguments_of(info), exclude_from_weight_decay=[entry]))
        decaying = [optimizer.decays(v) for v in other.trainable_variables]
        assert decaying == [True, False, True, True]


# -- Keras's names against paths -------------------------------------------------------------------

NAMES = ["kernel", "bias", "gamma", "beta", "xb", "ab", "embedding_table", "b"]
PATTERNS = [
    "bias", "^bias", "bias$", "^bias$", "kernel|gamma", "b", "^b", "b$", "^b$", ".*", "",
    "^gamma|^beta", "gamma|^beta", "^a|b", "dense", "block", "^(gamma|beta)$", "[ab]$",
    "(?i)BIAS", "a.b", ".b$", "[^k]b",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_keras_names_are_searched_as_keras_does(pattern):
    exclusion = Exclusion("exclude_from_weight_decay", [{"name": pattern}])
    variables = []
    for scope in ("dense", "block/gamma", "a", "bias"):
        with keras.name_scope(scope.split("/")[0]), keras.name_scope(scope.split("/")[-1]):
            variables += [keras.Variable(0.0, name=name) for name in NAMES]
    variables += [keras.Variable(0.0, name=name) for name in NAMES]
    found = {v.path for v in variables if v in exclusion}
    expected = {v.path for v in variables if re.search(pattern, v.name)}
    assert found == expected


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.text("ab.+$()[]|^\\/ é", min_size=1, max_size=8).filter(lambda name: "/" not in name),
        min_size=1,
        max_size=3,
    )
)
def test_a_variables_config_stands_for_that_path_alone(components):
    class Named:
        path = "/".join(components)

    class Longer:
        path = Named.path + "x"

    class Deeper:
        path = "x/" + Named.path

    exclusion = Exclusion("exclude_from_weight_decay", [])
    exclusion._variables.append(Named())
    again = Exclusion("exclude_from_weight_decay", json.loads(json.dumps(exclusion.config())))
    assert Named() in again
    assert Longer() not in again
    assert Deeper() not in again


# -- layer adaptation ------------------------------------------------------------------------------


@over_layerwise
@COPIES
@pytest.mark.parametrize(
    ("decay", "adaptation", "adapted"),
    [
        (None, None, [True, True, True]),
        (["bias"], None, [True, False, True]),
        (["bias"], [], [True, True, True]),
        (["bias"], ["gamma"], [True, True, False]),
        ([], ["dense"], [False, False, True]),
        (None, ["."], [False, False, False]),
    ],
)
def test_second_list(info, copy, decay, adaptation, adapted):
    optimizer = copy(
        info.cls(
            **minimal_arguments(info),
            exclude_from_weight_decay=decay,
            exclude_from_layer_adaptation=adaptation,
        )
    )
    assert [optimizer.adapts(v) for v in named_variables()] == adapted
    assert optimizer.get_config()["exclude_from_layer_adaptation"] == adaptation


@over_layerwise
@COPIES
def test_second_list_follows_keras_way_of_the_first(info, copy):
    variables = named_variables()
    optimizer = info.cls(**minimal_arguments(info))
    optimizer.exclude_from_weight_decay(var_list=[variables[0]], var_names=["gamma"])
    optimizer = copy(optimizer)
    assert [optimizer.adapts(v) for v in variables] == [False, True, False]


@over_layerwise
def test_second_list_by_variable(info):
    variables = named_variables()
    optimizer = info.cls(
        **minimal_arguments(info), exclude_from_layer_adaptation=[variables[0], variables[2].value]
    )
    assert [optimizer.adapts(v) for v in variables] == [False, True, False]
    # Other variables of the same paths are not those meant, until a configuration names the paths.
    assert [optimizer.adapts(v) for v in named_variables()] == [True, True, True]
    again = copy_by_json(optimizer)
    assert [again.adapts(v) for v in named_variables()] == [False, True, False]


# -- numbers: one update from rest -----------------------------------------------------------------


def sngm(weights, gradients, decayed, adapted):
    del adapted
    totals = [g + DECAY * w * d for w, g, d in zip(weights, gradients, decayed, strict=True)]
    norm = np.sqrt(sum(np.sum(t**2) for t in totals))
    return [w - 0.1 * t / norm for w, t in zip(weights, totals, strict=True)]


def lars(weights, gradients, decayed, adapted):
    results = []
    for w, g, d, a in zip(weights, gradients, decayed, adapted, strict=True):
        total = g + DECAY * w * d
        ratio = 0.001 * np.linalg.norm(w) / np.linalg.norm(total) if a else 1.0
        results.append(w - 0.1 * ratio * total)
    return results


def lamb(weights, gradients, decayed, adapted):
    results = []
    for w, g, d, a in zip(weights, gradients, decayed, adapted, strict=True):
        direction = g / (np.abs(g) + 1e-6) + DECAY * w * d
        ratio = np.linalg.norm(w) / np.linalg.norm(direction) if a else 1.0
        results.append(w - 0.1 * ratio * direction)
    return results


FORMULAS = {"sngm": sngm, "lars": lars, "lamb": lamb}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize(
    ("decay", "adaptation", "decayed", "adapted"),
    [
        (None, None, (1, 1, 1), (1, 1, 1)),
        (["bias"], None, (1, 0, 1), (1, 0, 1)),
        (["bias", "gamma"], [], (1, 0, 0), (1, 1, 1)),
        ([], ["kernel"], (1, 1, 1), (0, 1, 1)),
        (["kernel"], ["norm/"], (0, 1, 1), (1, 1, 0)),
        (["."], None, (0, 0, 0), (0, 0, 0)),
    ],
)
@pytest.mark.parametrize("copied", [False, True])
def test_weights_against_the_formula(name, decay, adaptation, decayed, adapted, copied):
    (info,) = tf_lbopt.list_optimizers(name)
    kwargs = {**minimal_arguments(info), "weight_decay": DECAY, "exclude_from_weight_decay": decay}
    if info in LAYERWISE:
        kwargs["exclude_from_layer_adaptation"] = adaptation
    optimizer = info.cls(**kwargs)
    if copied:
        optimizer = copy_by_json(optimizer)
    variables = named_variables()
    before = [v.numpy().astype(np.float64) for v in variables]
    gradients = gradients_for(variables)
    optimizer.apply(gradients, variables)
    expected = FORMULAS[name](
        before, [np.asarray(g, np.float64) for g in gradients], decayed, adapted
    )
    for variable, old, new in zip(variables, before, expected, strict=True):
        # The step itself, not the weights it hardly changes.
        np.testing.assert_allclose(variable.numpy() - old, new - old, rtol=1e-4, atol=3e-7)
        assert np.any(np.abs(new - old) > 1e-5)
