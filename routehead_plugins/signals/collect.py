"""Run the LLM once per judged query and store the signals of every head."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from routehead_plugins.backbone import FrozenLM
from routehead_plugins.data import Document, check_count
from routehead_plugins.io import Collection, StrPath
from routehead_plugins.layouts import Layout, ReadOptions
from routehead_plugins.scoring import document_signals
from routehead_plugins.signals.store import (
    QuerySignals,
    SignalSet,
    SignalStore,
    llm_settings,
    sha256,
)


@dataclass(frozen=True)
class CollectOptions:
    """How candidates are presented to the LLM.

    Attributes:
        hits: Number of candidates per query.
        max_doc_tokens: Length to which documents are cut, in tokens; ``None`` for no limit.
        shuffle: Seed of a random order of the candidates; ``None`` for the first stage's order.
        positions: Number of prompts per query. If above 1, the candidate with the highest judgment
            moves from the first position to the last, as in CoRe (arXiv 2510.02219).
    """

    hits: int = 20
    max_doc_tokens: int | None = None
    shuffle: int | None = None
    positions: int = 1

    def __post_init__(self) -> None:
        check_count("hits", self.hits)
        check_count("positions", self.positions)


@dataclass(frozen=True)
class _Prompt:
    """A query with its candidates, and the order in which the LLM reads them."""

    name: str
    query_id: str
    query: str
    documents: Sequence[Document]
    gains: Sequence[int]
    ideal_gains: Sequence[int]
    order: Sequence[int]

    @property
    def key(self) -> str:
        """Description of everything the signals depend on besides the settings."""
        documents = [[document.id, document.text, document.score] for document in self.documents]
        content = [self.query, documents, self.gains, self.ideal_gains, self.order]
        return f"{self.name} {sha256(json.dumps(content))}"


def collect_signals(
    collection: Collection,
    llm: FrozenLM,
    layout: Layout,
    folder: StrPath,
    options: CollectOptions | None = None,
    *,
    query_ids: Sequence[str] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> SignalSet:
    """Compute the signals of all heads for the judged queries of a collection.

    Args:
        collection: A collection with candidates.
        llm: The frozen LLM, loaded as deep as the heads to learn about.
        layout: The arrangement of documents and query.
        folder: Folder of finished signals, from which an interrupted run resumes.
        options: How candidates are presented.
        query_ids: Ids of the queries to use; ``None`` for all. Unjudged ones are skipped.
        advance: Callback after every query.

    Returns:
        One entry per prompt, none for queries without a non-blank candidate. Candidates are in
        first-stage order, whatever their order in the prompt.

    Raises:
        InputError: The folder cannot be written.
        CollectionError: The collection has no candidates.
        PromptTooLongError: The candidates of a query do not fit the LLM's context.
    """
    options = options or CollectOptions()
    settings = llm_settings(
        llm, layout=repr(layout), heads=len(llm.heads), max_doc_tokens=options.max_doc_tokens
    )
    store = SignalStore(folder, settings)
    queries = []
    for query_id in collection.topics if query_ids is None else query_ids:
        if query_id not in collection.qrels:
            continue
        for prompt in _prompts(collection, query_id, options):
            signals = store.get(prompt.key)
            if signals is None:
                signals = _compute(prompt, llm, layout, options)
                store.put(prompt.key, signals)
            queries.append(signals)
        advance()
    names, label = (collection.name,), llm.adapter_label
    return SignalSet(llm.heads, llm.name, layout.name, names, tuple(queries), label)


def judged_queries(
    collection: Collection, llm: FrozenLM, layout: Layout, options: CollectOptions | None = None
) -> SignalSet:
    """Return what ``collect_signals`` does, without signals: to check the data before the LLM runs.

    Args:
        collection: A collection with candidates.
        llm: The frozen LLM.
        layout: The arrangement of documents and query.
        options: How candidates are presented.

    Returns:
        The same queries with their candidates and judgments; signals are of shape (0, documents).

    Raises:
        CollectionError: The collection has no candidates.
    """
    queries = [
        _without_signals(prompt)
        for query_id in collection.topics
        if query_id in collection.qrels
        for prompt in _prompts(collection, query_id, options or CollectOptions())
    ]
    names, label = (collection.name,), llm.adapter_label
    return SignalSet(llm.heads, llm.name, layout.name, names, tuple(queries), label)


def non_blank_candidates(collection: Collection, query_id: str, hits: int) -> list[Document]:
    """Return those of a query's candidates that have a text to read."""
    return [doc for doc in collection.candidates(query_id, hits) if not doc.is_blank]


