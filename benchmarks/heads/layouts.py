"""Compare layouts: the same recipes, chosen in each layout on the other collections.

    python -m benchmarks.heads.layouts DIR DIR ... --signals FOLDER

Every row is chosen on the other collections, for each layout on its own, and BM25's scores are
added with a weight that is chosen there as well:

    all                 the mean of all heads (ICR)
    ndcg-4 ... ndcg-32  heads by their own nDCG, equally weighted
    weights-8 ...       signed weights of the heads that ndcg-8 ... choose
    weights             signed weights of all heads, most of them zero
    weights-log         the same on logarithms of attention
    cascade-5 ...       the late layout's weights over all candidates, then those of the parallel
                        layout over its best 5 ...; signals are those of whole lists

Signals are those of `benchmarks.heads.compare`; the LLM runs only for those that the folder lacks.
Writes benchmarks/results/layouts.json and prints a table in Markdown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import Any

import typer
from torch import Tensor

from benchmarks.common import (
    FITTING,
    Cache,
    command_line,
    markdown_table,
    results_json,
    run,
    signals_digest,
    with_options,
)
from benchmarks.heads.collect import Collector, ComparisonOptions
from benchmarks.heads.methods import Scores, measure_rows
from benchmarks.heads.report import macro_average
from routehead_plugins import HeadSet
from routehead_plugins.cli.runtime import progress
from routehead_plugins.errors import InputError
from routehead_plugins.evaluation import Evaluation, compare
from routehead_plugins.io import Collection, atomic_write_text
from routehead_plugins.scoring import fuse
from routehead_plugins.selection import ALL, FIRST_STAGE, FUSED
from routehead_plugins.signals import QuerySignals, SignalSet
from routehead_plugins.training import detect, each_ndcg, fit_weights, offline_scores

LAYOUTS = ("parallel", "late")
SIZES = (4, 8, 16, 32)
CASCADES = (5, 10)
_FUSION = (0.25, 0.5, 1.0, 2.0)
_MEASURE = "nDCG@10"


@dataclass(frozen=True, kw_only=True)
class Options(ComparisonOptions):
    """Options of the command line.

    Raises:
        InputError: There are fewer than two collections.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.paths) < 2:
            raise InputError("one collection leaves nothing to choose heads on; give another.")


def main(options: Options) -> None:
    """Choose heads in every layout, test them, and write the results."""
    collector = Collector(options)
    collections = {name: collector.load(path) for name, path in options.paths.items()}
    signals = {
        layout: {name: collector.signals(c, layout) for name, c in collections.items()}
        for layout in LAYOUTS
    }
    cache = Cache(options.folder / "layouts", (*FITTING, Path(__file__)))
    evaluations, chosen = evaluate(collections, signals, options.hits, cache)
    parts = report(evaluations) | {"heads": chosen}
    command = command_line("benchmarks.heads.layouts", list(collections), options.settings)
    settings = {**options.settings, "collections": list(collections)}
    options.output.mkdir(parents=True, exist_ok=True)
    atomic_write_text(options.output / "layouts.json", results_json(command, settings, parts))


def evaluate(
    collections: Mapping[str, Collection],
    signals: Mapping[str, Mapping[str, SignalSet]],
    hits: int,
    cache: Cache,
) -> tuple[dict[str, dict[str, Evaluation]], dict[str, Any]]:
    """Measure every row in every layout on every collection.

    Returns:
        Collection -> ``layout/row`` -> figures; and collection -> ``layout/row`` -> the number of
        heads that were chosen.
    """
    evaluations: dict[str, dict[str, Evaluation]] = {}
    sizes: dict[str, Any] = {}
    with progress("Choosing heads", len(collections) * len(LAYOUTS)) as advance:
        for name, collection in collections.items():
            rows: dict[str, Scores] = {}
            sizes[name] = {}
            for layout in LAYOUTS:
                others = [own for other, own in signals[layout].items() if other != name]
                train, test = reduce(add, others), signals[layout][name]
                for row, (scores, heads) in score_rows(train, test, cache).items():
                    rows[f"{layout}/{row}"] = scores
                    sizes[name][f"{layout}/{row}"] = heads
                advance()
            rows |= cascades(rows)
            rows = {FIRST_STAGE: dict.fromkeys(collection.topics)} | rows
            test = signals[LAYOUTS[0]][name]
            evaluations[name] = measure_rows(collection, test, rows, hits)
    return evaluations, sizes


