"""Look up the texts of retrieved documents: in a given corpus, or stored in the index."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from routehead_plugins.data import Document
from routehead_plugins.errors import CollectionError, InputError
from routehead_plugins.io import TEXT_FIELDS, titled_text


class TextSource:
    """Look up documents by id, in the corpus or else in the searcher; see ``HeadRoutedStage``."""

    def __init__(
        self,
        searcher: Any,
        corpus: Mapping[str, Document] | None = None,
        text_fields: Sequence[str] = TEXT_FIELDS,
    ) -> None:
        if isinstance(text_fields, str) or not text_fields:
            raise InputError(
                f"text_fields={text_fields!r} names no field; expected a sequence of names; "
                f"give one such as {TEXT_FIELDS[:2]!r}."
            )
        self._stores_texts = hasattr(searcher, "doc")
        if corpus is None and not self._stores_texts:
            raise InputError(
                f"a {type(searcher).__name__} stores no texts; expected a searcher with "
                "doc(docid); pass corpus= with the documents by id."
            )
        self._searcher = searcher
        self._corpus = {} if corpus is None else corpus
        self._text_fields = tuple(text_fields)

    def documents(self, scored: Sequence[tuple[str, float]]) -> list[Document]:
        """Look up documents for pairs of id and first-stage score, in the order given."""
        stored = self._stored({docid for docid, _ in scored if docid not in self._corpus})
        return [
            replace(self._corpus[docid], id=docid, score=score)
            if docid in self._corpus
            else _to_document(docid, _raw_text(docid, stored.get(docid)), score, self._text_fields)
            for docid, score in scored
        ]

    def _stored(self, docids: set[str]) -> Mapping[str, Any]:
        """Get stored documents from the searcher, in one batch if it supports it."""
        if not docids or not self._stores_texts:
            return {}
        if hasattr(self._searcher, "batch_doc"):
            return self._searcher.batch_doc(sorted(docids), 1)  # type: ignore[no-any-return]
        return {docid: self._searcher.doc(docid) for docid in docids}


def _raw_text(docid: str, stored: Any) -> str:
    if stored is None:
        raise CollectionError(
            f"document {docid!r} is neither in the index nor in the corpus; expected the text "
            "of every candidate; search the index that the run came from, or pass corpus=."
        )
    raw: str | None = stored.raw()
    if raw is None:
        raw = stored.contents()
    if raw is None:
        raise CollectionError(
            f"the index stores no text for document {docid!r}; expected an index made with "
            "-storeRaw; index again with -storeRaw (build_index does), or pass corpus=."
        )
    return raw


def _to_document(docid: str, raw: str, score: float, text_fields: Sequence[str]) -> Document:
    """Read a stored document: JSON with one of the text fields, or else plain text."""
    try:
        record = json.loads(raw)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        return Document(raw, docid, score=score)
    texts = {name: record[name] for name in text_fields if isinstance(record.get(name), str)}
    if not texts:
        raise CollectionError(
            f"document {docid!r} has no text in {', '.join(map(repr, text_fields))}, only "
            f"{', '.join(map(repr, record))}; name the field that holds it with text_fields=."
        )
    text = next((value for value in texts.values() if value.strip()), next(iter(texts.values())))
    title = record.get("title")
    # Lucene's `contents` may begin with the title already.
    if not text.startswith(f"{title}\n"):
        text = titled_text(title, text)
    read = {"id", "_id", *texts} if title else {"id", "_id", "title", *texts}
    metadata = {name: value for name, value in record.items() if name not in read}
    return Document(text, docid, metadata, score)
