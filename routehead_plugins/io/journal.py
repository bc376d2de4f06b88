"""Log of finished queries, from which an interrupted job resumes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from routehead_plugins.data import Document
from routehead_plugins.errors import InputError
from routehead_plugins.files import (
    JSON,
    StrPath,
    encode_json,
    open_locked,
    show,
    show_path,
    unwritable,
)

_START = b'{"fingerprint": '
_CHECK_DIGITS = 16


class Journal:
    """Keep finished queries in ``<path>.partial.jsonl`` until the job is done.

    The first line holds the fingerprint, every further line one finished query with a checksum of
    the line and the fingerprint. Lines that are damaged, or that a job with another fingerprint
    wrote, are dropped when the file is opened. The file stays when the job stops, for whatever
    reason; `discard` removes it. It is locked while it is open, so that one job at a time uses it;
    the lock ends with the process. Where the file system has no locks, the checksums still keep
    the entries of two jobs apart.

    Example:
        ```python
        keys = {query_id: query_key(query_id, query, candidates[query_id])
                for query_id, query in topics.items()}
        with Journal("run.trec", {"model": "embedded", "depth": 100}) as journal:
            for query_id, key in keys.items():
                if key not in journal.done:
                    journal.append(key, rank(topics[query_id], candidates[query_id]))
            run = {query_id: journal.done[key] for query_id, key in keys.items()}
            write_run("run.trec", run, tag="routehead")
            journal.discard()
        ```
    """

    def __init__(self, path: StrPath, fingerprint: Mapping[str, JSON]) -> None:
        """Prepare the log; the file is opened by the ``with`` statement.

        Args:
            path: Path of the job's final output; the log is kept beside it.
            fingerprint: The settings that all entries depend on; what a single entry depends on
                belongs into its key, see `query_key`.

        Raises:
            InputError: The fingerprint cannot be written as JSON.
        """
        self.path = Path(f"{os.fspath(path)}.partial.jsonl")
        self._header = _encode({"fingerprint": fingerprint}, "the fingerprint") + b"\n"
        self._done: dict[str, Any] = {}
        self._descriptor: int | None = None
        self._size = 0

    @property
    def done(self) -> Mapping[str, Any]:
        """Finished entries, as read back from JSON; a view that grows with `append`."""
        return MappingProxyType(self._done)

    def __enter__(self) -> Journal:
        """Lock the log and load the entries of an earlier job with the same fingerprint.

        Raises:
            InputError: The log is in use by another job, cannot be written, or is not a log.
        """
        try:
            self._descriptor = open_locked(self.path)
            self._load(self._descriptor)
        except (OSError, ValueError) as error:  # of a path that is not one
            self._close()
            raise InputError(_unusable(self.path, error)) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def append(self, key: str, value: JSON) -> None:
        """Record one finished query at once; a later entry for the same key wins.

        Args:
            key: Name of the entry, such as a `query_key`.
            value: Result of the query.

        Raises:
            InputError: The value cannot be written as JSON, the disk is full, or the journal is
                not open.
        """
        line = self._signed(_encode([key, value], f"the entry for {show(key)}").removesuffix(b"]"))
        if self._descriptor is None:
            raise InputError(
                f"the journal {show_path(self.path)} is not open; expected an open one; "
                "append inside its with block, before discard()."
            )
        try:
            self._write(self._descriptor, line)
        except OSError as error:
            raise InputError(unwritable(self.path, error)) from error
        self._done[key] = json.loads(line)[1]

    def discard(self) -> None:
        """Remove the log; call it once the final output is in place."""
        if self._descriptor is not None and sys.platform != "win32":
            # Removed while it is locked, so that no other job can have begun to use it.
            self.path.unlink(missing_ok=True)
        self._close()
        if sys.platform == "win32":
            self.path.unlink(missing_ok=True)

    def _load(self, descriptor: int) -> None:
        """Read the valid entries, and rewrite the file from the first line that is not valid.

        Raises:
            OSError: The file cannot be read or written, or is not a log.
        """
        lines = _read_lines(descriptor)
        self._done.clear()
        valid = [self._header]
        for line in lines:
            if line == self._signed(line[: -len(self._signed(b""))]):
                key, value, _ = json.loads(line)
                self._done[key] = value
                valid.append(line)
        # Valid entries prove a log, even if its first line is damaged.
        if lines and not self._done and not _looks_like_header(lines[0]):
            raise OSError(errno.EEXIST, "it is not a log of finished queries")
        kept = 0
        while kept < min(len(lines), len(valid)) and lines[kept] == valid[kept]:
            kept += 1
        self._size = sum(map(len, valid[:kept]))
        os.ftruncate(descriptor, self._size)
        self._write(descriptor, b"".join(valid[kept:]))

    def _signed(self, entry: bytes) -> bytes:
        """Return the line of an entry: its start, and a checksum of that and the fingerprint."""
        check = hashlib.sha256(self._header + entry).hexdigest()[:_CHECK_DIGITS]
        return b'%b, "%b"]\n' % (entry, check.encode())

    def _write(self, descriptor: int, content: bytes) -> None:
        """Append bytes; where that fails, take back those that were written."""
        rest = memoryview(content)
        try:
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        except OSError:
            os.ftruncate(descriptor, self._size)
            raise
        self._size += len(content)

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def query_key(query_id: str, query: str, documents: Iterable[Document]) -> str:
    """Return a key that changes with everything that the result of a query depends on.

    A job that resumes after its corpus was repaired then repeats the queries concerned only.

    Args:
        query_id: Id of the query, the beginning of the key.
        query: Text of the query.
        documents: Its candidates; their ids, texts and scores count, their metadata do not.
    """
    content = [query, [[document.id, document.text, document.score] for document in documents]]
    digest = hashlib.sha256(json.dumps(content, default=repr).encode()).hexdigest()
    return f"{query_id} {digest[:_CHECK_DIGITS]}"


def _encode(value: JSON, name: str) -> bytes:
    return encode_json(value, name, sort_keys=True, allow_nan=False).encode("ascii")


def _read_lines(descriptor: int) -> list[bytes]:
    os.lseek(descriptor, 0, os.SEEK_SET)
    with os.fdopen(descriptor, "rb", closefd=False) as stream:
        return stream.readlines()


def _looks_like_header(line: bytes) -> bool:
    """Tell whether a line is the first of a log, or what a job that was killed wrote of it."""
    return line[: len(_START)] == _START[: len(line)]


def _unusable(path: Path, error: Exception) -> str:
    if isinstance(error, BlockingIOError):
        return (
            f"{show_path(path)} is used by another job; expected one job per output; "
            "wait until it has ended, or name another output."
        )
    return unwritable(path, error)
