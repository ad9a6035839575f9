"""What pyproject.toml can not express: the README without its links into the repository."""

import pathlib
import re

from setuptools import setup

_README = (pathlib.Path(__file__).parent / "README.md").read_text(encoding="utf-8")

setup(
    long_description=re.sub(r"\[([^\]]+)\]\((?!https?://|#)[^)]+\)", r"\1", _README),
    long_description_content_type="text/markdown",
)
