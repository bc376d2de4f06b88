"""`routehead train`: train a router on BEIR folders, with or without judgments."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from routehead_plugins.cli.options import LLM, PROMPT, Seed, Signals, with_options
from routehead_plugins.cli.runtime import (
    ROUTER_FILES,
    check_bm25,
    check_minimum,
    check_new_file,
    check_new_folder,
    err,
    load_llm,
    progress,
    resumable,
    signals_folder,
)
from routehead_plugins.cli.training_data import judged_queries_of, load_texts, training_parts
from routehead_plugins.errors import InputError
from routehead_plugins.io import Collection
from routehead_plugins.options import RerankerOptions

if TYPE_CHECKING:
    from routehead_plugins.backbone import FrozenLM
    from routehead_plugins.layouts import Layout
    from routehead_plugins.selection import Router
    from routehead_plugins.signals import SignalSet
    from routehead_plugins.training import FitOptions


@dataclass(frozen=True)
class TrainArguments:
    """Options of `routehead train`."""

    collection: Annotated[
        list[Path],
        "A BEIR folder: corpus.jsonl, queries.jsonl, qrels/test.tsv and optionally run.bm25.trec; "
        "with --synthesize, corpus.jsonl is enough. Can be repeated.",
    ]
    output: Annotated[Path, "Output folder of the router."]
    synthesize: Annotated[
        int | None, "Number of queries that the LLM writes from each corpus, without judgments."
    ] = None
    judged: Annotated[bool, "Learn from the collections' own judged queries, if any."] = True
    teacher: Annotated[
        float, "Share of query likelihood in the labels, 0 to 1: one forward pass per candidate."
    ] = 0.0
    queries: Annotated[int | None, "Maximum judged queries per collection.  [default: all]"] = None
    hits: Annotated[int, "Candidates per query."] = 20
    objective: Annotated[
        str,
        "**listwise**: signed weights of heads, corrected per query; **labels**: as RouteHead; "
        "**neighbours**: the vote of similar training queries.",
    ] = "listwise"
    layer: Annotated[
        int | None, "Embed queries after this layer.  [default: at four fifths of the depth]"
    ] = None
    pooling: Annotated[
        str, "Embed queries by the **mean** of their tokens, or by the **last** token."
    ] = "mean"
    max_layer: Annotated[int | None, "Deepest layer to read heads of.  [default: the last]"] = None
    candidates: Annotated[int, "For labels: K, number of heads to choose from."] = 32
    max_heads: Annotated[int, "For labels: P, maximum number of heads read for a query."] = 8
    utility: Annotated[
        str | None,
        "For labels: ndcg, reciprocal_rank, correlation or margin.  [default: with the shrinkage, "
        "the best on documents held out of the search]",
    ] = None
    shrinkage: Annotated[
        float | None, "For labels: weight of the heads' mean utility over all queries, 0 to 1."
    ] = None
    groups: Annotated[
        int | None, "For labels: number of groups of similar queries that share a label."
    ] = None
    signals: Signals = None
    seed: Seed = 0


@with_options(*LLM, *PROMPT, "document_cache", layout="parallel", document_cache="2GB")
def train(arguments: TrainArguments, options: RerankerOptions) -> None:
    """Train a router, which chooses the heads to read for each query.

    The LLM is run once per query and stays frozen. The signals of its heads are kept on disk, so
    that a job that was stopped resumes. Without judgments, --synthesize has the LLM write the
    queries from your own passages.

    Example: routehead train --collection my-corpus --synthesize 1000 --output my-router; then:
    routehead rerank --router my-router ...
    """
    router = train_router(arguments, options)
    typer.echo(f"{arguments.output}: {summary(router)}")


def train_router(arguments: TrainArguments, options: RerankerOptions) -> Router:
    """Compute signals, train, and write the router's folder."""
    from routehead_plugins.layouts import make_layout
    from routehead_plugins.training import router_card

    _check(arguments)
    fit_options = _fit_options(arguments)
    layout = make_layout(options)
    collections = [load_texts(path, arguments) for path in arguments.collection]
    judged = [judged_queries_of(collection, arguments) for collection in collections]
    if arguments.synthesize is not None:
        check_bm25()
    llm = load_llm(options)
    layer = llm.embedding_layer if arguments.layer is None else arguments.layer
    if arguments.max_layer is not None:
        layer = min(layer, arguments.max_layer)  # no deeper than any head to be chosen
    # In the late layout, the pass that reads a query embeds it as well.
    late = layout.name == "late"
    llm.check_embedding_layer(layer, last=not late)
    fit_options = replace(fit_options, layer=layer, source="tail" if late else "query")
    _check_data(judged, llm, layout, fit_options, arguments)
    parts: list[dict[str, Any]] = []
    signal_sets = []
    with resumable() as keep:
        for collection, own in zip(collections, judged, strict=True):
            for kind, part in training_parts(collection, own, llm, arguments, keep):
                signals = _signals(part, llm, layout, arguments, options, keep)
                signal_sets.append(signals)
                count = len(signals.queries)
                parts.append({"name": collection.name, "kind": kind, "queries": count})
                err.print(f"{collection.name}: {count} {kind} queries")
        reliable = arguments.utility is None and arguments.shrinkage is None
        signals = reduce(add, signal_sets)
        router = _fit(signals, llm, layout, fit_options, choose_labels=reliable)
        router = replace(
            router,
            max_doc_tokens=options.max_doc_tokens,
            description={**(router.description or {}), "parts": parts, "seed": arguments.seed},
        )
        router.save_pretrained(arguments.output, card=router_card(router, parts, command_line()))
    return router


