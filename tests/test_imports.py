"""What importing the package pulls in, and where private names are used."""

import ast
import importlib
import json
import os
import pathlib
import subprocess
import sys

import pytest
from forked_python import python

import tf_lbopt
from tf_lbopt import _requirements
from tf_lbopt.optimizers.declared import Declared

ROOT = pathlib.Path(tf_lbopt.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
OPTIONAL = [
    "official",
    "official_recipes",
    "tf_keras",
    "matplotlib",
    "sklearn",
    "tensorflow_datasets",
    "tensorflow_text",
    "tensorflow_recommenders",
    "rich",
]
PRIVATE = [
    "tensorflow.python",
    "tensorflow.core",
    "tensorflow.compiler",
    "keras.src",
    "tf_keras.src",
]
# Rooms that nothing else of the package imports, and what they are there for.
ROOMS = {
    ROOT / "tf_keras": ["tf_keras"],
    ROOT / "tfm": ["tf_keras", "official"],
    ROOT / "batch_size" / "plots.py": ["matplotlib"],
}


def imported_modules(path):
    """Dotted names that a file imports, with what `from x import y` takes out of them."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            if dotted.startswith(("tf.", "keras.")):
                yield dotted.replace("tf.", "tensorflow.", 1)


def starts_with(name, packages):
    return any(name == package or name.startswith(package + ".") for package in packages)


def test_import_pulls_in_nothing_optional():
    # Keras itself imports some of these where they are installed, so they are taken out first.
    code = (
        "import sys, json\n"
        "import keras, tensorflow\n"
        f"names = {OPTIONAL!r}\n"
        "for module in [m for m in sys.modules if m.partition('.')[0] in names]:\n"
        "    del sys.modules[module]\n"
        "import tf_lbopt\n"
        "roots = {m.partition('.')[0] for m in sys.modules}\n"
        "print(json.dumps([n for n in names if n in roots] + ['tf_lbopt' in roots]))\n"
    )
    done = subprocess.run(
        [*python(), "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [True]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_imports_anything_optional(path):
    allowed = [name for room, names in ROOMS.items() if path.is_relative_to(room) for name in names]
    optional = [name for name in OPTIONAL if name not in allowed]
    assert [name for name in imported_modules(path) if starts_with(name, optional)] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_private_modules_are_imported_in_one_file(path):
    private = [name for name in imported_modules(path) if starts_with(name, PRIVATE)]
    if path == ROOT / "_compat.py":
        assert private, "the scan does not find private imports where they are known to be"
    else:
        assert private == []


def framework_objects():
    """One of each kind that this package meets, for the names of their private attributes."""
    import keras
    import tensorflow as tf
    import tf_keras

    objects = [
        tf.Variable(0.0),
        tf.constant(0.0),
        tf.distribute.get_strategy(),
        tf.IndexedSlices(tf.zeros([1]), tf.zeros([1], tf.int32)),
        keras.Variable(0.0),
        keras.callbacks.Callback(),
        keras.callbacks.CallbackList(),
        keras.callbacks.SwapEMAWeights(),
        keras.losses.MeanSquaredError(),
        keras.metrics.Mean(),
    ]
    for of in (keras, tf_keras):
        layer = of.layers.Dense(1)
        layer.build((None, 1))
        optimizer = of.optimizers.SGD(0.1, use_ema=True)
        model = of.Sequential([layer])
        model.compile(optimizer, "mse")
        if of is keras:
            scaled = of.optimizers.LossScaleOptimizer(of.optimizers.SGD(0.1))
        else:
            scaled = of.mixed_precision.LossScaleOptimizer(of.optimizers.SGD(0.1))
        schedule = of.optimizers.schedules.CosineDecay(0.1, 1)
        objects += [layer, model, optimizer, scaled, schedule]
    return objects


def private(names):
    return {name for name in names if name.startswith("_") and not name.endswith("__")}


def accessed_names(tree):
    """Attributes that code has to do with, by name or as a string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr, node.lineno
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "").endswith("attr"):
            yield from ((a.value, a.lineno) for a in node.args[1:2] if isinstance(a, ast.Constant))


def defined_names(node):
    """Attributes that a class defines, itself or on ``self``."""
    for part in ast.walk(node):
        if isinstance(part, ast.FunctionDef):
            yield part.name
        elif isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
            yield part.attr
        elif isinstance(part, (ast.AnnAssign, ast.Assign)):
            targets = [part.target] if isinstance(part, ast.AnnAssign) else part.targets
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def test_private_attributes_of_the_frameworks_are_in_one_file_for_each():
    objects = framework_objects()
    theirs = private(name for thing in objects for name in dir(thing))
    assert {"_iterations", "_learning_rate", "_trainable_variables", "_unique_id"} <= theirs
    frameworks = [type(thing) for thing in objects if type(thing).__name__ == "SGD"]
    found = {}
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        module = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
        module = importlib.import_module(module.removesuffix(".__init__"))
        ours = set()
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                cls = getattr(module, node.name)
                # Mix-ins of optimizers are optimizers of both frameworks in the end.
                bases = [*cls.__mro__, *frameworks] if issubclass(cls, Declared) else cls.__mro__
                of_bases = [o for o in objects if any(type(o) in b.__mro__ for b in bases)]
                inherited = private(name for o in of_bases for name in dir(o))
                inherited |= private(
                    name
                    for base in bases
                    if base.__module__.partition(".")[0] in ("keras", "tf_keras", "tensorflow")
                    for name in dir(base)
                )
                ours |= private(defined_names(node)) - inherited
        found[path] = [f"{n}:{line}" for n, line in accessed_names(tree) if n in theirs - ours]
    for path, names in found.items():
        if path.name == "_compat.py":
            assert names, "the scan does not find private names where they are known to be"
        else:
            assert names == [], path


