"""Medians, ratios and targets of the measured rounds, and their tables in Markdown."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.common import markdown_table

SHARE = "tap and scoring / ours"
# Name -> dividend and divisor.
RATIOS = {
    f"{above} / {below}": (above, below)
    for above, below in (
        ("ours", "floor"),
        ("floor", "flops"),
        ("handwritten", "ours"),
        ("icr", "ours"),
        ("parallel-cold", "ours"),
        ("ours", "parallel-warm"),
        ("likelihood", "ours"),
        ("likelihood", "parallel-cold"),
        ("likelihood", "parallel-warm"),
        ("listwise", "ours"),
        ("late-index", "tail"),
        ("late-warm", "tail"),
        ("late-cold", "parallel-cold"),
        ("parallel-warm", "late-index"),
        ("likelihood", "late-index"),
    )
}
_MEMORY = "memory: "
_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    "<": operator.lt,
    ">=": operator.ge,
}


@dataclass(frozen=True)
class Target:
    """A target for a ratio.

    Attributes:
        ratio: A name from ``RATIOS``, ``SHARE``, or ``"memory: a / b"``.
        sign: Required comparison of the median with the bound.
        bound: The bound.
        sizes: Numbers of documents that the target is for.
    """

    ratio: str
    sign: str
    bound: float
    sizes: tuple[int, ...]


TARGETS = (
    Target("ours / floor", "<=", 1.10, (20, 50, 100)),
    Target(SHARE, "<", 0.08, (10, 20, 50, 100)),
    Target("handwritten / ours", ">=", 4.0, (50,)),
    Target("parallel-cold / ours", "<=", 1.0, (20,)),
    Target("parallel-cold / ours", "<", 1.0, (50, 100)),
    Target("late-index / tail", "<=", 1.5, (100,)),
    Target("late-index / tail", "<=", 3.0, (1000,)),
    Target("parallel-warm / late-index", ">=", 2.0, (100,)),
    Target("parallel-warm / late-index", ">=", 6.0, (1000,)),
    Target("likelihood / late-index", ">=", 50.0, (100,)),
    Target("likelihood / parallel-cold", ">=", 1.4, (10, 20, 50, 100)),
    Target("ours / parallel-warm", ">=", 8.0, (100,)),
    Target("likelihood / parallel-warm", ">=", 10.0, (100,)),
    Target(f"{_MEMORY}ours / handwritten", "<=", 0.25, (50,)),
)


def spread(values: Iterable[float]) -> dict[str, float]:
    """Return median, minimum and maximum."""
    numbers = list(values)
    return {"median": median(numbers), "min": min(numbers), "max": max(numbers)}


def summarise(record: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Compute medians and ratios of one size; ``None`` where a method did not run.

    Args:
        record: Record with ``rounds``, a list of seconds per method, and ``flops``.
        names: All methods that were requested.
    """
    rounds = record["rounds"]
    count = max(map(len, rounds.values()), default=0)
    rounds = {**rounds, "flops": [record["flops"]["seconds"]] * count}
    ratios = {
        # A method that was timed once is compared with the first round of the others.
        name: spread(a / b for a, b in zip(rounds[above], rounds[below], strict=False))
        for name, (above, below) in RATIOS.items()
        if count and above in rounds and below in rounds
    }
    if {"ours", "tails", "tails-untapped"} <= set(rounds):
        triples = zip(rounds["tails"], rounds["tails-untapped"], rounds["ours"], strict=True)
        ratios[SHARE] = spread((tapped - bare) / ours for tapped, bare, ours in triples)
    seconds = {name: spread(rounds[name]) if name in rounds else None for name in names}
    return {"seconds": seconds, "ratios": ratios}


