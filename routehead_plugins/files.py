"""Read and write files so that nothing is believed or lost silently; every error is one line.

Files are written whole or not at all. JSON is read within bounds: nesting, the length of numbers,
and the size of a file are limited, and what JSON does not have, such as NaN, is refused.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import secrets
import select
import shutil
import stat
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from routehead_plugins.errors import InputError, RouteHeadError, short_repr

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

JSON: TypeAlias = Mapping[str, "JSON"] | Sequence["JSON"] | str | int | float | bool | None
StrPath: TypeAlias = str | os.PathLike[str]

MAX_BYTES = 64 * 2**20
"""Largest size of a JSON file, and of one line of any other file, in bytes."""

MAX_DEPTH = 100
"""Deepest nesting of JSON: lists and objects within each other."""

# A float holds no integer of more digits.
_MAX_DIGITS = 308
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_NO_BRACKET = re.compile(r"[^][{}]+")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Never follow a link, never wait for the other end of a pipe.
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_APPEND
_FLAGS |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def show(value: object, limit: int = 60) -> str:
    """Return a value as it is quoted in messages: one line of at most ``limit`` characters."""
    text = short_repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def show_path(path: StrPath, limit: int = 100) -> str:
    """Return a path as it is named in messages: one line, a long one without its beginning."""
    text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in os.fspath(path))
    return text if len(text) <= limit else f"...{text[3 - limit :]}"


def reason(error: Exception) -> str:
    """Return why a file cannot be read or written, as messages put it in brackets."""
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.object[error.start]:#04x} is not UTF-8"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    printable = "".join(char if char.isprintable() else " " for char in str(error))
    text = " ".join(printable.split()) or type(error).__name__
    return text if len(text) <= 90 else f"{text[:87]}..."


def user_cache(name: str) -> Path | None:
    """Return a folder of the user's cache, which may not exist yet: ``~/.cache/routehead/NAME``.

    ``$XDG_CACHE_HOME`` takes the place of ``~/.cache``, unless it is relative (XDG Base Directory
    Specification).

    Args:
        name: What is kept there.

    Returns:
        The folder; ``None`` if the user has no home.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "")
    try:
        folder = cache if cache.is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        return None
    return folder / "routehead" / name


def make_folder(path: StrPath, content: str) -> Path:
    """Create a folder and its missing parents.

    Args:
        path: Path of the folder.
        content: Plural noun for the future content, for the error.

    Raises:
        InputError: The folder cannot be created.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{content} cannot be kept in '{show_path(path)}' ({reason(error)}); "
            "name another folder."
        ) from error
    return folder


def check_output(path: StrPath) -> None:
    """Check that `atomic_write_bytes` can write a file, before the work for its content is done.

    Args:
        path: Path of the future file; nothing is left there.

    Raises:
        InputError: The path is a folder or a read-only file, or its folder is missing or cannot be
            written to.
    """
    try:
        target = _target(path)
        if not _is_special(target):
            temporary = _temporary(target)
            temporary.touch(exist_ok=False)
            temporary.unlink()
    except (OSError, ValueError) as error:
        raise InputError(unwritable(path, error)) from error


def atomic_write_text(path: StrPath, text: str) -> None:
    """Write a file whole or not at all; an existing one is replaced and keeps its mode.

    Args:
        path: Path of the file; a link is followed, a device or pipe is written to directly.
        text: Content of the file, written as UTF-8 without translating line ends.

    Raises:
        InputError: The text is not valid Unicode, or the file cannot be written.
    """
    atomic_write_bytes(path, encode_text(path, text))


def encode_text(path: StrPath, text: str) -> bytes:
    """Encode the text of a file as UTF-8.

    Raises:
        InputError: The text is not valid Unicode; the message names the file.
    """
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{show_path(path)} cannot be written: character {error.start} of its text, "
            f"{text[error.start]!r}, is half of a surrogate pair; expected Unicode; replace it."
        ) from error


def atomic_write_bytes(path: StrPath, content: bytes) -> None:
    """Write a file whole or not at all, as `atomic_write_text` does.

    A process that is killed meanwhile may leave a hidden file that ends in ``.tmp`` beside the
    old content; it is never read, and can be deleted.

    Raises:
        InputError: The file cannot be written.
    """
    try:
        target = _target(path)
        if _is_special(target):
            target.write_bytes(content)
        else:
            _replace(target, content)
    except (OSError, ValueError) as error:
        raise InputError(unwritable(path, error)) from error


def atomic_write_folder(folder: StrPath, files: Mapping[str, bytes], marker: str) -> None:
    """Write the files of a folder; all are on the disk before the first older one is replaced.

    Args:
        folder: An existing folder; its other files stay.
        files: Name -> content.
        marker: Name of the file without which the rest is not read. It goes first and comes last,
            so that a process that is killed leaves no mixture of old and new files.

    Raises:
        InputError: A file cannot be written; the older files are as they were.
    """
    targets: dict[str, Path] = {}
    temporaries: dict[str, Path] = {}
    path = Path(folder)
    try:
        # sorted() is stable: False, for the others, comes before True.
        for name in sorted(files, key=lambda name: name == marker):
            path = Path(folder) / name
            targets[name] = _target(path)
            temporaries[name] = _temporary(targets[name])
            _write_beside(targets[name], temporaries[name], files[name])
        (Path(folder) / marker).unlink(missing_ok=True)
        for name, target in targets.items():
            path = target
            temporaries[name].replace(target)
    except (OSError, ValueError) as error:
        raise InputError(unwritable(path, error)) from error
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
    _sync_folder(Path(folder))


def _target(path: StrPath) -> Path:
    """Return the file behind a path; raise OSError if it exists and must not be written to."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    # Replacing a file needs no permission on the file itself, but read-only says what it says.
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, "the file is read-only")
    return target


