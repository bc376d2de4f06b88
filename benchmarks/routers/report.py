"""Comparisons of routers as JSON for the results and as Markdown for the reader."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch

from benchmarks.common import markdown_table
from benchmarks.heads.methods import measure_rows
from benchmarks.heads.report import MACRO, macro_average
from benchmarks.routers.data import JUDGED, Sample
from benchmarks.routers.methods import LEARNED, ROUTED, RowScores
from routehead_plugins.evaluation import Comparison, Evaluation, compare
from routehead_plugins.selection import ALL, FIRST_STAGE, FUSED
from routehead_plugins.signals import reciprocal_rank

MICRO = "micro-average"
LIKELIHOOD = f"likelihood{FUSED}"
MEASURES = {"unseen": "nDCG@10", "own, judged": "nDCG@10", "own, synthesized": "RR"}

# Baseline -> rows to compare with it.
_AGAINST = {
    **{row: LEARNED for row in (FIRST_STAGE, ALL, "weights", LIKELIHOOD)},
    **{
        static: tuple(row for row, floor in ROUTED.items() if floor == static)
        for static in ROUTED.values()
        if static != "weights"
    },
}


@dataclass(frozen=True)
class Row:
    """Figures of one row on one sample.

    Attributes:
        evaluation: Value of each query, a mean over seeds.
        seeds: Mean over queries for each seed.
        strengths: Chosen strengths; see `RowScores`.
    """

    evaluation: Evaluation
    seeds: Sequence[float]
    strengths: Sequence[Sequence[float | None]] = ()

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; ``None`` if there is only one."""
        return statistics.stdev(self.seeds) if len(self.seeds) > 1 else None


