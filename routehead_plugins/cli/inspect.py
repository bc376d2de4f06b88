"""`routehead inspect`: describe a router, and which heads it reads for which queries."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from routehead_plugins.cli.options import with_options
from routehead_plugins.cli.runtime import (
    ROUTER_FILES,
    check_minimum,
    check_names,
    check_new_file,
    err,
    load_llm,
)
from routehead_plugins.errors import CollectionError, InputError, missing_extra
from routehead_plugins.io import (
    BUNDLED,
    TOPICS_FILE,
    atomic_write_bytes,
    atomic_write_text,
    make_folder,
    read_topics,
)
from routehead_plugins.options import RerankerOptions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

    from routehead_plugins.backbone import FrozenLM
    from routehead_plugins.heads import HeadSet
    from routehead_plugins.selection import Router
    from routehead_plugins.training import Inspection, Use

_MAX_ROWS = 20  # heads
_PLOT_SUFFIXES = (".svg", ".png")
_CELL = 0.19  # inches


@dataclass(frozen=True)
class InspectArguments:
    """Arguments and options of `routehead inspect`."""

    router: Annotated[str, typer.Argument(help="A folder from `routehead train`, or a Hub id.")]
    collection: Annotated[
        list[Path] | None,
        "Folder with queries.jsonl, to route. Can be repeated.  [default: the bundled queries]",
    ] = None
    queries: Annotated[
        int | None, "Maximum queries per collection; 0 does not load the LLM.  [default: all]"
    ] = None
    plot: Annotated[Path | None, "Plot of the heads that are read: an .svg or .png file."] = None
    output: Annotated[Path | None, "Output file of the figures, as JSON."] = None
    model: Annotated[str | None, "The LLM.  [default: the one the router was trained for]"] = None


@with_options("adapter", "revision", "trust_remote_code", "device", "dtype")
def inspect(arguments: InspectArguments, options: RerankerOptions) -> None:
    """Show which heads a router reads, how often, and how much queries differ.

    Example: routehead inspect my-router --collection beir/nq --plot heads.svg
    """
    Console().print(render(inspect_router(arguments, options)))


def inspect_router(
    arguments: InspectArguments, options: RerankerOptions, seed: int = 0
) -> Inspection:
    """Load a router, route queries that the seed draws, and write the figures and the plot."""
    from routehead_plugins.selection import Router, router_size
    from routehead_plugins.training import Inspection

    _check(arguments)
    router = Router.from_pretrained(arguments.router)
    options = replace(options, model=arguments.model or router.heads.model or options.model)
    uses = [] if arguments.queries == 0 else _uses(arguments, router, options, seed)
    inspection = Inspection(arguments.router, router, router_size(arguments.router), uses, seed)
    if arguments.output is not None:
        make_folder(arguments.output.parent, "figures")
        text = json.dumps(inspection.as_json(), indent=1, ensure_ascii=False)
        atomic_write_text(arguments.output, text + "\n")
    if arguments.plot is not None:
        make_folder(arguments.plot.parent, "plots")
        _draw(inspection, arguments.plot)
    return inspection


def _check(arguments: InspectArguments) -> None:
    """Check the arguments before anything is read or loaded."""
    check_minimum("--queries", arguments.queries, 0)
    collections = arguments.collection or []
    check_names(collections)
    inputs = [path / TOPICS_FILE for path in collections]
    inputs += [Path(arguments.router) / name for name in ROUTER_FILES]
    for option, path in (("--plot", arguments.plot), ("--output", arguments.output)):
        check_new_file(option, path, inputs)
    if arguments.plot is not None and arguments.plot == arguments.output:
        raise InputError(f"--plot and --output are both {arguments.plot}; name two files.")
    if arguments.plot is None:
        return
    if arguments.plot.suffix.lower() not in _PLOT_SUFFIXES:
        raise InputError(f"--plot={arguments.plot} has an unsupported format; use .svg or .png.")
    if arguments.queries == 0:
        raise InputError("--queries=0 leaves nothing to draw; give more, or leave out --plot.")
    try:
        import matplotlib  # noqa: F401  fails now, not after minutes of work
    except ImportError as error:
        raise missing_extra(error, "plot") from error


def _uses(
    arguments: InspectArguments, router: Router, options: RerankerOptions, seed: int
) -> list[Use]:
    """Route the queries of every collection."""
    from routehead_plugins.training import Use, sampled

    queries = {}
    for path in arguments.collection or [BUNDLED]:
        name = path.resolve().name
        topics = read_topics(path / TOPICS_FILE)
        if not topics:
            raise CollectionError(
                f"{path / TOPICS_FILE} contains no queries; give a folder with queries to route."
            )
        queries[name] = sampled(topics, arguments.queries, f"{seed} {name}")
    # A static router embeds no queries for routing and names fewer layers than embedding needs.
    llm = load_llm(options, router if router.routes else None)
    uses = []
    for name, texts in queries.items():
        with err.status(f"{name}: embedding {len(texts)} queries ..."):
            uses.append(Use.of(name, router, _embeddings(router, texts, llm)))
    return uses


def _embeddings(router: Router, texts: Sequence[str], llm: FrozenLM) -> Tensor:
    from routehead_plugins.layouts import LateLayout

    if router.tail_layer is None:
        return router.embed(texts, llm)
    router.check(llm)
    return LateLayout().embed(llm, texts, layer=router.tail_layer, pooling=router.space.pooling)


def render(inspection: Inspection) -> Group:
    """Lay an inspection out for the terminal."""
    tables = {}
    if inspection.uses:
        tables["Heads that are read most"] = _used_heads(inspection)
        tables["Queries"] = _collections(inspection)
    else:
        heads = inspection.static_heads(_MAX_ROWS)
        rows = [[head, f"{bias:+.4f}"] for head, bias in heads]
        tables["Heads with the largest static bias"] = _table(["head", "bias"], rows)
    titles = {"jaccard": "sets of heads (Jaccard)", "cosine": "weights (cosine)"}
    for measure, distances in inspection.distances.items():
        title = f"Mean distance of queries' {titles[measure]}"
        tables[title] = _distances([use.name for use in inspection.uses], distances)
    # Separate texts, since a table breaks its title at the table's width.
    parts = [part for title, table in tables.items() for part in (Text(title), table)]
    return Group(_facts(inspection), Text(), *parts, Text(inspection.verdict() or ""))


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Return a table; all columns but the first hold numbers. Names are not read as markup."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(Text(column), justify="right" if index else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _facts(inspection: Inspection) -> Table:
    facts, router = inspection.facts(), inspection.router
    own = "weight" if router.reading == "weights" else "bias"
    weight = facts["first_stage_weight"]
    rows = {
        "router": facts["router"],
        "kind": f"{facts['kind']}, read as {facts['reading']}",
        "LLM": facts["model"] or "not recorded",
        "layout": facts["layout"] or "any",
        "trained on": facts["data"] or "not recorded",
        "documents cut at": f"{facts['max_doc_tokens']} tokens" if router.max_doc_tokens else "-",
        "signals": facts["aggregation"] or "mean, outliers dropped",
        "first-stage weight": "-" if weight is None else f"{weight:g}",
        "queries embedded": f"after layer {router.space.layer}, {router.space.pooling}"
        f"{' of the tail' if router.space.source == 'tail' else ''}; "
        f"{facts['anchors']} anchors",
        "heads at most, P": router.max_heads or "all",
        "threshold": f"{router.threshold:g}",
        "heads to choose from": f"{facts['candidate_heads']}, {facts['nonzero_bias']} with a "
        f"{own} of their own; {facts['static_heads']} for unfamiliar queries",
        "depth": f"layer {facts['deepest_layer']} at most; "
        f"{router.layers(facts['deepest_layer'] + 1)} layers are loaded",
        "size": f"{facts['bytes'] / 1000:.1f} KB",
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in {**rows, **(router.description or {})}.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        table.add_row(Text(name), Text(text))
    return table


def _used_heads(inspection: Inspection) -> Table:
    names = [use.name for use in inspection.uses]
    several = names if len(names) > 1 else []
    signed = inspection.router.reading == "weights"
    rows = []
    for head in inspection.used_heads(_MAX_ROWS):
        shares = [head["share"], *(head["collections"][name] for name in several)]
        weights = [head["mean_weight"], head["bias"]] if signed else [head["bias"]]
        shares, weights = [f"{share:.1%}" for share in shares], [f"{w:+.4f}" for w in weights]
        rows.append([head["head"], *shares, *weights])
    columns = ["head", "queries", *several, *["mean weight"] * signed, "static bias"]
    return _table(columns, rows)


def _collections(inspection: Inspection) -> Table:
    columns = {
        "queries": ("queries", "d"),
        "head sets": ("head_sets", "d"),
        "heads: mean": ("heads_mean", ".1f"),
        "min": ("heads_min", "d"),
        "max": ("heads_max", "d"),
        "layers": ("layers_mean", ".1f"),
        "familiarity": ("familiarity", ".3f"),
        "wholly static": ("wholly_static", ".1%"),
    }
    rows = []
    for use in inspection.uses:
        figures = use.figures()
        rows.append([use.name, *(f"{figures[name]:{form}}" for name, form in columns.values())])
    return _table(["collection", *columns], rows)


def _distances(names: Sequence[str], matrix: Sequence[Sequence[float | None]]) -> Table:
    rows = [
        [name, *("-" if mean is None else f"{mean:.4f}" for mean in means)]
        for name, means in zip(names, matrix, strict=True)
    ]
    return _table(["", *(names if len(names) > 1 else ["within"])], rows)


def _draw(inspection: Inspection, path: Path) -> None:
    """Draw layers by heads, a panel per collection: the share of queries that read each head."""
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
        # Dollars in a name do not enclose a formula.
        title = f"{use.name}: {len(use.read)} queries"
        axes.set_title(title, loc="left", fontsize=9, parse_math=False)
    bar = figure.colorbar(mesh, ax=panels, pad=0.06, aspect=25 * len(grids), fraction=0.05)
    bar.set_label("share of queries that read the head", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    buffer = io.BytesIO()
    # A fixed salt and no date give the same file for the same figures; text stays text.
    with mpl.rc_context({"svg.hashsalt": "routehead", "svg.fonttype": "none"}):
        kind = path.suffix.lower().removeprefix(".")
        figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
    atomic_write_bytes(path, buffer.getvalue())


def _grid(heads: HeadSet, share: Tensor) -> Tensor:
    """Arrange shares by index of the head in its layer (rows) and by layer (columns)."""
    import torch

    cells = torch.full((1 + max(index for _, index in heads), heads.last_layer + 1), torch.nan)
    for (layer, index), value in zip(heads, share.tolist(), strict=True):
        cells[index, layer] = value
    return cells


def _label(axes: Axes, rows: int, columns: int) -> None:
    for axis, count, name in ((axes.xaxis, columns, "layer"), (axes.yaxis, rows, "head")):
        ticks = range(0, count, 1 if count <= 12 else 5)
        axis.set_ticks([tick + 0.5 for tick in ticks])
        axis.set_ticklabels([str(tick) for tick in ticks])
        axis.set_label_text(name)
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    axes.set_aspect("equal")