def _is_special(target: Path) -> bool:
    return target.exists() and not target.is_file()


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name[:32]}.{secrets.token_hex(4)}.tmp")


def _replace(target: Path, content: bytes) -> None:
    temporary = _temporary(target)
    try:
        _write_beside(target, temporary, content)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(target.parent)


def _write_beside(target: Path, temporary: Path, content: bytes) -> None:
    """Write a file that is to replace another, on the disk, with its owner and mode."""
    # tempfile would leave the file readable by its owner only, whatever the umask says.
    is_new = not target.exists()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    # The content of a private file is never readable by others, not even for a moment.
    with os.fdopen(os.open(temporary, flags, 0o666 if is_new else 0o600), "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    if not is_new:
        _copy_owner_and_mode(target, temporary)


def _sync_folder(path: Path) -> None:
    """Put the new names in a folder on the disk, so that they survive a power cut."""
    with suppress(OSError):
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _copy_owner_and_mode(source: Path, target: Path) -> None:
    status, own = source.stat(), target.stat()
    if (status.st_uid, status.st_gid) != (own.st_uid, own.st_gid):
        with suppress(OSError):
            os.chown(target, status.st_uid, status.st_gid)
    shutil.copymode(source, target)


def unwritable(path: StrPath, error: Exception) -> str:
    """Return the message for a file that cannot be written."""
    advice = (
        "expected a file in an existing, writable folder; create the folder or name another file."
    )
    kind = error.errno if isinstance(error, OSError) else None
    if kind in (errno.EEXIST, errno.ELOOP):
        advice = "nothing was changed; move it away, or name another output."
    if kind in _FULL:
        advice = "what was there before is whole; free some space and run it again."
    return f"{show_path(path)} cannot be written ({reason(error)}); {advice}"


def open_locked(path: Path) -> int:
    """Open a file of one's own to read and append, make it if it is missing, and lock it.

    The lock ends with the process. File systems without locks are no error.

    Returns:
        A descriptor; closing it unlocks the file.

    Raises:
        BlockingIOError: It is locked.
        OSError: It cannot be written, or is not a regular file.
    """
    while True:
        if path.is_symlink():
            raise OSError(errno.ELOOP, "it is a link, which is never followed")
        descriptor = os.open(path, _FLAGS, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "it is not a regular file")
            _lock(descriptor)
            if _is_current(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        # Another job removed it between the opening and the locking.
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    """Lock a file, if its file system can; raise BlockingIOError if another job did."""
    try:
        if sys.platform == "win32":
            # Locks of Windows keep others from reading: lock a byte that does not exist.
            os.lseek(descriptor, 2**30, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK, errno.EDEADLK):
            raise BlockingIOError(error.errno, "another job uses it") from error


def _is_current(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def open_input(path: StrPath) -> BinaryIO:
    """Open a file to read its bytes.

    Raises:
        OSError: The file is missing, a folder, unreadable, or a pipe that nobody writes to.
        ValueError: The path is not one.
    """
    if not stat.S_ISFIFO(os.stat(path).st_mode):
        return Path(path).open("rb")
    # Opening a pipe waits for a writer, forever if there is none.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    if not any(event & select.POLLIN for _, event in poll.poll(1000)):
        os.close(descriptor)
        raise OSError(errno.EPIPE, "it is a pipe that nobody writes to")
    os.set_blocking(descriptor, True)
    return os.fdopen(descriptor, "rb")


def read_json(
    path: StrPath,
    expected: str,
    error_type: type[RouteHeadError] = InputError,
    *,
    allow_nan: bool = False,
) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: UTF-8 file of at most ``MAX_BYTES``.
        expected: Description of the expected content, for the error.
        error_type: Class of the error.
        allow_nan: Whether NaN and Infinity are read, as Python writes them.

    Raises:
        RouteHeadError: Of the class given; the file cannot be read, or is not what `parse_json`
            accepts, or not an object.
    """
    name = show_path(path)
    try:
        with open_input(path) as stream:
            raw = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError)
        problem = "does not exist" if missing else f"cannot be read ({reason(error)})"
        raise error_type(f"{name} {problem}; expected {expected}; check the path.") from error
    try:
        return _json_object(raw, allow_nan=allow_nan)
    except ValueError as error:
        raise error_type(
            f"{name} cannot be read as JSON ({reason(error)}); expected {expected}; "
            "repair it, or name another file."
        ) from error


def _json_object(raw: bytes, *, allow_nan: bool) -> dict[str, Any]:
    if len(raw) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES // 2**20} MiB")
    content = parse_json(raw.decode("utf-8-sig"), allow_nan=allow_nan)
    if not isinstance(content, dict):
        raise ValueError(f"{show(content)} is not an object")
    return content


def parse_json(text: str, *, allow_nan: bool = False) -> Any:
    """Parse JSON within bounds.

    Args:
        text: The text.
        allow_nan: Whether NaN and Infinity are read, as Python writes them.

    Raises:
        ValueError: The text is not JSON; it is nested deeper than ``MAX_DEPTH``; a number is NaN,
            infinite or too large for a float; or an object has a key twice.
    """
    _check_depth(text, MAX_DEPTH)
    return json.loads(
        text,
        parse_constant=None if allow_nan else _refuse_constant,
        parse_float=_finite,
        parse_int=_short_integer,
        object_pairs_hook=_unique_keys,
    )


def check_nesting(path: StrPath) -> None:
    """Check that a library may parse a JSON file, however its parser recurses.

    Python 3.13 allows so many levels that the process ends where a JVM has shortened its stack.

    Raises:
        ValueError: It is nested deeper than any file of a model.
        OSError: It cannot be read.
    """
    with open_input(path) as stream:
        _check_depth(stream.read().decode("latin-1"), 5 * MAX_DEPTH)


def _check_depth(text: str, limit: int) -> None:
    """Check how deep lists and objects are nested, before a parser recurses.

    Raises:
        ValueError: They are nested deeper than the limit.
    """
    # Most texts have too few brackets to be nested that deep.
    if text.count("[") + text.count("{") <= limit:
        return
    steps = (1 if char in "[{" else -1 for char in _NO_BRACKET.sub("", _STRING.sub("", text)))
    if max(accumulate(steps), default=0) > limit:
        raise ValueError(f"nested deeper than {limit} levels")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number; null stands for a missing one")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"the number {show(digits, 24)} is too large")
    return number


def _short_integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits; at most {_MAX_DIGITS} are read")
    return int(digits)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {show(repeated, 24)} occurs twice")
    return record


def encode_json(value: object, name: str, **options: Any) -> str:
    """Encode a value as JSON.

    Args:
        value: The value.
        name: Name of the value, for the error.
        **options: Options of ``json.dumps``.

    Raises:
        InputError: JSON cannot hold the value.
    """
    try:
        return json.dumps(value, **options)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{name} cannot be written as JSON ({reason(error)}); "
            "expected text, finite numbers, lists and dicts; convert other values."
        ) from error
