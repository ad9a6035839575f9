"""The Python code of the site's pages, run as it stands there, page by page.

A page's ``python`` fences run one after another in one namespace, its ``pycon`` fences as doctests
in the same one, where warnings are errors. What does not run has a comment before it,
``<!-- not run: why -->``, which the site shows.

A tutorial is one program, in a process of its own, and its ``text`` fences are all that it prints.
Where ``<!-- numbers within 20 % -->`` stands before one, its numbers may be so far from those seen.
"""

import dataclasses
import doctest
import pathlib
import re
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
import yaml
from helpers_programs import run_program

import tf_lbopt

ROOT = pathlib.Path(__file__).parents[1]
RUN_ELSEWHERE = {
    "README.md": "test_readme.py",
    "docs/known_defects.md": "test_known_defects.py",
    "docs/loops.md": "test_readme.py",
    "docs/migrate.md": "test_migrate.py",
    "docs/scaling.md": "test_multi_worker_fit.py",
}
FENCE = re.compile(
    r"(?P<not_run><!-- not run: [^\n]+ -->\n\n)?"
    r"^(?P<indent> *)```(?P<kind>python|pycon)\n(?P<code>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)
OUTPUT = re.compile(
    r"(?:<!-- numbers within (?P<percent>\d+) % -->\n\n)?^```text\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
# By name, the folders of real data that they are told of in the environment.
TUTORIALS = {
    "docs/tutorials/large_batch.md": {"CIFAR10": "cifar10-jpeg"},
    "docs/tutorials/bert.md": {},
    "docs/tutorials/own_optimizer.md": {},
    "docs/tutorials/custom_loop.md": {},
}
QUICK_TUTORIAL = "docs/tutorials/own_optimizer.md"


@dataclasses.dataclass(frozen=True)
class Block:
    line: int
    kind: str
    runs: bool
    code: str


def pages() -> list[str]:
    """The pages of the site, by their paths in the repository."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    nav = yaml.safe_load("nav:" + text.partition("\nnav:")[2])["nav"]

    def leaves(entry):
        if isinstance(entry, str):
            return [entry]
        values = entry.values() if isinstance(entry, dict) else entry
        return [leaf for value in values for leaf in leaves(value)]

    return leaves(nav)


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(
            text.count("\n", 0, found.start("kind")) + 2,
            found["kind"],
            found["not_run"] is None,
            found["code"],
        )
        for found in FENCE.finditer(text)
    ]


def pages_that_run() -> list[str]:
    return [p for p in pages() if p not in RUN_ELSEWHERE and any(b.runs for b in blocks(p))]


def test_every_fence_is_found():
    for page in pages():
        text = (ROOT / page).read_text(encoding="utf-8")
        fences = len(re.findall(r"^ *```py", text, re.MULTILINE))
        assert len(blocks(page)) == fences, page
        assert sum(not block.runs for block in blocks(page)) == text.count("<!-- not run:"), page
    assert pages_that_run() == [*NAMESPACES, *TUTORIALS]


def test_every_optimizer_has_a_page_with_every_section():
    sections = ["The update", "What it keeps and sends", "When not to use it"]
    sections += ["The paper, and what differs", "Reference"]
    for page in pages():
        if not page.startswith("docs/optimizers/") or page.endswith("index.md"):
            continue
        text = (ROOT / page).read_text(encoding="utf-8")
        title = text.partition("\n")[0].removeprefix("# ")
        assert re.findall(r"^## (.*)$", text, re.MULTILINE) == sections, page
        assert f"::: tf_lbopt.{title}\n" in text, page
        documentation = getattr(tf_lbopt, title).__doc__
        assert {"Args:", "Example:"} <= set(documentation.split()), page


def small_start(tmp_path, monkeypatch):
    """Of CIFAR-10 one micro-batch: five updates where the page has 240."""
    draw = np.random.default_rng(0)
    x, y = draw.integers(0, 256, [1024, 32, 32, 3], "uint8"), draw.integers(0, 10, [1024, 1])
    data = (x, y), (x[:64], y[:64])
    monkeypatch.setattr(keras.datasets.cifar10, "load_data", lambda: data)
    return {}


def small_batch_size(tmp_path, monkeypatch):
    """A linear model, and the checkpoint that the page goes on from."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=[16384, 4]).astype("float32")
    y = x @ np.ones([4, 1], "float32") + draw.normal(size=[16384, 1]).astype("float32")

    def build_and_compile(learning_rate):
        model = keras.Sequential([keras.Input([4]), keras.layers.Dense(1)])
        optimizer = tf_lbopt.SGD(learning_rate, gradient_accumulation_steps=2)
        model.compile(optimizer, "mse")
        optimizer.build(model.trainable_variables)
        return model

    model = build_and_compile(0.01)
    model.save_weights(tmp_path / "epoch_4.weights.h5")
    common = {"keras": keras, "tf": tf, "tf_lbopt": tf_lbopt}
    own = {"model": model, "build_and_compile": build_and_compile, "x_train": x, "y_train": y}
    return common | own


NAMESPACES = {
    "docs/start.md": small_start,
    "docs/mistakes.md": lambda tmp_path, monkeypatch: {},
    "docs/choose.md": lambda tmp_path, monkeypatch: {},
    "docs/batch_size.md": small_batch_size,
}


@pytest.mark.long
@pytest.mark.parametrize("page", NAMESPACES)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"} | NAMESPACES[page](tmp_path, monkeypatch)
    for block in blocks(page):
        if block.runs and block.kind == "python":
            # Tracebacks have the page's own line numbers.
            code = "\n" * (block.line - 1) + block.code
            exec(compile(code, str(ROOT / page), "exec"), namespace)
        elif block.runs:
            run_session(block, page, namespace)
    if page == "docs/start.md":
        assert int(namespace["optimizer"].iterations.numpy()) == 5


def run_session(block: Block, page: str, namespace: dict) -> None:
    test = doctest.DocTestParser().get_doctest(block.code, namespace, page, page, block.line)
    test.globs = namespace  # not a copy
    report: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        failed, _ = doctest.DocTestRunner().run(test, out=report.append, clear_globs=False)
    assert not failed, "".join(report)


@pytest.mark.parametrize("page", TUTORIALS)
@pytest.mark.quick(page=QUICK_TUTORIAL)
def test_a_tutorial_prints_what_it_shows(page, tmp_path, request):
    folders = TUTORIALS[page]
    if folders:
        data = request.getfixturevalue("shared_data")
        folders = {name: str(data / folder) for name, folder in folders.items()}
    lines: list[str] = []
    for block in blocks(page):
        # Tracebacks have the page's own line numbers.
        lines += [""] * (block.line - 1 - len(lines)) + block.code.splitlines()
    printed = run_program("\n".join(lines), tmp_path, 1200, **folders).stdout
    text = (ROOT / page).read_text(encoding="utf-8")
    shown = [
        (word, float(found["percent"] or 0) / 100)
        for found in OUTPUT.finditer(text)
        for word in found["text"].split()
    ]
    words = printed.split()
    wrong = [
        f"{word} in the place of {expected}"
        for word, (expected, tolerance) in zip(words, shown, strict=False)
        if not alike(word, expected, tolerance)
    ]
    assert not wrong, f"{wrong}\n{printed}"
    assert len(words) == len(shown), printed


def alike(word: str, expected: str, tolerance: float) -> bool:
    """Whether they are the same, or numbers whose distance is within a part of the one expected."""
    try:
        number, of_page = (float(w.strip(",%()[]").replace(",", "")) for w in (word, expected))
    except ValueError:
        return word == expected
    return word == expected or abs(number - of_page) <= tolerance * abs(of_page)
