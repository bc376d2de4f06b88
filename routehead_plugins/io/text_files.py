"""Read lines and write files; every error is a message of one line.

A ``location`` is a file and the number of a line, as text, for the errors: ``corpus.jsonl:7``.
"""

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
    except OSError as error:
        raise InputError(
            f"{content} cannot be kept in {str(path)!r} ({error}); name another folder."
        ) from error
    return folder


def atomic_write_text(path: StrPath, text: str) -> None:
    """Write a file whole or not at all; an existing one is replaced.

    Args:
        path: Path of the file; a link is followed, a device or pipe is written to directly.
        text: Content of the file, written as UTF-8 without translating line ends.

    Raises:
        InputError: The text is not valid Unicode, or the file cannot be written.
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
    """Write a file whole or not at all, as ``atomic_write_text`` does.

    Raises:
        InputError: The file cannot be written.
    """
    target = Path(os.path.realpath(path))
    try:
        if target.exists() and not target.is_file():
            target.write_bytes(content)
        else:
            _replace(target, content)
    except OSError as error:
        raise InputError(unwritable(path, error)) from error


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


def unwritable(path: StrPath, error: OSError) -> str:
    """Return the message for a file that cannot be written."""
    return (
        f"{path} cannot be written ({error.strerror}); expected a file in an existing, "
        "writable folder; create the folder or name another file."
    )


def read_lines(path: StrPath, expected: str) -> Iterator[tuple[str, str]]:
    """Yield the lines that are not blank, without their line ends, with their locations.

    A byte order mark is skipped; ``expected`` describes the content, for the errors.

    Raises:
        CollectionError: The file is missing, unreadable, or not UTF-8.
    """
    try:
        with Path(path).open("rb") as stream:
            for number, raw in enumerate(stream, start=1):
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise CollectionError(
                        f"{path}:{number}: byte {raw[error.start]:#04x} is not UTF-8; "
                        f"expected {expected}; save the file as UTF-8."
                    ) from error
                if line.strip():
                    yield f"{path}:{number}", line.rstrip("\r\n")
    except OSError as error:
        is_missing = isinstance(error, FileNotFoundError)
        problem = "does not exist" if is_missing else f"cannot be read ({error.strerror})"
        raise CollectionError(f"{path} {problem}; expected {expected}; check the path.") from error


def json_records(path: StrPath, expected: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a file with one JSON object per line, with their locations.

    Args:
        path: UTF-8 file.
        expected: Description of the expected content, for the errors.

    Raises:
        CollectionError: The file cannot be read, or a line is not a JSON object.
    """
    for location, line in read_lines(path, expected):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise CollectionError(
                f"{location}: {reprlib.repr(line)} is not JSON ({error}); "
                "expected one JSON object; repair the line."
            ) from error
        if not isinstance(record, dict):
            raise CollectionError(
                f"{location}: {reprlib.repr(record)} is not a JSON object; "
                "expected one per line; repair the line."
            )
        yield location, record


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
            f"{name} cannot be written as JSON ({error}); "
            "expected text, finite numbers, lists and dicts; convert other values."
        ) from error


def first_key(record: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Return the first key whose value is not null, or the first key if there is none."""
    return next((key for key in keys if record.get(key) is not None), keys[0])


def json_id(record: Mapping[str, Any], keys: Sequence[str], location: str) -> str:
    """Read an identifier: text, or an integer that becomes text.

    Args:
        record: One JSON object.
        keys: Names of the field; the first with a value counts.
        location: File and number of the line, for the error.

    Raises:
        CollectionError: The identifier is missing, blank or of another type.
    """
    value = record.get(first_key(record, keys))
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value.strip():
        return value
    raise CollectionError(
        f"{location}: {' or '.join(map(repr, keys))} is {reprlib.repr(value)}; "
        "expected text or an integer that names the record; add it."
    )


def json_text(record: Mapping[str, Any], keys: Sequence[str], location: str, *, blank: bool) -> str:
    """Read a text.

    Args:
        record: One JSON object.
        keys: See ``json_id``.
        location: See ``json_id``.
        blank: Whether the text may be blank.

    Raises:
        CollectionError: The text is missing, or blank although it must not be.
    """
    value = record.get(first_key(record, keys))
    if isinstance(value, str) and (blank or value.strip()):
        return value
    raise CollectionError(
        f"{location}: {' or '.join(map(repr, keys))} is {reprlib.repr(value)}; "
        f"expected {'a' if blank else 'a non-blank'} text; add it."
    )


def reject_repeated(name: str, known: Mapping[str, object], kind: str, location: str) -> None:
    """Check that the id of a record is not among those known so far."""
    if name in known:
        raise CollectionError(
            f"{location}: {kind} {name!r} occurs twice; expected each id once; remove one."
        )
