"""`routehead detect`: which heads of an LLM follow relevance, from judged collections."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from routehead_plugins.cli.runtime import ModelOptions, progress, with_candidates
from routehead_plugins.errors import InputError
from routehead_plugins.heads import HeadSet
from routehead_plugins.io import Collection, load_collection, make_folder
from routehead_plugins.selection import AllHeads
from routehead_plugins.signals import CollectOptions, SignalSet, collect_signals
from routehead_plugins.training import METHODS, detect, fit_weights

WEIGHTS = "weights"
ALL_METHODS = (*METHODS, WEIGHTS)


@dataclass(frozen=True)
class DetectionJob:
    """What to detect, and on what.

    Attributes:
        collections: BEIR folders with judgments.
        method: One of ``ALL_METHODS``.
        output: Where to write the head set.
        count: How many heads; ``None`` for the method's own number.
        queries: How many queries of each collection at most, drawn by the seed; ``None`` for all.
        temperature: For ``"core"``; ``None`` has one chosen.
        aggregation: For ``"weights"``.
        signals: Folder in which signals are kept for the next call; ``None`` for the user's cache.
        options: How candidates are shown.
        seed: Of everything that is drawn.
        llm: How the LLM is loaded.
    """

    collections: Sequence[Path]
    method: str
    output: Path
    count: int | None
    queries: int | None
    temperature: float | None
    aggregation: str
    signals: Path | None
    options: CollectOptions
    seed: int
    llm: ModelOptions


def run_detection(job: DetectionJob) -> HeadSet:
    """Compute signals, choose heads, write the head set.

    Queries whose signals were computed before are not run again, whatever the method.

    Raises:
        RouteHeadError: An option is unknown, a collection malformed or without contrast, or the LLM
            fails.
    """
    _check(job)
    signals = gather(job)
    if job.method == WEIGHTS:
        found = fit_weights(signals, aggregation=job.aggregation, seed=job.seed)
    else:
        found = detect(
            signals, job.method, job.count or 8, temperature=job.temperature, seed=job.seed
        )
    make_folder(job.output.parent, "head sets")
    found.save(job.output)
    return found


def gather(job: DetectionJob) -> SignalSet:
    """Compute, or look up, the signals of all collections."""
    collections = [load_collection(path) for path in job.collections]
    samples = [sample_queries(collection, job.queries, job.seed) for collection in collections]
    layout = job.llm.arrange(AllHeads())
    llm = job.llm.load()
    parts = []
    for collection, sample in zip(collections, samples, strict=True):
        topics = {query_id: collection.topics[query_id] for query_id in sample}
        retrieved = with_candidates(collection, topics, job.options.hits)
        with progress(f"{collection.name}: signals", len(sample)) as advance:
            parts.append(
                collect_signals(
                    retrieved,
                    llm,
                    layout,
                    job.signals or signals_folder(),
                    job.options,
                    query_ids=sample,
                    advance=advance,
                )
            )
    joined = parts[0]
    for part in parts[1:]:
        joined = joined + part
    return joined


def signals_folder() -> Path:
    """Where signals are kept when no folder is named: the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "routehead" / "signals"


def sample_queries(collection: Collection, size: int | None, seed: int) -> list[str]:
    """Draw judged queries.

    Args:
        collection: The collection.
        size: How many at most; ``None`` for all.
        seed: Of the draw.

    Returns:
        Their ids, in the collection's order.
    """
    judged = [query_id for query_id in collection.topics if query_id in collection.qrels]
    if size is None or size >= len(judged):
        return judged
    # All in the order of the lot: of two samples the smaller is a part of the larger.
    lot = random.Random(f"{seed} {collection.name}").sample(judged, len(judged))
    drawn = set(lot[:size])
    return [query_id for query_id in judged if query_id in drawn]


def _check(job: DetectionJob) -> None:
    """Refuse what cannot work before anything is loaded."""
    if job.method not in ALL_METHODS:
        raise InputError(f"method={job.method!r} is unknown; give one of {', '.join(ALL_METHODS)}.")
    if job.queries is not None and job.queries < 1:
        raise InputError(f"queries={job.queries!r} leaves nothing to learn from; give 1 or more.")
    if job.method == WEIGHTS and job.count is not None:
        raise InputError(
            f"count={job.count!r} is not for method 'weights', which finds out how many heads "
            "matter; leave it out."
        )
    if job.output.is_dir():
        raise InputError(f"{job.output} is a folder; name a file, such as heads.json.")
