"""`routehead detect`: find the heads of an LLM that follow relevance, from judged collections."""

from __future__ import annotations

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
    load_llm,
    progress,
    sample_queries,
    signals_folder,
    with_candidates,
)
from routehead_plugins.errors import InputError
from routehead_plugins.io import load_collection, make_folder
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
    count: Annotated[int | None, typer.Option(help="Number of heads.  [default: 8]", min=1)] = None
    queries: Annotated[
        int | None, "Maximum queries per collection, drawn by --seed.  [default: all]"
    ] = None
    hits: Annotated[int, "Candidates per query."] = 20
    temperature: Annotated[
        float | None, "Temperature of core.  [default: chosen on a part of the queries]"
    ] = None
    aggregation: Annotated[str, "For weights: standardised, log or mean."] = "standardised"
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

    _check(arguments, (*training.METHODS, WEIGHTS))
    signals = _signals(arguments, options)
    if arguments.method == WEIGHTS:
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
    make_folder(arguments.output.parent, "head sets")
    heads.save(arguments.output)
    typer.echo(f"{arguments.output}: {len(heads)} heads by {heads.method}: {heads}")


def _check(arguments: DetectArguments, methods: Sequence[str]) -> None:
    """Check the arguments before anything is read or loaded."""
    if arguments.method not in methods:
        raise InputError(
            f"--method={arguments.method} does not exist; give one of {', '.join(methods)}."
        )
    for name in ("queries", "hits", "positions"):
        check_minimum(f"--{name}", getattr(arguments, name))
    if arguments.method == WEIGHTS and arguments.count is not None:
        raise InputError(
            f"--count={arguments.count} does not apply to --method=weights, which finds the "
            "number of heads itself; leave it out."
        )
    if arguments.output.is_dir():
        raise InputError(f"{arguments.output} is a folder; name a file, such as heads.json.")


def _signals(arguments: DetectArguments, options: RerankerOptions) -> SignalSet:
    """Compute the signals of all collections, or read those that were kept."""
    from routehead_plugins.layouts import make_layout
    from routehead_plugins.signals import CollectOptions, collect_signals

    collections = [load_collection(path) for path in arguments.collection]
    layout = make_layout(options)
    llm = load_llm(options)
    folder = arguments.signals or signals_folder()
    collect = CollectOptions(
        arguments.hits, options.max_doc_tokens, arguments.shuffle, arguments.positions
    )
    parts = []
    for collection in collections:
        query_ids = sample_queries(collection, arguments.queries, arguments.seed)
        topics = {query_id: collection.topics[query_id] for query_id in query_ids}
        sample = with_candidates(replace(collection, topics=topics), topics, arguments.hits)
        with progress(f"{collection.name}: signals", len(topics)) as advance:
            parts.append(collect_signals(sample, llm, layout, folder, collect, advance=advance))
    return reduce(add, parts)
