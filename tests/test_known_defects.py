"""Runs the snippets of docs/known_defects.md: the page must not outlive the defects.

A snippet is a Python fence after a comment ``<!-- run: what shows the defect -->``, with a fence of
its whole output behind it; ``run quick`` also runs it among the quick tests. A failure here after
an upgrade of Keras or TensorFlow may be good news: a defect was mended upstream.
"""

import dataclasses
import pathlib
import re

import pytest
from helpers_programs import run_program

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "known_defects.md"
SNIPPET = re.compile(
    r"<!-- run(?P<quick> quick)?: (?P<defect>[^\n]+) -->\n\n"
    r"```python\n(?P<code>.*?)```\n\n"
    r"```text\n(?P<output>.*?)```\n",
    re.DOTALL,
)
TIMEOUT_SECONDS = 300


@dataclasses.dataclass(frozen=True)
class Snippet:
    title: str
    quick: bool
    defect: str
    code: str
    output: str


def snippets(text: str) -> list[Snippet]:
    """The marked snippets of a page, each under the title of its section."""
    found = []
    for section in re.split(r"^### ", text, flags=re.MULTILINE)[1:]:
        title = section.partition("\n")[0]
        found += [
            Snippet(
                title, match["quick"] is not None, match["defect"], match["code"], match["output"]
            )
            for match in SNIPPET.finditer(section)
        ]
    return found


def parameters() -> list:
    return [
        pytest.param(snippet, id=snippet.title, marks=() if snippet.quick else pytest.mark.long)
        for snippet in snippets(PAGE.read_text(encoding="utf-8"))
    ]


def test_every_python_fence_is_a_snippet():
    """A misspelt marker would silently leave a snippet out."""
    text = PAGE.read_text(encoding="utf-8")
    found = snippets(text)
    assert len(found) == text.count("```python") == text.count("<!-- run")
    assert sum(snippet.quick for snippet in found) == 2
    assert all(snippet.defect in snippet.output for snippet in found)


@pytest.mark.parametrize("snippet", parameters())
def test_snippet(snippet, tmp_path):
    done = run_program(snippet.code, tmp_path, TIMEOUT_SECONDS)
    assert snippet.defect in done.stdout, (
        f"the defect does not show; mended upstream?\n{done.stdout}\n{done.stderr[-3000:]}"
    )
    missing = [line for line in snippet.output.splitlines() if line not in done.stdout]
    assert not missing, f"missing in the output: {missing}\n{done.stdout}"
