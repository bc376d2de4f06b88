"""Log of finished queries, from which an interrupted job resumes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from routehead_plugins.errors import InputError
from routehead_plugins.io.text_files import JSON, StrPath, encode_json, unwritable


class Journal:
    """Keep finished queries in ``<path>.partial.jsonl`` until the job is done.

    The first line holds the fingerprint, every further line one finished query. The file stays
    when the job stops, for whatever reason; `discard` removes it. One job at a time may use it.

    Example:
        ```python
        with Journal("run.trec", {"model": "embedded", "depth": 100}) as journal:
            for query_id, query in topics.items():
                if query_id not in journal.done:
                    journal.append(query_id, rank(query))
            write_run("run.trec", journal.done, tag="routehead")
            journal.discard()
        ```
    """

    def __init__(self, path: StrPath, fingerprint: Mapping[str, JSON]) -> None:
        """Prepare the log; the file is opened by the ``with`` statement.

        Args:
            path: Path of the job's final output; the log is kept beside it.
            fingerprint: Everything that the entries depend on; a log with
                another fingerprint is overwritten.

        Raises:
            InputError: The fingerprint cannot be written as JSON.
        """
        self.path = Path(f"{path}.partial.jsonl")
        self._header = _encode({"fingerprint": fingerprint}, "the fingerprint")
        self._done: dict[str, Any] = {}
        self._stream: BinaryIO | None = None

    @property
    def done(self) -> Mapping[str, Any]:
        """Finished entries, as read back from JSON; a view that grows with `append`."""
        return MappingProxyType(self._done)

    def __enter__(self) -> Journal:
        """Open the log and load the entries of an earlier job with the same fingerprint.

        Raises:
            InputError: The log cannot be written.
        """
        try:
            self._stream = self.path.open("ab")
            valid_bytes = self._load()
            self._stream.truncate(valid_bytes)
            if not valid_bytes:
                self._write(self._header)
        except OSError as error:
            self._close()
            raise InputError(unwritable(self.path, error)) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def append(self, key: str, value: JSON) -> None:
        """Record one finished query at once; a later entry for the same key wins.

        Args:
            key: Id of the query.
            value: Result of the query.

        Raises:
            InputError: The value cannot be written as JSON, or the journal is not open.
        """
        line = _encode([key, value], f"the entry for {key!r}")
        self._write(line)
        self._done[key] = json.loads(line)[1]

    def discard(self) -> None:
        """Remove the log; call it once the final output is in place."""
        self._close()
        self.path.unlink(missing_ok=True)

    def _load(self) -> int:
        """Read the entries, and return the number of bytes up to the first invalid line."""
        self._done.clear()
        with self.path.open("rb") as stream:
            if stream.readline() != self._header:
                return 0
            valid_bytes = len(self._header)
            for line in stream:
                entry = _decode(line)
                if entry is None:
                    break
                self._done[entry[0]] = entry[1]
                valid_bytes += len(line)
        return valid_bytes

    def _write(self, line: bytes) -> None:
        if self._stream is None:
            raise InputError(
                f"the journal {self.path} is not open; expected an open one; "
                "append inside its with block, before discard()."
            )
        self._stream.write(line)
        self._stream.flush()

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _encode(value: JSON, name: str) -> bytes:
    return f"{encode_json(value, name, sort_keys=True, allow_nan=False)}\n".encode("ascii")


def _decode(line: bytes) -> tuple[str, Any] | None:
    """Return the key and value of an entry; a job that was killed may have left half a line."""
    try:
        match json.loads(line) if line.endswith(b"\n") else None:
            case [str(key), value]:
                return key, value
    except ValueError:
        pass
    return None
