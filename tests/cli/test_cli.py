"""The command, called as a user calls it, on a tiny LLM in a local directory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from routehead_plugins import HeadSet, __version__
from routehead_plugins.adapters.pyserini import HeadRoutedStage
from routehead_plugins.cli import rerank as rerank_command
from routehead_plugins.cli.main import app
from routehead_plugins.errors import InputError, RouteHeadError
from routehead_plugins.io import read_requests, read_run, write_run
from routehead_plugins.selection import split_methods

CORPUS = {
    "d1": "Wolves hunt in packs.",
    "d2": "Rain falls on the hill.",
    "d3": "A wolf ran over the hill in the rain.",
    "d4": "Grey stones lie by a river.",
}
QUERIES = {"1": "where did the wolf run", "2": "stones in the rain"}
RUN = {"1": {"d1": 3.0, "d3": 2.0, "d2": 1.0}, "2": {"d4": 2.0, "d2": 1.0}}

Invoke = Callable[..., Result]


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    folder = tmp_path / "wolves"
    (folder / "qrels").mkdir(parents=True)
    rows = [json.dumps({"_id": key, "title": "", "text": text}) for key, text in CORPUS.items()]
    (folder / "corpus.jsonl").write_text("\n".join(rows))
    rows = [json.dumps({"_id": int(key), "text": text}) for key, text in QUERIES.items()]
    (folder / "queries.jsonl").write_text("\n".join(rows))
    (folder / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\n1\td3\t2\n1\td1\t1\n2\td4\t1\n"
    )
    write_run(folder / "run.bm25.trec", RUN, "bm25")
    return folder


@pytest.fixture
def invoke(model: str) -> Invoke:
    def call(*arguments: object) -> Result:
        return CliRunner().invoke(app, [*map(str, arguments), "--model", model], color=False)

    return call


@pytest.fixture
def inputs(collection: Path) -> list[object]:
    return [
        *("--corpus", collection / "corpus.jsonl"),
        *("--topics", collection / "queries.jsonl"),
        *("--run", collection / "run.bm25.trec"),
    ]


def test_help_comes_at_once_and_loads_no_torch() -> None:
    script = (
        "import sys; from routehead_plugins.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'jnius', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().endswith("[]")
    for name in ("demo", "rerank", "evaluate", "detect", "train", "inspect"):
        assert name in done.stdout


@pytest.mark.parametrize("name", ["demo", "rerank", "evaluate", "detect", "train", "inspect"])
def test_every_command_explains_itself(name: str) -> None:
    result = CliRunner().invoke(app, [name, "--help"], terminal_width=200, color=False)
    assert result.exit_code == 0
    assert "--model" in result.output


def test_the_version_is_printed() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"routehead {__version__}\n"


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


@pytest.mark.parametrize("changed", ["heads", "corpus"])
def test_a_job_whose_files_have_changed_starts_afresh(
    invoke: Invoke,
    collection: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: str,
) -> None:
    heads, output = tmp_path / "heads.json", tmp_path / "out.trec"
    HeadSet.parse("0-1").save(heads)
    arguments = [
        *("rerank", "--corpus", collection, "--topics", collection / "queries.jsonl"),
        *("--run", collection / "run.bm25.trec", "--heads", heads, "--output", output),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(rerank_command, "_write", lambda *_: 1 / 0)
        assert isinstance(invoke(*arguments).exception, ZeroDivisionError)
    if changed == "heads":
        HeadSet.parse("2-3").save(heads)
    else:
        with (collection / "corpus.jsonl").open("a") as stream:
            stream.write('\n{"_id": "d5", "text": "Snow."}\n')
    result = invoke(*arguments)
    assert result.exit_code == 0
    assert "Resuming" not in result.output


def test_evaluation_prints_a_table_and_writes_it(
    invoke: Invoke, collection: Path, tmp_path: Path
) -> None:
    output = tmp_path / "table.json"
    result = invoke(
        *("evaluate", "--collection", collection, "--output", output),
        *("--methods", "bm25,all,0-1,2-3,layers:1-2,all+bm25", "--hits", 3),
    )
    assert result.exit_code == 0, result.output
    table = json.loads(output.read_text())
    methods = table["collections"]["wolves"]["methods"]
    assert list(methods) == ["bm25", "all", "0-1,2-3", "layers:1-2", "all+bm25"]
    # Query 1 has d1 (grade 1) before d3 (grade 2); query 2 has its only answer on top.
    assert methods["bm25"]["means"]["RR@10"] == 1
    assert methods["bm25"]["means"]["nDCG@10"] == pytest.approx((0.85972 + 1) / 2, abs=1e-4)
    assert table["settings"]["hits"] == 3
    assert list(tmp_path.glob("*.partial.jsonl")) == []


def test_a_heavy_first_stage_weight_gives_the_first_stage_order(
    invoke: Invoke, collection: Path, tmp_path: Path
) -> None:
    output = tmp_path / "table.json"
    invoke(
        *("evaluate", "--collection", collection, "--output", output),
        *("--methods", "bm25,all+bm25", "--first-stage-weight", 1000),
    )
    methods = json.loads(output.read_text())["collections"]["wolves"]["methods"]
    assert methods["bm25"]["per_query"] == methods["all+bm25"]["per_query"]


@pytest.mark.parametrize(
    ("text", "methods"),
    [
        ("bm25,all", ["bm25", "all"]),
        ("bm25, 13-18,13-1 ,all", ["bm25", "13-18,13-1", "all"]),
        ("13-18,all,13-1", ["13-18", "all", "13-1"]),
        ("1-1,2-2+bm25", ["1-1,2-2+bm25"]),
    ],
)
def test_neighbouring_heads_are_one_method(text: str, methods: list[str]) -> None:
    assert split_methods(text) == methods


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" ,", '--methods names no method; give some, such as "bm25,all,layers".'),
        ("all,bm25,all", "method 'all' is named twice; name each method once."),
    ],
)
def test_unclear_methods_are_refused(text: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        split_methods(text)
    assert str(error.value) == message


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


def test_an_unknown_baseline_is_refused(invoke: Invoke, collection: Path) -> None:
    result = invoke("evaluate", "--collection", collection, "--methods", "all")
    assert str(result.exception).startswith("baseline 'bm25' is not among the methods all; add it")


def test_the_program_prints_one_line_and_ends_with_status_two(tmp_path: Path) -> None:
    script = (
        "import sys; from routehead_plugins.cli.main import main; sys.argv[0] = 'routehead'; main()"
    )
    command_line = [sys.executable, "-c", script, "rerank", "--output", str(tmp_path / "x.trec")]
    done = subprocess.run(command_line, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "routehead: there are no queries; give --topics, or --requests.\n"
