"""What routers measured, compared and laid out: JSON for the results, Markdown for the reader."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from compare_methods import ALL, BM25, FUSED, measure_rows
from compare_report import MACRO, macro_average
from router_data import JUDGED, Sample
from router_methods import LEARNED, ROUTED, Found

from routehead_plugins.evaluation import Comparison, Evaluation, ResultTable, compare
from routehead_plugins.signals import reciprocal_rank

MICRO = "micro-average"
LIKELIHOOD = f"likelihood{FUSED}"
MEASURES = {"unseen": "nDCG@10", "own, judged": "nDCG@10", "own, synthesized": "RR"}

# Baseline -> rows that are compared with it.
_AGAINST = {
    **{row: LEARNED for row in (BM25, ALL, "weights", LIKELIHOOD)},
    **{
        static: tuple(row for row, floor in ROUTED.items() if floor == static)
        for static in ROUTED.values()
        if static != "weights"
    },
}
# The innermost lists and objects of indented JSON.
_INNERMOST = re.compile(r"[\[{]\n[^\[\]{}]*?[\]}]")


@dataclass(frozen=True)
class Row:
    """One row on one sample.

    Attributes:
        evaluation: What each query measures, a mean over seeds.
        seeds: Mean over queries for each seed.
        strengths: See `Found`.
    """

    evaluation: Evaluation
    seeds: Sequence[float]
    strengths: Sequence[Sequence[float | None]] = ()

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; ``None`` where there is one."""
        return statistics.stdev(self.seeds) if len(self.seeds) > 1 else None


@dataclass(frozen=True)
class Outcome:
    """One question, asked of several collections.

    Attributes:
        name: One of ``MEASURES``.
        trained: Collection -> how many queries routers were trained on; a mean over splits.
        collections: Collection -> row -> what was measured.
    """

    name: str
    trained: Mapping[str, int]
    collections: Mapping[str, Mapping[str, Row]]

    @property
    def measure(self) -> str:
        """What is measured."""
        return MEASURES[self.name]

    @cached_property
    def evaluations(self) -> dict[str, dict[str, Evaluation]]:
        """Where -> row -> values: each collection, all queries alike, and all collections alike."""
        found = {
            name: {row: each.evaluation for row, each in rows.items()}
            for name, rows in self.collections.items()
        }
        return {**found, MICRO: micro_average(found, self.measure), MACRO: macro_average(found)}

    @cached_property
    def comparisons(self) -> dict[str, dict[tuple[str, str], Comparison]]:
        """Where -> (row, baseline) -> comparison; Holm's correction is over a baseline's rows."""
        found: dict[str, dict[tuple[str, str], Comparison]] = {}
        for where, rows in self.evaluations.items():
            found[where] = {}
            for baseline in _AGAINST.keys() & rows.keys():
                wanted = {baseline, *_AGAINST[baseline]}
                compared = {row: each for row, each in rows.items() if row in wanted}
                for one in compare(compared, baseline, self.measure):
                    found[where][one.method, baseline] = one
        return found

    def spread(self, row: str) -> float | None:
        """Standard deviation over seeds of the mean of collections; ``None`` for one seed."""
        seeds = zip(*(rows[row].seeds for rows in self.collections.values()), strict=True)
        means = [statistics.fmean(seed) for seed in seeds]
        return statistics.stdev(means) if len(means) > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """Give everything as JSON can hold it, values per query in the order of the queries."""
        content: dict[str, Any] = {"measure": self.measure, "collections": {}}
        for name, rows in self.collections.items():
            first = next(iter(rows.values())).evaluation.per_query(self.measure)
            content["collections"][name] = {
                "training_queries": self.trained[name],
                "queries": list(first),
                "rows": {row: _row(each, self.measure) for row, each in rows.items()},
                "comparisons": self._compared(name),
            }
        for where in (MICRO, MACRO):
            means = {row: e.mean(self.measure) for row, e in self.evaluations[where].items()}
            content[where] = {"means": means, "comparisons": self._compared(where)}
        return content

    def _compared(self, where: str) -> list[dict[str, Any]]:
        found = self.comparisons[where]
        return [asdict(found[pair]) for pair in sorted(found, key=lambda pair: pair[::-1])]


