"""Ending a training run on Ctrl-C without getting lost in TensorFlow.

Python raises ``KeyboardInterrupt`` wherever the main thread happens to be, be it in the middle of
tracing a graph, of a replica's step or of a callback from C++ that drops it. So while training
runs, a signal only leaves a request to stop, and training looks for it between two updates.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import NoReturn

STOPPING = "interrupted: stopping after what is in progress (Ctrl-C again stops at once)"
NO_RESULTS = "interrupted: no results were written"

_SHOW_CURSOR = "\x1b[?25h"


class Interrupted(KeyboardInterrupt):
    """Training was stopped by a signal, between two updates.

    Args:
        signal_number: The signal.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number

    @property
    def exit_code(self) -> int:
        """What a shell reports of a program that the signal ended: 130 for SIGINT."""
        return 128 + self.signal_number


class Interruption:
    """Whether a signal has asked for the end of training.

    Attributes:
        clean_up: What the end by `interruption`'s ``limit_s`` does before it, in another thread.
    """

    def __init__(self) -> None:
        self.clean_up: Callable[[], None] = lambda: None
        self._signal_number: int | None = None

    @property
    def signal_number(self) -> int | None:
        """The first signal that has come."""
        return self._signal_number

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self._signal_number is not None

    def check(self) -> None:
        """Ends training if a signal has come; called between two updates, in the main thread.

        Raises:
            Interrupted: A signal has come.
        """
        if self._signal_number is not None:
            raise Interrupted(self._signal_number)

    def _request(self, signal_number: int) -> None:
        if self._signal_number is None:
            self._signal_number = signal_number


@contextlib.contextmanager
def interruption(
    signals: Sequence[signal.Signals] = (signal.SIGINT,),
    last_words: str = NO_RESULTS,
    limit_s: float | None = None,
) -> Iterator[Interruption]:
    """Defers signals to the next :meth:`Interruption.check` while the block runs.

    The first signal prints a line to stderr, at once, and is remembered. The second, of whatever
    kind, ends the process at once, even while the main thread is inside TensorFlow: it prints
    ``last_words`` and leaves with 128 plus its number, without any clean-up. For both a thread of
    its own watches, since Python's handlers wait until the main thread is back in Python.

    At the end of the block the former handlers are in place again, and a signal that no ``check``
    has seen is raised. Signals that are ignored (as under ``nohup``) or handled outside Python
    stay so. Outside the main thread, where Python can not set handlers, nothing is deferred.

    Args:
        signals: What to defer.
        last_words: The line that the second signal prints.
        limit_s: After so many seconds the first signal does what the second does, after
            ``Interruption.clean_up`` (default: it never does).

    Yields:
        What the training has to ask.

    Raises:
        Interrupted: A signal has come during the block.
    """
    state = Interruption()
    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            _defer(state, signals, last_words, limit_s, stack)
        yield state
    state.check()


def run_program(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> NoReturn:
    """Runs a recipe's main function as a whole program, and ends the process.

    When a signal ends it, the last line on stderr says that there are no results and the exit code
    is 128 plus the signal's number. Nothing is torn down then: the destructor of a distributed
    dataset's iterator waits for threads of tf.data, one of which can sleep for up to a minute
    (seen with TensorFlow 2.20).

    Args:
        main: Takes the command line and returns the exit code.
        argv: The command line, program name first.
    """
    try:
        exit_code = main(argv)
    except KeyboardInterrupt as error:
        # At the end of this block the traceback's frames, and iterators in them, would be freed.
        _leave(error.exit_code if isinstance(error, Interrupted) else 128 + signal.SIGINT)
    sys.exit(exit_code)


def _leave(exit_code: int) -> NoReturn:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        print(NO_RESULTS, file=sys.stderr, flush=True)
    os._exit(exit_code)


def _defer(
    state: Interruption,
    signals: Sequence[int],
    last_words: str,
    limit_s: float | None,
    stack: contextlib.ExitStack,
) -> None:
    # Undone in reverse order: first the handlers, then the pipe, then the thread that reads it.
    numbers = [s for s in signals if signal.getsignal(s) not in (signal.SIG_IGN, None)]
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    watcher = threading.Thread(
        target=_watch,
        args=(reader, state, numbers, last_words, limit_s),
        name="interruption",
        daemon=True,
    )
    stack.callback(reader.close)
    watcher.start()
    stack.callback(watcher.join)
    stack.callback(writer.close)
    stack.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(writer.fileno()))

    def remember(number: int, frame: FrameType | None) -> None:
        del frame
        state._request(number)

    for number in numbers:
        stack.callback(signal.signal, number, signal.signal(number, remember))


def _watch(
    reader: socket.socket,
    state: Interruption,
    numbers: Sequence[int],
    last_words: str,
    limit_s: float | None,
) -> None:
    """Reads the numbers of signals as they come, until the other end is closed."""
    while received := reader.recv(1):
        if received[0] in numbers:
            break
    else:
        return
    state._request(received[0])
    with contextlib.suppress(OSError, ValueError):  # No stderr: still wait for the second.
        print(STOPPING, file=sys.stderr, flush=True)
    reader.settimeout(limit_s)
    try:
        while second := reader.recv(1):
            if second[0] in numbers:
                _die(128 + second[0], last_words)
    except TimeoutError:
        state.clean_up()
        _die(128 + received[0], last_words)


def _die(exit_code: int, last_words: str) -> NoReturn:
    # Past Python's own streams: another thread may be holding their locks.
    show_cursor = _SHOW_CURSOR if os.isatty(2) else ""  # A progress bar may have hidden it.
    with contextlib.suppress(OSError):
        os.write(2, f"{show_cursor}{last_words}\n".encode())
    os._exit(exit_code)
