"""The late layout: a tail that sees no document, and documents that are read afterwards.

Late interaction as in ColBERT (arXiv 2004.12832), with the queries and keys of a frozen LLM.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Protocol, cast

import torch
from torch import Tensor

from routehead_plugins.backbone import (
    BytesCache,
    DocumentKeys,
    DocumentPiece,
    FrozenLM,
    KeyColumns,
    KeyValueCache,
    KeyValues,
    Pieces,
    TailQueries,
    batches,
    check_pooling,
    isolated,
)
from routehead_plugins.data import Span
from routehead_plugins.errors import PromptTooLongError
from routehead_plugins.heads import HeadSet
from routehead_plugins.layouts.base import (
    ReadOptions,
    cached_prefill,
    cut_to,
    prompt_key,
    query_and_null,
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

    def fitted_tail(self, pieces: Pieces) -> Pieces:
        """Cut a query whose tail is longer than its room."""
        return pieces.cut_query(len(pieces.tail) - (self.length - self.start))

    def fitted_documents(
        self, documents: Sequence[DocumentPiece], llm: FrozenLM
    ) -> Sequence[DocumentPiece]:
        """Cut documents to the LLM's context."""
        if llm.max_tokens is None:
            return documents
        return cut_to(documents, llm.max_tokens - len(self.prefix))

    def check_tail(self, pieces: Pieces, llm: FrozenLM) -> None:
        """Check that the longest tail of a prompt fits behind the documents' room.

        Raises:
            PromptTooLongError: It does not.
        """
        tail, limit = pieces.tail_size, self.length - self.start
        if tail > limit:
            raise PromptTooLongError(
                f"the query makes a tail of {tail:,} tokens, but the late layout has room for "
                f"{limit:,} with {llm.name!r}; shorten the query.",
                tokens=self.start + tail,
                limit=self.length,
            )

    def check_documents(self, documents: Sequence[DocumentPiece], llm: FrozenLM) -> None:
        """Check that the longest document fits into the context.

        Raises:
            PromptTooLongError: It does not.
        """
        if llm.max_tokens is None or not documents:
            return
        longest = max(documents, key=lambda document: len(document.ids))
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
class LateDocument:
    """A document as the late layout reads it.

    Attributes:
        piece: Its tokens.
        keys: Its keys, one row per token.
    """

    piece: DocumentPiece
    keys: DocumentKeys


