"""Compare every way of choosing heads on every collection, each with heads from the others.

    python benchmarks/compare.py DIR DIR ...                          # everything
    python benchmarks/compare.py DIR DIR ... --collect-only           # the hours of work, no table
    python benchmarks/compare.py DIR DIR ... --part dl21:parallel     # one part of them

The LLM is run once over every collection in every variant (candidates in BM25's order, shuffled,
and each on its own), and once for the query likelihood; all that is kept, and all tables are made
of what is kept. Whatever is stopped goes on where it was.

Rows of the tables, each also with "+bm25":

    bm25, all, layers      the candidates' order; ICR; the middle third of the layers
    ndcg, qr, core, ...    8 heads (or an interval of layers) detected on the other collections
    weights, -log, -pairs  signed weights fitted on the other collections
    ...-within             5-fold cross-validation inside the collection
    likelihood             of the query given each document, by the same LLM

Each collection gives benchmarks/results/compare-NAME.json (every query, tests against bm25 and all,
heads, versions) and heatmap-NAME.svg, all together compare-macro.json; tables are printed as
Markdown.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from compare_collect import LAYOUTS, PARTS, SHUFFLE, VARIANTS, CollectJob, Collector
from compare_methods import (
    ALL,
    BM25,
    FIRST_STAGE_WEIGHT,
    FOLDS,
    HEADS,
    Chosen,
    choose,
    measure_rows,
    score_rows,
    steps,
)
from compare_report import Measured, details, macro_average, overview, results_json, routing
from heatmap import plot_heads
from reliability import oracle, split_half
from torch import Tensor

from routehead_plugins.cli.detect import signals_folder
from routehead_plugins.cli.runtime import ModelOptions, progress
from routehead_plugins.errors import InputError, RouteHeadError
from routehead_plugins.evaluation import Evaluation
from routehead_plugins.io import Collection, atomic_write_text
from routehead_plugins.signals import QuerySignals, SignalSet, ndcg
from routehead_plugins.training import single_head_ndcg

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Data:
    """Everything that was collected.

    Attributes:
        collections: By name; samples, with candidates.
        signals: Variant -> collection -> signals.
        likelihoods: Collection -> query -> query likelihood given each candidate.
    """

    collections: Mapping[str, Collection]
    signals: Mapping[str, Mapping[str, SignalSet]]
    likelihoods: Mapping[str, Mapping[str, Tensor]]


def main(
    collections: Annotated[list[Path], typer.Argument(help="BEIR folders.")],
    queries: Annotated[int, typer.Option(help="Of each collection, at most.")] = 100,
    hits: Annotated[int, typer.Option(help="Candidates per query.")] = 20,
    max_doc_tokens: Annotated[int, typer.Option(help="Longer documents are cut here.")] = 120,
    signals: Annotated[
        Path | None, typer.Option(help="Where signals are kept.  [default: the user's cache]")
    ] = None,
    part: Annotated[
        list[str] | None,
        typer.Option(help=f"Collect this alone: COLLECTION:PART, parts are {', '.join(PARTS)}."),
    ] = None,
    collect_only: Annotated[bool, typer.Option("--collect-only", help="Make no table.")] = False,
    model: Annotated[
        str, typer.Option(help="embedded, a Hub id, a local directory, or a .gguf file.")
    ] = "embedded",
    device: Annotated[str | None, typer.Option(help="[default: the fastest there is]")] = None,
    # Not "auto": what happens to be faster today must not decide which signals are found again.
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Of the sample and of all else that is drawn.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = RESULTS,
) -> None:
    """Collect what is missing, then compare every selector on every collection."""
    paths = _by_name(collections)
    wanted = _wanted(part, list(paths))
    llm = ModelOptions(model, device, dtype, max_doc_tokens)
    job = CollectJob(queries, hits, signals or signals_folder(), seed, llm)
    collector = Collector(job)
    loaded = {name: collector.load(paths[name]) for name in wanted}
    if part or collect_only:
        for name, kinds in wanted.items():
            for kind in kinds:
                collector.collect(loaded[name], kind)
        return
    output.mkdir(parents=True, exist_ok=True)
    report(_data(collector, loaded), job, output)


def report(data: Data, job: CollectJob, output: Path) -> None:
    """Choose heads, measure every row, write the results and print the tables."""
    settings, command = _settings(job, list(data.collections))
    measured = measure_all(data, job)
    for name, collection in data.collections.items():
        heads = _single_heads(data, name)
        text = results_json(
            settings,
            command,
            list(collection.qrels),
            {variant: measured[variant][name] for variant in VARIANTS},
            single_heads=heads,
        )
        atomic_write_text(output / f"compare-{name}.json", text)
        plot_heads(name, heads, output / f"heatmap-{name}.svg")
    together = {}
    if len(data.collections) > 1:
        together = {variant: _together(data, measured, variant, job.seed) for variant in VARIANTS}
        text = results_json(settings, command, [], together)
        atomic_write_text(output / "compare-macro.json", text)
    for variant, each in measured.items():
        typer.echo(overview(variant, each, together.get(variant)))
    typer.echo(routing(measured, together))
    for variant, each in measured.items():
        for name, one in each.items():
            typer.echo(details(variant, name, one))


def measure_all(data: Data, job: CollectJob) -> dict[str, dict[str, Measured]]:
    """Choose heads for every collection and measure every row: variant -> collection -> figures."""
    chosen = _choose_all(data, job)
    found: dict[str, dict[str, Measured]] = {variant: {} for variant in VARIANTS}
    with progress("measuring", len(VARIANTS) * len(data.collections)) as advance:
        for variant, (layout, _) in VARIANTS.items():
            for name, collection in data.collections.items():
                signals, heads = data.signals[variant][name], chosen[layout, name]
                rows = score_rows(signals, heads, data.likelihoods[name])
                found[variant][name] = _measured(
                    measure_rows(collection, signals, rows, job.hits),
                    heads,
                    signals.queries,
                    job.seed,
                )
                advance()
    return found


def _data(collector: Collector, collections: Mapping[str, Collection]) -> Data:
    signals: dict[str, dict[str, SignalSet]] = {variant: {} for variant in VARIANTS}
    likelihoods = {}
    for name, collection in collections.items():
        for variant in VARIANTS:
            signals[variant][name] = collector.signals(collection, variant)
        likelihoods[name] = collector.likelihoods(collection)
    return Data(collections, signals, likelihoods)


def _choose_all(data: Data, job: CollectJob) -> dict[tuple[str, str], Chosen]:
    """Heads by layout and by the collection they will be tested on."""
    by_layout = {layout: data.signals[layout] for layout in LAYOUTS}
    total = sum(len(signals) * steps(signals) for signals in by_layout.values())
    with progress("choosing heads", total) as advance:
        return {
            (layout, name): choose(
                name, signals, seed=job.seed, kept=job.signals / "heads", advance=advance
            )
            for layout, signals in by_layout.items()
            for name in signals
        }


def _measured(
    methods: Mapping[str, Evaluation],
    chosen: Chosen | None,
    queries: Sequence[QuerySignals],
    seed: int,
) -> Measured:
    half, best = split_half(queries, seed=seed), oracle(queries, seed=seed)
    return Measured(methods, chosen, half, best)


def _together(
    data: Data, measured: Mapping[str, Mapping[str, Measured]], variant: str, seed: int
) -> Measured:
    """All collections in one variant."""
    methods = macro_average({name: each.methods for name, each in measured[variant].items()})
    queries = [query for signals in data.signals[variant].values() for query in signals.queries]
    return _measured(methods, None, queries, seed)


def _single_heads(data: Data, name: str) -> dict[str, Any]:
    """Layout -> nDCG@10 of every head alone, and of what it stands beside, on the same queries."""
    found = {}
    for layout in LAYOUTS:
        signals = data.signals[layout][name]
        if any(query.has_contrast for query in signals.queries):
            figures = single_head_ndcg(signals).tolist()
            found[layout] = {
                "heads": {str(h): round(f, 6) for h, f in zip(signals.heads, figures, strict=True)},
                "beside": {
                    BM25: _mean_ndcg([q.first_stage for q in signals.with_contrast], signals),
                    ALL: _mean_ndcg([q.averaged for q in signals.with_contrast], signals),
                },
            }
    return found


def _mean_ndcg(scores: Sequence[Tensor], signals: SignalSet) -> float:
    figures = [
        ndcg(found[None], query.gains, query.ideal_gains)
        for found, query in zip(scores, signals.with_contrast, strict=True)
    ]
    return float(torch.cat(figures).mean())


def _settings(job: CollectJob, names: Sequence[str]) -> tuple[dict[str, Any], str]:
    """What the figures depend on, and the command; neither says where anything lies on a disk."""
    llm = job.llm
    model = Path(llm.model).name if Path(llm.model).exists() else llm.model
    asked = {
        "queries": job.queries,
        "hits": job.hits,
        "max_doc_tokens": llm.max_doc_tokens,
        "model": model,
        "dtype": llm.dtype,
        "seed": job.seed,
    }
    options = [f"--{name.replace('_', '-')}={value}" for name, value in asked.items()]
    settings = {
        **asked,
        "collections": list(names),
        "heads": HEADS,
        "folds": FOLDS,
        "first_stage_weight": FIRST_STAGE_WEIGHT,
        "shuffle": SHUFFLE,
    }
    return settings, shlex.join(["python", "benchmarks/compare.py", *names, *options])


def _by_name(collections: Sequence[Path]) -> dict[str, Path]:
    paths = {path.resolve().name: path for path in collections}
    if len(paths) < len(collections):
        raise InputError(
            f"two of the collections have the same folder name: {', '.join(map(str, collections))};"
            " give each once, or rename a folder."
        )
    return paths


def _wanted(parts: Sequence[str] | None, names: Sequence[str]) -> dict[str, list[str]]:
    """Collection -> parts to collect."""
    if not parts:
        return {name: list(PARTS) for name in names}
    wanted: dict[str, list[str]] = {}
    for text in parts:
        name, _, kind = text.rpartition(":")
        if name not in names or kind not in PARTS:
            raise InputError(
                f"--part={text!r} does not exist; give COLLECTION:PART, one of {', '.join(names)} "
                f"and one of {', '.join(PARTS)}."
            )
        wanted.setdefault(name, []).append(kind)
    return wanted


if __name__ == "__main__":
    try:
        typer.run(main)
    except RouteHeadError as error:
        typer.secho(f"compare.py: {error}", fg="red", err=True)
        sys.exit(2)
