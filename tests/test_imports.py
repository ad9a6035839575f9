"""What importing the package pulls in, and where private names are used."""

import ast
import json
import os
import pathlib
import subprocess
import sys

import pytest

import tf_lbopt
from tf_lbopt import _requirements

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
ROOMS = {ROOT / "tf_keras": ["tf_keras"], ROOT / "tfm": ["tf_keras", "official"]}


@pytest.fixture(autouse=True)
def _fresh_keras_state():
    """In place of the costly one for all tests: nothing here leaves global state behind."""


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
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [True]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_imports_anything_optional(path):
    allowed = [name for room, names in ROOMS.items() if path.is_relative_to(room) for name in names]
    optional = [name for name in OPTIONAL if name not in allowed]
    assert [name for name in imported_modules(path) if starts_with(name, optional)] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_private_names_are_in_one_file_for_each_framework(path):
    private = [name for name in imported_modules(path) if starts_with(name, PRIVATE)]
    if path in (ROOT / "_compat.py", ROOT / "tf_keras" / "_compat.py"):
        assert private, "the scan does not find private imports where they are known to be"
    else:
        assert private == []


def _import_with(code, **environment):
    """The last line of what a fresh process says that runs ``code`` and imports the package."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport tf_lbopt\nprint('imported')"],
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
            "import tensorflow, tf_lbopt\n"
            "model = tensorflow.keras.Sequential([tensorflow.keras.layers.Dense(1)])\n"
            "model.compile(tf_lbopt.LARS(0.1), 'mse')",
            {"TF_USE_LEGACY_KERAS": "1"},
            ["ValueError", "LARS, an optimizer for Keras 3", "see tf_lbopt.tf_keras"],
        ),
        (
            "import keras, tf_lbopt.tf_keras\n"
            "model = keras.Sequential([keras.layers.Dense(1)])\n"
            "model.compile(tf_lbopt.tf_keras.LARS(0.1), 'mse')",
            {},
            ["ValueError", "LARS, an optimizer for tf_keras", "Keras 3 see tf_lbopt"],
        ),
    ],
    ids=[
        "backend",
        "no_tensorflow",
        "old_tensorflow",
        "no_keras",
        "old_keras",
        "no_tf_keras",
        "no_tf_models",
        "legacy",
        "other_way",
    ],
)
def test_import_says_what_is_missing(code, environment, expected):
    message = _import_with(code, **environment)
    assert all(part in message for part in expected), message


def test_a_newer_version_than_tried_is_warned_of(recwarn):
    _requirements._check_version("Keras", "3.16.0", (3, 7), (3, 15))
    (warning,) = recwarn
    assert "Keras up to 3.15" in str(warning.message)
    assert "Received: 3.16.0" in str(warning.message)
    _requirements._check_version("Keras", "3.15.9", (3, 7), (3, 15))
    assert len(recwarn) == 1
