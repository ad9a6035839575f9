"""What importing the package pulls in, and where private names are used."""

import ast
import json
import pathlib
import subprocess
import sys

import pytest

import tf_lbopt

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
