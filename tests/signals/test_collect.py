"""Signals of the judged queries: equal to the reranker's, computed once, resumed after a stop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import families
import pytest
import torch

from routehead_plugins import Document, FrozenLM, HeadRoutedAttentionReranker
from routehead_plugins.errors import CollectionError, InputError
from routehead_plugins.io import Collection
from routehead_plugins.layouts import get_layout
from routehead_plugins.signals.collect import CollectOptions, collect_signals
from routehead_plugins.signals.store import QuerySignals, SignalSet

TEXTS = {"a": "a wolf ran over the hill", "b": "rain", "c": " ", "d": "seven grey stones"}


def collection(**changes: object) -> Collection:
    whole = Collection(
        name="tiny",
        path=Path("tiny"),
        corpus={key: Document(text, key) for key, text in TEXTS.items()},
        topics={"q/1": "which wolf?", "q2": "what is wet?", "unjudged": "why?"},
        qrels={"q/1": {"a": 2, "d": 1, "lost": 3, "b": -1}, "q2": {"b": 1}},
        run={"q/1": {"d": 3.0, "a": 2.0, "c": 1.5, "b": 1.0}, "q2": {"a": 2.0, "b": 1.0}},
    )
    return replace(whole, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def llm() -> FrozenLM:
    return FrozenLM(families.tiny_model("llama"), families.tiny_tokenizer(), name="tiny")


def collect(llm: FrozenLM, folder: Path, layout: str = "sequential", **options: int) -> SignalSet:
    return collect_signals(collection(), llm, get_layout(layout), folder, CollectOptions(**options))


def same(one: QuerySignals, other: QuerySignals) -> bool:
    return all(
        torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs
        for mine, theirs in zip(vars(one).values(), vars(other).values(), strict=True)
    )


@pytest.mark.parametrize("layout", ["sequential", "parallel"])
def test_signals_are_those_of_the_reranker(llm: FrozenLM, tmp_path: Path, layout: str) -> None:
    signals = collect(llm, tmp_path, layout)
    assert (signals.model, signals.layout, signals.data) == ("tiny", layout, ("tiny",))
    assert [query.query_id for query in signals.queries] == ["q/1", "q2"]
    first = signals.queries[0]
    assert first.docids == ("d", "a", "b")  # the blank one is left out
    assert first.gains.tolist() == [1, 2, 0]
    assert first.ideal_gains.tolist() == [3, 2, 1]
    assert first.first_stage.tolist() == [3, 2, 1]
    texts = [TEXTS[docid] for docid in first.docids]
    reranker = HeadRoutedAttentionReranker(llm, layout=layout)
    torch.testing.assert_close(first.calibrated, reranker.signals("which wolf?", texts))
    plain = HeadRoutedAttentionReranker(
        llm, layout=layout, calibrate=False, drop_outliers=False
    ).signals("which wolf?", texts)
    torch.testing.assert_close(first.mass, plain)
    whole = torch.tensor(reranker.score("which wolf?", texts))
    torch.testing.assert_close(first.averaged, whole, atol=1e-6, rtol=0)


def test_stored_signals_are_not_computed_again(
    llm: FrozenLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = collect(llm, tmp_path)
    monkeypatch.setattr(llm, "read", None)
    after = collect(llm, tmp_path)
    assert all(map(same, before.queries, after.queries))


@pytest.mark.parametrize("damage", ["cut", "changed", "emptied", "moved"])
def test_a_damaged_file_is_computed_again(llm: FrozenLM, tmp_path: Path, damage: str) -> None:
    before = collect(llm, tmp_path)
    first, second = sorted(tmp_path.glob("*/*.safetensors"))
    content = first.read_bytes()
    first.write_bytes(
        {
            "cut": content[:-40],
            "changed": b"x" + content[1:],
            "emptied": b"",
            "moved": second.read_bytes(),
        }[damage]
    )
    after = collect(llm, tmp_path)
    assert all(map(same, before.queries, after.queries))
    assert first.read_bytes() == content


def test_an_interrupted_run_leaves_whole_files_only_and_resumes(
    llm: FrozenLM, tmp_path: Path
) -> None:
    calls = []

    def stop() -> None:
        calls.append(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect_signals(
            collection(), llm, get_layout(None), tmp_path, CollectOptions(), advance=stop
        )
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 1
    assert not list(tmp_path.glob("*/*.tmp"))
    assert len(collect(llm, tmp_path).queries) == 2


_ALL_CANDIDATES = {"1d6dbebd8b1a1eb72b4de25b", "6268bedec0852a87197c0b9d"}
_THREE_CANDIDATES = {"26dcaffaf5eadb34e6c93e1a", "6268bedec0852a87197c0b9d"}


@pytest.mark.parametrize(
    ("layout", "options", "folder", "names"),
    [
        ("sequential", {}, "050cdde5521dda22", _ALL_CANDIDATES),
        ("parallel", {}, "4c8bb4b87c8a1280", _ALL_CANDIDATES),
        ("sequential", {"max_doc_tokens": 3, "hits": 3}, "11a7ee21c7e19aaa", _THREE_CANDIDATES),
    ],
)
def test_file_names_never_change(
    llm: FrozenLM,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    layout: str,
    options: dict[str, int],
    folder: str,
    names: set[str],
) -> None:
    # Users have signals under these names; other names would compute all of them again.
    monkeypatch.setattr("routehead_plugins.signals.store.__version__", "0.1.0")
    collect(llm, tmp_path, layout, **options)
    assert [path.name for path in tmp_path.iterdir()] == [folder]
    assert {path.stem for path in (tmp_path / folder).glob("*.safetensors")} == names


def test_signals_with_other_settings_or_content_are_stored_apart(
    llm: FrozenLM, tmp_path: Path
) -> None:
    collect(llm, tmp_path)
    collect(llm, tmp_path, "parallel")
    collect(llm, tmp_path, max_doc_tokens=3)
    assert len(list(tmp_path.iterdir())) == 3
    judged = collection(qrels={"q2": {"a": 1}})
    signals = collect_signals(judged, llm, get_layout(None), tmp_path)
    assert signals.queries[0].gains.tolist() == [1, 0]


def test_the_order_in_the_prompt_changes_signals_and_not_the_order_of_documents(
    llm: FrozenLM, tmp_path: Path
) -> None:
    straight, shuffled = collect(llm, tmp_path), collect(llm, tmp_path, shuffle=3)
    assert [q.docids for q in straight.queries] == [q.docids for q in shuffled.queries]
    assert not torch.allclose(straight.queries[0].mass, shuffled.queries[0].mass, atol=1e-4)
    one = collect(llm, tmp_path, "parallel")
    other = collect(llm, tmp_path, "parallel", shuffle=3)
    torch.testing.assert_close(one.queries[0].mass, other.queries[0].mass, atol=1e-6, rtol=0)


def test_the_best_document_is_shown_at_several_positions(llm: FrozenLM, tmp_path: Path) -> None:
    signals = collect(llm, tmp_path, positions=3)
    assert [query.query_id for query in signals.queries] == ["q/1"] * 3 + ["q2"] * 3
    assert {query.docids for query in signals.queries[:3]} == {("d", "a", "b")}
    masses = [query.mass for query in signals.queries[:3]]
    assert not torch.allclose(masses[0], masses[1], atol=1e-5)
    # In the middle it stands where the first stage has it.
    torch.testing.assert_close(masses[1], collect(llm, tmp_path).queries[0].mass)


def test_bad_options_and_missing_candidates_are_refused(llm: FrozenLM, tmp_path: Path) -> None:
    for name in ("hits", "positions"):
        with pytest.raises(InputError) as error:
            CollectOptions(**{name: 0})
        assert str(error.value) == f"{name}=0 is not a count; give a whole number, 1 or more."
    with pytest.raises(CollectionError, match=r"has no run\.bm25\.trec"):
        collect_signals(collection(run=None), llm, get_layout(None), tmp_path)