class DocumentStore(Protocol):
    """Documents whose keys are kept outside of this process, such as on disk."""

    @property
    def columns(self) -> KeyColumns:
        """The keys that are kept of each document."""

    @property
    def settings(self) -> Hashable:
        """What ``reduce`` depends on."""

    def check(
        self, llm: FrozenLM, frame: LateFrame, heads: HeadSet, max_doc_tokens: int | None
    ) -> None:
        """Check that the documents were kept for such a reading.

        Raises:
            IndexMismatchError: They were not; the message names both sides.
        """

    def contains(self, texts: Sequence[str]) -> list[bool]:
        """Tell which texts are kept."""

    def look_up(self, texts: Sequence[str]) -> list[LateDocument | None]:
        """Look up documents by their texts; ``None`` for those that are not kept.

        Raises:
            IndexDamagedError: A document was damaged.
        """

    def reduce(self, document: LateDocument, llm: FrozenLM, layout: LateLayout) -> LateDocument:
        """Bring a document that is not kept into the form of those that are.

        Args:
            document: The document, as it was run.
            llm: The frozen LLM.
            layout: The layout that reads it.
        """


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
        documents: Documents that need not be run, such as a ``DocumentIndex``; ``None`` for none.
            All others are read in the same form, so that no score depends on which are kept.
        document_room: Tokens between the prefix and the tail; half the context in LLMs that have
            less. Longer documents are read all the same.
        tail_room: Tokens that a tail may have, where the context has that many left.
    """

    cache: BytesCache[DocumentKeys] | None = field(default=None, compare=False, repr=False)
    documents: DocumentStore | None = field(default=None, kw_only=True, compare=False, repr=False)
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

    def has_tokens(self, llm: FrozenLM, texts: Sequence[str]) -> list[bool]:
        """Tell which texts have tokens to read; those that are kept need no tokenizing."""
        if self.documents is None:
            return llm.encoder.has_tokens(texts)
        kept = self.documents.contains(texts)
        others = [text for text, is_kept in zip(texts, kept, strict=True) if not is_kept]
        have = iter(llm.encoder.has_tokens(others))
        return [is_kept or next(have) for is_kept in kept]

    def read(
        self,
        llm: FrozenLM,
        query: str,
        texts: Sequence[str],
        heads: HeadSet,
        options: ReadOptions,
    ) -> TokenAttention:
        """Run the LLM and read the heads; see ``Layout.read``."""
        asked = heads if options.candidates is None else options.candidates
        tails = self.tails(llm, query, asked, options)
        return self.read_behind(tails, llm, texts, heads, options)

    def read_behind(
        self,
        tails: LateTails,
        llm: FrozenLM,
        texts: Sequence[str],
        heads: HeadSet,
        options: ReadOptions,
    ) -> TokenAttention:
        """Read heads of a query whose tails have been run.

        Args:
            tails: The tails, at all of ``options.candidates`` if there are any.
            llm: The frozen LLM.
            texts: The documents, best candidate first, none of them blank.
            heads: The heads to read.
            options: Those with which the tails were run.

        Raises:
            PromptTooLongError: A document does not fit the LLM's context.
        """
        asked = heads if options.candidates is None else options.candidates
        documents = self._documents(llm, texts, asked, options)
        keys = DocumentKeys.join([document.keys for document in documents]).to(llm.device)
        with torch.inference_mode(), isolated(llm.device):
            attention = tails.queries.attention(keys, heads)
        return tails.attention_to([document.piece for document in documents], attention)

    def tails(
        self,
        llm: FrozenLM,
        query: str,
        heads: HeadSet,
        options: ReadOptions,
        states_before: int | None = None,
    ) -> LateTails:
        """Run the tail of a query, and those that calibrate it.

        Args:
            llm: The frozen LLM.
            query: The query.
            heads: Heads whose queries to keep.
            options: Instruction and calibration.
            states_before: Layer before which the hidden states of the query's tail are kept as
                well; ``None`` keeps none.

        Raises:
            PromptTooLongError: The tail is longer than its room.
        """
        pieces = llm.encoder.pieces(query, [], numbered=False, instruction=options.instruction)
        frame = self.frame(llm)
        if options.cut:
            pieces = frame.fitted_tail(pieces)
        frame.check_tail(pieces, llm)
        tails = tails_of(pieces, options)
        queries = [self._queries(llm, frame, tails[0], heads, keep=False, states=states_before)]
        queries += [self._queries(llm, frame, tail, heads, keep=True) for tail in tails[1:]]
        alike = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*tails, strict=False))
        shared = sum(1 for _ in alike)
        return LateTails(pieces, TailQueries.join(queries, shared), options)

    def run_documents(
        self, llm: FrozenLM, documents: Sequence[DocumentPiece], columns: KeyColumns
    ) -> list[DocumentKeys]:
        """Run documents and keep some of their keys; nothing is looked up.

        Args:
            llm: The frozen LLM.
            documents: Tokens of each.
            columns: The keys to keep.

        Raises:
            PromptTooLongError: A document does not fit into the context.
        """
        frame = self.frame(llm)
        frame.check_documents(documents, llm)
        prefix = self._prefix(llm, frame, columns.last_layer)
        ids = [piece.ids for piece in documents]
        return document_keys(llm, frame, ids, columns, prefix)

    def null_attention(self, llm: FrozenLM, keys: DocumentKeys, heads: HeadSet) -> Tensor:
        """Read what a query without content pays to each token of a document that stands alone.

        Args:
            llm: The frozen LLM.
            keys: The document's keys.
            heads: Heads whose mean is taken.

        Returns:
            Shape (tokens,).
        """
        tail = llm.encoder.pieces("", [], numbered=False).null_tail
        queries = self._queries(llm, self.frame(llm), tail, heads, keep=True)
        with torch.inference_mode(), isolated(llm.device):
            return queries.attention(keys, heads)[0].mean(dim=0)

    def embed(
        self,
        llm: FrozenLM,
        queries: Sequence[str],
        *,
        layer: int,
        pooling: str = "mean",
        instruction: str | None = None,
    ) -> Tensor:
        """Embed queries by their tails, as the pass that reads a query does on the way.

        Args:
            llm: The frozen LLM.
            queries: The queries, none of them blank.
            layer: Number of layers that the states come after.
            pooling: ``"mean"`` of the tail's tokens, or ``"last"`` for the last one.
            instruction: Text right before the query that says which documents are relevant.

        Returns:
            Shape (queries, width), float32, on the CPU, not normalised.

        Raises:
            InputError: There is no such layer or pooling.
            PromptTooLongError: A tail is longer than its room.
        """
        check_pooling(pooling)
        llm.check_embedding_layer(layer, last=False)
        options = ReadOptions(calibrate=False, instruction=instruction)
        first = HeadSet(llm.heads.heads[:1])
        tails = [self.tails(llm, query, first, options, layer) for query in queries]
        embeddings = [tail.embedding(pooling) for tail in tails]
        return torch.stack(embeddings) if embeddings else torch.empty(0, llm.width)

    def _queries(
        self,
        llm: FrozenLM,
        frame: LateFrame,
        tail: tuple[int, ...],
        heads: HeadSet,
        *,
        keep: bool,
        states: int | None = None,
    ) -> TailQueries:
        """Run a tail; keep the null query's, which is the same for all queries."""
        key = (prompt_key(llm, frame.length), frame, heads.heads, tail)
        queries = self._null_queries.look_up(key) if keep else None
        if queries is None:
            prefix = self._prefix(llm, frame, max(heads.last_layer, states or 0))
            queries = llm.tail_queries(
                prefix, tail, heads, start=frame.start, length=frame.length, states_before=states
            )
            if keep:
                self._null_queries.put(key, queries)
        return queries

    def _prefix(self, llm: FrozenLM, frame: LateFrame, last_layer: int) -> KeyValues:
        key = prompt_key(llm, frame.length)
        return cached_prefill(llm, key, frame.prefix, last_layer, frame.length, self._prefixes)

    def _documents(
        self, llm: FrozenLM, texts: Sequence[str], heads: HeadSet, options: ReadOptions
    ) -> list[LateDocument]:
        """Return all documents; run only those that are neither kept nor cached."""
        frame, store = self.frame(llm), self.documents
        kept: list[LateDocument | None] = [None] * len(texts)
        columns = llm.key_columns(heads)
        if store is not None:
            store.check(llm, frame, heads, options.max_doc_tokens)
            kept, columns = store.look_up(texts), store.columns
        others = [text for text, document in zip(texts, kept, strict=True) if document is None]
        pieces: Sequence[DocumentPiece] = llm.encoder.documents(
            others, max_doc_tokens=options.max_doc_tokens
        )
        if options.cut:
            pieces = frame.fitted_documents(pieces, llm)
        frame.check_documents(pieces, llm)
        run = iter(self._run(llm, frame, pieces, columns) if pieces else [])
        return [next(run) if document is None else document for document in kept]

    def _run(
        self,
        llm: FrozenLM,
        frame: LateFrame,
        pieces: Sequence[DocumentPiece],
        columns: KeyColumns,
    ) -> list[LateDocument]:
        """Return the documents that are not kept; run only those that are not cached."""
        store, cache = self.documents, self.cache
        key = (prompt_key(llm, frame.length), columns, None if store is None else store.settings)
        distinct = {piece.ids: piece for piece in pieces}
        documents: dict[tuple[int, ...], LateDocument] = {}
        for ids, piece in distinct.items() if cache is not None else ():
            held = cast(BytesCache[DocumentKeys], cache).look_up((key, ids))
            if held is not None:
                documents[ids] = LateDocument(piece_of_rows(piece, held, frame), held)
        missing = [ids for ids in distinct if ids not in documents]
        if missing:
            prefix = self._prefix(llm, frame, columns.last_layer)
            # See the parallel layout on documents that run alone.
            alone = cache is not None and llm.device.type == "cpu"
            ran = document_keys(llm, frame, missing, columns, prefix, alone=alone)
            for ids, keys in zip(missing, ran, strict=True):
                document = LateDocument(distinct[ids], keys)
                documents[ids] = document if store is None else store.reduce(document, llm, self)
                if cache is not None:
                    cache.put((key, ids), documents[ids].keys)
        return [documents[piece.ids] for piece in pieces]


