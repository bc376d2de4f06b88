"""The parallel layout: every document on its own, and a tail that looks at all of them.

The attention pattern of BlockRank (arXiv 2510.05396), read from an LLM that was not trained for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from routehead_plugins.backbone import FrozenLM, KeyValueCache, KeyValues, Pieces, batches
from routehead_plugins.errors import PromptTooLongError
from routehead_plugins.heads import HeadSet
from routehead_plugins.layouts.base import (
    ReadOptions,
    cached_prefill,
    cut_to,
    prompt_key,
    tails_of,
    token_attention,
    with_room_for_documents,
)
from routehead_plugins.scoring import TokenAttention

# Tokens run at once, padding included.
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class ParallelLayout:
    """Documents side by side: all begin at the same position, behind the same prefix.

    A document sees the prefix and itself; the tail, behind the longest document, sees all. Hence
    scores do not depend on the order of candidates, the cost is linear in documents, there may be
    any number of them, and the keys and values of a document serve every later query.

    Attributes:
        cache: Keeps documents' keys and values for later queries; ``None`` keeps none.
    """

    cache: KeyValueCache | None = field(default=None, compare=False, repr=False)
    name: str = field(default="parallel", init=False)
    _prefixes: KeyValueCache = field(
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
        if options.cut:
            pieces = self._fitted(pieces, llm)
        self.check_fits(pieces, llm)
        tails = tails_of(pieces, options)
        longest = max(len(document.ids) for document in pieces.documents)
        length = len(pieces.prefix) + longest + max(map(len, tails))
        context = partial(self._context, llm, pieces, heads.last_layer, length)
        attention = llm.read(context, tails, heads)
        return token_attention(attention, pieces, options)

    def _fitted(self, pieces: Pieces, llm: FrozenLM) -> Pieces:
        """Cut query and documents to the LLM's context."""
        if llm.max_tokens is None:
            return pieces
        room = llm.max_tokens - len(pieces.prefix)
        longest = max(len(piece.ids) for piece in pieces.documents)
        pieces = with_room_for_documents(pieces, room, longest)
        return replace(pieces, documents=cut_to(pieces.documents, room - pieces.tail_size))

    def check_fits(self, pieces: Pieces, llm: FrozenLM) -> None:
        """Check that the longest document fits the LLM's context together with the query.

        Raises:
            PromptTooLongError: It does not.
        """
        longest = max(pieces.documents, key=lambda document: len(document.ids))
        around = len(pieces.prefix) + pieces.tail_size
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

    def _context(
        self, llm: FrozenLM, pieces: Pieces, last_layer: int, length: int
    ) -> list[KeyValues]:
        """Return the keys and values of prefix and documents; run only what is not cached."""
        # The tokens of the prefix depend on the LLM alone, so that they need not be in the key.
        key = prompt_key(llm, length)
        prefix = cached_prefill(llm, key, pieces.prefix, last_layer, length, self._prefixes)
        distinct = dict.fromkeys(piece.ids for piece in pieces.documents)
        key_values: dict[tuple[int, ...], KeyValues] = {}
        if self.cache is not None:
            for ids in distinct:
                held = self.cache.get((key, ids), last_layer=last_layer)
                if held is not None:
                    key_values[ids] = held
        missing = [ids for ids in distinct if ids not in key_values]
        # A batch changes the last digits. Kept documents run alone, so that no score depends on
        # which of them earlier queries left in the cache. On an accelerator that would cost too
        # much: there, scores may differ by rounding errors.
        alone = self.cache is not None and llm.device.type == "cpu"
        for indices in batches([len(ids) for ids in missing], 1 if alone else BATCH_TOKENS):
            batch = [missing[index] for index in indices]
            ran = llm.prefill(batch, last_layer=last_layer, behind=prefix, length=length)
            for ids, new in zip(batch, ran, strict=True):
                key_values[ids] = new
                if self.cache is not None:
                    key_values[ids] = new.copied()
                    self.cache.put((key, ids), key_values[ids])
        return [prefix, *(key_values[piece.ids] for piece in pieces.documents)]
