"""Damaged files of every kind, drawn from a seed, and what their readers may do with them.

A reader returns, or raises an error of ours with one short line. What is stored with checksums is
never believed when it is damaged.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tables import query_signals

from routehead_plugins import HeadSet
from routehead_plugins.errors import CollectionError, HeadError, InputError, RouteHeadError
from routehead_plugins.io import (
    JSON,
    Journal,
    read_corpus,
    read_json,
    read_qrels,
    read_requests,
    read_run,
    read_topics,
)
from routehead_plugins.signals.store import SignalStore

LONGEST_MESSAGE = 299

_HEADS: dict[str, Any] = {
    "format": "routehead-heads",
    "version": 1,
    "model": "tiny",
    "heads": ["1-2", "3-4"],
    "scores": [0.5, 0.25],
    "weights": [1.5, -2],
    "aggregation": "log",
    "first_stage_weight": 0.5,
}
_REQUEST = {
    "query": {"text": "why", "qid": 12},
    "candidates": [
        {"docid": "a", "score": 1.5, "doc": {"title": "T", "text": "x", "url": ["u"]}},
        {"docid": 7, "score": None, "doc": {"segment": "y"}},
    ],
}
_OTHER_QUERY = {"query": {"text": "t", "qid": 1}}
_ENTRIES: dict[str, JSON] = {
    f"q{number} 0123": [[f"d{number}", 0.1 * number], ["d", -1.0]] for number in range(4)
}


def _jsonl(*records: object) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def _read_journal(path: Path) -> None:
    """Open a log; its entries are those that were recorded, or a part of them."""
    with Journal(path, {"depth": 10}) as journal:
        damaged = {key for key in journal.done if journal.done[key] != _ENTRIES.get(key)}
        assert not damaged, f"believed {damaged}"


@dataclass(frozen=True)
class FileKind:
    """A kind of file.

    Attributes:
        suffix: What is added to the path that the reader is given.
        read: The reader.
        examples: Valid content.
        errors: What the reader may raise.
    """

    read: Callable[[Path], object]
    examples: tuple[bytes, ...]
    suffix: str = ""
    errors: tuple[type[RouteHeadError], ...] = (CollectionError,)


_CORPUS = _jsonl(
    {"_id": "d1", "title": "T", "text": "one", "n": 1.5}, {"id": 2, "contents": "two", "x": [{}]}
)
_TREC = b"<top>\n<num> Number: 301\n<title> why cats\npurr\n<desc> no\n</top>\n"
_XML = b'<topics><topic number="1"><query>a &amp; b</query></topic></topics>\n'
KINDS = {
    "corpus": FileKind(read_corpus, (_CORPUS,)),
    "topics as JSON": FileKind(
        read_topics, (_jsonl({"_id": "q1", "text": "a"}, {"qid": 2, "query": "b"}),), ".jsonl"
    ),
    "topics in columns": FileKind(read_topics, (b"1\tone\n2\ttwo words\n",), ".tsv"),
    "topics of TREC": FileKind(read_topics, (_TREC + _TREC.replace(b"301", b"2_1"), _XML), ".trec"),
    "judgments": FileKind(
        read_qrels, (b"query-id\tcorpus-id\tscore\nq1\td 1\t2\n", b"q1 0 d1 2\nq2 0 d1 -1\n")
    ),
    "run": FileKind(read_run, (b"q1 Q0 d1 1 0.5 t\nq1 Q0 d2 2 -1e-3 t\n",)),
    "requests": FileKind(
        read_requests, (_jsonl(_REQUEST, _REQUEST | {"query": {"text": "t", "qid": 1}}),)
    ),
    "head set": FileKind(HeadSet.load, (_jsonl(_HEADS),), ".json", (HeadError,)),
    "JSON": FileKind(
        lambda path: read_json(path, "an object"), (_jsonl(_HEADS),), ".json", (InputError,)
    ),
}


def journal_kind(folder: Path) -> FileKind:
    """Return the kind of logs of finished queries, with one that was written just now."""
    with Journal(folder / "example", {"depth": 10}) as journal:
        for key, value in _ENTRIES.items():
            journal.append(key, value)
        content = journal.path.read_bytes()
        journal.discard()
    return FileKind(_read_journal, (content,), ".partial.jsonl", (InputError,))


def signals_kind(folder: Path) -> FileKind:
    """Return the kind of files of signals, with one that was written just now."""
    store = SignalStore(folder / "signals", {"model": "tiny"})
    signals = query_signals([[0.1, 0.2], [0.3, 0.4]], [1, 0])
    store.put("key", signals)
    content = store.path("key").read_bytes()

    def read(path: Path) -> None:
        store.path("key").write_bytes(path.read_bytes())
        assert store.get("key") is None or path.read_bytes() == content, "believed a damaged file"

    return FileKind(read, (content,))


# Bytes that have confused readers of text, JSON and numbers.
_TOKENS = (
    *(b"NaN", b"-Infinity", b"1e999", b"1" + b"0" * 400, b"9" * 5000, b"-0", b"1_0", b"0x1"),
    *(b'"\\ud800"', b"\\u0000", b"\0", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\x1f\x8b\x08"),
    *(b"[" * 20_000, b'{"a":' * 3000, b"]" * 200, b"<top>", b"<num>", b"<topic number='", b"</"),
    *(b"\n", b"\r", b"\t", b" ", b"\\", b'"', b"'", b"x" * 2000, b"\xe2\x80\xa8", b"\x1b[31m"),
)
_VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 1.5, float("nan"), float("inf"), 10**400, 10**30, "", " ", "x" * 5000),
    *("\ud800", "a\nb", "1-2", [], {}, [[]], ["x"], [None], {"a": {"b": []}}, [0.5, 0.5, 0.5]),
)


@dataclass
class Damage:
    """Draws damaged content.

    Attributes:
        examples: Valid content.
        rng: Source of chance.
    """

    examples: tuple[bytes, ...]
    rng: random.Random = field(default_factory=random.Random)

    def draw(self) -> bytes:
        """Return one example with one to three kinds of damage."""
        content = self.rng.choice(self.examples)
        kinds = (self._flip, self._cut, self._insert, self._repeat, self._retype, self._recode)
        for _ in range(self.rng.choice((1, 1, 2, 3))):
            content = self.rng.choice(kinds)(content)
        return content

    def _span(self, content: bytes) -> tuple[int, int]:
        first, second = sorted(self.rng.randrange(len(content) + 1) for _ in range(2))
        return first, self.rng.choice((second, min(second, first + 3)))

    def _flip(self, content: bytes) -> bytes:
        damaged = bytearray(content)
        if damaged:
            damaged[self.rng.randrange(len(damaged))] ^= 1 << self.rng.randrange(8)
        return bytes(damaged)

    def _cut(self, content: bytes) -> bytes:
        start, end = self._span(content)
        return content[:start] + content[end:]

    def _insert(self, content: bytes) -> bytes:
        start, end = self._span(content)
        end = self.rng.choice((start, end))
        return content[:start] + self.rng.choice(_TOKENS) + content[end:]

    def _repeat(self, content: bytes) -> bytes:
        start, end = self._span(content)
        return content[:start] + content[start:end] * self.rng.choice((2, 3, 40)) + content[end:]

    def _recode(self, content: bytes) -> bytes:
        text = content.decode("latin-1")
        return text.encode(self.rng.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig")))

    def _retype(self, content: bytes) -> bytes:
        """Replace one value of a line of JSON by another."""
        lines = content.splitlines()
        index = self.rng.randrange(len(lines)) if lines else 0
        try:
            value = json.loads(lines[index]) if lines else None
        except (ValueError, RecursionError):
            return self._insert(content)
        lines[index:] = [json.dumps(self._replaced(value)).encode(), *lines[index + 1 :]]
        return b"\n".join(lines) + b"\n"

    def _replaced(self, value: Any) -> Any:
        if not isinstance(value, list | dict) or not value or self.rng.random() < 0.2:
            return self.rng.choice(_VALUES)
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = self.rng.choice(keys)
        value[key] = self._replaced(value[key])
        if isinstance(value, dict) and self.rng.random() < 0.1:
            value[f"{key}x"] = value.pop(key)
        return value


def damaged_files(kind: FileKind, seed: int, count: int) -> Iterator[bytes]:
    """Yield damaged content of one kind, the same for the same seed."""
    damage = Damage(kind.examples, random.Random(seed))
    for _ in range(count):
        yield damage.draw()


def check_read(kind: FileKind, content: bytes, folder: Path) -> RouteHeadError | None:
    """Read content as a file in a folder; return the error, which must be one short line.

    Raises:
        AssertionError: The reader raised another error, or one whose message is no short line.
    """
    path = folder / "file"
    (folder / f"file{kind.suffix}").write_bytes(content)
    given = path if kind.suffix == ".partial.jsonl" else folder / f"file{kind.suffix}"
    try:
        kind.read(given)
    except kind.errors as error:
        message = str(error)
        assert message.isprintable(), message
        assert 20 < len(message) <= LONGEST_MESSAGE, message
        return error
    return None
