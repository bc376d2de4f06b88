"""`routehead rerank`, from a run or a corpus to a run."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result
from wolves import QUERIES, RUN

from routehead_plugins import HeadSet
from routehead_plugins.adapters.pyserini import HeadRoutedStage
from routehead_plugins.cli import app
from routehead_plugins.cli import rerank as rerank_command
from routehead_plugins.data import Document
from routehead_plugins.errors import RouteHeadError
from routehead_plugins.io import read_requests, read_run, write_run

Invoke = Callable[..., Result]


@pytest.fixture
def inputs(collection: Path) -> list[object]:
    return [
        *("--corpus", collection / "corpus.jsonl"),
        *("--topics", collection / "queries.jsonl"),
        *("--run", collection / "run.bm25.trec"),
    ]


def test_a_run_is_reranked_into_a_run(invoke: Invoke, inputs: list[object], tmp_path: Path) -> None:
    output = tmp_path / "out.trec"
    result = invoke("rerank", *inputs, "--output", output, "--tag", "mine")
    assert result.exit_code == 0, result.output
    run = read_run(output)
    assert {key: set(hits) for key, hits in run.items()} == {
        key: set(hits) for key, hits in RUN.items()
    }
    assert output.read_text().splitlines()[0].split()[5] == "mine"
    assert list(tmp_path.glob("*.partial.jsonl")) == []


def test_candidates_below_the_depth_follow_in_order(
    invoke: Invoke, inputs: list[object], tmp_path: Path
) -> None:
    output = tmp_path / "out.trec"
    assert invoke("rerank", *inputs, "--output", output, "--hits", 1).exit_code == 0
    assert {key: list(hits) for key, hits in read_run(output).items()} == {
        key: list(hits) for key, hits in RUN.items()
    }


def test_bm25_finds_the_candidates_where_there_is_no_run(
    invoke: Invoke, collection: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.trec"
    topics = tmp_path / "topics.tsv"
    topics.write_text("7\twolf rain\n")
    result = invoke("rerank", "--corpus", collection, "--topics", topics, "--output", output)
    assert result.exit_code == 0, result.output
    assert set(read_run(output)["7"]) == {"d2", "d3"}


def test_requests_go_in_and_come_out(invoke: Invoke, inputs: list[object], tmp_path: Path) -> None:
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    assert invoke("rerank", *inputs, "--output", first).exit_code == 0
    requests = read_requests(first)
    assert [request.query_id for request in requests] == ["1", "2"]
    assert {document.id for document in requests[1].candidates} == {"d4", "d2"}
    assert invoke("rerank", "--requests", first, "--output", second).exit_code == 0
    assert [request.query for request in read_requests(second)] == list(QUERIES.values())


def test_instructions_are_those_of_queries_or_of_all(
    invoke: Invoke, inputs: list[object], collection: Path, tmp_path: Path
) -> None:
    def scores(*options: object) -> dict[str, dict[str, float]]:
        result = invoke("rerank", *inputs, "--output", tmp_path / "out.trec", *options)
        assert result.exit_code == 0, result.output
        return {key: dict(hits) for key, hits in read_run(tmp_path / "out.trec").items()}

    plain, rain = scores(), scores("--instruction", "Only rain counts.")
    assert plain["1"] != rain["1"]
    topics = collection / "queries.jsonl"
    records = [json.loads(line) for line in topics.read_text().splitlines()]
    records[0]["instruction"] = "Only rain counts."
    topics.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert scores() == {"1": rain["1"], "2": plain["2"]}
    hill = scores("--instruction", "Only hills count.")
    assert hill["1"] == rain["1"]
    assert hill["2"] != plain["2"]
    requests = tmp_path / "out.jsonl"
    assert invoke("rerank", *inputs, "--output", requests).exit_code == 0
    assert [request.instruction for request in read_requests(requests)] == [
        "Only rain counts.",
        None,
    ]
    again = tmp_path / "again.trec"
    assert invoke("rerank", "--requests", requests, "--output", again).exit_code == 0
    assert {key: set(hits) for key, hits in read_run(again).items()} == {
        key: set(hits) for key, hits in plain.items()
    }


def test_long_documents_are_divided_on_request(
    invoke: Invoke, inputs: list[object], tmp_path: Path
) -> None:
    output = tmp_path / "out.trec"
    chunk = ("--long-documents", "chunk", "--chunk-tokens", 8, "--chunk-stride", 4)
    assert invoke("rerank", *inputs, "--output", output).exit_code == 0
    whole = output.read_text()
    assert invoke("rerank", *inputs, "--output", output, *chunk).exit_code == 0
    assert output.read_text() != whole
    result = invoke("rerank", *inputs, "--output", output, "--chunk-tokens", 8)
    assert "chunk_tokens=8 is for long_documents='chunk'" in str(result.exception)


def test_a_stopped_job_goes_on_where_it_was(
    invoke: Invoke, inputs: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, output = tmp_path / "whole.trec", tmp_path / "out.trec"
    assert invoke("rerank", *inputs, "--output", whole).exit_code == 0
    asked: list[str] = []
    stop_at = [QUERIES["2"]]
    rerank = HeadRoutedStage.rerank_documents

    def watched(self: Any, query: str, *rest: Any, **options: Any) -> Any:
        if query in stop_at:
            raise KeyboardInterrupt
        asked.append(query)
        return rerank(self, query, *rest, **options)

    monkeypatch.setattr(HeadRoutedStage, "rerank_documents", watched)
    assert invoke("rerank", *inputs, "--output", output).exit_code != 0
    assert not output.exists()
    asked.clear()
    stop_at.clear()
    result = invoke("rerank", *inputs, "--output", output)
    assert "Resuming: 1 queries were done before." in result.output
    assert asked == [QUERIES["2"]]
    assert output.read_text() == whole.read_text()


@pytest.mark.parametrize(
    ("changed", "repeated"),
    [("heads", 2), ("a candidate of query 2", 1), ("query 1", 1), ("other files", 0)],
)
def test_a_resumed_job_repeats_only_what_a_change_concerns(
    invoke: Invoke,
    collection: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: str,
    repeated: int,
) -> None:
    heads, output = tmp_path / "heads.json", tmp_path / "out.trec"
    HeadSet.parse("0-1").save(heads)
    arguments = [
        *("rerank", "--corpus", collection, "--topics", collection / "queries.jsonl"),
        *("--run", collection / "run.bm25.trec", "--heads", heads),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(rerank_command, "_write", lambda *_: 1 / 0)
        result = invoke(*arguments, "--output", output)
        assert isinstance(result.exception, ZeroDivisionError)
    if changed == "heads":
        HeadSet.parse("2-3").save(heads)
    else:
        name = "queries.jsonl" if changed == "query 1" else "corpus.jsonl"
        lines = (collection / name).read_text().splitlines()
        records = [json.loads(line) for line in lines]
        record = next(
            r for r in records if str(r["_id"]) == ("1" if changed == "query 1" else "d4")
        )
        record |= {"colour": None} if changed == "other files" else {"text": "Snow fell."}
        (collection / name).write_text("\n".join(map(json.dumps, records)))
    result = invoke(*arguments, "--output", output)
    assert result.exit_code == 0
    kept = re.search(r"Resuming: (\d) queries", result.output)
    assert (int(kept[1]) if kept else 0) == 2 - repeated
    fresh = tmp_path / "fresh.trec"
    assert invoke(*arguments, "--output", fresh).exit_code == 0
    assert output.read_text() == fresh.read_text()


# Bad input: one line, and nothing is left looking complete.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--topics": None}, "there are no queries; give --topics, or --requests."),
        ({"--corpus": None}, "there are no texts; give --corpus or --index."),
        ({"--hits": "0"}, "--hits=0 must be 1 or more."),
        ({"--heads": "99-0"}, "has no head 99-0; it has layers 0 to 3 with 4 heads each"),
        ({"--heads": "nonsense"}, "heads='nonsense' is neither a list of heads nor a file"),
        ({"--run": "missing.trec"}, "missing.trec"),
        ({"--requests": "r.jsonl"}, "--requests holds queries and candidates; leave out --topics."),
        ({"--output": "nowhere/out.trec"}, "folder 'nowhere' does not exist; make it first."),
        ({"--dtype": "int8"}, "dtype='int8' is not a floating-point format"),
        ({"--device": "abacus"}, "device='abacus' is not available"),
        ({"--model": "no/such-model"}, "model 'no/such-model' cannot be loaded"),
    ],
)
def test_bad_arguments_end_in_one_line(
    inputs: list[object],
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, str | None],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    options = {str(key): str(value) for key, value in zip(inputs[::2], inputs[1::2], strict=True)}
    options |= {"--output": "out.trec", "--model": model}
    arguments = [part for item in (options | change).items() if item[1] for part in item]
    result = CliRunner().invoke(app, ["rerank", *map(str, arguments)])
    assert isinstance(result.exception, RouteHeadError), result.output
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)
    assert not Path("out.trec").exists()


def test_a_run_naming_an_unknown_document_is_refused(
    invoke: Invoke, inputs: list[object], collection: Path, tmp_path: Path
) -> None:
    write_run(collection / "run.bm25.trec", {"1": {"d1": 2.0, "d99": 1.0}}, "bm25")
    result = invoke("rerank", *inputs, "--output", tmp_path / "out.trec")
    assert str(result.exception).startswith("document 'd99' is neither in the index nor in the")


def test_a_run_naming_an_unknown_query_is_refused(
    invoke: Invoke, inputs: list[object], collection: Path, tmp_path: Path
) -> None:
    write_run(collection / "run.bm25.trec", {"8": {"d1": 2.0}}, "bm25")
    result = invoke("rerank", *inputs, "--output", tmp_path / "out.trec")
    assert str(result.exception).startswith("query '8' of the run is not in the topics;")


def test_malformed_json_is_named_with_file_and_line(
    invoke: Invoke, inputs: list[object], collection: Path, tmp_path: Path
) -> None:
    with (collection / "corpus.jsonl").open("a") as stream:
        stream.write("\n{not json}\n")
    result = invoke("rerank", *inputs, "--output", tmp_path / "out.trec")
    assert "corpus.jsonl:5: " in str(result.exception)


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading the LLM fails, and so do searching and journals."""
    monkeypatch.setattr(rerank_command, "load_reranker", None)
    monkeypatch.setattr(rerank_command, "Journal", None)


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "folder"], "--output=folder is a folder; name a file."),
        (["--output", "run.trec"], "--output=run.trec is an input as well, run.trec; name another"),
        (["--output", "link.trec"], "--output=link.trec is an input as well, "),
        (["--output", "c.jsonl"], "--output=c.jsonl is an input as well, c.jsonl; name another"),
        (["--output", "x" * 300], " cannot be written (File name too long); "),
        (["--tag", "my run"], "tag 'my run' is empty or holds white space;"),
        (["--tag", ""], "tag '' is empty or holds white space;"),
        (["--layout", "diagonal"], "layout='diagonal' is unknown;"),
        (["--max-doc-tokens", "0"], "max_doc_tokens=0"),
        (["--document-cache", "much"], "document_cache='much' is not a size;"),
    ],
)
def test_what_would_fail_at_the_end_is_refused_at_the_start(
    collection: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    for old, new in (("run.bm25.trec", "run.trec"), ("corpus.jsonl", "c.jsonl")):
        Path(new).write_bytes((collection / old).read_bytes())
    Path("link.trec").symlink_to("run.trec")
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    given = ["--topics", str(collection / "queries.jsonl"), "--run", "run.trec"]
    given += ["--corpus", "c.jsonl", "--output", "out.trec"]
    result = CliRunner().invoke(app, ["rerank", *given, *options])
    assert isinstance(result.exception, RouteHeadError), result.exception
    assert message in str(result.exception)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("topics.tsv", "7\t", "7 b\t", "query id '7 b' is empty or holds white space;"),
        ("corpus.jsonl", '"d4"', '"d 4"', "document id 'd 4' is empty or holds white space;"),
    ],
)
def test_ids_that_a_run_cannot_hold_are_refused_at_the_start(
    collection: Path, tmp_path: Path, name: str, old: str, new: str, message: str
) -> None:
    (collection / "topics.tsv").write_text("7\tstones by a river\n")
    path = collection / name
    path.write_text(path.read_text().replace(old, new))
    output = tmp_path / "out.trec"
    given = ["--topics", collection / "topics.tsv", "--corpus", collection, "--output", output]
    result = CliRunner().invoke(app, ["rerank", *map(str, given)])
    assert str(result.exception).startswith(message)


@pytest.mark.usefixtures("unloaded")
def test_metadata_that_requests_cannot_hold_are_refused_at_the_start(
    inputs: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def documents(*_: object, **__: object) -> list[Document]:  # as an index may store them
        return [Document("snow", "d9", {"year": float("nan")})]

    monkeypatch.setattr(HeadRoutedStage, "documents", documents)
    output = str(tmp_path / "out.jsonl")
    result = CliRunner().invoke(app, ["rerank", *map(str, inputs), "--output", output])
    assert str(result.exception).startswith("the metadata of document 'd9' cannot be written")


def test_a_full_disk_keeps_the_previous_output_and_the_finished_queries(
    invoke: Invoke, inputs: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.trec"
    output.write_text("previous\n")
    monkeypatch.setattr(os, "fsync", full_disk)
    result = invoke("rerank", *inputs, "--output", output)
    assert isinstance(result.exception, RouteHeadError)
    assert "(No space left on device); what was there before is whole;" in str(result.exception)
    assert output.read_text() == "previous\n"
    monkeypatch.undo()
    result = invoke("rerank", *inputs, "--output", output)
    assert result.exit_code == 0
    assert "Resuming: 2 queries were done before." in result.output


def full_disk(_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
