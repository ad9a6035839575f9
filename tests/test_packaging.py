"""What the built package says of itself, and what its source distribution has."""

import email
import pathlib
import re
import subprocess
import sys
import tarfile
from importlib import metadata

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def test_no_wheel_of_tensorflow_is_forced():
    plain = [line for line in metadata.requires("tf-lbopt") if "extra ==" not in line]
    assert sorted(re.split(r"[ <>=~!]", line)[0] for line in plain) == ["keras", "numpy"]
    extras = set(metadata.metadata("tf-lbopt").get_all("Provides-Extra"))
    assert extras == {"cpu", "gpu", "tpu", "tf-keras", "recipes", "dev"}


def test_every_link_of_the_description_works_on_a_package_index():
    description = metadata.metadata("tf-lbopt").get_payload()
    targets = re.findall(r"\]\(([^)]+)\)", description)
    assert "LARS" in description
    assert all(target.startswith(("https://", "#")) for target in targets), targets


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    subprocess.run(
        [sys.executable, "-m", "build", "--sdist", "--outdir", folder, ROOT],
        check=True,
        capture_output=True,
    )
    (path,) = folder.glob("*.tar.gz")
    return path


@pytest.mark.long
def test_source_distribution_has_what_its_tests_and_commands_need(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        (info,) = [name for name in archive.getnames() if re.fullmatch("[^/]+/PKG-INFO", name)]
        version = email.message_from_bytes(archive.extractfile(info).read())["Version"]
    assert version == metadata.version("tf-lbopt")
    tracked = {
        str(path.relative_to(ROOT))
        for folder in ("tests", "docs", "benchmarks", "tf_lbopt", "official_recipes")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix in (".py", ".md", ".yaml", ".png", ".jsonl")
    }
    tracked |= {"CHANGELOG.md", "Makefile", "constraints.txt", "pyproject.toml", "setup.py"}
    assert tracked <= names, sorted(tracked - names)
