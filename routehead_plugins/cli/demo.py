"""`routehead demo`: re-rank queries of the bundled collection and show the change."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from routehead_plugins.cli.options import HEADS, LLM, with_options
from routehead_plugins.cli.runtime import (
    bm25_stage,
    err,
    fitted_weight,
    load_reranker,
    progress,
    ranked,
)
from routehead_plugins.evaluation import ResultTable, evaluate
from routehead_plugins.io import BUNDLED, Collection, Topics, load_collection
from routehead_plugins.options import RerankerOptions

if TYPE_CHECKING:
    from routehead_plugins.reranker import HeadRoutedAttentionReranker
    from routehead_plugins.selection import Selector

# Relevance grade of passages that answer the query in full.
_FULL_ANSWER = 3

# Method -> query -> pairs of document id and score, best first.
_Rankings = Mapping[str, Mapping[str, Sequence[tuple[str, float]]]]


@dataclass(frozen=True)
class DemoArguments:
    """Options of `routehead demo`."""

    queries: Annotated[int, typer.Option(help="Bundled queries to run.", min=1)] = 24
    hits: Annotated[int, typer.Option(help="BM25 candidates to re-rank per query.", min=1)] = 20


@with_options(*HEADS, *LLM)
def demo(arguments: DemoArguments, options: RerankerOptions) -> None:
    """Show the main use: BM25 retrieves candidates, the LLM's attention re-ranks them.

    Indexes the bundled collection with Lucene, re-ranks, and prints every query before and after,
    then nDCG@10 of both. The embedded LLM reads the documents once, into a document index, unless
    heads or a router are given. Needs no network.
    """
    collection = load_collection(BUNDLED)
    topics = _spread(collection.topics, arguments.queries)
    options = _with_layout(options)
    rankings = _rankings(collection, topics, arguments.hits, options)
    qrels = {query_id: collection.qrels[query_id] for query_id in topics}
    evaluations = {method: evaluate(ranking, qrels) for method, ranking in rankings.items()}
    console = Console()
    console.print(_rank_table(collection, topics, rankings))
    console.print(ResultTable({collection.name: evaluations}, baseline="bm25").to_rich())
    console.print(
        f"{len(topics)} of {len(collection.topics)} bundled queries (--queries for more), "
        f"BM25 top {arguments.hits}, read by {options.model!r}.\n"
        "The collection is small and was written for this demo: for claims, run "
        "`routehead evaluate` on your own.",
        highlight=False,
    )


def _with_layout(options: RerankerOptions) -> RerankerOptions:
    """Choose the late layout where heads for it come with the library and none are given."""
    from routehead_plugins.selection import FixedHeads, choose_selector

    late = replace(options, layout="late")
    given = options.heads is not None or options.router is not None
    return late if not given and isinstance(choose_selector(late), FixedHeads) else options


@contextmanager
def _reading(
    collection: Collection, options: RerankerOptions, selector: Selector
) -> Iterator[HeadRoutedAttentionReranker]:
    """Load the re-ranker; in the late layout, index the collection for it."""
    reranker = load_reranker(options, selector)
    err.print(
        f"{options.model}: {reranker.llm.num_layers} layers, {reranker.llm.dtype}, "
        f"{reranker.llm.device}"
    )
    if options.layout != "late":
        yield reranker
        return
    with tempfile.TemporaryDirectory(prefix="routehead-") as folder:
        builder = reranker.index_builder(folder)
        with builder, progress("Indexing", len(collection.corpus)) as advance:
            for count in builder.add(collection.corpus.values()):
                advance(count)
        indexed = replace(options, documents=folder)
        yield type(reranker).from_options(indexed, reranker.llm, selector)


def _rankings(
    collection: Collection, topics: Topics, hits: int, options: RerankerOptions
) -> _Rankings:
    """Rank the candidates of every query by every method; the first method is BM25."""
    from routehead_plugins.selection import ALL, FIRST_STAGE, FUSED, ROUTED, Router, choose_selector

    selector = choose_selector(options)
    name = options.heads or (ROUTED if isinstance(selector, Router) else options.layout or ALL)
    weights = {str(name): 0.0}
    if not fitted_weight(selector):  # otherwise the scores include the first stage already
        weights[f"{name}{FUSED}"] = 1.0
    rankings: dict[str, dict[str, list[tuple[str, float]]]] = {
        method: {} for method in (FIRST_STAGE, *weights)
    }
    with (
        bm25_stage(BUNDLED, hits) as bm25,
        _reading(collection, options, selector) as reranker,
        progress("Re-ranking", len(topics)) as advance,
    ):
        for query_id, query in topics.items():
            documents = bm25.retrieve(query)
            scores = reranker.score(query, documents)
            rankings[FIRST_STAGE][query_id] = [(d.id or "", d.score or 0.0) for d in documents]
            for method, weight in weights.items():
                rankings[method][query_id] = ranked(documents, scores, weight)
            advance()
    return rankings


def _spread(topics: Topics, count: int) -> Topics:
    """Take queries at equal steps, so that every domain and style has its share."""
    items = list(topics.items())
    count = min(count, len(items))
    return dict(items[number * len(items) // count] for number in range(count))


def _rank_table(collection: Collection, topics: Topics, rankings: _Rankings) -> Table:
    """Show one row per query: the rank of its first full answer, before and after."""
    table = Table(box=SIMPLE_HEAD, title="Rank of the first full answer", pad_edge=False)
    table.add_column("query")
    for method in rankings:
        table.add_column(method, justify="right")
    for query_id, query in topics.items():
        grades = collection.qrels[query_id]
        before, *after = (_answer_rank(ranking[query_id], grades) for ranking in rankings.values())
        table.add_row(Text(query), *(_rank_text(before, rank) for rank in (before, *after)))
    return table


def _answer_rank(ranking: Sequence[tuple[str, float]], grades: Mapping[str, int]) -> int | None:
    answers = (
        rank for rank, (docid, _) in enumerate(ranking, 1) if grades.get(docid, 0) >= _FULL_ANSWER
    )
    return next(answers, None)


def _rank_text(before: int | None, after: int | None) -> Text:
    """Show a rank, colored if it changed; "-" if there is no full answer among the candidates."""
    if before is None or after is None or before == after:
        return Text("-" if after is None else str(after))
    return Text(f"{after} up", "green") if after < before else Text(f"{after} down", "red")
