"""`routehead evaluate`: measure and compare methods on judged collections."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer
from rich.console import Console

from routehead_plugins import evaluation
from routehead_plugins.cli.options import LLM, PROMPT, with_options
from routehead_plugins.cli.runtime import (
    check_minimum,
    check_names,
    fitted_weight,
    load_llm,
    progress,
    ranked,
    settings,
    stamp,
    with_candidates,
)
from routehead_plugins.data import Document
from routehead_plugins.errors import InputError
from routehead_plugins.io import (
    CORPUS_FILE,
    QRELS_FILE,
    RUN_FILE,
    TOPICS_FILE,
    Collection,
    Journal,
    load_collection,
)
from routehead_plugins.options import RerankerOptions

if TYPE_CHECKING:
    from routehead_plugins.backbone import FrozenLM

# Query id -> documents.
_Candidates: TypeAlias = Mapping[str, Sequence[Document]]


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


@with_options(*LLM, *PROMPT, "document_cache")
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
    # Descriptions hold the content of head-set files, so that a changed file is noticed.
    selectors = _selectors(methods, options)
    _check(arguments, methods)
    collections = [load_collection(path) for path in arguments.collection]
    files = (CORPUS_FILE, TOPICS_FILE, QRELS_FILE, RUN_FILE)
    stamps = [[stamp(collection.path / file) for file in files] for collection in collections]
    shared = {
        "methods": methods,
        "hits": arguments.hits,
        "first_stage_weight": arguments.first_stage_weight,
        **settings(options),
    }
    state = {**shared, "collections": stamps, "selectors": selectors}
    # Without an output, no later call would look for the journal.
    with (
        tempfile.TemporaryDirectory() as folder,
        Journal(arguments.output or Path(folder) / "evaluation", state) as journal,
    ):
        llm = cache(partial(load_llm, options))  # loaded once, if at all
        score = partial(_score, llm, options, journal)
        evaluations = {
            collection.name: _evaluate(collection, methods, measures, arguments, score)
            for collection in collections
        }
        table = evaluation.ResultTable(evaluations, baseline=arguments.baseline, settings=shared)
        if arguments.output is not None:
            table.write_json(arguments.output)
        journal.discard()
    Console().print(table.to_rich())


def _selectors(methods: Sequence[str], options: RerankerOptions) -> list[str]:
    """Describe the selector of every method but the first stage, and check that it exists."""
    from routehead_plugins.selection import FIRST_STAGE, FUSED, choose_selector

    descriptions = []
    for method in methods:
        if method == FIRST_STAGE:
            continue
        selector = choose_selector(replace(options, heads=method.removesuffix(FUSED)))
        if method.endswith(FUSED) and fitted_weight(selector):
            raise InputError(
                f"method {method!r} adds {FIRST_STAGE} twice, since its heads were fitted together "
                f"with a first stage; name it without {FUSED!r}."
            )
        descriptions.append(repr(selector))
    return descriptions


def _check(arguments: EvaluateArguments, methods: Sequence[str]) -> None:
    """Check the other arguments before anything is read or loaded."""
    if arguments.baseline not in methods:
        raise InputError(
            f"baseline {arguments.baseline!r} is not among the methods {', '.join(methods)}; "
            "add it, or name another baseline."
        )
    check_minimum("--hits", arguments.hits)
    check_names(arguments.collection)


def _evaluate(
    collection: Collection,
    methods: Sequence[str],
    measures: Sequence[str],
    arguments: EvaluateArguments,
    score: Callable[[Collection, str, _Candidates], Mapping[str, Sequence[float]]],
) -> dict[str, evaluation.Evaluation]:
    """Measure every method on one collection."""
    from routehead_plugins.selection import FIRST_STAGE, FUSED

    topics = {key: text for key, text in collection.topics.items() if key in collection.qrels}
    collection = with_candidates(collection, topics, arguments.hits)
    candidates = {key: collection.candidates(key, arguments.hits) for key in topics}
    evaluations = {}
    for method in methods:
        if method == FIRST_STAGE:
            run = {
                key: [(document.id or "", document.score or 0.0) for document in documents]
                for key, documents in candidates.items()
            }
        else:
            scores = score(collection, method.removesuffix(FUSED), candidates)
            weight = arguments.first_stage_weight if method.endswith(FUSED) else 0.0
            run = {key: ranked(candidates[key], scores[key], weight) for key in topics}
        evaluations[method] = evaluation.evaluate(run, collection.qrels, measures)
    return evaluations


def _score(
    llm: Callable[[], FrozenLM],
    options: RerankerOptions,
    journal: Journal,
    collection: Collection,
    heads: str,
    candidates: _Candidates,
) -> dict[str, list[float]]:
    """Score the candidates of every query; the LLM runs for the queries the journal lacks."""
    from routehead_plugins.reranker import HeadRoutedAttentionReranker

    keys = {query_id: f"{collection.name}/{heads}/{query_id}" for query_id in candidates}
    missing = [query_id for query_id, key in keys.items() if key not in journal.done]
    if missing:
        options = replace(options, heads=heads)
        reranker = HeadRoutedAttentionReranker.from_options(options, llm())
        with progress(f"{collection.name}: {heads}", len(missing)) as advance:
            for query_id in missing:
                scores = reranker.score(collection.topics[query_id], candidates[query_id])
                journal.append(keys[query_id], scores)
                advance()
    return {query_id: journal.done[key] for query_id, key in keys.items()}
