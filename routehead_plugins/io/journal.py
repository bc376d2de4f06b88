"""A per-query log that lets a long job go on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, BinaryIO

from routehead_plugins.errors import InputError
from routehead_plugins.io.text_files import JSON, StrPath, unwritable


class Journal:
    """Keep finished queries in ``<path>.partial.jsonl`` until the job is done.

    The first line holds the fingerprint, each further line one finished query. The file stays
    when the job stops, for whatever reason; `discard` removes it. One job at a time may hold it.

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
        """Name the job; nothing is opened before the ``with``.

        Args:
            path: The job's final output, beside which the log is kept.
            fingerprint: Everything the entries depend on; a log with another one is dropped.

        Raises:
            InputError: The fingerprint cannot be written as JSON.
        """
        self.path = Path(f"{path}.partial.jsonl")
        self._header = _encode({"fingerprint": fingerprint}, "the fingerprint")
        self._done: dict[str, Any] = {}
        self._stream: BinaryIO | None = None

    @property
    def done(self) -> Mapping[str, Any]:
        """Finished entries, as JSON gives them back; a view that grows with `append`."""
        return MappingProxyType(self._done)

    def __enter__(self) -> Journal:
        """Open the log and load what an earlier job with the same fingerprint finished.

        Raises:
            InputError: The log cannot be written where it belongs.
        """
        try:
            self._stream = self.path.open("ab")
            sound = self._load()
            self._stream.truncate(sound)
            if not sound:
                self._write(self._header)
        except OSError as error:
            self._close()
            raise unwritable(self.path, error) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()

    def append(self, key: str, value: JSON) -> None:
        """Record one finished query at once; a later entry for the same key wins.

        Args:
            key: Name of the query.
            value: Its result.

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
        """Read the entries, and tell how many bytes of the file are sound."""
        self._done.clear()
        sound = 0
        with self.path.open("rb") as stream:
            for number, line in enumerate(stream):
                if number == 0:
                    if line != self._header:
                        return 0
                else:
                    entry = _entry(line)
                    if entry is None:
                        break
                    self._done[entry[0]] = entry[1]
                sound += len(line)
        return sound

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
    try:
        text = json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name} cannot be written as JSON ({error}); "
            "expected text, finite numbers, lists and dicts; convert it."
        ) from error
    return text.encode("ascii") + b"\n"


def _entry(line: bytes) -> tuple[str, Any] | None:
    # A job that was killed may have left half a line.
    if not line.endswith(b"\n"):
        return None
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    match entry:
        case [str(key), value]:
            return key, value
        case _:
            return None
