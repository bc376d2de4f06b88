"""Read damaged files of every kind."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from fuzzing import (
    KINDS,
    LONGEST_MESSAGE,
    FileKind,
    check_read,
    damaged_files,
    journal_kind,
    signals_kind,
)

from benchmarks.trust.report import Outcome, Sizes

# No file of a few megabytes may take longer to refuse, in seconds.
_LONGEST = 30.0


def check_fuzz(folder: Path, sizes: Sizes, seed: int) -> Outcome:
    """Read damaged files; each is read, or refused with one short line of an error of ours."""
    kinds = {
        **KINDS,
        "log of finished queries": journal_kind(folder),
        "signals": signals_kind(folder),
    }
    share, rest = divmod(sizes.cases, len(kinds))
    figures: dict[str, Any] = {}
    failures: list[str] = []
    for number, (name, kind) in enumerate(kinds.items()):
        figures[name] = _read_all(name, kind, folder, seed, share + (number < rest), failures)
    cases = sum(figure["cases"] for figure in figures.values())
    refused = sum(figure["refused"] for figure in figures.values())
    longest = max(figure["longest message"] for figure in figures.values())
    slowest = max(figure["slowest case, s"] for figure in figures.values())
    return Outcome(
        not failures and longest <= LONGEST_MESSAGE and slowest < _LONGEST,
        f"{cases:,} damaged files of {len(kinds)} kinds: {refused:,} refused, "
        f"{len(failures)} raw errors or damaged content believed; longest message {longest} "
        f"characters, slowest case {slowest:.2f} s",
        {"kinds": figures, "failures": failures[:20]},
    )


def _read_all(
    name: str, kind: FileKind, folder: Path, seed: int, count: int, failures: list[str]
) -> dict[str, Any]:
    refused, longest, slowest = 0, 0, 0.0
    for index, content in enumerate(damaged_files(kind, seed, count)):
        start = time.perf_counter()
        try:
            error = check_read(kind, content, folder)
        # Whatever a reader raises is what is looked for.
        except Exception as raw:  # noqa: BLE001
            failures.append(f"{name}, case {index}: {type(raw).__name__}: {str(raw)[:200]}")
            error = None
        slowest = max(slowest, time.perf_counter() - start)
        if error is not None:
            refused += 1
            longest = max(longest, len(str(error)))
    return {
        "cases": count,
        "refused": refused,
        "longest message": longest,
        "slowest case, s": round(slowest, 3),
    }
