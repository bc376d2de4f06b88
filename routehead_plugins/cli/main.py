"""The `routehead` command: what can be asked, and how it is called.

The work is done in ``commands/``, imported only when a command runs, so that help comes at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from routehead_plugins import __version__
from routehead_plugins.cli.options import (
    Device,
    DocumentCache,
    Dtype,
    FirstStageWeight,
    FittedWeight,
    Heads,
    Layout,
    MaxDocTokens,
    Model,
    Router,
    Stride,
    Window,
)
from routehead_plugins.cli.training import detect, inspect, train
from routehead_plugins.errors import RouteHeadError

app = typer.Typer(
    name="routehead",
    help="Re-rank documents with the attention heads of a frozen LLM.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"routehead {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    queries: Annotated[
        int, typer.Option(min=1, help="How many queries of the bundled collection to run.")
    ] = 24,
    hits: Annotated[int, typer.Option(min=1, help="BM25 candidates to re-rank per query.")] = 20,
    heads: Heads = None,
    router: Router = None,
    model: Model = "embedded",
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Show the main job: BM25 finds candidates, the LLM's attention re-ranks them.

    Indexes the bundled collection with Lucene, re-ranks, and prints every query before and after,
    then nDCG@10 of both. Needs no network.
    """
    from routehead_plugins.cli.demo import run_demo
    from routehead_plugins.cli.runtime import ModelOptions

    run_demo(queries, hits, heads, router, ModelOptions(model, device, dtype))


@app.command()
def rerank(
    output: Annotated[
        Path,
        typer.Option(help="Where to write: a TREC run, or rank_llm requests if it ends in .jsonl."),
    ],
    topics: Annotated[
        str | None,
        typer.Option(help="Queries: .tsv, .jsonl or .trec file, or a name Pyserini knows."),
    ] = None,
    corpus: Annotated[
        Path | None, typer.Option(help="Texts: corpus.jsonl (BEIR or Pyserini), or its folder.")
    ] = None,
    index: Annotated[
        Path | None, typer.Option(help="Texts: a Lucene index that stores them.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="Candidates: a TREC run.  [default: BM25 finds them]")
    ] = None,
    requests: Annotated[
        Path | None,
        typer.Option(help="Queries with candidates as rank_llm's JSONL, instead of all the above."),
    ] = None,
    hits: Annotated[
        int, typer.Option(help="Candidates to re-rank per query; those below follow in order.")
    ] = 100,
    heads: Heads = None,
    router: Router = None,
    first_stage_weight: FittedWeight = None,
    tag: Annotated[str, typer.Option(help="The run's name, its last column.")] = "routehead",
    remove_query: Annotated[
        bool, typer.Option(help="Drop the candidate whose id is the query's (ArguAna).")
    ] = False,
    model: Model = "embedded",
    device: Device = None,
    dtype: Dtype = "auto",
    max_doc_tokens: MaxDocTokens = None,
    layout: Layout = None,
    document_cache: DocumentCache = None,
    window: Window = None,
    stride: Stride = None,
) -> None:
    """Re-rank a run, or what BM25 finds, and write a run.

    The output appears when every query is done; a job that was stopped goes on where it was when it
    is called again the same way.

    Example: routehead rerank --corpus corpus.jsonl --topics queries.jsonl --run bm25.trec
    --hits 20 --output reranked.trec
    """
    from routehead_plugins.cli import rerank as command
    from routehead_plugins.cli.runtime import ModelOptions

    command.rerank(
        command.RerankJob(
            output=output,
            topics=topics,
            corpus=corpus,
            index=index,
            run=run,
            requests=requests,
            hits=hits,
            heads=heads,
            router=router,
            first_stage_weight=first_stage_weight,
            tag=tag,
            remove_query=remove_query,
            llm=ModelOptions(
                model, device, dtype, max_doc_tokens, layout, document_cache, window, stride
            ),
        )
    )


@app.command()
def evaluate(
    collection: Annotated[
        list[Path],
        typer.Option(
            help="A BEIR folder: corpus.jsonl, queries.jsonl, qrels/test.tsv and maybe "
            "run.bm25.trec. Can be repeated."
        ),
    ],
    methods: Annotated[
        str,
        typer.Option(
            help="Comma-separated: **bm25** (the candidates' order) and anything --heads takes; "
            "**routed:FOLDER** for a router; **+bm25** at the end adds the candidates' scores."
        ),
    ] = "bm25,all,layers,all+bm25",
    output: Annotated[
        Path | None, typer.Option(help="Write the table as JSON, per-query figures included.")
    ] = None,
    baseline: Annotated[str, typer.Option(help="Compare the others with this method.")] = "bm25",
    measures: Annotated[
        str, typer.Option(help="Comma-separated, as ir_measures writes them.")
    ] = "nDCG@10,RR@10,R@20",
    hits: Annotated[int, typer.Option(help="Candidates to re-rank per query.")] = 20,
    first_stage_weight: FirstStageWeight = 1.0,
    model: Model = "embedded",
    device: Device = None,
    dtype: Dtype = "auto",
    max_doc_tokens: MaxDocTokens = None,
    layout: Layout = None,
    document_cache: DocumentCache = None,
    window: Window = None,
    stride: Stride = None,
) -> None:
    """Measure methods on judged collections, and whether they differ.

    Prints means, the difference to the baseline with its 95 % bootstrap interval, and the p value
    of a paired randomisation test, corrected for the number of methods (Holm).

    Example: routehead evaluate --collection scifact --methods bm25,all,13-18,13-1
    """
    from rich.console import Console

    from routehead_plugins.cli import evaluate as command
    from routehead_plugins.cli.runtime import ModelOptions

    table = command.run_evaluation(
        command.EvaluationJob(
            collections=collection,
            methods=command.split_methods(methods),
            hits=hits,
            measures=[name.strip() for name in measures.split(",")],
            baseline=baseline,
            first_stage_weight=first_stage_weight,
            output=output,
            llm=ModelOptions(
                model, device, dtype, max_doc_tokens, layout, document_cache, window, stride
            ),
        )
    )
    Console().print(table.to_rich())


for _command in (detect, train, inspect):
    app.command()(_command)


def main() -> None:
    """Run the command line; errors made by the caller end in one line and status 2."""
    try:
        app()
    except RouteHeadError as error:
        typer.secho(f"routehead: {error}", fg="red", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.secho("routehead: stopped; call it again to go on.", err=True)
        sys.exit(130)
