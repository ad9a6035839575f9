"""The table of optimizers, and that everything public is documented."""

import dataclasses
import doctest
import importlib
import inspect
import itertools
import pkgutil
import re
import xml.etree.ElementTree

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers_arguments import accepts, minimal_arguments, named_variables

import tf_lbopt
from tf_lbopt import batch_size, callbacks, registry, schedules
from tf_lbopt.optimizers.base import LargeBatchOptimizer


def _defined_in(module, thing):
    return getattr(thing, "__module__", None) == module.__name__


INFOS = tf_lbopt.list_optimizers()
over_optimizers = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)

SCHEDULE_NAMES = [
    name
    for name, value in vars(schedules).items()
    if not name.startswith("_") and _defined_in(schedules, value)
]
PUBLIC = {
    **{
        name: getattr(tf_lbopt, name)
        for name in tf_lbopt.__all__
        if callable(getattr(tf_lbopt, name))
    },
    **{name: getattr(callbacks, name) for name in callbacks.__all__},
    **{name: getattr(batch_size, name) for name in batch_size.__all__},
    **{name: getattr(schedules, name) for name in SCHEDULE_NAMES},
}
over_public = pytest.mark.parametrize("name", PUBLIC)


def modules():
    names = [m.name for m in pkgutil.walk_packages(tf_lbopt.__path__, tf_lbopt.__name__ + ".")]
    return [tf_lbopt, *(importlib.import_module(name) for name in names)]


@over_optimizers
def test_rows_are_frozen(info):
    for field in dataclasses.fields(info):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(info, field.name, None)
    assert isinstance(info.slots, tuple)
    assert isinstance(info.statistics, tuple)
    hash(info)


def test_the_table_can_not_be_changed_through_the_list():
    tf_lbopt.list_optimizers().clear()
    assert tf_lbopt.list_optimizers() == INFOS
    assert INFOS


def test_names():
    names = [info.name for info in INFOS]
    assert len(set(names)) == len(names)
    assert len({info.cls for info in INFOS}) == len(names)
    for info in INFOS:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", info.name)
        assert info.name.replace("_", "") == info.cls.__name__.lower()


def test_patterns():
    names = [info.name for info in INFOS]
    assert [i.name for i in tf_lbopt.list_optimizers("*")] == names
    assert [i.name for i in tf_lbopt.list_optimizers("LA*")] == [
        name for name in names if name.startswith("la")
    ]
    assert [i.name for i in tf_lbopt.list_optimizers("l?rs")] == ["lars"]
    assert [i.name for i in tf_lbopt.list_optimizers("la[mx]b")] == ["lamb"]
    assert tf_lbopt.list_optimizers("nothing-like-this") == []
    assert tf_lbopt.list_optimizers("lar") == []
    for info in INFOS:
        assert tf_lbopt.list_optimizers(info.name) == [info]


def test_a_terminal_shows_a_table():
    heading, line, *rows = repr(INFOS).splitlines()
    assert str(INFOS) == repr(INFOS)
    starts = [match.start() for match in re.finditer("-+", line)]
    assert [heading[start:].split()[0] for start in starts] == [*registry._COLUMNS]
    assert [row.split()[:2] for row in rows] == [[i.name, i.cls.__name__] for i in INFOS]
    assert all(len(row) <= 100 for row in rows)
    cells = {
        row.split()[0]: [row[a:b].strip() for a, b in itertools.pairwise([*starts, None])]
        for row in rows
    }
    assert cells["vr_lamb"][2:5] == ["3", "variance", "2 or more"]
    assert cells["clars"][2:] == ["1", "mean norm", "any", "Huo et al. 2021, AAAI"]
    assert cells["sngm"][3:] == ["-", "any", "Zhao et al., arXiv:2007.13985"]
    assert cells["adam"][5] == "Kingma, Ba 2015, arXiv:1412.6980"
    assert repr(tf_lbopt.list_optimizers("nothing-like-this")) == "[]"
    assert repr(INFOS[:1]).startswith("[OptimizerInfo(")  # a slice is a plain list


def test_a_notebook_shows_a_table():
    cells = "".join(f"<{tag}>{text}</{tag}>" for tag, text in [("td", "lans"), ("td", "LANS")])
    text = tf_lbopt.list_optimizers("la*")._repr_html_()
    assert f"<tr>{cells}<td>2</td>" in text
    assert text.count("<tr>") == 4
    xml.etree.ElementTree.fromstring(text)  # each element is closed
    (info,) = tf_lbopt.list_optimizers("lars")
    changed = dataclasses.replace(info, name="<b>&", paper='A, B, C 2020, "<i>" (X), eq. 1.')
    text = registry._Table([changed])._repr_html_()
    assert "<td>&lt;b&gt;&amp;</td>" in text
    assert "<td>A et al. 2020, X</td>" in text


def test_papers_that_say_less():
    assert registry._short('"A title"') == "A title"
    assert registry._short("") == "-"


@over_optimizers
def test_slots_are_what_the_optimizer_creates(info):
    variables = named_variables()
    optimizer = info.cls(**minimal_arguments(info))
    before = {id(v) for v in optimizer.variables}
    optimizer.build(variables)
    created = [v for v in optimizer.variables if id(v) not in before]
    created = [v for v in created if v.name != "pending_micro_steps"]  # a counter
    per_variable = [v for v in created if tuple(v.shape) == tuple(variables[0].shape)]
    assert len(per_variable) == len(info.slots)
    assert sorted(v.name for v in created) == sorted(
        variable.path.replace("/", "_") + "_" + slot
        for variable in variables
        for slot in info.slots
    )


