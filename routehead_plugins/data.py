"""Documents, spans and rankings.

Everything here is immutable. Spans are half-open, ``[start, end)``, everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, overload

from routehead_plugins.errors import InputError
from routehead_plugins.heads import HeadSet


class Span(NamedTuple):
    """A half-open range ``[start, end)``."""

    start: int
    end: int

    @property
    def size(self) -> int:
        """Number of positions in the span."""
        return self.end - self.start


class TextSpan(NamedTuple):
    """Characters ``[start, end)`` of a document's text, and the score they carry."""

    start: int
    end: int
    score: float


@dataclass(frozen=True, slots=True)
class Document:
    """A text to rank.

    Attributes:
        text: The text that the LLM reads.
        id: The caller's name for the document; need not be unique.
        metadata: Passed through, never read.
        score: First-stage (retrieval) score, when there is one.
    """

    text: str
    id: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    score: float | None = None

    @property
    def is_blank(self) -> bool:
        """Whether the text is empty or white space only."""
        return not self.text.strip()


@dataclass(frozen=True, slots=True)
class ScoredDocument:
    """A document with its relevance score.

    Attributes:
        index: Index of the document in the caller's list.
        score: Higher is more relevant; comparable within one ranking.
        document: The document, as it was given.
        spans: Passages of its text that carry the score, highest score first; only on request.
    """

    index: int
    score: float
    document: Document
    spans: tuple[TextSpan, ...] = ()


@dataclass(frozen=True, slots=True)
class Ranking(Sequence[ScoredDocument]):
    """Documents, best first; ties keep the caller's order.

    Attributes:
        query: The query.
        hits: The scored documents, best first.
        heads: The heads that were read for this query.
        layout: Name of the prompt layout.
    """

    query: str
    hits: tuple[ScoredDocument, ...]
    heads: HeadSet
    layout: str | None = None

    @overload
    def __getitem__(self, index: int) -> ScoredDocument: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[ScoredDocument, ...]: ...
    def __getitem__(self, index: int | slice) -> ScoredDocument | tuple[ScoredDocument, ...]:
        return self.hits[index]

    def __len__(self) -> int:
        return len(self.hits)


def as_documents(documents: Sequence[str | Document]) -> list[Document]:
    """Convert texts to documents; documents among them are left as they are.

    Raises:
        InputError: The argument is one string, or an item is neither a text nor a document.
    """
    if isinstance(documents, str):
        raise InputError("documents is one string; give a list of texts or Documents.")
    converted = [Document(item) if isinstance(item, str) else item for item in documents]
    for index, item in enumerate(converted):
        if not isinstance(item, Document):
            raise InputError(
                f"documents[{index}] is a {type(item).__name__}; "
                "give a str or a routehead_plugins.Document."
            )
    return converted


def non_blank_indices(documents: Sequence[Document]) -> list[int]:
    """Return the indices of the documents that have a text to read."""
    return [index for index, document in enumerate(documents) if not document.is_blank]


def check_count(name: str, value: object) -> None:
    """Check that an argument is a whole number, 1 or more; its name is for the message.

    Raises:
        InputError: The value is anything else.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name}={value!r} is not a count; give a whole number, 1 or more.")


def check_top_n(top_n: int | None) -> None:
    """Check a number of results; ``None`` stands for all.

    Raises:
        InputError: The number is below 1.
    """
    if top_n is not None and top_n < 1:
        raise InputError(f"top_n={top_n!r} returns nothing; give 1 or more, or None for all.")


def check_text(name: str, value: object) -> None:
    """Check that an argument is a text that is not blank; its name is for the message.

    Raises:
        InputError: The value is blank, or not a text.
    """
    if not isinstance(value, str):
        raise InputError(f"{name}={value!r} is a {type(value).__name__}; give a text.")
    if not value.strip():
        raise InputError(f"{name}={value!r} is blank; give a text.")
