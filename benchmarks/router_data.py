"""What routers are trained and tested on, kept on disk, and who is trained on what.

Signals of judged queries are those of `compare.py`, and of synthesized ones those of
`routehead train`: what either has computed is found again.
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
from compare_collect import CollectJob, Collector
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from routehead_plugins import __version__
from routehead_plugins.cli.runtime import progress
from routehead_plugins.errors import CollectionError, InputError
from routehead_plugins.io import Collection, atomic_write_bytes
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
_DEPTHS = (0.5, 0.8)  # of the layers, after which queries are embedded
_TENSORS = ("mass", "calibrated", "gains", "first_stage", "ideal_gains", "averaged")


@dataclass(frozen=True)
class Examples:
    """Queries, and all that routers learn from.

    Attributes:
        signals: What all heads say of their candidates.
        embeddings: Layer -> embeddings after it, shape (queries, width).
    """

    signals: SignalSet
    embeddings: Mapping[int, Tensor]

    def some(self, wanted: Tensor) -> Examples:
        """A part of the queries, by a mask of shape (queries,)."""
        queries = [self.signals.queries[place] for place in wanted.nonzero()[:, 0].tolist()]
        embeddings = {layer: each[wanted] for layer, each in self.embeddings.items()}
        return Examples(self.signals.subset(queries), embeddings)

    def __add__(self, other: Examples) -> Examples:
        """Put the queries of two together."""
        embeddings = {
            layer: torch.cat([each, other.embeddings[layer]])
            for layer, each in self.embeddings.items()
        }
        return Examples(self.signals + other.signals, embeddings)

    @cached_property
    def digest(self) -> str:
        """Tells these examples from any others by all that they hold."""
        signals = self.signals
        named = [str(signals.heads), signals.model, signals.layout, list(signals.data)]
        found = hashlib.sha256(json.dumps(named).encode())
        for query in signals.queries:
            found.update(repr((query.query_id, query.query, query.docids)).encode())
            for name in _TENSORS:
                found.update(getattr(query, name).contiguous().numpy().tobytes())
        for layer, each in sorted(self.embeddings.items()):
            found.update(str(layer).encode())
            found.update(each.contiguous().numpy().tobytes())
        return found.hexdigest()[:24]


@dataclass(frozen=True)
class Sample:
    """Queries of one collection, with candidates.

    Attributes:
        collection: The queries, their judgments and candidates.
        kind: One of ``KINDS``.
        examples: Of those queries that have a candidate to read.
        likelihoods: Query -> its likelihood given each candidate; of judged queries only.
    """

    collection: Collection
    kind: str
    examples: Examples
    likelihoods: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def queries(self) -> tuple[QuerySignals, ...]:
        """The signals query by query."""
        return self.examples.signals.queries


Corpora = Mapping[str, Mapping[str, Sample]]
"""Collection -> kind -> sample."""


@dataclass(frozen=True)
class Task:
    """A sample that is tested, and what routers are trained on for that.

    Attributes:
        sample: Every one of its queries is tested once.
        splits: Examples to train on, and those of the sample that are then tested.
    """

    sample: Sample
    splits: Sequence[tuple[Examples, Examples]]


class RouterCollector(Collector):
    """Computes what routers need, or finds it.

    Args:
        job: What is read, and how.
        layout: Of the prompt.
    """

    def __init__(self, job: CollectJob, layout: str) -> None:
        super().__init__(job)
        self.layout = layout
        self.folder = job.signals / "router-report"

    @property
    def layers(self) -> tuple[int, ...]:
        """After which queries are embedded, the last one first choice."""
        return tuple(round(depth * self.llm.num_layers) for depth in _DEPTHS)

    def judged(self, path: Path) -> Sample:
        """Sample the judged queries of a collection."""
        collection = self.load(path)
        if not collection.topics:
            raise CollectionError(f"{path} judges none of its queries; give another collection.")
        examples = self._examples(collection)
        return Sample(collection, JUDGED, examples, self.likelihoods(collection))

    def synthesized(self, collection: Collection, count: int) -> Sample:
        """Have queries written from a collection's passages; those that find theirs are kept."""
        with progress(f"{collection.name}: writing queries", count) as advance:
            folder, seed = self.job.signals, self.job.seed
            written = synthesize_queries(
                collection, self.llm, count, folder, seed=seed, advance=advance
            )
        if written.topics:
            written = consistent(self._retrieved(written), self.job.hits)
        if not written.topics:
            raise CollectionError(
                f"{collection.path}: none of {count} texts that {self.llm.name!r} wrote finds its "
                "passage; give a larger --synthesize, or a larger LLM."
            )
        return Sample(written, SYNTHESIZED, self._examples(written))

    def _examples(self, collection: Collection) -> Examples:
        signals = self.signals(collection, self.layout)
        texts = [query.query for query in signals.queries]
        return Examples(signals, {layer: self._embedded(texts, layer) for layer in self.layers})

    def _embedded(self, texts: Sequence[str], layer: int) -> Tensor:
        """Embed queries, or find their embeddings: batches differ in the last digits."""
        content: list[Any] = [self.llm.name, str(self.llm.dtype), __version__, layer, list(texts)]
        name = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]
        path = self.folder / f"embeddings-{name}.safetensors"
        try:
            return load(path.read_bytes())["embeddings"]
        except (OSError, SafetensorError, KeyError):
            found = self.llm.embed(texts, layer=layer)
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic_write_bytes(path, save({"embeddings": found}))
            return found


