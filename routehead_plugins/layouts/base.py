"""How the pieces of a prompt are arranged and run.

A layout decides order, positions and passes; nothing else in the house knows. Attention comes
back in the caller's order of documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from routehead_plugins.backbone import FrozenLM
from routehead_plugins.data import Span
from routehead_plugins.errors import InputError, PromptTooLongError
from routehead_plugins.heads import HeadSet
from routehead_plugins.prompt import Pieces


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


@dataclass(frozen=True)
class SequentialLayout:
    """All documents one after the other, best candidate last, beside the query.

    The prefix of documents is run once; the tails with and without the query are run on its keys
    and values in one batched pass.
    """

    name: str = "sequential"

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
        """Run the LLM and read the heads; see ``Layout.read``."""
        pieces = llm.encoder.pieces(
            query, texts[::-1], numbered=True, max_doc_tokens=max_doc_tokens
        )
        check_fits(pieces, llm)
        prefix, spans = list(pieces.opening), []
        for document in pieces.documents:
            spans.append(Span(len(prefix) + document.text.start, len(prefix) + document.text.end))
            prefix += document.ids
        ids = torch.tensor([prefix], device=llm.device)
        cache = llm.prefill(ids, last_layer=heads.last_layer)
        tails = [pieces.tail, pieces.null_tail] if calibrate else [pieces.tail]
        attention = llm.read(cache, tails, heads, start=len(prefix))
        return TokenAttention(
            query=attention[0], null=attention[1] if calibrate else None, spans=tuple(spans[::-1])
        )


_LAYOUTS: dict[str, Layout] = {"sequential": SequentialLayout()}


def get_layout(name: str | None) -> Layout:
    """Look a layout up by name; ``None`` is the sequential one.

    Raises:
        InputError: There is no layout of that name.
    """
    layout = _LAYOUTS.get(name or "sequential")
    if layout is None:
        raise InputError(f"layout={name!r} is unknown; this release has: {', '.join(_LAYOUTS)}.")
    return layout


def check_fits(pieces: Pieces, llm: FrozenLM) -> None:
    """Refuse a prompt longer than the LLM's context.

    Raises:
        PromptTooLongError: With the length, the limit, and the cut that would make it fit.
    """
    limit = llm.max_tokens
    if limit is None or pieces.size <= limit:
        return
    lengths = sorted(document.text.size for document in pieces.documents)
    room = limit - (pieces.size - sum(lengths))
    cut = _longest_cut(lengths, room)
    advice = f"set max_doc_tokens={cut} or less, or give" if cut else "give a shorter query or"
    raise PromptTooLongError(
        f"the prompt has {pieces.size:,} tokens with {len(lengths)} documents, but {llm.name!r} "
        f"takes {limit:,}; {advice} fewer documents.",
        tokens=pieces.size,
        limit=limit,
    )


def _longest_cut(lengths: Sequence[int], room: int) -> int:
    """Largest cut with which documents of these ascending lengths fill no more than the room."""
    for place, length in enumerate(lengths):
        share = room // (len(lengths) - place)
        if length > share:
            return max(0, share)
        room -= length
    return lengths[-1]
