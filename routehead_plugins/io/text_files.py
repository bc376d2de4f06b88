"""Read the lines of files; every error is a message of one line.

A ``location`` is a file and the number of a line, as text, for the errors: ``corpus.jsonl:7``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from routehead_plugins.errors import CollectionError
from routehead_plugins.files import (
    MAX_BYTES,
    StrPath,
    open_input,
    parse_json,
    reason,
    show,
    show_path,
)


def read_lines(path: StrPath, expected: str) -> Iterator[tuple[str, str]]:
    """Yield the lines that are not blank, without their line ends, with their locations.

    A byte order mark is skipped; ``expected`` describes the content, for the errors.

    Raises:
        CollectionError: The file is missing, unreadable or not UTF-8, or a line is longer than
            ``MAX_BYTES`` or holds a null byte.
    """
    name = show_path(path)
    try:
        with open_input(path) as stream:
            number = 0
            while raw := stream.readline(MAX_BYTES + 1):
                number += 1
                line = _decode(raw, f"{name}:{number}", expected, is_first=number == 1)
                if line.strip():
                    yield f"{name}:{number}", line.rstrip("\r\n")
    except (OSError, ValueError) as error:
        is_missing = isinstance(error, FileNotFoundError)
        problem = "does not exist" if is_missing else f"cannot be read ({reason(error)})"
        raise CollectionError(f"{name} {problem}; expected {expected}; check the path.") from error


def _decode(raw: bytes, location: str, expected: str, *, is_first: bool) -> str:
    """Decode one line, or say why it is no line of text."""
    if is_first and raw.startswith(b"\x1f\x8b"):
        raise CollectionError(
            f"{location}: the file is compressed by gzip; expected {expected}; unpack it."
        )
    if len(raw) > MAX_BYTES:
        raise CollectionError(
            f"{location}: the line is longer than {MAX_BYTES // 2**20} MiB; expected {expected}; "
            "check that this is the file you mean."
        )
    try:
        line = raw.decode("utf-8-sig" if is_first else "utf-8")
    except UnicodeDecodeError as error:
        raise CollectionError(
            f"{location}: {reason(error)}; expected {expected}; save the file as UTF-8."
        ) from error
    if "\0" in line:
        raise CollectionError(
            f"{location}: the line holds a null byte, as binary files and UTF-16 do; "
            f"expected {expected}; save the file as UTF-8."
        )
    return line


def json_records(path: StrPath, expected: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a file with one JSON object per line, with their locations.

    Args:
        path: UTF-8 file.
        expected: Description of the expected content, for the errors.

    Raises:
        CollectionError: The file cannot be read, or a line is not a JSON object, see
            `parse_json` for what is refused.
    """
    for location, line in read_lines(path, expected):
        try:
            record = parse_json(line)
        except ValueError as error:
            raise CollectionError(
                f"{location}: {show(line, 40)} is not JSON ({reason(error)}); "
                "expected one JSON object; repair the line."
            ) from error
        if not isinstance(record, dict):
            raise CollectionError(
                f"{location}: {show(record)} is not a JSON object; "
                "expected one per line; repair the line."
            )
        yield location, record


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
        if not is_writable_name(value):
            raise CollectionError(
                f"{location}: the id {show(value)} holds a null character or half of a surrogate "
                "pair, which no run can hold; rename it."
            )
        return value
    raise CollectionError(
        f"{location}: {' or '.join(map(repr, keys))} is {show(value)}; "
        "expected text or an integer that names the record; add it."
    )


def is_writable_name(name: str) -> bool:
    """Tell whether an id can be written as UTF-8 and read back from a text file."""
    return "\0" not in name and not any("\ud800" <= char <= "\udfff" for char in name)


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
        f"{location}: {' or '.join(map(repr, keys))} is {show(value)}; "
        f"expected {'a' if blank else 'a non-blank'} text; add it."
    )


def reject_repeated(name: str, known: Mapping[str, object], kind: str, location: str) -> None:
    """Check that the id of a record is not among those known so far."""
    if name in known:
        raise CollectionError(
            f"{location}: {kind} {show(name)} occurs twice; expected each id once; remove one."
        )
