"""What the checks read: a tiny LLM, a small judged collection, and random texts."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import families

from routehead_plugins import FrozenLM
from routehead_plugins.io import write_run

QUERIES = 8
CANDIDATES = 4

_WORDS = """
wolf rain stone river snow hill moss owl grey old many people tell stories hunt run far lie under
over beside winter night water cold forest where when why did the a of and in
""".split()  # noqa: SIM905 - a list would take a line per word


def save_llm(folder: Path) -> str:
    """Save a tiny LLM with random weights into a folder; return its name."""
    families.tiny_model("llama").save_pretrained(folder)
    families.tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def tiny_llm() -> FrozenLM:
    """Build the same LLM in memory."""
    return FrozenLM(families.tiny_model("llama"), families.tiny_tokenizer(), name="tiny")


def make_texts(rng: random.Random, count: int) -> list[str]:
    """Draw texts of different lengths, between 4 and 16 words."""
    return [" ".join(rng.choices(_WORDS, k=rng.randint(4, 16))) for _ in range(count)]


def write_collection(folder: Path, rng: random.Random) -> Path:
    """Write a BEIR folder with a run, every query of which has one relevant candidate."""
    texts, queries = make_texts(rng, QUERIES), make_texts(rng, QUERIES)
    (folder / "qrels").mkdir(parents=True)
    _write_lines(folder / "corpus.jsonl", [f"d{n}" for n in range(QUERIES)], texts)
    _write_lines(folder / "queries.jsonl", [f"q{n}" for n in range(QUERIES)], queries)
    rows = "".join(f"q{n}\td{n}\t1\n" for n in range(QUERIES))
    (folder / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{rows}")
    run = {
        f"q{n}": {
            f"d{(n + away) % QUERIES}": 9.0 - rank
            for rank, away in enumerate(rng.sample(range(CANDIDATES), CANDIDATES))
        }
        for n in range(QUERIES)
    }
    write_run(folder / "run.bm25.trec", run, "bm25")
    return folder


def _write_lines(path: Path, ids: Sequence[str], texts: Sequence[str]) -> None:
    records = zip(ids, texts, strict=True)
    path.write_text("\n".join(json.dumps({"_id": key, "text": text}) for key, text in records))
