"""Run the LLM once over judged queries and keep what every head says."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from routehead_plugins import __version__
from routehead_plugins.backbone import FrozenLM
from routehead_plugins.data import Document
from routehead_plugins.errors import InputError
from routehead_plugins.io import Collection
from routehead_plugins.layouts import Layout, ReadOptions
from routehead_plugins.scoring import document_signals
from routehead_plugins.signals.store import QuerySignals, SignalSet, SignalStore


@dataclass(frozen=True)
class CollectOptions:
    """How candidates are shown to the LLM.

    Attributes:
        hits: Candidates per query.
        max_doc_tokens: Where documents are cut.
        shuffle: Seed of a random order per query; ``None`` keeps the first stage's order.
        positions: Show each query so many times, its best judged candidate at as many places from
            first to last, as CoRe does (arXiv 2510.02219); 1 leaves it where it is.
    """

    hits: int = 20
    max_doc_tokens: int | None = None
    shuffle: int | None = None
    positions: int = 1

    def __post_init__(self) -> None:
        for name in ("hits", "positions"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)!r} is too few; give 1 or more.")


@dataclass(frozen=True)
class _Task:
    """One prompt: a query and its candidates, and the order in which they are shown."""

    name: str
    query_id: str
    query: str
    documents: tuple[Document, ...]
    gains: tuple[int, ...]
    ideal: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def key(self) -> str:
        """Says everything that the signals depend on besides the settings."""
        shown = [[d.id, d.text, d.score] for d in self.documents]
        content = json.dumps([self.query, shown, self.gains, self.ideal, self.order])
        return f"{self.name} {hashlib.sha256(content.encode()).hexdigest()}"


def collect_signals(
    collection: Collection,
    llm: FrozenLM,
    layout: Layout,
    folder: str | Path,
    options: CollectOptions | None = None,
    *,
    query_ids: Sequence[str] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> SignalSet:
    """Compute the signals of all heads for the judged queries of a collection.

    What is in the folder already is not computed again; a run that is stopped goes on there.

    Args:
        collection: With candidates.
        llm: The frozen LLM, loaded as deep as anything will be learned about.
        layout: How documents and query are arranged.
        folder: Where signals are kept.
        options: How candidates are shown.
        query_ids: Some of the queries; ``None`` for all that are judged.
        advance: Called after every query.

    Returns:
        One entry per query and position that has a candidate to read. Candidates are in the first
        stage's order, whatever the order in which they were shown.

    Raises:
        InputError: The folder cannot be written.
        CollectionError: There are no candidates.
        PromptTooLongError: The candidates of a query do not fit the LLM's context.
    """
    options = options or CollectOptions()
    settings = {
        "model": llm.name,
        "dtype": str(llm.dtype),
        "layout": repr(layout),
        "heads": len(llm.heads),
        "max_doc_tokens": options.max_doc_tokens,
        "version": __version__,
    }
    store = SignalStore(folder, settings)
    wanted = collection.topics if query_ids is None else query_ids
    judged = [query_id for query_id in wanted if query_id in collection.qrels]
    found = []
    for query_id in judged:
        for task in _tasks(collection, query_id, options):
            signals = store.get(task.key)
            if signals is None:
                signals = _compute(task, llm, layout, options)
                store.put(task.key, signals)
            found.append(signals)
        advance()
    return SignalSet(llm.heads, llm.name, layout.name, (collection.name,), tuple(found))


def _tasks(collection: Collection, query_id: str, options: CollectOptions) -> Iterator[_Task]:
    """The prompts for one query; none where it has no candidate that can be read."""
    candidates = collection.candidates(query_id, options.hits)
    documents = tuple(document for document in candidates if not document.is_blank)
    if not documents:
        return
    judgments = collection.qrels[query_id]
    gains = tuple(max(0, judgments.get(str(document.id), 0)) for document in documents)
    task = _Task(
        name=query_id,
        query_id=query_id,
        query=collection.topics[query_id],
        documents=documents,
        gains=gains,
        ideal=tuple(sorted((gain for gain in judgments.values() if gain > 0), reverse=True)),
        order=_order(query_id, len(documents), options.shuffle),
    )
    if options.positions == 1 or not any(gains):
        yield task
        return
    best = max(range(len(gains)), key=lambda place: gains[place])
    others = [place for place in task.order if place != best]
    for number in range(options.positions):
        target = round(number * len(others) / (options.positions - 1))
        order = (*others[:target], best, *others[target:])
        yield replace(task, name=f"{query_id}@{target}", order=order)


def _order(query_id: str, documents: int, shuffle: int | None) -> tuple[int, ...]:
    order = list(range(documents))
    if shuffle is not None:
        random.Random(f"{shuffle} {query_id}").shuffle(order)
    return tuple(order)


def _compute(task: _Task, llm: FrozenLM, layout: Layout, options: CollectOptions) -> QuerySignals:
    shown = [task.documents[place].text for place in task.order]
    read = layout.read(
        llm, task.query, shown, llm.heads, ReadOptions(max_doc_tokens=options.max_doc_tokens)
    )
    null = cast(Tensor, read.null)
    tables = (
        document_signals(read.query, None, read.spans, drop_outliers=False),
        document_signals(null, None, read.spans, drop_outliers=False),
        document_signals(read.query, null, read.spans),
        document_signals(read.query.mean(dim=0)[None], null.mean(dim=0)[None], read.spans),
    )
    # From the order shown back to the first stage's.
    back = torch.tensor(task.order).argsort()
    mass, null_mass, calibrated, averaged = (table.cpu()[:, back] for table in tables)
    return QuerySignals(
        task.query_id,
        task.query,
        tuple(str(document.id) for document in task.documents),
        mass,
        null_mass,
        calibrated,
        torch.tensor(task.gains, dtype=torch.float32),
        _first_stage(task.documents),
        torch.tensor(task.ideal, dtype=torch.float32),
        averaged[0],
    )


def _first_stage(documents: Sequence[Document]) -> Tensor:
    """Retrieval scores; where a document has none, all get their rank's instead."""
    scores = [document.score for document in documents]
    if any(score is None for score in scores):
        scores = [-float(rank) for rank in range(len(documents))]
    return torch.tensor(scores, dtype=torch.float32)
