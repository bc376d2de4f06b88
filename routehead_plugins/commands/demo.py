"""`routehead demo`: the main job on the bundled collection, before and after."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from routehead_plugins.adapters.pyserini import HeadRoutedStage, Hit
from routehead_plugins.collections import Collection, Topics, load_collection
from routehead_plugins.commands._shared import ModelOptions, bm25_stage, err, progress
from routehead_plugins.evaluation import ResultTable, evaluate
from routehead_plugins.reranker import HeadRoutedAttentionReranker
from routehead_plugins.selectors import as_selector

BUNDLED = Path(__file__).parents[1] / "bundled"
# The grade of passages that answer the query in full.
_ANSWERS = 3


def run_demo(queries: int, hits: int, heads: str, options: ModelOptions) -> None:
    """Index, retrieve, re-rank, and print what changed.

    Args:
        queries: How many queries, spread evenly over the collection.
        hits: Candidates per query.
        heads: Which heads to read.
        options: How the LLM is loaded.

    Raises:
        RouteHeadError: The heads or the LLM cannot be used, or there is no Java for Lucene.
    """
    selector = as_selector(heads)
    collection = load_collection(BUNDLED)
    topics = _spread(collection.topics, queries)
    console = Console()
    with bm25_stage(BUNDLED, hits) as bm25:
        llm = options.load()
        err.print(f"{options.model}: {llm.num_layers} layers, {llm.dtype}, {llm.device}")
        stage = HeadRoutedStage(bm25.searcher, HeadRoutedAttentionReranker(llm, selector))
        results: dict[str, list[Hit]] = {}
        with progress("Re-ranking", len(topics)) as advance:
            for query_id, query in topics.items():
                results[query_id] = stage.rerank_documents(query, bm25.retrieve(query))
                advance()
    console.print(_queries_table(collection, topics, results))
    console.print(_summary(collection, topics, results, heads).to_rich())
    console.print(
        f"{len(topics)} of {len(collection.topics)} bundled queries (--queries for more), "
        f"BM25 top {hits}, read by {options.model!r}.\n"
        "The collection is small and was written for this demo: for claims, run "
        "`routehead evaluate` on your own.",
        highlight=False,
    )


def _spread(topics: Topics, count: int) -> Topics:
    """Take every n-th query, so that each domain and style has its share."""
    items = list(topics.items())
    count = min(count, len(items))
    return dict(items[place * len(items) // count] for place in range(count))


def _queries_table(
    collection: Collection, topics: Topics, results: Mapping[str, Sequence[Hit]]
) -> Table:
    """One row per query: rank of the first answer before and after, and what is on top now."""
    table = Table("query", "BM25", "re-ranked", "now first", title="Rank of the first full answer")
    for query_id, query in topics.items():
        hits, grades = results[query_id], collection.qrels[query_id]
        before = _first_answer(_retrieved(hits), grades)
        after = _first_answer(hits, grades)
        top = str(hits[0].document.metadata.get("title", hits[0].docid)) if hits else ""
        table.add_row(Text(query), _place(before), _moved(before, after), Text(top))
    return table


def _first_answer(hits: Iterable[Hit], grades: Mapping[str, int]) -> int | None:
    places = (place for place, hit in enumerate(hits, 1) if grades.get(hit.docid, 0) >= _ANSWERS)
    return next(places, None)


def _place(rank: int | None) -> str:
    return "-" if rank is None else str(rank)


def _moved(before: int | None, after: int | None) -> Text:
    if before is None or after is None or before == after:
        return Text(_place(after))
    return Text(f"{after} up", "green") if after < before else Text(f"{after} down", "red")


def _summary(
    collection: Collection, topics: Topics, results: Mapping[str, Sequence[Hit]], heads: str
) -> ResultTable:
    qrels = {query_id: collection.qrels[query_id] for query_id in topics}
    first_stage = {
        query_id: [(hit.docid, hit.retrieval_score or 0.0) for hit in _retrieved(hits)]
        for query_id, hits in results.items()
    }
    reranked = {
        query_id: [(hit.docid, hit.score) for hit in hits] for query_id, hits in results.items()
    }
    methods = {"bm25": evaluate(first_stage, qrels), heads: evaluate(reranked, qrels)}
    return ResultTable({collection.name: methods}, baseline="bm25")


def _retrieved(hits: Sequence[Hit]) -> list[Hit]:
    return sorted(hits, key=lambda hit: hit.retrieval_rank)
