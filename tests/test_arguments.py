"""Every wrong argument is refused with its name, what was expected and what was received."""

import copy
import fractions
import functools
import importlib
import inspect
import math
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from harness import taking_gradients
from helpers_arguments import accepts, gradients_for, minimal_arguments, named_variables

import tf_lbopt
import tf_lbopt.tf_keras
from tf_lbopt import schedules
from tf_lbopt.aggregation.accumulation import Accumulation
from tf_lbopt.optimizers.algorithm import without_missing
from tf_lbopt.optimizers.exclusion import Exclusion

INFOS = tf_lbopt.list_optimizers()
NAN = math.nan
over_optimizers = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)


def apply(optimizer, gradients, variables=None):
    with taking_gradients(optimizer, variables):
        optimizer.apply(gradients, *([] if variables is None else [variables]))


def refused(call, error, argument, expected, value):
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert argument in message
    assert expected in message
    assert "Received" in message
    assert repr(value) in message.partition("Received")[2]


def may_be(info, argument, value):
    """Whether it is None by default, and so a value like any other."""
    return value is None and inspect.signature(info.cls).parameters[argument].default is None


def cases(table):
    """``(argument, value, error, expected)`` from ``{argument: (expected, {error: values})}``."""
    return [
        pytest.param(argument, value, error, expected, id=f"{argument}={value!r}")
        for argument, (expected, wrong) in table.items()
        for error, values in wrong.items()
        for value in values
    ]


NON_NEGATIVE = "a real number >= 0"
POSITIVE = "a real number > 0"
SHARE = "a real number in [0, 1)"

COMMON = {
    "learning_rate": (
        NON_NEGATIVE,
        {ValueError: [-0.1, NAN, -math.inf], TypeError: ["0.1", True, None, [0.1], 1j]},
    ),
    "weight_decay": (
        NON_NEGATIVE + " or None",
        {ValueError: [-1e-4, NAN], TypeError: ["0.1", True, [0.1]]},
    ),
    **{
        clip: (POSITIVE + " or None", {ValueError: [0.0, -1.0, NAN], TypeError: ["1", True]})
        for clip in ("clipnorm", "clipvalue", "global_clipnorm")
    },
    "loss_scale_factor": (
        POSITIVE + " or None",
        {ValueError: [0, -8.0, NAN], TypeError: ["8", True]},
    ),
    "gradient_accumulation_steps": (
        "an integer >= 1 or None",
        {ValueError: [0, -2], TypeError: [2.5, 2.0, "2", True]},
    ),
    "jit_compile": ("True, False or 'auto'", {ValueError: ["yes", ""], TypeError: [None, 1]}),
}

OWN = {
    **{
        argument: (
            SHARE,
            {ValueError: [1.0, -0.1, 1.5, NAN], TypeError: ["0.9", True, None]},
        )
        for argument in ("momentum", "beta_1", "beta_2")
    },
    "epsilon": (NON_NEGATIVE, {ValueError: [-1e-8, NAN], TypeError: ["1e-8", True, None]}),
    "trust_coefficient": (
        POSITIVE,
        {ValueError: [0, 0.0, -0.001, NAN, math.inf], TypeError: ["0.001", True, None]},
    ),
    "nesterov": ("True or False", {TypeError: ["yes", 1, 0, None]}),
    "max_trust_ratio": (
        POSITIVE + " or None",
        {ValueError: [0.0, -0.1, NAN], TypeError: ["0.1", True]},
    ),
    "default_trust_ratio": (POSITIVE, {ValueError: [0.0, -1, NAN], TypeError: ["1", True, None]}),
    "trust_ratio_denominator": (
        "one of 'norm_of_sum', 'sum_of_norms'",
        {ValueError: ["sum", ""], TypeError: [None, 1, True]},
    ),
    "norm_estimator": (
        "one of 'sub_batch', 'per_example'",
        {ValueError: ["per-example", ""], TypeError: [None, 1]},
    ),
}

