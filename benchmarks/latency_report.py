"""Rounds to medians, ratios, targets met or not, and Markdown."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

SHARE = "tap and scoring / ours"
# Name -> what is divided by what.
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
    """A promise about a ratio.

    Attributes:
        ratio: A name from ``RATIOS``, ``SHARE``, or ``"memory: a / b"``.
        sign: How the median must compare with the bound.
        bound: The bound.
        sizes: Numbers of documents for which it is promised.
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
    Target("likelihood / parallel-cold", ">=", 1.4, (10, 20, 50, 100)),
    Target("ours / parallel-warm", ">=", 8.0, (100,)),
    Target("likelihood / parallel-warm", ">=", 10.0, (100,)),
    Target(f"{_MEMORY}ours / handwritten", "<=", 0.25, (50,)),
)


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, least and most."""
    found = list(values)
    return {"median": median(found), "min": min(found), "max": max(found)}


def summarise(record: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Medians and ratios of one size; ``None`` where a method did not run.

    Args:
        record: With ``rounds``, one list of seconds per method, and ``flops``.
        names: All methods that were asked for.
    """
    rounds = record["rounds"]
    turns = max(map(len, rounds.values()), default=0)
    rounds = {**rounds, "flops": [record["flops"]["seconds"]] * turns}
    ratios = {
        # A method that was timed once is compared with the first round of the others.
        name: spread(a / b for a, b in zip(rounds[above], rounds[below], strict=False))
        for name, (above, below) in RATIOS.items()
        if turns and above in rounds and below in rounds
    }
    if {"ours", "tails", "tails-untapped"} <= set(rounds):
        turn = zip(rounds["tails"], rounds["tails-untapped"], rounds["ours"], strict=True)
        ratios[SHARE] = spread((tapped - bare) / ours for tapped, bare, ours in turn)
    seconds = {name: spread(rounds[name]) if name in rounds else None for name in names}
    return {"seconds": seconds, "ratios": ratios}


def targets(sizes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Compare every target with what was measured.

    Args:
        sizes: Number of documents, as text -> record of that size.
    """
    rows = []
    for target in TARGETS:
        for size in target.sizes:
            found, reason = _measured(target.ratio, sizes.get(str(size)))
            row: dict[str, Any] = {
                "ratio": target.ratio,
                "documents": size,
                "target": f"{target.sign} {target.bound:g}",
                "measured": found,
            }
            if found is None:
                row["verdict"] = f"not measured: {reason}"
            else:
                met = _OPERATORS[target.sign](found["median"], target.bound)
                row["verdict"] = "met" if met else "not met"
            rows.append(row)
    return rows


def _measured(ratio: str, record: Mapping[str, Any] | None) -> tuple[dict[str, float] | None, str]:
    """Median and spread of a ratio, or the reason why there is none."""
    if record is None:
        return None, "this size was not run"
    above, below = ratio.removeprefix(_MEMORY).split(" / ")
    reasons = record["skipped_memory"] | record["skipped"]
    why = [f"{name}: {reason}" for name, reason in reasons.items() if name in (above, below)]
    reason = "; ".join(why) or "it was not asked for"
    if ratio.startswith(_MEMORY):
        bytes_of = record["memory"]
        if above not in bytes_of or not bytes_of.get(below):
            return None, reason
        return spread([bytes_of[above] / bytes_of[below]]), ""
    return record["ratios"].get(ratio), reason


def markdown(results: Mapping[str, Any]) -> str:
    """All tables, and why anything is missing from them."""
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
    return "\n\n".join([about, *(part for part in parts if part)])


def _table(
    title: str,
    rows: Iterable[str],
    sizes: Mapping[str, Any],
    cell: Callable[[Mapping[str, Any], str], str],
) -> str:
    lines = [
        "| " + " | ".join([name, *(cell(record, name) for record in sizes.values())]) + " |"
        for name in rows
    ]
    if not lines:
        return ""
    head = "| " + " | ".join([title, *(f"{size} documents" for size in sizes)]) + " |"
    return "\n".join([head, "| --- |" + " ---: |" * len(sizes), *lines])


def _target_table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| Target | documents | promised | measured | |", "| --- | ---: | --- | ---: | --- |"]
    for row in rows:
        measured = _spread_text(row["measured"])
        cells = (row["ratio"], row["documents"], row["target"], measured, row["verdict"])
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _reasons(sizes: Mapping[str, Any]) -> str:
    """One line for everything that was left out, and for what was chosen."""
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


def _spread_text(found: Mapping[str, float] | None) -> str:
    if found is None:
        return "-"
    if found["min"] == found["max"]:
        return f"{found['median']:.3g}"
    return f"{found['median']:.3g} ({found['min']:.3g} to {found['max']:.3g})"


def _mb(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:,.0f}"
