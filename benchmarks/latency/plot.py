"""Draw time per query against number of documents.

python -m benchmarks.latency.plot benchmarks/results/latency-embedded-cpu.json
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import run

# The colours of Okabe and Ito, which colour-blind people can distinguish; solid lines for methods
# of this package, dashes for baselines.
STYLES = {
    "ours": ("#0072B2", "-"),
    "parallel-cold": ("#009E73", "-"),
    "parallel-warm": ("#56B4E9", "-"),
    "icr": ("#CC79A7", "-"),
    "handwritten": ("#D55E00", "--"),
    "likelihood": ("#E69F00", "--"),
    "listwise": ("#555555", "--"),
    "floor": ("#999999", ":"),
}
_APART = 0.045  # least distance of two labels, as a share of the axis


def plot_latency(results: Mapping[str, Any], path: Path) -> bool:
    """Draw time per query against number of documents, both logarithmic.

    Args:
        results: Results of ``benchmarks.latency.compare``.
        path: File to write; the suffix decides the format.

    Returns:
        Whether a plot was drawn: false without matplotlib, or with fewer than two sizes.
    """
    lines = _lines(results["sizes"])
    if max((len(points) for points in lines.values()), default=0) < 2:
        return False
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, points in lines.items():
        colour, dashes = STYLES.get(name, ("#000000", "-."))
        counts, low, middle, high = zip(*points, strict=True)
        axes.plot(counts, middle, dashes, color=colour, linewidth=2, marker="o", markersize=4)
        axes.fill_between(counts, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set(xscale="log", yscale="log", xlabel="documents", ylabel="seconds per query")
    sizes = sorted({point[0] for points in lines.values() for point in points})
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(_title(results), loc="left", fontsize=10)
    _label(axes, lines)
    # Equal figures give equal files.
    with mpl.rc_context({"svg.hashsalt": "routehead"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return True


def _lines(sizes: Mapping[str, Any]) -> dict[str, list[tuple[int, float, float, float]]]:
    """Return the points of every method: documents, minimum, median, maximum."""
    lines: dict[str, list[tuple[int, float, float, float]]] = {}
    for name in STYLES:
        for size, record in sizes.items():
            seconds = record["seconds"].get(name)
            if seconds is not None:
                point = (int(size), seconds["min"], seconds["median"], seconds["max"])
                lines.setdefault(name, []).append(point)
    return lines


def _label(axes: Any, lines: Mapping[str, Sequence[tuple[int, float, float, float]]]) -> None:
    """Write every method's name at the end of its line."""
    to_axes = axes.transData + axes.transAxes.inverted()
    last = max(points[-1][0] for points in lines.values())
    beside: list[tuple[float, str]] = []
    for name, points in lines.items():
        count, _, middle, _ = points[-1]
        across, height = to_axes.transform((count, middle))
        if count == last:
            beside.append((height, name))
        else:  # other lines continue to the right
            _write(axes, name, across, height + _APART)
    beside.sort()
    for (_, name), height in zip(beside, _spaced([height for height, _ in beside]), strict=True):
        _write(axes, name, 1.01, height, align="left")


def _write(axes: Any, name: str, across: float, height: float, *, align: str = "center") -> None:
    axes.annotate(
        name,
        xy=(across, height),
        xycoords="axes fraction",
        color=STYLES[name][0],
        fontsize=9,
        ha=align,
        va="center",
        annotation_clip=False,
    )


def _spaced(heights: Sequence[float]) -> list[float]:
    """Move the heights of labels, ascending, as little as needed to keep them apart."""
    spaced = list(heights)
    for _ in range(200):
        for lower in range(len(spaced) - 1):
            overlap = _APART - (spaced[lower + 1] - spaced[lower])
            if overlap > 1e-6:
                spaced[lower] -= overlap / 2
                spaced[lower + 1] += overlap / 2
    return spaced


def _title(results: Mapping[str, Any]) -> str:
    settings = results["settings"]
    machine = settings["machine"]
    processor = machine.get("gpu") or f"{machine['processor']}, {machine['threads']} threads"
    return (
        f"Time to re-rank documents of {settings['doc_tokens']} tokens\n"
        f"{settings['model']}, {results['dtype']}, {processor}"
    )


def main(
    files: Annotated[list[Path], typer.Argument(help="Results of benchmarks.latency.compare.")],
) -> None:
    """Draw time per query against number of documents, as SVG beside each file."""
    for file in files:
        target = file.with_suffix(".svg")
        drawn = plot_latency(json.loads(file.read_text(encoding="utf-8")), target)
        typer.echo(str(target) if drawn else f"{file}: nothing drawn")


if __name__ == "__main__":
    run(main)
