"""Every benchmark can be run as a script, and the small ones measure a tiny collection."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import families
import pytest
import typer

from benchmarks import common
from benchmarks.heads import quality, reweighting, spans
from routehead_plugins import HeadSet, Recipe
from routehead_plugins.errors import InputError
from routehead_plugins.evaluation import significance
from routehead_plugins.io import Collection, load_collection, write_run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny LLM."""
    folder = tmp_path_factory.mktemp("tiny")
    families.tiny_model("llama").save_pretrained(folder)
    families.tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collection of three documents, each the answer to one query."""
    folder = tmp_path_factory.mktemp("root") / "small"
    (folder / "qrels").mkdir(parents=True)
    words = ["wolf", "rain", "stone"]
    rows = [{"_id": f"d{n}", "text": f"there is a {word}"} for n, word in enumerate(words)]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [{"_id": f"q{n}", "text": f"{word}?"} for n, word in enumerate(words)]
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, rows)))
    judged = "".join(f"q{n}\td{n}\t1\n" for n in range(3))
    (folder / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}")
    run = {f"q{n}": {"d0": 3.0, "d1": 2.0, "d2": 1.0} for n in range(3)}
    write_run(folder / "run.bm25.trec", run, "bm25")
    return folder


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(significance, "RESAMPLES", 100)


@pytest.mark.parametrize(
    "path",
    sorted(p for p in (ROOT / "benchmarks").rglob("*.py") if "__main__" in p.read_text()),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_scripts_say_how_they_are_run(path: Path) -> None:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    text = path.read_text()
    assert f"python -m {module}" in text or f'"-m", "{module}"' in text
    assert "\n    run(" in text or module == "benchmarks.latency.peak"


def test_quality_is_that_of_routehead_evaluate(
    tiny: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quality.main([folder], model=tiny, dtype="float32", hits=3, output=tmp_path)
    content = json.loads((tmp_path / "quality-small.json").read_text())
    methods = content["collections"]["small"]["methods"]
    assert list(methods) == ["bm25", "all", "all+bm25", "layers", "layers+bm25"]
    assert methods["bm25"]["means"]["RR@10"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert content["settings"]["max_doc_tokens"] == 120
    assert "layers+bm25" in capsys.readouterr().out


def test_reweighting_is_ablated_in_both_layouts(tiny: str, folder: Path, tmp_path: Path) -> None:
    reweighting.main([folder], model=tiny, dtype="float32", hits=3, queries=2, output=tmp_path)
    for layout in ("sequential", "parallel"):
        content = json.loads((tmp_path / f"reweighting-small-{layout}.json").read_text())
        assert content["settings"]["layout"] == layout
        methods = content["collections"]["small"]["methods"]
        assert list(methods) == ["none", "idf", "entropy", "idf+entropy"]
        assert {figures["queries"] for figures in methods.values()} == {2}


def test_answers_are_looked_for_among_four_other_passages() -> None:
    shown: list[list[str]] = []

    class Reranker:
        """Finds the first passage's beginning, whatever is asked."""

        def rerank(self, _: str, documents: list[Any], *, spans: bool) -> list[Any]:
            assert spans
            shown.append([document.id for document in documents])
            hits = [
                Hit(index, (Span(0, 2 * len(document.text)),))
                for index, document in enumerate(documents)
            ]
            return hits[::-1]

    @dataclass
    class Span:
        start: int
        end: int

    @dataclass
    class Hit:
        index: int
        spans: tuple[Span, ...]

    bundled = load_collection(common.RESULTS.parents[1] / "routehead_plugins/assets/bundled")
    ids = list(bundled.corpus)[:5]
    run = {query_id: {docid: 1.0 for docid in ids} for query_id in bundled.topics}
    collection = Collection(
        bundled.name, bundled.path, bundled.corpus, bundled.topics, bundled.qrels, run
    )
    reranker: Any = Reranker()
    outcomes = spans.find_answers(reranker, collection)
    assert {len(candidates) for candidates in shown} == {5}
    assert all(len(set(candidates)) == 5 for candidates in shown)
    assert not any(hit for hit, _ in outcomes)  # the middle lies behind the passage
    summary = spans.summarise([(True, 0.25), (False, 0.25)])
    assert summary == {"answers": 2, "hit_rate": 0.5, "chance": 0.25, "p": pytest.approx(7 / 16)}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a command."""

    folders: Annotated[list[Path], typer.Argument(help="Folders.")]
    count: Annotated[int, typer.Option(help="A number.")] = 3
    skip: Annotated[bool, typer.Option("--skip", help="Skip it.")] = False


def test_a_dataclass_is_the_signature_of_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Options] = []
    monkeypatch.setattr(sys, "argv", ["script.py", "a", "b", "--skip"])
    with pytest.raises(SystemExit) as caught:
        common.run(common.with_options(given.append, Options))
    assert caught.value.code == 0
    assert given == [Options(folders=[Path("a"), Path("b")], skip=True)]


def test_mistakes_end_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(_: Options) -> None:
        raise InputError("it is wrong.")

    monkeypatch.setattr(sys, "argv", ["benchmarks/heads/script.py", "a"])
    with pytest.raises(SystemExit) as caught:
        common.run(common.with_options(command, Options))
    assert caught.value.code == 2
    assert capsys.readouterr().err == "script: it is wrong.\n"


def test_head_sets_survive_the_cache(tmp_path: Path) -> None:
    recipe = Recipe(weights=[0.1 + 0.2, -1], aggregation="log", first_stage_weight=0.5)
    heads = HeadSet([(1, 2), (0, 3)], model="m", method="x", scores=[0.1, 0.2], recipe=recipe)
    calls: list[int] = []

    def compute() -> HeadSet:
        calls.append(1)
        return heads

    assert common.Cache(tmp_path).heads(["key"], compute) == heads
    assert common.Cache(tmp_path).heads(["key"], compute) == heads
    assert common.Cache(tmp_path, [Path(__file__)]).heads(["key"], compute) == heads
    assert common.Cache(None).heads(["key"], compute) == heads
    assert len(calls) == 3


def test_commands_are_written_as_they_are_typed() -> None:
    options = {"max_doc_tokens": 120, "synthesize": None, "cost": True, "skip": False}
    command = common.command_line("benchmarks.heads.compare", ["a b"], options)
    assert command == "python -m benchmarks.heads.compare 'a b' --max-doc-tokens=120 --cost"
