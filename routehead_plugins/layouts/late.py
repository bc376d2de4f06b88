"""The late layout: a tail that sees no document, and documents that are read afterwards.

Late interaction as in ColBERT (arXiv 2004.12832), with the queries and keys of a frozen LLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch

from routehead_plugins.backbone import (
    BytesCache,
    DocumentKeys,
    FrozenLM,
    KeyColumns,
    KeyValueCache,
    KeyValues,
    Pieces,
    TailQueries,
    batches,
    isolated,
)
from routehead_plugins.errors import PromptTooLongError
from routehead_plugins.heads import HeadSet
from routehead_plugins.layouts.base import (
    ReadOptions,
    cached_prefill,
    prompt_key,
    tails_of,
    token_attention,
)
from routehead_plugins.layouts.parallel import BATCH_TOKENS
from routehead_plugins.scoring import TokenAttention


@dataclass(frozen=True)
class LateFrame:
    """Positions and lengths that all prompts to an LLM share in the late layout.

    Keys of documents that are kept for later queries depend on them.

    Attributes:
        prefix: Token ids before documents and tail.
        start: Position of the tail.
        length: Number of tokens of a prompt, up to the end of the longest tail that fits.
    """

    prefix: tuple[int, ...]
    start: int
    length: int

    def check_fits(self, pieces: Pieces, llm: FrozenLM) -> None:
        """Check that a tail fits behind the documents' room, and a document into the context.

        Raises:
            PromptTooLongError: One does not.
        """
        tail, limit = pieces.tail_size, self.length - self.start
        if tail > limit:
            raise PromptTooLongError(
                f"the query makes a tail of {tail:,} tokens, but the late layout has room for "
                f"{limit:,} with {llm.name!r}; shorten the query.",
                tokens=self.start + tail,
                limit=self.length,
            )
        if llm.max_tokens is None or not pieces.documents:
            return
        longest = max(pieces.documents, key=lambda document: len(document.ids))
        tokens = len(self.prefix) + len(longest.ids)
        if tokens > llm.max_tokens:
            cut = llm.max_tokens - (tokens - longest.text.size)
            raise PromptTooLongError(
                f"the longest document makes a prompt of {tokens:,} tokens, but {llm.name!r} takes "
                f"{llm.max_tokens:,}; set max_doc_tokens={cut} or less.",
                tokens=tokens,
                limit=llm.max_tokens,
            )


@dataclass(frozen=True)
class LateLayout:
    """Documents side by side, and a tail behind the prefix alone.

    Documents are run as in the parallel layout. The tail stands at a position that does not depend
    on them and sees no document in any layer; only to read a head, its queries are compared with
    the documents' keys there: a softmax over the prefix, the tokens of all candidates and the tail
    itself. Hence of a document only its keys at the heads that may be read are needed, and a query
    runs nothing but its tail, however many documents there are.

    Attributes:
        cache: Keeps documents' keys for later queries; ``None`` keeps none.
        document_room: Tokens between the prefix and the tail; half the context in LLMs that have
            less. Longer documents are read all the same.
        tail_room: Tokens that a tail may have, where the context has that many left.
    """

    cache: BytesCache[DocumentKeys] | None = field(default=None, compare=False, repr=False)
    document_room: int = field(default=512, kw_only=True)
    tail_room: int = field(default=2048, kw_only=True)
    name: str = field(default="late", init=False)
    _prefixes: KeyValueCache = field(
        default_factory=lambda: KeyValueCache("64MB"), init=False, compare=False, repr=False
    )
    _null_queries: BytesCache[TailQueries] = field(
        default_factory=lambda: BytesCache("64MB"), init=False, compare=False, repr=False
    )

    def frame(self, llm: FrozenLM) -> LateFrame:
        """Return the positions and lengths that all prompts to an LLM share."""
        prefix = llm.encoder.prefix
        room = self.document_room + self.tail_room
        if llm.max_tokens is not None:
            room = max(0, min(room, llm.max_tokens - len(prefix)))
        start = len(prefix) + min(self.document_room, room // 2)
        return LateFrame(prefix, start, len(prefix) + room)

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
        frame = self.frame(llm)
        frame.check_fits(pieces, llm)
        asked = heads if options.candidates is None else options.candidates
        keys = self._keys(llm, frame, pieces, llm.key_columns(asked))
        tails = [
            self._queries(llm, frame, tail, asked, keep=tail != pieces.tail)
            for tail in tails_of(pieces, options)
        ]
        with torch.inference_mode(), isolated(llm.device):
            attention = torch.stack([queries.attention(keys, heads) for queries in tails])
        return token_attention(attention, pieces, options, prefix=0)

    def _queries(
        self, llm: FrozenLM, frame: LateFrame, tail: tuple[int, ...], heads: HeadSet, *, keep: bool
    ) -> TailQueries:
        """Run a tail; keep the null query's, which is the same for all queries."""
        key = (prompt_key(llm, frame.length), frame, heads.heads, tail)
        queries = self._null_queries.look_up(key) if keep else None
        if queries is None:
            prefix = self._prefix(llm, frame, heads.last_layer)
            queries = llm.tail_queries(prefix, tail, heads, start=frame.start, length=frame.length)
            if keep:
                self._null_queries.put(key, queries)
        return queries

    def _prefix(self, llm: FrozenLM, frame: LateFrame, last_layer: int) -> KeyValues:
        key = prompt_key(llm, frame.length)
        return cached_prefill(llm, key, frame.prefix, last_layer, frame.length, self._prefixes)

    def _keys(
        self, llm: FrozenLM, frame: LateFrame, pieces: Pieces, columns: KeyColumns
    ) -> DocumentKeys:
        """Return the keys of all documents; run only those that are not cached."""
        key = (prompt_key(llm, frame.length), columns)
        documents: dict[tuple[int, ...], DocumentKeys] = {}
        distinct = dict.fromkeys(piece.ids for piece in pieces.documents)
        for ids in distinct if self.cache is not None else ():
            held = cast(BytesCache[DocumentKeys], self.cache).look_up((key, ids))
            if held is not None:
                documents[ids] = held
        missing = [ids for ids in distinct if ids not in documents]
        if missing:
            prefix = self._prefix(llm, frame, columns.last_layer)
            # See the parallel layout on documents that run alone.
            alone = self.cache is not None and llm.device.type == "cpu"
            ran = document_keys(llm, frame, missing, columns, prefix, alone=alone)
            for ids, keys in zip(missing, ran, strict=True):
                documents[ids] = keys
                if self.cache is not None:
                    self.cache.put((key, ids), keys)
        return DocumentKeys.join([documents[piece.ids] for piece in pieces.documents])


def document_keys(
    llm: FrozenLM,
    frame: LateFrame,
    documents: Sequence[tuple[int, ...]],
    columns: KeyColumns,
    prefix: KeyValues,
    *,
    alone: bool = False,
) -> list[DocumentKeys]:
    """Run documents behind the prefix, each on its own, and keep some of their keys.

    Args:
        llm: The frozen LLM.
        frame: Positions and lengths of its prompts.
        documents: Token ids of each.
        columns: The keys to keep.
        prefix: Keys and values of the prefix, as deep as the columns.
        alone: Whether no two documents share a forward.
    """
    kept: dict[int, DocumentKeys] = {}
    for indices in batches([len(ids) for ids in documents], 1 if alone else BATCH_TOKENS):
        batch = [documents[index] for index in indices]
        ran = llm.prefill(batch, last_layer=columns.last_layer, behind=prefix, length=frame.length)
        kept |= zip(indices, map(columns.keys, ran), strict=True)
    return [kept[index] for index in range(len(documents))]
