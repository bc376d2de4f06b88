"""`routehead evaluate`: measure and compare methods on judged collections."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from routehead_plugins import evaluation
from routehead_plugins.cli.options import LLM, PROMPT, with_options
from routehead_plugins.cli.runtime import (
    check_minimum,
    check_names,
    check_new_file,
    check_reading,
    collection_files,
    err,
    fitted_weight,
    load_llm,
    path_of,
    progress,
    ranked,
    resumable,
    settings,
    with_candidates,
)
from routehead_plugins.data import Document
from routehead_plugins.errors import InputError
from routehead_plugins.io import Collection, Journal, load_collection, query_key
from routehead_plugins.options import RerankerOptions

_Run = Mapping[str, Sequence[tuple[str, float]]]


@dataclass(frozen=True)
class EvaluateArguments:
    """Options of `routehead evaluate`."""

    collection: Annotated[
        list[Path],
        "A BEIR folder: corpus.jsonl, queries.jsonl, qrels/test.tsv and optionally run.bm25.trec. "
        "Can be repeated.",
    ]
    methods: Annotated[
        str,
        "Comma-separated: **bm25** (the candidates' order) and anything --heads takes; "
        "**routed:FOLDER** for a router; **+bm25** at the end adds the candidates' scores.",
    ] = "bm25,all,layers,all+bm25"
    output: Annotated[Path | None, "Output file of the table and of every query, as JSON."] = None
    baseline: Annotated[str, "Method that the others are compared with."] = "bm25"
    measures: Annotated[str, "Comma-separated, as in ir_measures."] = "nDCG@10,RR@10,R@20"
    hits: Annotated[int, "Candidates to re-rank per query."] = 20
    first_stage_weight: Annotated[
        float, typer.Option(help="Weight of the candidates' scores in +bm25 methods.", min=0)
    ] = 1.0


@with_options(*LLM, *PROMPT, "document_cache", "refine", "drop_query_copies")
def evaluate(arguments: EvaluateArguments, options: RerankerOptions) -> None:
    """Measure methods on judged collections, and test whether they differ.

    Prints means, the difference to the baseline with its 95 % bootstrap interval, and the p value
    of a paired randomisation test, corrected for the number of methods (Holm).

    Example: routehead evaluate --collection scifact --methods bm25,all,13-18,13-1
    """
    from routehead_plugins.selection import split_methods

    methods = split_methods(arguments.methods)
    measures = [name.strip() for name in arguments.measures.split(",")]
    evaluation.parse_measures(measures)
    _check(arguments, methods)
    # Descriptions hold the content of head-set files, so that a changed file is noticed.
    selectors = _selectors(methods, options)
    shared = {
        "methods": methods,
        "hits": arguments.hits,
        "first_stage_weight": arguments.first_stage_weight,
        **settings(options),
    }
    tasks = [_task(path, arguments, measures) for path in arguments.collection]
    # Without an output, no later call would look for the journal.
    with (
        tempfile.TemporaryDirectory() as folder,
        resumable() as keep,
        Journal(
            arguments.output or Path(folder) / "evaluation", {**shared, "selectors": selectors}
        ) as journal,
    ):
        _score(tasks, methods, options, journal, keep if arguments.output else lambda: None)
        evaluations = {
            task.collection.name: _evaluate(task, methods, measures, arguments, journal)
            for task in tasks
        }
        table = evaluation.ResultTable(evaluations, baseline=arguments.baseline, settings=shared)
        if arguments.output is not None:
            table.write_json(arguments.output)
        journal.discard()
    Console().print(table.to_rich())


@dataclass(frozen=True)
class _Task:
    """A collection with the candidates of its judged queries."""

    collection: Collection
    candidates: Mapping[str, Sequence[Document]]

    @property
    def first_stage(self) -> _Run:
        """The candidates in their order, with their own scores."""
        return {
            query_id: [(document.id or "", document.score or 0.0) for document in documents]
            for query_id, documents in self.candidates.items()
        }

    def key(self, heads: str, query_id: str) -> str:
        """Return the key of a query's scores in the journal."""
        query, documents = self.collection.topics[query_id], self.candidates[query_id]
        return query_key(f"{self.collection.name}/{heads}/{query_id}", query, documents)


