"""`routehead inspect`: what a router is, and which heads it reads for which queries."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from routehead_plugins.cli.runtime import ModelOptions, err
from routehead_plugins.errors import CollectionError, InputError, missing_extra
from routehead_plugins.heads import HeadSet
from routehead_plugins.io import (
    BUNDLED,
    TOPICS_FILE,
    atomic_write_bytes,
    atomic_write_text,
    make_folder,
    read_topics,
)
from routehead_plugins.selection import Router
from routehead_plugins.selection import router_files as files
from routehead_plugins.training import Inspection, Use, sampled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Inspection", "InspectionJob", "Use", "render", "run_inspection"]

_SHOWN = 20  # heads
_SUFFIXES = (".svg", ".png")
_CELL = 0.19  # inches


@dataclass(frozen=True, kw_only=True)
class InspectionJob:
    """What to inspect, and on what.

    Attributes:
        router: A folder, or the id of a repository on the Hub.
        collections: Folders with ``queries.jsonl``, of which nothing else is read; none for the
            bundled queries.
        queries: How many of each collection at most, drawn by the seed; ``None`` for all, 0 for
            what can be said without queries, and without the LLM.
        plot: Where to draw which heads are read, as ``.svg`` or ``.png``.
        output: Where to write the figures, as JSON.
        model: The LLM; ``None`` for the one that the router was trained for.
        device: ``None`` picks one.
        dtype: ``"auto"`` picks one.
        seed: Of everything that is drawn.
    """

    router: str
    collections: Sequence[Path] = ()
    queries: int | None = None
    plot: Path | None = None
    output: Path | None = None
    model: str | None = None
    device: str | None = None
    dtype: str = "auto"
    seed: int = 0


def run_inspection(job: InspectionJob) -> Inspection:
    """Load a router, route queries, write what is asked for.

    Raises:
        InputError: An option is out of range, or a file cannot be written.
        ModelLoadError: The router or the LLM cannot be loaded.
        RouterMismatchError: The router was trained for another LLM.
        CollectionError: Queries cannot be read.
        MissingExtraError: matplotlib is not installed, and a plot is asked for.
    """
    _check(job)
    router = Router.from_pretrained(job.router)
    size = (files.locate(job.router, local_files_only=True) / files.TENSORS_FILE).stat().st_size
    uses = [] if job.queries == 0 else _uses(job, router)
    inspection = Inspection(job.router, router, size, uses, job.seed)
    if job.output is not None:
        make_folder(job.output.parent, "figures")
        text = json.dumps(inspection.as_json(), indent=1, ensure_ascii=False)
        atomic_write_text(job.output, text + "\n")
    if job.plot is not None:
        make_folder(job.plot.parent, "plots")
        _draw(inspection, job.plot)
    return inspection


def _check(job: InspectionJob) -> None:
    """Refuse what cannot work before anything is loaded."""
    if job.queries is not None and job.queries < 0:
        raise InputError(f"queries={job.queries!r} is no number of queries; give 0 or more.")
    for path in (job.plot, job.output):
        if path is not None and path.is_dir():
            raise InputError(f"{path} is a folder; name a file.")
    names = [path.resolve().name for path in job.collections]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise InputError(
            f"two collections are called {repeated[0]!r}; give each once, or rename one."
        )
    if job.plot is not None:
        _check_plot(job.plot, job.queries)


def _check_plot(path: Path, queries: int | None) -> None:
    if path.suffix.lower() not in _SUFFIXES:
        raise InputError(f"{path} is of no kind that can be drawn; name an .svg or .png file.")
    if queries == 0:
        raise InputError("queries=0 leaves nothing to draw; give more, or leave the plot out.")
    try:
        import matplotlib  # noqa: F401  now, not after minutes of work
    except ImportError as error:
        raise missing_extra(error, "plot") from error


def _uses(job: InspectionJob, router: Router) -> list[Use]:
    """Route the queries of every collection."""
    found = {}
    for path in job.collections or [BUNDLED]:
        name = path.resolve().name
        topics = read_topics(path / TOPICS_FILE)
        if not topics:
            raise CollectionError(f"{path / TOPICS_FILE} holds no queries; expected some to route.")
        found[name] = sampled(topics, job.queries, f"{job.seed} {name}")
    options = ModelOptions(job.model or router.heads.model or "embedded", job.device, job.dtype)
    # A router that tells no queries apart does not need them embedded, but how familiar they are.
    llm = options.load(router if router.routes else None)
    uses = []
    for name, texts in found.items():
        with err.status(f"{name}: embedding {len(texts)} queries ..."):
            uses.append(Use.of(name, router, router.embed(texts, llm)))
    return uses


def render(inspection: Inspection) -> Group:
    """Lay an inspection out for the terminal.

    Args:
        inspection: What ``run_inspection`` found.
    """
    tables = {}
    if inspection.uses:
        tables["Heads that are read most"] = _used(inspection)
        tables["Queries"] = _collections(inspection)
    else:
        tables["Heads with the largest static bias"] = _static(inspection)
    for measure, what in (("jaccard", "sets of heads (Jaccard)"), ("cosine", "weights (cosine)")):
        if measure in inspection.distances:
            tables[f"Mean distance of queries' {what}"] = _distances(inspection, measure)
    # Titles of tables are broken at the table's width.
    parts = [part for title, table in tables.items() for part in (Text(title), table)]
    return Group(_facts(inspection), Text(), *parts, Text(inspection.verdict() or ""))


def _table(*columns: str) -> Table:
    """A table whose first column is text and whose others are numbers."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for place, column in enumerate(columns):
        table.add_column(Text(column), justify="right" if place else "left")
    return table


