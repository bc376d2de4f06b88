"""Draw the ranking quality of every attention head alone.

python -m benchmarks.heads.heatmap benchmarks/results/compare-dl21.json
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import run
from routehead_plugins import HeadSet

_BEST = 8  # heads that are framed
_FRAME = "#D55E00"  # the colour of Okabe and Ito that differs most from viridis
_CELL = 0.19  # inches


def plot_heads(name: str, layouts: Mapping[str, Any], path: Path) -> bool:
    """Draw layers by heads, one panel for each layout, all on the same colour scale.

    Args:
        name: Name of the collection.
        layouts: Layout -> ``heads``, nDCG@10 by head (``"13-18"``), and ``beside``, nDCG@10 by
            method, ``bm25`` among them.
        path: File to write; the suffix decides the format.

    Returns:
        Whether anything was drawn: false without matplotlib, or without figures.
    """
    if not layouts:
        return False
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        return False
    grids = {layout: grid(content["heads"]) for layout, content in layouts.items()}
    first = next(iter(grids.values()))
    height = max(1.3, len(first) * _CELL) + 0.75
    figure = Figure(
        figsize=(max(5.0, len(first[0]) * _CELL + 2.2), len(grids) * height + 0.4),
        layout="constrained",
    )
    panels = figure.subplots(len(grids), squeeze=False)[:, 0]
    reference = next(iter(layouts.values()))["beside"]["bm25"]
    values = [value for content in layouts.values() for value in content["heads"].values()]
    shades = mpl.colors.Normalize(min(*values, reference), max(*values, reference))
    for axes, (layout, cells) in zip(panels, grids.items(), strict=True):
        mesh = axes.pcolormesh(cells, norm=shades, cmap="viridis", edgecolors="w", linewidth=0.4)
        _panel(axes, cells, layouts[layout]["heads"])
        axes.set_title(_caption(layout, layouts[layout]), loc="left", fontsize=9)
    bar = figure.colorbar(mesh, ax=list(panels), pad=0.06, aspect=25 * len(grids), fraction=0.05)
    bar.set_label("nDCG@10 of the head alone", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.ax.axhline(reference, color="black", linewidth=1.5)
    bar.ax.text(-0.3, reference, "bm25", ha="right", va="center", fontsize=8)
    bar.outline.set_visible(False)
    title = f"{name}: every attention head alone; the {_BEST} best are framed"
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    # Equal figures give equal files; text stays text.
    with mpl.rc_context({"svg.hashsalt": "routehead", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return True


def grid(heads: Mapping[str, float]) -> list[list[float]]:
    """Arrange ``layer-head`` -> figure by head index and layer; nan if missing."""
    named = HeadSet.parse(",".join(heads))
    rows = 1 + max(index for _, index in named)
    cells = [[math.nan] * (named.last_layer + 1) for _ in range(rows)]
    for (layer, index), value in zip(named, heads.values(), strict=True):
        cells[index][layer] = value
    return cells


def best_heads(heads: Mapping[str, float], count: int = _BEST) -> HeadSet:
    """Return the heads with the largest figures, best first."""
    ordered = sorted(heads, key=lambda head: -heads[head])
    return HeadSet.parse(",".join(ordered[:count]))


def _panel(axes: Any, cells: list[list[float]], heads: Mapping[str, float]) -> None:
    """Label the axes and frame the best heads."""
    for number, row, name in ((0, cells[0], "layer"), (1, cells, "head")):
        axis = (axes.xaxis, axes.yaxis)[number]
        step = 1 if len(row) <= 12 else 5
        axis.set_ticks([index + 0.5 for index in range(0, len(row), step)])
        axis.set_ticklabels([str(index) for index in range(0, len(row), step)])
        axis.set_label_text(name)
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    axes.set_aspect("equal")
    for layer, index in best_heads(heads):
        across, up = (layer, layer + 1), (index, index + 1)
        corners = ([across[i] for i in (0, 1, 1, 0, 0)], [up[i] for i in (0, 0, 1, 1, 0)])
        axes.plot(*corners, color=_FRAME, linewidth=1.5, clip_on=False)


def _caption(layout: str, content: Mapping[str, Any]) -> str:
    (best,) = best_heads(content["heads"], 1)
    beside = "; ".join(f"{name} {value:.3f}" for name, value in content["beside"].items())
    return f"{layout} layout: head {best} {content['heads'][str(best)]:.3f}; {beside}"


def main(
    files: Annotated[list[Path], typer.Argument(help="Results of benchmarks.heads.compare.")],
) -> None:
    """Draw the heads of each file, as SVG beside it."""
    for file in files:
        name = file.stem.removeprefix("compare-")
        target = file.with_name(f"heatmap-{name}.svg")
        content = json.loads(file.read_text(encoding="utf-8"))
        drawn = plot_heads(name, content.get("single_heads", {}), target)
        typer.echo(str(target) if drawn else f"{file}: nothing drawn")


if __name__ == "__main__":
    run(main)
