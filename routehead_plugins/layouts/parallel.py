"""The parallel layout: every document on its own, and one tail that looks at all of them.

The attention pattern of BlockRank (arXiv 2510.05396), read from an LLM that was not trained for it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

from routehead_plugins.backbone import (
    DocumentPiece,
    FrozenLM,
    KeyValueCache,
    KeyValues,
    Pieces,
    batches,
)
from routehead_plugins.data import Span
from routehead_plugins.errors import PromptTooLongError
from routehead_plugins.heads import HeadSet
from routehead_plugins.layouts.base import ReadOptions, TokenAttention, tails_of, token_attention

# Tokens run at once, padding included.
_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class ParallelLayout:
    """Documents side by side: all begin at the same position, behind the same opening.

    A document sees the opening and itself; the tail, behind the longest document, sees all. Hence
    scores do not depend on the order of candidates, the cost is linear in documents, there may be
    any number of them, and what was computed for a document serves every later query.

    Attributes:
        cache: Keeps documents' keys and values for later queries; ``None`` keeps none.
    """

    cache: KeyValueCache | None = field(default=None, compare=False, repr=False)
    name: str = field(default="parallel", init=False)
    _openings: KeyValueCache = field(
        default_factory=lambda: KeyValueCache("64MB"), init=False, compare=False, repr=False
    )

    def read(
        self,
        llm: FrozenLM,
        query: str,
        texts: Sequence[str],
        heads: HeadSet,
        options: ReadOptions,
    ) -> TokenAttention:
        """Run the LLM and read the heads; see ``Layout.read``."""
        pieces = llm.encoder.pieces(
            query,
            texts,
            numbered=False,
            max_doc_tokens=options.max_doc_tokens,
            instruction=options.instruction,
        )
        _check_fits(pieces, llm)
        state = llm.state
        opening = self._opening(llm, state, pieces.opening, heads.last_layer)
        documents = self._documents(llm, state, pieces.documents, opening, heads.last_layer)
        start = max(document.end for document in documents)
        past = [opening, *documents]
        attention = llm.read(past, tails_of(pieces, options), heads, start=start)
        return token_attention(
            attention, list(_spans(pieces.documents, opening.tokens)), pieces, options
        )

    def _opening(
        self, llm: FrozenLM, state: Hashable, ids: tuple[int, ...], last_layer: int
    ) -> KeyValues:
        key = (state, ids)
        found = self._openings.get(key, last_layer=last_layer)
        if found is None:
            (found,) = llm.prefill([ids], last_layer=last_layer)
            self._openings.put(key, found)
        return found

    def _documents(
        self,
        llm: FrozenLM,
        state: Hashable,
        pieces: Sequence[DocumentPiece],
        opening: KeyValues,
        last_layer: int,
    ) -> list[KeyValues]:
        """Look documents up, and run those that are not there, equal ones once."""
        # Documents stand behind the opening, which does not change while the LLM does not.
        found: dict[tuple[int, ...], KeyValues] = {}
        missing: dict[tuple[int, ...], None] = {}
        for piece in pieces:
            held = None
            if self.cache is not None and piece.ids not in found:
                held = self.cache.get((state, piece.ids), last_layer=last_layer)
            if held is not None:
                found[piece.ids] = held
            elif piece.ids not in found:
                missing[piece.ids] = None
        sequences = list(missing)
        for places in batches([len(ids) for ids in sequences], _BATCH_TOKENS):
            batch = [sequences[place] for place in places]
            ran = llm.prefill(batch, last_layer=last_layer, behind=opening)
            for ids, new in zip(batch, ran, strict=True):
                found[ids] = new
                if self.cache is not None:
                    found[ids] = new.copied()
                    self.cache.put((state, ids), found[ids])
        return [found[piece.ids] for piece in pieces]


def _spans(documents: Sequence[DocumentPiece], start: int) -> Iterator[Span]:
    """Where the texts stand in the documents' keys, put one after the other."""
    for document in documents:
        yield Span(start + document.text.start, start + document.text.end)
        start += len(document.ids)


def _check_fits(pieces: Pieces, llm: FrozenLM) -> None:
    """Refuse a document that does not fit the LLM's context together with the query.

    Raises:
        PromptTooLongError: With the length, the limit, and what would make it fit.
    """
    longest = max(pieces.documents, key=lambda document: len(document.ids))
    around = len(pieces.opening) + pieces.tail_size
    tokens, limit = around + len(longest.ids), llm.max_tokens
    if limit is None or tokens <= limit:
        return
    cut = limit - (tokens - longest.text.size)
    advice = f"set max_doc_tokens={cut} or less" if cut > 0 else "shorten the query"
    raise PromptTooLongError(
        f"the longest document makes a prompt of {tokens:,} tokens, but {llm.name!r} takes "
        f"{limit:,}; {advice}.",
        tokens=tokens,
        limit=limit,
    )
