"""Measure what dividing long documents gains over cutting them.

For each query, BM25's top 100 passages are put together five by five in random order, to twenty
long documents on its topic; a document is as relevant as the best of its passages, and its
first-stage score is that of the best, too. They are read cut at some tokens, whole, and divided
into passages of as many tokens. Writes benchmarks/results/long-documents-NAME.json for every
collection.

Example: python -m benchmarks.heads.long_documents beir/dl21 --queries 40
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import RESULTS, command_line, folders_by_name, results_json, run
from routehead_plugins import Document, FrozenLM, HeadRoutedAttentionReranker
from routehead_plugins.cli.runtime import load_llm, progress, settings, with_candidates
from routehead_plugins.evaluation import Evaluation, compare, evaluate
from routehead_plugins.io import Collection, Rankings, atomic_write_text, load_collection
from routehead_plugins.options import RerankerOptions

_TOGETHER = 5
_MEASURE = "nDCG@10"
_GLUE = "+"  # of ids
Lists = Mapping[str, Sequence[Document]]


def long_documents(collection: Collection, query_id: str, hits: int) -> list[Document]:
    """Put the passages of a query together, best document first by the best passage's score."""
    passages = list(collection.candidates(query_id, hits))
    random.Random(f"long {query_id}").shuffle(passages)
    groups = [passages[start : start + _TOGETHER] for start in range(0, len(passages), _TOGETHER)]
    documents = [
        Document(
            "\n\n".join(passage.text for passage in group),
            id=_GLUE.join(str(passage.id) for passage in group),
            score=max(passage.score or 0.0 for passage in group),
        )
        for group in groups
    ]
    return sorted(documents, key=lambda document: -(document.score or 0.0))


def grades(collection: Collection, lists: Lists) -> dict[str, dict[str, int]]:
    """Judge long documents by the best of their passages."""
    return {
        query_id: {
            str(document.id): max(
                collection.qrels[query_id].get(passage, 0)
                for passage in str(document.id).split(_GLUE)
            )
            for document in documents
        }
        for query_id, documents in lists.items()
    }


def ways(tokens: int) -> dict[str, dict[str, Any]]:
    """Return the ways of reading long documents, by name."""
    chunk = {"long_documents": "chunk", "chunk_tokens": tokens}
    return {
        "cut": {"max_doc_tokens": tokens},
        "whole": {},
        "passages, max": chunk,
        "passages, mean of top 2": chunk | {"chunk_aggregation": "mean_of_top(2)"},
    }


def main(
    collections: Annotated[list[Path], typer.Argument(help="BEIR folders.")],
    queries: Annotated[int, typer.Option(help="Judged queries per collection.", min=1)] = 40,
    tokens: Annotated[int, typer.Option(help="Length of a cut and of a passage.", min=8)] = 96,
    dtype: Annotated[str, typer.Option(help="Number format of the LLM.")] = "auto",
    first_stage_weight: Annotated[
        float | None,
        typer.Option(help="Weight of BM25; 0 for the heads alone.  [default: the router's]"),
    ] = None,
) -> None:
    """Measure, print and write."""
    options = RerankerOptions(dtype=dtype, first_stage_weight=first_stage_weight)
    llm = load_llm(options)
    for name, folder in folders_by_name(collections).items():
        runs, qrels = _runs(load_collection(folder), name, queries, llm, options, tokens)
        parts = _figures({way: evaluate(own, qrels, [_MEASURE]) for way, own in runs.items()})
        given = {
            "queries": queries,
            "tokens": tokens,
            "dtype": dtype,
            "first_stage_weight": first_stage_weight,
        }
        command = command_line("benchmarks.heads.long_documents", [name], given)
        own_settings = {"heads": "the LLM's router", "first_stage_weight": first_stage_weight}
        text = results_json(command, settings(options) | own_settings, parts)
        atomic_write_text(RESULTS / f"long-documents-{name}.json", text)
        typer.echo(text)


def _runs(
    collection: Collection,
    name: str,
    queries: int,
    llm: FrozenLM,
    options: RerankerOptions,
    tokens: int,
) -> tuple[dict[str, Rankings], dict[str, dict[str, int]]]:
    """Read the long documents of some queries in every way; return rankings and judgments."""
    judged = sorted(set(collection.topics) & set(collection.qrels))
    chosen = random.Random(f"queries {name}").sample(judged, min(queries, len(judged)))
    topics = {query_id: collection.topics[query_id] for query_id in chosen}
    hits = 20 * _TOGETHER
    collection = with_candidates(replace(collection, run=None), topics, hits)
    lists = {query_id: long_documents(collection, query_id, hits) for query_id in chosen}
    runs: dict[str, Rankings] = {
        "bm25": {
            query_id: [(str(document.id), document.score or 0.0) for document in documents]
            for query_id, documents in lists.items()
        }
    }
    for way, own in ways(tokens).items():
        reranker = HeadRoutedAttentionReranker.from_options(replace(options, **own), llm)
        runs[way] = _read(reranker, topics, lists, f"{name}: {way}")
    return runs, grades(collection, lists)


def _read(
    reranker: HeadRoutedAttentionReranker, topics: Mapping[str, str], lists: Lists, title: str
) -> Rankings:
    """Re-rank the lists of all queries."""
    runs = {}
    with progress(title, len(lists)) as advance:
        for query_id, documents in lists.items():
            ranking = reranker.rerank(topics[query_id], documents)
            runs[query_id] = [(str(hit.document.id), hit.score) for hit in ranking]
            advance()
    return runs


def _figures(evaluations: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Return mean nDCG@10 of every way, and how it differs from a cut."""
    comparisons = {one.method: asdict(one) for one in compare(evaluations, "cut", _MEASURE)}
    return {
        way: {
            "ndcg@10": evaluation.mean(_MEASURE),
            "against a cut": comparisons.get(way),
            "queries": dict(evaluation.values[_MEASURE]),
        }
        for way, evaluation in evaluations.items()
    }


if __name__ == "__main__":
    run(main)
