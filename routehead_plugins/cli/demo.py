"""`routehead demo`: the main job on the bundled collection, before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from routehead_plugins.cli.runtime import ModelOptions, bm25_stage, err, progress, ranked
from routehead_plugins.evaluation import ResultTable, evaluate
from routehead_plugins.io import BUNDLED, Collection, Topics, load_collection
from routehead_plugins.reranker import HeadRoutedAttentionReranker
from routehead_plugins.selection import ROUTED, FixedHeads, Router

# The grade of passages that answer the query in full.
_ANSWERS = 3

# Method -> query -> pairs of document id and score, best first.
_Rankings = Mapping[str, Mapping[str, Sequence[tuple[str, float]]]]


def run_demo(
    queries: int, hits: int, heads: str | None, router: str | None, options: ModelOptions
) -> None:
    """Index, retrieve, re-rank, and print what changed.

    Args:
        queries: How many queries, spread evenly over the collection.
        hits: Candidates per query.
        heads: Which heads to read; ``None`` leaves the choice to the router.
        router: What chooses heads per query; ``None`` for the one that comes with the LLM.
        options: How the LLM is loaded.

    Raises:
        RouteHeadError: The heads or the LLM cannot be used, or there is no Java for Lucene.
    """
    selector = options.selector(heads, router)
    name = heads or (ROUTED if isinstance(selector, Router) else "all")
    fitted = isinstance(selector, FixedHeads | Router) and selector.heads.recipe.first_stage_weight
    collection = load_collection(BUNDLED)
    topics = _spread(collection.topics, queries)
    # Where the first stage was fitted together with the heads, it takes part already.
    fused = {} if fitted else {f"{name}+bm25": 1.0}
    rankings: dict[str, dict[str, list[tuple[str, float]]]] = {"bm25": {}, name: {}}
    rankings |= {method: {} for method in fused}
    with bm25_stage(BUNDLED, hits) as bm25:
        reranker = HeadRoutedAttentionReranker(options.load(), selector)
        llm = reranker.llm
        err.print(f"{options.model}: {llm.num_layers} layers, {llm.dtype}, {llm.device}")
        with progress("Re-ranking", len(topics)) as advance:
            for key, query in topics.items():
                documents = bm25.retrieve(query)
                scores = reranker.score(query, documents)
                rankings["bm25"][key] = [(d.id or "", d.score or 0.0) for d in documents]
                rankings[name][key] = ranked(documents, scores, weight=0.0)
                for method, weight in fused.items():
                    rankings[method][key] = ranked(documents, scores, weight)
                advance()
    console = Console()
    console.print(_ranks(collection, topics, rankings))
    console.print(_figures(collection, topics, rankings).to_rich())
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


def _ranks(collection: Collection, topics: Topics, rankings: _Rankings) -> Table:
    """One row per query: rank of its first full answer, before and after."""
    first, *others = rankings
    table = Table(box=SIMPLE_HEAD, title="Rank of the first full answer", pad_edge=False)
    for name in ("query", first, *others):
        table.add_column(name, justify="left" if name == "query" else "right")
    for key, query in topics.items():
        places = {
            name: _first_answer(ranking[key], collection.qrels[key])
            for name, ranking in rankings.items()
        }
        moved = [_moved(places[first], places[name]) for name in others]
        table.add_row(Text(query), _moved(places[first], places[first]), *moved)
    return table


def _first_answer(ranking: Sequence[tuple[str, float]], grades: Mapping[str, int]) -> int | None:
    places = (place for place, (key, _) in enumerate(ranking, 1) if grades.get(key, 0) >= _ANSWERS)
    return next(places, None)


def _moved(before: int | None, after: int | None) -> Text:
    """Show a rank, and by colour whether it is better than before; "-" where none was found."""
    if before is None or after is None or before == after:
        return Text("-" if after is None else str(after))
    return Text(f"{after} up", "green") if after < before else Text(f"{after} down", "red")


def _figures(collection: Collection, topics: Topics, rankings: _Rankings) -> ResultTable:
    qrels = {key: collection.qrels[key] for key in topics}
    methods = {name: evaluate(ranking, qrels) for name, ranking in rankings.items()}
    return ResultTable({collection.name: methods}, baseline="bm25")