EXCLUSION_LIST = "a list of variables or of regular expressions over the variable path"


@pytest.mark.parametrize(
    "cls", [tf_lbopt.SGD, tf_lbopt.SNGM, tf_lbopt.LARS, tf_lbopt.tf_keras.SGD, tf_lbopt.ExtrapSGD]
)
def test_momentum_that_is_set_after_build(cls):
    optimizer = cls(0.1, momentum=0.0)
    of_keras = isinstance(optimizer, keras.optimizers.Optimizer)
    variable = (keras.Variable if of_keras else tf.Variable)(np.ones(2, "float32"))
    optimizer.build([variable])
    optimizer.momentum = 0.9
    message = r"`momentum` was 0 when .* Received: momentum=0\.9"
    with pytest.raises(ValueError, match=message), taking_gradients(optimizer, [variable]):
        optimizer.apply_gradients([(tf.ones(2), variable)])
    np.testing.assert_array_equal(variable.numpy(), np.ones(2))


@over_optimizers
@pytest.mark.parametrize(("argument", "value", "error", "expected"), cases(COMMON))
def test_common_arguments(info, argument, value, error, expected):
    arguments = {**minimal_arguments(info), argument: value}
    refused(lambda: info.cls(**arguments), error, argument, expected, value)


@pytest.mark.parametrize(
    ("info", "argument", "value", "error", "expected"),
    [
        pytest.param(info, *case.values, id=f"{info.name}-{case.id}")
        for info in INFOS
        for case in cases(OWN)
        if accepts(info, case.values[0]) and not may_be(info, *case.values[:2])
    ],
)
def test_own_arguments(info, argument, value, error, expected):
    arguments = {**minimal_arguments(info), argument: value}
    refused(lambda: info.cls(**arguments), error, argument, expected, value)


@pytest.mark.parametrize(
    ("info", "argument", "value"),
    [
        pytest.param(info, argument, value, id=f"{info.name}-{argument}={value!r}")
        for info in INFOS
        for argument, values in {
            "learning_rate": [0, 0.0, 1, np.float32(0.5), fractions.Fraction(1, 3)],
            "weight_decay": [None, 0, 0.0, 1e-4, 3],
            "momentum": [0, 0.0, 0.999],
            "beta_1": [0, 0.9999],
            "beta_2": [0, 0.9999],
            "epsilon": [0, 1e-3],
            "trust_coefficient": [1e-9, 1, 50.0],
            "nesterov": [True, False],
        }.items()
        for value in values
        if argument in ("learning_rate", "weight_decay") or accepts(info, argument)
    ],
)
def test_the_ends_of_the_intervals_are_accepted(info, argument, value):
    optimizer = info.cls(**{**minimal_arguments(info), argument: value})
    got = getattr(optimizer, argument)
    if argument == "learning_rate":
        assert float(got) == pytest.approx(float(value))
    else:
        assert got == value


@over_optimizers
@pytest.mark.parametrize(
    "argument",
    ["learning_rate", "weight_decay", "clipnorm", "clipvalue", "global_clipnorm"],
)
def test_infinity_is_no_real_number(info, argument):
    arguments = {**minimal_arguments(info), argument: math.inf}
    refused(lambda: info.cls(**arguments), ValueError, argument, "a real number", math.inf)


@over_optimizers
def test_learning_rate_may_be_a_schedule_or_a_callable(info):
    arguments = minimal_arguments(info)
    schedule = keras.optimizers.schedules.PolynomialDecay(0.3, 10)
    assert float(info.cls(**{**arguments, "learning_rate": schedule}).learning_rate) == (
        pytest.approx(0.3)
    )
    optimizer = info.cls(**{**arguments, "learning_rate": lambda: 0.25})
    assert float(optimizer.learning_rate) == pytest.approx(0.25)


