"""Every method by name: those of this package, and with ``baselines`` all others.

What depends on how layouts and the tap are called stands in the first four functions, and in
``Subject.forget_tokens``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from baselines import floor, handwritten, likelihood, listwise
from subject import Method, Prompt, Subject, UnavailableError, timed
from torch import Tensor

from routehead_plugins import HeadRoutedAttentionReranker, HeadSet
from routehead_plugins.backbone import KeyValueCache, KeyValues, Rows, Tap, joined, run, token_tree
from routehead_plugins.layouts import Layout, ParallelLayout, SequentialLayout
from routehead_plugins.scoring import document_signals, mean_over_heads
from routehead_plugins.selection import AllHeads, FixedHeads, Selector


def sequential_layout(subject: Subject, documents: Sequence[str]) -> Layout:
    """A sequential layout that has read nothing yet; windows where the context is too short."""
    return SequentialLayout(window=subject.window(documents))


def parallel_layout(subject: Subject, documents: Sequence[str]) -> Layout:
    """A parallel layout with an empty cache that holds all the documents."""
    tokens = sum(len(piece.ids) for piece in subject.pieces("who", documents).documents)
    per_token = 2 * subject.config.num_key_value_heads * subject.head_dim
    per_token *= subject.llm.dtype.itemsize * (subject.heads.last_layer + 1)
    return ParallelLayout(cache=KeyValueCache(2 * tokens * per_token))


def prefilled(subject: Subject, prompt: Prompt) -> KeyValues:
    """Keys and values of a prompt's prefix, as deep as the head set goes."""
    last_layer = subject.heads.last_layer
    return subject.llm.prefill([prompt.prefix], last_layer=last_layer)[0]


def tails(subject: Subject, past: KeyValues, prompt: Prompt, *, tap: bool) -> Tensor | None:
    """Run both tails as ``FrozenLM.read`` does: with the tap and scoring, or with neither."""
    both, llm = [prompt.tail, prompt.null_tail], subject.llm
    if tap:
        query, null = llm.read([past], both, subject.heads, start=past.end)
        signals = document_signals(
            mean_over_heads(query)[None], mean_over_heads(null)[None], prompt.spans
        )
        return signals[0].cpu()
    with torch.inference_mode():
        tree = token_tree(both)
        positions = (past.end + tree.depths).to(llm.device)
        rows = Rows(
            weights=tree.weights.to(llm.device),
            positions=positions,
            sees=tree.sees.to(llm.device),
            past=torch.arange(past.start, past.end).to(llm.device),
        )
        nothing = Tap(subject.heads.last_layer, HeadSet(()), rows)
        cache = joined([past], last_layer=nothing.last_layer)
        run(llm._view, tree.ids.to(llm.device)[None], positions[None], cache, nothing)
    return None


def _cold(
    subject: Subject,
    selector: Selector,
    layout: Callable[[Subject, Sequence[str]], Layout],
    documents: Sequence[str],
) -> Method:
    """A re-ranker that has not seen the documents: made anew for every query."""
    made: list[HeadRoutedAttentionReranker] = []

    def prepare(_: str) -> None:
        made[:] = [_reranker(subject, selector, layout(subject, documents))]

    notes = {}
    if layout is sequential_layout and (window := subject.window(documents)) is not None:
        notes = {"window": window, "passes": len(subject.prompts("who", documents))}
    return Method(lambda query: made[0].score(query, documents), prepare, notes=notes)


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
    reranker = _reranker(subject, FixedHeads(subject.heads), parallel_layout(subject, documents))

    def trial(query: str) -> float:
        # The last word makes it another query, so that nothing but documents can be found again.
        reranker.score(f"{query} before", documents)
        return timed(lambda: reranker.score(query, documents), subject.device)

    def prepare(_: str) -> None:
        subject.pieces("who", documents)  # other methods have made the encoder forget them

    return Method(lambda query: reranker.score(query, documents), prepare, trial, remembers=True)


def _tails(subject: Subject, documents: Sequence[str], *, tap: bool) -> Method:
    pasts: list[KeyValues] = []
    prompts: list[Prompt] = []

    def prepare(query: str) -> None:
        prompts[:] = subject.prompts(query, documents)
        if not pasts:  # the prefix is the same for every query
            pasts.extend(prefilled(subject, prompt) for prompt in prompts)

    def both(_: str) -> None:
        for past, prompt in zip(pasts, prompts, strict=True):
            tails(subject, past, prompt, tap=tap)

    return Method(both, prepare)


METHODS: dict[str, Callable[[Subject, Sequence[str]], Method]] = {
    "handwritten": handwritten,
    "icr": _icr,
    "ours": _ours,
    "parallel-cold": _parallel_cold,
    "parallel-warm": _parallel_warm,
    "likelihood": likelihood,
    "listwise": listwise,
    "floor": floor,
    # For the share of the tap and of scoring; no methods of their own.
    "tails": lambda subject, documents: _tails(subject, documents, tap=True),
    "tails-untapped": lambda subject, documents: _tails(subject, documents, tap=False),
}


def make_method(name: str, subject: Subject, documents: Sequence[str]) -> Method:
    """Prepare a method for some documents.

    Raises:
        UnavailableError: It cannot be run on them here.
    """
    if not documents:
        raise UnavailableError("there are no documents")
    return METHODS[name](subject, documents)