def _import_with(code, command, **environment):
    """The last line of what a process says that runs ``code`` and imports the package."""
    done = subprocess.run(
        [*command, "-c", f"{code}\nimport tf_lbopt\nprint('imported')"],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    return (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1]


_OTHER_VERSION = """
import sys, types
sys.modules["{name}"] = types.ModuleType("{name}")
sys.modules["{name}"].__version__ = "{version}"
sys.modules["{name}"].__spec__ = types.SimpleNamespace(name="{name}")
"""


@pytest.mark.parametrize(
    ("code", "environment", "expected"),
    [
        ("", {"KERAS_BACKEND": "jax"}, ["ImportError", "KERAS_BACKEND", "Received: 'jax'"]),
        (
            "import importlib.util\nimportlib.util.find_spec = lambda name: None",
            {},
            ["ImportError", "TensorFlow 2.16", "tf-lbopt[cpu]", "tf-lbopt[tpu]", "Received: none"],
        ),
        (
            _OTHER_VERSION.format(name="tensorflow", version="2.15.1"),
            {},
            ["ImportError", "TensorFlow 2.16", "tf-lbopt[gpu]", "Received: TensorFlow 2.15.1"],
        ),
        (
            "import importlib.util as util\nfind = util.find_spec\n"
            "util.find_spec = lambda name: None if name == 'keras' else find(name)",
            {},
            ["ImportError", "Keras 3.7", "Received: none"],
        ),
    ],
    ids=["backend", "no_tensorflow", "old_tensorflow", "no_keras"],
)
def test_import_says_what_is_missing(code, environment, expected):
    message = _import_with(code, [sys.executable], **environment)
    assert all(part in message for part in expected), message


@pytest.mark.parametrize(
    ("code", "environment", "expected"),
    [
        (
            "import tensorflow, tf_lbopt\n"
            "model = tensorflow.keras.Sequential([tensorflow.keras.layers.Dense(1)])\n"
            "model.compile(tf_lbopt.LARS(0.1), 'mse')",
            {"TF_USE_LEGACY_KERAS": "1"},
            ["ValueError", "LARS, an optimizer for Keras 3", "see tf_lbopt.tf_keras"],
        ),
        (
            "import tensorflow, tf_lbopt\n"
            "model = tensorflow.keras.Sequential([tensorflow.keras.layers.Dense(1)])\n"
            "model.compile(tf_lbopt.LossScaleOptimizer(tf_lbopt.LARS(0.1)), 'mse')",
            {"TF_USE_LEGACY_KERAS": "1"},
            ["ValueError", "LossScaleOptimizer, an optimizer for Keras 3", "see tf_lbopt.tf_keras"],
        ),
        (
            "import keras\nkeras.__version__ = '3.6.0'",
            {},
            ["ImportError", "Keras 3.7", "Received: Keras 3.6.0"],
        ),
        (
            "import sys\nsys.modules['tf_keras'] = None\nimport tf_lbopt.tf_keras",
            {},
            ["ImportError", "tf_lbopt.tf_keras needs tf_keras", "'tf-lbopt[tf-keras]'"],
        ),
        (
            "import sys\nsys.modules['official'] = None\nimport tf_lbopt.tfm",
            {},
            ["ImportError", "tf_lbopt.tfm needs tf-models-official", "'tf-lbopt[recipes]'"],
        ),
        (
            "import keras, tf_lbopt.tf_keras\n"
            "model = keras.Sequential([keras.layers.Dense(1)])\n"
            "model.compile(tf_lbopt.tf_keras.LARS(0.1), 'mse')",
            {},
            ["ValueError", "LARS, an optimizer for tf_keras", "Keras 3 see tf_lbopt"],
        ),
    ],
    ids=["legacy", "legacy_loss_scale", "old_keras", "no_tf_keras", "no_official", "tf_keras"],
)
def test_import_says_what_is_missing_beside_tensorflow(code, environment, expected):
    message = _import_with(code, python(), **environment)
    assert all(part in message for part in expected), message


def test_a_newer_version_than_tried_is_warned_of(recwarn):
    _requirements._check_version("Keras", "3.16.0", (3, 7), (3, 15))
    (warning,) = recwarn
    assert "Keras up to 3.15" in str(warning.message)
    assert "Received: 3.16.0" in str(warning.message)
    _requirements._check_version("Keras", "3.15.9", (3, 7), (3, 15))
    assert len(recwarn) == 1