@over_optimizers
@pytest.mark.parametrize(
    "clips",
    [
        {"clipnorm": 1.0, "clipvalue": 2.0},
        {"clipnorm": 1.0, "global_clipnorm": 2.0},
        {"clipvalue": 1.0, "global_clipnorm": 2.0},
        {"clipnorm": 1.0, "clipvalue": 2.0, "global_clipnorm": 3.0},
    ],
    ids="-".join,
)
def test_two_clips_at_once(info, clips):
    with pytest.raises(ValueError, match="Only one of") as caught:
        info.cls(**minimal_arguments(info), **clips)
    for name, value in clips.items():
        assert f"{name}={value}" in str(caught.value).partition("Received")[2]


@over_optimizers
def test_unknown_keyword(info):
    with pytest.raises(TypeError, match=r"no argument `unknown_argument`.*=17"):
        info.cls(**minimal_arguments(info), unknown_argument=17)


@pytest.mark.parametrize(
    ("name", "elsewhere", "here"),
    [
        ("LAMB", "weight_decay_rate", "weight_decay"),
        ("VRLARS", "eeta", "trust_coefficient"),
        ("LARS", "eta", "trust_coefficient"),
        ("CLARS", "eeta", "trust_coefficient"),
        ("CLARS", "eta", "trust_coefficient"),
        ("SNGM", "lr", "learning_rate"),
        ("LARS", "trust_coef", "trust_coefficient"),
        ("LAMB", "eps", "epsilon"),
        ("VRLAMB", "beta3", "beta_3"),
        ("VRSGD", "accumulation_steps", "gradient_accumulation_steps"),
        ("ExtrapSGD", "nestrov", "nesterov"),
    ],
)
@pytest.mark.parametrize("package", ["tf_lbopt", "tf_lbopt.tf_keras"])
def test_a_name_from_elsewhere(package, name, elsewhere, here):
    with pytest.raises(TypeError, match=f"no argument `{elsewhere}`. Expected: `{here}`.*=0.5"):
        getattr(importlib.import_module(package), name)(0.1, **{elsewhere: 0.5})


def test_trust_ratio_of_an_optimizer_without():
    refused(
        lambda: tf_lbopt.ExtrapSGD(0.1, default_trust_ratio=0.5),
        ValueError, "default_trust_ratio", "trust_coefficient", 0.5,
    )  # fmt: skip


@pytest.mark.parametrize("package", ["tf_lbopt", "tf_lbopt.tf_keras"])
def test_names_that_are_not_passed_on(package):
    """To a class inside, which would take them."""
    package = importlib.import_module(package)
    for cls, name in [
        (package.VRSGD, "momentum"),
        (package.VRSGD, "nesterov"),
        (package.VRMomentum, "beta_3"),
        (package.VRLARS, "beta_3"),
    ]:
        with pytest.raises(
            TypeError, match=f"no argument `{name}`. Expected: one of learning_rate"
        ):
            cls(0.1, **{name: 0.5})
    with pytest.raises(TypeError, match=r"`betas`. Expected: `beta_1` and `beta_2`"):
        package.LAMB(0.1, betas=(0.9, 0.99))


def test_names_in_a_subclass():
    class Mine(tf_lbopt.VRLAMB):
        def __init__(self, rate, **kwargs):
            super().__init__(rate, **kwargs)

    assert Mine(rate=0.1, beta_1=0.5, name="mine").beta_1 == 0.5
    with pytest.raises(TypeError, match=r"Mine has no argument `beta1`. Expected: `beta_1`"):
        Mine(rate=0.1, beta1=0.5)


@pytest.mark.parametrize("package", ["tf_lbopt", "tf_lbopt.tf_keras"])
@pytest.mark.parametrize("kind", [list, tuple, iter])
def test_variables_in_front(package, kind):
    """As in PyTorch."""
    variables = [keras.Variable(np.ones([200, 200]), name=f"weights_{i}") for i in range(3)]
    with pytest.raises(TypeError, match="`compile`, `build` or `apply`") as caught:
        importlib.import_module(package).LARS(kind(variables), 0.1)
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


