"""The interface of a layout, and helpers that layouts share."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from routehead_plugins.backbone import (
    DocumentPiece,
    FrozenLM,
    KeyValueCache,
    KeyValues,
    Pieces,
    check_max_doc_tokens,
)
from routehead_plugins.data import Span, check_number, check_text
from routehead_plugins.heads import HeadSet
from routehead_plugins.scoring import TokenAttention


@dataclass(frozen=True)
class ReadOptions:
    """Options of one reading, besides query and documents.

    Attributes:
        calibrate: Whether to read the query without content as well.
        instruction: Text right before the query that says which documents are relevant.
        null_share: Share of the calibration that uses the null query with the instruction; the
            rest omits it (arXiv 2609.17764 uses 0 where instructions differ per query).
        max_doc_tokens: Longer documents are cut here.
        candidates: Every head that any query may read, for which the late layout keeps documents'
            keys; ``None`` for the heads of this reading.
        cut: Whether documents and queries that do not fit the LLM's context are cut, instead of
            refused.

    Raises:
        InputError: A value is out of range.
    """

    calibrate: bool = True
    instruction: str | None = None
    null_share: float = 1.0
    max_doc_tokens: int | None = None
    candidates: HeadSet | None = None
    cut: bool = False

    def __post_init__(self) -> None:
        check_max_doc_tokens(self.max_doc_tokens)
        check_null_share(self.null_share)
        if self.instruction is not None:
            check_text("instruction", self.instruction)


def check_null_share(null_share: object) -> float:
    """Check a share of the calibration; see ``ReadOptions``.

    Returns:
        The share.

    Raises:
        InputError: The share is not a number from 0 to 1.
    """
    return check_number("null_share", null_share, least=0, most=1)


class Layout(Protocol):
    """An arrangement of documents and query."""

    @property
    def name(self) -> str:
        """Name that head sets and routers record."""

    def read(
        self,
        llm: FrozenLM,
        query: str,
        texts: Sequence[str],
        heads: HeadSet,
        options: ReadOptions,
    ) -> TokenAttention:
        """Run the LLM and read the heads.

        Args:
            llm: The frozen LLM.
            query: The query.
            texts: The documents, best candidate first, none of them blank.
            heads: The heads to read.
            options: Instruction, calibration and length of documents.

        Raises:
            PromptTooLongError: The prompt does not fit the LLM's context, and is not to be cut.
        """


def with_room_for_documents(pieces: Pieces, room: int, documents: int) -> Pieces:
    """Cut a query that leaves less than half of the room to the documents, if they need it.

    Args:
        pieces: The pieces of a prompt.
        room: Tokens of documents and tail together.
        documents: Tokens that the documents need.
    """
    share = max(room // 2, room - documents)
    return pieces.cut_query(len(pieces.tail) - share)


def cut_to(documents: Sequence[DocumentPiece], room: int) -> tuple[DocumentPiece, ...]:
    """Cut each document to some tokens, label and separator included."""
    return tuple(piece.cut(room - (len(piece.ids) - piece.text.size)) for piece in documents)


def prompt_key(llm: FrozenLM, length: int) -> Hashable:
    """Return what keys and values depend on, beside their tokens, in a prompt of this length."""
    return llm.cache_key, llm.rotary_key(length)


def cached_prefill(
    llm: FrozenLM,
    key: Hashable,
    ids: tuple[int, ...],
    last_layer: int,
    length: int,
    cache: KeyValueCache,
) -> KeyValues:
    """Run the beginning of a prompt up to a layer, or look it up by its ``prompt_key``."""
    prefix = cache.get((key, ids), last_layer=last_layer)
    if prefix is None:
        (prefix,) = llm.prefill([ids], last_layer=last_layer, length=length)
        cache.put((key, ids), prefix)
    return prefix


def tails_of(pieces: Pieces, options: ReadOptions) -> list[tuple[int, ...]]:
    """Return the query's tail, followed by those that calibrate it."""
    tails = [pieces.tail]
    if options.calibrate:
        tails.append(pieces.null_tail)
        if options.null_share < 1:
            tails.append(pieces.bare_null_tail)
    return tails


def token_attention(
    attention: Tensor, pieces: Pieces, options: ReadOptions, *, prefix: int | None = None
) -> TokenAttention:
    """Split attention of ``tails_of``, (tails, heads, tokens), into query and calibration.

    The tokens are those of the prefix and of the documents, one after the other; ``prefix`` is the
    number of the first of them, ``None`` for the whole prefix.
    """
    query, null = query_and_null(attention, options)
    start, spans = len(pieces.prefix) if prefix is None else prefix, []
    for document in pieces.documents:
        spans.append(Span(start + document.text.start, start + document.text.end))
        start += len(document.ids)
    return TokenAttention(
        query=query,
        null=null,
        spans=tuple(spans),
        query_ids=pieces.query,
        document_ids=tuple(piece.ids[slice(*piece.text)] for piece in pieces.documents),
        kept=tuple(piece.kept for piece in pieces.documents),
        cut=frozenset(index for index, piece in enumerate(pieces.documents) if piece.is_cut),
        query_is_cut=pieces.query_is_cut,
    )


def query_and_null(attention: Tensor, options: ReadOptions) -> tuple[Tensor, Tensor | None]:
    """Split attention of ``tails_of``, (tails, heads, tokens), into query and calibration."""
    null = attention[1] if options.calibrate else None
    if null is not None and options.null_share < 1:
        null = options.null_share * null + (1 - options.null_share) * attention[2]
    return attention[0], null
