"""Every command line of a recipe that a page shows is one that the program takes.

Flags, names of configurations and overridden fields; data are not needed. What the commands do is
tested elsewhere, or was seen once, as `official_recipes/README.md` says.
"""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from official_recipes.common import keras_program, tfm_training

pytestmark = pytest.mark.usefixtures("quick_configurations")

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("official_recipes/**/*.md")]
NAMES = {
    "$data": "data",
    "$length": "128",
    "<new folder>": "new",
    "<run>": "run",
    "/shared/": "shared/",
    "gs://": "",
}


class _TakenError(Exception):
    """The command line was taken."""


def _commands():
    for page in sorted(PAGES):
        number = 0
        for block in re.findall(r"^```bash\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S):
            text = block.replace("\\\n", "")
            for name, value in NAMES.items():
                text = text.replace(name, value)
            text = re.sub(r"<[^>\n]*>", "placeholder", text)
            for program, arguments in re.findall(
                r"python -m official_recipes\.(\S+)([^\n;&]*)", text
            ):
                if arguments.count("'") % 2:  # of the shell that the command is given to
                    arguments = arguments.rstrip().removesuffix("'")
                number += 1
                where = f"{page.relative_to(ROOT)}, {number}: {program}"
                yield pytest.param(program, shlex.split(arguments, comments=True), id=where)


COMMANDS = list(_commands())


def _stop_after(monkeypatch, module, name):
    function = getattr(module, name)

    def stopped(*args, **kwargs):
        function(*args, **kwargs)
        raise _TakenError

    monkeypatch.setattr(module, name, stopped)


def test_commands_are_found():
    programs = {command.values[0] for command in COMMANDS}
    assert "quickstart" in programs
    for recipe in ("resnet50", "bert", "dlrm"):
        assert {f"{recipe}.prepare_data", f"{recipe}.train"} <= programs
    assert {"cifar.train", "wikitext2.train", "multi30k.train"} <= programs


@pytest.mark.parametrize(("program", "arguments"), COMMANDS)
def test_is_taken(program, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TF_CONFIG", raising=False)
    Path("run").mkdir()
    Path("run", "params.yaml").write_text("{}\n")
    name = f"{program}.__main__" if program == "quickstart" else program
    module = importlib.import_module(f"official_recipes.{name}")
    if program.endswith("prepare_data"):
        _stop_after(monkeypatch, module, "parse_unless_help")
    elif program == "quickstart":
        _stop_after(monkeypatch, module, "parse_options")
    elif program == "dlrm.train":  # Its experiments need another Keras than this process has.
        _stop_after(monkeypatch, tfm_training, "parse_options")
    elif program in ("resnet50.train", "bert.train"):
        _stop_after(monkeypatch, tfm_training, "parse_params")
    else:
        _stop_after(monkeypatch, keras_program, "parse_training_flags")
    try:
        module.main([program, *arguments])
    except _TakenError:
        return
    pytest.fail(capsys.readouterr().err)