def test_messages_are_of_limited_length():
    long = "x" * 10_000
    for call in [
        lambda: tf_lbopt.LARS(0.1, momentum=long),
        lambda: tf_lbopt.LARS(0.1, unknown=long),
        lambda: tf_lbopt.CLARS(0.1, norm_estimator=long),
        lambda: tf_lbopt.LARS(0.1, exclude_from_weight_decay=long),
        lambda: tf_lbopt.LARS(0.1, exclude_from_weight_decay=[np.zeros(2000)]),
        lambda: tf_lbopt.LARS(0.1).apply([None] * 200, [keras.Variable(0.0) for _ in range(200)]),
        lambda: tf_lbopt.LossScaleOptimizer(long),
        lambda: tf_lbopt.VarianceReduced(long),
        lambda: tf_lbopt.Accumulated(keras.optimizers.SGD(), long),
        lambda: tf_lbopt.PostLocalSGD(long, 1, 1),
        lambda: tf_lbopt.per_example_gradient_norms(long, None, None),
        lambda: tf_lbopt.callbacks.FreezeLayers([3.0, long], epochs=1),
    ]:
        with pytest.raises((TypeError, ValueError)) as caught:
            call()
        assert len(str(caught.value)) < 600, str(caught.value)[:300]


@over_optimizers
@pytest.mark.parametrize("value", [1.5, -0.5])
def test_ema_momentum(info, value):
    arguments = {**minimal_arguments(info), "use_ema": True, "ema_momentum": value}
    refused(lambda: info.cls(**arguments), ValueError, "ema_momentum", "[0, 1]", value)


EXCLUDING = pytest.mark.parametrize(
    ("info", "argument"),
    [
        pytest.param(info, argument, id=f"{info.name}-{argument}")
        for info in INFOS
        for argument in ("exclude_from_weight_decay", "exclude_from_layer_adaptation")
        if argument == "exclude_from_weight_decay" or accepts(info, argument)
    ],
)


@EXCLUDING
@pytest.mark.parametrize("value", ["bias", b"bias", 3, True])
def test_exclusion_that_is_no_list(info, argument, value):
    arguments = {**minimal_arguments(info), argument: value}
    refused(lambda: info.cls(**arguments), TypeError, argument, EXCLUSION_LIST, value)


@EXCLUDING
@pytest.mark.parametrize("entry", [3, None, b"bias", 1.5, ["bias"]])
def test_exclusion_entry_of_unknown_type(info, argument, entry):
    arguments = {**minimal_arguments(info), argument: ["gamma", entry]}
    refused(lambda: info.cls(**arguments), TypeError, argument, EXCLUSION_LIST, entry)


@EXCLUDING
@pytest.mark.parametrize("entry", ["(", "[a-", "*bias"])
def test_exclusion_entry_that_is_no_regular_expression(info, argument, entry):
    arguments = {**minimal_arguments(info), argument: ["gamma", entry]}
    refused(lambda: info.cls(**arguments), ValueError, argument, EXCLUSION_LIST, entry)


@over_optimizers
def test_keras_way_of_excluding_refuses_a_bare_string(info):
    """It would be read letter by letter, and exclude every name with a b, an i, an a or an s."""
    optimizer = info.cls(**minimal_arguments(info))
    with pytest.raises(TypeError, match=r"Received.*bias"):
        optimizer.exclude_from_weight_decay(var_names="bias")


@over_optimizers
def test_keras_way_of_excluding_refuses_what_is_no_regular_expression(info):
    optimizer = info.cls(**minimal_arguments(info))
    with pytest.raises(ValueError, match=r"exclude_from_weight_decay.*regular expression"):
        optimizer.exclude_from_weight_decay(var_names=["("])


# -- gradients and variables -----------------------------------------------------------------------


