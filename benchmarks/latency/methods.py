"""All methods by name: those of this package, and those of ``baselines``.

The first four functions, and ``Subject.forget_tokens``, depend on the inside of layouts and tap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from shutil import rmtree
from tempfile import mkdtemp
from weakref import finalize

import torch
from torch import Tensor

from benchmarks.latency.baselines import (
    bare_forwards,
    floor,
    handwritten,
    likelihood,
    listwise,
    tail_alone,
)
from benchmarks.latency.subject import Method, Prompt, Subject, UnavailableError, timed
from routehead_plugins import Document, DocumentIndex, HeadRoutedAttentionReranker, HeadSet
from routehead_plugins.backbone import (
    BytesCache,
    KeyValueCache,
    KeyValues,
    Rows,
    Tap,
    joined,
    run,
    token_tree,
)
from routehead_plugins.layouts import LateLayout, Layout, ParallelLayout, SequentialLayout
from routehead_plugins.scoring import document_signals
from routehead_plugins.selection import AllHeads, FixedHeads, Selector


def sequential_layout(subject: Subject, documents: Sequence[str]) -> Layout:
    """Make a sequential layout with an empty cache, with windows if the context is too short."""
    return SequentialLayout(window=subject.window(documents))


def parallel_layout(subject: Subject, documents: Sequence[str]) -> Layout:
    """Make a parallel layout with an empty cache that is large enough for all documents."""
    tokens = sum(len(piece.ids) for piece in subject.pieces("who", documents).documents)
    per_token = 2 * subject.config.num_key_value_heads * subject.head_dim
    per_token *= subject.llm.dtype.itemsize * (subject.heads.last_layer + 1)
    return ParallelLayout(cache=KeyValueCache(2 * tokens * per_token))


def prefilled(subject: Subject, prompt: Prompt) -> KeyValues:
    """Compute the keys and values of a prompt's prefix, down to the deepest head."""
    last_layer = subject.heads.last_layer
    return subject.llm.prefill([prompt.prefix], last_layer=last_layer)[0]


def tails(subject: Subject, past: KeyValues, prompt: Prompt, *, tap: bool) -> Tensor | None:
    """Run both tails like ``FrozenLM.read``: with tap and scoring, or with neither."""
    both, llm = [prompt.tail, prompt.null_tail], subject.llm
    if tap:
        query, null = llm.read(lambda: [past], both, subject.heads, start=past.end)
        means = query.mean(dim=0)[None], null.mean(dim=0)[None]
        return document_signals(*means, prompt.spans)[0].cpu()
    with torch.inference_mode():
        tree = token_tree(both)
        positions = (past.end + tree.depths).to(llm.device)
        rows = Rows(
            weights=tree.weights.to(llm.device),
            positions=positions,
            sees=tree.sees.to(llm.device),
            past=torch.arange(past.start, past.end).to(llm.device),
        )
        untapped = Tap(subject.heads.last_layer, HeadSet(()), rows)
        cache = joined([past], last_layer=untapped.last_layer)
        run(llm._view, tree.ids.to(llm.device)[None], positions[None], cache, untapped)
    return None


def _cold(
    subject: Subject,
    selector: Selector,
    layout: Callable[[Subject, Sequence[str]], Layout],
    documents: Sequence[str],
) -> Method:
    """A re-ranker without any cached documents: created anew for every query."""
    reranker: list[HeadRoutedAttentionReranker] = []

    def prepare(_: str) -> None:
        reranker[:] = [_reranker(subject, selector, layout(subject, documents))]

    notes = {}
    if layout is sequential_layout and (window := subject.window(documents)) is not None:
        notes = {"window": window, "passes": len(subject.prompts("who", documents))}
    return Method(lambda query: reranker[0].score(query, documents), prepare, notes=notes)


def _reranker(subject: Subject, selector: Selector, layout: Layout) -> HeadRoutedAttentionReranker:
    return HeadRoutedAttentionReranker(
        subject.llm, selector, layout=layout, max_doc_tokens=subject.doc_tokens
    )


def _icr(subject: Subject, documents: Sequence[str]) -> Method:
    return _cold(subject, AllHeads(), sequential_layout, documents)


def _ours(subject: Subject, documents: Sequence[str]) -> Method:
    return _cold(subject, FixedHeads(subject.heads), sequential_layout, documents)


def _parallel_cold(subject: Subject, documents: Sequence[str]) -> Method:
    return _cold(subject, FixedHeads(subject.heads), parallel_layout, documents)


