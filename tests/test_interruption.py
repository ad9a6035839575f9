"""Signals during training: the first waits for a safe point, the second does not wait."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from official_recipes.common.interruption import (
    NO_RESULTS,
    STOPPING,
    Interrupted,
    interruption,
)

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends signals")


@pytest.fixture(autouse=True)
def _default_handlers():
    """Handlers as a program has them that was not started in the background."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


# SIGINT is ignored by what a shell starts in the background, and so by its children.
PREAMBLE = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from official_recipes.common.interruption import interruption, run_program
assert "tensorflow" not in sys.modules
"""


class Program:
    """A Python program that says "ready" on stdout; its stderr is read line by line."""

    def __init__(self, script, **streams):
        self.process = subprocess.Popen(
            [sys.executable, "-c", PREAMBLE + script],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **streams,
        )

    def __enter__(self):
        assert self.process.stdout.readline() == "ready\n", self.process.stderr.read()
        return self

    def __exit__(self, *exc_info):
        self.process.kill()
        self.process.communicate()

    def send(self, number=signal.SIGINT):
        self.process.send_signal(number)

    def line(self):
        return self.process.stderr.readline().rstrip("\n")

    def finish(self):
        """Exit code, and what was left on stdout and stderr."""
        output, errors = self.process.communicate(timeout=30)
        return self.process.returncode, output, errors


def wakeup_fd():
    former = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(former)
    return former


# -- the first signal ------------------------------------------------------------------------------


def test_waits_for_the_check(capsys):
    done = []
    with pytest.raises(Interrupted) as caught, interruption() as interrupted:  # noqa: PT012
        interrupted.check()
        assert not interrupted.requested
        signal.raise_signal(signal.SIGINT)
        done.append("update")
        assert interrupted.requested
        interrupted.check()
        done.append("next update")
    assert done == ["update"]
    assert isinstance(caught.value, KeyboardInterrupt)
    assert caught.value.exit_code == 130
    assert capsys.readouterr().err == STOPPING + "\n"


def test_is_not_lost_without_a_check():
    done = []
    with pytest.raises(Interrupted), interruption():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        done.append("the rest")
    assert done == ["the rest"]


def test_no_signal(capsys):
    with interruption() as interrupted:
        interrupted.check()
    assert not interrupted.requested
    assert capsys.readouterr().err == ""


def test_another_error_is_not_replaced():
    with pytest.raises(ZeroDivisionError), interruption():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        1 / 0  # noqa: B018


def test_line_is_printed_while_the_main_thread_is_elsewhere():
    # Without the GIL, as in a training step, and longer than the test waits.
    script = """
import hashlib
with interruption():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""
    with Program(script) as program:
        program.send()
        assert program.line() == STOPPING
        assert program.process.poll() is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_program_ends_after_the_update(number):
    script = """
def main(argv):
    with interruption([signal.SIGINT, signal.SIGTERM]) as interrupted:
        print("ready", flush=True)
        for update in range(10**6):
            time.sleep(0.05)
            print("half", end=" ")
            time.sleep(0.05)
            print("whole", flush=True)
            interrupted.check()
run_program(main, [])
"""
    with Program(script) as program:
        assert program.process.stdout.readline() == "half whole\n"
        program.send(number)
        code, output, errors = program.finish()
    assert code == 128 + number
    assert errors.splitlines() == [STOPPING, NO_RESULTS]
    assert output == "" or output.endswith("half whole\n")


# -- the second signal -----------------------------------------------------------------------------

DEAF = {
    # KeyboardInterrupt would have no effect in either.
    "in C": "hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)",
    "swallowing": "signal.signal(signal.SIGINT, lambda *_: None)\n    while True: time.sleep(0.1)",
}


@pytest.mark.parametrize("work", DEAF.values(), ids=DEAF)
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_second_signal_ends_the_process(work, second):
    script = f"""
import hashlib
with interruption([signal.SIGINT, signal.SIGTERM], last_words="gone"):
    print("ready", flush=True)
    {work}
"""
    with Program(script) as program:
        program.send()
        assert program.line() == STOPPING
        program.send(second)
        code, _, errors = program.finish()
    assert code == 128 + second
    assert errors == "gone\n"


def test_last_words_by_default():
    script = """
with interruption():
    print("ready", flush=True)
    while True:
        time.sleep(0.1)
"""
    with Program(script) as program:
        program.send()
        assert program.line() == STOPPING
        program.send()
        code, _, errors = program.finish()
    assert code == 130
    assert errors == NO_RESULTS + "\n"


