"""`routehead evaluate`: methods by collections, measured and compared."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from routehead_plugins.backbone import FrozenLM
from routehead_plugins.cli.runtime import ModelOptions, progress, ranked, stamp, with_candidates
from routehead_plugins.data import Document
from routehead_plugins.errors import InputError
from routehead_plugins.evaluation import Evaluation, ResultTable, evaluate, parse_measures
from routehead_plugins.heads import HeadSet
from routehead_plugins.io import (
    CORPUS_FILE,
    QRELS_FILE,
    RUN_FILE,
    TOPICS_FILE,
    Collection,
    Journal,
    load_collection,
)
from routehead_plugins.reranker import HeadRoutedAttentionReranker
from routehead_plugins.selection import FixedHeads, Router, Selector

FIRST_STAGE = "bm25"
_FUSED = f"+{FIRST_STAGE}"


@dataclass(frozen=True)
class EvaluationJob:
    """What to measure.

    Attributes:
        collections: BEIR folders.
        methods: ``"bm25"``, or what ``heads=`` takes; ``"+bm25"`` at the end fuses.
        hits: Candidates to re-rank per query.
        measures: As ir_measures writes them.
        baseline: The method that the others are compared with.
        first_stage_weight: Weight of BM25 in fused methods.
        output: Where to write the table as JSON; ``None`` for nowhere.
        llm: How the LLM is loaded.
    """

    collections: Sequence[Path]
    methods: Sequence[str]
    hits: int
    measures: Sequence[str]
    baseline: str
    first_stage_weight: float
    output: Path | None
    llm: ModelOptions

    def selector(self, method: str) -> Selector:
        """What chooses the heads of a method, other than the first stage."""
        return self.llm.selector(method.removesuffix(_FUSED))

    def settings(self) -> dict[str, Any]:
        """What the figures depend on, as it stands in the results."""
        return {
            "methods": list(self.methods),
            "hits": self.hits,
            "first_stage_weight": self.first_stage_weight,
            **self.llm.settings(),
        }


def split_methods(text: str) -> list[str]:
    """Read a comma-separated list in which neighbouring ``layer-head`` items are one head set.

    Args:
        text: Such as ``"bm25,all,13-18,13-1,layers:10-19"``: four methods.

    Raises:
        InputError: No method is named, or one is named twice.
    """
    methods: list[str] = []
    for item in (part.strip() for part in text.split(",")):
        head = HeadSet.looks_like(item.removesuffix(_FUSED))
        if head and methods and HeadSet.looks_like(methods[-1]):
            methods[-1] += f",{item}"
        elif item:
            methods.append(item)
    if not methods:
        raise InputError('--methods names no method; give some, such as "bm25,all,layers".')
    repeated = [method for method in methods if methods.count(method) > 1]
    if repeated:
        raise InputError(f"method {repeated[0]!r} is named twice; name each method once.")
    return methods


def run_evaluation(job: EvaluationJob) -> ResultTable:
    """Run every method on every collection and compare them.

    Queries that were done before an interruption are not run again.

    Raises:
        RouteHeadError: A collection is malformed, a method unknown, or the LLM fails.
    """
    _check(job)
    collections = [load_collection(path) for path in job.collections]
    state = {
        **job.settings(),
        "collections": [_stamps(c) for c in collections],
        # What head-set files hold, not what they are called.
        "selectors": [repr(job.selector(method)) for method in _read_by(job.methods)],
    }
    # Without an output there is no place where a later call would look for the journal.
    with (
        tempfile.TemporaryDirectory() as folder,
        Journal(job.output or Path(folder) / "evaluation", state) as journal,
    ):
        bench = _Bench(job, journal)
        evaluations = {c.name: bench.evaluate(c) for c in collections}
        table = ResultTable(evaluations, baseline=job.baseline, settings=job.settings())
        if job.output is not None:
            table.write_json(job.output)
        journal.discard()
    return table


def _check(job: EvaluationJob) -> None:
    """Refuse what cannot work before anything is loaded."""
    parse_measures(job.measures)
    for method in _read_by(job.methods):
        selector = job.selector(method)
        fitted = (
            isinstance(selector, FixedHeads | Router) and selector.heads.recipe.first_stage_weight
        )
        if fitted and method.endswith(_FUSED):
            raise InputError(
                f"method {method!r} adds {FIRST_STAGE} twice, since its heads were fitted together "
                f"with a first stage; name it without {_FUSED!r}."
            )
    if job.baseline not in job.methods:
        raise InputError(
            f"baseline {job.baseline!r} is not among the methods {', '.join(job.methods)}; "
            "add it, or name another baseline."
        )
    if job.hits < 1:
        raise InputError(f"--hits={job.hits} leaves nothing to re-rank; give 1 or more.")
    names = [path.resolve().name for path in job.collections]
    if len(set(names)) < len(names):
        raise InputError(f"two collections have the same folder name: {', '.join(names)}.")


def _read_by(methods: Sequence[str]) -> list[str]:
    """Those methods for which the LLM is run."""
    return [method for method in methods if method != FIRST_STAGE]


class _Bench:
    """Runs methods, asking the LLM only for what the journal does not hold."""

    def __init__(self, job: EvaluationJob, journal: Journal) -> None:
        self.job = job
        self.journal = journal

    @cached_property
    def llm(self) -> FrozenLM:
        """Loaded when the first score is missing."""
        return self.job.llm.load()

    def evaluate(self, collection: Collection) -> dict[str, Evaluation]:
        """Measure every method on one collection."""
        judged = {key: text for key, text in collection.topics.items() if key in collection.qrels}
        retrieved = with_candidates(collection, judged, self.job.hits)
        evaluations = {}
        for method in self.job.methods:
            run = self._rankings(retrieved, judged, method)
            evaluations[method] = evaluate(run, retrieved.qrels, self.job.measures)
        return evaluations

    def _rankings(
        self, collection: Collection, topics: Mapping[str, str], method: str
    ) -> dict[str, list[tuple[str, float]]]:
        """Rank the candidates of every query."""
        base = method.removesuffix(_FUSED)
        weight = self.job.first_stage_weight if method.endswith(_FUSED) else 0.0
        candidates = {key: collection.candidates(key, self.job.hits) for key in topics}
        if method == FIRST_STAGE:
            return {
                key: [(d.id or "", d.score or 0.0) for d in documents]
                for key, documents in candidates.items()
            }
        scores = self._scores(collection.name, base, topics, candidates)
        return {key: ranked(candidates[key], scores[key], weight) for key in topics}

    def _scores(
        self,
        collection: str,
        base: str,
        topics: Mapping[str, str],
        candidates: Mapping[str, Sequence[Document]],
    ) -> dict[str, list[float]]:
        """Score every candidate, in the candidates' order."""
        places = {key: f"{collection}/{base}/{key}" for key in topics}
        missing = [key for key in topics if places[key] not in self.journal.done]
        if missing:
            selector = self.job.selector(base)
            reranker = HeadRoutedAttentionReranker(
                self.llm,
                selector,
                layout=self.job.llm.arrange(selector),
                max_doc_tokens=self.job.llm.max_doc_tokens,
            )
            with progress(f"{collection}: {base}", len(missing)) as advance:
                for key in missing:
                    self.journal.append(places[key], reranker.score(topics[key], candidates[key]))
                    advance()
        return {key: self.journal.done[place] for key, place in places.items()}


def _stamps(collection: Collection) -> list[Any]:
    files = (CORPUS_FILE, TOPICS_FILE, QRELS_FILE, RUN_FILE)
    return [stamp(collection.path / name) for name in files]
