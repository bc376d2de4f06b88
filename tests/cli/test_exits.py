"""How the program ends: its exit status, and the one line that it prints."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from routehead_plugins.cli import exits
from routehead_plugins.cli.exits import DEBUG, StoppedError, exit_status
from routehead_plugins.errors import CollectionError, InputError

# Like the program, with a command that does what the test says.
PROGRAM = """
import os, sys, signal
from routehead_plugins.cli import main as program
from routehead_plugins.cli.runtime import progress, resumable
@program.app.command()
def act():
    {body}
sys.argv = ["routehead", "act"]
program.main()
"""


def raising(error: BaseException) -> Callable[[], None]:
    def program() -> None:
        raise error

    return program


def run(
    body: str, *shell: str, stdout: IO[str] | int = subprocess.PIPE, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*shell, sys.executable, "-c", PROGRAM.format(body=body)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (InputError("--hits=0 must be 1\nor more."), 2, "--hits=0 must be 1 or more."),
        (CollectionError("c:3: no JSON."), 2, "c:3: no JSON."),
        (MemoryError(), 1, exits._NO_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), 1, exits._NO_MEMORY),
        (RecursionError("maximum"), 1, "an input is nested too deeply; flatten it."),
        (
            PermissionError(errno.EACCES, "Permission denied", "/x/y"),
            1,
            "/x/y: Permission denied; check the path and its permissions.",
        ),
        (
            KeyError("head"),
            1,
            "unexpected KeyError: 'head'; this is a bug: please report it with the traceback that "
            "ROUTEHEAD_DEBUG=1 shows.",
        ),
        (StoppedError(), 130, "stopped."),
        (KeyboardInterrupt(), 130, "stopped."),
    ],
)
def test_every_error_has_a_status_and_one_line(
    capsys: pytest.CaptureFixture[str], error: BaseException, status: int, message: str
) -> None:
    assert exit_status(raising(error)) == status
    assert capsys.readouterr() == ("", f"routehead: {message}\n")


def test_a_full_disk_is_named_with_the_folder_of_temporary_files(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert exit_status(raising(OSError(errno.ENOSPC, "No space left on device"))) == 1
    message = capsys.readouterr().err
    assert message.startswith("routehead: No space left on device; free some space, also in ")
    assert message.count("\n") == 1


def test_a_reader_of_a_pipe_that_has_gone_ends_it_silently(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert exit_status(raising(BrokenPipeError(errno.EPIPE, "Broken pipe"))) == 141
    assert capsys.readouterr() == ("", "")


def test_exit_statuses_of_the_program_itself_are_kept() -> None:
    assert [exit_status(raising(SystemExit(code))) for code in (None, 0, 2, "text")] == [0, 0, 2, 1]


def test_tracebacks_are_shown_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEBUG, "1")
    with pytest.raises(InputError):
        exit_status(raising(InputError("no")))


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (0, "stopped."),
        (1, "stopped; what is done is kept: run the same command again to resume."),
    ],
)
def test_ctrl_c_says_whether_the_job_can_be_resumed(kept: int, message: str) -> None:
    done = run(
        # A job that a shell runs in the background would ignore the signal.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "    with resumable() as keep, progress('x', 2, keep) as advance:\n"
        f"        [advance() for _ in range({kept})]\n"
        f"        os.kill(os.getpid(), {int(signal.SIGINT)})"
    )
    assert done.returncode == 130
    assert done.stderr.endswith(f"routehead: {message}\n")
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_output_that_cannot_be_written_ends_in_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = run("print('figures')", stdout=full)
    assert done.returncode == 1
    assert done.stderr.startswith("routehead: No space left on device;")
    assert done.stderr.count("\n") == 1


def test_closed_streams_and_poor_encodings_are_no_trouble(tmp_path: Path) -> None:
    closed = ("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh")
    path = tmp_path / "new"
    done = run(f"print('x'); open({str(path)!r}, 'w').write('kept')", *closed)
    assert (done.returncode, path.read_text()) == (0, "kept")
    done = run("print('r\\u00f4le \\ud800')", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert (done.returncode, done.stdout) == (0, "r\\xf4le \\ud800\n")
