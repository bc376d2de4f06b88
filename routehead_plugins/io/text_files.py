"""Reading lines and writing files so that every failure is one clear sentence."""

from __future__ import annotations

import json
import os
import reprlib
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from routehead_plugins.errors import CollectionError, InputError

JSON: TypeAlias = Mapping[str, "JSON"] | Sequence["JSON"] | str | int | float | bool | None
StrPath: TypeAlias = str | os.PathLike[str]


def make_folder(path: StrPath, what: str) -> Path:
    """Make a folder, and those it lies in, where they are missing.

    Args:
        path: Of the folder.
        what: Is to be put there, for the error; plural.

    Raises:
        InputError: It cannot be made.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{what} cannot be kept in {str(path)!r} ({error}); name another folder."
        ) from error
    return folder


def atomic_write_text(path: StrPath, text: str) -> None:
    """Write a file whole or not at all; an existing one is replaced.

    Args:
        path: Where to write; a link is followed, a device or pipe is written to directly.
        text: The whole content, written as UTF-8 without translating line ends.

    Raises:
        InputError: The text is not valid Unicode, or the place cannot be written.
    """
    try:
        content = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{path} cannot be written: character {error.start} of its text, "
            f"{text[error.start]!r}, is half of a surrogate pair; expected Unicode; replace it."
        ) from error
    atomic_write_bytes(path, content)


def atomic_write_bytes(path: StrPath, content: bytes) -> None:
    """Write a file whole or not at all; see ``atomic_write_text``."""
    target = Path(os.path.realpath(path))
    try:
        if target.exists() and not target.is_file():
            target.write_bytes(content)
        else:
            _replace(target, content)
    except OSError as error:
        raise unwritable(path, error) from error


def _replace(target: Path, content: bytes) -> None:
    # tempfile would leave the file readable by its owner only, whatever the umask says.
    temporary = target.with_name(f".{target.name[:64]}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def unwritable(path: StrPath, error: OSError) -> InputError:
    """Say that a file cannot be written, and why."""
    return InputError(
        f"{path} cannot be written ({error.strerror}); expected a file in an existing, "
        "writable folder; create the folder or name another file."
    )


def malformed(path: StrPath, line: int, problem: str) -> CollectionError:
    """Place a problem in a file.

    Args:
        path: The file.
        line: Number of the line, from one.
        problem: What is wrong, what was expected, what to do.
    """
    return CollectionError(f"{path}:{line}: {problem}")


def numbered_lines(path: StrPath, expected: str) -> Iterator[tuple[int, str]]:
    """Read the lines that are not blank, without their ends, with their numbers.

    Args:
        path: A UTF-8 file, with or without a byte order mark.
        expected: What the file should hold, for the errors.

    Raises:
        CollectionError: The file is missing, unreadable, or not UTF-8.
    """
    try:
        with Path(path).open("rb") as stream:
            for number, raw in enumerate(stream, start=1):
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise malformed(
                        path,
                        number,
                        f"byte {raw[error.start]:#04x} is not UTF-8; expected {expected}; "
                        "save the file as UTF-8.",
                    ) from error
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except FileNotFoundError as error:
        raise CollectionError(
            f"{path} does not exist; expected {expected}; check the path."
        ) from error
    except OSError as error:
        raise CollectionError(
            f"{path} cannot be read ({error.strerror}); expected {expected}; check the path."
        ) from error


def json_records(path: StrPath, expected: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read a file of one JSON object per line, with the lines' numbers.

    Args:
        path: A UTF-8 file.
        expected: What the file should hold, for the errors.

    Raises:
        CollectionError: The file cannot be read, or a line is not a JSON object.
    """
    for number, line in numbered_lines(path, expected):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise malformed(
                path,
                number,
                f"{reprlib.repr(line)} is not JSON ({error}); "
                "expected one JSON object; repair the line.",
            ) from error
        if not isinstance(record, dict):
            raise malformed(
                path,
                number,
                f"{reprlib.repr(record)} is not a JSON object; "
                "expected one per line; repair the line.",
            )
        yield number, record


def json_id(record: Mapping[str, Any], keys: Sequence[str], path: StrPath, line: int) -> str:
    """Read an identifier: text, or an integer that becomes text.

    Args:
        record: One JSON object.
        keys: Names it may have, the first that is there wins.
        path: The file, for the error.
        line: Number of the line, for the error.

    Raises:
        CollectionError: There is no identifier, or it is blank or of another type.
    """
    value = next((record[key] for key in keys if record.get(key) is not None), None)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value.strip():
        return value
    raise malformed(
        path,
        line,
        f"{' or '.join(map(repr, keys))} is {reprlib.repr(value)}; "
        "expected text or an integer that names the record; add it.",
    )


def json_text(
    record: Mapping[str, Any], keys: Sequence[str], path: StrPath, line: int, *, blank: bool
) -> str:
    """Read a text.

    Args:
        record: One JSON object.
        keys: Names it may have, the first that is there wins.
        path: The file, for the error.
        line: Number of the line, for the error.
        blank: Whether the text may be blank.

    Raises:
        CollectionError: There is no text, or it is blank and may not be.
    """
    value = next((record[key] for key in keys if record.get(key) is not None), None)
    if isinstance(value, str) and (blank or value.strip()):
        return value
    raise malformed(
        path,
        line,
        f"{' or '.join(map(repr, keys))} is {reprlib.repr(value)}; "
        f"expected {'a' if blank else 'a non-blank'} text; add it.",
    )


def reject_repeated(
    name: str, known: Mapping[str, object], kind: str, path: StrPath, line: int
) -> None:
    """Refuse an id that occurred before.

    Args:
        name: The id.
        known: What was read so far, by id.
        kind: What the id names, for the error.
        path: The file, for the error.
        line: Number of the line, for the error.

    Raises:
        CollectionError: The id is known.
    """
    if name in known:
        raise malformed(
            path, line, f"{kind} {name!r} occurs twice; expected each id once; remove one."
        )
