"""What the comparison is made of: signals of every variant and likelihoods, kept on disk.

A part is one collection in one variant. All parts can be computed apart from each other, in any
order and on any machine; what lies in the folder is not computed again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from routehead_plugins.backbone import FrozenLM
from routehead_plugins.cli.detect import sample_queries
from routehead_plugins.cli.runtime import ModelOptions, progress, with_candidates
from routehead_plugins.errors import InputError
from routehead_plugins.io import CORPUS_FILE, Collection, atomic_write_text, load_collection
from routehead_plugins.layouts import get_layout
from routehead_plugins.signals import (
    CollectOptions,
    SignalSet,
    collect_likelihoods,
    collect_signals,
)

SHUFFLE = 0  # seed of the order in which shuffled candidates are shown
# Variant -> its layout, and the seed where candidates are shuffled. The parallel layout reads every
# document on its own: there is no order to shuffle.
VARIANTS: dict[str, tuple[str, int | None]] = {
    "sequential": ("sequential", None),
    "sequential-shuffled": ("sequential", SHUFFLE),
    "parallel": ("parallel", None),
}
LAYOUTS = ("sequential", "parallel")  # variants too, with candidates in BM25's order
# Queries of a collection share documents, but hardly ever a whole list of them.
DOCUMENT_CACHE = {"sequential": None, "parallel": "4GB"}
LIKELIHOOD = "likelihood"
PARTS = (*VARIANTS, LIKELIHOOD)


@dataclass(frozen=True)
class CollectJob:
    """What is read, and how.

    Attributes:
        queries: Judged queries of each collection, at most.
        hits: Candidates per query.
        signals: Folder in which everything is kept.
        seed: Draws the queries.
        llm: How the LLM is loaded, and where documents are cut.
    """

    queries: int
    hits: int
    signals: Path
    seed: int
    llm: ModelOptions

    def __post_init__(self) -> None:
        for name in ("queries", "hits"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name}={getattr(self, name)} is too few; give 1 or more.")


class Collector:
    """Computes parts, or finds them; the LLM is loaded when it is first needed."""

    def __init__(self, job: CollectJob) -> None:
        self.job = job
        job.signals.mkdir(parents=True, exist_ok=True)

    @cached_property
    def llm(self) -> FrozenLM:
        """All layers of it: the likelihood needs them, and every head is measured."""
        return self.job.llm.load()

    def load(self, path: Path) -> Collection:
        """Load a collection's sample of queries, with candidates."""
        collection = load_collection(path)
        # As `routehead detect` draws, which then finds the same signals.
        judged = sample_queries(collection, self.job.queries, self.job.seed)
        sampled = replace(
            collection,
            topics={query_id: collection.topics[query_id] for query_id in judged},
            qrels={query_id: collection.qrels[query_id] for query_id in judged},
        )
        return sampled if sampled.run is not None else self._retrieved(sampled)

    def collect(self, collection: Collection, part: str) -> None:
        """Compute a part.

        Args:
            collection: As `load` gives it.
            part: One of ``PARTS``.
        """
        if part == LIKELIHOOD:
            self.likelihoods(collection)
        else:
            self.signals(collection, part)

    def signals(self, collection: Collection, variant: str) -> SignalSet:
        """What all heads say of the candidates, computed where it is missing."""
        layout, shuffle = VARIANTS[variant]
        options = CollectOptions(self.job.hits, self.job.llm.max_doc_tokens, shuffle)
        with progress(f"{collection.name}: {variant}", len(collection.topics)) as advance:
            return collect_signals(
                collection,
                self.llm,
                get_layout(layout, document_cache=DOCUMENT_CACHE[layout]),
                self.job.signals,
                options,
                advance=advance,
            )

    def likelihoods(self, collection: Collection) -> dict[str, Tensor]:
        """Query -> likelihood given each candidate that is not blank, in the run's order."""
        with progress(f"{collection.name}: {LIKELIHOOD}", len(collection.topics)) as advance:
            return collect_likelihoods(
                collection,
                self.llm,
                self.job.signals,
                hits=self.job.hits,
                max_doc_tokens=self.job.llm.max_doc_tokens,
                advance=advance,
            )

    def _retrieved(self, collection: Collection) -> Collection:
        """Add candidates from BM25, which are kept: not every machine with a GPU has a JVM."""
        corpus = hashlib.sha256((collection.path / CORPUS_FILE).read_bytes()).hexdigest()
        digest = _digest([corpus, collection.topics, self.job.hits])
        path = self.job.signals / f"candidates-{collection.name}-{digest}.json"
        if not path.exists():
            found = with_candidates(collection, collection.topics, self.job.hits)
            atomic_write_text(path, json.dumps(found.run))
        run: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return replace(collection, run=dict(run))


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
