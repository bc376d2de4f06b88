"""Ablate re-weighting (ReAttn) by halves: every variant reads the same attention.

    python -m benchmarks.heads.reweighting                       # the bundled collection
    python -m benchmarks.heads.reweighting DIR [DIR ...]         # BEIR folders of your own

The LLM runs once per query and layout; no variant is fitted to anything. Each collection and layout
gives benchmarks/results/reweighting-NAME-LAYOUT.json, with the same heads without re-weighting as
the baseline, and its table is printed as Markdown.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.common import RESULTS, run
from benchmarks.heads.collect import DOCUMENT_CACHE, LAYOUTS
from routehead_plugins import FrozenLM
from routehead_plugins.cli.runtime import (
    load_llm,
    progress,
    ranked,
    sample_queries,
    settings,
    with_candidates,
)
from routehead_plugins.evaluation import Evaluation, ResultTable, evaluate
from routehead_plugins.io import BUNDLED, Collection, load_collection
from routehead_plugins.layouts import Layout, ReadOptions, make_layout
from routehead_plugins.options import RerankerOptions
from routehead_plugins.scoring import Readout, Reweighting
from routehead_plugins.selection import Selector, choose_selector

PLAIN = "none"
VARIANTS = {
    PLAIN: Readout(),
    "idf": Readout(reweighting=Reweighting(idf=True, entropy=0.0)),
    "entropy": Readout(reweighting=Reweighting(idf=False, entropy=1.0)),
    "idf+entropy": Readout(reweighting=Reweighting(idf=True, entropy=1.0)),
}


def main(
    collections: Annotated[list[Path] | None, typer.Argument(help="BEIR folders.")] = None,
    heads: str = "all",
    model: str = "embedded",
    dtype: str = "auto",
    hits: int = 20,
    max_doc_tokens: int = 120,
    queries: Annotated[int, typer.Option(help="Per collection, at most.")] = 100,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = RESULTS,
) -> None:
    """Measure every variant on collections, in both layouts, and write the tables."""
    options = RerankerOptions(model, heads=heads, dtype=dtype, max_doc_tokens=max_doc_tokens)
    llm = load_llm(options)
    output.mkdir(parents=True, exist_ok=True)
    for path in collections or [BUNDLED]:
        collection = _sample(load_collection(path), queries, hits)
        for name in LAYOUTS:
            chosen = replace(options, layout=name, document_cache=DOCUMENT_CACHE[name])
            selector = choose_selector(chosen)
            reader = _Reader(llm, selector, make_layout(chosen, selector.layout), max_doc_tokens)
            table = ResultTable(
                {collection.name: reader.evaluate(collection, hits)},
                baseline=PLAIN,
                settings={"heads": heads, "hits": hits, **settings(chosen)},
            )
            table.write_json(output / f"reweighting-{collection.name}-{name}.json")
            typer.echo(f"{name}\n\n{table.to_markdown()}")


def _sample(collection: Collection, queries: int, hits: int) -> Collection:
    sample = sample_queries(collection, queries, seed=0)
    topics = {query_id: collection.topics[query_id] for query_id in sample}
    return with_candidates(replace(collection, topics=topics), topics, hits)


@dataclass(frozen=True)
class _Reader:
    """Reads each query once and ranks its candidates by every variant."""

    llm: FrozenLM
    selector: Selector
    layout: Layout
    max_doc_tokens: int

    def evaluate(self, collection: Collection, hits: int) -> dict[str, Evaluation]:
        """Measure every variant on the queries of a sample that have candidates."""
        query_ids = [
            query_id for query_id in collection.topics if query_id in (collection.run or {})
        ]
        runs: dict[str, dict[str, list[tuple[str, float]]]] = {name: {} for name in VARIANTS}
        with progress(f"{collection.name}: {self.layout.name}", len(query_ids)) as advance:
            for query_id in query_ids:
                candidates = collection.candidates(query_id, hits)
                documents = [document for document in candidates if not document.is_blank]
                scores = self.scores(collection.topics[query_id], [d.text for d in documents])
                for name, values in scores.items():
                    runs[name][query_id] = ranked(documents, values, weight=0.0)
                advance()
        qrels = {query_id: collection.qrels[query_id] for query_id in query_ids}
        return {name: evaluate(run, qrels) for name, run in runs.items()}

    def scores(self, query: str, texts: list[str]) -> dict[str, list[float]]:
        """Score texts by every variant, from one reading."""
        heads = self.selector.select(query, self.llm)
        options = ReadOptions(max_doc_tokens=self.max_doc_tokens)
        attention = self.layout.read(self.llm, query, texts, heads, options)
        no_scores = [None] * len(texts)
        return {
            name: readout.scores(attention, heads.recipe, no_scores).tolist()
            for name, readout in VARIANTS.items()
        }


if __name__ == "__main__":
    run(main)
