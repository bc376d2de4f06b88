"""Commands run in forked processes, which start at once since all modules are loaded."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import NoReturn

_LONGEST = 300  # seconds


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        status: Its exit status; ``None`` if it was killed.
        errors: Lines that it wrote to standard error.
        seconds: How long it ran.
    """

    status: int | None
    errors: tuple[str, ...]
    seconds: float

    @property
    def messages(self) -> list[str]:
        """The lines that say why it failed, and those that no failure may write."""
        return [line for line in self.errors if line.startswith(("routehead: ", "Traceback"))]


def run_command(
    arguments: Sequence[str], *, kill_after: float | None = None, largest_file: int | None = None
) -> Ended:
    """Run a command of `routehead` to its end, or kill it.

    Args:
        arguments: The command line behind the program's name.
        kill_after: Seconds after which it is killed by SIGKILL.
        largest_file: No file may become larger, in bytes.
    """
    return run_forked(lambda: _routehead(arguments, largest_file), kill_after=kill_after)


def run_forked(program: Callable[[], object], *, kill_after: float | None = None) -> Ended:
    """Run a function in a forked process; the status is that of its `SystemExit`, or 0.

    The caller has one thread, and torch uses one.
    """
    reading, writing = os.pipe()
    start = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _run_child(program, writing)
    os.close(writing)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)  # no process is gone before it has been waited for
    with os.fdopen(reading, "rb") as stream:
        errors = stream.read().decode(errors="replace").splitlines()
    _, code = os.waitpid(pid, 0)
    status = os.WEXITSTATUS(code) if os.WIFEXITED(code) else None
    return Ended(status, tuple(errors), time.perf_counter() - start)


def _run_child(program: Callable[[], object], errors: int) -> NoReturn:
    """Run a function with standard error sent into a pipe, and end the process."""
    status = 70
    signal.alarm(_LONGEST)  # one that waits forever is killed
    try:
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor, target in enumerate((nothing, nothing, errors)):
            os.dup2(target, descriptor)
        os.close(errors)
        # The old streams remember whether they were files.
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
        status = _status_of(program)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _status_of(program: Callable[[], object]) -> int:
    try:
        program()
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except BaseException as error:  # noqa: BLE001 - a traceback of the caller would be lost
        sys.stderr.write(f"Traceback: {error!r}\n")
        return 70
    return 0


def _routehead(arguments: Sequence[str], largest_file: int | None) -> None:
    sys.argv = ["routehead", *arguments]
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    (program,) = entry_points(group="console_scripts", name="routehead")
    program.load()()
