"""Queries to learn from: those of judged collections, and those that an LLM writes from texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from routehead_plugins.cli.runtime import progress, sample_queries, signals_folder, with_candidates
from routehead_plugins.errors import CollectionError
from routehead_plugins.io import (
    CORPUS_FILE,
    QRELS_FILE,
    TOPICS_FILE,
    Collection,
    load_collection,
    read_corpus,
)

if TYPE_CHECKING:
    from routehead_plugins.backbone import FrozenLM


class DataArguments(Protocol):
    """Options on training data that commands share."""

    @property
    def synthesize(self) -> int | None:
        """Number of queries to write from each corpus."""

    @property
    def judged(self) -> bool:
        """Whether to learn from the collections' own judged queries."""

    @property
    def queries(self) -> int | None:
        """Maximum judged queries per collection."""

    @property
    def hits(self) -> int:
        """Candidates per query."""

    @property
    def signals(self) -> Path | None:
        """Folder that keeps what is finished."""

    @property
    def seed(self) -> int:
        """Random seed."""


def load_texts(path: Path, arguments: DataArguments, *, phrases: bool = False) -> Collection:
    """Load a collection, or its corpus alone where queries are synthesized or are phrases."""
    corpus_is_enough = phrases or arguments.synthesize is not None
    if corpus_is_enough and not all((path / name).exists() for name in (TOPICS_FILE, QRELS_FILE)):
        return Collection(path.resolve().name, path, read_corpus(path / CORPUS_FILE), {}, {})
    collection = load_collection(path)
    if not corpus_is_enough and not sample_queries(collection, None, arguments.seed):
        raise CollectionError(
            f"{path / QRELS_FILE} judges none of the queries of {TOPICS_FILE}; give judgments "
            "of some, or --synthesize, such as 500."
        )
    return collection


def judged_queries_of(collection: Collection, arguments: DataArguments) -> Collection | None:
    """Return the judged queries to learn from, with their candidates; ``None`` for none."""
    query_ids = sample_queries(collection, arguments.queries, arguments.seed)
    if not arguments.judged or not query_ids:
        return None
    topics = {query_id: collection.topics[query_id] for query_id in query_ids}
    return with_candidates(replace(collection, topics=topics), topics, arguments.hits)


def training_parts(
    collection: Collection,
    judged: Collection | None,
    llm: FrozenLM,
    arguments: DataArguments,
    keep: Callable[[], None],
) -> list[tuple[str, Collection]]:
    """Return kinds of queries to learn from, each with a collection of these queries."""
    from routehead_plugins.signals import consistent, synthesize_queries

    parts = [] if judged is None else [("judged", judged)]
    hits, count = arguments.hits, arguments.synthesize
    if count is not None:
        folder = arguments.signals or signals_folder()
        with progress(f"{collection.name}: writing queries", count, keep) as advance:
            synthesized = synthesize_queries(
                collection, llm, count, folder, seed=arguments.seed, advance=advance
            )
        if not synthesized.topics:
            raise CollectionError(
                f"{collection.path}: none of {count} texts by {llm.name!r} can be used as a query; "
                "give a larger LLM, or longer passages."
            )
        retrieved = with_candidates(synthesized, synthesized.topics, hits)
        parts.append(("synthesized", consistent(retrieved, hits)))
    return parts
