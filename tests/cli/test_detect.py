"""`routehead detect`, from judged collections to a head-set file that re-ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from routehead_plugins import HeadSet
from routehead_plugins.cli.main import app
from routehead_plugins.cli.runtime import signals_folder
from routehead_plugins.errors import HeadError, InputError
from routehead_plugins.heads import Recipe
from routehead_plugins.io import read_run, write_run
from routehead_plugins.layouts import SequentialLayout
from routehead_plugins.training import METHODS

WORDS = ["wolf", "rain", "stone", "river", "snow", "hill"]
Invoke = Callable[..., Result]


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every query is a word, and the document that has it is relevant."""
    folder = tmp_path_factory.mktemp("words")
    (folder / "qrels").mkdir()
    rows = [{"_id": f"d{n}", "text": f"there is a {word} here"} for n, word in enumerate(WORDS)]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [{"_id": f"q{n}", "text": f"{word}?"} for n, word in enumerate(WORDS)]
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, rows)))
    judgments = "".join(f"q{n}\td{n}\t1\n" for n in range(len(WORDS)))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judgments)
    # The relevant document comes third.
    run = {
        f"q{n}": {
            f"d{(n + away) % len(WORDS)}": 4.0 - rank for rank, away in enumerate((2, 1, 0, 3))
        }
        for n in range(len(WORDS))
    }
    write_run(folder / "run.bm25.trec", run, "bm25")
    return folder


@pytest.fixture
def invoke(model: str, collection: Path, tmp_path: Path) -> Invoke:
    def call(*arguments: object) -> Result:
        given = [
            *("detect", "--model", model, "--collection", collection),
            *("--output", tmp_path / "heads.json", "--signals", tmp_path / "signals"),
            *("--dtype", "float32"),
        ]
        return CliRunner().invoke(app, [str(a) for a in (*given, *arguments)], color=False)

    return call


def test_weights_may_be_those_of_the_best_few_heads(invoke: Invoke, tmp_path: Path) -> None:
    assert invoke("--method", "ndcg", "--count", 3, "--layout", "late").exit_code == 0
    best = set(HeadSet.load(tmp_path / "heads.json"))
    result = invoke("--method", "weights", "--count", 3, "--layout", "late")
    assert result.exit_code == 0, result.output
    heads = HeadSet.load(tmp_path / "heads.json")
    assert set(heads) <= best
    assert (heads.layout, heads.method) == ("late", "weights")


@pytest.mark.parametrize("layout", ["sequential", "parallel"])
@pytest.mark.parametrize("method", [*METHODS, "weights"])
def test_every_method_writes_heads_that_rerank(
    invoke: Invoke, model: str, collection: Path, tmp_path: Path, method: str, layout: str
) -> None:
    result = invoke("--method", method, "--layout", layout)
    assert result.exit_code == 0, result.output
    heads = HeadSet.load(tmp_path / "heads.json")
    assert heads.layout == layout
    assert heads.model == model
    assert heads.method is not None
    assert heads.method.startswith(method)
    assert f"heads.json: {len(heads)} heads by {heads.method}" in result.stdout.replace("\n", "")
    assert heads.recipe.weights is None or method == "weights"
    output = tmp_path / "out.trec"
    reranked = CliRunner().invoke(
        app,
        [
            *("rerank", "--model", model, "--dtype", "float32", "--output", str(output)),
            *("--corpus", str(collection / "corpus.jsonl")),
            *("--topics", str(collection / "queries.jsonl")),
            *("--run", str(collection / "run.bm25.trec")),
            *("--heads", str(tmp_path / "heads.json")),
        ],
    )
    assert reranked.exit_code == 0, reranked.output
    assert {key: len(hits) for key, hits in read_run(output).items()} == {
        f"q{n}": 4 for n in range(len(WORDS))
    }


def test_another_method_uses_the_same_signals(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    invoke("--method", "ndcg", "--count", 2)
    files = sorted((tmp_path / "signals").glob("*/*.safetensors"))
    assert len(files) == len(WORDS)
    monkeypatch.setattr(SequentialLayout, "read", None)
    assert invoke("--method", "qr", "--count", 3).exit_code == 0
    assert len(HeadSet.load(tmp_path / "heads.json")) == 3


def test_some_queries_are_drawn_by_the_seed(invoke: Invoke, tmp_path: Path) -> None:
    invoke("--queries", 2)
    first = set((tmp_path / "signals").glob("*/*.safetensors"))
    assert len(first) == 2
    invoke("--queries", 2)
    assert set((tmp_path / "signals").glob("*/*.safetensors")) == first
    invoke("--queries", 2, "--seed", 5)
    assert set((tmp_path / "signals").glob("*/*.safetensors")) > first


def test_signals_go_to_the_users_cache_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert signals_folder() == tmp_path / "routehead" / "signals"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert signals_folder() == Path.home() / ".cache" / "routehead" / "signals"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--method", "magic"),
            "--method=magic does not exist; give one of ndcg, qr, core, layers, discriminability, "
            "weights.",
        ),
        (("--queries", 0), "--queries=0 must be 1 or more."),
        (("--hits", 0), "--hits=0 must be 1 or more."),
        (
            ("--hits", 1),
            "none of the 6 queries of words0 has both relevant and other candidates; "
            "give judged queries with 2 or more candidates.",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    invoke: Invoke, tmp_path: Path, arguments: tuple[object, ...], message: str
) -> None:
    result = invoke(*arguments)
    assert isinstance(result.exception, InputError)
    assert str(result.exception) == message
    assert not (tmp_path / "heads.json").exists()


def test_heads_are_refused_in_the_other_layout(
    invoke: Invoke, model: str, collection: Path, tmp_path: Path
) -> None:
    invoke("--layout", "parallel")
    result = CliRunner().invoke(
        app,
        [
            *("evaluate", "--model", model, "--collection", str(collection)),
            *("--methods", f"bm25,{tmp_path / 'heads.json'}", "--layout", "sequential"),
        ],
    )
    assert str(result.exception) == (
        "the heads were chosen for the parallel layout, but layout='sequential'; "
        "leave layout out, or choose heads for this one."
    )


def test_adding_the_first_stage_twice_is_refused(
    model: str, collection: Path, tmp_path: Path
) -> None:
    path = tmp_path / "heads.json"
    HeadSet([(0, 1)], recipe=Recipe(weights=[1.0], first_stage_weight=0.5)).save(path)
    result = CliRunner().invoke(
        app,
        [
            *("evaluate", "--model", model, "--collection", str(collection)),
            *("--methods", f"bm25,{path}+bm25"),
        ],
    )
    assert "adds bm25 twice" in str(result.exception)
    with pytest.raises(HeadError):
        HeadSet.load(tmp_path / "none.json")
