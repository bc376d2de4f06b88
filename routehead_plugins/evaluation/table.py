"""How good rankings are, whether one method beats another, and the table that says so."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import math
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from routehead_plugins import __version__
from routehead_plugins.errors import InputError
from routehead_plugins.evaluation.significance import Comparison, compare
from routehead_plugins.io import Qrels, Rankings, StrPath, atomic_write_text, decreasing_run

if TYPE_CHECKING:
    import rich.table
    from ir_measures import Measure

__all__ = [
    "DEFAULT_MEASURES",
    "Comparison",
    "Evaluation",
    "ResultTable",
    "compare",
    "evaluate",
    "parse_measures",
]

DEFAULT_MEASURES = ("nDCG@10", "RR@10", "R@20")
_MEASURE = re.compile(r"(?P<name>\w+)(?:\((?P<options>.*)\))?(?:@(?P<at>[\d.]+))?")
_PACKAGES = ("torch", "transformers", "ir_measures", "pytrec-eval-terrier", "scipy", "numpy")


@dataclass(frozen=True)
class Evaluation:
    """What each measure gives each judged query.

    Attributes:
        values: Measure -> query -> value, for every judged query, in the judgments' order.
    """

    values: Mapping[str, Mapping[str, float]]

    @property
    def means(self) -> dict[str, float]:
        """Mean of each measure over all judged queries."""
        return {measure: self.mean(measure) for measure in self.values}

    def mean(self, measure: str) -> float:
        """Mean of one measure over all judged queries.

        Raises:
            InputError: The measure was not evaluated.
        """
        values = self.per_query(measure).values()
        return math.fsum(values) / len(values)

    def per_query(self, measure: str) -> Mapping[str, float]:
        """Values of one measure, by query.

        Args:
            measure: Its name; ``MRR@10`` finds ``RR@10``.

        Raises:
            InputError: The measure was not evaluated.
        """
        name = measure if measure in self.values else str(parse_measures([measure])[0])
        if name not in self.values:
            raise InputError(
                f"measure {measure!r} was not evaluated; expected one of "
                f"{', '.join(self.values)}; add it to the measures."
            )
        return self.values[name]


def parse_measures(names: Sequence[str] = DEFAULT_MEASURES) -> tuple[Measure, ...]:
    """Turn names such as ``nDCG@10``, ``MRR@10`` or ``AP(rel=2)@100`` into measures.

    Args:
        names: As ir_measures writes them; the same measure twice counts once.

    Raises:
        InputError: No name is given, or one is not a measure that can be computed here.
    """
    if isinstance(names, str) or not names:
        raise InputError(
            f"measures={names!r} is not a list of names; give one such as {list(DEFAULT_MEASURES)}."
        )
    return tuple(dict.fromkeys(_measure(name) for name in names))


def _measure(name: str) -> Measure:
    # ir_measures' own parser needs ast.Num, which Python 3.14 no longer has.
    import ir_measures
    from ir_measures.measures import registry

    providers: Any = ir_measures.DefaultPipeline
    match = _MEASURE.fullmatch(name.strip())
    try:
        if match is None:
            raise ValueError(name)
        prototype = registry[match["name"]]
        options = dict(
            option.split("=", 1) for option in (match["options"] or "").split(",") if option
        )
        arguments = {key.strip(): ast.literal_eval(value) for key, value in options.items()}
        if match["at"] is not None:
            arguments[prototype.AT_PARAM] = ast.literal_eval(match["at"])
        measure: Measure = prototype(**arguments)
        # Asks every provider, and checks the options on the way.
        is_known = providers.supports(measure)
    except (KeyError, ValueError, SyntaxError, AssertionError) as error:
        raise _unknown_measure(name) from error
    if not is_known or arguments.get("cutoff", 1) < 1:
        raise _unknown_measure(name)
    return measure


def _unknown_measure(name: str) -> InputError:
    return InputError(
        f"measure {name!r} cannot be computed; expected a name of ir_measures such as "
        f"{', '.join(DEFAULT_MEASURES)} or AP(rel=2)@100; check the spelling."
    )


def evaluate(run: Rankings, qrels: Qrels, measures: Sequence[str] = DEFAULT_MEASURES) -> Evaluation:
    """Measure rankings, in the order in which they are given, against judgments.

    Args:
        run: A ranking per query, best first; queries without judgments are ignored.
        qrels: The judgments; a judged query that the run lacks counts as 0.
        measures: Their names, see `parse_measures`.

    Raises:
        InputError: There are no judgments, none for any query of the run, a measure is unknown, or
            a ranking is not one (see `decreasing_run`).
    """
    import ir_measures

    parsed = parse_measures(measures)
    judged = {query: judgments for query, judgments in qrels.items() if judgments}
    if not judged:
        raise InputError("the qrels judge no document; expected judgments; check the qrels file.")
    shared = {query: ranking for query, ranking in run.items() if query in judged}
    if run and not shared:
        raise InputError(
            f"the run's queries, such as {next(iter(run))!r}, are none of the judged ones, such as "
            f"{next(iter(judged))!r}; expected the same ids; use the run's own qrels."
        )
    values = {str(measure): dict.fromkeys(judged, 0.0) for measure in parsed}
    for metric in ir_measures.iter_calc(parsed, judged, decreasing_run(shared)):
        values[str(metric.measure)][metric.query_id] = float(metric.value)
    return Evaluation(values)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class ResultTable:
    """Methods by measures on one or more collections, with what is needed to repeat it.

    Attributes:
        evaluations: Collection -> method -> its evaluation.
        baseline: The method that the others are compared with.
        settings: Whatever the figures depend on: model, layout, depth, ...
        seed: Of the significance tests.
        date: When the table was made, in UTC.
    """

    evaluations: Mapping[str, Mapping[str, Evaluation]]
    baseline: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    date: str = field(default_factory=_now)

    @cached_property
    def comparisons(self) -> dict[str, dict[str, list[Comparison]]]:
        """Collection -> measure -> each method against the baseline.

        Raises:
            InputError: The baseline is missing, or methods differ in measures or queries.
        """
        return {
            collection: {
                measure: compare(methods, self.baseline, measure, self.seed)
                for measure in _measures_of(methods)
            }
            for collection, methods in self.evaluations.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Give everything, values per query included, as JSON can hold it.

        Raises:
            InputError: See `comparisons`.
        """
        return {
            "date": self.date,
            "versions": _versions(),
            "settings": dict(self.settings),
            "baseline": self.baseline,
            "seed": self.seed,
            "collections": {
                collection: {
                    "methods": {name: _figures(method) for name, method in methods.items()},
                    "comparisons": [
                        asdict(comparison)
                        for compared in self.comparisons[collection].values()
                        for comparison in compared
                    ],
                }
                for collection, methods in self.evaluations.items()
            },
        }

    def write_json(self, path: StrPath) -> None:
        """Write `to_dict`; the file appears whole or not at all.

        Raises:
            InputError: See `comparisons`; or the settings do not fit in JSON, or the file cannot
                be written.
        """
        content = self.to_dict()
        try:
            text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"settings={dict(self.settings)!r} cannot be written as JSON ({error}); expected "
                "text, finite numbers, lists and dicts; convert them."
            ) from error
        atomic_write_text(path, text + "\n")

    def to_markdown(self) -> str:
        """Give the means, and the comparisons by the first measure, as a Markdown table.

        Raises:
            InputError: See `comparisons`.
        """
        header, *rows = [[cell.replace("|", "\\|") for cell in row] for row in self._rows()]
        rule = ["---", "---", *["---:"] * (len(header) - 2)]
        return "".join(f"| {' | '.join(row)} |\n" for row in (header, rule, *rows))

    def to_rich(self) -> rich.table.Table:
        """Give the means, and the comparisons by the first measure, for the terminal.

        Raises:
            InputError: See `comparisons`.
        """
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        header, *rows = self._rows()
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        # A terminal is narrow: a single collection gives the table its title, not a column.
        first = 1 if len(self.evaluations) == 1 else 0
        if first:
            table.title = next(iter(self.evaluations))
        for name in header[first:]:
            left = name in header[:2]
            table.add_column(Text(name), justify="left" if left else "right")
        for row in rows:
            # Text, since rich would take the interval's brackets for markup.
            table.add_row(*map(Text, row[first:]))
        return table

    def _rows(self) -> list[list[str]]:
        """The cells of the table, its header first."""
        measures = list(
            dict.fromkeys(
                measure
                for methods in self.evaluations.values()
                for measure in _measures_of(methods)
            )
        )
        first = measures[0] if measures else ""
        difference = f"{first} - {self.baseline} [95% CI]"
        header = ["collection", "method", *measures, difference, "p (Holm)", "win/tie/loss"]
        rows = [header]
        for collection, methods in self.evaluations.items():
            compared = {c.method: c for c in self.comparisons[collection].get(first, ())}
            for method, evaluation in methods.items():
                means = [f"{evaluation.mean(measure):.4f}" for measure in measures]
                rows.append([collection, method, *means, *_cells(compared.get(method))])
        return rows


def _measures_of(methods: Mapping[str, Evaluation]) -> list[str]:
    return list(next(iter(methods.values())).values) if methods else []


def _figures(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "queries": len(next(iter(evaluation.values.values()))),
        "means": evaluation.means,
        "per_query": {measure: dict(values) for measure, values in evaluation.values.items()},
    }


def _cells(comparison: Comparison | None) -> tuple[str, str, str]:
    if comparison is None:
        return "-", "-", "-"
    return (
        f"{comparison.difference:+.4f} [{comparison.low:+.4f}, {comparison.high:+.4f}]",
        f"{comparison.p_holm:.4f}",
        f"{comparison.wins}/{comparison.ties}/{comparison.losses}",
    )


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "routehead-plugins": __version__,
        "python": platform.python_version(),
    }
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions
