"""How the program ends: an exit status, and one line for every trouble that can be expected."""

from __future__ import annotations

import errno
import io
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress

import typer

from routehead_plugins.errors import RouteHeadError
from routehead_plugins.files import show_path

EXIT_STATUSES = (
    "Exit status: 0 done; 1 the machine failed (no memory, a broken disk), or a bug; 2 arguments, "
    "files or the LLM cannot be used, or an output cannot be written; 130 stopped by Ctrl-C; 141 "
    "the reader of a pipe has gone."
)
"""The end of ``routehead --help``."""

DEBUG = "ROUTEHEAD_DEBUG"
"""Environment variable that turns messages of one line back into tracebacks."""

_NO_MEMORY = (
    "not enough memory; give fewer --hits, a smaller --max-doc-tokens, a smaller --document-cache, "
    "or a smaller LLM."
)


class StoppedError(Exception):
    """A command was stopped by Ctrl-C; the message, if any, says what is left of it."""


def exit_status(program: Callable[[], object]) -> int:
    """Run a program to its end, and report in one line on standard error what stopped it.

    Args:
        program: The program; it may raise anything.

    Returns:
        The exit status; see ``EXIT_STATUSES``.

    Raises:
        Exception: What the program raised, if the environment variable ``DEBUG`` is set.
        KeyboardInterrupt: The same.
    """
    try:
        status = _status_of(program)
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get(DEBUG) and not isinstance(error, BrokenPipeError):
            raise
        status, message = _explain(error)
        if message:
            # A message that cannot be shown is not worth a second error.
            with suppress(OSError, ValueError):
                typer.secho(f"routehead: {' '.join(message.splitlines())}", fg="red", err=True)
    _drop_output_that_cannot_be_written()
    return status


def prepare_streams() -> None:
    """Make the standard streams usable, whatever the parent process has left of them.

    Streams that are closed read and write nothing; otherwise the next file that is opened would
    take their place and receive what libraries print. Characters that the encoding lacks are
    written as escapes, since a job must not fail over the display of its result.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and mode == "w":
            stream.reconfigure(errors="backslashreplace")


def _status_of(program: Callable[[], object]) -> int:
    """Run a program; return the status that it exits with."""
    try:
        program()
    except SystemExit as done:
        # Rich and Typer turn the error of a pipe without a reader into an exit.
        if isinstance(done.__context__, BrokenPipeError):
            raise done.__context__ from None
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    return 0


def _explain(error: BaseException) -> tuple[int, str]:
    """Return the exit status and the message, if any, of an error that ended the program."""
    if isinstance(error, RouteHeadError):
        return 2, str(error)
    if isinstance(error, StoppedError | KeyboardInterrupt):
        return 130, str(error) or "stopped."
    if isinstance(error, BrokenPipeError):
        return 141, ""
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        return 1, _NO_MEMORY
    if isinstance(error, RecursionError):
        return 1, "an input is nested too deeply; flatten it."
    if isinstance(error, OSError):
        return 1, _explain_os_error(error)
    text = str(error).strip()
    return 1, (
        f"unexpected {type(error).__name__}{': ' * bool(text)}{text[:300]}; this is a bug: please "
        f"report it with the traceback that {DEBUG}=1 shows."
    )


def _is_out_of_memory(error: BaseException) -> bool:
    """Return whether torch could not allocate memory, for which it has no single class."""
    if type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _explain_os_error(error: OSError) -> str:
    reason = error.strerror or str(error) or type(error).__name__
    named = isinstance(error.filename, str | bytes | os.PathLike)
    subject = f"{show_path(os.fsdecode(error.filename))}: " if named else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        # Lucene's index and results without an output are kept in temporary files.
        return f"{subject}{reason}; free some space, also in {tempfile.gettempdir()}."
    return f"{subject}{reason}; check the path and its permissions."


def _drop_output_that_cannot_be_written() -> None:
    """Flush standard output; if that fails, send the rest nowhere, so that Python's exit does not.

    The error itself was reported before.
    """
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
