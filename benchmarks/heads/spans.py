"""Measure how often evidence spans hit the sentence that answers, on the bundled collection.

    python -m benchmarks.heads.spans

Every passage that fully answers a query is read among four others from BM25; the middle of its top
span hits or misses the marked sentence. Chance is the sentence's share of the passage. The settings
were chosen on the queries of the even half; the odd half is the test. Writes
benchmarks/results/spans-bundled.json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import typer
from scipy.stats import binomtest

from benchmarks.common import RESULTS, command_line, results_json, run
from routehead_plugins import Document, HeadRoutedAttentionReranker, TextSpan
from routehead_plugins.cli.runtime import load_llm, progress, settings, with_candidates
from routehead_plugins.io import BUNDLED, Collection, atomic_write_text, load_collection
from routehead_plugins.options import RerankerOptions

Outcome = tuple[bool, float]
"""Whether the top span hits the answer, and the probability of that by chance."""


def main() -> None:
    """Measure, print and write."""
    options = RerankerOptions()
    bundled = replace(load_collection(BUNDLED), run=None)
    collection = with_candidates(bundled, bundled.topics, hits=5)
    outcomes = find_answers(HeadRoutedAttentionReranker(load_llm(options)), collection)
    text = results_json(
        command_line("benchmarks.heads.spans", [], {}),
        settings(options) | {"heads": "all"},
        {"chosen on": summarise(outcomes[::2]), "test": summarise(outcomes[1::2])},
    )
    atomic_write_text(RESULTS / "spans-bundled.json", text)
    typer.echo(text)


def find_answers(reranker: HeadRoutedAttentionReranker, collection: Collection) -> list[Outcome]:
    """Look for every marked answer of the bundled collection among five passages."""
    lines = (BUNDLED / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line) for line in lines]
    outcomes = []
    with progress("Reading", len(answers)) as advance:
        for answer in answers:
            query_id, document = answer["query_id"], collection.corpus[answer["corpus_id"]]
            retrieved = collection.candidates(query_id, 5)
            others = [other for other in retrieved if other.id != document.id][:4]
            candidates: list[str | Document] = [*others[:2], document, *others[2:]]
            ranking = reranker.rerank(collection.topics[query_id], candidates, spans=True)
            spans = next(hit.spans for hit in ranking if hit.index == 2)
            start = document.text.index(answer["sentence"])
            end = start + len(answer["sentence"])
            outcomes.append((_hits(spans, start, end), (end - start) / len(document.text)))
            advance()
    return outcomes


def summarise(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Compare the rate of hits with chance, by a one-sided binomial test."""
    hits = sum(hit for hit, _ in outcomes)
    chance = sum(share for _, share in outcomes) / len(outcomes)
    p = binomtest(hits, len(outcomes), chance, alternative="greater").pvalue
    return {"answers": len(outcomes), "hit_rate": hits / len(outcomes), "chance": chance, "p": p}


def _hits(spans: Sequence[TextSpan], start: int, end: int) -> bool:
    return bool(spans) and start <= (spans[0].start + spans[0].end) / 2 < end


if __name__ == "__main__":
    run(main)
