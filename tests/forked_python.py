"""Programs of tests as forks of one process that has imported TensorFlow and Keras.

To import them takes longer than most of these programs. `python()` stands for `sys.executable` in
the command of a program: the process that the command starts hands its arguments, environment,
folder and streams to a server, passes signals on, and ends as the fork ends that the server makes.
The package itself is imported anew by each program.
"""

import contextlib
import functools
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import warnings

_SOCKET = "TF_LBOPT_TESTS_SOCKET"
_used = False
_FORWARDED = (signal.SIGINT, signal.SIGTERM)


def use(shared: bool = False) -> None:
    """Has `python` give forks from now on; `make test` does, `make test-all` starts all anew.

    Args:
        shared: Whether the processes that this one starts use its server (default: the server is
            started when a first program needs it).
    """
    global _used
    _used = sys.platform == "linux"  # elsewhere TensorFlow may have threads before the fork
    if _used and shared and _SOCKET not in os.environ:
        os.environ[_SOCKET] = _client()[-1]


def python() -> list[str]:
    """The beginning of a command, before ``-m``, ``-c`` or a file."""
    return list(_client()) if _used else [sys.executable]


@functools.cache
def _client() -> tuple[str, ...]:
    if _SOCKET in os.environ:
        return sys.executable, "-I", "-S", __file__, os.environ[_SOCKET]
    path = os.path.join(tempfile.mkdtemp(prefix="forked_python_"), "socket")
    own = {"TF_CPP_MIN_LOG_LEVEL": "3", "KERAS_BACKEND": "tensorflow", "CUDA_VISIBLE_DEVICES": ""}
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TF_CONFIG")}
    server = subprocess.Popen(
        [sys.executable, __file__, "serve", path],
        env={**inherited, **own},
        stdin=subprocess.PIPE,  # closed when this process ends, and then the server ends
        stdout=subprocess.PIPE,
    )
    assert server.stdout is not None
    assert server.stdout.readline() == b"listening\n"
    _client.server = server  # type: ignore[attr-defined]  # keeps the pipe open
    return sys.executable, "-I", "-S", __file__, path


# -- in the process that a test starts -------------------------------------------------------------


def _ask(path: str, arguments: list[str]) -> None:
    """Has the server run a program, and ends as that does."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    for number in _FORWARDED:
        signal.signal(number, lambda number, _: connection.send(bytes([number])))
    request = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
    socket.send_fds(connection, [b"\0"], [0, 1, 2])
    connection.sendall(json.dumps(request).encode() + b"\n")
    code = int(connection.makefile().readline())
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


# -- in the server ---------------------------------------------------------------------------------


def _fork() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which wait for work
        return os.fork()


def _serve(path: str) -> list[str]:
    """Waits for requests; returns only in forks, with the arguments that Python has there."""
    import gc
    import select

    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen(64)
    os.write(1, b"listening\n")
    import keras  # noqa: F401
    import tensorflow as tf

    # As in the tests' own process: see conftest.py.
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    tf.config.threading.set_intra_op_parallelism_threads(1)
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        ready, _, _ = select.select([listening, 0], [], [])
        if 0 in ready:  # The tests have ended.
            os.unlink(path)
            os.rmdir(os.path.dirname(path))
            os._exit(0)
        connection, _ = listening.accept()
        if _fork():
            connection.close()
            continue
        listening.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _, streams, _, _ = socket.recv_fds(connection, 1, 3)
        request = json.loads(connection.makefile().readline())
        if child := _fork():
            _watch(connection, child)
        connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        return request["arguments"]


def _watch(connection: socket.socket, child: int) -> None:
    """Passes signals on to a program, kills it where nobody waits for it, and says how it ended."""

    def pass_on() -> None:
        with contextlib.suppress(ProcessLookupError):
            while number := connection.recv(1):
                os.kill(child, number[0])
            os.kill(child, signal.SIGKILL)

    threading.Thread(target=pass_on, daemon=True).start()
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def _run(arguments: list[str]) -> None:
    """What Python does with its arguments."""
    unbuffered = arguments[0] == "-u"
    kind, *rest = arguments[unbuffered:]
    sys.stdout.reconfigure(write_through=unbuffered)
    paths = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    first = os.getcwd() if kind == "-m" else "" if kind == "-c" else os.path.dirname(kind)
    sys.path[:] = [first, *paths, *sys.path[1:]]
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [kind, *rest]
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        _run(_serve(sys.argv[2]))
    else:
        _ask(sys.argv[1], sys.argv[2:])
