"""The sequential layout: all documents in one prompt, as in ICR (arXiv 2410.02642)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain

import torch
from torch import Tensor

from routehead_plugins.backbone import FrozenLM, KeyValueCache, KeyValues, Pieces
from routehead_plugins.data import Span, check_count
from routehead_plugins.errors import InputError, PromptTooLongError
from routehead_plugins.heads import HeadSet
from routehead_plugins.layouts.base import (
    ReadOptions,
    cached_prefill,
    prompt_key,
    tails_of,
    token_attention,
    with_room_for_documents,
)
from routehead_plugins.scoring import TokenAttention

# Enough for twenty passages on an LLM of a billion parameters; longer prefixes are run again.
PREFIX_BYTES = "256MB"


@dataclass(frozen=True)
class SequentialLayout:
    """All documents one after the other, best candidate last, next to the query.

    The documents are run once, also for further queries over the same documents while they are in
    the cache; the tails of query and null query share one pass over their keys and values.

    More documents than fit are read in overlapping windows of equal size. A document's attention is
    then the mean over the windows that hold it.

    Attributes:
        window: Documents read at once; ``None`` for all.
        stride: Step between window starts, in documents; ``None`` for half a window.
        cache: Keeps the keys and values of whole lists of documents.

    Raises:
        InputError: Window or stride is below 1, or the stride leaves documents out.
    """

    window: int | None = None
    stride: int | None = None
    cache: KeyValueCache = field(
        default_factory=lambda: KeyValueCache(PREFIX_BYTES), compare=False, repr=False
    )
    name: str = field(default="sequential", init=False)

    def __post_init__(self) -> None:
        check_window(self.window, self.stride)

    def read(
        self,
        llm: FrozenLM,
        query: str,
        texts: Sequence[str],
        heads: HeadSet,
        options: ReadOptions,
    ) -> TokenAttention:
        """Run the LLM and read the heads; see ``Layout.read``."""
        ranges = list(self._windows(len(texts)))
        windows = [_pieces(llm, query, texts[start:end], options) for start, end in ranges]
        if options.cut:
            windows = _fitted(windows, llm)
        for pieces in windows:
            check_fits(pieces, llm)  # every window, before the first one is run
        read = [
            (start, _read_window(llm, pieces, heads, self.cache, options))
            for (start, _), pieces in zip(ranges, windows, strict=True)
        ]
        return read[0][1] if len(read) == 1 else _mean_over_windows(read, len(texts))

    def _windows(self, documents: int) -> Iterator[tuple[int, int]]:
        """Yield ranges of documents; all windows are full, the last ends with the last document."""
        size = documents if self.window is None else min(self.window, documents)
        stride = self.stride or max(1, size // 2)
        for start in range(0, documents - size, stride):
            yield start, start + size
        yield documents - size, documents


def _pieces(llm: FrozenLM, query: str, texts: Sequence[str], options: ReadOptions) -> Pieces:
    """Tokenize with the documents in the order of the prompt, the best one last."""
    return llm.encoder.pieces(
        query,
        texts[::-1],
        numbered=True,
        max_doc_tokens=options.max_doc_tokens,
        instruction=options.instruction,
    )


def _fitted(windows: Sequence[Pieces], llm: FrozenLM) -> list[Pieces]:
    """Cut query and longest documents to the LLM's context, alike in all windows."""
    limit = llm.max_tokens
    if limit is None or max(pieces.size for pieces in windows) <= limit:
        return list(windows)
    room = limit - len(windows[0].prefix)
    most = max(sum(len(piece.ids) for piece in pieces.documents) for pieces in windows)
    windows = [with_room_for_documents(pieces, room, most) for pieces in windows]
    cut = min(_largest_cut(pieces, limit) for pieces in windows)
    return [
        replace(pieces, documents=tuple(piece.cut(cut) for piece in pieces.documents))
        for pieces in windows
    ]


def _largest_cut(pieces: Pieces, limit: int) -> int:
    """Return the largest cut of documents at which a prompt fits."""
    lengths = sorted(document.text.size for document in pieces.documents)
    return longest_cut(lengths, limit - (pieces.size - sum(lengths)))


