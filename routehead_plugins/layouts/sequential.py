"""The sequential layout: all documents in one prompt, as ICR (arXiv 2410.02642) has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from routehead_plugins.backbone import FrozenLM
from routehead_plugins.cache import KeyValueCache, KeyValues
from routehead_plugins.data import Span
from routehead_plugins.errors import InputError, PromptTooLongError
from routehead_plugins.heads import HeadSet
from routehead_plugins.layouts.base import TokenAttention, longest_cut
from routehead_plugins.prompt import Pieces

# Enough for twenty passages on an LLM of a billion parameters; longer prefixes are run again.
_PREFIX_BYTES = "256MB"


@dataclass(frozen=True)
class SequentialLayout:
    """All documents one after the other, best candidate last, beside the query.

    The prefix of documents is run once, also for further queries over the same documents while it
    is in the cache; the tails with and without the query share one pass over its keys and values.

    More documents than fit are read in overlapping windows. A document's attention is then the
    mean over the windows that hold it, each of which has the same number of documents to share its
    attention among.

    Attributes:
        window: Documents read at once; ``None`` for all.
        stride: Documents from the start of a window to the start of the next; ``None`` for half a
            window.
        cache: Keeps prefixes.

    Raises:
        InputError: Window or stride is below 1, or the stride leaves documents out.
    """

    window: int | None = None
    stride: int | None = None
    cache: KeyValueCache = field(
        default_factory=lambda: KeyValueCache(_PREFIX_BYTES), compare=False, repr=False
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
        *,
        calibrate: bool,
        max_doc_tokens: int | None,
    ) -> TokenAttention:
        """Run the LLM and read the heads; see ``Layout.read``."""
        windows = [
            (start, self._pieces(llm, query, texts[start:end], max_doc_tokens))
            for start, end in self._windows(len(texts))
        ]
        for _, pieces in windows:
            check_fits(pieces, llm)  # every window, before the first one is run
        parts: list[list[Tensor]] = [[] for _ in texts]
        for start, pieces in windows:
            attention, spans = _read_window(llm, pieces, heads, self.cache, calibrate=calibrate)
            if len(windows) == 1:
                return _token_attention(attention, spans)
            for place, span in enumerate(spans, start):
                parts[place].append(attention[..., span.start : span.end])
        means = [torch.stack(found).mean(dim=0) for found in parts]
        ends = torch.tensor([mean.shape[-1] for mean in means]).cumsum(0).tolist()
        spans = [Span(end - mean.shape[-1], end) for mean, end in zip(means, ends, strict=True)]
        return _token_attention(torch.cat(means, dim=-1), spans)

    def _windows(self, documents: int) -> Iterator[tuple[int, int]]:
        """Ranges of documents; all windows are full, the last one ends with the documents."""
        size = documents if self.window is None else min(self.window, documents)
        stride = self.stride or max(1, size // 2)
        for start in range(0, documents - size, stride):
            yield start, start + size
        yield documents - size, documents

    @staticmethod
    def _pieces(llm: FrozenLM, query: str, texts: Sequence[str], cut: int | None) -> Pieces:
        return llm.encoder.pieces(query, texts[::-1], numbered=True, max_doc_tokens=cut)


def _read_window(
    llm: FrozenLM, pieces: Pieces, heads: HeadSet, cache: KeyValueCache, *, calibrate: bool
) -> tuple[Tensor, list[Span]]:
    """Attention of the tails, shape (tails, heads, prefix), and spans of the documents."""
    prefix, spans = list(pieces.opening), []
    for document in pieces.documents:
        spans.append(Span(len(prefix) + document.text.start, len(prefix) + document.text.end))
        prefix += document.ids
    past = _prefix(llm, tuple(prefix), heads.last_layer, cache)
    tails = [pieces.tail, pieces.null_tail] if calibrate else [pieces.tail]
    return llm.read([past], tails, heads, start=past.end), spans[::-1]


def _prefix(
    llm: FrozenLM, ids: tuple[int, ...], last_layer: int, cache: KeyValueCache
) -> KeyValues:
    key = (llm.state, ids)
    past = cache.get(key, last_layer=last_layer)
    if past is None:
        (past,) = llm.prefill([ids], last_layer=last_layer)
        cache.put(key, past)
    return past


def _token_attention(attention: Tensor, spans: Sequence[Span]) -> TokenAttention:
    null = attention[1] if len(attention) > 1 else None
    return TokenAttention(attention[0], null, tuple(spans))


def check_window(window: int | None, stride: int | None) -> None:
    """Accept windows that leave no document out.

    Raises:
        InputError: They are too small, or too far apart.
    """
    if window is not None and window < 1:
        raise InputError(f"window={window!r} reads nothing; give 1 or more documents, or None.")
    if stride is None:
        return
    if window is None:
        raise InputError(f"stride={stride!r} has no window to move; give window= as well.")
    if not 1 <= stride <= window:
        raise InputError(f"stride={stride!r} leaves documents out; give 1 to {window}, the window.")


def check_fits(pieces: Pieces, llm: FrozenLM) -> None:
    """Refuse a prompt longer than the LLM's context.

    Raises:
        PromptTooLongError: With the length, the limit, and what would make it fit.
    """
    limit = llm.max_tokens
    if limit is None or pieces.size <= limit:
        return
    advice = []
    lengths = sorted(document.text.size for document in pieces.documents)
    cut = longest_cut(lengths, limit - (pieces.size - sum(lengths)))
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


def _widest_window(pieces: Pieces, limit: int) -> int:
    """How many of the documents fit, the longest of them together."""
    lengths = sorted((len(document.ids) for document in pieces.documents), reverse=True)
    room = limit - (pieces.size - sum(lengths))
    for count, length in enumerate(lengths):
        room -= length
        if room < 0:
            return count
    return len(lengths)
