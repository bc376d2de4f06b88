"""Measure the gain from choosing heads per query: routers trained and tested on stored signals.

    python -m benchmarks.routers.compare DIR DIR ... --signals FOLDER --synthesize 640
    python -m benchmarks.routers.compare DIR DIR ... --signals FOLDER --seeds 1 --skip-ablations

The LLM runs only for signals that the folder lacks; they are those of `benchmarks.heads.compare`,
and synthesized queries those of `routehead train`. Everything fitted is stored there as well: an
interrupted run resumes, and one more seed costs one more seed.

Questions:

    unseen              trained on the other collections, tested on judged queries
    own, judged         trained on queries synthesized from the collection's passages, tested on
                        judged queries
    own, synthesized    5-fold cross-validation over the synthesized queries, those of a passage in
                        the same fold; reciprocal rank of the passage

Rows of the tables:

    bm25, all, all+bm25         the candidates' order; ICR
    ndcg-8+bm25                 8 heads by their own nDCG, the same for all queries
    weights, labels,            a router's static part, the same for all queries: signed weights,
    neighbours-static           or heads by their frequency in pseudo-labels, also as a vote
    routed-*, neighbours        the router of `routehead train`: without a correction unless that
                                is clearly better on held-out queries
    ...-forced                  a correction of fixed strength, whether it helps or not
    likelihood, +bm25           of the query given each document, by the same LLM

Writes benchmarks/results/router-LAYOUT.json and prints tables in Markdown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import command_line, results_json, run, with_options
from benchmarks.heads.collect import LAYOUTS, ComparisonOptions
from benchmarks.routers import ablations, data, methods, report
from benchmarks.routers.cost import cost_table, routing_cost
from benchmarks.routers.data import SYNTHESIZED, Corpora, RouterCollector, Sample, Task
from benchmarks.routers.methods import RowScores, Trainer
from benchmarks.routers.report import Outcome
from routehead_plugins.cli.runtime import check_minimum, progress
from routehead_plugins.errors import InputError
from routehead_plugins.io import atomic_write_text

_LAYOUTS = (*LAYOUTS, "late")
_Rows = Callable[[Trainer, Task, int, int, Callable[[], None]], dict[str, RowScores]]


@dataclass(frozen=True, kw_only=True)
class Options(ComparisonOptions):
    """Options of the command line; the help texts describe the fields.

    Raises:
        InputError: A value is out of range, or nothing is left to train on.
    """

    synthesize: Annotated[
        int | None, typer.Option(help="Queries to synthesize from each collection.")
    ] = None
    layout: Annotated[str, typer.Option(help=f"One of {', '.join(_LAYOUTS)}.")] = "parallel"
    seeds: Annotated[int, typer.Option(help="Seeds of each router's training.")] = 5
    skip_ablations: Annotated[
        bool, typer.Option("--skip-ablations", help="Train with the defaults alone.")
    ] = False
    cost: Annotated[bool, typer.Option("--cost", help="Time the choice of heads as well.")] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_minimum("--synthesize", self.synthesize)
        check_minimum("--seeds", self.seeds)
        if self.layout not in _LAYOUTS:
            raise InputError(
                f"--layout={self.layout} does not exist; give one of {', '.join(_LAYOUTS)}."
            )
        if len(self.paths) < 2 and self.synthesize is None:
            raise InputError(
                "one collection without --synthesize leaves nothing to train on; give another "
                "collection, or --synthesize, such as 640."
            )

    @property
    def settings(self) -> dict[str, Any]:
        """Options that figures depend on; paths are reduced to names."""
        names = ("synthesize", "layout", "seeds")
        return {**super().settings, **{name: getattr(self, name) for name in names}}


def main(options: Options) -> None:
    """Train routers on stored signals, test them, and write the results."""
    collector = RouterCollector(options, options.layout)
    corpora = {
        name: _samples(collector, path, options.synthesize) for name, path in options.paths.items()
    }
    text = make_report(corpora, collector, options)
    options.output.mkdir(parents=True, exist_ok=True)
    atomic_write_text(options.output / f"router-{options.layout}.json", text)


def make_report(corpora: Corpora, collector: RouterCollector, options: Options) -> str:
    """Answer every question, print tables, and return the results as JSON."""
    trainer, layers = Trainer(collector.cache_folder), collector.layers
    parts: dict[str, Any] = {}
    for name, (tasks, rows) in _questions(corpora).items():
        outcome = _outcome(name, tasks, rows, trainer, layers[-1], options)
        parts[name] = outcome.to_dict()
        typer.echo(f"{report.overview(outcome)}\n{report.differences(outcome)}")
    if not options.skip_ablations:
        parts["ablations"] = _ablations(corpora, collector, trainer)
    if options.cost:
        parts["cost"] = routing_cost(trainer, collector, corpora)
        typer.echo(cost_table(parts["cost"]))
    settings = {
        **options.settings,
        "collections": list(corpora),
        "folds": data.FOLDS,
        "embedding_layers": list(layers),
        "forced_strengths": methods.FORCED_STRENGTHS,
    }
    shown = options.settings | {"skip_ablations": options.skip_ablations, "cost": options.cost}
    command = command_line("benchmarks.routers.compare", list(corpora), shown)
    return results_json(command, settings, parts)


def _samples(collector: RouterCollector, path: Path, synthesize: int | None) -> dict[str, Sample]:
    judged = collector.judged(path)
    samples = {judged.kind: judged}
    if synthesize is not None:
        synthesized = collector.synthesized(judged.collection, synthesize)
        samples[synthesized.kind] = synthesized
    return samples


def _questions(corpora: Corpora) -> dict[str, tuple[Mapping[str, Task], _Rows]]:
    """Return the questions that these collections allow."""
    allowed: dict[str, tuple[Mapping[str, Task], _Rows]] = {}
    if len(corpora) > 1:
        allowed["unseen"] = (data.unseen(corpora), methods.unseen_rows)
    if all(SYNTHESIZED in samples for samples in corpora.values()):
        allowed["own, judged"] = (data.own_judged(corpora), methods.own_rows)
        allowed["own, synthesized"] = (data.own_synthesized(corpora), methods.own_rows)
    return allowed


def _outcome(
    name: str,
    tasks: Mapping[str, Task],
    rows: _Rows,
    trainer: Trainer,
    layer: int,
    options: Options,
) -> Outcome:
    trained, collections = {}, {}
    with progress(name, sum(len(task.splits) for task in tasks.values())) as advance:
        for collection, task in tasks.items():
            scores = rows(trainer, task, layer, options.seeds, advance)
            collections[collection] = report.measure_seeds(task.sample, scores, options.hits)
            sizes = [len(train.signals.queries) for train, _ in task.splits]
            trained[collection] = round(sum(sizes) / len(sizes))
    return Outcome(name, trained, collections)


def _ablations(corpora: Corpora, collector: RouterCollector, trainer: Trainer) -> dict[str, Any]:
    layers = collector.layers
    wanted = ablations.questions(corpora, layers, collector.llm.num_layers)
    with progress("ablations", len(wanted)) as advance:
        variants, notes = ablations.ablate(
            trainer, corpora, wanted, collector.options.hits, advance
        )
    labels = ablations.label_reliabilities(trainer, corpora, layers[-1])
    typer.echo(report.ablations(variants, notes))
    if labels:
        typer.echo(report.reliabilities(labels))
    return {"variants": report.variants_json(variants), "notes": notes, "labels": labels}


if __name__ == "__main__":
    run(with_options(main, Options))