@over_optimizers
@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_gradients_that_do_not_fit_the_variables(info, built, count):
    variables = named_variables()
    optimizer = info.cls(**minimal_arguments(info))
    if built:
        optimizer.build(variables)
    before = [v.numpy() for v in variables]
    gradients = (2 * gradients_for(variables))[:count]
    with pytest.raises(
        ValueError, match=rf"`grads`.*one entry per.*Received: {count} gradients for 3 variables"
    ):
        apply(optimizer, gradients, variables)
    for value, variable in zip(before, variables, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


@pytest.mark.parametrize("dtype", ["int32", "complex64", "bool"])
@pytest.mark.parametrize("package", ["tf_lbopt", "tf_lbopt.tf_keras"])
def test_variables_that_are_no_real_numbers(package, dtype):
    variable = tf.Variable(tf.zeros([2], dtype), name="counts")
    optimizer = importlib.import_module(package).LARS(0.1)
    with pytest.raises(TypeError, match=f"LARS trains .*Received: counts, of dtype {dtype}"):
        optimizer.build([variable])
    if package == "tf_lbopt" and dtype != "complex64":
        mine = keras.Variable(np.zeros(2), dtype=dtype, name="mine", trainable=False)
        for wrap in (tf_lbopt.VarianceReduced, tf_lbopt.Accumulated, tf_lbopt.LossScaleOptimizer):
            with pytest.raises(TypeError, match=f"Received: mine, of dtype {dtype}"):
                wrap(keras.optimizers.SGD()).build([mine])


def test_what_belongs_to_the_other_keras():
    with pytest.raises(TypeError, match=r"for Keras 3 see tf_lbopt. Received: mine, a keras.Var"):
        tf_lbopt.tf_keras.LARS(0.1).build([keras.Variable(np.zeros(2), name="mine")])
    for inner in (tf_keras.optimizers.SGD(), tf_lbopt.tf_keras.LARS(0.1)):
        for wrap in (tf_lbopt.LossScaleOptimizer, tf_lbopt.VarianceReduced, tf_lbopt.Accumulated):
            with pytest.raises(TypeError, match=r"of Keras 3 .*for tf_keras see tf_lbopt.tf_keras"):
                wrap(inner)


@over_optimizers
def test_unknown_variable(info):
    variables = named_variables()
    optimizer = info.cls(**minimal_arguments(info))
    optimizer.build(variables[:2])
    with pytest.raises(ValueError, match=r"Unknown variable: norm/gamma"):
        apply(optimizer, gradients_for(variables), variables)
    assert int(optimizer.iterations.numpy()) == 0


@over_optimizers
def test_a_variable_that_is_given_twice(info):
    """As by the variables of an encoder and of a decoder that share a table."""
    variables = named_variables()
    optimizer = info.cls(**minimal_arguments(info))
    optimizer.build(variables)
    before = [variable.numpy() for variable in variables]
    given = [*variables, variables[0]]
    with pytest.raises(ValueError, match=r"given once .*Received: dense/kernel more than once"):
        apply(optimizer, gradients_for(given), given)
    assert int(optimizer.iterations.numpy()) == 0
    for variable, value in zip(variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)


@over_optimizers
def test_all_gradients_none(info):
    variables = named_variables()
    optimizer = info.cls(**minimal_arguments(info))
    with pytest.raises(ValueError, match=r"(?s)all of `grads` are None.*Received.*dense/kernel"):
        apply(optimizer, [None] * 3, variables)


def _set_too_many_weights(variables):
    optimizer = tf_lbopt.LossScaleOptimizer(keras.optimizers.SGD(0.1))
    optimizer.build(variables)
    optimizer.set_weights([0.0] * len(variables))


def _leave_out_all_in_mid_accumulation(variables):
    accumulation = Accumulation(tf.distribute.get_strategy(), 2)
    accumulation.seen = tf.Variable(tf.ones([len(variables)]))
    accumulation.note([], [v.path for v in variables], 1)


@pytest.mark.parametrize(
    "call",
    [
        lambda variables: without_missing([1.0] + [None] * (len(variables) - 1), variables),
        lambda variables: without_missing([None] * len(variables), variables),
        lambda variables: Exclusion("a", [f"no{'p' * i}e" for i in range(500)]).build(variables),
        _set_too_many_weights,
        _leave_out_all_in_mid_accumulation,
    ],
    ids=["a gradient", "no gradient", "exclusions", "set_weights", "accumulation"],
)
def test_messages_name_a_few_of_many_variables(call):
    variables = [keras.Variable([0.0], name=f"a_name_in_a_model_{i}") for i in range(500)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((UserWarning, ValueError, tf.errors.InvalidArgumentError)) as caught:
            call(variables)
    assert "more)" in str(caught.value)
    assert len(str(caught.value)) < 1500


@over_optimizers
def test_some_gradients_none(info):
    variables = named_variables()
    before = [v.numpy() for v in variables]
    arguments = minimal_arguments(info)
    optimizer = info.cls(**arguments)
    first, _, third = gradients_for(variables)
    for call in range(arguments.get("gradient_accumulation_steps", 1)):
        gradients = [first * (1.0 + call), None, third * (1.0 - 0.1 * call)]
        with pytest.warns(UserWarning, match=r"dense/bias.*left unchanged"):
            apply(optimizer, gradients, variables)
    assert int(optimizer.iterations.numpy()) == 1
    pairs = zip(variables, before, strict=True)
    changed = [not np.array_equal(v.numpy(), old) for v, old in pairs]
    assert changed == [True, False, True]


@over_optimizers
def test_first_call_without_variables(info):
    variables = named_variables()
    optimizer = info.cls(**minimal_arguments(info))
    with pytest.raises(ValueError, match=r"`trainable_variables` must be given.*Received: None"):
        optimizer.apply(gradients_for(variables))


@over_optimizers
def test_later_calls_need_no_variables(info):
    variables = named_variables()
    arguments = minimal_arguments(info)
    optimizer = info.cls(**arguments)
    optimizer.build(variables)
    for call in range(arguments.get("gradient_accumulation_steps", 1)):
        apply(optimizer, gradients_for(variables, seed=call))
    assert int(optimizer.iterations.numpy()) == 1


# -- loss scaling ----------------------------------------------------------------------------------

LOSS_SCALE = {
    "initial_scale": (
        "a real number in (0, ",
        {ValueError: [0.0, -1.0, NAN, math.inf], TypeError: ["1", True, None]},
    ),
    "dynamic_growth_steps": (
        "an integer >= 1",
        {ValueError: [0, -5], TypeError: [2.5, "2", True, None]},
    ),
}


@pytest.mark.parametrize(("argument", "value", "error", "expected"), cases(LOSS_SCALE))
def test_loss_scale_arguments(argument, value, error, expected):
    refused(
        lambda: tf_lbopt.LossScaleOptimizer(tf_lbopt.SNGM(0.1), **{argument: value}),
        error, argument, expected, value,
    )  # fmt: skip


@pytest.mark.parametrize("value", ["sgd", None, tf_lbopt.SNGM])
def test_loss_scale_needs_an_optimizer(value):
    refused(
        lambda: tf_lbopt.LossScaleOptimizer(value),
        TypeError, "inner_optimizer", "keras.optimizers.Optimizer", value,
    )  # fmt: skip


@pytest.mark.parametrize(
    "wrapper", [keras.optimizers.LossScaleOptimizer, tf_lbopt.LossScaleOptimizer]
)
def test_loss_is_not_scaled_twice(wrapper):
    with pytest.raises(
        ValueError, match=r"`inner_optimizer` must not scale.*Received: LossScaleOptimizer"
    ):
        tf_lbopt.LossScaleOptimizer(wrapper(tf_lbopt.SNGM(0.1)))


@pytest.mark.parametrize("inner", [tf_lbopt.SNGM, keras.optimizers.SGD])
def test_loss_scale_gradients_and_variables(inner):
    variables = named_variables()
    optimizer = tf_lbopt.LossScaleOptimizer(inner(0.1))
    with pytest.raises(ValueError, match=r"`trainable_variables` must be given.*Received: None"):
        optimizer.apply(gradients_for(variables))
    with pytest.raises(ValueError, match="all of `grads` are None"):
        optimizer.apply([None] * 3, variables)


@pytest.mark.parametrize(
    ("loss", "dtype"),
    [
        (1.0, "float32"),
        (3, "float32"),
        (np.float32(2.0), "float32"),
        (tf.constant(4.0, tf.float16), "float32"),
        (tf.constant(4.0, tf.float64), "float64"),
    ],
)
@pytest.mark.parametrize("built", [False, True])
def test_scaled_loss(loss, dtype, built):
    """4 · 2¹⁵ is no float16."""
    ours = tf_lbopt.LossScaleOptimizer(tf_lbopt.SNGM(0.1))
    theirs = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1))
    theirs.build(named_variables())
    if built:
        ours.build(named_variables())
    scaled = ours.scale_loss(loss)
    assert scaled.dtype == dtype == theirs.scale_loss(loss).dtype
    assert float(scaled) == float(loss) * 2**15