def _read_window(
    llm: FrozenLM, pieces: Pieces, heads: HeadSet, cache: KeyValueCache, options: ReadOptions
) -> TokenAttention:
    ids = tuple(chain(pieces.prefix, *(document.ids for document in pieces.documents)))
    tails = tails_of(pieces, options)
    length = len(ids) + max(map(len, tails))

    def context() -> list[KeyValues]:
        key = prompt_key(llm, length)
        return [cached_prefill(llm, key, ids, heads.last_layer, length, cache)]

    attention = llm.read(context, tails, heads)
    read = token_attention(attention, pieces, options)
    # From the prompt's order back to the caller's.
    last = len(read.spans) - 1
    return replace(
        read,
        spans=read.spans[::-1],
        document_ids=read.document_ids[::-1],
        cut=frozenset(last - index for index in read.cut),
    )


def _mean_over_windows(read: Sequence[tuple[int, TokenAttention]], count: int) -> TokenAttention:
    """Join windows, each given with the index of its first document."""
    ids: list[tuple[int, ...]] = [()] * count
    readings: list[list[Tensor]] = [[] for _ in range(count)]
    for start, window in read:
        both = torch.stack([window.query] if window.null is None else [window.query, window.null])
        for index, span in enumerate(window.spans, start):
            readings[index].append(both[..., span.start : span.end])
            ids[index] = window.document_ids[index - start]
    joined = torch.cat([torch.stack(several).mean(dim=0) for several in readings], dim=-1)
    ends = list(accumulate(map(len, ids)))
    return TokenAttention(
        query=joined[0],
        null=joined[1] if len(joined) > 1 else None,
        spans=tuple(Span(end - len(text), end) for text, end in zip(ids, ends, strict=True)),
        query_ids=read[0][1].query_ids,
        document_ids=tuple(ids),
        cut=frozenset(start + index for start, window in read for index in window.cut),
        query_is_cut=read[0][1].query_is_cut,
    )


def check_window(window: int | None, stride: int | None) -> None:
    """Check that windows leave no document out; see ``SequentialLayout``.

    Raises:
        InputError: A value is below 1, the stride exceeds the window, or there is no window.
    """
    if window is not None:
        check_count("window", window)
    if stride is None:
        return
    check_count("stride", stride)
    if window is None:
        raise InputError(f"stride={stride!r} has no window to move; give window= as well.")
    if stride > window:
        raise InputError(f"stride={stride!r} leaves documents out; give 1 to {window}, the window.")


def check_fits(pieces: Pieces, llm: FrozenLM) -> None:
    """Check that a prompt fits the LLM's context; the error names settings that help."""
    limit = llm.max_tokens
    if limit is None or pieces.size <= limit:
        return
    advice = []
    lengths = [document.text.size for document in pieces.documents]
    cut = _largest_cut(pieces, limit)
    if cut:
        advice.append(f"set max_doc_tokens={cut} or less")
    window = _widest_window(pieces, limit)
    if 1 < window < len(lengths):
        advice.append(f"set window={window} or layout='parallel'")
    advice.append("give fewer documents" if advice else "give a shorter query or fewer documents")
    raise PromptTooLongError(
        f"the prompt has {pieces.size:,} tokens with {len(lengths)} documents, but {llm.name!r} "
        f"takes {limit:,}; {', or '.join(advice)}.",
        tokens=pieces.size,
        limit=limit,
    )


def longest_cut(lengths: Sequence[int], room: int) -> int:
    """Return the largest cut at which documents, of ascending lengths, fit into some tokens."""
    for index, length in enumerate(lengths):
        share = room // (len(lengths) - index)
        if length > share:
            return max(0, share)
        room -= length
    return lengths[-1]


def _widest_window(pieces: Pieces, limit: int) -> int:
    """Return the number of documents that fit even if they are the longest ones."""
    lengths = sorted((len(document.ids) for document in pieces.documents), reverse=True)
    room = limit - (pieces.size - sum(lengths))
    return sum(total <= room for total in accumulate(lengths))