def _parallel_warm(subject: Subject, documents: Sequence[str]) -> Method:
    return _warm(subject, parallel_layout, documents)


def _warm(
    subject: Subject,
    layout: Callable[[Subject, Sequence[str]], Layout],
    documents: Sequence[str],
) -> Method:
    """A re-ranker whose cache holds all documents."""
    reranker = _reranker(subject, FixedHeads(subject.heads), layout(subject, documents))

    def trial(query: str) -> float:
        # The last word makes it another query, so that only documents are in the cache.
        reranker.score(f"{query} before", documents)
        return timed(lambda: reranker.score(query, documents), subject.device)

    def prepare(_: str) -> None:
        subject.pieces("who", documents)  # the token cache is emptied for other methods

    return Method(lambda query: reranker.score(query, documents), prepare, trial, remembers=True)


def _tails(subject: Subject, documents: Sequence[str], *, tap: bool) -> Method:
    pasts: list[KeyValues] = []
    prompts: list[Prompt] = []

    def prepare(query: str) -> None:
        prompts[:] = subject.prompts(query, documents)
        if not pasts:  # all queries share the prefix
            pasts.extend(prefilled(subject, prompt) for prompt in prompts)

    def both(_: str) -> None:
        for past, prompt in zip(pasts, prompts, strict=True):
            tails(subject, past, prompt, tap=tap)

    return Method(both, prepare)


def late_layout(subject: Subject, documents: Sequence[str]) -> Layout:  # noqa: ARG001
    """Make a late layout with an empty cache that is large enough for all documents."""
    return LateLayout(BytesCache("8GB"))


def _late_cold(subject: Subject, documents: Sequence[str]) -> Method:
    return _cold(subject, FixedHeads(subject.heads), late_layout, documents)


def _late_warm(subject: Subject, documents: Sequence[str]) -> Method:
    return _warm(subject, late_layout, documents)


def _late_index(subject: Subject, documents: Sequence[str]) -> Method:
    """A re-ranker that reads an index on disk, which is in the system's cache of files."""
    folder = mkdtemp(prefix="routehead-")
    selector = FixedHeads(subject.heads)
    notes = {"index": indexing(subject, selector, documents, folder)}
    layout = LateLayout(documents=DocumentIndex(folder))
    reranker = _reranker(subject, selector, layout)

    def run(query: str) -> list[float]:
        return reranker.score(query, documents)

    def trial(query: str) -> float:
        run(f"{query} before")  # compares checksums
        return timed(lambda: run(query), subject.device)

    method = Method(run, trial=trial, notes=notes)
    finalize(method, rmtree, folder, ignore_errors=True)
    return method


def indexing(
    subject: Subject, selector: Selector, documents: Sequence[str], folder: str
) -> dict[str, float]:
    """Index documents, and compare the time with a bare forward over the same tokens."""
    indexer = _reranker(subject, selector, LateLayout())
    items = [Document(text) for text in documents]
    seconds = timed(lambda: indexer.index(items, folder), subject.device)
    pieces = subject.llm.encoder.documents(documents, max_doc_tokens=subject.doc_tokens)
    tokens = sum(len(piece.ids) for piece in pieces)
    bare = timed(lambda: bare_forwards(subject, [piece.ids for piece in pieces]), subject.device)
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "share_of_bare_forward": bare / seconds,
        "bytes_per_document": DocumentIndex(folder).nbytes / len(documents),
    }


METHODS: dict[str, Callable[[Subject, Sequence[str]], Method]] = {
    "handwritten": handwritten,
    "icr": _icr,
    "ours": _ours,
    "parallel-cold": _parallel_cold,
    "parallel-warm": _parallel_warm,
    "likelihood": likelihood,
    "listwise": listwise,
    "floor": floor,
    "late-cold": _late_cold,
    "late-warm": _late_warm,
    "late-index": _late_index,
    "tail": tail_alone,
    # Parts of `ours`, for the share of tap and scoring.
    "tails": lambda subject, documents: _tails(subject, documents, tap=True),
    "tails-untapped": lambda subject, documents: _tails(subject, documents, tap=False),
}


def make_method(name: str, subject: Subject, documents: Sequence[str]) -> Method:
    """Prepare one of ``METHODS`` for one or more documents.

    Raises:
        UnavailableError: The method cannot be run on these documents here.
    """
    if not documents:
        raise UnavailableError("there are no documents")
    return METHODS[name](subject, documents)