@pytest.mark.parametrize(
    "make",
    [
        lambda: tf_lbopt.LARS(schedules.Warmup(0.1, 5)),
        lambda: tf_lbopt.ExtrapSGD(0.1, extrapolation_rate=schedules.Warmup(0.1, 5)),
        lambda: tf_lbopt.LossScaleOptimizer(tf_lbopt.LARS(0.1)),
        lambda: tf_lbopt.LossScaleOptimizer(keras.optimizers.SGD(schedules.Warmup(0.1, 5))),
        lambda: tf_lbopt.VarianceReduced(tf_lbopt.LARS(0.1)),
        lambda: tf_lbopt.Accumulated(keras.optimizers.SGD(schedules.Warmup(0.1, 5)), 2),
        lambda: tf_lbopt.VarianceReduced(keras.optimizers.SGD(schedules.Warmup(0.1, 5))),
        lambda: tf_lbopt.PostLocalSGD(keras.optimizers.SGD(schedules.Warmup(0.1, 5)), 1, 1),
        lambda: tf_lbopt.tf_keras.LARS(tf_keras.optimizers.schedules.PolynomialDecay(0.1, 5)),
    ],
)
def test_from_config_leaves_its_argument_as_it_is(make):
    optimizer = make()
    config = optimizer.get_config()
    before = copy.deepcopy(config)
    for _ in range(2):
        assert type(optimizer).from_config(config).get_config() == before
    assert config == before


