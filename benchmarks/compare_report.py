"""What was measured, compared and laid out: JSON for the results, Markdown for the reader."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from compare_methods import ALL, BM25, Chosen
from reliability import Oracle, Reliability

from routehead_plugins import HeadSet
from routehead_plugins.evaluation import Comparison, Evaluation, ResultTable

BASELINES = (BM25, ALL)
MACRO = "macro-average"

# The innermost lists and objects of indented JSON.
_INNERMOST = re.compile(r"[\[{]\n[^\[\]{}]*?[\]}]")


@dataclass(frozen=True)
class Measured:
    """One collection, or all together, in one variant.

    Attributes:
        methods: Row -> what each query measures.
        chosen: Heads of the rows that choose any; ``None`` for all collections together.
        reliability: How much of a head's utility is of one query; ``None`` where no two queries
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
        return {
            baseline: {
                measure: {found.method: found for found in compared}
                for measure, compared in self._table(baseline).comparisons["this"].items()
            }
            for baseline in BASELINES
        }

    def to_dict(self, *, per_query: bool) -> dict[str, Any]:
        """Give everything as JSON can hold it.

        Args:
            per_query: Whether with every query's values, in the order of the queries.
        """
        methods: dict[str, Any] = {}
        for row, evaluation in self.methods.items():
            methods[row] = {"means": evaluation.means}
            if per_query:
                methods[row]["per_query"] = {
                    measure: [round(value, 6) for value in values.values()]
                    for measure, values in evaluation.values.items()
                }
        return {
            "methods": methods,
            "comparisons": [
                asdict(found)
                for measures in self.comparisons.values()
                for compared in measures.values()
                for found in compared.values()
            ],
            "heads": {} if self.chosen is None else _heads(self.chosen),
            "notes": [] if self.chosen is None else self.chosen.notes,
            "reliability": None if self.reliability is None else asdict(self.reliability),
            "oracle": None if self.oracle is None else asdict(self.oracle),
        }

    def _table(self, baseline: str) -> ResultTable:
        return ResultTable({"this": self.methods}, baseline)


def macro_average(collections: Mapping[str, Mapping[str, Evaluation]]) -> dict[str, Evaluation]:
    """Put collections together so that each counts the same, however many queries it has.

    Args:
        collections: Collection -> row -> evaluation.

    Returns:
        Row -> values of all queries, scaled so that their mean is the mean of the collections'
        means, and a paired test of them one of that mean.
    """
    rows = next(iter(collections.values()))
    found = {}
    for row, first in rows.items():
        values: dict[str, dict[str, float]] = {}
        for measure in first.values:
            of_each = {name: each[row].values[measure] for name, each in collections.items()}
            total = sum(map(len, of_each.values()))
            values[measure] = {
                f"{name}/{query_id}": value * total / (len(of_each) * len(queries))
                for name, queries in of_each.items()
                for query_id, value in queries.items()
            }
        found[row] = Evaluation(values)
    return found


def results_json(
    settings: Mapping[str, Any],
    command: str,
    queries: Sequence[str],
    variants: Mapping[str, Measured],
    **more: Any,
) -> str:
    """Write down everything that was measured on a collection.

    Args:
        settings: What the figures depend on.
        command: That gives them.
        queries: Ids in the order of the values per query; none where there are no such values.
        variants: What was measured.
        more: Further entries.
    """
    # Date and versions as all other results have them.
    about = ResultTable({}, BM25).to_dict()
    content = {
        "command": command,
        "date": about["date"],
        "versions": about["versions"],
        "settings": dict(settings),
        "baselines": list(BASELINES),
        "seed": about["seed"],
        "queries": list(queries),
        "variants": {
            name: measured.to_dict(per_query=bool(queries)) for name, measured in variants.items()
        },
        **more,
    }
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    # A line for each figure would be ten thousands of lines. Line breaks stand between values only.
    return _INNERMOST.sub(lambda found: re.sub(r"\n *", " ", found[0]), text) + "\n"


