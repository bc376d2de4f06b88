"""`routehead train`: from BEIR folders, judged or not, to a router's folder."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from routehead_plugins.backbone import FrozenLM
from routehead_plugins.cli.detect import sample_queries, signals_folder
from routehead_plugins.cli.runtime import ModelOptions, err, progress, with_candidates
from routehead_plugins.errors import CollectionError, InputError
from routehead_plugins.io import (
    CORPUS_FILE,
    QRELS_FILE,
    TOPICS_FILE,
    Collection,
    load_collection,
    read_corpus,
)
from routehead_plugins.layouts import Layout, get_layout
from routehead_plugins.selection import Router
from routehead_plugins.signals import (
    CollectOptions,
    SignalSet,
    collect_likelihoods,
    collect_signals,
    consistent,
    mix_teacher,
    synthesize_queries,
)
from routehead_plugins.training import (
    FitOptions,
    LabelOptions,
    choose_labels,
    fit_router,
    label_choices,
    router_card,
    usable,
)

LAYOUT, DOCUMENT_CACHE = "parallel", "2GB"
_DEPTH = 0.8  # of the layers, after which queries are embedded


@dataclass(frozen=True)
class TrainingJob:
    """What to train, and on what.

    Attributes:
        collections: BEIR folders; the corpus alone will do where queries are synthesized.
        output: The router's folder.
        synthesize: How many queries are written from each corpus.
        judged: Whether to learn from the collections' own queries and judgments, where there are
            any.
        teacher: Share of the LLM's query likelihood in what is learned, from 0 to 1.
        queries: Judged queries of each collection at most, drawn by the seed; ``None`` for all.
        hits: Candidates per query.
        objective: See ``training.fit``.
        layer: After which queries are embedded; ``None`` for four fifths of the way.
        pooling: How they are, see ``FrozenLM.embed``.
        max_layer: No head of a deeper layer is chosen.
        labels: How pseudo-labels are searched for.
        reliable_labels: Whether their utility and shrinkage are chosen by what labels are worth on
            documents they were not searched on, instead.
        signals: Folder in which what was computed is kept; ``None`` for the user's cache.
        seed: Of everything that is drawn.
        llm: How the LLM is loaded and prompted.
    """

    collections: Sequence[Path]
    output: Path
    synthesize: int | None = None
    judged: bool = True
    teacher: float = 0.0
    queries: int | None = None
    hits: int = 20
    objective: str = "listwise"
    layer: int | None = None
    pooling: str = "mean"
    max_layer: int | None = None
    labels: LabelOptions = field(default_factory=LabelOptions)
    reliable_labels: bool = False
    signals: Path | None = None
    seed: int = 0
    llm: ModelOptions = field(default_factory=ModelOptions)

    def __post_init__(self) -> None:
        if not self.collections:
            raise InputError("--collection names nothing to learn from; give a BEIR folder.")
        for name, least in (("synthesize", 1), ("queries", 1), ("max_layer", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                option = f"--{name.replace('_', '-')}"
                raise InputError(
                    f"{option}={value} leaves nothing to learn from; give {least} or more."
                )
        if not 0 <= self.teacher <= 1:
            raise InputError(f"--teacher={self.teacher} is no share; give 0 to 1.")
        if self.output.is_file():
            raise InputError(f"{self.output} is a file; name a folder for the router.")
        if not self.judged and self.synthesize is None:
            raise InputError(
                "without judgments there is nothing to learn from; give --synthesize, such as 500."
            )
        if self.signals is not None and self.signals.is_file():
            raise InputError(f"{self.signals} is a file; name a folder for what is computed.")
        CollectOptions(self.hits, self.llm.max_doc_tokens)  # complains
        FitOptions(layer=0, objective=self.objective, pooling=self.pooling)  # likewise

    @property
    def folder(self) -> Path:
        """Where what was computed is kept."""
        return self.signals or signals_folder()


def run_training(job: TrainingJob) -> Router:
    """Compute signals, train, and write the router's folder.

    Whatever was computed is kept, so that a call that was stopped goes on there.

    Raises:
        RouteHeadError: An option is out of range, a collection malformed or without anything to
            learn from, or the LLM fails.
    """
    found = [_load(path, job) for path in job.collections]
    layout = get_layout(
        job.llm.layout or LAYOUT,
        document_cache=job.llm.document_cache,
        window=job.llm.window,
        stride=job.llm.stride,
    )
    llm = job.llm.load()
    layer = _layer(llm, job)
    llm.embed([], layer=layer)  # complains now, and not after hours of work
    parts: list[tuple[dict[str, Any], SignalSet]] = []
    for collection in found:
        for kind, part in _parts(collection, llm, job):
            signals = _signals(part, llm, layout, job)
            what = {"name": collection.name, "kind": kind, "queries": len(signals.queries)}
            parts.append((what, signals))
            err.print(f"{collection.name}: {len(signals.queries)} {kind} queries")
    signals = parts[0][1]
    for _, other in parts[1:]:
        signals = signals + other
    router = _fitted(signals, llm, layer, job)
    data = [what for what, _ in parts]
    router = replace(
        router,
        max_doc_tokens=job.llm.max_doc_tokens,
        description={**(router.description or {}), "parts": data, "seed": job.seed},
    )
    router.save_pretrained(job.output, card=router_card(router, data, _command()))
    return router


def _fitted(signals: SignalSet, llm: FrozenLM, layer: int, job: TrainingJob) -> Router:
    with err.status("Embedding the queries ..."):
        texts = [query.query for query in signals.queries]
        embeddings = llm.embed(texts, layer=layer, pooling=job.pooling)
    options = FitOptions(
        layer=layer,
        pooling=job.pooling,
        objective=job.objective,
        max_layer=job.max_layer,
        labels=replace(job.labels, seed=job.seed),
        seed=job.seed,
    )
    description: dict[str, Any] = {}
    if job.objective != "listwise":
        choices = label_choices(options.labels) if job.reliable_labels else [options.labels]
        with err.status("Searching for labels on half of each query's documents ..."):
            chosen = choose_labels(*usable(signals, embeddings, options), choices)
        options = replace(options, labels=chosen.options)
        description["labels"] = chosen.to_dict()
    with err.status(f"Fitting on {len(signals.queries)} queries ..."):
        router = fit_router(signals, embeddings, options)
    return replace(router, description={**(router.description or {}), **description})


def summary(router: Router) -> str:
    """Say in a line what came out."""
    read = int((router.bias != 0).sum())
    kept = (router.description or {}).get("strength")
    routed = "static: no correction was clearly better" if kept is None else f"strength {kept}"
    return f"{router.kind} router for {router.heads.model}, {read} heads, {routed}"


def _load(path: Path, job: TrainingJob) -> Collection:
    """A collection, or a corpus alone; what it lacks is said before anything is computed."""
    if job.synthesize is None or all((path / name).exists() for name in (TOPICS_FILE, QRELS_FILE)):
        found = load_collection(path)
        if job.synthesize is None and not sample_queries(found, None, job.seed):
            raise CollectionError(
                f"{path / QRELS_FILE} judges none of the queries of {TOPICS_FILE}; give judgments "
                "of some, or --synthesize, such as 500."
            )
        return found
    return Collection(path.resolve().name, path, read_corpus(path / CORPUS_FILE), {}, {})


def _parts(collection: Collection, llm: FrozenLM, job: TrainingJob) -> list[tuple[str, Collection]]:
    """What can be learned from in a collection, with candidates."""
    found = []
    wanted = sample_queries(collection, job.queries, job.seed) if job.judged else []
    if wanted:
        judged = replace(
            collection, topics={query_id: collection.topics[query_id] for query_id in wanted}
        )
        found.append(("judged", with_candidates(judged, judged.topics, job.hits)))
    if job.synthesize is not None:
        with progress(f"{collection.name}: writing queries", job.synthesize) as advance:
            written = synthesize_queries(
                collection, llm, job.synthesize, job.folder, seed=job.seed, advance=advance
            )
        if not written.topics:
            raise CollectionError(
                f"{collection.path}: none of {job.synthesize} texts that {llm.name!r} wrote is a "
                "query; give a larger LLM, or longer passages."
            )
        retrieved = with_candidates(written, written.topics, job.hits)
        found.append(("synthesized", consistent(retrieved, job.hits)))
    return found


def _signals(collection: Collection, llm: FrozenLM, layout: Layout, job: TrainingJob) -> SignalSet:
    options = CollectOptions(job.hits, job.llm.max_doc_tokens)
    with progress(f"{collection.name}: signals", len(collection.topics)) as advance:
        signals = collect_signals(collection, llm, layout, job.folder, options, advance=advance)
    if not job.teacher:
        return signals
    with progress(f"{collection.name}: teacher", len(collection.topics)) as advance:
        likelihoods = collect_likelihoods(
            collection,
            llm,
            job.folder,
            hits=job.hits,
            max_doc_tokens=job.llm.max_doc_tokens,
            advance=advance,
        )
    return mix_teacher(signals, likelihoods, job.teacher)


def _layer(llm: FrozenLM, job: TrainingJob) -> int:
    """After which queries are embedded: never deeper than the heads that may be chosen."""
    layer = round(_DEPTH * llm.num_layers) if job.layer is None else job.layer
    return layer if job.max_layer is None else min(layer, job.max_layer)


def _command() -> str:
    """What was called, without where things lie on this machine."""
    return shlex.join(["routehead", *(_last(argument) for argument in sys.argv[1:])])


def _last(argument: str) -> str:
    option, given, value = (
        argument.rpartition("=") if argument.startswith("--") else ("", "", argument)
    )
    if value.startswith(("/", ".", "~")):
        value = value.rstrip("/").rsplit("/", 1)[-1]
    return f"{option}{given}{value}"
