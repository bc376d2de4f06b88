"""Documents, spans and rankings; and the checks of what callers give.

Documents, spans and rankings are immutable. Spans are half-open, ``[start, end)``, everywhere.
Numbers may be those of numpy or torch; they are converted to Python's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from numbers import Integral, Real
from typing import Any, NamedTuple, overload

from routehead_plugins.errors import InputError, class_name, short_repr
from routehead_plugins.heads import HeadSet

# Python refuses to write numbers of thousands of digits.
_ID_LIMIT = 10**100


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
        id: The caller's name for the document; need not be unique. A whole number becomes a text.
        metadata: Passed through, never read; ``None`` becomes an empty mapping.
        score: First-stage (retrieval) score, when there is one. NaN and infinite scores count as
            missing.

    Raises:
        InputError: A value has another type.
    """

    text: str
    id: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    score: float | None = None

    def __post_init__(self) -> None:
        given: Any = self  # callers need not check types
        if not isinstance(given.text, str):
            raise InputError(_not_a_text("text", given.text))
        if given.id is not None and not isinstance(given.id, str):
            object.__setattr__(self, "id", _as_id(given.id))
        if given.metadata is None:
            object.__setattr__(self, "metadata", {})
        elif not isinstance(given.metadata, Mapping):
            raise InputError(
                f"metadata={short_repr(given.metadata)} is a {class_name(given.metadata)}; "
                "give a mapping, such as a dict."
            )
        if given.score is not None and type(given.score) is not float:
            object.__setattr__(self, "score", _as_score(given.score))

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
class Usage:
    """How much was read for a ranking.

    Attributes:
        query_tokens: Tokens of the query.
        document_tokens: Tokens of all documents' texts together.
        passages: Number of texts that were read: documents, or the passages of long ones.
        documents_cut: Number of those that did not fit the LLM's context, and were cut.
        query_cut: Whether the query was.
    """

    query_tokens: int = 0
    document_tokens: int = 0
    passages: int = 0
    documents_cut: int = 0
    query_cut: bool = False


@dataclass(frozen=True, slots=True)
class Ranking(Sequence[ScoredDocument]):
    """Documents, best first; ties keep the caller's order.

    Attributes:
        query: The query.
        hits: The scored documents, best first.
        heads: The heads that were read for this query.
        layout: Name of the prompt layout.
        adapter: Label of the LLM's LoRA adapter; ``None`` for none.
        usage: How much was read.
    """

    query: str
    hits: tuple[ScoredDocument, ...]
    heads: HeadSet
    layout: str | None = None
    adapter: str | None = None
    usage: Usage = field(default_factory=Usage)

    @overload
    def __getitem__(self, index: int) -> ScoredDocument: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[ScoredDocument, ...]: ...
    def __getitem__(self, index: int | slice) -> ScoredDocument | tuple[ScoredDocument, ...]:
        return self.hits[index]

    def __len__(self) -> int:
        return len(self.hits)


def as_documents(documents: Iterable[str | Document], name: str = "documents") -> list[Document]:
    """Convert texts to documents; documents among them are left as they are.

    Args:
        documents: Texts and documents, in an order: a list, a tuple, a generator, an array.
        name: The argument's name, for the message.

    Raises:
        InputError: The argument is not such a list, or an item is neither a text nor a document.
    """
    converted = [
        Document(item) if isinstance(item, str) else item for item in as_list(documents, name)
    ]
    for index, item in enumerate(converted):
        if not isinstance(item, Document):
            raise InputError(
                f"{name}[{index}] is a {class_name(item)}; "
                "give a str or a routehead_plugins.Document."
            )
    return converted


def non_blank_indices(documents: Sequence[Document]) -> list[int]:
    """Return the indices of the documents that have a text to read."""
    return [index for index, document in enumerate(documents) if not document.is_blank]


def as_list(
    items: Iterable[Any], name: str = "documents", expected: str = "texts or Documents"
) -> list[Any]:
    """Convert an argument of several items, in an order, to a list; see ``check_items``."""
    return list(check_items(items, name, expected))