def overview(variant: str, collections: Mapping[str, Measured], whole: Measured | None) -> str:
    """Lay out nDCG@10 of every row on every collection, and the mean of the collections.

    Args:
        variant: For the heading.
        collections: Collection -> what was measured.
        whole: All together; ``None`` where there is one collection.
    """
    measure = "nDCG@10"
    header = ["method", *collections]
    if whole is not None:
        header += [MACRO, *(cell for baseline in BASELINES for cell in _headings(baseline))]
    rows = [header]
    for row in next(iter(collections.values())).methods:
        cells = [row, *(f"{each.methods[row].mean(measure):.4f}" for each in collections.values())]
        if whole is not None:
            cells.append(f"{whole.methods[row].mean(measure):.4f}")
            cells += _compared(whole, row, measure)
        rows.append(cells)
    return f"### {variant}: {measure}\n\n{_markdown(rows)}"


def details(variant: str, collection: str, measured: Measured) -> str:
    """Lay out every measure of every row on one collection, and its tests by the first measure."""
    measures = list(next(iter(measured.methods.values())).values)
    headings = [cell for baseline in BASELINES for cell in _headings(baseline)]
    rows = [["method", *measures, *headings]]
    for row, evaluation in measured.methods.items():
        means = [f"{evaluation.mean(measure):.4f}" for measure in measures]
        rows.append([row, *means, *_compared(measured, row, measures[0])])
    notes = [] if measured.chosen is None else measured.chosen.notes
    said = "".join(f"\nIn the order of the candidates: {note}\n" for note in notes)
    return f"### {collection}, {variant}\n\n{_markdown(rows)}{said}"


def routing(
    measured: Mapping[str, Mapping[str, Measured]], together: Mapping[str, Measured]
) -> str:
    """Lay out how much there is to route.

    Args:
        measured: Variant -> collection -> what was measured.
        together: Variant -> all collections together; empty where there is one.
    """
    rows = [
        [
            *("collection", "variant", "queries halved", "static r", "query-specific r"),
            *("without queries' means", "best of H heads", "best of H random", "difference"),
            *("one head", "random"),
        ]
    ]
    for variant, collections in measured.items():
        whole = {"all together": together[variant]} if variant in together else {}
        for collection, each in {**collections, **whole}.items():
            rows.append([collection, variant, *_halved(each), *_hindsight(each)])
    return f"### How much there is to route\n\n{_markdown(rows)}"


def _halved(measured: Measured) -> list[str]:
    found = measured.reliability
    if found is None:
        return ["0", "-", "-", "-"]
    return [str(found.queries), str(found.static), str(found.specific), str(found.routable)]


def _hindsight(measured: Measured) -> list[str]:
    found = measured.oracle
    if found is None:
        return ["-"] * 5
    figures = (found.best_head, found.best_random, found.static_head, found.random)
    head, random, static, unchosen = (f"{figure:.4f}" for figure in figures)
    return [head, random, str(found.difference), static, unchosen]


def _headings(baseline: str) -> tuple[str, str]:
    return f"- {baseline} [95% CI]", "p (Holm)"


def _compared(measured: Measured, row: str, measure: str) -> list[str]:
    cells = []
    for baseline in BASELINES:
        found = measured.comparisons[baseline][measure].get(row)
        if found is None:
            cells += ["-", "-"]
        else:
            interval = f"[{found.low:+.4f}, {found.high:+.4f}]"
            cells += [f"{found.difference:+.4f} {interval}", f"{found.p_holm:.4f}"]
    return cells


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (rows[0], rule, *rows[1:]))


def _heads(chosen: Chosen) -> dict[str, Any]:
    return {row: _described(heads) for row, heads in chosen.transferred.items() if heads}


def _described(heads: HeadSet) -> dict[str, Any]:
    found: dict[str, Any] = {"method": heads.method, "count": len(heads), "heads": str(heads)}
    if heads.weights is not None:
        found["weights"] = [round(weight, 4) for weight in heads.weights]
        found["first_stage_weight"] = heads.first_stage_weight
    return found
