"""What every layout promises, and what they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from routehead_plugins.backbone import FrozenLM, Pieces, check_max_doc_tokens
from routehead_plugins.data import Span, check_text
from routehead_plugins.errors import InputError
from routehead_plugins.heads import HeadSet


@dataclass(frozen=True)
class ReadOptions:
    """What a prompt says besides query and documents, and what is read of it.

    Attributes:
        calibrate: Whether to read the query without content as well.
        instruction: What counts as relevant for this query, said right before it.
        null_share: Where there is an instruction, the query without content has something to look
            for after all. Calibrate by this share of it, and for the rest by one without the
            instruction (arXiv 2609.17764 has 0 for instructions that differ per query).
        max_doc_tokens: Longer documents are cut.

    Raises:
        InputError: A value is out of range.
    """

    calibrate: bool = True
    instruction: str | None = None
    null_share: float = 1.0
    max_doc_tokens: int | None = None

    def __post_init__(self) -> None:
        check_max_doc_tokens(self.max_doc_tokens)
        if not 0 <= self.null_share <= 1:
            raise InputError(f"null_share={self.null_share!r} is no share; give 0 to 1.")
        if self.instruction is not None:
            check_text("instruction", self.instruction)


@dataclass(frozen=True)
class TokenAttention:
    """What the heads look at.

    Attributes:
        query: Attention of the query's tokens, averaged over them, shape (heads, tokens).
        null: The same for the query without content, or ``None`` where it was not asked for.
        spans: Tokens of each document's text, in the caller's order.
        query_ids: Token ids of the query itself.
        document_ids: Token ids of each document's text, in the caller's order.
    """

    query: Tensor
    null: Tensor | None
    spans: tuple[Span, ...]
    query_ids: tuple[int, ...] = ()
    document_ids: tuple[tuple[int, ...], ...] = ()


class Layout(Protocol):
    """An arrangement of documents and query."""

    @property
    def name(self) -> str:
        """What head sets and routers record."""
        ...

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
            query: What is looked for.
            texts: The documents, best candidate first, none of them blank.
            heads: The heads to read.
            options: What else the prompt says, and what is read of it.

        Raises:
            PromptTooLongError: The prompt does not fit the LLM's context.
        """
        ...


def tails_of(pieces: Pieces, options: ReadOptions) -> list[tuple[int, ...]]:
    """The query's tail, and those that calibrate it.

    Args:
        pieces: Of the prompt.
        options: Say which tails there are.
    """
    tails = [pieces.tail]
    if options.calibrate:
        tails.append(pieces.null_tail)
        if options.null_share < 1:
            tails.append(pieces.bare_null_tail)
    return tails


def token_attention(
    attention: Tensor, spans: Sequence[Span], pieces: Pieces, options: ReadOptions
) -> TokenAttention:
    """Put together what was read of the tails.

    Args:
        attention: Shape (tails, heads, tokens), in the order of ``tails_of``.
        spans: Of each document's text, in the order of the pieces.
        pieces: Of the prompt.
        options: As for ``tails_of``.
    """
    null = attention[1] if options.calibrate else None
    if null is not None and options.null_share < 1:
        null = options.null_share * null + (1 - options.null_share) * attention[2]
    return TokenAttention(
        query=attention[0],
        null=null,
        spans=tuple(spans),
        query_ids=pieces.query,
        document_ids=tuple(piece.ids[slice(*piece.text)] for piece in pieces.documents),
    )


def longest_cut(lengths: Sequence[int], room: int) -> int:
    """Largest cut with which documents of these ascending lengths fill no more than the room."""
    for place, length in enumerate(lengths):
        share = room // (len(lengths) - place)
        if length > share:
            return max(0, share)
        room -= length
    return lengths[-1]
