"""Worker processes that train together, as `TF_CONFIG` tells each."""

import contextlib
import json
import os
import socket
import subprocess
import time
from pathlib import Path

from forked_python import python

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 300


def config_of(jobs: dict[str, list[str]], job: str, index: int) -> str:
    """The value of `TF_CONFIG` for one of the tasks."""
    return json.dumps({"cluster": jobs, "task": {"type": job, "index": index}})


def free_hosts(number: int) -> list[str]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("localhost", 0))
        return [f"localhost:{each.getsockname()[1]}" for each in sockets]


class Workers:
    """Processes that are killed at the end of the block; what they print goes to files.

    Args:
        folder: For the files.
        name: Theirs begin with it.
        commands: Of each worker, the arguments for Python.
    """

    def __init__(self, folder: Path, name: str, commands: list[list[str]]):
        self.files = [folder / f"{name}-{index}" for index in range(len(commands))]
        hosts = {"worker": free_hosts(len(commands))}
        self.processes = []
        for index, (file, command) in enumerate(zip(self.files, commands, strict=True)):
            with (
                file.with_suffix(".out").open("w") as out,
                file.with_suffix(".err").open("w") as err,
            ):
                self.processes.append(
                    subprocess.Popen(
                        [*python(), "-u", *command],
                        cwd=ROOT,
                        env={**os.environ, "TF_CONFIG": config_of(hosts, "worker", index)},
                        stdout=out,
                        stderr=err,
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()

    def said(self, index: int, stream: str = "out") -> str:
        return self.files[index].with_suffix(f".{stream}").read_text()

    def wait_for(self, text: str) -> None:
        """Until the chief has printed it."""
        end = time.monotonic() + LIMIT_S
        while text not in self.said(0):
            assert time.monotonic() < end, self.said(0) + self.said(0, "err")
            assert all(process.poll() is None for process in self.processes), self.errors()
            time.sleep(0.05)

    def errors(self) -> str:
        return "\n".join(self.said(index, "err")[-3000:] for index in range(len(self.files)))

    def exit_codes(self) -> list[int]:
        return [process.wait(LIMIT_S) for process in self.processes]