def summary(router: Router) -> str:
    """Describe a trained router in one line."""
    count = int((router.bias != 0).sum())
    strength = (router.description or {}).get("strength")
    routing = (
        "static: no correction was clearly better" if strength is None else f"strength {strength}"
    )
    return f"{router.kind} router for {router.heads.model}, {count} heads, {routing}"


def _check(arguments: TrainArguments) -> None:
    """Check the arguments before anything is read or loaded."""
    if not arguments.collection:
        raise InputError("--collection is missing; give a BEIR folder.")
    for name in ("synthesize", "queries", "hits"):
        check_minimum(f"--{name}", getattr(arguments, name))
    check_minimum("--max-layer", arguments.max_layer, 0)
    if not 0 <= arguments.teacher <= 1:
        raise InputError(f"--teacher={arguments.teacher} must be from 0 to 1.")
    for path, content in ((arguments.output, "the router"), (arguments.signals, "signals")):
        if path is not None and os.path.isfile(path):
            raise InputError(f"{path} is a file; name a folder for {content}.")
    _check_output(arguments.output)
    check_new_folder("--signals", arguments.signals or signals_folder())
    if not arguments.judged and arguments.synthesize is None:
        raise InputError(
            "without judgments there is nothing to learn from; give --synthesize, such as 500."
        )


def _check_output(folder: Path) -> None:
    """Check that a router can be written, and replaces nothing but a router."""
    check_new_folder("--output", folder)
    if not os.path.exists(folder):
        return
    for name in ROUTER_FILES:
        check_new_file("--output", folder / name)
    config, _, card = (folder / name for name in ROUTER_FILES)
    # A router's configuration is written last, so that a killed job leaves the card alone.
    path, mark = (config, b"routehead-router") if config.exists() else (card, b"routehead-plugins")
    if path.exists() and mark not in path.read_bytes():
        raise InputError(
            f"--output={folder} has a {path.name} that is no router's, and would be overwritten; "
            "name another folder."
        )