@dataclass(frozen=True)
class LateTails:
    """The tails of one query, ready to be compared with documents.

    Attributes:
        pieces: Prompt without documents.
        queries: Of the query's tail, and of those that calibrate it.
        options: Options of the reading.
    """

    pieces: Pieces
    queries: TailQueries
    options: ReadOptions

    def embedding(self, pooling: str) -> Tensor:
        """Pool the hidden states that were kept, shape (width,), on the CPU.

        Args:
            pooling: ``"mean"`` of the tail's tokens, or ``"last"`` for the last one.
        """
        states = cast(Tensor, self.queries.states)
        return (states[-1] if pooling == "last" else states.mean(dim=0)).cpu()

    def attention_to(self, documents: Sequence[DocumentPiece], attention: Tensor) -> TokenAttention:
        """Split attention of the tails to documents' rows, (tails, heads, tokens)."""
        pieces = replace(self.pieces, documents=tuple(documents))
        return token_attention(attention, pieces, self.options, prefix=0)

    def attention_to_spans(self, spans: tuple[Span, ...], attention: Tensor) -> TokenAttention:
        """The same for documents whose tokens are not known, only the rows of their texts."""
        query, null = query_and_null(attention, self.options)
        cut = self.pieces.query_is_cut
        return TokenAttention(query, null, spans, self.pieces.query, query_is_cut=cut)


def piece_of_rows(piece: DocumentPiece, keys: DocumentKeys, frame: LateFrame) -> DocumentPiece:
    """Return the tokens of a document that some rows of keys belong to."""
    if len(keys.positions) == len(piece.ids):
        return piece
    indices = (keys.positions - len(frame.prefix)).tolist()
    kept = tuple(index for index in indices if index < piece.text.end)
    ids = tuple(piece.ids[index] for index in indices)
    return DocumentPiece(ids, Span(0, len(kept)), kept, piece.is_cut)


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
