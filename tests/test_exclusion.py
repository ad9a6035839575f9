"""What is left out of weight decay and of layer adaptation, however it is said."""

import functools
import json
import re
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from harness import KINDS, taking_gradients
from helpers_arguments import (
    accepts,
    gradients_for,
    make_updates,
    minimal_arguments,
    named_variables,
)
from keras import layers

import tf_lbopt
from tf_lbopt.optimizers.exclusion import Exclusion

INFOS = tf_lbopt.list_optimizers()
LAYERWISE = [info for info in INFOS if accepts(info, "exclude_from_layer_adaptation")]
over_optimizers = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
over_layerwise = pytest.mark.parametrize("info", LAYERWISE, ids=lambda info: info.name)
DECAY = 0.3


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
@pytest.mark.quick(info="lamb")
@pytest.mark.quick(info=KINDS, way=("regex", "keras both"), copy="copy_by_json")
def test_all_ways_act_the_same_on_the_weights(info, way, copy):
    variables, others, more = named_variables(), named_variables(), named_variables()
    optimizer = copy(WAYS[way](info.cls, arguments_of(info), variables))
    weights = make_updates(optimizer, variables)
    reference = info.cls(**arguments_of(info), exclude_from_weight_decay=["bias", "gamma"])
    assert same(weights, make_updates(reference, others))
    assert not same(weights, make_updates(info.cls(**arguments_of(info)), more))


@over_optimizers
@COPIES
@pytest.mark.quick(copy="copy_by_json")
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


def _updated(optimizer, variables):
    with taking_gradients(optimizer, variables):
        optimizer.apply([0.5 * tf.ones(v.shape, v.dtype) for v in variables], variables)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("dtypes", [("float64", "float64"), ("float32", "float64")])
@pytest.mark.parametrize(
    "excluded",
    [
        {"exclude_from_weight_decay": [".*"]},
        {"exclude_from_weight_decay": ["bias"]},
        {"exclude_from_layer_adaptation": [".*"]},
    ],
    ids=["all from decay", "some from decay", "all from adaptation"],
)
@pytest.mark.parametrize("name", [info.name for info in LAYERWISE])
@pytest.mark.quick(name="lars")
@pytest.mark.quick(name=("lamb", "clars"), jit_compile=False)
def test_excluded_variables_of_another_dtype(name, excluded, dtypes, jit_compile):
    """The norms are of those that are not excluded: of none, or of a narrower dtype."""
    info = next(info for info in LAYERWISE if info.name == name)
    results = []
    for own in (("float32", "float32"), dtypes):
        variables = [
            keras.Variable(np.linspace(-1, 1, size), dtype=dtype, name=name)
            for size, dtype, name in zip((6, 3), own, ("kernel", "bias"), strict=True)
        ]
        optimizer = info.cls(**minimal_arguments(info), weight_decay=DECAY, **excluded)
        optimizer.build(variables)

        update = tf.function(
            functools.partial(_updated, optimizer, variables), jit_compile=jit_compile
        )
        for _ in range(optimizer.gradient_accumulation_steps or 1):
            update()
        assert optimizer.iterations.numpy() == 1
        results.append([v.numpy() for v in variables])
    for first, second in zip(*results, strict=True):
        np.testing.assert_allclose(first, second, rtol=2e-4, atol=1e-6)


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


# -- other names for the same variables ------------------------------------------------------------


def built(entries, paths):
    """An exclusion that was built for variables of these names, and the numbers of those in it."""
    exclusion = Exclusion("exclude_from_weight_decay", entries)
    variables = [tf.Variable(0.0, name=path) for path in paths]
    exclusion.build(variables)
    return exclusion, [number for number, v in enumerate(variables) if v in exclusion]