def _prompts(collection: Collection, query_id: str, options: CollectOptions) -> Iterator[_Prompt]:
    """Yield the prompts of one query; none if all its candidates are blank."""
    documents = non_blank_candidates(collection, query_id, options.hits)
    if not documents:
        return
    judgments = collection.qrels[query_id]
    gains = [max(0, judgments.get(str(document.id), 0)) for document in documents]
    order = list(range(len(documents)))
    if options.shuffle is not None:
        random.Random(f"{options.shuffle} {query_id}").shuffle(order)
    prompt = _Prompt(
        name=query_id,
        query_id=query_id,
        query=collection.topics[query_id],
        documents=documents,
        gains=gains,
        ideal_gains=sorted((gain for gain in judgments.values() if gain > 0), reverse=True),
        order=order,
    )
    if options.positions == 1 or not any(gains):
        yield prompt
        return
    best = gains.index(max(gains))
    others = [index for index in order if index != best]
    for number in range(options.positions):
        position = round(number * len(others) / (options.positions - 1))
        order = [*others[:position], best, *others[position:]]
        yield replace(prompt, name=f"{query_id}@{position}", order=order)


def _compute(
    prompt: _Prompt, llm: FrozenLM, layout: Layout, options: CollectOptions
) -> QuerySignals:
    texts = [prompt.documents[index].text for index in prompt.order]
    reading = ReadOptions(max_doc_tokens=options.max_doc_tokens)
    attention = layout.read(llm, prompt.query, texts, llm.heads, reading)
    query, null, spans = attention.query, cast(Tensor, attention.null), attention.spans
    signals = (
        document_signals(query, None, spans, drop_outliers=False),
        document_signals(query, null, spans),
        document_signals(query.mean(dim=0)[None], null.mean(dim=0)[None], spans),
    )
    # From the order of the prompt back to that of the first stage.
    inverse = torch.tensor(prompt.order).argsort()
    mass, calibrated, averaged = (table.cpu()[:, inverse] for table in signals)
    return replace(_without_signals(prompt), mass=mass, calibrated=calibrated, averaged=averaged[0])


def _without_signals(prompt: _Prompt) -> QuerySignals:
    none = torch.empty(0, len(prompt.documents))
    return QuerySignals(
        query_id=prompt.query_id,
        query=prompt.query,
        docids=tuple(str(document.id) for document in prompt.documents),
        mass=none,
        calibrated=none,
        gains=torch.tensor(prompt.gains, dtype=torch.float32),
        first_stage=_first_stage_scores(prompt.documents),
        ideal_gains=torch.tensor(prompt.ideal_gains, dtype=torch.float32),
    )


def _first_stage_scores(documents: Sequence[Document]) -> Tensor:
    """Return the retrieval scores, or minus the ranks if any document has no score."""
    scores = [document.score for document in documents]
    if any(score is None for score in scores):
        scores = [-float(rank) for rank in range(len(documents))]
    exact = torch.tensor(scores, dtype=torch.float64)
    rounded = exact.float()
    # Float32 holds no number above 3e38, and makes some large ones equal.
    fits = rounded.isfinite().all() and len(rounded.unique()) == len(exact.unique())
    return rounded if fits else exact
