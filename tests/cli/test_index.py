"""`routehead index`, and `routehead rerank --documents`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from routehead_plugins import DocumentIndex
from routehead_plugins.adapters.pyserini import build_index
from routehead_plugins.cli import app
from routehead_plugins.io import read_run

Invoke = Callable[..., Result]
HEADS = ("--heads", "2-3,1-0")


@pytest.fixture
def corpus(collection: Path) -> Path:
    return collection / "corpus.jsonl"


def words(result: Result) -> str:
    return " ".join(result.output.split())


def test_a_corpus_is_indexed_and_what_is_new_is_added(
    invoke: Invoke, corpus: Path, tmp_path: Path
) -> None:
    output = tmp_path / "documents"
    arguments = ("index", "--corpus", corpus, "--output", output, *HEADS)
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    total = len(corpus.read_text().splitlines())
    blank = sum(not json.loads(line)["text"].strip() for line in corpus.read_text().splitlines())
    added = total - blank
    summary = f"{added} documents added, 0 replaced, 0 unchanged, {blank} blank: "
    assert summary in words(result)
    assert f"{added} documents, " in words(result)
    with corpus.open("a") as stream:
        stream.write("\n" + json.dumps({"_id": "new", "text": "moss"}) + "\n")
    summary = f"1 documents added, 0 replaced, {added} unchanged, {blank} blank: "
    assert summary in words(invoke(*arguments))
    assert len(DocumentIndex(output)) == added + 1


def test_a_lucene_index_is_indexed_as_its_corpus_is(
    invoke: Invoke, corpus: Path, tmp_path: Path
) -> None:
    lucene = build_index(corpus, tmp_path / "lucene")
    assert invoke("index", "--corpus", corpus, "--output", tmp_path / "a", *HEADS).exit_code == 0
    result = invoke("index", "--index", lucene, "--output", tmp_path / "a", *HEADS)
    assert result.exit_code == 0, result.output
    assert "0 documents added, 0 replaced, " in words(result)


@pytest.mark.parametrize("keys", ["int8", "float16"])
def test_a_run_is_reranked_from_an_index(
    invoke: Invoke, collection: Path, tmp_path: Path, keys: str
) -> None:
    index, corpus = tmp_path / "documents", collection / "corpus.jsonl"
    invoke("index", "--corpus", corpus, "--output", index, "--keys", keys, *HEADS)
    inputs = [
        *("--corpus", corpus),
        *("--topics", collection / "queries.jsonl"),
        *("--run", collection / "run.bm25.trec"),
    ]
    ours, plain = tmp_path / "ours.trec", tmp_path / "plain.trec"
    result = invoke("rerank", *inputs, "--documents", index, "--output", ours)
    assert result.exit_code == 0, result.output
    late = ("--layout", "late", *HEADS)
    assert invoke("rerank", *inputs, *late, "--output", plain).exit_code == 0
    runs = [read_run(path) for path in (ours, plain)]
    for query_id, scores in runs[1].items():
        assert runs[0][query_id] == pytest.approx(scores, abs=2e-2)


def test_an_index_is_verified(invoke: Invoke, corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "documents"
    invoke("index", "--corpus", corpus, "--output", output, *HEADS)
    verify = ["index", "--output", str(output), "--verify"]
    result = CliRunner().invoke(app, verify)
    assert result.exit_code == 0, result.output
    assert "documents are as they were written: " in words(result)
    keys = output / "shard-00000" / "keys.bin"
    content = bytearray(keys.read_bytes())
    content[5] ^= 1
    keys.write_bytes(content)
    assert "is damaged: its keys are not those that were written" in str(
        CliRunner().invoke(app, verify).exception
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "there are no texts; give --corpus or --index."),
        (("--corpus", "a", "--index", "b"), "--corpus and --index are two sources of texts; "),
        (("--corpus", "missing.jsonl"), "missing.jsonl does not exist; expected one JSON object"),
        (("--index", "missing"), "index_dir='missing' holds no Lucene index"),
        (("--corpus", "missing.jsonl", "--layout", "late"), ""),
        (("--verify",), "config.json does not exist; expected an index of `routehead index`"),
    ],
)
def test_bad_arguments_end_in_one_line(
    invoke: Invoke, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = invoke("index", *arguments, "--output", tmp_path / "documents")
    assert result.exit_code != 0
    assert message in str(result.exception)
    assert not (tmp_path / "documents").exists()


def test_a_repeated_id_is_named_before_anything_is_run(
    invoke: Invoke, corpus: Path, tmp_path: Path
) -> None:
    with corpus.open("a") as stream:
        stream.write("\n" + corpus.read_text().splitlines()[0] + "\n")
    result = invoke("index", "--corpus", corpus, "--output", tmp_path / "documents", *HEADS)
    assert "occurs twice; expected each id once; remove one." in str(result.exception)
    assert not (tmp_path / "documents").exists()
