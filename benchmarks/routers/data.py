"""Training and test queries of routers, and the questions that combine them.

Signals of judged queries are those of `benchmarks.heads.compare`, and of synthesized ones those of
`routehead train`: signals that either has computed are loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from benchmarks.common import signals_digest
from benchmarks.heads.collect import Collector, ComparisonOptions
from routehead_plugins import __version__
from routehead_plugins.cli.runtime import progress
from routehead_plugins.errors import CollectionError, InputError
from routehead_plugins.io import Collection, atomic_write_bytes, make_folder
from routehead_plugins.signals import (
    QuerySignals,
    SignalSet,
    consistent,
    mix_teacher,
    synthesize_queries,
)

JUDGED, SYNTHESIZED = "judged", "synthesized"
KINDS = (JUDGED, SYNTHESIZED)
FOLDS = 5
_DEPTHS = (0.5, 0.8)  # share of the layers after which queries are embedded


@dataclass(frozen=True)
class Examples:
    """Queries with everything that routers learn from.

    Attributes:
        signals: Signals of all heads for the queries' candidates.
        embeddings: Layer -> embeddings after it, shape (queries, width).
    """

    signals: SignalSet
    embeddings: Mapping[int, Tensor]

    def select(self, mask: Tensor) -> Examples:
        """Return the queries of a mask, shape (queries,)."""
        queries = [self.signals.queries[index] for index in mask.nonzero()[:, 0].tolist()]
        embeddings = {layer: table[mask] for layer, table in self.embeddings.items()}
        return Examples(self.signals.subset(queries), embeddings)

    def __add__(self, other: Examples) -> Examples:
        """Join the queries of two sets."""
        embeddings = {
            layer: torch.cat([table, other.embeddings[layer]])
            for layer, table in self.embeddings.items()
        }
        return Examples(self.signals + other.signals, embeddings)

    @cached_property
    def digest(self) -> str:
        """Hash of everything in these examples."""
        digest = hashlib.sha256(signals_digest(self.signals).encode())
        for layer, table in sorted(self.embeddings.items()):
            digest.update(str(layer).encode())
            digest.update(table.contiguous().numpy().tobytes())
        return digest.hexdigest()[:24]


@dataclass(frozen=True)
class Sample:
    """Queries of one collection, with candidates.

    Attributes:
        collection: The queries, their judgments and candidates.
        kind: One of ``KINDS``.
        examples: Examples of the queries that have a candidate to read.
        likelihoods: Query -> its likelihood given each candidate; of judged queries only.
    """

    collection: Collection
    kind: str
    examples: Examples
    likelihoods: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def queries(self) -> tuple[QuerySignals, ...]:
        """Signals of each query."""
        return self.examples.signals.queries


Corpora = Mapping[str, Mapping[str, Sample]]
"""Collection -> kind -> sample."""


@dataclass(frozen=True)
class Task:
    """A sample to test, and the training examples for it.

    Attributes:
        sample: The sample; every query is tested once.
        splits: Examples to train on, and the examples of the sample that are then tested.
    """

    sample: Sample
    splits: Sequence[tuple[Examples, Examples]]


class RouterCollector(Collector):
    """Computes samples in one layout, or loads them."""

    def __init__(self, options: ComparisonOptions, layout: str) -> None:
        super().__init__(options)
        self.layout = layout
        self.cache_folder = self.folder / "router-report"

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers after which queries are embedded; the last one is the default."""
        return tuple(round(depth * self.llm.num_layers) for depth in _DEPTHS)

    def judged(self, path: Path) -> Sample:
        """Sample the judged queries of a collection.

        Raises:
            CollectionError: No query is judged.
        """
        collection = self.load(path)
        if not collection.topics:
            raise CollectionError(f"{path} judges none of its queries; give another collection.")
        examples = self._examples(collection)
        return Sample(collection, JUDGED, examples, self.likelihoods(collection))

    def synthesized(self, collection: Collection, count: int) -> Sample:
        """Synthesize queries from a collection's passages; those that retrieve theirs are used.

        Raises:
            CollectionError: No query retrieves its passage.
        """
        with progress(f"{collection.name}: writing queries", count) as advance:
            synthesized = synthesize_queries(
                collection,
                self.llm,
                count,
                self.folder,
                seed=self.options.seed,
                advance=advance,
            )
        if synthesized.topics:
            synthesized = consistent(self.retrieved(synthesized), self.options.hits)
        if not synthesized.topics:
            raise CollectionError(
                f"{collection.path}: none of {count} texts that {self.llm.name!r} wrote finds its "
                "passage; give a larger --synthesize, or a larger LLM."
            )
        return Sample(synthesized, SYNTHESIZED, self._examples(synthesized))

    def _examples(self, collection: Collection) -> Examples:
        signals = self.signals(collection, self.layout)
        texts = [query.query for query in signals.queries]
        return Examples(signals, {layer: self._embeddings(texts, layer) for layer in self.layers})

    def _embeddings(self, texts: Sequence[str], layer: int) -> Tensor:
        """Embed queries or load their embeddings, whose last digits depend on the batch."""
        content: list[Any] = [self.llm.name, str(self.llm.dtype), __version__, layer, list(texts)]
        name = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]
        path = self.cache_folder / f"embeddings-{name}.safetensors"
        try:
            return load(path.read_bytes())["embeddings"]
        except (OSError, SafetensorError, KeyError):
            embeddings = self.llm.embed(texts, layer=layer)
        make_folder(self.cache_folder, "cached values")
        atomic_write_bytes(path, save({"embeddings": embeddings}))
        return embeddings


