"""`routehead detect`: find the heads of an LLM that follow relevance, from judged collections."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from routehead_plugins.cli.options import LLM, PROMPT, Seed, Signals, with_options
from routehead_plugins.cli.runtime import (
    check_minimum,
    check_new_file,
    check_new_folder,
    collection_files,
    load_llm,
    path_of,
    progress,
    resumable,
    sample_queries,
    signals_folder,
    with_candidates,
)
from routehead_plugins.errors import InputError
from routehead_plugins.heads import AGGREGATIONS
from routehead_plugins.io import Collection, load_collection, make_folder
from routehead_plugins.options import RerankerOptions

if TYPE_CHECKING:
    from routehead_plugins.signals import SignalSet

WEIGHTS = "weights"
_COUNT = 8  # heads


@dataclass(frozen=True)
class DetectArguments:
    """Options of `routehead detect`."""

    collection: Annotated[
        list[Path],
        "A BEIR folder with judgments: corpus.jsonl, queries.jsonl, qrels/test.tsv and optionally "
        "run.bm25.trec. Can be repeated.",
    ]
    output: Annotated[Path, "Output file of the head set, as JSON."]
    method: Annotated[
        str,
        "**ndcg** (QRHead as released), **qr** (QRHead as printed), **core** (CoRe), **layers** "
        "(Selective-ICR), **discriminability** (after HeadRank), or **weights**: signed weights "
        "over all heads and the first stage.",
    ] = "ndcg"
    count: Annotated[
        int | None,
        typer.Option(
            help="Number of heads; for weights, the number of the best ones by ndcg, of which some "
            "may get no weight.  [default: 8; for weights, all]",
            min=1,
        ),
    ] = None
    queries: Annotated[
        int | None, "Maximum queries per collection, drawn by --seed.  [default: all]"
    ] = None
    hits: Annotated[int, "Candidates per query."] = 20
    temperature: Annotated[
        float | None, "Temperature of core.  [default: chosen on a part of the queries]"
    ] = None
    aggregation: Annotated[str, "For weights: standardised, log or mean."] = "standardised"
    first_stage: Annotated[
        bool,
        "Choose a weight for the first stage's scores as well; **weights** always has one.",
    ] = False
    shuffle: Annotated[
        int | None, "Seed that shuffles the candidates.  [default: the first stage's order]"
    ] = None
    positions: Annotated[int, "Show the best document at this many positions, as CoRe does."] = 1
    signals: Signals = None
    seed: Seed = 0


@with_options(*LLM, *PROMPT)
def detect(arguments: DetectArguments, options: RerankerOptions) -> None:
    """Find the heads of an LLM that follow relevance, from judged queries.

    The LLM is run once per query. The signals of all its heads are kept on disk, so that other
    methods use them again and a job that was stopped resumes.

    Example: routehead detect --collection beir/nq --method core --layout parallel
    --output heads.json; then: routehead rerank --heads heads.json ...
    """
    from routehead_plugins import training

    _check(arguments, options, (*training.METHODS, WEIGHTS))
    signals = _signals(arguments, options)
    if arguments.method == WEIGHTS:
        if arguments.count is not None:
            best = training.detect(signals, "ndcg", arguments.count, seed=arguments.seed)
            signals = signals.restricted(best)
        heads = training.fit_weights(
            signals, aggregation=arguments.aggregation, seed=arguments.seed
        )
    else:
        heads = training.detect(
            signals,
            arguments.method,
            arguments.count or _COUNT,
            temperature=arguments.temperature,
            seed=arguments.seed,
        )
        if arguments.first_stage:
            heads = training.with_first_stage(signals, heads)
    make_folder(arguments.output.parent, "head sets")
    heads.save(arguments.output)
    typer.echo(f"{arguments.output}: {len(heads)} heads by {heads.method}: {heads}")


def _check(arguments: DetectArguments, options: RerankerOptions, methods: Sequence[str]) -> None:
    """Check the arguments before anything is read or loaded."""
    if arguments.method not in methods:
        raise InputError(
            f"--method={arguments.method} does not exist; give one of {', '.join(methods)}."
        )
    for name in ("queries", "hits", "positions"):
        check_minimum(f"--{name}", getattr(arguments, name))
    temperature = arguments.temperature
    if temperature is not None and arguments.method != "core":
        raise InputError(f"--temperature={temperature} is for --method=core; leave it out.")
    if temperature is not None and not 0 < temperature < math.inf:
        raise InputError(f"--temperature={temperature} must be a finite number above 0.")
    if arguments.aggregation not in AGGREGATIONS:
        raise InputError(
            f"--aggregation={arguments.aggregation} does not exist; give one of "
            f"{', '.join(AGGREGATIONS)}."
        )
    inputs = [*collection_files(arguments.collection), path_of(options.model)]
    check_new_file("--output", arguments.output, inputs)
    check_new_folder("--signals", arguments.signals or signals_folder())


def _signals(arguments: DetectArguments, options: RerankerOptions) -> SignalSet:
    """Compute the signals of all collections, or read those that were kept."""
    from routehead_plugins.layouts import make_layout
    from routehead_plugins.signals import CollectOptions, collect_signals, judged_queries

    collect = CollectOptions(
        arguments.hits, options.max_doc_tokens, arguments.shuffle, arguments.positions
    )
    layout = make_layout(options)
    samples = [_sample(load_collection(path), arguments) for path in arguments.collection]
    llm = load_llm(options)
    _check_data(reduce(add, [judged_queries(s, llm, layout, collect) for s in samples]), arguments)
    folder = arguments.signals or signals_folder()
    parts = []
    with resumable() as keep:
        for sample in samples:
            with progress(f"{sample.name}: signals", len(sample.topics), keep) as advance:
                parts.append(collect_signals(sample, llm, layout, folder, collect, advance=advance))
    return reduce(add, parts)


def _sample(collection: Collection, arguments: DetectArguments) -> Collection:
    """Draw queries of a collection, and retrieve their candidates if it has none."""
    query_ids = sample_queries(collection, arguments.queries, arguments.seed)
    topics = {query_id: collection.topics[query_id] for query_id in query_ids}
    return with_candidates(replace(collection, topics=topics), topics, arguments.hits)


def _check_data(queries: SignalSet, arguments: DetectArguments) -> None:
    """Check that heads can be found with these queries, before the LLM runs."""
    from routehead_plugins import training

    if arguments.method == WEIGHTS:
        training.check_weights(queries, aggregation=arguments.aggregation, seed=arguments.seed)
        return
    training.check_detection(
        queries,
        arguments.method,
        _COUNT if arguments.count is None else arguments.count,
        temperature=arguments.temperature,
        seed=arguments.seed,
    )
