"""Hooks of MkDocs: pages from outside docs/, what is filled in, math, and undocumented names."""

import html
import importlib
import pathlib
import re
from typing import Any

import latex2mathml.converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import tf_lbopt
import tf_lbopt.tf_keras
import tf_lbopt.tfm

ROOT = pathlib.Path(__file__).parents[2]
OUTSIDE = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("official_recipes/**/README.md"))),
    "official_recipes/quickstart/settings.py",  # a page links to it
]
PUBLIC_MODULES = [
    "tf_lbopt",
    "tf_lbopt.callbacks",
    "tf_lbopt.schedules",
    "tf_lbopt.distribution",
    "tf_lbopt.batch_size",
    "tf_lbopt.tf_keras",
    "tf_lbopt.tfm",
]
_MATH = re.compile(r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>', re.DOTALL)
_FILLED = re.compile(r"<!-- (facts|classes|configurations)(?:: (\w+))? -->")
_NOT_RUN = re.compile(r"<!-- not run: (.*?) -->")
_documented: dict[str, list[str]] = {}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Names pages by their paths in the repository, so that relative links work here and there."""
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
            files.append(
                _file(f"docs/{file.src_uri}", file.dest_uri, config, inclusion=file.inclusion)
            )
    for path in OUTSIDE:
        files.append(_file(path, _destination(path), config))
    return files


def _file(path: str, destination: str, config: MkDocsConfig, **options: Any) -> File:
    directory_urls = config.use_directory_urls
    return File(path, str(ROOT), config.site_dir, directory_urls, dest_uri=destination, **options)


def _destination(path: str) -> str:
    if path.endswith("README.md"):
        return f"{path.removesuffix('README.md')}index.html"
    return f"{path.removesuffix('.md').lower()}.html" if path.endswith(".md") else path


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Fills in what is made of the package's tables; says what the tests do not run."""
    markdown = _NOT_RUN.sub(r"*Not run by the tests: \1.*", markdown)
    return _FILLED.sub(lambda found: globals()[f"_{found[1]}"](found[2]), markdown)


def _facts(name: str) -> str:
    """What an optimizer keeps, and what of the replicas' gradients is reduced."""
    (info,) = [each for each in tf_lbopt.list_optimizers() if each.cls.__name__ == name]
    keeps = ", ".join(f"`{slot}`" for slot in info.slots) or "nothing"
    sends = "the mean gradient"
    if info.statistics:
        sends += ", and of the sub-batches: " + ", ".join(f"`{s}`" for s in info.statistics)
    return (
        f"- **Keeps**, for each trainable variable: {keeps}.\n"
        f"- **Reduces** over replicas: {sends}.\n"
        f"- Name in `list_optimizers()` and of the recipes' flag: `{info.name}`."
    )


def _classes(_: None) -> str:
    """A row for each class for tf_keras."""
    return _rows(
        (f"tf_lbopt.tf_keras.{name}", name, f"[`{name}`][tf_lbopt.{name}]")
        for name in tf_lbopt.tf_keras.CLASSES
    )


def _configurations(_: None) -> str:
    """A row for each configuration for tf-models-official."""
    return _rows(
        (f"tf_lbopt.tfm.{row.config.__name__}", row.config.__name__, f"`{key}`")
        for key, row in tf_lbopt.tfm.REGISTRATIONS.items()
    )


def _rows(rows: Any) -> str:
    return "\n".join(
        f'| <code id="{identifier}" class="doc-name">{name}</code> | {text} |'
        for identifier, name, text in rows
    )


def on_page_content(content: str, page: Page, **kwargs: Any) -> str:
    """Math as MathML, which browsers draw by themselves; notes what a page documents."""
    for name in set(re.findall(r'id="(tf_lbopt\.[\w.]+)"', content)):
        _documented.setdefault(name, []).append(page.file.src_uri)
    return _MATH.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    display = "block" if found[1] == "div" else "inline"
    latex = html.unescape(found[2])
    # The converter knows `aligned`, which code hosts know, by its other name only.
    made = latex2mathml.converter.convert(latex.replace("{aligned}", "{split}"), display=display)
    if "\\" in made or "<mi>&</mi>" in made:
        raise PluginError(f"Math that latex2mathml does not know: {latex}")
    return made


def on_env(env: Any, **kwargs: Any) -> Any:
    """Raises where a public name is on no page, or on several."""
    wrong = {}
    for module in PUBLIC_MODULES:
        for name in _public_names(module):
            pages = _documented.get(f"{module}.{name}", [])
            if len(pages) != 1:
                wrong[f"{module}.{name}"] = pages
    _documented.clear()
    if wrong:
        lines = [f"  {name}: {', '.join(pages) or 'no page'}" for name, pages in wrong.items()]
        raise PluginError("Public names must be on one page each:\n" + "\n".join(lines))
    return env


def _public_names(module: str) -> list[str]:
    """What a module exports, without its modules and the version."""
    room = importlib.import_module(module)
    names = getattr(room, "__all__", None) or [
        name
        for name, value in vars(room).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module
    ]
    modules = {each.rpartition(".")[2] for each in PUBLIC_MODULES}
    return [name for name in names if name not in modules and name != "__version__"]
