"""`routehead rerank`, from a run or a corpus to a run."""

from __future__ import annotations

import json
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


def test_a_stopped_job_goes_on_where_it_was(
    invoke: Invoke, inputs: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, output = tmp_path / "whole.trec", tmp_path / "out.trec"
    assert invoke("rerank", *inputs, "--output", whole).exit_code == 0
    asked: list[str] = []
    stop_at = [QUERIES["2"]]
    rerank = HeadRoutedStage.rerank_documents

    def watched(self: Any, query: str, *rest: Any) -> Any:
        if query in stop_at:
            raise KeyboardInterrupt
        asked.append(query)
        return rerank(self, query, *rest)

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
