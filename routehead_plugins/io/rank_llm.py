"""Read and write rank_llm's request files: one query and its candidates per line of JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from routehead_plugins.data import Document
from routehead_plugins.errors import CollectionError, InputError
from routehead_plugins.files import StrPath, atomic_write_text, encode_json, show
from routehead_plugins.io.beir import titled_text
from routehead_plugins.io.text_files import (
    first_key,
    json_id,
    json_records,
    json_text,
    reject_repeated,
)

# rank_llm's own order of preference.
TEXT_FIELDS = ("text", "segment", "contents", "content", "body", "passage")


@dataclass(frozen=True, slots=True)
class Request:
    """A query and the documents to rank for it.

    Attributes:
        query_id: Id of the query.
        query: Text of the query.
        candidates: Documents, best first, with first-stage scores and ``doc`` as metadata.
        instruction: Which documents are relevant to the query; ``None`` where it does not say.
    """

    query_id: str
    query: str
    candidates: tuple[Document, ...]
    instruction: str | None = None


def read_requests(path: StrPath) -> list[Request]:
    """Read requests, in the file's order.

    Args:
        path: Lines of ``{"query": {"text", "qid"}, "candidates": [{"docid", "score", "doc"}]}``;
            a document's text is its title and the first field of `TEXT_FIELDS` that it has. A query
            may have an ``instruction`` as well.

    Raises:
        CollectionError: The file is missing or malformed, a query is blank, or an id repeated.
    """
    requests: dict[str, Request] = {}
    expected = "one JSON object per line with 'query' and 'candidates'"
    for location, record in json_records(path, expected):
        query, candidates = record.get("query"), record.get("candidates")
        if not isinstance(query, dict) or not isinstance(candidates, list):
            raise CollectionError(
                f"{location}: {show(record)} is not a request; expected an object 'query' "
                "and a list 'candidates'; repair the line."
            )
        query_id = json_id(query, ("qid",), location)
        text = json_text(query, ("text",), location, blank=False)
        reject_repeated(query_id, requests, "query", location)
        documents: dict[str, Document] = {}
        for candidate in candidates:
            document = _document(candidate, location)
            doc_id = str(document.id)
            reject_repeated(doc_id, documents, f"for query {show(query_id)}, document", location)
            documents[doc_id] = document
        instruction = None
        if query.get("instruction") is not None:
            instruction = json_text(query, ("instruction",), location, blank=False)
        requests[query_id] = Request(query_id, text, tuple(documents.values()), instruction)
    return list(requests.values())


def _document(candidate: Any, location: str) -> Document:
    doc = candidate.get("doc") if isinstance(candidate, dict) else None
    if not isinstance(doc, dict):
        raise CollectionError(
            f"{location}: {show(candidate)} is not a candidate; "
            "expected an object with 'docid', 'score' and an object 'doc'; repair the line."
        )
    text = titled_text(doc.get("title"), json_text(doc, TEXT_FIELDS, location, blank=True))
    doc_id = json_id(candidate, ("docid",), location)
    score = candidate.get("score")
    # An integer may exceed every float, and math.isfinite then raises.
    is_number = isinstance(score, int | float) and not isinstance(score, bool)
    if score is not None and not (is_number and abs(score) <= sys.float_info.max):
        raise CollectionError(
            f"{location}: the score of document {show(doc_id)} is {show(score)}; "
            "expected a finite number; repair the line."
        )
    return Document(text, doc_id, doc, None if score is None else float(score))


def write_requests(path: StrPath, requests: Iterable[Request]) -> None:
    """Write requests; a document that was read from a request file keeps its ``doc``.

    Args:
        path: Path of the file, which appears whole or not at all.
        requests: Requests in the order to write. The score of a candidate without one is null,
            which `read_requests` accepts and rank_llm does not.

    Raises:
        InputError: A document has no id, JSON cannot hold it, or the file cannot be written.
    """
    atomic_write_text(path, "".join(_line(request) for request in requests))


def _line(request: Request) -> str:
    candidates = []
    for position, document in enumerate(request.candidates):
        if document.id is None:
            raise InputError(
                f"candidate {position} of query {show(request.query_id)} has id=None; "
                "a request file names every document; give it an id."
            )
        candidates.append({"docid": document.id, "score": document.score, "doc": _doc(document)})
    query = {"text": request.query, "qid": request.query_id}
    if request.instruction is not None:
        query["instruction"] = request.instruction
    name = f"the metadata or a score of query {show(request.query_id)}"
    return encode_json({"query": query, "candidates": candidates}, name, allow_nan=False) + "\n"


def _doc(document: Document) -> dict[str, Any]:
    doc = dict(document.metadata)
    title, text = doc.get("title"), doc.get(first_key(doc, TEXT_FIELDS))
    if isinstance(text, str) and titled_text(title, text) == document.text:
        return doc
    heading = titled_text(title, "")
    if not document.text.startswith(heading):
        doc.pop("title")
        heading = ""
    return doc | {"text": document.text.removeprefix(heading)}
