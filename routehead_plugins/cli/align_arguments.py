"""Options of `routehead align`, and their checks before any work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from routehead_plugins.cli.options import Seed, Signals
from routehead_plugins.cli.runtime import (
    check_minimum,
    check_names,
    check_new_file,
    check_new_folder,
    signals_folder,
)
from routehead_plugins.errors import InputError

if TYPE_CHECKING:
    from routehead_plugins.alignment import AlignmentConfig

_FILES = ("adapter_config.json", "adapter_model.safetensors", "heads.json", "README.md")


@dataclass(frozen=True)
class AlignArguments:
    """Options of `routehead align`."""

    collection: Annotated[
        list[Path],
        "A BEIR folder: corpus.jsonl, queries.jsonl, qrels/test.tsv and optionally run.bm25.trec; "
        "with --phrases or --synthesize, corpus.jsonl is enough. Can be repeated.",
    ]
    output: Annotated[Path, "Output folder of the adapter."]
    teacher: Annotated[
        str | None,
        "Learn from a teacher's scores as well: **minilm** (a package), **likelihood** (of the "
        "LLM), **likelihood:NAME** (of a larger one), or the folder or Hub id of a bi- or "
        "cross-encoder of sentence-transformers.",
    ] = None
    synthesize: Annotated[
        int | None, "Number of queries that an LLM writes from each corpus, without judgments."
    ] = None
    writer: Annotated[
        str | None, "The LLM that writes them: as for --model.  [default: the LLM itself]"
    ] = None
    phrases: Annotated[
        int | None,
        "Number of phrases of each corpus that serve as queries: no LLM writes them, and --teacher "
        "says what answers them.",
    ] = None
    judged: Annotated[bool, "Learn from the collections' own queries and judgments, if any."] = True
    queries: Annotated[int | None, "Maximum judged queries per collection.  [default: all]"] = None
    hits: Annotated[int, "Candidates per query."] = 20
    layout: Annotated[
        str,
        "**late**, which index and cache serve best, or **parallel**, whose tail sees documents.",
    ] = "late"
    layers: Annotated[
        str | None,
        "First and last layer whose heads are read, such as 5-13.  [default: from a sixth to just "
        "under half of the depth]",
    ] = None
    rank: Annotated[int, "Rank of the adapter."] = 16
    projections: Annotated[str, "Projections that the adapter changes."] = "q_proj,k_proj,v_proj"
    distillation: Annotated[float, "Weight of the cross-entropy to the teacher."] = 1.0
    preference: Annotated[
        float, "Weight of preference pairs of adjacent grades, hard ones first."
    ] = 1.0
    spread: Annotated[
        float, "Weight of the penalty on nearly equal scores in the middle of the list."
    ] = 0.0
    head_entropy: Annotated[float, "Weight of the entropy of the choice of heads."] = 0.0
    attention_entropy: Annotated[float, "Weight of the entropy of attention over documents."] = 0.0
    temperature: Annotated[float | None, "Temperature of the teacher.  [default: by its kind]"] = (
        None
    )
    epochs: Annotated[int, "How often every query is seen."] = 2
    candidates: Annotated[int, "Documents drawn per query and step; --hits of a pool."] = 8
    batch_queries: Annotated[int, "Queries per batch; with --pool, a batch is a pool."] = 4
    pool: Annotated[
        int | None,
        "Queries per pool: near queries run as one batch, each ranked against the documents of all "
        "of them; --teacher must be a bi-encoder, such as minilm.",
    ] = None
    accumulate: Annotated[int, "Batches per step."] = 1
    learning_rate: Annotated[float, "Highest learning rate of the adapter."] = 1e-3
    head_learning_rate: Annotated[
        float, "Highest learning rate of the heads' weights; a large one soon leaves few heads."
    ] = 0.05
    evaluate_every: Annotated[int, "Steps between looks at the held-out queries."] = 50
    patience: Annotated[int, "Looks without a gain after which training stops."] = 4
    held_out: Annotated[float, "Share of the queries that are held out to judge by."] = 0.15
    checkpoints: Annotated[bool, "Save memory: compute intermediate results twice."] = False
    start: Annotated[
        str | None, "An adapter to go on from, instead of a new one: a folder or Hub id."
    ] = None
    keep: Annotated[bool, "Write the adapter even if the held-out queries do not clearly gain."] = (
        False
    )
    signals: Signals = None
    seed: Seed = 0


def check(arguments: AlignArguments) -> None:
    """Check the arguments before anything is read or loaded.

    Raises:
        InputError: One cannot be used, or not beside the others.
    """
    if not arguments.collection:
        raise InputError("--collection is missing; give a BEIR folder.")
    check_names(arguments.collection)
    _check_queries(arguments)
    temperature = 1.0 if arguments.temperature is None else arguments.temperature
    config_of(arguments, layers=(0, 1), temperature=temperature, max_doc_tokens=None)
    if not 0 < arguments.held_out <= 0.9:
        raise InputError(f"--held-out={arguments.held_out} must be above 0, and 0.9 or less.")
    check_new_folder("--output", arguments.output)
    check_new_folder("--signals", arguments.signals or signals_folder())
    for name in _FILES:
        check_new_file("--output", arguments.output / name)
    card = arguments.output / "README.md"
    if card.exists() and b"routehead-plugins" not in card.read_bytes():
        raise InputError(
            f"--output={arguments.output} has a README.md that is no adapter's, and would be "
            "overwritten; name another folder."
        )


def _check_queries(arguments: AlignArguments) -> None:
    """Check the options on queries."""
    for name in ("synthesize", "phrases", "queries", "hits", "pool"):
        check_minimum(f"--{name}", getattr(arguments, name))
    if arguments.writer is not None and arguments.synthesize is None:
        raise InputError(
            f"--writer={arguments.writer} is for --synthesize; give the number of queries to write."
        )
    if not arguments.judged and arguments.synthesize is None and arguments.phrases is None:
        raise InputError(
            "without queries there is nothing to learn from; give --phrases or --synthesize."
        )
    for name in ("phrases", "pool"):
        if getattr(arguments, name) is not None and _unscored(arguments):
            raise InputError(
                f"--{name}={getattr(arguments, name)} needs scores to learn from; give --teacher, "
                "such as minilm."
            )


def _unscored(arguments: AlignArguments) -> bool:
    """Whether no teacher is learned from."""
    return arguments.teacher is None or not arguments.distillation


def config_of(
    arguments: AlignArguments,
    *,
    layers: tuple[int, int],
    temperature: float,
    max_doc_tokens: int | None,
) -> AlignmentConfig:
    """Return the settings of training that the arguments name."""
    from routehead_plugins.alignment import AlignmentConfig, LossWeights

    weights = ("distillation", "preference", "spread", "head_entropy", "attention_entropy")
    same = (
        *("layout", "rank", "candidates", "epochs", "accumulate", "learning_rate"),
        *("head_learning_rate", "evaluate_every", "patience", "checkpoints", "seed"),
    )
    return AlignmentConfig(
        layers=layers,
        temperature=temperature,
        max_doc_tokens=max_doc_tokens,
        projections=tuple(arguments.projections.split(",")),
        batch_queries=arguments.pool or arguments.batch_queries,
        losses=LossWeights(**{name: getattr(arguments, name) for name in weights}),
        **{name: getattr(arguments, name) for name in same},
    )
