"""Do evidence spans hit the sentence that answers? On the marked answers of the bundled collection.

    python benchmarks/spans.py

Every passage that answers a query in full is read among four others that BM25 finds; the middle of
its top span hits or misses the marked sentence. Chance is the sentence's share of the passage. The
settings were chosen on the queries of the even half; the odd half is the test. Writes
benchmarks/results/spans-bundled.json.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from scipy.stats import binomtest

from routehead_plugins import Document, HeadRoutedAttentionReranker, TextSpan
from routehead_plugins.cli.runtime import ModelOptions, bm25_stage, progress
from routehead_plugins.io import BUNDLED, Collection, atomic_write_text, load_collection

RESULT = Path(__file__).parent / "results" / "spans-bundled.json"


def hits_and_chance(
    reranker: HeadRoutedAttentionReranker, collection: Collection, retrieved: dict[str, list[str]]
) -> list[tuple[bool, float]]:
    """One pair per marked answer: whether the top span hits it, and how likely chance would."""
    answers = [json.loads(line) for line in (BUNDLED / "answers.jsonl").open(encoding="utf-8")]
    outcomes = []
    with progress("Reading", len(answers)) as advance:
        for answer in answers:
            document = collection.corpus[answer["corpus_id"]]
            others = [key for key in retrieved[answer["query_id"]] if key != document.id][:4]
            candidates: list[str | Document] = [collection.corpus[key] for key in others]
            candidates.insert(2, document)
            ranking = reranker.rerank(collection.topics[answer["query_id"]], candidates, spans=True)
            spans = next(hit.spans for hit in ranking if hit.index == 2)
            start = document.text.index(answer["sentence"])
            end = start + len(answer["sentence"])
            outcomes.append((_hits(spans, start, end), (end - start) / len(document.text)))
            advance()
    return outcomes


def _hits(spans: tuple[TextSpan, ...], start: int, end: int) -> bool:
    return bool(spans) and start <= (spans[0].start + spans[0].end) / 2 < end


def main() -> None:
    """Measure, print and write."""
    options = ModelOptions()
    collection = load_collection(BUNDLED)
    with bm25_stage(BUNDLED, hits=5) as stage:
        retrieved = {
            key: [str(document.id) for document in stage.retrieve(query)]
            for key, query in collection.topics.items()
        }
    outcomes = hits_and_chance(HeadRoutedAttentionReranker(options.load()), collection, retrieved)
    result: dict[str, object] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "settings": options.settings() | {"heads": "all"},
    }
    for name, half in (("chosen on", outcomes[::2]), ("test", outcomes[1::2])):
        found, chance = [hit for hit, _ in half], sum(share for _, share in half) / len(half)
        rate = sum(found) / len(found)
        p = binomtest(sum(found), len(found), chance, alternative="greater").pvalue
        result[name] = {"answers": len(half), "hit_rate": rate, "chance": chance, "p": p}
    text = json.dumps(result, indent=1)
    atomic_write_text(RESULT, text + "\n")
    print(text)


if __name__ == "__main__":
    main()
