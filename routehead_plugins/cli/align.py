"""`routehead align`: train an adapter with which the heads' attention ranks documents better."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from routehead_plugins.cli.options import LLM, Seed, Signals, with_options
from routehead_plugins.cli.runtime import (
    check_bm25,
    check_minimum,
    check_names,
    check_new_file,
    check_new_folder,
    err,
    progress,
    resumable,
    signals_folder,
    with_candidates,
)
from routehead_plugins.cli.train import command_line
from routehead_plugins.cli.training_data import judged_queries_of, load_texts, training_parts
from routehead_plugins.data import Document, non_blank_indices
from routehead_plugins.errors import InputError
from routehead_plugins.io import Collection
from routehead_plugins.options import RerankerOptions

if TYPE_CHECKING:
    from torch import Tensor

    from routehead_plugins.alignment import Alignment, AlignmentConfig, AlignmentExample, Progress
    from routehead_plugins.backbone import Adapter, FrozenLM
    from routehead_plugins.heads import HeadSet
    from routehead_plugins.signals import SignalSet, Teacher

# Fewer queries say nothing about what held-out ones gain.
_LEAST_QUERIES = 20
# Looks at more held-out queries, and a choice of heads on more queries, take longer than they help.
_MOST_HELD_OUT, _MOST_FOR_HEADS = 200, 400
# Share of a teacher in the labels by which heads are chosen, where judgments are learned from too.
_TEACHER_SHARE = 0.5
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


@with_options(*(name for name in LLM if name != "adapter"), "max_doc_tokens", max_doc_tokens=96)
def align(arguments: AlignArguments, options: RerankerOptions) -> None:
    """Train an adapter of a few MB beside the LLM, so that its attention ranks what matters.

    After HeadRank (arXiv 2604.17237). The LLM itself stays as it is. Queries come with judgments,
    from a teacher, or both. Without queries, --phrases takes parts of your own passages, and
    --synthesize has the LLM write queries from them. What is done is kept, so that a job that was
    stopped resumes. The adapter is written only if held-out queries gain more than two standard
    errors over the same LLM without it, the heads chosen and weighted anew for both.

    Example: routehead align --collection my-corpus --phrases 10000 --pool 24 --teacher minilm
    --output my-adapter; then: routehead rerank --adapter my-adapter ...
    """
    from routehead_plugins.alignment import alignment_card

    with resumable() as keep:
        alignment = align_collections(arguments, options, keep)
    gain = _clear_gain(alignment, arguments)
    alignment.save(arguments.output, card=alignment_card(alignment, command_line()))
    typer.echo(f"{arguments.output}: {len(alignment.heads)} heads; held-out queries: {gain}")


def _clear_gain(alignment: Alignment, arguments: AlignArguments) -> str:
    """Describe what held-out queries gained.

    Raises:
        InputError: It is not clear, and the adapter is not to be kept all the same.
    """
    gain = alignment.gain
    if not arguments.keep and not (gain and gain.is_clear):
        raise InputError(
            f"held-out queries do not clearly gain ({gain}); nothing was written: give more "
            "queries or a better teacher, or write it all the same with --keep."
        )
    return str(gain)


def align_collections(
    arguments: AlignArguments, options: RerankerOptions, keep: Callable[[], None] = lambda: None
) -> Alignment:
    """Prepare queries, train, and choose heads anew for the LLM with its adapter."""
    _check(arguments)
    start = _start(arguments, options)  # before hours of work
    parts = [_Part(part, kind) for part, kind in _collections(arguments, options, keep)]
    teacher = _teacher(arguments, options)
    scores, temperature = _teacher_scores(parts, teacher, arguments, keep)
    data = _Data.of(parts, scores, arguments)
    learned = [data.examples[key] for key in data.learned]
    err.print(f"{len(learned)} queries to learn from, {len(data.held_out)} held out")
    learned = _pooled(learned, teacher, arguments)
    llm, config = _llm_and_config(arguments, options, temperature)
    alignment = _train(llm, learned, data, config, start, arguments, keep)
    return _with_heads(alignment, llm, data, arguments, options, keep)


@dataclass(frozen=True)
class _Part:
    """Queries of one collection and kind, with candidates."""

    collection: Collection
    kind: str

    def documents(self, query_id: str, hits: int) -> list[Document]:
        """Return the candidates that have a text."""
        documents = self.collection.candidates(query_id, hits)
        return [documents[index] for index in non_blank_indices(documents)]


@dataclass(frozen=True)
class _Data:
    """Examples by part and query id, which of them are held out, and the others in random order."""

    parts: Sequence[_Part]
    scores: Sequence[Mapping[str, Tensor]]
    examples: Mapping[tuple[int, str], AlignmentExample]
    held_out: frozenset[tuple[int, str]]
    shuffled: Sequence[tuple[int, str]]

    @property
    def learned(self) -> list[tuple[int, str]]:
        """Keys of the examples to learn from."""
        return [key for key in self.examples if key not in self.held_out]

    @property
    def for_heads(self) -> list[tuple[int, str]]:
        """Keys of the examples that heads are chosen on."""
        return sorted(self.shuffled[:_MOST_FOR_HEADS])

    @classmethod
    def of(
        cls,
        parts: Sequence[_Part],
        scores: Sequence[Mapping[str, Tensor]],
        arguments: AlignArguments,
    ) -> _Data:
        """Make examples of all queries that can be learned from, and hold some out.

        Raises:
            InputError: They are too few.
        """
        examples = dict(_examples(parts, scores, arguments))
        if len(examples) < _LEAST_QUERIES:
            raise InputError(
                f"{len(examples)} queries can be learned from, but at least {_LEAST_QUERIES} are "
                "needed; give more queries, a teacher, or --synthesize, such as 500."
            )
        keys = list(examples)
        random.Random(f"held out {arguments.seed}").shuffle(keys)
        count = min(_MOST_HELD_OUT, max(2, math.ceil(arguments.held_out * len(keys))))
        return cls(parts, scores, examples, frozenset(keys[:count]), keys[count:])


def _examples(
    parts: Sequence[_Part], scores: Sequence[Mapping[str, Tensor]], arguments: AlignArguments
) -> Iterator[tuple[tuple[int, str], AlignmentExample]]:
    from routehead_plugins.alignment import AlignmentExample

    for number, (part, scored) in enumerate(zip(parts, scores, strict=True)):
        for query_id, query in part.collection.topics.items():
            documents = part.documents(query_id, arguments.hits)
            judgments = part.collection.qrels.get(query_id, {})
            grades = [float(max(0, judgments.get(str(doc.id), 0))) for doc in documents]
            judged = arguments.preference > 0 and len(set(grades)) > 1
            teacher = scored.get(query_id)
            if len(documents) > 1 and (judged or teacher is not None):
                yield (
                    (number, query_id),
                    AlignmentExample(
                        query,
                        [document.text for document in documents],
                        grades if len(set(grades)) > 1 else None,
                        None if teacher is None else teacher.tolist(),
                    ),
                )


def _check(arguments: AlignArguments) -> None:
    """Check the arguments before anything is read or loaded."""
    if not arguments.collection:
        raise InputError("--collection is missing; give a BEIR folder.")
    check_names(arguments.collection)
    _check_queries(arguments)
    temperature = 1.0 if arguments.temperature is None else arguments.temperature
    _config(arguments, layers=(0, 1), temperature=temperature, max_doc_tokens=None)
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


def _collections(
    arguments: AlignArguments, options: RerankerOptions, keep: Callable[[], None]
) -> list[tuple[Collection, str]]:
    """Return judged and written queries with their candidates, and which kind each part is."""
    from routehead_plugins.backbone import FrozenLM

    phrases = arguments.phrases is not None
    collections = [load_texts(path, arguments, phrases=phrases) for path in arguments.collection]
    judged = [_own_queries(collection, arguments) for collection in collections]
    parts = [(part, "judged") for part in judged if part is not None]
    if arguments.phrases is not None:
        parts += [(_phrases(part, arguments.phrases, arguments), "phrases") for part in collections]
    if arguments.synthesize is None:
        return parts
    check_bm25()
    name = arguments.writer or options.model
    with err.status(f"Loading {name} ..."):
        writer = FrozenLM.from_options(replace(options, model=name))
    return parts + [
        (part, kind)
        for collection in collections
        for kind, part in training_parts(collection, None, writer, arguments, keep)
    ]


def _phrases(collection: Collection, count: int, arguments: AlignArguments) -> Collection:
    """Draw phrases of a corpus as queries, with candidates."""
    from routehead_plugins.signals import phrase_queries

    drawn = phrase_queries(collection, count, seed=arguments.seed)
    return with_candidates(drawn, drawn.topics, arguments.hits)


def _own_queries(collection: Collection, arguments: AlignArguments) -> Collection | None:
    """Return a collection's own queries with candidates; with a teacher, unjudged ones as well."""
    if arguments.teacher is None or not arguments.judged or not collection.topics:
        return judged_queries_of(collection, arguments)
    ids = list(collection.topics)
    random.Random(f"{arguments.seed} {collection.name}").shuffle(ids)
    chosen = set(ids[: arguments.queries])
    topics = {key: query for key, query in collection.topics.items() if key in chosen}
    return with_candidates(replace(collection, topics=topics), topics, arguments.hits)