# -- schedules -------------------------------------------------------------------------------------

WARMUP = {
    "schedule": (NON_NEGATIVE, {ValueError: [-0.1, NAN], TypeError: ["0.1", True, None, len]}),
    "steps": ("an integer >= 0", {ValueError: [-1], TypeError: [0.5, "2", True, None]}),
    "start": (NON_NEGATIVE, {ValueError: [-0.1, NAN], TypeError: ["0.1", True, None]}),
}


@pytest.mark.parametrize(("argument", "value", "error", "expected"), cases(WARMUP))
def test_warmup_arguments(argument, value, error, expected):
    arguments = {"schedule": 0.1, "steps": 10, argument: value}
    refused(lambda: schedules.Warmup(**arguments), error, argument, expected, value)


def test_warmup_takes_no_schedule_of_tf_keras():
    decay = tf_keras.optimizers.schedules.PolynomialDecay(0.1, 5)
    with pytest.raises(TypeError, match=r"must be a keras.*Received.*\(of type PolynomialDecay\)"):
        schedules.Warmup(decay, 3)


SCALING = {
    "base_learning_rate": (NON_NEGATIVE, {ValueError: [-0.1, NAN], TypeError: ["1", True, None]}),
    "base_batch_size": ("an integer >= 1", {ValueError: [0, -8], TypeError: [2.5, "8", True]}),
    "batch_size": ("an integer >= 1", {ValueError: [0, -8], TypeError: [2.5, "8", True, None]}),
}