# -- a limit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("work", DEAF.values(), ids=DEAF)
def test_preparation_ends_at_its_limit(tmp_path, work):
    """Where no check comes, and with nothing left of what was half written."""
    script = f"""
import hashlib
from pathlib import Path
from official_recipes.common import output_folder
from official_recipes.common.output_folder import exit_code_of, writing
output_folder._LIMIT_S = 0.2
def prepare():
    with writing(Path({str(tmp_path / "out")!r})) as (partial, progress, stop):
        (partial / "half").write_text("half")
        print("ready", flush=True)
        {work.replace("    ", "        ")}
sys.exit(exit_code_of(prepare))
"""
    with Program(script) as program:
        assert (tmp_path / ".out.partial" / "half").exists()
        program.send(signal.SIGTERM)
        assert program.line() == STOPPING
        code, _, errors = program.finish()
    assert code == 143
    assert errors == "interrupted: nothing was written\n"
    assert not list(tmp_path.iterdir())


def test_a_check_within_the_limit(capsys):
    with pytest.raises(Interrupted), interruption(limit_s=60) as interrupted:  # noqa: PT012
        interrupted.clean_up = lambda: os._exit(1)
        signal.raise_signal(signal.SIGINT)
        interrupted.check()
    assert capsys.readouterr().err == STOPPING + "\n"


# -- which signals ---------------------------------------------------------------------------------


def test_signals_are_an_argument(capsys):
    former = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as caught, interruption([signal.SIGTERM]) as interrupted:  # noqa: PT012
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert not interrupted.requested
        signal.raise_signal(signal.SIGTERM)
        interrupted.check()
    assert caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is former
    assert capsys.readouterr().err == STOPPING + "\n"


def test_an_ignored_signal_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interruption() as interrupted:
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        signal.raise_signal(signal.SIGINT)
        interrupted.check()
    assert not interrupted.requested


def test_other_signals_do_not_count(capsys):
    former = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with interruption() as interrupted:
            for _ in range(3):
                signal.raise_signal(signal.SIGUSR1)
            interrupted.check()
    finally:
        signal.signal(signal.SIGUSR1, former)
    assert capsys.readouterr().err == ""


# -- before and after ------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [None, ZeroDivisionError, KeyboardInterrupt])
def test_everything_is_as_before(error):
    def handler(number, frame):
        raise AssertionError

    signal.signal(signal.SIGINT, handler)
    threads = threading.active_count()
    expected = contextlib.nullcontext() if error is None else pytest.raises(error)
    with expected, interruption():
        assert signal.getsignal(signal.SIGINT) is not handler
        assert wakeup_fd() != -1
        if error is not None:
            raise error
    assert signal.getsignal(signal.SIGINT) is handler
    assert wakeup_fd() == -1
    assert threading.active_count() == threads


def test_outside_the_main_thread_nothing_is_deferred():
    seen = []

    def work():
        with interruption() as interrupted:
            seen.append((signal.getsignal(signal.SIGINT), threading.active_count()))
            interrupted.check()

    thread = threading.Thread(target=work)
    threads = threading.active_count()
    thread.start()
    thread.join()
    assert seen == [(signal.default_int_handler, threads + 1)]


# -- the whole program -----------------------------------------------------------------------------


def run(script):
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + script],
        cwd=ROOT, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_interrupted_outside_training():
    script = """
def main(argv):
    print("output", end="")
    signal.raise_signal(signal.SIGINT)
run_program(main, [])
"""
    assert run(script) == (130, "output", NO_RESULTS + "\n")


def test_nothing_is_torn_down_after_an_interruption():
    # Neither what the interpreter's end waits for nor what the traceback's frames hold.
    script = """
import atexit, threading
class Slow:
    def __del__(self):
        time.sleep(60)
def main(argv):
    slow = Slow()
    atexit.register(time.sleep, 60)
    threading.Thread(target=time.sleep, args=[60]).start()
    raise KeyboardInterrupt
run_program(main, [])
"""
    assert run(script) == (130, "", NO_RESULTS + "\n")


@pytest.mark.parametrize("exit_code", [0, 2])
def test_without_interruption_the_program_ends_as_usual(exit_code):
    script = f"""
import atexit
atexit.register(print, "the end")
run_program(lambda argv: print(argv) or {exit_code}, ["name", "--flag"])
"""
    assert run(script) == (exit_code, "['name', '--flag']\nthe end\n", "")


def test_recipes_on_tf_models_print_their_lines_at_once():
    script = """
from official_recipes.common import tfm_training
def main(argv):
    print("ready")
    sys.stdin.readline()
    return 3
tfm_training.run_program(main, [])
"""
    with Program(script, stdin=subprocess.PIPE) as program:
        assert program.finish() == (3, "", "")


def test_an_error_ends_the_program_as_usual():
    code, _, errors = run("run_program(lambda argv: 1 / 0, [])")
    assert code == 1
    assert "ZeroDivisionError" in errors
    assert NO_RESULTS not in errors