@dataclass(frozen=True)
class Variant:
    """One change of how routers are trained, and what it does.

    Attributes:
        question: See ``MEASURES``.
        objective: What is trained.
        change: What differs from the default; empty for the default itself.
        static: Collection -> what the static bias measures.
        routed: Collection -> what the router measures.
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
        """Mean of the collections' means."""
        return statistics.fmean(
            row.evaluation.mean(MEASURES[self.question]) for row in rows.values()
        )

    def to_dict(self) -> dict[str, Any]:
        """Give everything but the collections' rows as JSON can hold it."""
        return {
            "question": self.question,
            "objective": self.objective,
            "change": self.change,
            "static": self.mean(self.static),
            "routed": self.mean(self.routed),
            "comparison": asdict(self.comparison),
        }


def variants_json(variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """Give everything as JSON can hold it; of equal static rows the first alone has all values."""
    seen: dict[tuple[str, str, str], dict[str, Any]] = {}
    found = []
    for variant in variants:
        measure, content = MEASURES[variant.question], variant.to_dict()
        content["collections"] = {}
        for name, routed in variant.routed.items():
            static = _row(variant.static[name], measure, places=4)
            key = (variant.question, variant.objective, name)
            if seen.setdefault(key, static) is not static and seen[key] == static:
                del static["per_query"]
            rows = {"static": static, "routed": _row(routed, measure, places=4)}
            content["collections"][name] = rows
        found.append(content)
    return found


def measured(sample: Sample, found: Mapping[str, Found], hits: int) -> dict[str, Row]:
    """Measure every row of a sample, seed by seed.

    Args:
        sample: What was tested: nDCG@10 of judged queries, of synthesized ones the reciprocal rank
            of the passage they were written from.
        found: Row -> scores.
        hits: Candidates per query.
    """
    rows = {}
    for name, each in found.items():
        if sample.kind == JUDGED:
            seeds = {str(seed): scores for seed, scores in enumerate(each.scores)}
            signals = sample.examples.signals
            evaluations = list(measure_rows(sample.collection, signals, seeds, hits).values())
            values = [evaluation.per_query("nDCG@10") for evaluation in evaluations]
            measure = "nDCG@10"
        else:
            values, measure = [_reciprocal_ranks(sample, scores) for scores in each.scores], "RR"
        mean = {query: statistics.fmean(one[query] for one in values) for query in values[0]}
        means = [statistics.fmean(one.values()) for one in values]
        rows[name] = Row(Evaluation({measure: mean}), means, each.strengths)
    return rows


def micro_average(
    collections: Mapping[str, Mapping[str, Evaluation]], measure: str
) -> dict[str, Evaluation]:
    """Put collections together so that each query counts the same: row -> evaluation."""
    rows = next(iter(collections.values()))
    return {
        row: Evaluation(
            {
                measure: {
                    f"{name}/{query}": value
                    for name, each in collections.items()
                    for query, value in each[row].per_query(measure).items()
                }
            }
        )
        for row in rows
    }


def results_json(settings: Mapping[str, Any], command: str, parts: Mapping[str, Any]) -> str:
    """Write down everything that was measured.

    Args:
        settings: What the figures depend on.
        command: That gives them.
        parts: Of the report; must be JSON.
    """
    # Date and versions as all other results have them.
    about = ResultTable({}, BM25).to_dict()
    content = {
        "command": command,
        "date": about["date"],
        "versions": about["versions"],
        "settings": dict(settings),
        **parts,
    }
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    # A line for each figure would be ten thousands of lines. Line breaks stand between values only.
    return _INNERMOST.sub(lambda found: re.sub(r"\n *", " ", found[0]), text) + "\n"


def overview(outcome: Outcome) -> str:
    """Lay out every row on every collection, and how far seeds are apart."""
    rows = [["method", *outcome.collections, "macro", "seeds +-"]]
    for row in next(iter(outcome.collections.values())):
        figures = [
            each[row].evaluation.mean(outcome.measure) for each in outcome.collections.values()
        ]
        figures.append(outcome.evaluations[MACRO][row].mean(outcome.measure))
        rows.append([row, *(f"{figure:.4f}" for figure in figures), _spread(outcome.spread(row))])
    return f"### {outcome.name}: {outcome.measure}\n\n{markdown(rows)}"


def differences(outcome: Outcome) -> str:
    """Lay out each router's differences: to its static bias everywhere, to the others on all."""
    by_collection = [["- static (p by Holm)", *outcome.collections]]
    together = [["all collections", "on", "- static [95% CI] p"]]
    others = [each for each in (ALL, BM25) if each in outcome.evaluations[MICRO]]
    together[0] += [cell for other in others for cell in (f"- {other}", "p")]
    for row, static in ROUTED.items():
        found = [outcome.comparisons[name][row, static] for name in outcome.collections]
        by_collection.append([row, *(f"{one.difference:+.3f} ({one.p_holm:.3f})" for one in found)])
        for where in (MICRO, MACRO):
            pairs = outcome.comparisons[where]
            cells = [f"{interval(pairs[row, static])} {pairs[row, static].p_holm:.3f}"]
            for other in others:
                cells += [f"{pairs[row, other].difference:+.3f}", f"{pairs[row, other].p_holm:.3f}"]
            together.append([row, where.removesuffix("-average"), *cells])
    return f"{markdown(by_collection)}\n{markdown(together)}"


def ablations(variants: Sequence[Variant], notes: Sequence[str]) -> str:
    """Lay out what every change of the training does."""
    rows = [["question", "objective", "change", "static", "routed", "difference [95% CI] p"]]
    for each in variants:
        found = each.comparison
        figures = [f"{each.mean(kind):.4f}" for kind in (each.static, each.routed)]
        about = [each.question.partition(",")[0], each.objective, each.change or "-"]
        rows.append([*about, *figures, f"{interval(found)} {found.p:.3f}"])
    said = "".join(f"\nNot measured: {note}\n" for note in notes)
    title = "Ablations: means of collections, differences over all queries"
    return f"### {title}\n\n{markdown(rows)}{said}"


def reliabilities(found: Mapping[str, Mapping[str, float]]) -> str:
    """Lay out what labels are worth on documents they were not searched on."""
    names = ("queries", "found", "kept", "static", "chance")
    rows = [["labels", *names]]
    for change, figures in found.items():
        shown = [f"{figures[name]:.4f}" for name in names[1:]]
        rows.append([change or "-", f"{figures['queries']:.0f}", *shown])
    return f"### Labels on the other half of the documents: nDCG@10\n\n{markdown(rows)}"


def interval(found: Comparison) -> str:
    """A difference with its confidence interval."""
    return f"{found.difference:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Lay out cells, the header first."""
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (rows[0], rule, *rows[1:]))


def _reciprocal_ranks(
    sample: Sample, scores: Mapping[str, torch.Tensor | None]
) -> dict[str, float]:
    found = {}
    for query in sample.queries:
        given = scores[query.query_id]
        shown = torch.zeros(len(query.gains)) if given is None else given  # ties keep the order
        found[query.query_id] = float(reciprocal_rank(shown[None], query.gains))
    return found


def _row(row: Row, measure: str, places: int = 6) -> dict[str, Any]:
    content: dict[str, Any] = {"mean": row.evaluation.mean(measure)}
    if len(row.seeds) > 1:
        content |= {"seeds": list(row.seeds), "spread": row.spread}
    if row.strengths:
        content["strengths"] = [list(split) for split in row.strengths]
    values = row.evaluation.per_query(measure).values()
    return {**content, "per_query": [round(value, places) for value in values]}


def _spread(spread: float | None) -> str:
    return "-" if spread is None else f"{spread:.4f}"