def join_samples(samples: Sequence[Sample], teacher: float = 0.0) -> Examples:
    """Join the queries of several samples.

    Args:
        samples: One or more.
        teacher: Share of the query likelihood in the judgments of samples with likelihoods.
    """
    return reduce(add, (_with_teacher(sample, teacher) for sample in samples))


def unseen(corpora: Corpora, kinds: Sequence[str] = KINDS, teacher: float = 0.0) -> dict[str, Task]:
    """Test the judged queries of each collection after training on the others alone.

    Args:
        corpora: Two collections or more.
        kinds: Kinds of queries to train on, as far as there are any.
        teacher: Share of the query likelihood in the judgments to train on.
    """
    tasks = {}
    for name, samples in corpora.items():
        others = [
            by_kind[kind]
            for other, by_kind in corpora.items()
            for kind in kinds
            if other != name and kind in by_kind
        ]
        test = samples[JUDGED]
        tasks[name] = Task(test, [(join_samples(others, teacher), test.examples)])
    return tasks


def own_judged(corpora: Corpora) -> dict[str, Task]:
    """Test the judged queries of each collection after training on its synthesized ones."""
    return {
        name: Task(samples[JUDGED], [(samples[SYNTHESIZED].examples, samples[JUDGED].examples)])
        for name, samples in corpora.items()
    }


def own_synthesized(corpora: Corpora) -> dict[str, Task]:
    """Test synthesized queries of each collection after training on its other ones."""
    tasks = {}
    for name, samples in corpora.items():
        sample = samples[SYNTHESIZED]
        parts = folds_by_passage(sample)
        splits = [
            (sample.examples.select(parts != part), sample.examples.select(parts == part))
            for part in parts.unique().tolist()
        ]
        tasks[name] = Task(sample, splits)
    return tasks


def folds_by_passage(sample: Sample) -> Tensor:
    """Return the fold of each synthesized query, from 0; queries of one passage share it.

    Raises:
        InputError: All queries are from the same passage.
    """
    passages = [min(sample.collection.qrels[query.query_id]) for query in sample.queries]
    if len(set(passages)) < 2:
        raise InputError(
            f"all {len(passages)} queries synthesized for {sample.collection.name!r} are of one "
            "passage and cannot be cross-validated; give a larger --synthesize."
        )
    ordered = sorted(set(passages), key=lambda name: hashlib.sha256(name.encode()).digest())
    folds = {passage: index % FOLDS for index, passage in enumerate(ordered)}
    return torch.tensor([folds[passage] for passage in passages])


def _with_teacher(sample: Sample, share: float) -> Examples:
    if not share or not sample.likelihoods:
        return sample.examples
    signals = mix_teacher(sample.examples.signals, sample.likelihoods, share)
    return Examples(signals, sample.examples.embeddings)
