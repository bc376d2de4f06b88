"""Look up the texts of retrieved documents: in a given corpus, or stored in the index."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from routehead_plugins.data import Document, as_list, encodable
from routehead_plugins.errors import CollectionError, InputError, class_name, short_repr
from routehead_plugins.io import TEXT_FIELDS, titled_text

# Anserini refuses a document without contents. A no-break space is not a word to Lucene and blank
# to Python, so that blank documents can be looked up like all others.
NO_CONTENTS = "\u00a0"
_LISTED = 70
# What Lucene searches, and may therefore begin with the title already.
_SEARCHED = "contents"


class TextSource:
    """Look up documents by id, in the corpus or else in the searcher; see ``HeadRoutedStage``."""

    def __init__(
        self,
        searcher: Any,
        corpus: Mapping[str, Document] | None = None,
        text_fields: Sequence[str] = TEXT_FIELDS,
    ) -> None:
        names = [] if isinstance(text_fields, str) else as_list(text_fields, "text_fields", "names")
        if not names or not all(isinstance(name, str) for name in names):
            raise InputError(
                f"text_fields={short_repr(text_fields)} names no field; "
                f"expected a sequence of names; give one such as {TEXT_FIELDS[:2]!r}."
            )
        if corpus is not None and not isinstance(corpus, Mapping):
            raise InputError(
                f"corpus is a {class_name(corpus)}; give a mapping from ids to Documents, as "
                "read_corpus returns it."
            )
        self._stores_texts = hasattr(searcher, "doc")
        if corpus is None and not self._stores_texts:
            raise InputError(
                f"a {type(searcher).__name__} stores no texts; expected a searcher with "
                "doc(docid); pass corpus= with the documents by id."
            )
        self._searcher = searcher
        self._corpus = {} if corpus is None else corpus
        self._text_fields = tuple(names)

    def documents(self, scored: Sequence[tuple[str, float]]) -> list[Document]:
        """Look up documents for pairs of id and first-stage score, in the order given."""
        stored = self._stored({docid for docid, _ in scored if docid not in self._corpus})
        return [
            replace(self._given(docid), id=docid, score=score)
            if docid in self._corpus
            else stored_document(docid, stored.get(docid), score, self._text_fields)
            for docid, score in scored
        ]

    def _given(self, docid: str) -> Document:
        """Get a document from the corpus, where texts stand for documents."""
        document: Any = self._corpus[docid]
        if isinstance(document, str):
            return Document(document)
        if not isinstance(document, Document):
            raise InputError(
                f"corpus[{short_repr(docid)}] is a {class_name(document)}; "
                "give a routehead_plugins.Document or a str."
            )
        return document

    def _stored(self, docids: set[str]) -> Mapping[str, Any]:
        """Get stored documents from the searcher, in one batch if it supports it."""
        # Ids with halves of surrogate pairs are in no index, and cannot be passed to Java.
        docids = {docid for docid in docids if encodable(docid) == docid}
        if not docids or not self._stores_texts:
            return {}
        if hasattr(self._searcher, "batch_doc"):
            return self._searcher.batch_doc(sorted(docids), 1)  # type: ignore[no-any-return]
        return {docid: self._searcher.doc(docid) for docid in docids}


def _raw_text(docid: str, stored: Any) -> str:
    if stored is None:
        raise CollectionError(
            f"document {short_repr(docid)} is neither in the index nor in the corpus; "
            "expected the text of every candidate; search the index that the run came from, or "
            "pass corpus=."
        )
    raw: str | None = stored.raw()
    if raw is None:
        raw = stored.contents()
    if raw is None:
        raise CollectionError(
            f"the index stores no text for document {short_repr(docid)}; "
            "expected an index made with -storeRaw; index again with -storeRaw (build_index does), "
            "or pass corpus=."
        )
    return raw


def stored_document(
    docid: str, stored: Any, score: float | None, text_fields: Sequence[str] = TEXT_FIELDS
) -> Document:
    """Read a document of Lucene: JSON with one of the text fields, or else plain text."""
    raw = _raw_text(docid, stored)
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        return Document(raw, docid, score=score)
    texts = {name: record[name] for name in text_fields if isinstance(record.get(name), str)}
    if not texts:
        raise CollectionError(
            f"document {short_repr(docid)} has no text in {_listed(text_fields)}, only "
            f"{_listed(record)}; name the field that holds it with text_fields=."
        )
    title = record.get("title")
    name = next(iter(texts))
    if record.get(_SEARCHED) != NO_CONTENTS:
        name = next((name for name, value in texts.items() if value.strip()), name)
    text = texts[name]
    if name != _SEARCHED or not text.startswith(f"{title}\n"):
        text = titled_text(title, text)
    read = {"id", "_id", *texts} if title else {"id", "_id", "title", *texts}
    metadata = {name: value for name, value in record.items() if name not in read}
    return Document(text, docid, metadata, score)


def _listed(names: Iterable[str]) -> str:
    """List names of fields, as many as a message can hold."""
    listed = ", ".join(map(short_repr, names))
    return listed if len(listed) <= _LISTED else f"{listed[: _LISTED - 3]}..."
