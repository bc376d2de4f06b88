"""Quality of an adapter beside the frozen LLM and a sentence encoder, on collections unseen.

    python -m benchmarks.alignment.quality DIR DIR ... --adapter FOLDER --signals FOLDER

The late layout, with and without the adapter. What is chosen, is chosen on the other collections:
BM25's weight, and the weights of rows called `weights`. The heads of `aligned` are those that the
adapter's folder names, without BM25 in the first row.

    bm25                the candidates as they come
    minilm              cosine of all-MiniLM-L6-v2; needs its package, see docs/alignment.md
    frozen/weights      signed weights of the frozen LLM's heads and BM25
    aligned             the adapter's heads, by its own weights
    aligned/weights     signed weights, chosen anew, of the heads with the adapter, and BM25
    likelihood          likelihood of the query by the whole LLM; with --likelihood

The middle zone is the middle half of a query's candidates in BM25's order: which share of its
relevant documents reaches the best quarter, and which of the others (arXiv 2604.17237).

Writes benchmarks/results/alignment-NAME.json and prints tables in Markdown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial, reduce
from operator import add
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from benchmarks.common import (
    Cache,
    command_line,
    markdown_table,
    results_json,
    run,
    signals_digest,
    with_options,
)
from benchmarks.heads.collect import Collector, ComparisonOptions
from benchmarks.heads.layouts import fused
from benchmarks.heads.methods import Scores, measure_rows
from benchmarks.heads.report import macro_average
from routehead_plugins import FrozenLM, HeadSet
from routehead_plugins.backbone import Adapter
from routehead_plugins.cli.runtime import err, progress
from routehead_plugins.errors import InputError
from routehead_plugins.evaluation import Comparison, Evaluation, compare
from routehead_plugins.io import Collection, atomic_write_text
from routehead_plugins.options import RerankerOptions
from routehead_plugins.selection import FIRST_STAGE, FUSED
from routehead_plugins.signals import (
    QuerySignals,
    SignalSet,
    Teacher,
    collect_teacher,
    load_teacher,
)
from routehead_plugins.training import fit_weights, offline_scores

LAYOUT = "late"
_MEASURE = "nDCG@10"
_MINILM, _LIKELIHOOD = "minilm", "likelihood"
# Rows that those with an adapter are compared with.
_AGAINST = (FIRST_STAGE, f"frozen/weights{FUSED}", f"{_LIKELIHOOD}{FUSED}", f"{_MINILM}{FUSED}")

Score = Callable[[QuerySignals], Tensor]


@dataclass(frozen=True, kw_only=True)
class Options(ComparisonOptions):
    """Options of the command line.

    Raises:
        InputError: There are fewer than two collections.
    """

    adapter: Annotated[str, typer.Option(help="The adapter: a folder or Hub id.")]
    likelihood: Annotated[bool, typer.Option(help="Measure query likelihood as well.")] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.paths) < 2:
            raise InputError("one collection leaves nothing to choose weights on; give another.")

    @property
    def name(self) -> str:
        """Name of the results."""
        return Path(self.adapter).resolve().name

    @cached_property
    def heads(self) -> HeadSet:
        """The heads that the adapter names.

        Raises:
            InputError: It names none.
        """
        heads = Adapter.from_pretrained(self.adapter).heads
        if heads is None:
            raise InputError(f"--adapter={self.adapter} has no heads.json; give an aligned one.")
        return heads


class AlignedCollector(Collector):
    """Computes signals of the LLM with an adapter, as deep as its heads are."""

    options: Options

    @cached_property
    def llm(self) -> FrozenLM:
        """The LLM with the adapter."""
        options: RerankerOptions = replace(self.options.llm, adapter=self.options.adapter)
        deepest = self.options.heads.last_layer
        with err.status(f"Loading {options.model} with {self.options.adapter} ..."):
            return FrozenLM.from_options(options, lambda _: deepest + 1)


@dataclass(frozen=True)
class Readings:
    """Everything that scores of one collection are computed from.

    Attributes:
        collection: Its judged queries, with candidates.
        frozen: Signals of the LLM alone.
        aligned: Signals with the adapter.
        others: Row -> scores by another model, in the form of signals of a single head.
    """

    collection: Collection
    frozen: SignalSet
    aligned: SignalSet
    others: Mapping[str, SignalSet]


@dataclass(frozen=True)
class Zone:
    """What becomes of the documents in the middle half of the candidates, in BM25's order.

    Attributes:
        relevant: Share of the relevant ones that reach the best quarter.
        irrelevant: The same of the others.
    """

    relevant: float
    irrelevant: float

    @property
    def gap(self) -> float:
        """Difference of the shares: 0 for a ranking that does not know what is relevant."""
        return self.relevant - self.irrelevant


def main(options: Options) -> None:
    """Compute what is missing, choose weights, measure, and write the results."""
    readings = collect(options)
    rows = score_rows(readings, options.heads, Cache(options.folder / "alignment"))
    evaluations = {
        name: measure_rows(reading.collection, reading.frozen, rows[name], options.hits)
        for name, reading in readings.items()
    }
    parts = report(evaluations, zones(readings, rows)) | {"adapter": options.heads.adapter}
    names = list(readings)
    settings = {**options.settings, "adapter": options.name, "collections": names}
    given = {**options.settings, "adapter": options.name, "likelihood": options.likelihood}
    command = command_line("benchmarks.alignment.quality", names, given)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"alignment-{options.name}.json"
    atomic_write_text(path, results_json(command, settings, parts))


def collect(options: Options) -> dict[str, Readings]:
    """Compute signals and scores of other models, or load them."""
    plain, aligned = Collector(options), AlignedCollector(options)
    teacher = load_teacher(_MINILM, device=options.device)
    readings = {}
    for name, path in options.paths.items():
        collection = plain.load(path)
        frozen = plain.signals(collection, LAYOUT)
        scores: dict[str, Mapping[str, Tensor]] = {_MINILM: _scores(collection, teacher, options)}
        if options.likelihood:
            scores[_LIKELIHOOD] = plain.likelihoods(collection)
        others = {row: _as_signals(frozen, values) for row, values in scores.items()}
        readings[name] = Readings(collection, frozen, aligned.signals(collection, LAYOUT), others)
    return readings


def _scores(collection: Collection, teacher: Teacher, options: Options) -> dict[str, Tensor]:
    title = f"{collection.name}: {teacher.name}"
    with progress(title, len(collection.topics)) as advance:
        return collect_teacher(
            collection, teacher, options.folder, hits=options.hits, advance=advance
        )


def _as_signals(signals: SignalSet, scores: Mapping[str, Tensor]) -> SignalSet:
    queries = [replace(query, averaged=scores[query.query_id].float()) for query in signals.queries]
    return signals.subset(queries)


def score_rows(
    readings: Mapping[str, Readings], heads: HeadSet, cache: Cache
) -> dict[str, dict[str, Scores]]:
    """Score the candidates of every query: collection -> row -> scores.

    Args:
        readings: Signals by collection.
        heads: The heads that the adapter names.
        cache: Weights that were chosen before.
    """
    own = replace(heads, recipe=replace(heads.recipe, first_stage_weight=0.0))
    rows: dict[str, dict[str, Scores]] = {}
    for name, test in readings.items():
        train = [reading for other, reading in readings.items() if other != name]
        frozen = reduce(add, (reading.frozen for reading in train))
        aligned = reduce(add, (reading.aligned for reading in train))
        made: dict[str, Scores] = {FIRST_STAGE: {q.query_id: None for q in test.frozen.queries}}
        for row, signals in test.others.items():
            by_other = reduce(add, (reading.others[row] for reading in train))
            made |= _alone_and_fused(row, lambda query: query.averaged, by_other, signals)
        made |= _weighted("frozen", frozen, test.frozen, cache)
        by_heads = partial(_by, own, aligned.heads)
        made |= _alone_and_fused("aligned", by_heads, aligned, test.aligned)
        made |= _weighted("aligned", aligned, test.aligned, cache)
        rows[name] = made
    return rows


def _alone_and_fused(
    row: str, score: Score, train: SignalSet, test: SignalSet
) -> dict[str, Scores]:
    alone: Scores = {query.query_id: score(query) for query in test.queries}
    return {row: alone, f"{row}{FUSED}": fused(score, train, test)}


def _weighted(row: str, train: SignalSet, test: SignalSet, cache: Cache) -> dict[str, Scores]:
    """Score by signed weights of all heads and BM25, from the training queries."""
    key = [row, signals_digest(train)]
    heads = cache.heads(key, partial(fit_weights, train, aggregation="log"))
    scores: Scores = {q.query_id: _by(heads, train.heads, q) for q in test.queries}
    return {f"{row}/weights{FUSED}": scores}


def _by(heads: HeadSet, available: HeadSet, query: QuerySignals) -> Tensor:
    return offline_scores(query, heads, available)


def zones(
    readings: Mapping[str, Readings], rows: Mapping[str, Mapping[str, Scores]]
) -> dict[str, Zone]:
    """Measure every row's choice among the middle candidates of all queries together."""
    measured = {}
    for row in next(iter(rows.values())):
        pairs = [
            (query, scores)
            for name, reading in readings.items()
            for query in reading.frozen.queries
            if (scores := rows[name][row][query.query_id]) is not None
        ]
        if pairs:
            measured[row] = middle_zone(pairs)
    return measured