def check_items(
    items: Iterable[Any], name: str = "documents", expected: str = "texts or Documents"
) -> Iterable[Any]:
    """Check that an argument is several items in an order: a list, a generator, an array.

    Args:
        items: The argument; its items are not checked.
        name: Its name, for the message.
        expected: What its items are, for the message.

    Returns:
        The argument.

    Raises:
        InputError: It is one text or one object, or a mapping or a set.
    """
    advice = f"give a list of {expected}"
    if isinstance(items, str):
        raise InputError(f"{name} is one string; {advice}.")
    if isinstance(items, Mapping):
        raise InputError(f"{name} is a {class_name(items)}; give its values as a list.")
    if isinstance(items, set | frozenset):
        raise InputError(f"{name} is a {class_name(items)}, which has no order; {advice}.")
    one = isinstance(items, bytes | bytearray | memoryview) or not isinstance(items, Iterable)
    # A table of two dimensions, such as a DataFrame, may iterate over the names of its columns.
    if one or getattr(items, "ndim", 1) != 1:
        raise InputError(f"{name} is a {class_name(items)}; {advice}.")
    return items


def as_number(value: object) -> float | None:
    """Convert a number to a float; ``None`` for one beyond all floats, and for anything else."""
    plain = _plain(value)
    if isinstance(plain, bool) or not isinstance(plain, Real | Decimal):
        return None
    try:
        return float(plain)
    except (OverflowError, ValueError):  # a whole number of 400 digits; a signalling NaN
        return None


def check_number(
    name: str, value: object, *, least: float = -math.inf, most: float = math.inf
) -> float:
    """Check that an argument is a finite number within bounds.

    Args:
        name: The argument's name, for the message.
        value: Its value.
        least: Smallest number allowed.
        most: Largest number allowed.

    Returns:
        The number.

    Raises:
        InputError: The value is anything else.
    """
    number = as_number(value)
    if number is not None and math.isfinite(number) and least <= number <= most:
        return number
    allowed = "a finite number"
    if math.isfinite(most):
        allowed = f"a number from {least:g} to {most:g}"
    elif math.isfinite(least):
        allowed += f", {least:g} or more"
    raise InputError(f"{name}={short_repr(value)} must be {allowed}.")


def check_count(name: str, value: object) -> int:
    """Check that an argument is a whole number, 1 or more; its name is for the message.

    Returns:
        The number.

    Raises:
        InputError: The value is anything else.
    """
    number = _whole(value)
    if number is None or number < 1:
        raise InputError(
            f"{name}={short_repr(value)} is not a count; give a whole number, 1 or more."
        )
    return number


def check_top_n(top_n: object) -> int | None:
    """Check a number of results; ``None`` stands for all.

    Returns:
        The number.

    Raises:
        InputError: The value is not a whole number, or below 1.
    """
    if top_n is None:
        return None
    number = _whole(top_n)
    if number is not None and number < 1:
        raise InputError(
            f"top_n={short_repr(top_n)} returns nothing; give 1 or more, or None for all."
        )
    return check_count("top_n", top_n)


def check_flag(name: str, value: object) -> bool:
    """Check that an argument is true or false; its name is for the message.

    Returns:
        The flag.

    Raises:
        InputError: The value is anything but a boolean.
    """
    flag = _plain(value)
    if not isinstance(flag, bool):
        raise InputError(f"{name}={short_repr(value)} must be True or False.")
    return flag


def check_text(name: str, value: object, *, blank: bool = False) -> None:
    """Check that an argument is a text.

    Args:
        name: The argument's name, for the message.
        value: Its value.
        blank: Whether the text may be empty or white space.

    Raises:
        InputError: The value is blank, or not a text.
    """
    if not isinstance(value, str):
        raise InputError(_not_a_text(name, value))
    if not blank and not value.strip():
        raise InputError(f"{name}={short_repr(value)} is blank; give a text.")


def encodable(text: str) -> str:
    """Replace halves of surrogate pairs, left by broken JSON escapes, which no encoding has."""
    return text.encode(errors="replace").decode()


def _not_a_text(name: str, value: object) -> str:
    return f"{name}={short_repr(value)} is a {class_name(value)}; give a text."


def _as_id(value: object) -> str:
    number = _whole(value)
    if number is None or abs(number) >= _ID_LIMIT:
        raise InputError(f"id={short_repr(value)} is a {class_name(value)}; give a text or None.")
    return str(number)


def _as_score(value: object) -> float:
    number = as_number(value)
    if number is None:
        raise InputError(
            f"score={short_repr(value)} must be a number that a float can hold, or None."
        )
    return number


def _plain(value: object) -> object:
    """Convert a scalar of numpy or torch to Python's."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _whole(value: object) -> int | None:
    """Convert a whole number to an int; ``None`` for anything else, booleans included."""
    plain = _plain(value)
    if isinstance(plain, bool):
        return None
    return int(plain) if isinstance(plain, Integral) else None