@pytest.mark.parametrize("name", ["sngm", "lars"])
def test_no_slot_without_momentum(name):
    (info,) = tf_lbopt.list_optimizers(name)
    optimizer = info.cls(**minimal_arguments(info), momentum=0.0)
    before = len(optimizer.variables)
    optimizer.build(named_variables())
    assert len(optimizer.variables) == before


@over_optimizers
def test_classes_are_public_and_registered(info):
    assert getattr(tf_lbopt, info.cls.__name__) is info.cls
    assert info.cls.__name__ in tf_lbopt.__all__
    assert issubclass(info.cls, LargeBatchOptimizer)
    assert issubclass(info.cls, keras.optimizers.Optimizer)
    name = keras.saving.get_registered_name(info.cls)
    assert name == f"tf_lbopt>{info.cls.__name__}"
    assert keras.saving.get_registered_object(name) is info.cls
    assert info.cls.slots == info.slots
    assert info.cls.statistics == info.statistics


@pytest.mark.parametrize(
    ("base", "missing"),
    [
        ("tf_lbopt.optimizers.base.LargeBatchOptimizer", "rule"),
        ("tf_lbopt.tf_keras.base.LargeBatchOptimizer", "rule"),
        ("tf_lbopt.optimizers.extrapolated.ExtrapolatedOptimizer", "rule"),
        ("tf_lbopt.optimizers.extrapolation.Extrapolation", "_start.*noise_of"),
        ("tf_lbopt.optimizers.gsnr_weighting.GSNRWeighting", "_start"),
    ],
)
def test_an_optimizer_that_lacks_something_can_not_be_made(base, missing):
    module, _, name = base.rpartition(".")
    cls = type("Mine", (getattr(importlib.import_module(module), name),), {})
    with pytest.raises(TypeError, match=f"abstract class Mine .*{missing}"):
        cls(0.1)


@over_optimizers
def test_configuration_round_trip(info):
    changed = {
        "nesterov": not getattr(info.cls(**minimal_arguments(info)), "nesterov", True),
        "trust_coefficient": 0.25,
        "trust_ratio_denominator": "sum_of_norms",
        "default_trust_ratio": 0.25,
    }
    changed = {name: value for name, value in changed.items() if accepts(info, name)}
    optimizer = info.cls(**minimal_arguments(info), **changed)
    assert {name: optimizer.get_config()[name] for name in changed} == changed
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(optimizer))
    assert type(again) is info.cls
    assert again.get_config() == optimizer.get_config()
    assert set(inspect.signature(info.cls).parameters) == set(optimizer.get_config())


# -- documentation ---------------------------------------------------------------------------------


@over_public
def test_docstrings(name):
    thing = PUBLIC[name]
    text = inspect.getdoc(thing) or ""
    assert text.splitlines()[0].strip().endswith(".")
    is_record = dataclasses.is_dataclass(thing)
    section = "Attributes:" if is_record else "Args:"
    assert section in text
    assert "{" not in text.split(section)[1].split("Example")[0], "a placeholder was left"
    documented = set(re.findall(r"^\s+\**(\w+): ", text.split(section)[1], flags=re.MULTILINE))
    parameters = {
        parameter.name
        for parameter in inspect.signature(thing).parameters.values()
        if parameter.kind is not parameter.VAR_KEYWORD
    }
    assert parameters <= documented
    if not is_record:
        assert ">>> " in text
        assert "Example:" in text


@over_public
def test_public_methods_have_docstrings(name):
    if inspect.isclass(PUBLIC[name]):
        for method, value in vars(PUBLIC[name]).items():
            if not method.startswith("_") and (callable(value) or isinstance(value, property)):
                assert inspect.getdoc(value), f"{name}.{method}"


@over_optimizers
def test_papers(info):
    assert re.search(r'"[A-Z].{20,}" \((arXiv:\d{4}\.\d{4,5}|AAAI|ICML)\), ', info.paper)
    where = "not at hand" if info.name == "lans" else r"Algorithm \d|section \d|eq\. \d"
    assert re.search(where, info.paper)


@pytest.mark.parametrize("name", [n for n in SCHEDULE_NAMES if inspect.isfunction(PUBLIC[n])])
def test_papers_of_the_rules_of_thumb(name):
    assert re.search(r"arXiv:\d{4}\.\d{4,5}", inspect.getdoc(PUBLIC[name]).split("References:")[1])


def test_examples_run():
    """With `keras`, `np` and `tf`, and what the module itself defines, whatever else it imports."""
    finder, runner = doctest.DocTestFinder(exclude_empty=True), doctest.DocTestRunner()
    with_examples, failures = set(), []
    for module in modules():
        own = {n: t for n, t in vars(module).items() if _defined_in(module, t)}
        for test in finder.find(
            module, module.__name__, globs={"keras": keras, "np": np, "tf": tf, **own}
        ):
            if not test.examples:
                continue
            output = []
            runner.run(test, out=output.append)
            with_examples.add(test.name.rpartition(".")[2])
            if output:
                failures.append("".join(output))
    assert not failures, "\n".join(failures)
    expected = {n for n, thing in PUBLIC.items() if not dataclasses.is_dataclass(thing)}
    assert expected <= with_examples