def middle_zone(pairs: Sequence[tuple[QuerySignals, Tensor]]) -> Zone:
    """Measure which of the middle candidates reach the best quarter.

    Args:
        pairs: Queries, and the scores of their candidates.
    """
    reached: dict[bool, list[bool]] = {True: [], False: []}
    for query, scores in pairs:
        count, quarter = len(scores), len(scores) // 4
        best = set(scores.argsort(descending=True, stable=True)[:quarter].tolist())
        for index in range(quarter, count - quarter):
            reached[bool(query.gains[index] > 0)].append(index in best)
    shares = {key: sum(values) / max(1, len(values)) for key, values in reached.items()}
    return Zone(shares[True], shares[False])


def report(
    evaluations: Mapping[str, Mapping[str, Evaluation]], measured: Mapping[str, Zone]
) -> dict[str, Any]:
    """Print tables, and return means and differences as JSON.

    The mean over collections is the mean of their means. Differences are of the rows with an
    adapter to the others.
    """
    whole = {**evaluations, "mean": macro_average(evaluations)}
    parts: dict[str, Any] = {"measure": _MEASURE, "collections": {}, "middle zone": {}}
    for name, rows in whole.items():
        parts["collections"][name] = {
            "means": {row: figures.mean(_MEASURE) for row, figures in rows.items()},
            "per_query": {row: list(r.per_query(_MEASURE).values()) for row, r in rows.items()},
            "differences": [asdict(pair) for pair in _differences(rows)],
        }
    table = [["row", *whole, "middle: relevant", "others"]]
    for row in whole["mean"]:
        zone = measured.get(row)
        shares = [] if zone is None else [f"{zone.relevant:.0%}", f"{zone.irrelevant:.0%}"]
        cells = [f"{rows[row].mean(_MEASURE):.4f}" for rows in whole.values()]
        table.append([row, *cells, *(shares or ["", ""])])
    parts["middle zone"] = {row: asdict(z) | {"gap": z.gap} for row, z in measured.items()}
    typer.echo(markdown_table(table))
    differences = [["row", "against", "difference", "p"]]
    for pair in _differences(whole["mean"]):
        interval = f"{pair.difference:+.4f} [{pair.low:+.4f}, {pair.high:+.4f}]"
        differences.append([pair.method, pair.baseline, interval, f"{pair.p:.3f}"])
    typer.echo(markdown_table(differences))
    return parts


def _differences(rows: Mapping[str, Evaluation]) -> list[Comparison]:
    """Compare the rows with an adapter with each of the others."""
    aligned = {row: figures for row, figures in rows.items() if row.startswith("aligned")}
    return [
        pair
        for baseline in _AGAINST
        if baseline in rows
        for pair in compare({baseline: rows[baseline], **aligned}, baseline, _MEASURE)
    ]


if __name__ == "__main__":
    run(with_options(main, Options))