def score_rows(train: SignalSet, test: SignalSet, cache: Cache) -> dict[str, tuple[Scores, int]]:
    """Score the candidates of the test queries by every recipe, and count its heads."""
    digest = signals_digest(train)

    def kept(row: str, choose: Callable[[], HeadSet]) -> HeadSet:
        return cache.heads([row, digest], choose)

    rows: dict[str, tuple[Scores, int]] = {}
    averaged: Scores = {query.query_id: query.averaged for query in test.queries}
    rows[ALL] = averaged, len(train.heads)
    rows[f"{ALL}{FUSED}"] = fused(lambda query: query.averaged, train, test), len(train.heads)
    for size in SIZES:
        few = kept(f"ndcg-{size}", partial(detect, train, "ndcg", size))
        by_few = _by(few, train.heads)
        rows[f"ndcg-{size}{FUSED}"] = fused(by_few, train, test), len(few)
        part = train.restricted(few)
        heads = kept(f"weights-{size}", partial(fit_weights, part))
        rows[f"weights-{size}{FUSED}"] = _scored(_by(heads, train.heads), test), len(heads)
    for row, how in (("weights", "standardised"), ("weights-log", "log")):
        heads = kept(row, partial(fit_weights, train, aggregation=how))
        rows[f"{row}{FUSED}"] = _scored(_by(heads, train.heads), test), len(heads)
    return rows


def fused(score: Callable[[QuerySignals], Tensor], train: SignalSet, test: SignalSet) -> Scores:
    """Add first-stage scores with the weight that is best on the training queries."""
    queries = train.with_contrast
    scores = [score(query) for query in queries]

    def measure(weight: float) -> float:
        both = [fuse(s, q.first_stage, weight) for s, q in zip(scores, queries, strict=True)]
        return float(each_ndcg(both, queries).mean())

    weight = max(_FUSION, key=measure)
    return {q.query_id: fuse(score(q), q.first_stage, weight) for q in test.queries}


def cascades(rows: Mapping[str, Scores]) -> dict[str, Scores]:
    """Order the best candidates of the late layout by the parallel one."""
    late, parallel = (rows[f"{layout}/weights{FUSED}"] for layout in ("late", "parallel"))
    joined: dict[str, Scores] = {}
    for size in CASCADES:
        scores: dict[str, Tensor | None] = {}
        for query_id, first in late.items():
            second = parallel[query_id]
            if first is None or second is None:
                scores[query_id] = first
                continue
            best = first.argsort(descending=True, stable=True)[:size]
            lifted = first - first.max()  # at most 0
            lifted[best] = second[best] - second.min() + 1
            scores[query_id] = lifted
        joined[f"cascade-{size}"] = scores
    return joined


def report(evaluations: Mapping[str, Mapping[str, Evaluation]]) -> dict[str, Any]:
    """Print a table, and return means and differences as JSON.

    The mean over collections is the mean of their means. Differences are late minus parallel, row
    by row, and of cascades to the parallel layout's weights.
    """
    whole = {**evaluations, "mean": macro_average(evaluations)}
    parts: dict[str, Any] = {"measure": _MEASURE, "collections": {}}
    table = [["row", *whole, "late - parallel"]]
    for name, rows in whole.items():
        parts["collections"][name] = {
            "means": {row: figures.mean(_MEASURE) for row, figures in rows.items()},
            "differences": {row: asdict(pair) for row, pair in _differences(rows).items()},
        }
    for row in whole["mean"]:
        cells = [row, *(f"{rows[row].mean(_MEASURE):.4f}" for rows in whole.values())]
        difference = parts["collections"]["mean"]["differences"].get(row)
        cells.append("" if difference is None else _interval(difference))
        table.append(cells)
    typer.echo(markdown_table(table))
    return parts


def _differences(rows: Mapping[str, Evaluation]) -> dict[str, Any]:
    pairs = {row: row.replace("late/", "parallel/") for row in rows if row.startswith("late/")}
    pairs |= {row: f"parallel/weights{FUSED}" for row in rows if row.startswith("cascade")}
    return {
        row: compare({row: rows[row], base: rows[base]}, base, _MEASURE)[0]
        for row, base in pairs.items()
    }


def _interval(difference: Mapping[str, float]) -> str:
    low, high = difference["low"], difference["high"]
    return f"{difference['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"


def _by(heads: HeadSet, available: HeadSet) -> Callable[[QuerySignals], Tensor]:
    return lambda query: offline_scores(query, heads, available)


def _scored(score: Callable[[QuerySignals], Tensor], test: SignalSet) -> Scores:
    return {query.query_id: score(query) for query in test.queries}


if __name__ == "__main__":
    run(with_options(main, Options))
