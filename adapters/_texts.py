"""Find the texts of retrieved documents: in a corpus at hand, or stored in the index."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from routehead_plugins.data import Document
from routehead_plugins.errors import CollectionError, InputError
from routehead_plugins.io import TEXT_FIELDS, titled_text


class TextSource:
    """Look documents up by id.

    Args:
        searcher: A Pyserini searcher, asked for what the corpus lacks.
        corpus: Documents by id.
        text_fields: Where a stored JSON document has its text, the most wanted field first.

    Raises:
        InputError: There is neither a corpus nor a searcher that stores documents.
    """

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
        self._stores = hasattr(searcher, "doc")
        if corpus is None and not self._stores:
            raise InputError(
                f"a {type(searcher).__name__} stores no texts; expected a searcher with "
                "doc(docid); pass corpus= with the documents by id."
            )
        self._searcher = searcher
        self._corpus = {} if corpus is None else corpus
        self._text_fields = tuple(text_fields)

    def documents(self, scored: Sequence[tuple[str, float]]) -> list[Document]:
        """Return the documents of these ids, in this order, with these scores.

        Args:
            scored: Pairs of document id and first-stage score.

        Raises:
            CollectionError: A document is nowhere to be found, or without a text.
        """
        stored = self._stored({docid for docid, _ in scored if docid not in self._corpus})
        return [
            replace(self._corpus[docid], id=docid, score=score)
            if docid in self._corpus
            else self._read(docid, stored.get(docid), score)
            for docid, score in scored
        ]

    def _stored(self, docids: set[str]) -> Mapping[str, Any]:
        """Ask the searcher, for all at once where it can."""
        if not docids or not self._stores:
            return {}
        if hasattr(self._searcher, "batch_doc"):
            found: Mapping[str, Any] = self._searcher.batch_doc(sorted(docids), 1)
            return found
        return {docid: self._searcher.doc(docid) for docid in docids}

    def _read(self, docid: str, stored: Any, score: float) -> Document:
        if stored is None:
            raise CollectionError(
                f"document {docid!r} is neither in the index nor in the corpus; expected the text "
                "of every candidate; search the index that the run came from, or pass corpus=."
            )
        raw = stored.raw()
        if raw is None:
            raw = stored.contents()
        if raw is None:
            raise CollectionError(
                f"the index stores no text for document {docid!r}; expected an index made with "
                "-storeRaw; index again with -storeRaw (build_index does), or pass corpus=."
            )
        return document_from_raw(docid, raw, score=score, text_fields=self._text_fields)


def document_from_raw(
    docid: str, raw: str, *, score: float | None, text_fields: Sequence[str] = TEXT_FIELDS
) -> Document:
    """Read a stored document: JSON with a text field, or else plain text.

    Args:
        docid: Its id, which also becomes the document's.
        raw: What the index stores.
        score: First-stage score to carry along.
        text_fields: Names of the text field, the most wanted first; a blank one steps aside.

    Returns:
        The text with its title before it; other fields become metadata.

    Raises:
        CollectionError: It is a JSON object without any of the text fields.
    """
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
    # Lucene's `contents` may have the title folded in already.
    if not text.startswith(f"{title}\n"):
        text = titled_text(title, text)
    read = {"id", "_id", *texts} if title else {"id", "_id", "title", *texts}
    unread = {name: value for name, value in record.items() if name not in read}
    return Document(text, docid, metadata=unread, score=score)
