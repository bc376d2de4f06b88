"""README and documentation as their tests read them: blocks, links, commands and tables."""

from __future__ import annotations

import contextlib
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))

_BLOCK = re.compile(r"(?:<!-- not run: (.+?) -->\n)?```python\n(.*?)```", re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A block of Python on a page.

    Attributes:
        code: The code; comments at the start of a line are what it prints.
        not_run: Why it cannot run here, from the comment above it; ``None`` if it can.
    """

    code: str
    not_run: str | None

    @property
    def expected(self) -> list[str]:
        """Lines that the block prints."""
        return [line[2:] for line in self.code.splitlines() if line.startswith("# ")]

    def run(self, names: dict[str, Any]) -> list[str]:
        """Run the block.

        Args:
            names: Variables of the blocks before it; extended.

        Returns:
            The lines it printed.
        """
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(self.code, "page", "exec"), names)
        return printed.getvalue().splitlines()


def python_blocks(path: Path) -> list[Block]:
    """Return the Python blocks of a page, in order."""
    return [Block(code, reason or None) for reason, code in _BLOCK.findall(path.read_text())]


def in_one_line(path: Path) -> str:
    """Return the text of a page without line breaks, to look sentences up."""
    return " ".join(path.read_text().split())


def broken_links(path: Path) -> list[str]:
    """Return the links of a page to files or headings that do not exist."""
    broken = []
    for link in _LINK.findall(path.read_text()):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            broken.append(link)
    return broken


def _anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site name them."""
    headings = (heading.lower() for heading in _HEADING.findall(path.read_text()))
    return {re.sub(r"[^\w\s-]", "", heading).strip().replace(" ", "-") for heading in headings}


def table(path: Path, header: str) -> list[list[str]]:
    """Return the rows of a table as cells.

    Args:
        path: The page.
        header: First line of the table, without the bars at its ends.
    """
    pattern = rf"^\| {re.escape(header)} \|\n\|[-| ]+\n((?:\|.+\n?)+)"
    match = re.search(pattern, path.read_text(), re.MULTILINE)
    assert match is not None, header
    return [
        [cell.strip() for cell in row.removeprefix("|").removesuffix("|").split("|")]
        for row in match[1].splitlines()
    ]


def results(name: str) -> dict[str, Any]:
    """Return the content of a result file of the benchmarks."""
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    return cast(dict[str, Any], json.loads(path.read_text()))


def comparison(
    comparisons: list[dict[str, Any]], method: str, baseline: str, measure: str | None = None
) -> dict[str, Any]:
    """Return the comparison of two methods.

    Args:
        comparisons: Comparisons of a result file.
        method: The method.
        baseline: What it is compared with.
        measure: By which measure; ``None`` where there is only one.
    """
    (match,) = (
        one
        for one in comparisons
        if (one["method"], one["baseline"]) == (method, baseline)
        and measure in (None, one["measure"])
    )
    return match