# Former paths, entries, paths now, which of these are excluded.
RENAMED = {
    "model's name lost": (["net/a/bias", "net/b/bias"], ["net/b"], ["a/bias", "b/bias"], [1]),
    "model's name won": (["a/bias", "b/bias"], ["^b"], ["net/a/bias", "net/b/bias"], [1]),
    "names lost in part": (
        ["net/block/a/w", "net/block/b/w", "net/c/w"],
        ["net/block/a"],
        ["a/w", "b/w", "net/c/w"],
        [0],
    ),
    "numbered anew": (
        ["net_1/dense_3/w", "net_1/dense_4/w", "net_1/dense_5/w"],
        ["dense_4/"],
        ["net/dense_4/w", "net/dense_5/w", "net/dense_6/w"],
        [1],
    ),
    "numbered anew in part": (
        ["block/dense_3/w", "dense_4/w", "dense_5/w"],
        ["block/", "dense_5"],
        ["block/dense_4/w", "dense_4/w", "dense_5/w"],
        [0, 2],
    ),
    "the model's own": (["net/bias", "net/dense/bias"], ["^net/bias"], ["bias", "dense/bias"], [0]),
    "of equal names": (["w", "w"], ["w"], ["w", "w"], [0, 1]),
    "fewer": (["net/a/w", "net/b/w", "net/c/w"], ["net/b"], ["b/w", "c/w"], [0]),
    "in another order": (["net/a_1/w", "net/a_2/w"], ["net/a_1"], ["a_2/w", "a_1/w"], [1]),
    # From here on other models: what the entries say.
    "more": (["net/b/w"], ["w", "net"], ["net/a/w", "net/b/w"], [0, 1]),
    "fewer, of two that may be meant": (["a/x/w", "b/x/w"], ["^a/", "^x"], ["x/w"], [0]),
    "another name": (["a/w", "b/w"], ["head"], ["a/w", "head/w"], [1]),
    "another kind": (["a/w", "a/bias"], ["bias"], ["a/bias", "a/w_2"], [0]),
    # One variable that is known by its path.
    "path": (None, [{"path": "a.b/w"}], ["a.b/w", "net/a.b/w", "axb/w"], [0]),
    "path, model's name lost": (None, [{"path": "net/a/w"}], ["a/w", "b/w"], [0]),
    "path, two that may be meant": (None, [{"path": "a/w"}], ["x/a/w", "y/a/w"], []),
}


@pytest.mark.filterwarnings("ignore:`exclude_from_weight_decay` has entries that fit none")
@pytest.mark.parametrize("case", RENAMED)
def test_variables_under_other_names(case):
    former, entries, paths, excluded = RENAMED[case]
    if former is not None:
        entries = json.loads(json.dumps(built(entries, former)[0].config()))
    exclusion, found = built(entries, paths)
    assert found == excluded
    # And once more: what is built knows these names, and says the same as what was not yet.
    again, found = built(exclusion.config(), paths)
    assert found == excluded
    assert again.config() == exclusion.config()


def test_entries_that_are_added_to_a_configuration():
    paths = ["net/a/w", "net/a/bias", "net/b/bias"]
    config = [*built(["^net/a/bias"], paths)[0].config(), "b/bias"]
    assert built(config, ["a/w", "a/bias", "b/bias"])[1] == [1, 2]
    assert Exclusion("exclude_from_weight_decay", config).config() == config


def sequential():
    return keras.Sequential([keras.Input([3]), layers.Dense(2), layers.Dense(2), layers.Dense(1)])


def deferred():
    return keras.Sequential([layers.Dense(2), layers.LayerNormalization(), layers.Dense(1)])


def functional():
    inputs = keras.Input([3])
    inner = keras.Sequential([keras.Input([3]), layers.Dense(2), layers.Dense(2)])
    return keras.Model(inputs, layers.Dense(1)(Block()(inner(inputs))))


def nested():
    block = keras.Sequential([layers.Dense(2), layers.Dense(2)], name="block")
    return keras.Sequential([keras.Input([3]), block, layers.Dense(1, name="head")], name="net")


@keras.saving.register_keras_serializable("test_exclusion")
class Block(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = layers.Dense(2)

    def build(self, shape):
        self.bias = self.add_weight(shape=(2,), name="bias")
        self.inner.build(shape)

    def call(self, x):
        return self.inner(x) + self.bias


@keras.saving.register_keras_serializable("test_exclusion")
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = layers.Dense(2)
        self.second = keras.Sequential([layers.Dense(2), Block()])
        self.third = layers.Dense(1)

    def call(self, x):
        return self.third(self.second(self.first(x)))


def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(4, 3)).astype("float32"), rng.normal(size=(4, 1)).astype("float32")


def model_of(make):
    model = make()
    model(data()[0])
    return model


def trained(make, wrap=lambda optimizer: optimizer):
    """A model, trained without decay of its second variable and adaptation of its last."""
    model = model_of(make)
    optimizer = tf_lbopt.LARS(
        0.1,
        weight_decay=DECAY,
        exclude_from_weight_decay=[model.trainable_variables[1]],
        exclude_from_layer_adaptation=[f"^{re.escape(model.trainable_variables[-1].path)}$"],
    )
    model.compile(wrap(optimizer), "mse", run_eagerly=True)
    return model