def _check(arguments: EvaluateArguments, methods: Sequence[str]) -> None:
    """Check the arguments before anything is read or loaded."""
    from routehead_plugins.selection import FUSED

    if arguments.baseline not in methods:
        raise InputError(
            f"baseline {arguments.baseline!r} is not among the methods {', '.join(methods)}; "
            "add it, or name another baseline."
        )
    check_minimum("--hits", arguments.hits)
    check_names(arguments.collection)
    weight = arguments.first_stage_weight
    if not math.isfinite(weight):
        raise InputError(f"--first-stage-weight={weight} must be a finite number, 0 or more.")
    heads = [path_of(method.removesuffix(FUSED)) for method in methods]
    inputs = [*collection_files(arguments.collection), *heads]
    check_new_file("--output", arguments.output, inputs)


def _selectors(methods: Sequence[str], options: RerankerOptions) -> list[str]:
    """Describe the selector of every method but the first stage, and check that it exists."""
    from routehead_plugins.selection import FIRST_STAGE, FUSED, choose_selector

    descriptions = []
    for method in methods:
        if method == FIRST_STAGE:
            continue
        selector = choose_selector(replace(options, heads=method.removesuffix(FUSED)))
        check_reading(options, selector)
        if method.endswith(FUSED) and fitted_weight(selector):
            raise InputError(
                f"method {method!r} adds {FIRST_STAGE} twice, since its heads were fitted together "
                f"with a first stage; name it without {FUSED!r}."
            )
        descriptions.append(repr(selector))
    return descriptions


def _task(path: Path, arguments: EvaluateArguments, measures: Sequence[str]) -> _Task:
    """Read a collection and its candidates, and check that they can be measured."""
    collection = load_collection(path)
    topics = {key: text for key, text in collection.topics.items() if key in collection.qrels}
    collection = with_candidates(collection, topics, arguments.hits)
    candidates = {key: collection.candidates(key, arguments.hits) for key in topics}
    task = _Task(collection, candidates)
    # Any error of these judgments and measures is found now, not after hours of work.
    evaluation.evaluate(task.first_stage, collection.qrels, measures)
    return task


def _score(
    tasks: Sequence[_Task],
    methods: Sequence[str],
    options: RerankerOptions,
    journal: Journal,
    keep: Callable[[], None],
) -> None:
    """Add the scores of all methods to the journal; the LLM runs for the queries it lacks."""
    from routehead_plugins.reranker import HeadRoutedAttentionReranker
    from routehead_plugins.selection import FIRST_STAGE, FUSED

    read = dict.fromkeys(m.removesuffix(FUSED) for m in methods if m != FIRST_STAGE)
    missing = {
        (task_number, heads): [
            query_id
            for query_id in task.candidates
            if task.key(heads, query_id) not in journal.done
        ]
        for task_number, task in enumerate(tasks)
        for heads in read
    }
    if journal.done:
        keep()
        err.print(f"Resuming: {len(journal.done)} scores were computed before.")
    if not any(missing.values()):
        return
    llm = load_llm(options)
    # All are made before the first one is used, since heads are checked against the LLM.
    rerankers = {
        heads: HeadRoutedAttentionReranker.from_options(replace(options, heads=heads), llm)
        for heads in read
    }
    for (task_number, heads), query_ids in missing.items():
        task = tasks[task_number]
        topics = task.collection.topics
        with progress(f"{task.collection.name}: {heads}", len(query_ids), keep) as advance:
            for query_id in query_ids:
                scores = rerankers[heads].score(topics[query_id], task.candidates[query_id])
                journal.append(task.key(heads, query_id), scores)
                advance()


def _evaluate(
    task: _Task,
    methods: Sequence[str],
    measures: Sequence[str],
    arguments: EvaluateArguments,
    journal: Journal,
) -> dict[str, evaluation.Evaluation]:
    """Measure every method on one collection."""
    from routehead_plugins.selection import FIRST_STAGE, FUSED

    evaluations = {}
    for method in methods:
        run: _Run = task.first_stage
        if method != FIRST_STAGE:
            heads = method.removesuffix(FUSED)
            weight = arguments.first_stage_weight if method.endswith(FUSED) else 0.0
            run = {
                query_id: ranked(documents, journal.done[task.key(heads, query_id)], weight)
                for query_id, documents in task.candidates.items()
            }
        evaluations[method] = evaluation.evaluate(run, task.collection.qrels, measures)
    return evaluations
