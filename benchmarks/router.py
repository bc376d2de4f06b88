"""Report on routers, trained and tested on kept signals.

    python benchmarks/router.py DIR DIR ... --signals FOLDER --synthesize 640
    python benchmarks/router.py DIR DIR ... --signals FOLDER --seeds 1 --skip-ablations   # a glance

The LLM is run only for what the folder lacks; signals are those of `compare.py`, synthesized
queries those of `routehead train`. Everything fitted is kept there as well: a run that was stopped
goes on where it was, and one more seed costs one more seed.

Questions:

    unseen              trained on the other collections, tested on judged queries
    own, judged         trained on queries that the LLM wrote from the collection's passages, tested
                        on judged queries
    own, synthesized    5-fold cross-validation over those that it wrote, the queries of a passage
                        in the same fold; reciprocal rank of the passage

Rows of the tables:

    bm25, all, all+bm25         the candidates' order; ICR
    ndcg-8+bm25                 8 heads by their own nDCG, the same for all queries
    weights, labels,            what a router says of all queries alike: signed weights, heads by
    neighbours-static           how often they are in a pseudo-label, the same as a vote
    routed-*, neighbours        the router as `routehead train` makes it: a correction that is not
                                clearly better on held-out queries is left out
    ...-forced                  the correction with a fixed strength, whether it helps or not
    likelihood, +bm25           of the query given each document, by the same LLM

Writes benchmarks/results/router-LAYOUT.json and prints tables in Markdown.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from compare_collect import LAYOUTS, CollectJob
from router_ablations import ablate, label_reliabilities, questions
from router_cost import cost_table, routing_cost
from router_data import (
    FOLDS,
    SYNTHESIZED,
    Corpora,
    RouterCollector,
    Task,
    own_judged,
    own_synthesized,
    unseen,
)
from router_methods import STRENGTHS, Found, Trainer, own_rows, unseen_rows
from router_report import (
    Outcome,
    ablations,
    differences,
    measured,
    overview,
    reliabilities,
    results_json,
    variants_json,
)
from router_shelf import Shelf

from routehead_plugins.cli.detect import signals_folder
from routehead_plugins.cli.runtime import ModelOptions, progress
from routehead_plugins.errors import InputError, RouteHeadError
from routehead_plugins.io import atomic_write_text

RESULTS = Path(__file__).parent / "results"

_Rows = Callable[[Trainer, Task, int, int, Callable[[], None]], dict[str, Found]]


@dataclass(frozen=True)
class RouterJob:
    """What is reported on.

    Attributes:
        collect: What is read, and how.
        layout: Of the prompt.
        synthesize: Queries to be written from each collection; ``None`` for none.
        seeds: How often the learning of corrections starts anew.
        ablations: Whether to change every choice alone.
        cost: Whether to time the choice of heads.
    """

    collect: CollectJob
    layout: str = "parallel"
    synthesize: int | None = None
    seeds: int = 5
    ablations: bool = True
    cost: bool = False

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise InputError(
                f"--layout={self.layout} does not exist; give one of {', '.join(LAYOUTS)}."
            )
        if self.synthesize is not None and self.synthesize < 1:
            raise InputError(f"--synthesize={self.synthesize} writes nothing; give 1 or more.")
        if self.seeds < 1:
            raise InputError(f"--seeds={self.seeds} is too few; give 1 or more.")

    @property
    def options(self) -> dict[str, Any]:
        """What the figures depend on, by the names of the command line."""
        collect, llm = self.collect, self.collect.llm
        return {
            "queries": collect.queries,
            "hits": collect.hits,
            "max_doc_tokens": llm.max_doc_tokens,
            "synthesize": self.synthesize,
            "layout": self.layout,
            "seeds": self.seeds,
            # Where anything lies on a disk is nobody's business.
            "model": Path(llm.model).name if Path(llm.model).exists() else llm.model,
            "dtype": llm.dtype,
            "seed": collect.seed,
        }

    def command(self, names: Sequence[str]) -> str:
        """What is to be called for the same figures."""
        options = [
            f"--{name.replace('_', '-')}={value}"
            for name, value in self.options.items()
            if value is not None
        ]
        options += ["--skip-ablations"] * (not self.ablations) + ["--cost"] * self.cost
        return shlex.join(["python", "benchmarks/router.py", *names, *options])


def main(
    collections: Annotated[list[Path], typer.Argument(help="BEIR folders.")],
    signals: Annotated[
        Path | None, typer.Option(help="Where signals are kept.  [default: the user's cache]")
    ] = None,
    queries: Annotated[int, typer.Option(help="Judged ones of each collection, at most.")] = 100,
    hits: Annotated[int, typer.Option(help="Candidates per query.")] = 20,
    max_doc_tokens: Annotated[int, typer.Option(help="Longer documents are cut here.")] = 120,
    synthesize: Annotated[
        int | None, typer.Option(help="Queries to be written from each collection.")
    ] = None,
    layout: Annotated[str, typer.Option(help=f"One of {', '.join(LAYOUTS)}.")] = "parallel",
    seeds: Annotated[int, typer.Option(help="Starts of the learning of each router.")] = 5,
    skip_ablations: Annotated[
        bool, typer.Option("--skip-ablations", help="Train with the defaults alone.")
    ] = False,
    cost: Annotated[bool, typer.Option("--cost", help="Time the choice of heads as well.")] = False,
    model: Annotated[
        str, typer.Option(help="embedded, a Hub id, a local directory, or a .gguf file.")
    ] = "embedded",
    device: Annotated[str | None, typer.Option(help="[default: the fastest there is]")] = None,
    # Not "auto": what happens to be faster today must not decide which signals are found again.
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Of the sample and of synthesized queries.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = RESULTS,
) -> None:
    """Train routers on kept signals, test them, and write what came out."""
    llm = ModelOptions(model, device, dtype, max_doc_tokens)
    collect = CollectJob(queries, hits, signals or signals_folder(), seed, llm)
    job = RouterJob(collect, layout, synthesize, seeds, not skip_ablations, cost)
    paths = _by_name(collections)
    if len(paths) < 2 and synthesize is None:
        raise InputError(
            "one collection without --synthesize leaves nothing to train on; give another "
            "collection, or --synthesize, such as 640."
        )
    collector = RouterCollector(collect, layout)
    corpora = {name: _samples(collector, path, synthesize) for name, path in paths.items()}
    text = report(corpora, collector, job)
    output.mkdir(parents=True, exist_ok=True)
    atomic_write_text(output / f"router-{layout}.json", text)


def report(corpora: Corpora, collector: RouterCollector, job: RouterJob) -> str:
    """Ask every question, print tables, and give the results as JSON."""
    trainer, layers = Trainer(Shelf(collector.folder)), collector.layers
    parts: dict[str, Any] = {}
    for name, (tasks, rows) in _questions(corpora).items():
        outcome = _outcome(name, tasks, rows, trainer, layers[-1], job)
        parts[name] = outcome.to_dict()
        typer.echo(f"{overview(outcome)}\n{differences(outcome)}")
    if job.ablations:
        parts["ablations"] = _ablations(corpora, collector, trainer)
    if job.cost:
        parts["cost"] = routing_cost(trainer, collector, corpora)
        typer.echo(cost_table(parts["cost"]))
    settings = {
        **job.options,
        "collections": list(corpora),
        "folds": FOLDS,
        "embedding_layers": list(layers),
        "forced_strengths": STRENGTHS,
    }
    return results_json(settings, job.command(list(corpora)), parts)


def _questions(corpora: Corpora) -> dict[str, tuple[Mapping[str, Task], _Rows]]:
    """What can be asked of the collections there are."""
    found: dict[str, tuple[Mapping[str, Task], _Rows]] = {}
    if len(corpora) > 1:
        found["unseen"] = (unseen(corpora), unseen_rows)
    if all(SYNTHESIZED in samples for samples in corpora.values()):
        found["own, judged"] = (own_judged(corpora), own_rows)
        found["own, synthesized"] = (own_synthesized(corpora), own_rows)
    return found


def _outcome(
    name: str,
    tasks: Mapping[str, Task],
    rows: _Rows,
    trainer: Trainer,
    layer: int,
    job: RouterJob,
) -> Outcome:
    trained, collections = {}, {}
    with progress(name, sum(len(task.splits) for task in tasks.values())) as advance:
        for collection, task in tasks.items():
            found = rows(trainer, task, layer, job.seeds, advance)
            collections[collection] = measured(task.sample, found, job.collect.hits)
            sizes = [len(train.signals.queries) for train, _ in task.splits]
            trained[collection] = round(sum(sizes) / len(sizes))
    return Outcome(name, trained, collections)


def _ablations(corpora: Corpora, collector: RouterCollector, trainer: Trainer) -> dict[str, Any]:
    layers = collector.layers
    wanted = questions(corpora, layers, collector.llm.num_layers)
    with progress("ablations", len(wanted)) as advance:
        variants, notes = ablate(trainer, corpora, wanted, collector.job.hits, advance)
    found = label_reliabilities(trainer, corpora, layers[-1])
    typer.echo(ablations(variants, notes))
    if found:
        typer.echo(reliabilities(found))
    return {
        "variants": variants_json(variants),
        "notes": notes,
        "labels": found,
    }


def _samples(collector: RouterCollector, path: Path, synthesize: int | None) -> dict[str, Any]:
    judged = collector.judged(path)
    found = {judged.kind: judged}
    if synthesize is not None:
        written = collector.synthesized(judged.collection, synthesize)
        found[written.kind] = written
    return found


def _by_name(collections: Sequence[Path]) -> dict[str, Path]:
    paths = {path.resolve().name: path for path in collections}
    if len(paths) < len(collections):
        raise InputError(
            f"two of the collections have the same folder name: {', '.join(map(str, collections))};"
            " give each once, or rename a folder."
        )
    return paths


if __name__ == "__main__":
    try:
        typer.run(main)
    except RouteHeadError as error:
        typer.secho(f"router.py: {error}", fg="red", err=True)
        sys.exit(2)