def joined(samples: Sequence[Sample], teacher: float = 0.0) -> Examples:
    """Put the queries of several samples together.

    Args:
        samples: One or more.
        teacher: Share of the query likelihood in judgments, where there are likelihoods.
    """
    return reduce(add, (_taught(sample, teacher) for sample in samples))


def unseen(corpora: Corpora, kinds: Sequence[str] = KINDS, teacher: float = 0.0) -> dict[str, Task]:
    """Test the judged queries of each collection after training on the others alone.

    Args:
        corpora: Two collections or more.
        kinds: Of queries to train on, as far as there are any.
        teacher: See `joined`.
    """
    tasks = {}
    for name, samples in corpora.items():
        others = [
            found[kind]
            for other, found in corpora.items()
            for kind in kinds
            if other != name and kind in found
        ]
        test = samples[JUDGED]
        tasks[name] = Task(test, [(joined(others, teacher), test.examples)])
    return tasks


def own_judged(corpora: Corpora) -> dict[str, Task]:
    """Test the judged queries of each collection after training on its synthesized ones."""
    return {
        name: Task(found[JUDGED], [(found[SYNTHESIZED].examples, found[JUDGED].examples)])
        for name, found in corpora.items()
    }


def own_synthesized(corpora: Corpora) -> dict[str, Task]:
    """Test synthesized queries of each collection after training on others of them."""
    tasks = {}
    for name, found in corpora.items():
        sample = found[SYNTHESIZED]
        parts = deal_by_source(sample)
        splits = [
            (sample.examples.some(parts != part), sample.examples.some(parts == part))
            for part in parts.unique().tolist()
        ]
        tasks[name] = Task(sample, splits)
    return tasks


def deal_by_source(sample: Sample) -> Tensor:
    """Deal synthesized queries into parts, those of one passage into the same.

    Returns:
        The part of each query, from 0.

    Raises:
        InputError: All are of the same passage.
    """
    sources = [min(sample.collection.qrels[query.query_id]) for query in sample.queries]
    if len(set(sources)) < 2:
        raise InputError(
            f"all {len(sources)} queries written for {sample.collection.name!r} are of one "
            "passage, and cannot be cross-validated; give a larger --synthesize."
        )
    dealt = sorted(set(sources), key=lambda source: hashlib.sha256(source.encode()).digest())
    part = {source: place % FOLDS for place, source in enumerate(dealt)}
    return torch.tensor([part[source] for source in sources])


def _taught(sample: Sample, share: float) -> Examples:
    if not share or not sample.likelihoods:
        return sample.examples
    signals = mix_teacher(sample.examples.signals, sample.likelihoods, share)
    return Examples(signals, sample.examples.embeddings)