def _teacher(arguments: AlignArguments, options: RerankerOptions) -> Teacher | None:
    """Load the teacher, if there is one."""
    from routehead_plugins.backbone import FrozenLM
    from routehead_plugins.signals import load_teacher

    if arguments.teacher is None or not arguments.distillation:
        return None
    with err.status(f"Loading {arguments.teacher} ..."):
        own = FrozenLM.from_options(options) if arguments.teacher == "likelihood" else None
        return load_teacher(
            arguments.teacher,
            own,
            device=options.device,
            max_doc_tokens=options.max_doc_tokens,
            local_files_only=options.local_files_only,
        )


def _teacher_scores(
    parts: Sequence[_Part],
    teacher: Teacher | None,
    arguments: AlignArguments,
    keep: Callable[[], None],
) -> tuple[list[Mapping[str, Tensor]], float]:
    """Return the scores of each part, none without a teacher, and their temperature."""
    from routehead_plugins.signals import collect_teacher

    if teacher is None:
        return [{} for _ in parts], 1.0
    folder = arguments.signals or signals_folder()
    scores: list[Mapping[str, Tensor]] = []
    for part in parts:
        name, total = part.collection.name, len(part.collection.topics)
        with progress(f"{name}: {teacher.name}", total, keep) as advance:
            scores.append(
                collect_teacher(
                    part.collection, teacher, folder, hits=arguments.hits, advance=advance
                )
            )
    chosen = arguments.temperature
    return scores, teacher.temperature if chosen is None else chosen