def _facts(inspection: Inspection) -> Table:
    facts, router = inspection.facts(), inspection.router
    weights = router.reading == "weights"
    loaded = router.layers(facts["deepest_layer"] + 1)
    rows = {
        "router": facts["router"],
        "kind": f"{facts['kind']}, read as {facts['reading']}",
        "LLM": facts["model"] or "not recorded",
        "layout": facts["layout"] or "any",
        "trained on": facts["data"] or "not recorded",
        "documents cut at": f"{facts['max_doc_tokens']} tokens" if router.max_doc_tokens else "-",
        "signals": facts["aggregation"] or "mean, outliers dropped",
        "first-stage weight": _number(facts["first_stage_weight"]),
        "queries embedded": f"after layer {router.space.layer}, {router.space.pooling}; "
        f"{facts['anchors']} anchors",
        "heads at most, P": str(router.max_heads or "all"),
        "threshold": f"{router.threshold:g}",
        "heads to choose from": f"{facts['candidate_heads']}, {facts['nonzero_bias']} with a "
        f"{'weight' if weights else 'bias'} of their own; {facts['static_heads']} where nothing "
        "is known of the query",
        "depth": f"layer {facts['deepest_layer']} at most; {loaded} layers are loaded",
        "size": f"{facts['bytes'] / 1000:.1f} KB",
        **{str(key): _written(value) for key, value in (router.description or {}).items()},
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in rows.items():
        table.add_row(Text(name), Text(str(value)))
    return table


def _static(inspection: Inspection) -> Table:
    table = _table("head", "bias")
    for head, bias in inspection.static_heads(_SHOWN):
        table.add_row(head, f"{bias:+.4f}")
    return table


def _used(inspection: Inspection) -> Table:
    names = [use.name for use in inspection.uses]
    several = names if len(names) > 1 else []
    signed = inspection.router.reading == "weights"
    weight = ["mean weight"] if signed else []
    table = _table("head", "queries", *several, *weight, "static bias")
    for row in inspection.used_heads(_SHOWN):
        shares = [row["share"], *(row["collections"][name] for name in several)]
        weights = [f"{row['mean_weight']:+.4f}"] if signed else []
        cells = [*(f"{share:.1%}" for share in shares), *weights, f"{row['bias']:+.4f}"]
        table.add_row(row["head"], *cells)
    return table


def _collections(inspection: Inspection) -> Table:
    table = _table(
        *("collection", "queries", "head sets", "heads: mean", "min", "max", "layers"),
        *("familiarity", "wholly static"),
    )
    for use in inspection.uses:
        found = use.figures()
        table.add_row(
            Text(use.name),
            *(str(found[key]) for key in ("queries", "head_sets")),
            f"{found['heads_mean']:.1f}",
            *(str(found[key]) for key in ("heads_min", "heads_max")),
            f"{found['layers_mean']:.1f}",
            f"{found['familiarity']:.3f}",
            f"{found['wholly_static']:.1%}",
        )
    return table


def _distances(inspection: Inspection, measure: str) -> Table:
    names = [use.name for use in inspection.uses]
    table = _table("", *(names if len(names) > 1 else ["within"]))
    for name, row in zip(names, inspection.distances[measure], strict=True):
        table.add_row(Text(name), *("-" if each is None else f"{each:.4f}" for each in row))
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _draw(inspection: Inspection, path: Path) -> None:
    """Draw layers by heads, one panel for each collection: the share of queries that read each."""
    import matplotlib as mpl
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    grids = [_grid(inspection.router.heads, use.share) for use in inspection.uses]
    rows, columns = grids[0].shape
    height = max(1.3, rows * _CELL) + 0.75
    figure = Figure(
        figsize=(max(5.0, columns * _CELL + 2.2), len(grids) * height + 0.4), layout="constrained"
    )
    panels = list(figure.subplots(len(grids), squeeze=False)[:, 0])
    for axes, use, cells in zip(panels, inspection.uses, grids, strict=True):
        mesh = axes.pcolormesh(
            cells.numpy(), norm=Normalize(0, 1), cmap="viridis", edgecolors="w", linewidth=0.4
        )
        _label(axes, rows, columns)
        # A name is no formula, whatever dollars it holds.
        title = f"{use.name}: {len(use.read)} queries"
        axes.set_title(title, loc="left", fontsize=9, parse_math=False)
    bar = figure.colorbar(mesh, ax=panels, pad=0.06, aspect=25 * len(grids), fraction=0.05)
    bar.set_label("share of queries that read the head", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    buffer = io.BytesIO()
    # The same file for the same figures; text stays text.
    with mpl.rc_context({"svg.hashsalt": "routehead", "svg.fonttype": "none"}):
        kind = path.suffix.lower().removeprefix(".")
        figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
    atomic_write_bytes(path, buffer.getvalue())


def _grid(heads: HeadSet, share: Tensor) -> Tensor:
    """Lay shares out: a row for each number of head, a column for each layer; nan for no head."""
    cells = torch.full((1 + max(index for _, index in heads), heads.last_layer + 1), torch.nan)
    for (layer, index), value in zip(heads, share.tolist(), strict=True):
        cells[index, layer] = value
    return cells


def _label(axes: Axes, rows: int, columns: int) -> None:
    for axis, count, name in ((axes.xaxis, columns, "layer"), (axes.yaxis, rows, "head")):
        places = range(0, count, 1 if count <= 12 else 5)
        axis.set_ticks([place + 0.5 for place in places])
        axis.set_ticklabels([str(place) for place in places])
        axis.set_label_text(name)
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    axes.set_aspect("equal")
