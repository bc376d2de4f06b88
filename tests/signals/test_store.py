"""Signals on disk: what is read was written whole, by the same settings, from the same content."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import families
import pytest
import torch

from routehead_plugins import Document, FrozenLM, HeadRoutedAttentionReranker, HeadSet
from routehead_plugins.errors import CollectionError, InputError
from routehead_plugins.io import Collection
from routehead_plugins.layouts import get_layout
from routehead_plugins.signals.collect import CollectOptions, collect_signals
from routehead_plugins.signals.store import QuerySignals, SignalSet, SignalStore

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
    found = collect(llm, tmp_path, layout)
    assert (found.model, found.layout, found.data) == ("tiny", layout, ("tiny",))
    assert [query.query_id for query in found.queries] == ["q/1", "q2"]
    first = found.queries[0]
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
    undropped = HeadRoutedAttentionReranker(llm, layout=layout, drop_outliers=False)
    calibrated = undropped.signals("which wolf?", texts)
    torch.testing.assert_close(first.mass - first.null_mass, calibrated, atol=1e-6, rtol=0)


def test_what_was_computed_is_not_computed_again(
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


def test_a_stopped_run_leaves_whole_files_only_and_goes_on(llm: FrozenLM, tmp_path: Path) -> None:
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


def test_other_settings_and_other_content_are_kept_apart(llm: FrozenLM, tmp_path: Path) -> None:
    collect(llm, tmp_path)
    collect(llm, tmp_path, "parallel")
    collect(llm, tmp_path, max_doc_tokens=3)
    assert len(list(tmp_path.iterdir())) == 3
    judged = collection(qrels={"q2": {"a": 1}})
    found = collect_signals(judged, llm, get_layout(None), tmp_path)
    assert found.queries[0].gains.tolist() == [1, 0]


def test_the_order_shown_changes_signals_and_not_the_order_of_documents(
    llm: FrozenLM, tmp_path: Path
) -> None:
    straight, shuffled = collect(llm, tmp_path), collect(llm, tmp_path, shuffle=3)
    assert [q.docids for q in straight.queries] == [q.docids for q in shuffled.queries]
    assert not torch.allclose(straight.queries[0].mass, shuffled.queries[0].mass, atol=1e-4)
    one = collect(llm, tmp_path, "parallel")
    other = collect(llm, tmp_path, "parallel", shuffle=3)
    torch.testing.assert_close(one.queries[0].mass, other.queries[0].mass, atol=1e-6, rtol=0)


def test_the_best_document_is_shown_at_several_places(llm: FrozenLM, tmp_path: Path) -> None:
    found = collect(llm, tmp_path, positions=3)
    assert [query.query_id for query in found.queries] == ["q/1"] * 3 + ["q2"] * 3
    assert {query.docids for query in found.queries[:3]} == {("d", "a", "b")}
    masses = [query.mass for query in found.queries[:3]]
    assert not torch.allclose(masses[0], masses[1], atol=1e-5)
    # In the middle it stands where the first stage has it.
    torch.testing.assert_close(masses[1], collect(llm, tmp_path).queries[0].mass)


def test_sets_of_the_same_kind_can_be_joined(llm: FrozenLM, tmp_path: Path) -> None:
    found = collect(llm, tmp_path)
    joined = found + replace(found, data=("other",))
    assert (joined.data, len(joined.queries)) == (("tiny", "other"), 4)
    with pytest.raises(InputError) as error:
        _ = found + collect(llm, tmp_path, "parallel")
    assert str(error.value) == (
        "signals of layout 'parallel' cannot be joined to signals of 'sequential'; "
        "compute both the same way."
    )
    with pytest.raises(InputError, match="signals of heads 'other heads' cannot be joined"):
        _ = found + replace(found, heads=HeadSet.parse("0-0"))


def test_without_contrast_there_is_nothing_to_learn(llm: FrozenLM, tmp_path: Path) -> None:
    flat = collect_signals(
        collection(qrels={"q2": {"a": 1, "b": 1}}), llm, get_layout(None), tmp_path
    )
    with pytest.raises(InputError) as error:
        _ = flat.with_contrast
    assert str(error.value) == (
        "none of the 1 queries of tiny has both relevant and other candidates; "
        "give judged queries with 2 or more candidates."
    )


def test_bad_options_and_folders_are_refused(llm: FrozenLM, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="hits=0 is too few; give 1 or more"):
        CollectOptions(hits=0)
    with pytest.raises(CollectionError, match=r"has no run\.bm25\.trec"):
        collect_signals(collection(run=None), llm, get_layout(None), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="signals cannot be kept in"):
        SignalStore(tmp_path / "file", {})
