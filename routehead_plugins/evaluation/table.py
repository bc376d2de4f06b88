"""Lay the figures of several methods out in a table."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

from routehead_plugins import __version__
from routehead_plugins.errors import short_repr
from routehead_plugins.evaluation.measures import Evaluation
from routehead_plugins.evaluation.significance import Comparison, compare
from routehead_plugins.io import StrPath, atomic_write_text, encode_json

if TYPE_CHECKING:
    import rich.table

_PACKAGES = ("torch", "transformers", "ir_measures", "pytrec-eval-terrier", "scipy", "numpy")


@dataclass(frozen=True)
class ResultTable:
    """Methods by measures on one or more collections, with the settings to reproduce them.

    All methods raise ``InputError`` where ``comparisons`` does.

    Attributes:
        evaluations: Collection -> method -> evaluation.
        baseline: Name of the method that the others are compared with.
        settings: Options that the figures depend on: model, layout, depth, ...
        seed: Random seed of the significance tests.
        date: Date and time of the evaluation, in UTC.
    """

    evaluations: Mapping[str, Mapping[str, Evaluation]]
    baseline: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @cached_property
    def comparisons(self) -> dict[str, dict[str, list[Comparison]]]:
        """Collection -> measure -> comparison of each method with the baseline.

        Raises:
            InputError: The baseline is missing, or methods differ in measures or queries.
        """
        return {
            collection: {
                measure: compare(methods, self.baseline, measure, self.seed)
                for measure in next(iter(methods.values()), Evaluation({})).values
            }
            for collection, methods in self.evaluations.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Return everything, values per query included, as a dict for JSON."""
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
                        for comparison in chain.from_iterable(self.comparisons[collection].values())
                    ],
                }
                for collection, methods in self.evaluations.items()
            },
        }

    def write_json(self, path: StrPath) -> None:
        """Write `to_dict` as JSON; the file appears whole or not at all.

        Args:
            path: Path of the file.

        Raises:
            InputError: JSON cannot hold the settings, or the file cannot be written.
        """
        name = f"settings={short_repr(dict(self.settings))}"
        text = encode_json(self.to_dict(), name, indent=2, ensure_ascii=False, allow_nan=False)
        atomic_write_text(path, text + "\n")

    def to_markdown(self) -> str:
        """Lay out the means, and the comparisons by the first measure, in Markdown."""
        header, *rows = [[cell.replace("|", "\\|") for cell in row] for row in self._rows()]
        rule = ["---", "---", *["---:"] * (len(header) - 2)]
        return "".join(f"| {' | '.join(row)} |\n" for row in (header, rule, *rows))

    def to_rich(self) -> rich.table.Table:
        """Lay out the means, and the comparisons by the first measure, for the terminal."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        header, *rows = self._rows()
        # A terminal is narrow: the name of a single collection is the title, not a column.
        title = next(iter(self.evaluations)) if len(self.evaluations) == 1 else None
        start = 0 if title is None else 1
        table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)
        for column, name in enumerate(header[start:], start):
            table.add_column(Text(name), justify="left" if column < 2 else "right")
        for row in rows:
            # Text, since rich would take the interval's brackets for markup.
            table.add_row(*map(Text, row[start:]))
        return table

    def _rows(self) -> list[list[str]]:
        """Return the cells of the table; the first row is its header."""
        measures = list(dict.fromkeys(chain.from_iterable(self.comparisons.values())))
        first = measures[0] if measures else ""
        difference = f"{first} - {self.baseline} [95% CI]"
        header = ["collection", "method", *measures, difference, "p (Holm)", "win/tie/loss"]
        rows = [header]
        for collection, methods in self.evaluations.items():
            comparisons = {c.method: c for c in self.comparisons[collection].get(first, ())}
            for method, evaluation in methods.items():
                means = [f"{evaluation.mean(measure):.4f}" for measure in measures]
                rows.append([collection, method, *means, *_cells(comparisons.get(method))])
        return rows


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
