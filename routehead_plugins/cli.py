"""The `routehead` command: what can be asked, and how it is called.

The work is done in ``commands/``, imported only when a command runs, so that help comes at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from routehead_plugins._version import __version__
from routehead_plugins.errors import RouteHeadError

app = typer.Typer(
    name="routehead",
    help="Re-rank documents with the attention heads of a frozen LLM.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)

Model = Annotated[
    str,
    typer.Option(
        help="The LLM: **embedded** (SmolLM2-135M-Instruct, offline), a Hub id such as "
        "Qwen/Qwen3-0.6B, a local directory, or a .gguf file."
    ),
]
Device = Annotated[
    str | None, typer.Option(help="cuda, mps or cpu.  [default: the fastest there is]")
]
Dtype = Annotated[
    str,
    typer.Option(help="auto, float32, bfloat16 or float16; auto takes what is measured faster."),
]
MaxDocTokens = Annotated[
    int | None, typer.Option(help="Cut longer documents here.  [default: no cut]")
]
Layout = Annotated[
    str | None,
    typer.Option(
        help="**sequential**: all documents in one prompt; **parallel**: each on its own, any "
        "number of them.  [default: the one the heads were chosen for, or sequential]"
    ),
]
DocumentCache = Annotated[
    str | None,
    typer.Option(help="Keep what was computed for documents, up to this size, such as 2GB."),
]
Window = Annotated[
    int | None,
    typer.Option(help="Documents read at once, sequential layout.  [default: all of them]"),
]
Stride = Annotated[
    int | None,
    typer.Option(help="Documents by which windows are apart.  [default: half a window]"),
]
Heads = Annotated[
    str,
    typer.Option(
        help="Heads to read: **all**, **layers:10-19** (or **layers**, the middle third), "
        "**13-18,13-1** (layer-head), a published set such as **qr:Llama-3.1-8B-Instruct**, or "
        "the path of a head-set file."
    ),
]
FirstStageWeight = Annotated[
    float,
    typer.Option(
        min=0,
        help="How much the candidates' own scores count, both sides standardised; 0: not at all.",
    ),
]
FittedWeight = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="How much the candidates' own scores count, both sides standardised.  [default: what "
        "was fitted with the heads, or 0]",
    ),
]


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
    heads: Heads = "all",
    model: Model = "embedded",
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Show the main job: BM25 finds candidates, the LLM's attention re-ranks them.

    Indexes the bundled collection with Lucene, re-ranks, and prints every query before and after,
    then nDCG@10 of both. Needs no network.
    """
    from routehead_plugins.commands._shared import ModelOptions
    from routehead_plugins.commands.demo import run_demo

    run_demo(queries, hits, heads, ModelOptions(model, device, dtype))


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
    heads: Heads = "all",
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
    from routehead_plugins.commands import rerank as command
    from routehead_plugins.commands._shared import ModelOptions

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
            "**+bm25** at the end of one adds the candidates' scores."
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

    from routehead_plugins.commands import evaluate as command
    from routehead_plugins.commands._shared import ModelOptions

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


@app.command()
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
    signals: Annotated[
        Path | None,
        typer.Option(help="Where signals are kept for the next call.  [default: the user's cache]"),
    ] = None,
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
    from routehead_plugins.commands import detect as command
    from routehead_plugins.commands._shared import ModelOptions
    from routehead_plugins.training.collect import CollectOptions

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