def targets(sizes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Compare every target with the measured ratio, given size, as text -> its record."""
    rows = []
    for target in TARGETS:
        for size in target.sizes:
            ratio, reason = _measured(target.ratio, sizes.get(str(size)))
            if ratio is None:
                verdict = f"not measured: {reason}"
            else:
                met = _OPERATORS[target.sign](ratio["median"], target.bound)
                verdict = "met" if met else "not met"
            rows.append(
                {
                    "ratio": target.ratio,
                    "documents": size,
                    "target": f"{target.sign} {target.bound:g}",
                    "measured": ratio,
                    "verdict": verdict,
                }
            )
    return rows


def _measured(ratio: str, record: Mapping[str, Any] | None) -> tuple[dict[str, float] | None, str]:
    """Return median and spread of a ratio, or the reason why there is none."""
    if record is None:
        return None, "this size was not run"
    above, below = ratio.removeprefix(_MEMORY).split(" / ")
    reasons = record["skipped_memory"] | record["skipped"]
    why = [f"{name}: {reason}" for name, reason in reasons.items() if name in (above, below)]
    reason = "; ".join(why) or "it was not requested"
    if ratio.startswith(_MEMORY):
        bytes_of = record["memory"]
        if above not in bytes_of or not bytes_of.get(below):
            return None, reason
        return spread([bytes_of[above] / bytes_of[below]]), ""
    return record["ratios"].get(ratio), reason


def markdown(results: Mapping[str, Any]) -> str:
    """Lay out all tables, and the reasons why figures are missing."""
    sizes = results["sizes"]
    methods = results["settings"]["methods"]
    ratios = dict.fromkeys(name for record in sizes.values() for name in record["ratios"])
    memory = dict.fromkeys(name for record in sizes.values() for name in record["memory"])
    parts = [
        _table("Seconds per query", methods, sizes, lambda r, n: _spread_text(r["seconds"].get(n))),
        _table("Ratios", ratios, sizes, lambda r, n: _spread_text(r["ratios"].get(n))),
        _table("Peak over the model, MB", memory, sizes, lambda r, n: _mb(r["memory"].get(n))),
        _target_table(results["targets"]),
        _reasons(sizes),
    ]
    settings = results["settings"]
    machine = settings["machine"]
    about = (
        f"{settings['model']}, {results['dtype']}, {machine.get('gpu') or machine['processor']}, "
        f"{machine['threads']} threads; median (least to most) of {settings['repeats']} rounds; "
        f"{results['date']}"
    )
    return "\n\n".join([about, *(part.rstrip() for part in parts if part)])


def _table(
    title: str,
    rows: Iterable[str],
    sizes: Mapping[str, Any],
    cell: Callable[[Mapping[str, Any], str], str],
) -> str:
    cells = [[name, *(cell(record, name) for record in sizes.values())] for name in rows]
    header = [title, *(f"{size} documents" for size in sizes)]
    return markdown_table([header, *cells]) if cells else ""


def _target_table(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [["Target", "documents", "bound", "measured", "verdict"]]
    for row in rows:
        measured = _spread_text(row["measured"])
        cells.append([row["ratio"], str(row["documents"]), row["target"], measured, row["verdict"]])
    return markdown_table(cells)


def _reasons(sizes: Mapping[str, Any]) -> str:
    """Write a line for every figure that is missing, and for every choice."""
    lines = [
        f"- {name}, {size} documents: not measured, {reason}"
        for size, record in sizes.items()
        for name, reason in record["skipped"].items()
    ]
    lines += [
        f"- {name}, {size} documents: "
        + ", ".join(f"{key} {value}" for key, value in notes.items() if not isinstance(value, dict))
        for size, record in sizes.items()
        for name, notes in record["notes"].items()
    ]
    return "\n".join(lines)


def _spread_text(spread: Mapping[str, float] | None) -> str:
    if spread is None:
        return "-"
    if spread["min"] == spread["max"]:
        return f"{spread['median']:.3g}"
    return f"{spread['median']:.3g} ({spread['min']:.3g} to {spread['max']:.3g})"


def _mb(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:,.0f}"
