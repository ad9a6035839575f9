"""What the tests of several benchmarks have in common."""

import importlib
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[1]


def assert_bad_flag_ends_in_one_line(benchmark, flag, arguments, monkeypatch, capsys):
    """In this process: a program of its own takes longest to import TensorFlow."""
    monkeypatch.chdir(ROOT)
    program = importlib.import_module(f"benchmarks.{benchmark}")
    assert program.main([benchmark, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"--{flag}: expected ")
    assert error.count("\n") == 1
