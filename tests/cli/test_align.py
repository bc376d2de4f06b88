"""`routehead align`, from folders of texts to an adapter that re-ranks."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from routehead_plugins import FrozenLM, HeadRoutedAttentionReranker, alignment, signals
from routehead_plugins.alignment import AlignmentExample
from routehead_plugins.backbone import Adapter
from routehead_plugins.cli import align_data, app, training_data
from routehead_plugins.cli.align import _layers
from routehead_plugins.errors import InputError
from routehead_plugins.io import Collection, Run, write_run
from routehead_plugins.signals import EncoderTeacher
from routehead_plugins.signals.store import SignalStore

THINGS = [f"{first}{last}" for first in "bdfgklmnp" for last in ("oo", "al", "ine")]
FILES = {
    *("adapter_config.json", "adapter_model.safetensors"),
    *("heads.json", "history.json", "README.md"),
}
Align = Callable[..., Result]


def write_folder(folder: Path, *, judged: bool = True) -> Path:
    """A passage and a query for each thing; its passage is the third of five candidates."""
    folder.mkdir()
    rows = [
        {
            "_id": f"d{n}",
            "text": f"the old stories about the {thing} that many people tell far away",
        }
        for n, thing in enumerate(THINGS)
    ]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    if not judged:
        return folder
    rows = [{"_id": f"q{n}", "text": f"{thing} stories"} for n, thing in enumerate(THINGS)]
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "qrels").mkdir()
    # The last two queries have no judgments.
    judgments = "".join(f"q{n}\td{n}\t1\n" for n in range(len(THINGS) - 2))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judgments)
    write_run(folder / "run.bm25.trec", run_of(THINGS), "bm25")
    return folder


def run_of(topics: list[str]) -> Run:
    count = len(THINGS)
    return {
        f"q{n}": {f"d{(n + away) % count}": 9.0 - rank for rank, away in enumerate((2, 1, 0, 3, 4))}
        for n in range(len(topics))
    }


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("judged") / "words")


@pytest.fixture
def align(model: str, tmp_path: Path) -> Align:
    def call(*collections: Path, **options: Any) -> Result:
        given: dict[str, Any] = {
            "output": tmp_path / "adapter",
            "signals": tmp_path / "signals",
            "hits": 5,
            "layers": "0-2",
            "rank": 4,
            "epochs": 1,
            "evaluate_every": 3,
            "dtype": "float32",
            "model": model,
            "keep": True,
        }
        arguments = ["align"]
        for folder in collections:
            arguments += ["--collection", str(folder)]
        for name, value in (given | options).items():
            option = f"--{name.replace('_', '-')}"
            if value is not False and value is not None:
                arguments += [option] if value is True else [option, str(value)]
        return CliRunner().invoke(app, arguments, color=False)

    return call


def test_judged_queries_make_an_adapter_that_reranks(
    align: Align, words: Path, tmp_path: Path, model: str
) -> None:
    result = align(words)
    assert result.exit_code == 0, result.output
    assert "22 queries to learn from, 3 held out" not in result.output  # of 25, 4 are held out
    assert "21 queries to learn from, 4 held out" in result.stderr
    folder = tmp_path / "adapter"
    assert {path.name for path in folder.iterdir()} == FILES
    adapter = Adapter.from_pretrained(folder)
    assert adapter.heads is not None
    assert adapter.heads.adapter == adapter.label
    assert adapter.heads.layout == "late"
    assert adapter.heads.recipe.aggregation == "log"
    assert "ndcg@10" in result.stdout
    reranker = HeadRoutedAttentionReranker.from_pretrained(model, adapter=folder, dtype="float32")
    ranking = reranker.rerank("boo stories", ["about the boo", "about the dal"])
    assert ranking.adapter == adapter.label
    assert list(ranking.heads) == list(adapter.heads)


def test_the_card_says_what_was_done(
    align: Align, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["routehead", "align", "--output", str(tmp_path / "adapter")])
    align(words, spread=0.5)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "library_name: peft" in card
    assert "routehead align --output adapter" in card
    assert str(tmp_path) not in card
    assert "losses: distillation 1.0, preference 1.0, spread 0.5" in card
    assert "21 queries, with routehead-plugins" in card
    assert "on 4 held-out queries" in card
    history = json.loads((tmp_path / "adapter" / "history.json").read_text())
    assert len(history["history"]) > 6


def test_a_teacher_also_judges_what_nobody_judged(
    align: Align, words: Path, tmp_path: Path
) -> None:
    result = align(words, teacher="likelihood", temperature=0.5)
    assert result.exit_code == 0, result.output
    assert "22 queries to learn from, 5 held out" in result.stderr
    assert "distillation" in result.stderr
    without = align(words, teacher="likelihood", distillation=0, output=tmp_path / "other")
    assert "21 queries to learn from" in without.stderr


def test_an_adapter_that_is_not_clearly_better_is_not_written(
    align: Align, words: Path, tmp_path: Path
) -> None:
    result = align(words, keep=False, learning_rate=1e-9)
    assert isinstance(result.exception, InputError)
    message = str(result.exception)
    assert message.startswith("held-out queries do not clearly gain (ndcg@10 ")
    assert "\n" not in message
    assert not (tmp_path / "adapter").exists()


def test_a_job_that_was_stopped_resumes_and_ends_the_same(
    align: Align, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = align(words, signals=tmp_path / "others", output=tmp_path / "whole" / "adapter")
    assert whole.exit_code == 0, whole.output
    put, count = SignalStore.put, [0]

    def stop(self: SignalStore, key: str, signals: Any) -> None:
        count[0] += 1
        if count[0] > 30:  # after training, among the signals with the adapter
            raise KeyboardInterrupt
        put(self, key, signals)

    with monkeypatch.context() as patch:
        patch.setattr(SignalStore, "put", stop)
        assert align(words).exit_code != 0
    assert not (tmp_path / "adapter").exists()
    again = align(words)
    assert "step 3," not in again.stderr  # it is not trained again
    for name in ("adapter_model.safetensors", "heads.json"):
        both = [folder / "adapter" / name for folder in (tmp_path, tmp_path / "whole")]
        assert both[0].read_bytes() == both[1].read_bytes()


def test_a_corpus_alone_is_enough(
    align: Align, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    texts = write_folder(tmp_path / "texts", judged=False)
    writers: list[str] = []

    def write(self: FrozenLM, _: str, prompts: list[str], **__: Any) -> list[str]:
        writers.append(self.name)
        things = [next(t for t in THINGS if f"the {t} " in prompt) for prompt in prompts]
        return [f"who tells {thing} stories" for thing in things]

    def retrieve(collection: Collection, topics: Mapping[str, str], hits: int) -> Collection:
        run: Run = {}
        for query_id, query in topics.items():
            n = next(n for n, thing in enumerate(THINGS) if f" {thing} " in query)
            order = [(n + away) % len(THINGS) for away in (2, 1, 0, 3, 4)[:hits]]
            run[query_id] = {f"d{index}": 9.0 - rank for rank, index in enumerate(order)}
        return replace(collection, run=run)

    monkeypatch.setattr(FrozenLM, "write", write)
    monkeypatch.setattr(training_data, "with_candidates", retrieve)
    monkeypatch.setattr(align_data, "check_bm25", lambda: None)
    copy = tmp_path / "writer"
    copy.symlink_to(model)
    result = align(texts, synthesize=24, writer=copy)
    assert result.exit_code == 0, result.output
    assert set(writers) == {str(copy)}


def encoder() -> EncoderTeacher:
    """A bi-encoder that knows the things."""

    def embed(texts: Sequence[str]) -> Tensor:
        return torch.tensor([[float(thing in text) for thing in THINGS] for text in texts]) + 0.01

    return EncoderTeacher("things", embed, embed)


def retrieve_all(collection: Collection, topics: Mapping[str, str], hits: int) -> Collection:
    order = {f"d{index}": 9.0 - index for index in range(hits)}
    return replace(collection, run={query_id: dict(order) for query_id in topics})


def test_phrases_of_a_corpus_are_queries_in_pools(
    align: Align, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = write_folder(tmp_path / "texts", judged=False)
    sizes: list[int] = []
    whole = alignment.align

    def count(llm: FrozenLM, examples: list[AlignmentExample], *args: Any, **options: Any) -> Any:
        pools: dict[tuple[str, ...], int] = {}
        for example in examples:
            key = tuple(example.documents)
            pools[key] = pools.get(key, 0) + 1
        sizes.extend(pools.values())
        return whole(llm, examples, *args, **options)

    monkeypatch.setattr(signals, "load_teacher", lambda *_, **__: encoder())
    monkeypatch.setattr(align_data, "with_candidates", retrieve_all)
    monkeypatch.setattr(align_data, "check_bm25", lambda: None)
    monkeypatch.setattr(alignment, "align", count)
    result = align(texts, phrases=40, pool=6, teacher="things", hits=8)
    assert result.exit_code == 0, result.output
    learned, rest = sum(sizes), sum(sizes) % 6
    assert sorted(sizes, reverse=True) == [6] * (learned // 6) + [rest] * (rest > 0)
    assert f"{learned} queries to learn from, " in result.stderr


def test_training_goes_on_from_an_adapter(align: Align, words: Path, tmp_path: Path) -> None:
    first = align(words, output=tmp_path / "first")
    assert first.exit_code == 0, first.output
    second = align(words, output=tmp_path / "second", start=tmp_path / "first", learning_rate=1e-9)
    assert second.exit_code == 0, second.output
    before, after = (Adapter.from_pretrained(tmp_path / name) for name in ("first", "second"))
    for name, weights in before.weights.items():
        torch.testing.assert_close(after.weights[name], weights, atol=1e-6, rtol=0)
    history = json.loads((tmp_path / "second" / "history.json").read_text())
    assert history["settings"]["start"] == before.label
    card = (tmp_path / "second" / "README.md").read_text()
    assert f"\n- went on from the adapter {before.label}\n- losses: " in card


def test_a_missing_adapter_is_noticed_before_any_work(align: Align, words: Path) -> None:
    result = align(words, start="nowhere/at-all")
    assert str(result.exception).startswith("adapter='nowhere/at-all' is not a folder and cannot")
    assert "queries to learn from" not in result.stderr


def test_pools_need_a_bi_encoder(align: Align, words: Path) -> None:
    result = align(words, pool=4, teacher="likelihood")
    assert str(result.exception) == (
        "--teacher=likelihood scores pairs one by one; for --pool, give a bi-encoder, such as "
        "minilm."
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"phrases": 9}, "--phrases=9 needs scores to learn from; give --teacher, such as minilm"),
        ({"pool": 4, "teacher": "minilm", "distillation": 0}, "--pool=4 needs scores to learn"),
        ({"pool": 0, "teacher": "minilm"}, "--pool=0 must be 1 or more"),
        ({"layout": "sequential"}, "layout='sequential' does not exist; choose one of late"),
        ({"held_out": 0}, "--held-out=0.0 must be above 0"),
        ({"hits": 0}, "--hits=0 must be 1 or more"),
        ({"rank": 0}, "rank=0 is not a count"),
        ({"distillation": 0, "preference": 0}, "leave nothing to learn"),
        ({"writer": "other"}, "--writer=other is for --synthesize"),
        ({"no_judged": True}, "without queries there is nothing to learn from"),
        ({"layers": "2-9"}, "--layers=2-9 is not a range of the LLM's 4 layers"),
        ({"layers": "2"}, "--layers=2 is not a range"),
        ({"queries": 5}, "5 queries can be learned from, but at least 20 are needed"),
        ({"teacher": "minilm", "temperature": -1.0}, "temperature"),
    ],
    ids=str,
)
def test_options_that_cannot_be_used_are_refused(
    align: Align, words: Path, options: dict[str, Any], message: str
) -> None:
    result = align(words, **options)
    assert isinstance(result.exception, InputError), result.output
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)


def test_files_that_are_no_adapters_are_not_overwritten(
    align: Align, words: Path, tmp_path: Path
) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "README.md").write_text("my notes")
    result = align(words)
    assert "has a README.md that is no adapter's" in str(result.exception)


@pytest.mark.parametrize(("depth", "expected"), [(30, (5, 13)), (28, (4, 12)), (4, (0, 1))])
def test_the_layers_lie_before_the_middle_by_default(depth: int, expected: tuple[int, int]) -> None:
    assert _layers(None, depth) == expected
