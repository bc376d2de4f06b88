"""Compare every way of choosing heads on every collection, with heads chosen on the others.

    python -m benchmarks.heads.compare DIR DIR ...                          # everything
    python -m benchmarks.heads.compare DIR DIR ... --collect-only           # hours; no table
    python -m benchmarks.heads.compare DIR DIR ... --part dl21:parallel     # one part of them

The LLM runs once over every collection in every variant (candidates in BM25's order, shuffled, and
each on its own), and once for the query likelihood. All signals are stored, and the tables are made
of them. An interrupted run resumes.

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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from torch import Tensor

from benchmarks.common import Cache, command_line, results_json, run, with_options
from benchmarks.heads import methods, report
from benchmarks.heads.collect import LAYOUTS, PARTS, SHUFFLE, VARIANTS, Collector, ComparisonOptions
from benchmarks.heads.heatmap import plot_heads
from benchmarks.heads.methods import Chosen
from benchmarks.heads.reliability import oracle, split_half
from benchmarks.heads.report import Measured
from routehead_plugins.cli.runtime import progress
from routehead_plugins.errors import InputError
from routehead_plugins.evaluation import Evaluation
from routehead_plugins.io import Collection, atomic_write_text
from routehead_plugins.selection import ALL, FIRST_STAGE
from routehead_plugins.signals import QuerySignals, SignalSet
from routehead_plugins.training import each_ndcg, single_head_ndcg


@dataclass(frozen=True, kw_only=True)
class Options(ComparisonOptions):
    """Options of the command line; the help texts describe the fields."""

    part: Annotated[
        list[str] | None,
        typer.Option(help=f"Collect this alone: COLLECTION:PART, parts are {', '.join(PARTS)}."),
    ] = None
    collect_only: Annotated[bool, typer.Option("--collect-only", help="Make no table.")] = False

    def wanted(self) -> dict[str, list[str]]:
        """Return collection -> parts to collect.

        Raises:
            InputError: A part does not exist.
        """
        names = list(self.paths)
        if not self.part:
            return {name: list(PARTS) for name in names}
        wanted: dict[str, list[str]] = {}
        for text in self.part:
            name, _, kind = text.rpartition(":")
            if name not in names or kind not in PARTS:
                raise InputError(
                    f"--part={text!r} does not exist; give COLLECTION:PART, one of "
                    f"{', '.join(names)} and one of {', '.join(PARTS)}."
                )
            wanted.setdefault(name, []).append(kind)
        return wanted


@dataclass(frozen=True)
class Data:
    """Everything that was collected.

    Attributes:
        collections: Name -> sample of the collection, with candidates.
        signals: Variant -> collection -> signals.
        likelihoods: Collection -> query -> query likelihood given each candidate.
    """

    collections: Mapping[str, Collection]
    signals: Mapping[str, Mapping[str, SignalSet]]
    likelihoods: Mapping[str, Mapping[str, Tensor]]


def main(options: Options) -> None:
    """Collect what is missing, then compare every selector on every collection."""
    wanted, collector = options.wanted(), Collector(options)
    loaded = {name: collector.load(options.paths[name]) for name in wanted}
    if options.part or options.collect_only:
        for name, kinds in wanted.items():
            for kind in kinds:
                collector.collect(loaded[name], kind)
        return
    options.output.mkdir(parents=True, exist_ok=True)
    write_report(collect(collector, loaded), options)


def collect(collector: Collector, collections: Mapping[str, Collection]) -> Data:
    """Compute or load the signals of all variants, and the likelihoods."""
    signals: dict[str, dict[str, SignalSet]] = {variant: {} for variant in VARIANTS}
    likelihoods = {}
    for name, collection in collections.items():
        for variant in VARIANTS:
            signals[variant][name] = collector.signals(collection, variant)
        likelihoods[name] = collector.likelihoods(collection)
    return Data(collections, signals, likelihoods)


def write_report(data: Data, options: Options) -> None:
    """Choose heads, measure every row, write the results and print the tables."""
    measured = measure_all(data, options)
    for name, collection in data.collections.items():
        heads = _single_heads(data, name)
        variants = {variant: measured[variant][name] for variant in VARIANTS}
        text = _results(data, options, variants, list(collection.qrels), single_heads=heads)
        atomic_write_text(options.output / f"compare-{name}.json", text)
        plot_heads(name, heads, options.output / f"heatmap-{name}.svg")
    together = {}
    if len(data.collections) > 1:
        together = {
            variant: _together(data, measured, variant, options.seed) for variant in VARIANTS
        }
        text = _results(data, options, together, [])
        atomic_write_text(options.output / "compare-macro.json", text)
    for variant, collections in measured.items():
        typer.echo(report.overview(variant, collections, together.get(variant)))
    typer.echo(report.routing(measured, together))
    for variant, collections in measured.items():
        for name, figures in collections.items():
            typer.echo(report.details(variant, name, figures))


def measure_all(data: Data, options: Options) -> dict[str, dict[str, Measured]]:
    """Choose heads and measure every row; return variant -> collection -> figures."""
    chosen = _choose_all(data, options)
    measured: dict[str, dict[str, Measured]] = {variant: {} for variant in VARIANTS}
    with progress("measuring", len(VARIANTS) * len(data.collections)) as advance:
        for variant, (layout, _) in VARIANTS.items():
            for name, collection in data.collections.items():
                signals, heads = data.signals[variant][name], chosen[layout, name]
                rows = methods.score_rows(signals, heads, data.likelihoods[name])
                evaluations = methods.measure_rows(collection, signals, rows, options.hits)
                measured[variant][name] = _measured(
                    evaluations, heads, signals.queries, options.seed
                )
                advance()
    return measured


def _choose_all(data: Data, options: Options) -> dict[tuple[str, str], Chosen]:
    """Choose heads for each layout and each collection that they will be tested on."""
    cache = Cache(options.folder / "heads")
    by_layout = {layout: data.signals[layout] for layout in LAYOUTS}
    total = sum(len(signals) * methods.steps(signals) for signals in by_layout.values())
    with progress("choosing heads", total) as advance:
        return {
            (layout, name): methods.choose(
                name, signals, seed=options.seed, cache=cache, advance=advance
            )
            for layout, signals in by_layout.items()
            for name in signals
        }


def _measured(
    rows: Mapping[str, Evaluation],
    chosen: Chosen | None,
    queries: Sequence[QuerySignals],
    seed: int,
) -> Measured:
    half, best = split_half(queries, seed=seed), oracle(queries, seed=seed)
    return Measured(rows, chosen, half, best)


def _together(
    data: Data, measured: Mapping[str, Mapping[str, Measured]], variant: str, seed: int
) -> Measured:
    """Join all collections in one variant."""
    collections = {name: figures.methods for name, figures in measured[variant].items()}
    queries = [query for signals in data.signals[variant].values() for query in signals.queries]
    return _measured(report.macro_average(collections), None, queries, seed)


def _single_heads(data: Data, name: str) -> dict[str, Any]:
    """Measure every head alone, and references on the same queries, in each layout."""
    by_layout = {}
    for layout in LAYOUTS:
        signals = data.signals[layout][name]
        if not any(query.has_contrast for query in signals.queries):
            continue
        queries, figures = signals.with_contrast, single_head_ndcg(signals).tolist()
        references = {
            FIRST_STAGE: [query.first_stage for query in queries],
            ALL: [query.averaged for query in queries],
        }
        by_layout[layout] = {
            "heads": {str(h): round(f, 6) for h, f in zip(signals.heads, figures, strict=True)},
            "beside": {
                row: float(each_ndcg(scores, queries).mean()) for row, scores in references.items()
            },
        }
    return by_layout


def _results(
    data: Data,
    options: Options,
    variants: Mapping[str, Measured],
    queries: Sequence[str],
    **more: Any,
) -> str:
    """Write figures as JSON; without queries, values per query are left out."""
    names = list(data.collections)
    settings = {
        **options.settings,
        "collections": names,
        "heads": methods.HEADS,
        "folds": methods.FOLDS,
        "first_stage_weight": methods.FIRST_STAGE_WEIGHT,
        "shuffle": SHUFFLE,
    }
    parts = {
        "baselines": list(report.BASELINES),
        "seed": report.SEED,
        "queries": list(queries),
        "variants": {
            name: measured.to_dict(per_query=bool(queries)) for name, measured in variants.items()
        },
        **more,
    }
    command = command_line("benchmarks.heads.compare", names, options.settings)
    return results_json(command, settings, parts)


if __name__ == "__main__":
    run(with_options(main, Options))
