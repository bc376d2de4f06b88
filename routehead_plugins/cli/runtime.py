"""Helpers that commands share: loading the LLM, candidates from BM25, a progress bar.

Importing this module loads no torch; its functions import the rooms they use.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from routehead_plugins import __version__
from routehead_plugins.adapters.pyserini import HeadRoutedStage, bm25_run, build_index
from routehead_plugins.data import Document, non_blank_indices
from routehead_plugins.errors import InputError
from routehead_plugins.io import (
    CORPUS_FILE,
    QRELS_FILE,
    RUN_FILE,
    TOPICS_FILE,
    Collection,
    check_output,
    user_cache,
)
from routehead_plugins.options import RerankerOptions

if TYPE_CHECKING:
    from routehead_plugins.backbone import FrozenLM
    from routehead_plugins.reranker import HeadRoutedAttentionReranker
    from routehead_plugins.selection import Selector

# Results go to stdout, messages about the work itself go here.
err = Console(stderr=True)


def load_llm(options: RerankerOptions, selector: Selector | None = None) -> FrozenLM:
    """Load the LLM, or only the layers that a given selector needs, and show a status line."""
    from routehead_plugins.backbone import FrozenLM, check_max_doc_tokens

    check_max_doc_tokens(options.max_doc_tokens)
    with err.status(f"Loading {options.model} ..."):
        return FrozenLM.from_options(options, None if selector is None else selector.layers)


def load_reranker(options: RerankerOptions, selector: Selector) -> HeadRoutedAttentionReranker:
    """Load the LLM and compose a re-ranker, with a status line."""
    from routehead_plugins.reranker import HeadRoutedAttentionReranker

    with err.status(f"Loading {options.model} ..."):
        return HeadRoutedAttentionReranker.from_options(options, selector=selector)


ROUTER_FILES = ("config.json", "model.safetensors", "README.md")
"""Names of the files in a router's folder."""

# Options that do not change scores, and those that every command records in a way of its own.
NOT_SETTINGS = {
    *("document_cache", "local_files_only", "token", "cache_dir", "adapter"),
    *("heads", "router", "first_stage_weight"),
}


def settings(options: RerankerOptions) -> dict[str, Any]:
    """Return the options that scores depend on, with the device and dtype that are picked.

    The choice of heads and the first-stage weight are left to the commands.
    """
    from routehead_plugins.backbone import Adapter, pick_device, pick_dtype

    adapter = options.adapter
    if isinstance(adapter, str):
        adapter = Adapter.from_pretrained(adapter, **options.hub)
    device = pick_device(options.device)
    names = [field.name for field in fields(options) if field.name not in NOT_SETTINGS]
    own = {} if adapter is None else {"adapter": adapter.label}
    return (
        {name: getattr(options, name) for name in names}
        | own
        | {
            "device": device.type,
            "dtype": str(pick_dtype(options.dtype, device)).removeprefix("torch."),
            "version": __version__,
        }
    )


def fitted_weight(selector: Selector) -> float | None:
    """Return the first-stage weight that was fitted together with the heads, if any."""
    from routehead_plugins.selection import FixedHeads, Router

    if isinstance(selector, FixedHeads | Router):
        return selector.heads.recipe.first_stage_weight
    return None


def check_minimum(option: str, value: int | None, minimum: int = 1) -> None:
    """Check that an option's number is not too small; None passes."""
    if value is not None and value < minimum:
        raise InputError(f"{option}={value} must be {minimum} or more.")


def check_names(collections: Sequence[Path]) -> None:
    """Check that no two collections have the same name, the name of their folder."""
    names = [path.resolve().name for path in collections]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise InputError(
            f"two collections are called {repeated[0]!r}; give each once, or rename one."
        )


@contextmanager
def bm25_stage(corpus: Path, hits: int, index: Path | None = None) -> Iterator[HeadRoutedStage]:
    """Open a Lucene index for BM25 retrieval, or without one a temporary index of the corpus."""
    if index is not None:
        yield HeadRoutedStage.from_index(index, hits=hits)
        return
    with tempfile.TemporaryDirectory(prefix="routehead-") as folder:
        with err.status(f"Indexing {corpus} with Lucene ..."):
            built = build_index(corpus, Path(folder) / "index")
        yield HeadRoutedStage.from_index(built, hits=hits)


def with_candidates(collection: Collection, topics: Mapping[str, str], hits: int) -> Collection:
    """Return the collection with a run: its own, or BM25's ``hits`` candidates for the topics."""
    if collection.run is not None:
        return collection
    with bm25_stage(collection.path, hits) as stage:
        return replace(collection, run=bm25_run(stage.searcher, topics, hits))


def check_bm25() -> None:
    """Start Lucene, so that its absence is noticed before hours of work.

    Raises:
        JavaError: No JDK that Lucene can run on was found.
        MissingExtraError: Pyserini is not installed.
    """
    from routehead_plugins.adapters import _jvm

    _jvm.load("pyserini.search.lucene")


