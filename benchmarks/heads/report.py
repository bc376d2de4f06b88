"""Comparisons of selectors as JSON for the results and as Markdown for the reader."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from benchmarks.common import markdown_table
from benchmarks.heads.methods import Chosen
from benchmarks.heads.reliability import Oracle, Reliability
from routehead_plugins import HeadSet
from routehead_plugins.evaluation import Comparison, Evaluation, compare
from routehead_plugins.selection import ALL, FIRST_STAGE

BASELINES = (FIRST_STAGE, ALL)
SEED = 0  # of the significance tests
MACRO = "macro-average"


@dataclass(frozen=True)
class Measured:
    """Figures of one collection, or of all together, in one variant.

    Attributes:
        methods: Row -> its evaluation.
        chosen: Heads of the rows that choose any; ``None`` for all collections together.
        reliability: Split-half reliability of the heads' utility; ``None`` where no two queries
            can be halved.
        oracle: The best head of each query beside chance.
    """

    methods: Mapping[str, Evaluation]
    chosen: Chosen | None
    reliability: Reliability | None
    oracle: Oracle | None

    @cached_property
    def comparisons(self) -> dict[str, dict[str, dict[str, Comparison]]]:
        """Baseline -> measure -> row -> its comparison; Holm's correction is over the rows."""
        measures = next(iter(self.methods.values())).values
        return {
            baseline: {
                measure: {
                    comparison.method: comparison
                    for comparison in compare(self.methods, baseline, measure, SEED)
                }
                for measure in measures
            }
            for baseline in BASELINES
        }

    def to_dict(self, *, per_query: bool) -> dict[str, Any]:
        """Return everything as JSON can hold it, with or without the values of every query."""
        methods: dict[str, Any] = {}
        for row, evaluation in self.methods.items():
            methods[row] = {"means": evaluation.means}
            if per_query:
                methods[row]["per_query"] = {
                    measure: [round(value, 6) for value in values.values()]
                    for measure, values in evaluation.values.items()
                }
        heads = {} if self.chosen is None else self.chosen.transferred
        return {
            "methods": methods,
            "comparisons": [
                asdict(comparison)
                for measures in self.comparisons.values()
                for by_row in measures.values()
                for comparison in by_row.values()
            ],
            "heads": {row: _described(chosen) for row, chosen in heads.items() if chosen},
            "notes": [] if self.chosen is None else self.chosen.notes,
            "reliability": None if self.reliability is None else asdict(self.reliability),
            "oracle": None if self.oracle is None else asdict(self.oracle),
        }


def macro_average(collections: Mapping[str, Mapping[str, Evaluation]]) -> dict[str, Evaluation]:
    """Join collections so that each counts the same, however many queries it has.

    Args:
        collections: Collection -> row -> evaluation.

    Returns:
        Row -> values of all queries, scaled so that their mean is the mean of the collections'
        means, and a paired test on them tests that mean.
    """
    rows = next(iter(collections.values()))
    joined = {}
    for row, first in rows.items():
        values: dict[str, dict[str, float]] = {}
        for measure in first.values:
            by_collection = {
                name: by_row[row].values[measure] for name, by_row in collections.items()
            }
            total = sum(map(len, by_collection.values()))
            values[measure] = {
                f"{name}/{query_id}": value * total / (len(by_collection) * len(queries))
                for name, queries in by_collection.items()
                for query_id, value in queries.items()
            }
        joined[row] = Evaluation(values)
    return joined


def overview(variant: str, collections: Mapping[str, Measured], whole: Measured | None) -> str:
    """Lay out nDCG@10 of every row by collection, and the mean if there are several."""
    measure = "nDCG@10"
    header = ["method", *collections]
    if whole is not None:
        header += [MACRO, *_headings()]
    rows = [header]
    for row in next(iter(collections.values())).methods:
        means = [measured.methods[row].mean(measure) for measured in collections.values()]
        cells = [row, *(f"{mean:.4f}" for mean in means)]
        if whole is not None:
            cells.append(f"{whole.methods[row].mean(measure):.4f}")
            cells += _compared(whole, row, measure)
        rows.append(cells)
    return f"### {variant}: {measure}\n\n{markdown_table(rows)}"


def details(variant: str, collection: str, measured: Measured) -> str:
    """Lay out every measure of every row on one collection, and tests by the first measure."""
    measures = list(next(iter(measured.methods.values())).values)
    rows = [["method", *measures, *_headings()]]
    for row, evaluation in measured.methods.items():
        means = [f"{evaluation.mean(measure):.4f}" for measure in measures]
        rows.append([row, *means, *_compared(measured, row, measures[0])])
    notes = [] if measured.chosen is None else measured.chosen.notes
    lines = "".join(f"\nIn the order of the candidates: {note}\n" for note in notes)
    return f"### {collection}, {variant}\n\n{markdown_table(rows)}{lines}"


def routing(
    measured: Mapping[str, Mapping[str, Measured]], together: Mapping[str, Measured]
) -> str:
    """Lay out how much choosing heads per query can gain, by variant and collection."""
    rows = [
        [
            *("collection", "variant", "queries halved", "static r", "query-specific r"),
            *("without queries' means", "best of H heads", "best of H random", "difference"),
            *("one head", "random"),
        ]
    ]
    for variant, collections in measured.items():
        whole = {"all together": together[variant]} if variant in together else {}
        for collection, figures in {**collections, **whole}.items():
            rows.append([collection, variant, *_halved(figures), *_hindsight(figures)])
    return f"### How much there is to route\n\n{markdown_table(rows)}"


def _halved(measured: Measured) -> Iterable[str]:
    half = measured.reliability
    if half is None:
        return "0", "-", "-", "-"
    return str(half.queries), str(half.static), str(half.specific), str(half.routable)


def _hindsight(measured: Measured) -> Iterable[str]:
    oracle = measured.oracle
    if oracle is None:
        return ["-"] * 5
    figures = (oracle.best_head, oracle.best_random, oracle.static_head, oracle.random)
    head, random, static, unchosen = (f"{figure:.4f}" for figure in figures)
    return head, random, str(oracle.difference), static, unchosen


def _headings() -> list[str]:
    return [cell for baseline in BASELINES for cell in (f"- {baseline} [95% CI]", "p (Holm)")]


def _compared(measured: Measured, row: str, measure: str) -> list[str]:
    cells = []
    for baseline in BASELINES:
        comparison = measured.comparisons[baseline][measure].get(row)
        if comparison is None:
            cells += ["-", "-"]
        else:
            interval = f"[{comparison.low:+.4f}, {comparison.high:+.4f}]"
            cells += [f"{comparison.difference:+.4f} {interval}", f"{comparison.p_holm:.4f}"]
    return cells


def _described(heads: HeadSet) -> dict[str, Any]:
    content: dict[str, Any] = {"method": heads.method, "count": len(heads), "heads": str(heads)}
    if heads.recipe.weights is not None:
        content["weights"] = [round(weight, 4) for weight in heads.recipe.weights]
        content["first_stage_weight"] = heads.recipe.first_stage_weight
    return content