def flags(model):
    inner = model.optimizer
    while isinstance(inner, keras.optimizers.LossScaleOptimizer):
        inner = inner.inner_optimizer
    return [(inner.decays(v), inner.adapts(v)) for v in model.trainable_variables]


def expected_flags(model):
    number = len(model.trainable_variables)
    return [(i != 1, i != number - 1) for i in range(number)]


def by_file(model, make, path):
    model.fit(*data(), verbose=0)
    model.save(path / "model.keras")
    return keras.saving.load_model(path / "model.keras")


def from_config(model, make):
    """An untrained model with an optimizer by configuration."""
    copy = model_of(make)
    cls = type(model.optimizer)
    copy.compile(cls.from_config(model.optimizer.get_config()), "mse", run_eagerly=True)
    copy.optimizer.build(copy.trainable_variables)
    return copy


def by_clone(model, make, path):
    model.fit(*data(), verbose=0)
    copy = from_config(model, lambda: keras.models.clone_model(model))
    copy.set_weights(model.get_weights())
    for variable, value in zip(copy.optimizer.variables, model.optimizer.variables, strict=True):
        variable.assign(value)
    return copy


def by_weights(model, make, path):
    model.fit(*data(), verbose=0)
    model.save_weights(path / "model.weights.h5")
    copy = from_config(model, make)
    copy.load_weights(path / "model.weights.h5")
    return copy


def by_checkpoint(model, make, path):
    model.fit(*data(), verbose=0)
    name = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(path / "checkpoint")
    copy = from_config(model, make)
    tf.train.Checkpoint(model=copy, optimizer=copy.optimizer).restore(name)
    return copy


def by_backup(model, make, path):
    def fit(model):
        backup = keras.callbacks.BackupAndRestore(path / "backup", delete_checkpoint=False)
        model.fit(*data(), epochs=1, callbacks=[backup], verbose=0)

    fit(model)
    copy = from_config(model, make)
    fit(copy)  # restores, and has no epoch left
    return copy


SAVING = [by_file, by_clone, by_weights, by_checkpoint, by_backup]