def sample_queries(collection: Collection, size: int | None, seed: int) -> list[str]:
    """Draw ids of at most ``size`` judged queries, or all, in the collection's order."""
    judged = [query_id for query_id in collection.topics if query_id in collection.qrels]
    # All are shuffled whatever the size, so that a smaller sample is part of a larger one.
    shuffled = random.Random(f"{seed} {collection.name}").sample(judged, len(judged))
    sample = set(shuffled[:size])
    return [query_id for query_id in judged if query_id in sample]


def signals_folder() -> Path:
    """Return the folder that keeps signals when none is named: the user's cache.

    Raises:
        InputError: There is no home folder to keep a cache in.
    """
    folder = user_cache("signals")
    if folder is None:
        raise InputError(
            "there is no home folder to keep signals in; set XDG_CACHE_HOME, or name a folder for "
            "signals."
        )
    return folder


def check_new_file(option: str, path: Path | None, inputs: Iterable[Path | None] = ()) -> None:
    """Check that an output file can be written, with its folder, before the work for it is done.

    Args:
        option: Name of the option, for the errors.
        path: Path of the file; ``None`` passes.
        inputs: Files of the same job; those that are missing or ``None`` are no matter.

    Raises:
        InputError: The path is a folder, cannot be written, or is one of the inputs.
    """
    if path is None:
        return
    # Functions of os.path, unlike those of Path, return False for what is no path at all.
    if os.path.isdir(path):
        raise InputError(f"{option}={path} is a folder; name a file.")
    check_output(_first_missing(path))
    if not os.path.exists(path):
        return
    for given in inputs:
        if given is not None and os.path.exists(given) and path.samefile(given):
            raise InputError(f"{option}={path} is an input as well, {given}; name another file.")


def check_new_folder(option: str, path: Path) -> None:
    """Check that files can be written into a folder, which may not exist yet.

    Raises:
        InputError: The path is a file, or the folder cannot be made or written to.
    """
    if os.path.exists(path) and not os.path.isdir(path):
        raise InputError(f"{option}={path} is a file; name a folder.")
    check_output(_first_missing(path / "new"))


def _first_missing(path: Path) -> Path:
    """Return the path itself or, without its folder, the first of its folders to be made."""
    while not os.path.exists(path.parent):
        path = path.parent
    return path


def collection_files(collections: Iterable[Path]) -> list[Path]:
    """Return the files of BEIR folders, whether they exist or not."""
    names = (CORPUS_FILE, TOPICS_FILE, QRELS_FILE, RUN_FILE)
    return [folder / name for folder in collections for name in names]


def path_of(name: object) -> Path | None:
    """Return the path of an input that may also be the name of something else."""
    return Path(name) if isinstance(name, str | Path) else None


def check_reading(options: RerankerOptions, selector: Selector) -> None:
    """Check layout, cache and lengths before the LLM is loaded.

    Raises:
        InputError: A value cannot be used, or the heads were chosen for another layout.
    """
    from routehead_plugins.backbone import check_max_doc_tokens
    from routehead_plugins.layouts import check_layout, make_layout

    check_layout(make_layout(options, selector.layout), selector.layout)
    check_max_doc_tokens(options.max_doc_tokens)


@contextmanager
def resumable() -> Iterator[Callable[[], None]]:
    """Say when a job is stopped that it can be resumed, if a part of it was kept.

    Yields:
        A function to call when a part has been kept.

    Raises:
        KeyboardInterrupt: The job was stopped; the message says that it can be resumed.
    """
    kept = False

    def keep() -> None:
        nonlocal kept
        kept = True

    try:
        yield keep
    except KeyboardInterrupt as error:
        if not kept:
            raise
        raise KeyboardInterrupt(
            "stopped; what is done is kept: run the same command again to resume."
        ) from error


def ranked(
    documents: Sequence[Document], scores: Sequence[float], weight: float
) -> list[tuple[str, float]]:
    """Order documents by score, fused with the weighted retrieval scores; blank ones rank last.

    The result is pairs of document id and score, best first. A weight of 0 fuses nothing.
    """
    final = list(scores)
    indices = non_blank_indices(documents)
    if weight and indices:
        import torch

        from routehead_plugins.scoring import fuse

        fused = fuse(
            torch.tensor([scores[index] for index in indices]),
            # In float64, as the re-ranker fuses scores.
            torch.tensor([documents[i].score or 0.0 for i in indices], dtype=torch.float64),
            weight,
        )
        final = [float(fused.min()) - 1] * len(documents)
        for index, score in zip(indices, fused.tolist(), strict=True):
            final[index] = score
    pairs = zip((document.id or "" for document in documents), final, strict=True)
    return sorted(pairs, key=lambda pair: -pair[1])


@contextmanager
def progress(
    description: str, total: int, keep: Callable[[], None] = lambda: None
) -> Iterator[Callable[..., None]]:
    """Draw a progress bar on standard error.

    Args:
        description: Text before the bar.
        total: Number of steps.
        keep: Called after every step; see ``resumable``.

    Yields:
        A function that advances the bar, by one step or by the number of steps it is given.
    """
    text = TextColumn("{task.description}")
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err) as bar:
        task = bar.add_task(description, total=total)

        def advance(steps: int = 1) -> None:
            keep()
            bar.advance(task, steps)

        yield advance
