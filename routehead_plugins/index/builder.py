"""Build an index: run documents once, and keep what the late layout reads of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from routehead_plugins.backbone import DocumentPiece, FrozenLM
from routehead_plugins.data import Document
from routehead_plugins.errors import InputError
from routehead_plugins.files import StrPath, make_folder, open_locked, show, show_path, unwritable
from routehead_plugins.index.config import CONFIG_FILE, IndexConfig
from routehead_plugins.index.document_index import DocumentIndex, id_hash, text_hash
from routehead_plugins.index.shards import RECORD, Rows, ShardWriter
from routehead_plugins.layouts import LateDocument, LateLayout

_LOCK_FILE = "lock"
# Documents that are tokenized, run and committed together.
_BATCH = 64
_SHARD_BYTES = 2**30


@dataclass
class IndexReport:
    """What became of the documents that were to be indexed.

    Attributes:
        added: They were not in the index.
        replaced: They had another text.
        unchanged: They were in the index already.
        blank: They have nothing to read, and are not kept.
        cut: Of those added or replaced: they do not fit the LLM's context, and only the beginning
            is kept.
    """

    added: int = 0
    replaced: int = 0
    unchanged: int = 0
    blank: int = 0
    cut: int = 0

    @property
    def documents(self) -> int:
        """Number of documents that were given."""
        return self.added + self.replaced + self.unchanged + self.blank


class IndexBuilder:
    """Adds documents to an index; one builder at a time.

    Documents are committed in batches: when a process is killed, or the disk is full, all batches
    before are whole, and a later builder goes on behind them. Use as a context manager, which holds
    the lock of the index.
    """

    def __init__(
        self,
        folder: StrPath,
        llm: FrozenLM,
        layout: LateLayout,
        config: IndexConfig,
        *,
        cut: bool = False,
        shard_bytes: int = _SHARD_BYTES,
    ) -> None:
        """Prepare a builder; nothing is opened yet.

        Args:
            folder: Folder of the index; made if it is missing.
            llm: The frozen LLM.
            layout: Runs the documents.
            config: What the index is made for.
            cut: Whether documents that do not fit the LLM's context are cut, instead of refused.
            shard_bytes: Size of keys at which a new shard begins.
        """
        self.folder = Path(folder)
        self.report = IndexReport()
        self._llm, self._layout, self._config = llm, layout, config
        self._cut, self._shard_bytes = cut, shard_bytes
        self._lock: int | None = None
        self._writer: ShardWriter | None = None
        self._seen: set[int] = set()

    def __enter__(self) -> Self:
        """Lock the index, and create it if it is missing.

        Raises:
            InputError: Another builder uses it, it cannot be written, or the folder holds other
                files.
            IndexMismatchError: It was made for something else.
            IndexDamagedError: It is damaged.
        """
        make_folder(self.folder, "the index")
        try:
            self._lock = open_locked(self.folder / _LOCK_FILE)
            self._prepare()
            self._writer = ShardWriter(self.folder, self._config, self._shard_bytes)
        except BlockingIOError:
            self._close()
            raise InputError(
                f"the index {show_path(self.folder)} is used by another builder; wait until it "
                "has ended, or name another folder."
            ) from None
        except OSError as error:
            self._close()
            raise InputError(unwritable(self.folder, error)) from error
        except BaseException:
            self._close()
            raise
        self._index = DocumentIndex(self.folder)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def add(self, documents: Iterable[Document]) -> Iterator[int]:
        """Add documents; those that are in the index with the same text are left as they are.

        Args:
            documents: Documents with or without ids. Any number: a batch at a time is in memory.

        Yields:
            The number of documents that are done with, after every batch that is on the disk.

        Raises:
            InputError: An id occurs twice, the disk is full, or the builder is not open.
            PromptTooLongError: A document does not fit the LLM's context, and is not to be cut.
        """
        if self._writer is None:
            raise InputError(
                f"the builder of {show_path(self.folder)} is not open; add documents inside its "
                "with block."
            )
        stream = iter(documents)
        while batch := list(islice(stream, _BATCH)):
            new = self._select(batch)
            if new:
                self._run(new, self._writer)
            yield len(batch)

    def _prepare(self) -> None:
        """Write the configuration of a new index, or compare that of an older one."""
        if (self.folder / CONFIG_FILE).exists():
            IndexConfig.load(self.folder).check_same(self._config, self.folder)
            return
        # A process that was killed may have left the lock, or half of the configuration.
        others = {name for name in os.listdir(self.folder) if not name.startswith(".")}
        others -= {_LOCK_FILE}
        if others:
            raise InputError(
                f"{show_path(self.folder)} holds other files, such as {show(min(others))}; name "
                "a new folder for the index."
            )
        self._config.save(self.folder)

    def _select(self, batch: Sequence[Document]) -> list[tuple[Document, NDArray[Any]]]:
        """Return the documents that must be run, with their records, and count all."""
        known = self._index.states([(document.id, document.text) for document in batch])
        texts = [document.text for document in batch]
        has_tokens = self._llm.encoder.has_tokens(texts)
        new = []
        for document, state, readable in zip(batch, known, has_tokens, strict=True):
            name, text = id_hash(document.id), text_hash(document.text)
            key = name or text[0]
            if key in self._seen:
                if name:
                    raise InputError(
                        f"the id {show(document.id)} occurs twice; give each document an id of "
                        "its own."
                    )
                state = "unchanged"
            self._seen.add(key)
            if not readable:
                self.report.blank += 1
            elif state == "unchanged":
                self.report.unchanged += 1
            else:
                record = np.zeros((), RECORD)
                record["text"], record["id"] = text, name
                new.append((document, record))
                if state == "new":
                    self.report.added += 1
                else:
                    self.report.replaced += 1
        return new

    def _run(self, new: Sequence[tuple[Document, NDArray[Any]]], writer: ShardWriter) -> None:
        """Run documents and commit them."""
        texts = [document.text for document, _ in new]
        pieces: Sequence[DocumentPiece] = self._llm.encoder.documents(
            texts, max_doc_tokens=self._config.max_doc_tokens
        )
        if self._cut:
            pieces = self._layout.frame(self._llm).fitted_documents(pieces, self._llm)
            self.report.cut += sum(piece.is_cut for piece in pieces)
        keys = self._layout.run_documents(self._llm, pieces, self._config.columns)
        entries = []
        for (document, record), piece, own in zip(new, pieces, keys, strict=True):
            document_keys = LateDocument(piece, own)
            reduced = self._index.reduce(document_keys, self._llm, self._layout)
            record["text_tokens"] = reduced.piece.text.size
            name = b"" if document.id is None else document.id.encode("utf-8", "surrogatepass")
            entries.append((record, _rows(reduced), name))
        try:
            writer.append(entries)
        except OSError as error:
            raise InputError(unwritable(self.folder, error)) from error

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _rows(document: LateDocument) -> Rows:
    keys = document.keys
    count = len(keys.table)
    scales = np.empty((count, 0), "<f2") if keys.scales is None else keys.scales.cpu().numpy()
    return Rows(
        keys.table.cpu().numpy(),
        scales,
        keys.positions.cpu().numpy().astype("<i4"),
        np.array(document.piece.ids, "<i4"),
    )
