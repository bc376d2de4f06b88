"""`routehead align`: train an adapter with which the heads' attention ranks documents better."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any

import typer

from routehead_plugins.cli.align_arguments import AlignArguments, check, config_of
from routehead_plugins.cli.align_data import (
    Data,
    gather_parts,
    in_pools,
    load_teacher,
    teacher_scores,
)
from routehead_plugins.cli.options import LLM, with_options
from routehead_plugins.cli.runtime import err, progress, resumable, signals_folder
from routehead_plugins.cli.train import command_line
from routehead_plugins.errors import InputError
from routehead_plugins.options import RerankerOptions

if TYPE_CHECKING:
    from torch import Tensor

    from routehead_plugins.alignment import Alignment, AlignmentConfig, AlignmentExample, Progress
    from routehead_plugins.backbone import Adapter, FrozenLM
    from routehead_plugins.heads import HeadSet
    from routehead_plugins.signals import SignalSet

# Share of a teacher in the labels by which heads are chosen, where judgments are learned from too.
_TEACHER_SHARE = 0.5


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
    check(arguments)
    start = _start(arguments, options)  # before hours of work
    parts = gather_parts(arguments, options, keep)
    teacher = load_teacher(arguments, options)
    scores, temperature = teacher_scores(parts, teacher, arguments, keep)
    data = Data.of(parts, scores, arguments)
    learned = [data.examples[key] for key in data.learned]
    err.print(f"{len(learned)} queries to learn from, {len(data.held_out)} held out")
    learned = in_pools(learned, teacher, arguments)
    llm, config = _llm_and_config(arguments, options, temperature)
    alignment = _train(llm, learned, data, config, start, arguments, keep)
    return _with_heads(alignment, llm, data, arguments, options, keep)


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
    config = config_of(
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


def _train(
    llm: FrozenLM,
    learned: Sequence[AlignmentExample],
    data: Data,
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
    return Adapter.from_pretrained(arguments.start, **options.hub)


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
    data: Data,
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
    data: Data,
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
            qrels = {**{key: {} for key in ids}, **part.qrels}
            collection = replace(part, qrels=qrels)
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
    signals: tuple[SignalSet, SignalSet], data: Data, temperature: float, share: float
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
