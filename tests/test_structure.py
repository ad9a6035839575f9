"""How far it is from `apply` to a formula, and how much of the package one update calls."""

import pathlib

import mutants

import tf_lbopt
from benchmarks.structure import traced

PACKAGE = pathlib.Path(tf_lbopt.__file__).parent


def test_calls_and_frames_of_a_traced_update():
    calls, frames = traced(tf_lbopt.LAMB(0.1, weight_decay=0.01), PACKAGE, "adam")
    assert frames[0] == "apply"
    assert frames[-1] == "adam"
    assert len(frames) <= 7, frames
    assert calls <= 90


def test_mutants_break_what_is_there():
    for mutant in mutants.MUTANTS:
        assert (PACKAGE / mutant.file).read_text().count(mutant.old) == 1, mutant.name