def _pooled(
    examples: list[AlignmentExample], teacher: Teacher | None, arguments: AlignArguments
) -> list[AlignmentExample]:
    """Gather examples into pools, if that is asked for.

    Raises:
        InputError: The teacher is no bi-encoder.
    """
    from routehead_plugins.alignment import pooled
    from routehead_plugins.signals import EncoderTeacher

    if arguments.pool is None:
        return examples
    if not isinstance(teacher, EncoderTeacher):
        raise InputError(
            f"--teacher={arguments.teacher} scores pairs one by one; for --pool, give a "
            "bi-encoder, such as minilm."
        )
    with err.status("Gathering pools ..."):
        return pooled(
            examples,
            teacher,
            queries=arguments.pool,
            documents=arguments.hits,
            seed=arguments.seed,
        )


def _llm_and_config(
    arguments: AlignArguments, options: RerankerOptions, temperature: float
) -> tuple[FrozenLM, AlignmentConfig]:
    """Load the layers that are trained, and complete the settings."""
    from routehead_plugins.backbone import FrozenLM

    chosen: list[tuple[int, int]] = []

    def layers(depth: int) -> int:
        chosen.append(_layers(arguments.layers, depth))
        return chosen[0][1] + 1

    with err.status(f"Loading {options.model} ..."):
        llm = FrozenLM.from_options(options, layers)
    if not chosen:  # a model of a kind that is loaded whole
        layers(llm.num_layers)
    config = _config(
        arguments,
        layers=chosen[0],
        temperature=temperature,
        max_doc_tokens=options.max_doc_tokens,
    )
    return llm, config


def _layers(text: str | None, depth: int) -> tuple[int, int]:
    """Parse a range of layers, or choose one."""
    if text is None:
        return depth // 6, max(depth // 6, 9 * depth // 20)
    first, dash, last = text.partition("-")
    if not (first.isdecimal() and last.isdecimal() and dash and int(first) <= int(last) < depth):
        raise InputError(
            f"--layers={text} is not a range of the LLM's {depth} layers; give the first and the "
            "last, such as 5-13."
        )
    return int(first), int(last)


def _config(
    arguments: AlignArguments,
    *,
    layers: tuple[int, int],
    temperature: float,
    max_doc_tokens: int | None,
) -> AlignmentConfig:
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


def _train(
    llm: FrozenLM,
    learned: Sequence[AlignmentExample],
    data: _Data,
    config: AlignmentConfig,
    start: Adapter | None,
    arguments: AlignArguments,
    keep: Callable[[], None],
) -> Alignment:
    """Train, with the run's state in a folder of its own beside the signals."""
    from routehead_plugins.alignment import align as run

    held_out = [data.examples[key] for key in sorted(data.held_out)]
    content = [config.settings(), llm.name, str(llm.dtype), start and start.fingerprint]
    digest = hashlib.sha256(json.dumps(content).encode())
    for example in (*learned, *held_out):
        digest.update(repr(example).encode())
    folder = (arguments.signals or signals_folder()) / f"alignment-{digest.hexdigest()[:16]}"
    steps = math.ceil(len(learned) / (config.batch_queries * config.accumulate)) * config.epochs
    with _training_bar(steps, keep) as advance:
        return run(
            llm,
            learned,
            config,
            held_out=held_out,
            start=start,
            folder=folder,
            name=arguments.output.resolve().name,
            advance=advance,
        )


