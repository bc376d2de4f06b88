"""An index of documents on disk: their keys at the heads that may be read."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from routehead_plugins.backbone import DocumentKeys, DocumentPiece, FrozenLM, KeyColumns
from routehead_plugins.data import Span, check_text
from routehead_plugins.errors import IndexDamagedError, InputError, short_repr
from routehead_plugins.files import StrPath, reason, show, show_path
from routehead_plugins.heads import HeadSet
from routehead_plugins.index.config import IndexConfig
from routehead_plugins.index.reduction import reduced
from routehead_plugins.index.shards import (
    RECORD,
    Rows,
    Shard,
    checksum,
    read_commits,
    shard_folder,
)
from routehead_plugins.layouts import LateDocument, LateFrame, LateLayout

# Tokens that are read at once in a search.
_CHUNK_TOKENS = 50_000


class DocumentIndex:
    """Keys of documents on disk, for the late layout.

    Made by ``routehead index`` or ``HeadRoutedAttentionReranker.index``. Documents are found by
    their texts, never by their ids alone, so that no key of an older text is ever read; of several
    documents with one id, a search reads the one that came last. Every document is compared with
    its checksum when it is first read. Safe to use from several threads, and while documents are
    added by another process, which are seen after ``refresh``.

    Attributes:
        folder: Folder of the index.
        config: What it was made for.
    """

    def __init__(self, folder: StrPath) -> None:
        """Open an index to read; takes milliseconds, and no memory for keys.

        Raises:
            IndexMismatchError: The folder holds no index, or one of another version.
            IndexDamagedError: A file is missing, shorter than it should be, or damaged.
            InputError: The folder is not one.
        """
        if isinstance(folder, str):
            check_text("documents", folder)
        try:
            self.folder = Path(folder)
        except TypeError:
            raise InputError(
                f"documents={short_repr(folder)} is no path; give the folder of an index."
            ) from None
        self.config = IndexConfig.load(self.folder)
        self._checked: set[Hashable] = set()
        self._contents = _Contents.read(self.folder, self.config)

    @property
    def columns(self) -> KeyColumns:
        """The keys that are kept of each document."""
        return self.config.columns

    @property
    def settings(self) -> Hashable:
        """What ``reduce`` depends on."""
        return self.config.dtype, self.config.budget

    @property
    def nbytes(self) -> int:
        """Size of all keys on disk in bytes, with those of documents that were replaced."""
        return self._contents.nbytes

    def __len__(self) -> int:
        """Return the number of documents, without those that were replaced."""
        return len(self._contents.current)

    def snapshot(self) -> DocumentIndex:
        """Return the index as it is now, whatever is refreshed later."""
        return copy.copy(self)

    def refresh(self) -> None:
        """See what was added since the index was opened."""
        self._contents = _Contents.read(self.folder, self.config)

    def check(
        self, llm: FrozenLM, frame: LateFrame, heads: HeadSet, max_doc_tokens: int | None
    ) -> None:
        """Check that some heads of an LLM can be read from this index.

        Raises:
            IndexMismatchError: They cannot; the message names both sides.
        """
        key = (llm.cache_key, frame, heads.heads, max_doc_tokens)
        if key not in self._checked:
            self.config.check_readable(llm, frame, heads, max_doc_tokens, self.folder)
            self._checked = {key}

    def contains(self, texts: Sequence[str]) -> list[bool]:
        """Tell which texts are in the index."""
        return [number >= 0 for number in self._contents.numbers_of(texts).tolist()]

    def look_up(self, texts: Sequence[str]) -> list[LateDocument | None]:
        """Look up documents by their texts; ``None`` for those that are not in the index.

        Raises:
            IndexDamagedError: A document was damaged.
        """
        contents = self._contents
        numbers = contents.numbers_of(texts).tolist()
        return [None if number < 0 else contents.document(number) for number in numbers]

    def reduce(self, document: LateDocument, llm: FrozenLM, layout: LateLayout) -> LateDocument:
        """Bring a document that is not in the index into the form of those that are."""
        return reduced(document, self.config, llm, layout)

    def chunks(self) -> Iterator[IndexChunk]:
        """Read all documents, some thousands of tokens at a time.

        Yields:
            Documents in the order in which they were added.

        Raises:
            IndexDamagedError: A document was damaged.
        """
        contents, start = self._contents, 0
        ends = contents.records["tokens"][contents.current].cumsum()
        while start < len(contents.current):
            before = ends[start - 1] if start else 0
            end = max(start + 1, int(ends.searchsorted(before + _CHUNK_TOKENS, side="right")))
            yield contents.chunk(contents.current[start:end])
            start = end

    def id_of(self, number: int) -> str | None:
        """Return the id of a document that ``chunks`` numbered; ``None`` if it has none."""
        return self._contents.id_of(number)

    def states(self, documents: Sequence[tuple[str | None, str]]) -> list[str]:
        """Tell what would become of documents that were added.

        Args:
            documents: Id and text of each.

        Returns:
            ``"new"``, ``"changed"`` or ``"unchanged"`` for each.
        """
        return self._contents.states(documents)

    def verify(self) -> int:
        """Compare every document with its checksum.

        Returns:
            The number of documents, with those that were replaced.

        Raises:
            IndexDamagedError: A document was damaged.
        """
        contents = _Contents.read(self.folder, self.config)
        for number in range(len(contents.records)):
            contents.check(number)
        return len(contents.records)


@dataclass(frozen=True)
class IndexChunk:
    """Some documents, one after the other.

    Attributes:
        numbers: Their numbers in the index.
        spans: Rows of each document's text.
        keys: Their keys, one row per token.
    """

    numbers: NDArray[Any]
    spans: tuple[Span, ...]
    keys: DocumentKeys


class _Contents:
    """What an index holds at one moment."""

    def __init__(self, shards: list[Shard], records: NDArray[Any], config: IndexConfig) -> None:
        self._shards, self._config, self.records = shards, config, records
        # Number of the first document of each shard.
        sizes = [0, *(shard.size.documents for shard in shards)]
        self._firsts = np.cumsum(sizes)
        self._intact = np.zeros(len(records), bool)
        rows = sum(shard.size.tokens for shard in shards)
        width = config.columns.width * (1 if config.dtype == "int8" else 2)
        scales = 2 * len(config.columns.heads) if config.dtype == "int8" else 0
        self.nbytes = rows * (width + scales + 8)

    @classmethod
    def read(cls, folder: Path, config: IndexConfig) -> _Contents:
        try:
            sizes, _ = read_commits(folder)
            shards = [
                Shard(shard_folder(folder, number), config, size)
                for number, size in enumerate(sizes)
            ]
            records = [np.empty(0, RECORD), *(shard.records() for shard in shards)]
        except OSError as error:
            raise IndexDamagedError(
                f"the index {show_path(folder)} cannot be read ({reason(error)}); restore it, or "
                "index again."
            ) from error
        return cls(shards, np.concatenate(records), config)

    @cached_property
    def _by_text(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Hashes of all texts in ascending order, and the numbers of their documents."""
        hashes = self.records["text"][:, 0]
        order = hashes.argsort(kind="stable")
        return hashes[order], order

    @cached_property
    def current(self) -> NDArray[Any]:
        """Numbers of the documents that were not replaced, in ascending order."""
        # Documents without an id are told apart by their texts.
        names = np.where(self.records["id"] > 0, self.records["id"], self.records["text"][:, 0])
        _, last = np.unique(names[::-1], return_index=True)
        return np.sort(len(names) - 1 - last)

    def numbers_of(self, texts: Sequence[str]) -> NDArray[Any]:
        """Return the number of the last document with each text, or -1."""
        if not texts or not len(self.records):
            return np.full(len(texts), -1)
        asked = np.array([text_hash(text) for text in texts], "<u8")
        hashes, order = self._by_text
        last = hashes.searchsorted(asked[:, 0], side="right") - 1
        numbers = order[last.clip(0)]
        same = (self.records["text"][numbers] == asked).all(axis=1)
        return np.where(same & (last >= 0), numbers, -1)

    @cached_property
    def _by_id(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Hashes of the ids of current documents in ascending order, and their numbers."""
        current = self.current[self.records["id"][self.current] > 0]
        hashes = self.records["id"][current]
        order = hashes.argsort(kind="stable")
        return hashes[order], current[order]

    def states(self, documents: Sequence[tuple[str | None, str]]) -> list[str]:
        by_text = self.numbers_of([text for _, text in documents]).tolist()
        hashes, numbers = self._by_id
        states = []
        for (name, text), number in zip(documents, by_text, strict=True):
            if not name:
                states.append("new" if number < 0 else "unchanged")
                continue
            index = int(hashes.searchsorted(np.uint64(id_hash(name))))
            if index == len(hashes) or int(hashes[index]) != id_hash(name):
                states.append("new")
            else:
                held = self.records["text"][numbers[index]].tolist()
                states.append("unchanged" if tuple(held) == text_hash(text) else "changed")
        return states

    def document(self, number: int) -> LateDocument:
        rows = self._rows(number)
        return LateDocument(self._piece(number, rows), self._keys(rows))

    def chunk(self, numbers: NDArray[Any]) -> IndexChunk:
        for number in numbers[~self._intact[numbers]].tolist():
            self._rows(number)
        records, shards = self.records[numbers], self._shards_of(numbers)
        # Documents that follow each other in a shard are one slice of it.
        follow = (records["row"][:-1] + records["tokens"][:-1] == records["row"][1:]) & (
            shards[:-1] == shards[1:]
        )
        edges = [0, *(np.flatnonzero(~follow) + 1).tolist(), len(numbers)]
        slices = []
        for first, end in pairwise(edges):
            start = int(records["row"][first])
            stop = int(records["row"][end - 1] + records["tokens"][end - 1])
            slices.append(self._keys(self._shards[shards[first]].rows[start:stop]))
        starts = records["tokens"].cumsum() - records["tokens"]
        ends = starts + records["text_tokens"]
        spans = tuple(map(Span, starts.tolist(), ends.tolist()))
        return IndexChunk(
            numbers, spans, slices[0] if len(slices) == 1 else DocumentKeys.join(slices)
        )

    def id_of(self, number: int) -> str | None:
        name = self._name(number)
        return name.decode() if name else None

    def check(self, number: int) -> None:
        """Compare a document with its checksum."""
        self._intact[number] = False
        self._rows(number)

    def _rows(self, number: int) -> Rows:
        record = self.records[number]
        shard = self._shard_of(number)
        start = int(record["row"])
        rows = shard.rows[start : start + int(record["tokens"])]
        if not self._intact[number]:
            if checksum(record, rows, self._name(number)) != record["check"]:
                raise IndexDamagedError(
                    f"document {number} of the index {show_path(shard.folder.parent)} is damaged: "
                    f"its keys are not those that were written (id {show(self._shown_id(number))})"
                    "; restore the index, or index again into a new folder."
                )
            self._intact[number] = True
        return rows

    def _keys(self, rows: Rows) -> DocumentKeys:
        scales = torch.from_numpy(rows.scales) if rows.scales.shape[1] else None
        return DocumentKeys(
            self._config.columns,
            torch.from_numpy(rows.keys),
            torch.from_numpy(rows.positions),
            scales,
        )

    def _piece(self, number: int, rows: Rows) -> DocumentPiece:
        size = int(self.records[number]["text_tokens"])
        ids = tuple(rows.tokens.tolist())
        # Behind the prefix, and a label of no tokens.
        indices = rows.positions[:size] - len(self._config.frame.prefix)
        is_whole = not size or int(indices[-1]) == size - 1
        return DocumentPiece(ids, Span(0, size), None if is_whole else tuple(indices.tolist()))

    def _shard_of(self, number: int) -> Shard:
        return self._shards[int(self._firsts.searchsorted(number, side="right")) - 1]

    def _shards_of(self, numbers: NDArray[Any]) -> NDArray[Any]:
        return self._firsts.searchsorted(numbers, side="right") - 1

    def _name(self, number: int) -> bytes:
        record, shard = self.records[number], self._shard_of(number)
        start = int(record["id_start"])
        return shard.ids[start : start + int(record["id_size"])].tobytes()

    def _shown_id(self, number: int) -> str:
        return self._name(number).decode(errors="replace")


def text_hash(text: str) -> tuple[int, int]:
    """Return the hash under which a text is looked up, in two numbers."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def id_hash(name: str | None) -> int:
    """Return the hash of an id; 0 without one."""
    return text_hash(name)[0] or 1 if name else 0