@pytest.mark.parametrize("rule", [schedules.linear_scaling, schedules.sqrt_scaling])
@pytest.mark.parametrize(("argument", "value", "error", "expected"), cases(SCALING))
def test_scaling_rule_arguments(rule, argument, value, error, expected):
    arguments = {"base_learning_rate": 0.1, "base_batch_size": 8, "batch_size": 16}
    refused(lambda: rule(**{**arguments, argument: value}), error, argument, expected, value)


WRONG_POSITIVE = (POSITIVE, {ValueError: [0, -1.0, NAN], TypeError: ["1", True, None]})
COROLLARY_1 = {
    **dict.fromkeys(("gradient_budget", "smoothness", "noise", "initial_gap"), WRONG_POSITIVE),
    "momentum": OWN["momentum"],
}


@pytest.mark.parametrize(("argument", "value", "error", "expected"), cases(COROLLARY_1))
def test_corollary_1_arguments(argument, value, error, expected):
    arguments = {
        "gradient_budget": 1e6, "smoothness": 10.0, "noise": 2.0, "initial_gap": 1.0,
        "momentum": 0.9, argument: value,
    }  # fmt: skip
    refused(lambda: schedules.sngm_corollary_1(**arguments), error, argument, expected, value)


@pytest.mark.parametrize(
    ("argument", "value", "error", "expected"), cases({"gradient_budget": WRONG_POSITIVE})
)
def test_corollary_2_arguments(argument, value, error, expected):
    refused(lambda: schedules.sngm_corollary_2(value), error, argument, expected, value)


# -- the rest --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "value", "error", "expected"),
    cases(
        {
            "max_consecutive": (
                "an integer >= 1 or None",
                {ValueError: [0, -1], TypeError: [2.5, "5", True]},
            )
        }
    ),
)
def test_skipped_updates_arguments(argument, value, error, expected):
    refused(lambda: tf_lbopt.callbacks.SkippedUpdates(value), error, argument, expected, value)


@pytest.mark.parametrize("value", [3, True, ["folder"], b"folder"])
@pytest.mark.parametrize(
    "callback",
    [
        tf_lbopt.callbacks.GradientNoiseScale,
        tf_lbopt.callbacks.GradientSignalToNoise,
        functools.partial(tf_lbopt.callbacks.GradientVarianceFactor, np.ones(2), np.ones(2)),
    ],
)
def test_log_dir_of_callbacks(callback, value):
    refused(lambda: callback(log_dir=value), TypeError, "log_dir", "a path or None", value)


@pytest.mark.parametrize("value", [3, None, ["lars"], b"lars"])
def test_list_optimizers_pattern(value):
    refused(lambda: tf_lbopt.list_optimizers(value), TypeError, "pattern", "a string", value)


@over_optimizers
def test_variables_overwritten_by_their_gradients(info):
    variable = keras.Variable(tf.ones([2]), name="scale")
    variable.overwrite_with_gradient = True
    with pytest.raises(ValueError, match=r"overwritten by their gradients.*Received: scale"):
        info.cls(**minimal_arguments(info)).build([variable])


def test_accumulation_is_settled_by_the_constructor():
    optimizer = tf_lbopt.LARS(0.1, gradient_accumulation_steps=2)
    with pytest.raises(AttributeError, match="gradient_accumulation_steps = 4"):
        optimizer.gradient_accumulation_steps = 4
    optimizer.build([keras.Variable([1.0, 2.0])])
    assert optimizer.gradient_accumulation_steps == 2