def _check_data(
    judged: Sequence[Collection | None],
    llm: FrozenLM,
    layout: Layout,
    fit_options: FitOptions,
    arguments: TrainArguments,
) -> None:
    """Check that a router can be fitted on the judged queries, before the LLM runs.

    What the LLM adds, queries or the teacher's judgments, is not known yet.
    """
    from routehead_plugins.signals import CollectOptions, judged_queries
    from routehead_plugins.training import check_fit

    if arguments.synthesize is None and not arguments.teacher:
        collect = CollectOptions(arguments.hits)
        sets = [judged_queries(part, llm, layout, collect) for part in judged if part is not None]
        check_fit(reduce(add, sets), fit_options)


def _fit_options(arguments: TrainArguments) -> FitOptions:
    """Return the options of the fit; the layer is final only when the LLM is loaded."""
    from routehead_plugins.training import FitOptions, LabelOptions

    labels = LabelOptions(
        candidates=arguments.candidates,
        max_heads=arguments.max_heads,
        utility=arguments.utility or "ndcg",
        shrinkage=arguments.shrinkage or 0.0,
        groups=arguments.groups,
        seed=arguments.seed,
    )
    return FitOptions(
        layer=arguments.layer or 0,
        pooling=arguments.pooling,
        objective=arguments.objective,
        max_layer=arguments.max_layer,
        labels=labels,
        seed=arguments.seed,
    )


def _signals(
    collection: Collection,
    llm: FrozenLM,
    layout: Layout,
    arguments: TrainArguments,
    options: RerankerOptions,
    keep: Callable[[], None],
) -> SignalSet:
    """Compute the signals of a collection, its labels mixed with the teacher's."""
    from routehead_plugins.signals import (
        CollectOptions,
        collect_likelihoods,
        collect_signals,
        mix_teacher,
    )

    folder = arguments.signals or signals_folder()
    collect = CollectOptions(arguments.hits, options.max_doc_tokens)
    with progress(f"{collection.name}: signals", len(collection.topics), keep) as advance:
        signals = collect_signals(collection, llm, layout, folder, collect, advance=advance)
    if not arguments.teacher:
        return signals
    with progress(f"{collection.name}: teacher", len(collection.topics), keep) as advance:
        likelihoods = collect_likelihoods(
            collection,
            llm,
            folder,
            hits=arguments.hits,
            max_doc_tokens=options.max_doc_tokens,
            advance=advance,
        )
    return mix_teacher(signals, likelihoods, arguments.teacher)


def _fit(
    signals: SignalSet, llm: FrozenLM, layout: Layout, options: FitOptions, *, choose_labels: bool
) -> Router:
    """Embed the queries, fit the router, and record the choice of labels, if there is one."""
    from routehead_plugins import training
    from routehead_plugins.layouts import LateLayout

    with err.status("Embedding the queries ..."):
        texts = [query.query for query in signals.queries]
        embed = partial(layout.embed, llm) if isinstance(layout, LateLayout) else llm.embed
        embeddings = embed(texts, layer=options.layer, pooling=options.pooling)
    description: dict[str, Any] = {}
    if options.objective != "listwise":
        choices = training.label_choices(options.labels) if choose_labels else [options.labels]
        with err.status("Searching for labels on half of each query's documents ..."):
            usable = training.usable(signals, embeddings, options)
            choice = training.choose_labels(*usable, choices)
        options = replace(options, labels=choice.options)
        description["labels"] = choice.to_dict()
    with err.status(f"Fitting on {len(signals.queries)} queries ..."):
        router = training.fit_router(signals, embeddings, options)
    return replace(router, description={**(router.description or {}), **description})


def command_line() -> str:
    """Return the command line without the folders of this machine, for the card."""
    line = shlex.join(["routehead", *map(_without_folder, sys.argv[1:])])
    # A file name may hold bytes that are no text.
    return line.encode("utf-8", "backslashreplace").decode()


def _without_folder(argument: str) -> str:
    option, separator, value = "", "", argument
    if argument.startswith("--"):
        option, separator, value = argument.rpartition("=")
    if value.startswith(("/", ".", "~")):
        value = value.rstrip("/").rsplit("/", 1)[-1]
    return f"{option}{separator}{value}"
