"""The benchmark of long documents, on a tiny collection; and that of loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import pytest

from benchmarks.heads import long_documents
from benchmarks.latency import loading
from routehead_plugins import Document
from routehead_plugins.evaluation import significance
from routehead_plugins.io import Collection, load_collection, write_run
from routehead_plugins.options import RerankerOptions


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve passages, one of them the answer to each of two queries."""
    folder = tmp_path / "small"
    (folder / "qrels").mkdir(parents=True)
    rows = [{"_id": f"d{n}", "text": f"there is a wolf {n}"} for n in range(12)]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [{"_id": f"q{n}", "text": f"wolf {n}?"} for n in range(2)]
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, rows)))
    judged = "q0\td3\t2\nq0\td4\t1\nq1\td11\t1\n"
    (folder / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}")
    run = {f"q{n}": {f"d{d}": 20.0 - d for d in range(12)} for n in range(2)}
    write_run(folder / "run.bm25.trec", run, "bm25")
    return folder


def test_passages_of_a_query_are_put_together(folder: Path) -> None:
    collection = load_collection(folder)
    documents = long_documents.long_documents(collection, "q0", 12)
    assert sorted(len(str(document.id).split("+")) for document in documents) == [2, 5, 5]
    parts = [part for document in documents for part in str(document.id).split("+")]
    assert sorted(parts) == sorted(collection.corpus)
    assert documents == long_documents.long_documents(collection, "q0", 12)
    for document in documents:
        ids = str(document.id).split("+")
        assert document.text == "\n\n".join(collection.corpus[part].text for part in ids)
        assert document.score == max(20.0 - int(part[1:]) for part in ids)
    scores = [document.score or 0.0 for document in documents]
    assert scores == sorted(scores, reverse=True)


def test_a_document_is_as_relevant_as_its_best_passage(folder: Path) -> None:
    lists = {"q0": [Document("", id="d1+d3+d4"), Document("", id="d4"), Document("", id="d0")]}
    grades = long_documents.grades(load_collection(folder), lists)
    assert grades == {"q0": {"d1+d3+d4": 2, "d4": 1, "d0": 0}}


def test_every_way_is_compared_with_a_cut(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    families.tiny_model("llama").save_pretrained(tmp_path / "tiny")
    families.tiny_tokenizer().save_pretrained(tmp_path / "tiny")

    def tiny(**given: Any) -> RerankerOptions:
        model = str(tmp_path / "tiny")
        return RerankerOptions(model=model, heads="all", layout="parallel", **given)

    def own_run(collection: Collection, *_: object) -> Collection:
        return load_collection(collection.path)

    monkeypatch.setattr(long_documents, "RerankerOptions", tiny)
    monkeypatch.setattr(long_documents, "with_candidates", own_run)
    monkeypatch.setattr(long_documents, "RESULTS", tmp_path)
    monkeypatch.setattr(significance, "RESAMPLES", 100)
    long_documents.main([folder], queries=2, tokens=16, dtype="float32")
    content = json.loads((tmp_path / "long-documents-small.json").read_text())
    ways = ["bm25", "cut", "whole", "passages, max", "passages, mean of top 2"]
    assert [way for way in content if way in ways] == ways
    assert set(content["cut"]["queries"]) == {"q0", "q1"}
    assert content["cut"]["against a cut"] is None
    assert content["whole"]["against a cut"]["queries"] == 2


def test_loading_is_measured_with_and_without_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, str]] = []

    def seconds(name: str, dtype: str, **variables: str) -> tuple[float, int]:
        asked.append(variables)
        assert (name, dtype) == ("llms/some.gguf", "float32")
        return float(len(asked)), 2_000_000

    monkeypatch.setattr(loading, "seconds", seconds)
    monkeypatch.setattr(loading, "RESULTS", tmp_path)
    loading.main(["llms/some.gguf"], "float32", 3)
    content = json.loads((tmp_path / "loading.json").read_text())
    assert content["some"] == {
        "first load, with conversion, s": 1.0,
        "later loads, median, s": 3.0,
        "without a cache, s": 5.0,
        "size of the conversion, MB": 2.0,
    }
    assert asked[-1] == {"ROUTEHEAD_CACHE_LIMIT": "0"}
    assert len({variables["XDG_CACHE_HOME"] for variables in asked[:4]}) == 1
