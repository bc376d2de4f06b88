"""Files of an index: shards that only grow, and a log of how much of each is valid.

A shard is a folder of plain arrays, little-endian, without headers:

``keys.bin``       one row of ``config.columns.width`` numbers per token
``scales.bin``     one float16 per token and key head; empty with float16 keys
``positions.bin``  int32 per token: its position in the prompt
``tokens.bin``     int32 per token: its id
``ids.bin``        the documents' ids, UTF-8, one after the other
``documents.bin``  one ``RECORD`` per document

``commits.jsonl`` gets a line for every batch that is on the disk whole: the number of the shard,
and its documents, tokens and bytes of ids. What lies beyond was not finished and is cut off by the
next builder. Nothing is ever changed, so that readers need no lock.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from routehead_plugins.errors import IndexDamagedError
from routehead_plugins.files import show, show_path
from routehead_plugins.index.config import IndexConfig

COMMITS_FILE = "commits.jsonl"

RECORD = np.dtype(
    [
        ("text", "<u8", (2,)),  # hash of the text
        ("id", "<u8"),  # hash of the id; 0 without one
        ("row", "<u8"),  # its first token in the shard
        ("tokens", "<u4"),
        ("text_tokens", "<u4"),  # those of its text, which come first
        ("id_start", "<u8"),
        ("id_size", "<u4"),
        ("check", "<u4"),  # of all before, and of the document's rows and id
    ]
)
"""What is known of one document."""

_KEYS: dict[str, np.dtype[Any]] = {"int8": np.dtype("int8"), "float16": np.dtype("<f2")}


@dataclass(frozen=True)
class ShardSize:
    """How much of a shard is valid.

    Attributes:
        documents: Number of documents.
        tokens: Number of tokens of all documents.
        id_bytes: Size of all ids.
    """

    documents: int = 0
    tokens: int = 0
    id_bytes: int = 0


@dataclass(frozen=True)
class Rows:
    """Arrays of one document, or of consecutive ones, of a shard.

    Attributes:
        keys: Shape (tokens, width).
        scales: Shape (tokens, key heads), or (tokens, 0) with float16 keys.
        positions: Shape (tokens,).
        tokens: Shape (tokens,).
    """

    keys: NDArray[Any]
    scales: NDArray[Any]
    positions: NDArray[Any]
    tokens: NDArray[Any]

    def arrays(self) -> tuple[NDArray[Any], ...]:
        """Return the arrays in the order of ``FILES``."""
        return self.keys, self.scales, self.positions, self.tokens

    def __getitem__(self, rows: slice) -> Rows:
        return Rows(*(array[rows] for array in self.arrays()))


FILES = ("keys.bin", "scales.bin", "positions.bin", "tokens.bin")
IDS_FILE, DOCUMENTS_FILE = "ids.bin", "documents.bin"


class Shard:
    """One shard, opened to read."""

    def __init__(self, folder: Path, config: IndexConfig, size: ShardSize) -> None:
        """Check the lengths of the files; they are mapped into memory when they are first read.

        Raises:
            IndexDamagedError: A file is missing or too short.
        """
        self.folder, self.size = folder, size
        self._shapes = shapes(config)
        for name, (dtype, width) in self._shapes.items():
            self._check_length(name, size.tokens * width * dtype.itemsize)
        self._check_length(IDS_FILE, size.id_bytes)
        self._check_length(DOCUMENTS_FILE, size.documents * RECORD.itemsize)

    @cached_property
    def rows(self) -> Rows:
        """The arrays, mapped into memory."""
        arrays = []
        for name, (dtype, width) in self._shapes.items():
            shape = (self.size.tokens, width)
            array = self._map(name, dtype, self.size.tokens * width).reshape(shape)
            arrays.append(array if name in FILES[:2] else array[:, 0])
        return Rows(*arrays)

    @cached_property
    def ids(self) -> NDArray[Any]:
        """The bytes of all ids, mapped into memory."""
        return self._map(IDS_FILE, np.dtype("u1"), self.size.id_bytes)

    def records(self) -> NDArray[Any]:
        """Read what is known of all documents: ``RECORD``, shape (documents,).

        Raises:
            IndexDamagedError: A document lies outside of the shard.
        """
        with (self.folder / DOCUMENTS_FILE).open("rb") as stream:
            records = np.fromfile(stream, RECORD, self.size.documents)
        inside = (
            (records["row"] + records["tokens"] <= self.size.tokens)
            & (records["text_tokens"] <= records["tokens"])
            & (records["id_start"] + records["id_size"] <= self.size.id_bytes)
        )
        if not inside.all():
            raise IndexDamagedError(
                f"{show_path(self.folder / DOCUMENTS_FILE)} is damaged at document "
                f"{int(inside.argmin())}; index again into a new folder."
            )
        return records

    def _map(self, name: str, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
        if not count:  # an empty file cannot be mapped
            return np.empty(0, dtype)
        # Copy-on-write: torch wants arrays that may be written to, and nobody writes.
        return np.asarray(np.memmap(self.folder / name, dtype, mode="c", shape=(count,)))

    def _check_length(self, name: str, expected: int) -> None:
        path = self.folder / name
        length = path.stat().st_size if path.is_file() else 0
        if length < expected:
            raise IndexDamagedError(
                f"{show_path(path)} has {length:,} bytes, but {expected:,} were written; restore "
                "it, or index again into a new folder."
            )


def shapes(config: IndexConfig) -> dict[str, tuple[np.dtype[Any], int]]:
    """Return the number format and the width of each array, in the order of ``FILES``."""
    scales = len(config.columns.heads) if config.dtype == "int8" else 0
    formats: tuple[tuple[np.dtype[Any], int], ...] = (
        (_KEYS[config.dtype], config.columns.width),
        (np.dtype("<f2"), scales),
        (np.dtype("<i4"), 1),
        (np.dtype("<i4"), 1),
    )
    return dict(zip(FILES, formats, strict=True))


def checksum(record: NDArray[Any], rows: Rows, name: bytes) -> int:
    """Compute the checksum of a document.

    Args:
        record: Its record, a ``RECORD`` of shape ().
        rows: Its arrays.
        name: Its id.
    """
    check = zlib.crc32(record.tobytes()[: -RECORD["check"].itemsize])
    for array in rows.arrays():
        check = zlib.crc32(np.ascontiguousarray(array).data, check) if array.size else check
    return zlib.crc32(name, check)


def shard_folder(folder: Path, number: int) -> Path:
    """Return the folder of a shard."""
    return folder / f"shard-{number:05d}"


def commit_line(number: int, size: ShardSize) -> bytes:
    """Return the line of the log that makes a part of a shard valid."""
    values = [number, size.documents, size.tokens, size.id_bytes]
    check = zlib.crc32(json.dumps(values).encode())
    return json.dumps([*values, f"{check:08x}"]).encode() + b"\n"


def read_commits(folder: Path) -> tuple[list[ShardSize], int]:
    """Read the log.

    Returns:
        Sizes of all shards, and the length of the log without a last line that was not finished.

    Raises:
        IndexDamagedError: A line is damaged.
        OSError: The log cannot be read.
    """
    path, sizes, length = folder / COMMITS_FILE, list[ShardSize](), 0
    for number, line in enumerate(_complete_lines(path.read_bytes()), start=1):
        entry = _parsed(line)
        if entry is None or entry[0] not in (len(sizes) - 1, len(sizes)):
            raise IndexDamagedError(
                f"{show_path(path)}:{number}: {show(line, 40)} is damaged; restore the file, or "
                "index again into a new folder."
            )
        shard, size = entry
        sizes[shard:] = [size]
        length += len(line)
    return sizes, length


def _complete_lines(content: bytes) -> Iterator[bytes]:
    return (line for line in content.splitlines(keepends=True) if line.endswith(b"\n"))


def _parsed(line: bytes) -> tuple[int, ShardSize] | None:
    """Parse a line of the log; ``None`` if it is damaged."""
    try:
        number, *sizes = json.loads(line)[:-1]
        size = ShardSize(*sizes)
        return (number, size) if commit_line(number, size) == line else None
    except (ValueError, TypeError, RecursionError):
        return None


class ShardWriter:
    """Appends documents to shards; what is not committed does not count."""

    def __init__(self, folder: Path, config: IndexConfig, max_bytes: int) -> None:
        """Cut off what an earlier writer did not commit.

        Args:
            folder: Folder of the index; the caller holds its lock.
            config: Its configuration.
            max_bytes: Size of keys at which a new shard begins.

        Raises:
            IndexDamagedError: A file is too short, or a line of the log is damaged.
            OSError: A file cannot be written.
        """
        self._folder, self._shapes = folder, shapes(config)
        token_bytes = config.columns.width * _KEYS[config.dtype].itemsize
        self._max_tokens = max(1, max_bytes // token_bytes)
        (folder / COMMITS_FILE).touch()
        sizes, length = read_commits(folder)
        os.truncate(folder / COMMITS_FILE, length)
        self._number = max(0, len(sizes) - 1)
        self._size = sizes[-1] if sizes else ShardSize()
        self._open()
        for size, number in zip(sizes, range(len(sizes)), strict=True):
            Shard(shard_folder(folder, number), config, size)

    def append(self, documents: Sequence[tuple[NDArray[Any], Rows, bytes]]) -> None:
        """Write documents and commit them.

        Args:
            documents: Record, arrays and id of each; the record's offsets and checksum are filled
                in here.

        Raises:
            OSError: A file cannot be written, such as on a full disk; nothing is committed then.
        """
        if self._size.tokens >= self._max_tokens:
            self._close()
            self._number, self._size = self._number + 1, ShardSize()
            self._open()
        row, start = self._size.tokens, self._size.id_bytes
        for record, rows, name in documents:
            record["row"], record["tokens"] = row, len(rows.tokens)
            record["id_start"], record["id_size"] = start, len(name)
            record["check"] = checksum(record, rows, name)
            row, start = row + len(rows.tokens), start + len(name)
        try:
            self._write(documents)
            size = ShardSize(self._size.documents + len(documents), row, start)
            with (self._folder / COMMITS_FILE).open("ab") as log:
                log.write(commit_line(self._number, size))
                log.flush()
                os.fsync(log.fileno())
        except OSError:
            self._cut()
            raise
        self._size = size

    def close(self) -> None:
        """Close the files."""
        self._close()

    def _write(self, documents: Sequence[tuple[NDArray[Any], Rows, bytes]]) -> None:
        for index, name in enumerate(FILES):
            for _, rows, _ in documents:
                array = rows.arrays()[index]
                if array.size:
                    _write_all(self._streams[name], np.ascontiguousarray(array).tobytes())
        _write_all(self._streams[IDS_FILE], b"".join(name for _, _, name in documents))
        records = b"".join(record.tobytes() for record, _, _ in documents)
        _write_all(self._streams[DOCUMENTS_FILE], records)
        for stream in self._streams.values():
            stream.flush()
            os.fsync(stream.fileno())

    def _open(self) -> None:
        folder = shard_folder(self._folder, self._number)
        folder.mkdir(exist_ok=True)
        names = (*FILES, IDS_FILE, DOCUMENTS_FILE)
        # Without a buffer, so that closing never fails on a full disk.
        self._streams = {name: (folder / name).open("ab", buffering=0) for name in names}
        self._cut()

    def _cut(self) -> None:
        """Cut off what is not committed."""
        lengths = {
            name: self._size.tokens * width * dtype.itemsize
            for name, (dtype, width) in self._shapes.items()
        }
        lengths[IDS_FILE] = self._size.id_bytes
        lengths[DOCUMENTS_FILE] = self._size.documents * RECORD.itemsize
        for name, stream in self._streams.items():
            if os.fstat(stream.fileno()).st_size > lengths[name]:
                os.ftruncate(stream.fileno(), lengths[name])

    def _close(self) -> None:
        for stream in self._streams.values():
            stream.close()


def _write_all(stream: FileIO, content: bytes) -> None:
    """Write all of it; a file without a buffer may take a part only."""
    rest = memoryview(content)
    while rest:
        rest = rest[stream.write(rest) :]