@pytest.mark.filterwarnings("error:`exclude_from")
@pytest.mark.parametrize("way", SAVING)
@pytest.mark.parametrize("make", [sequential, deferred, functional, nested, Subclassed])
@pytest.mark.quick(way="by_file")
@pytest.mark.quick(make="Subclassed")
def test_exclusions_survive_saving(make, way, tmp_path):
    model = trained(make)
    copy = way(model, make, tmp_path)
    assert flags(model) == flags(copy) == expected_flags(model)
    for loaded in (model, copy):
        loaded.train_on_batch(*data())
    for one, other in zip(model.get_weights(), copy.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    # Through the loaded model too.
    assert flags(by_file(copy, make, tmp_path)) == expected_flags(model)


WRAPPERS = {
    "VarianceReduced": lambda inner: tf_lbopt.VarianceReduced(inner, gradient_accumulation_steps=2),
    "Accumulated": lambda inner: tf_lbopt.Accumulated(inner, 2),
    "tf_lbopt.LossScaleOptimizer": tf_lbopt.LossScaleOptimizer,
    "keras.LossScaleOptimizer": keras.optimizers.LossScaleOptimizer,
    "both": lambda inner: tf_lbopt.LossScaleOptimizer(
        tf_lbopt.VarianceReduced(inner, gradient_accumulation_steps=2)
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_exclusions_of_wrapped_optimizers_survive_saving(wrapper, tmp_path):
    model = trained(sequential, WRAPPERS[wrapper])
    copy = by_file(model, sequential, tmp_path)
    assert flags(model) == flags(copy) == expected_flags(model)


@pytest.mark.parametrize("inner", [tf_lbopt.LAMB, keras.optimizers.AdamW])
@pytest.mark.parametrize("wrap", [tf_lbopt.Accumulated, tf_lbopt.LossScaleOptimizer])
def test_what_a_wrapper_is_told_holds_for_the_inner_optimizer(inner, wrap):
    optimizer = wrap(inner(0.1, weight_decay=DECAY))
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    kernel, bias = keras.Variable([1.0], name="kernel"), keras.Variable([1.0], name="bias")
    optimizer.build([kernel, bias])
    optimizer.apply([tf.zeros([1]), tf.zeros([1])], [kernel, bias])
    assert bias.numpy() == 1.0
    assert kernel.numpy() < 1.0


@pytest.mark.parametrize("local", [False, True])
def test_exclusions_of_extrapolated_steps_survive_saving(local, tmp_path):
    model = model_of(sequential)
    optimizer = tf_lbopt.ExtrapSGD(
        0.1,
        weight_decay=DECAY,
        exclude_from_weight_decay=[model.trainable_variables[1]],
    )
    model.compile(tf_lbopt.PostLocalSGD(optimizer, 1, 1) if local else optimizer, "mse")
    model.fit(*data(), verbose=0)
    model.save(tmp_path / "model.keras")
    optimizer = keras.saving.load_model(tmp_path / "model.keras").optimizer
    for tells in (optimizer, optimizer.inner_optimizer) if local else (optimizer,):
        kept = [(tells.decays(v), tells.adapts(v)) for v in optimizer._trainable_variables]
        assert kept == [(i != 1, i != 1) for i in range(6)]


def test_a_variable_survives_saving_before_training(tmp_path):
    model = trained(sequential)
    model.save(tmp_path / "model.keras")
    with pytest.warns(UserWarning, match="exclude_from_layer_adaptation"):
        copy = keras.saving.load_model(tmp_path / "model.keras")
    assert [decays for decays, _ in flags(copy)] == [True, False, True, True, True, True]


@pytest.mark.parametrize("freezes", ["callback", "saved frozen", "saved unfrozen"])
def test_frozen_layers_shift_nothing(freezes, tmp_path):
    model = model_of(sequential)
    first, last = model.layers[0], model.layers[-1]
    excluded = [last.bias, f"^{re.escape(model.layers[1].bias.path)}$"]
    if freezes == "saved unfrozen":
        excluded = [last.bias, "dense.*bias"]
        first.trainable = False
    optimizer = tf_lbopt.LARS(0.1, weight_decay=DECAY, exclude_from_weight_decay=excluded)
    model.compile(optimizer, "mse", run_eagerly=True)
    if freezes == "callback":
        freeze = tf_lbopt.callbacks.FreezeLayers(first, epochs=1)
        model.fit(*data(), epochs=2, callbacks=[freeze], verbose=0)
    else:
        model.fit(*data(), verbose=0)
        first.trainable = freezes == "saved unfrozen"
    model.save(tmp_path / "model.keras")
    copy = keras.saving.load_model(tmp_path / "model.keras")
    decays = {v.path.split("/", 1)[1]: optimizer.decays(v) for v in model.trainable_variables}
    assert (
        list(decays.values())
        == {
            "callback": [True, True, True, False, True, False],
            "saved frozen": [True, False, True, False],
            "saved unfrozen": [True, False, True, False, True, False],
        }[freezes]
    )
    assert {v.path: copy.optimizer.decays(v) for v in copy.trainable_variables} == decays


# -- entries in vain -------------------------------------------------------------------------------


@over_optimizers
def test_entries_that_fit_nothing(info):
    variables = named_variables()
    lists = {"exclude_from_weight_decay": ["/bias$", "/beta$", keras.Variable(0.0, name="other")]}
    if accepts(info, "exclude_from_layer_adaptation"):
        lists["exclude_from_layer_adaptation"] = ["/embedding$"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = info.cls(**minimal_arguments(info), **lists)
        make_updates(optimizer, variables)
        copy_by_json(optimizer).build(variables)  # the same variables: it was said of them
    messages = [str(w.message) for w in caught if "fit none" in str(w.message)]
    assert [message.split("`")[1] for message in messages] == list(lists)
    assert "'/beta$', {'path': 'other'}" in messages[0]
    assert "/bias$" not in messages[0]


@pytest.mark.parametrize(
    "entries",
    [
        tf.constant("bias"),
        tf.constant(1.0),
        tf.Variable(["bias"]),
        keras.Variable([1.0]),
        keras.KerasTensor([2]),
        np.array("bias"),
        b"bias",
        {"path": "bias"},
        1,
    ],
    ids=lambda entries: type(entries).__name__,
)
def test_what_is_no_list(entries):
    for argument in ("exclude_from_weight_decay", "exclude_from_layer_adaptation"):
        with pytest.raises(TypeError, match=f"`{argument}` must be a list.*Received: "):
            tf_lbopt.LARS(0.1, **{argument: entries})
    for argument in ("var_list", "var_names"):
        with pytest.raises(TypeError, match=f"`{argument}` must be a list.*Received: "):
            tf_lbopt.LARS(0.1).exclude_from_weight_decay(**{argument: entries})


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