def _start(arguments: AlignArguments, options: RerankerOptions) -> Adapter | None:
    """Load the adapter to go on from, if there is one."""
    from routehead_plugins.backbone import Adapter

    if arguments.start is None:
        return None
    return Adapter.from_pretrained(arguments.start, local_files_only=options.local_files_only)


@contextmanager
def _training_bar(steps: int, keep: Callable[[], None]) -> Iterator[Callable[[Progress], None]]:
    """Draw a bar over steps, and a line for every look at the held-out queries."""
    done, shown = 0, -1
    with progress("Training", steps, keep) as advance:

        def step(state: Progress) -> None:
            nonlocal done, shown
            advance(state.step - done)
            done = state.step
            if state.looked != shown:
                shown = state.looked
                figures = ", ".join(f"{name} {value:.4f}" for name, value in state.held_out.items())
                err.print(f"step {shown}, {state.tokens:,} tokens: held-out {figures}")

        yield step


def _with_heads(
    alignment: Alignment,
    llm: FrozenLM,
    data: _Data,
    arguments: AlignArguments,
    options: RerankerOptions,
    keep: Callable[[], None],
) -> Alignment:
    """Choose and weigh heads anew, with and without the adapter, and compare both."""
    from routehead_plugins import training
    from routehead_plugins.alignment import Gain

    temperature = float(alignment.settings["temperature"])
    share = _TEACHER_SHARE if arguments.preference else 1.0
    labelled = []
    for reader in (llm, llm.with_adapter(alignment.adapter)):
        signals = _signals(reader, data, arguments, options, keep)
        labelled.append(_labelled(signals, data, temperature, share))
    (learned, held_out), (aligned, aligned_held_out) = labelled
    try:
        plain = training.fit_weights(learned, aggregation="log", seed=arguments.seed)
        before = _ndcg(plain, held_out)
    except InputError:  # no head adds to the first stage
        queries = held_out.queries
        before = training.each_ndcg([query.first_stage for query in queries], queries)
    heads = training.fit_weights(aligned, aggregation="log", seed=arguments.seed)
    gain = Gain.of("ndcg@10", before, _ndcg(heads, aligned_held_out), sign=1)
    return replace(alignment, heads=replace(heads, method="aligned, weights"), gain=gain)


def _ndcg(heads: HeadSet, signals: SignalSet) -> Tensor:
    """Measure nDCG@10 of every query by some heads, shape (queries,)."""
    from routehead_plugins import training

    scores = [training.offline_scores(query, heads, signals.heads) for query in signals.queries]
    return training.each_ndcg(scores, signals.queries)


def _signals(
    llm: FrozenLM,
    data: _Data,
    arguments: AlignArguments,
    options: RerankerOptions,
    keep: Callable[[], None],
) -> tuple[SignalSet, SignalSet]:
    """Compute signals of the queries that were learned from, and of those held out."""
    from routehead_plugins.layouts import get_layout
    from routehead_plugins.signals import CollectOptions, collect_signals

    folder = arguments.signals or signals_folder()
    collect = CollectOptions(arguments.hits, options.max_doc_tokens)
    sets: list[list[SignalSet]] = [[], []]
    label = "without adapter" if llm.adapter is None else "with adapter"
    for kept, keys in zip(sets, (data.for_heads, sorted(data.held_out)), strict=True):
        for number, part in enumerate(data.parts):
            ids = [query_id for own, query_id in keys if own == number]
            # Queries without judgments are read as well.
            qrels = {**{key: {} for key in ids}, **part.collection.qrels}
            collection = replace(part.collection, qrels=qrels)
            title = f"{collection.name}: signals {label}"
            with progress(title, len(ids), keep) as advance:
                signals = collect_signals(
                    collection,
                    llm,
                    get_layout(arguments.layout),
                    folder,
                    collect,
                    query_ids=ids,
                    advance=advance,
                )
            # Queries of several collections may have the same id.
            named = [replace(q, query_id=f"{number} {q.query_id}") for q in signals.queries]
            kept.append(signals.subset(named))
    return reduce(add, sets[0]), reduce(add, sets[1])


def _labelled(
    signals: tuple[SignalSet, SignalSet], data: _Data, temperature: float, share: float
) -> tuple[SignalSet, SignalSet]:
    """Add the teacher's judgments: a share for learning; for judging, where there are no others."""
    from routehead_plugins.signals import with_teacher

    learned, held_out = signals
    scores: dict[str, Any] = {
        f"{number} {query_id}": values
        for number, own in enumerate(data.scores)
        for query_id, values in own.items()
    }
    return (
        with_teacher(learned, scores, temperature, share),
        with_teacher(held_out, scores, temperature, 0.0),
    )