@dataclass(frozen=True)
class Outcome:
    """Figures of one question on several collections.

    Attributes:
        name: A key of ``MEASURES``.
        trained: Collection -> number of training queries; a mean over splits.
        collections: Collection -> row -> its figures.
    """

    name: str
    trained: Mapping[str, int]
    collections: Mapping[str, Mapping[str, Row]]

    @property
    def measure(self) -> str:
        """Name of the measure."""
        return MEASURES[self.name]

    @cached_property
    def evaluations(self) -> dict[str, dict[str, Evaluation]]:
        """Collection, micro-average or macro-average -> row -> values."""
        single = {
            name: {row: figures.evaluation for row, figures in rows.items()}
            for name, rows in self.collections.items()
        }
        return {**single, MICRO: micro_average(single, self.measure), MACRO: macro_average(single)}

    @cached_property
    def comparisons(self) -> dict[str, dict[tuple[str, str], Comparison]]:
        """As ``evaluations`` -> (row, baseline) -> comparison; Holm's correction is by baseline."""
        comparisons: dict[str, dict[tuple[str, str], Comparison]] = {}
        for where, rows in self.evaluations.items():
            comparisons[where] = {}
            for baseline in _AGAINST.keys() & rows.keys():
                names = {baseline, *_AGAINST[baseline]}
                compared = {row: evaluation for row, evaluation in rows.items() if row in names}
                for comparison in compare(compared, baseline, self.measure):
                    comparisons[where][comparison.method, baseline] = comparison
        return comparisons

    def spread(self, row: str) -> float | None:
        """Return the standard deviation over seeds of the macro-average; ``None`` for one seed."""
        seeds = zip(*(rows[row].seeds for rows in self.collections.values()), strict=True)
        means = [statistics.fmean(seed) for seed in seeds]
        return statistics.stdev(means) if len(means) > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON can hold it, values per query in the order of the queries."""
        content: dict[str, Any] = {"measure": self.measure, "collections": {}}
        for name, rows in self.collections.items():
            first = next(iter(rows.values())).evaluation.per_query(self.measure)
            content["collections"][name] = {
                "training_queries": self.trained[name],
                "queries": list(first),
                "rows": {row: _row_json(figures, self.measure) for row, figures in rows.items()},
                "comparisons": self._compared(name),
            }
        for where in (MICRO, MACRO):
            means = {row: e.mean(self.measure) for row, e in self.evaluations[where].items()}
            content[where] = {"means": means, "comparisons": self._compared(where)}
        return content

    def _compared(self, where: str) -> list[dict[str, Any]]:
        pairs = self.comparisons[where]
        return [asdict(pairs[pair]) for pair in sorted(pairs, key=lambda pair: pair[::-1])]


@dataclass(frozen=True)
class Variant:
    """Figures of one change of the training.

    Attributes:
        question: A key of ``MEASURES``.
        objective: Objective of the training.
        change: Difference from the default; empty for the default itself.
        static: Collection -> figures of the static bias.
        routed: Collection -> figures of the router.
    """

    question: str
    objective: str
    change: str
    static: Mapping[str, Row]
    routed: Mapping[str, Row]

    @cached_property
    def comparison(self) -> Comparison:
        """The router against its own static bias, over all queries of all collections."""
        measure = MEASURES[self.question]
        rows = {
            name: {"static": self.static[name].evaluation, "routed": self.routed[name].evaluation}
            for name in self.routed
        }
        return compare(micro_average(rows, measure), "static", measure)[0]

    def mean(self, rows: Mapping[str, Row]) -> float:
        """Return the mean of the collections' means."""
        return statistics.fmean(
            row.evaluation.mean(MEASURES[self.question]) for row in rows.values()
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the collections' rows as JSON can hold it."""
        return {
            "question": self.question,
            "objective": self.objective,
            "change": self.change,
            "static": self.mean(self.static),
            "routed": self.mean(self.routed),
            "comparison": asdict(self.comparison),
        }


def variants_json(variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """Return everything as JSON can hold it; only the first of equal static rows has all values."""
    seen: dict[tuple[str, str, str], dict[str, Any]] = {}
    contents = []
    for variant in variants:
        measure, content = MEASURES[variant.question], variant.to_dict()
        content["collections"] = {}
        for name, routed in variant.routed.items():
            static = _row_json(variant.static[name], measure, digits=4)
            key = (variant.question, variant.objective, name)
            if seen.setdefault(key, static) is not static and seen[key] == static:
                del static["per_query"]
            rows = {"static": static, "routed": _row_json(routed, measure, digits=4)}
            content["collections"][name] = rows
        contents.append(content)
    return contents


def measure_seeds(sample: Sample, scores: Mapping[str, RowScores], hits: int) -> dict[str, Row]:
    """Measure every row of a sample, seed by seed.

    Args:
        sample: The sample that was tested. The measure is nDCG@10 for judged queries, and for
            synthesized ones the reciprocal rank of the passage they were synthesized from.
        scores: Row -> scores.
        hits: Candidates per query.
    """
    rows = {}
    for name, row in scores.items():
        if sample.kind == JUDGED:
            seeds = {str(seed): values for seed, values in enumerate(row.scores)}
            signals = sample.examples.signals
            evaluations = list(measure_rows(sample.collection, signals, seeds, hits).values())
            values = [evaluation.per_query("nDCG@10") for evaluation in evaluations]
            measure = "nDCG@10"
        else:
            values, measure = [_reciprocal_ranks(sample, seed) for seed in row.scores], "RR"
        mean = {query: statistics.fmean(one[query] for one in values) for query in values[0]}
        means = [statistics.fmean(one.values()) for one in values]
        rows[name] = Row(Evaluation({measure: mean}), means, row.strengths)
    return rows


def micro_average(
    collections: Mapping[str, Mapping[str, Evaluation]], measure: str
) -> dict[str, Evaluation]:
    """Join collections so that each query counts the same; return row -> evaluation."""
    rows = next(iter(collections.values()))
    return {
        row: Evaluation(
            {
                measure: {
                    f"{name}/{query}": value
                    for name, by_row in collections.items()
                    for query, value in by_row[row].per_query(measure).items()
                }
            }
        )
        for row in rows
    }


def overview(outcome: Outcome) -> str:
    """Lay out every row on every collection, and the spread of the seeds."""
    rows = [["method", *outcome.collections, "macro", "seeds +-"]]
    for row in next(iter(outcome.collections.values())):
        figures = [
            by_row[row].evaluation.mean(outcome.measure) for by_row in outcome.collections.values()
        ]
        figures.append(outcome.evaluations[MACRO][row].mean(outcome.measure))
        rows.append([row, *(f"{figure:.4f}" for figure in figures), _spread(outcome.spread(row))])
    return f"### {outcome.name}: {outcome.measure}\n\n{markdown_table(rows)}"


def differences(outcome: Outcome) -> str:
    """Lay out each router's differences: to its static bias by collection, to others on all."""
    by_collection = [["- static (p by Holm)", *outcome.collections]]
    together = [["all collections", "on", "- static [95% CI] p"]]
    others = [row for row in (ALL, FIRST_STAGE) if row in outcome.evaluations[MICRO]]
    together[0] += [cell for other in others for cell in (f"- {other}", "p")]
    for row, static in ROUTED.items():
        single = [outcome.comparisons[name][row, static] for name in outcome.collections]
        by_collection.append([row, *(f"{c.difference:+.3f} ({c.p_holm:.3f})" for c in single)])
        for where in (MICRO, MACRO):
            pairs = outcome.comparisons[where]
            cells = [f"{interval(pairs[row, static])} {pairs[row, static].p_holm:.3f}"]
            for other in others:
                cells += [f"{pairs[row, other].difference:+.3f}", f"{pairs[row, other].p_holm:.3f}"]
            together.append([row, where.removesuffix("-average"), *cells])
    return f"{markdown_table(by_collection)}\n{markdown_table(together)}"


def ablations(variants: Sequence[Variant], notes: Sequence[str]) -> str:
    """Lay out the effect of every change of the training."""
    rows = [["question", "objective", "change", "static", "routed", "difference [95% CI] p"]]
    for variant in variants:
        comparison = variant.comparison
        figures = [f"{variant.mean(kind):.4f}" for kind in (variant.static, variant.routed)]
        about = [variant.question.partition(",")[0], variant.objective, variant.change or "-"]
        rows.append([*about, *figures, f"{interval(comparison)} {comparison.p:.3f}"])
    lines = "".join(f"\nNot measured: {note}\n" for note in notes)
    title = "Ablations: means of collections, differences over all queries"
    return f"### {title}\n\n{markdown_table(rows)}{lines}"


def reliabilities(labels: Mapping[str, Mapping[str, float]]) -> str:
    """Lay out the quality of labels on documents that they were not searched on."""
    names = [name for name in next(iter(labels.values())) if name != "queries"]
    rows = [["labels", "queries", *names]]
    for change, figures in labels.items():
        cells = [f"{figures[name]:.4f}" for name in names]
        rows.append([change or "-", f"{figures['queries']:.0f}", *cells])
    return f"### Labels on the other half of the documents: nDCG@10\n\n{markdown_table(rows)}"


def interval(comparison: Comparison) -> str:
    """Write a difference with its confidence interval."""
    return f"{comparison.difference:+.3f} [{comparison.low:+.3f}, {comparison.high:+.3f}]"


def _reciprocal_ranks(
    sample: Sample, scores: Mapping[str, torch.Tensor | None]
) -> dict[str, float]:
    ranks = {}
    for query in sample.queries:
        values = scores[query.query_id]
        if values is None:
            values = torch.zeros(len(query.gains))  # ties keep the order
        ranks[query.query_id] = float(reciprocal_rank(values[None], query.gains))
    return ranks


def _row_json(row: Row, measure: str, digits: int = 6) -> dict[str, Any]:
    content: dict[str, Any] = {"mean": row.evaluation.mean(measure)}
    if len(row.seeds) > 1:
        content |= {"seeds": list(row.seeds), "spread": row.spread}
    if row.strengths:
        content["strengths"] = [list(split) for split in row.strengths]
    values = row.evaluation.per_query(measure).values()
    return {**content, "per_query": [round(value, digits) for value in values]}


def _spread(spread: float | None) -> str:
    return "-" if spread is None else f"{spread:.4f}"
