"""What every layout promises, and what they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from routehead_plugins.backbone import FrozenLM
from routehead_plugins.data import Span
from routehead_plugins.heads import HeadSet


@dataclass(frozen=True)
class TokenAttention:
    """What the heads look at.

    Attributes:
        query: Attention of the query's tokens, averaged over them, shape (heads, tokens).
        null: The same for the query without content, or ``None`` where it was not asked for.
        spans: Tokens of each document's text, in the caller's order.
    """

    query: Tensor
    null: Tensor | None
    spans: tuple[Span, ...]


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
        *,
        calibrate: bool,
        max_doc_tokens: int | None,
    ) -> TokenAttention:
        """Run the LLM and read the heads.

        Args:
            llm: The frozen LLM.
            query: What is looked for.
            texts: The documents, best candidate first, none of them blank.
            heads: The heads to read.
            calibrate: Whether to read the query without content as well.
            max_doc_tokens: Longer documents are cut.

        Raises:
            PromptTooLongError: The prompt does not fit the LLM's context.
        """
        ...


def longest_cut(lengths: Sequence[int], room: int) -> int:
    """Largest cut with which documents of these ascending lengths fill no more than the room."""
    for place, length in enumerate(lengths):
        share = room // (len(lengths) - place)
        if length > share:
            return max(0, share)
        room -= length
    return lengths[-1]
