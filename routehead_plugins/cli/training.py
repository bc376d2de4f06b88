"""The commands that learn: how they are called; part of ``cli.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from routehead_plugins.cli.options import (
    Device,
    Dtype,
    Layout,
    MaxDocTokens,
    Model,
    Signals,
    Stride,
    Window,
)


def detect(
    collection: Annotated[
        list[Path],
        typer.Option(
            help="A BEIR folder with judgments: corpus.jsonl, queries.jsonl, qrels/test.tsv and "
            "maybe run.bm25.trec. Can be repeated."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Where to write the head set, as JSON.")],
    method: Annotated[
        str,
        typer.Option(
            help="**ndcg** (QRHead as released), **qr** (QRHead as printed), **core** (CoRe), "
            "**layers** (Selective-ICR), **discriminability** (after HeadRank), or **weights**: "
            "signed weights over all heads and the first stage."
        ),
    ] = "ndcg",
    count: Annotated[int | None, typer.Option(min=1, help="How many heads.  [default: 8]")] = None,
    queries: Annotated[
        int | None,
        typer.Option(help="Queries of each collection at most, drawn by --seed.  [default: all]"),
    ] = None,
    hits: Annotated[int, typer.Option(help="Candidates per query.")] = 20,
    temperature: Annotated[
        float | None, typer.Option(help="For core.  [default: chosen on a part of the queries]")
    ] = None,
    aggregation: Annotated[
        str, typer.Option(help="For weights: standardised, log or mean.")
    ] = "standardised",
    shuffle: Annotated[
        int | None,
        typer.Option(help="Seed of a random order of candidates.  [default: the first stage's]"),
    ] = None,
    positions: Annotated[
        int, typer.Option(help="Show the best document at so many places, as CoRe does.")
    ] = 1,
    signals: Signals = None,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    model: Model = "embedded",
    device: Device = None,
    dtype: Dtype = "auto",
    max_doc_tokens: MaxDocTokens = None,
    layout: Layout = None,
    window: Window = None,
    stride: Stride = None,
) -> None:
    """Find out which heads of an LLM follow relevance, from judged queries.

    The LLM is run once per query; what all its heads say is kept on disk, so that other methods
    and a job that was stopped go on from there.

    Example: routehead detect --collection beir/nq --method core --layout parallel
    --output heads.json; then: routehead rerank --heads heads.json ...
    """
    from routehead_plugins.cli import detect as command
    from routehead_plugins.cli.runtime import ModelOptions
    from routehead_plugins.signals import CollectOptions

    found = command.run_detection(
        command.DetectionJob(
            collections=collection,
            method=method,
            output=output,
            count=count,
            queries=queries,
            temperature=temperature,
            aggregation=aggregation,
            signals=signals,
            options=CollectOptions(hits, max_doc_tokens, shuffle, positions),
            seed=seed,
            llm=ModelOptions(
                model, device, dtype, max_doc_tokens, layout, window=window, stride=stride
            ),
        )
    )
    typer.echo(f"{output}: {len(found)} heads by {found.method}: {found}")


def train(
    collection: Annotated[
        list[Path],
        typer.Option(
            help="A BEIR folder: corpus.jsonl, queries.jsonl, qrels/test.tsv and maybe "
            "run.bm25.trec; with --synthesize corpus.jsonl is enough. Can be repeated."
        ),
    ],
    output: Annotated[Path, typer.Option(help="The router's folder.")],
    synthesize: Annotated[
        int | None,
        typer.Option(
            help="Have the LLM write so many queries from each corpus: no judgments are needed."
        ),
    ] = None,
    judged: Annotated[
        bool, typer.Option(help="Learn from the collections' own queries, where there are any.")
    ] = True,
    teacher: Annotated[
        float,
        typer.Option(
            help="Share of query likelihood in what is learned, 0 to 1: one forward of the LLM "
            "per candidate."
        ),
    ] = 0.0,
    queries: Annotated[
        int | None,
        typer.Option(help="Judged queries of each collection at most.  [default: all]"),
    ] = None,
    hits: Annotated[int, typer.Option(help="Candidates per query.")] = 20,
    objective: Annotated[
        str,
        typer.Option(
            help="**listwise**: signed weights of heads, corrected per query; **labels**: as "
            "RouteHead; **neighbours**: the vote of similar training queries."
        ),
    ] = "listwise",
    layer: Annotated[
        int | None,
        typer.Option(help="Embed queries after this layer.  [default: four fifths of the way]"),
    ] = None,
    pooling: Annotated[
        str,
        typer.Option(help="Embed queries by the **mean** of their tokens, or the **last** one."),
    ] = "mean",
    max_layer: Annotated[
        int | None,
        typer.Option(help="Read no head of a deeper layer, for speed.  [default: no limit]"),
    ] = None,
    candidates: Annotated[
        int, typer.Option(help="For labels: K, heads to choose from, the best alone.")
    ] = 32,
    max_heads: Annotated[
        int, typer.Option(help="For labels: P, heads read for a query at most.")
    ] = 8,
    utility: Annotated[
        str | None,
        typer.Option(
            help="For labels: ndcg, reciprocal_rank, correlation or margin.  [default: with the "
            "shrinkage, what is worth most on documents that were not searched on]"
        ),
    ] = None,
    shrinkage: Annotated[
        float | None,
        typer.Option(help="For labels: share of what heads are worth over all queries."),
    ] = None,
    groups: Annotated[
        int | None,
        typer.Option(help="For labels: one for each of so many groups of similar queries."),
    ] = None,
    signals: Signals = None,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    model: Model = "embedded",
    device: Device = None,
    dtype: Dtype = "auto",
    max_doc_tokens: MaxDocTokens = None,
    layout: Annotated[
        str, typer.Option(help="**parallel** or **sequential**; a router is for one of them.")
    ] = "parallel",
    document_cache: Annotated[
        str, typer.Option(help="Keep what was computed for documents, up to this size.")
    ] = "2GB",
    window: Window = None,
    stride: Stride = None,
) -> None:
    """Train a router: which heads to read for which query.

    The LLM is run once per query and stays as it is; what its heads say is kept on disk, so that a
    call that was stopped goes on where it was. Without judgments, --synthesize has the LLM write
    the queries from your own passages.

    Example: routehead train --collection my-corpus --synthesize 1000 --output my-router; then:
    routehead rerank --router my-router ...
    """
    from routehead_plugins.cli import train as command
    from routehead_plugins.cli.runtime import ModelOptions
    from routehead_plugins.training import LabelOptions

    router = command.run_training(
        command.TrainingJob(
            collections=collection,
            output=output,
            synthesize=synthesize,
            judged=judged,
            teacher=teacher,
            queries=queries,
            hits=hits,
            objective=objective,
            layer=layer,
            pooling=pooling,
            max_layer=max_layer,
            labels=LabelOptions(
                candidates=candidates,
                max_heads=max_heads,
                utility=utility or "ndcg",
                shrinkage=shrinkage or 0.0,
                groups=groups,
                seed=seed,
            ),
            reliable_labels=utility is None and shrinkage is None,
            signals=signals,
            seed=seed,
            llm=ModelOptions(
                model, device, dtype, max_doc_tokens, layout, document_cache, window, stride
            ),
        )
    )
    typer.echo(f"{output}: {command.summary(router)}")


def inspect(
    router: Annotated[str, typer.Argument(help="A folder from `routehead train`, or a Hub id.")],
    collection: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folders with queries.jsonl, to route them. Can be repeated.  [default: the "
            "bundled queries]"
        ),
    ] = None,
    queries: Annotated[
        int | None,
        typer.Option(
            help="Queries of each collection at most; 0 says what can be said without running the "
            "LLM.  [default: all]"
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw which heads are read: an .svg or .png file.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
    model: Annotated[
        str | None, typer.Option(help="The LLM.  [default: the one it was trained for]")
    ] = None,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Show what a router does: which heads it reads, how often, and how much queries differ.

    Example: routehead inspect my-router --collection beir/nq --plot heads.svg
    """
    from rich.console import Console

    from routehead_plugins.cli import inspect as command

    job = command.InspectionJob(
        router=router,
        collections=collection or [],
        queries=queries,
        plot=plot,
        output=output,
        model=model,
        device=device,
        dtype=dtype,
    )
    Console().print(command.render(command.run_inspection(job)))
