"""What a check found, and its table in Markdown."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import markdown_table


@dataclass(frozen=True)
class Outcome:
    """The end of one check.

    Attributes:
        passed: Whether everything was as promised.
        summary: The figures in one line.
        figures: The figures, as JSON.
    """

    passed: bool
    summary: str
    figures: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON."""
        return {"passed": self.passed, "summary": self.summary, **self.figures}


@dataclass(frozen=True)
class Sizes:
    """How much each check does.

    Attributes:
        cases: Damaged files, over all kinds.
        kills: Kills of each command.
        calls: Calls in each layout, shared among the threads.
        queries: Queries of the soak.
    """

    cases: int = 10_000
    kills: int = 50
    calls: int = 1000
    queries: int = 2000


def machine() -> dict[str, Any]:
    """Describe the computer that a check ran on."""
    return {
        "system": platform.system(),
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def table(checks: Mapping[str, Mapping[str, Any]]) -> str:
    """Format the outcomes of checks as Markdown.

    Args:
        checks: Name -> what `Outcome.to_dict` returns.
    """
    rows = [["check", "figures", "passed"]]
    for name, check in checks.items():
        rows.append([name, check["summary"], "yes" if check["passed"] else "**no**"])
    return markdown_table(rows)


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
