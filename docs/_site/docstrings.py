"""An extension of griffe: docstrings and signatures as the imported package has them.

mkdocstrings reads the sources; the package completes docstrings and makes signatures when it is
imported.
"""

import importlib
import inspect
import re
from typing import Any

import griffe

_KINDS = {
    inspect.Parameter.POSITIONAL_OR_KEYWORD: griffe.ParameterKind.positional_or_keyword,
    inspect.Parameter.VAR_POSITIONAL: griffe.ParameterKind.var_positional,
    inspect.Parameter.KEYWORD_ONLY: griffe.ParameterKind.keyword_only,
    inspect.Parameter.VAR_KEYWORD: griffe.ParameterKind.var_keyword,
}


def for_markdown(docstring: str) -> str:
    """A docstring with the titles of sections that griffe knows."""
    text = inspect.cleandoc(docstring)
    text = text.replace("\nArgs:\n    None.\n", "")
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    # What is no section of griffe's becomes an admonition: a paragraph is enough.
    return re.sub(r"^References:\n((?:    .*\n?)+)", _references, text, flags=re.MULTILINE)


def _references(found: re.Match[str]) -> str:
    return "**References:** " + " ".join(found[1].split()) + "\n"


class Runtime(griffe.Extension):
    """Takes docstrings of all objects, and signatures of classes, from the imported package."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """A docstring as the site shows it; called by griffe for each object."""
        if obj.docstring is not None:
            obj.docstring.value = for_markdown(obj.docstring.value)

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """The docstring and the signature of a class; called by griffe for each class."""
        try:
            runtime = getattr(importlib.import_module(cls.module.path), cls.name)
        except (ImportError, AttributeError):  # a class in a function, or for type checkers
            return
        own = vars(runtime)
        if own.get("__doc__"):
            cls.docstring = griffe.Docstring(for_markdown(own["__doc__"]), parent=cls)
        if "__signature__" in own:
            made = griffe.Function(
                "__init__",
                parameters=griffe.Parameters(
                    griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword),
                    *map(_parameter, own["__signature__"].parameters.values()),
                ),
            )
            cls.set_member("__init__", made)


def _parameter(parameter: inspect.Parameter) -> griffe.Parameter:
    has_default = parameter.default is not inspect.Parameter.empty
    return griffe.Parameter(
        parameter.name,
        kind=_KINDS[parameter.kind],
        default=repr(parameter.default) if has_default else None,
    )
