"""Documents on disk are read as if they had been run, or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import families
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from indexed import TEXTS, documents, reranker

from routehead_plugins import Document, DocumentIndex, FrozenLM, HeadRoutedAttentionReranker
from routehead_plugins.errors import IndexDamagedError, IndexMismatchError, InputError
from routehead_plugins.layouts import LateLayout

QUERY = "which wolf ran?"


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-4), ("int8", 2e-2)])
def test_signals_are_those_of_documents_that_are_run(
    tmp_path: Path, forbid_forwards: Callable[[], None], dtype: str, tolerance: float
) -> None:
    plain = reranker()
    plain.index(documents(), tmp_path, dtype=dtype)
    expected = plain.signals(QUERY, TEXTS)
    forbid_forwards()
    signals = reranker(DocumentIndex(tmp_path)).signals(QUERY, TEXTS)
    torch.testing.assert_close(signals, expected, atol=tolerance, rtol=0)
    assert not torch.equal(signals, expected)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_no_score_depends_on_which_documents_are_kept(tmp_path: Path, dtype: str) -> None:
    reranker().index(documents()[:2], tmp_path / "some", dtype=dtype)
    reranker().index(documents(), tmp_path / "all", dtype=dtype)
    some, every = (reranker(DocumentIndex(tmp_path / name)) for name in ("some", "all"))
    torch.testing.assert_close(
        some.signals(QUERY, TEXTS), every.signals(QUERY, TEXTS), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("family", families.CONFIGS)
def test_keys_of_every_family_are_kept(tmp_path: Path, family: str) -> None:
    llm = FrozenLM(families.tiny_model(family), families.tiny_tokenizer(), name=family)
    plain = HeadRoutedAttentionReranker(llm, layout="late")
    plain.index(documents(), tmp_path, dtype="float16")
    kept = HeadRoutedAttentionReranker(llm, layout=LateLayout(documents=DocumentIndex(tmp_path)))
    torch.testing.assert_close(
        kept.signals(QUERY, TEXTS), plain.signals(QUERY, TEXTS), atol=2e-3, rtol=0
    )


def test_a_text_is_never_read_from_the_keys_of_an_older_one(folder: Path) -> None:
    changed = [Document("the moon", "d0"), *documents()[1:]]
    torch.testing.assert_close(
        torch.tensor(reranker(DocumentIndex(folder)).score(QUERY, changed)),
        torch.tensor(reranker().score(QUERY, changed)),
        atol=2e-4,
        rtol=0,
    )


def test_evidence_is_that_of_documents_that_are_run(folder: Path) -> None:
    kept = reranker(DocumentIndex(folder)).rerank(QUERY, TEXTS, spans=True)
    plain = reranker().rerank(QUERY, TEXTS, spans=True)
    assert [[span[:2] for span in hit.spans] for hit in kept] == [
        [span[:2] for span in hit.spans] for hit in plain
    ]


def test_blank_documents_rank_last(folder: Path) -> None:
    ranking = reranker(DocumentIndex(folder)).rerank(QUERY, [" ", TEXTS[0], TEXTS[1]])
    assert ranking[-1].index == 0


# search


def test_a_search_equals_reranking_every_document(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("routehead_plugins.index.document_index._CHUNK_TOKENS", 30)
    ours = reranker(DocumentIndex(folder))
    hits = ours.search(QUERY, 10)
    ranking = ours.rerank(QUERY, documents())
    assert [hit.id for hit in hits] == [hit.document.id for hit in ranking]
    expected = [hit.score for hit in ranking]
    assert [hit.score for hit in hits] == pytest.approx(expected, abs=1e-6)
    assert [hit.id for hit in ours.search(QUERY, 2)] == [hit.id for hit in hits[:2]]


def test_a_search_adds_scores_of_a_first_stage(folder: Path) -> None:
    ours = reranker(DocumentIndex(folder), first_stage_weight=0.5)
    bm25 = {"d1": 3.0, "d3": 1.0}
    scored = [
        Document(text, f"d{number}", score=bm25.get(f"d{number}", 1.0))
        for number, text in enumerate(TEXTS)
    ]
    hits = ours.search(QUERY, first_stage=bm25)
    ranking = ours.rerank(QUERY, scored)
    assert [hit.id for hit in hits] == [hit.document.id for hit in ranking]
    expected = [hit.score for hit in ranking]
    assert [hit.score for hit in hits] == pytest.approx(expected, abs=1e-4)


def test_an_empty_index_has_no_results(tmp_path: Path) -> None:
    reranker().index([], tmp_path / "index")
    index = DocumentIndex(tmp_path / "index")
    assert len(index) == 0
    assert reranker(index).search(QUERY) == []
    assert len(reranker(index).rerank(QUERY, TEXTS)) == len(TEXTS)


def test_without_an_index_there_is_nothing_to_search() -> None:
    with pytest.raises(InputError, match=r"there is no index to search; load .* with documents=\."):
        reranker().search(QUERY)


# opening


def test_options_that_are_left_out_are_those_of_the_index(tmp_path: Path, model: str) -> None:
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu"}
    heads = "1-0,2-3"
    plain = HeadRoutedAttentionReranker.from_pretrained(
        model, heads=heads, layout="late", max_doc_tokens=3, **options
    )
    plain.index(documents(), tmp_path)
    kept = HeadRoutedAttentionReranker.from_pretrained(model, documents=tmp_path, **options)
    assert (str(kept.selector.select("", kept.llm)), kept.layout.name) == (heads, "late")
    assert kept.max_doc_tokens == 3
    assert kept.documents is not None
    assert kept.documents.contains([*TEXTS, "moss"]) == [True] * len(TEXTS) + [False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "parallel"}, r"documents='.*' is for the late layout, but layout='parallel'; "),
        ({"documents": " "}, r"documents=' ' is blank; give a text"),
        ({"documents": ["x"]}, r"documents=\['x'\] is a list; give the folder of an index"),
        ({"documents": "no/where"}, r"no/where/config.json does not exist; expected an index"),
        ({"heads": "3-3"}, r"holds no keys for key head 3-1: it was made for the heads "),
        ({"max_doc_tokens": 9}, r"was made with max_doc_tokens=None, but now it is 9; use the"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_the_first_query(
    folder: Path, model: str, change: dict[str, Any], message: str
) -> None:
    options: dict[str, Any] = {"documents": folder, "dtype": "float32", "device": "cpu"}
    with pytest.raises(InputError, match=message):
        HeadRoutedAttentionReranker.from_pretrained(model, **options | change)


def test_an_index_of_another_llm_is_refused(folder: Path) -> None:
    message = r"was made with 'tiny' \(weights \w{8}\), but the LLM is 'tiny' \(weights \w{8}\); "
    with pytest.raises(IndexMismatchError, match=message):
        reranker(DocumentIndex(folder), seed=1).score(QUERY, TEXTS)


def test_weights_in_another_number_format_are_the_same() -> None:
    model = families.tiny_model("llama").bfloat16()
    twin = families.tiny_model("llama")
    twin.load_state_dict(model.float().state_dict())
    llms = [FrozenLM(m, families.tiny_tokenizer()) for m in (model.bfloat16(), twin)]
    assert llms[0].fingerprint(3) == llms[1].fingerprint(3)
    assert llms[0].fingerprint(3) != llms[0].fingerprint(2)


def test_an_index_of_another_prompt_is_refused(folder: Path) -> None:
    ours = reranker()
    ours.layout = LateLayout(documents=DocumentIndex(folder), document_room=64)
    with pytest.raises(IndexMismatchError, match=r"was made with prompt=\(.*\), but now it is \("):
        ours.score(QUERY, TEXTS)


def test_an_index_of_a_later_version_is_refused(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"version": 2}))
    with pytest.raises(IndexMismatchError, match="has version 2, but this release reads vers"):
        DocumentIndex(folder)


# damage


def test_a_flipped_bit_is_noticed_wherever_it_is(folder: Path) -> None:
    ours = reranker()
    expected = ours.score(QUERY, TEXTS)
    unnoticed = 0
    for file in sorted(folder.glob("shard-*/[!s]*.bin")):  # float16 has no scales
        content = file.read_bytes()
        for position in np.random.default_rng(0).integers(0, len(content), 8).tolist():
            damaged = bytearray(content)
            damaged[position] ^= 1 << (position % 8)
            file.write_bytes(damaged)
            with suppress(IndexDamagedError):
                index = DocumentIndex(folder)
                scores = HeadRoutedAttentionReranker(
                    ours.llm, ours.selector, layout=LateLayout(documents=index)
                ).score(QUERY, TEXTS)
                # Where the hash of a text has changed, the document is run.
                assert scores == pytest.approx(expected, abs=2e-3)
                unnoticed += 1
                with pytest.raises(IndexDamagedError):
                    index.verify()
        file.write_bytes(content)
    assert unnoticed < 24
    assert DocumentIndex(folder).verify() == len(TEXTS)


@pytest.mark.parametrize("name", ["keys", "positions", "tokens", "ids", "documents"])
def test_a_file_that_is_too_short_is_named(folder: Path, name: str) -> None:
    file = folder / "shard-00000" / f"{name}.bin"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(IndexDamagedError, match=f"{name}.bin has {size - 1:,} bytes, but {size:,}"):
        DocumentIndex(folder)


def test_a_damaged_line_of_the_log_is_named(folder: Path) -> None:
    log = folder / "commits.jsonl"
    log.write_bytes(log.read_bytes().replace(b"[0", b"[1", 1))
    with pytest.raises(IndexDamagedError, match=r"commits.jsonl:1: .* is damaged; restore the"):
        DocumentIndex(folder)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_no_log_or_configuration_raises_another_error(folder: Path, content: bytes) -> None:
    for name in ("commits.jsonl", "config.json"):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        with suppress(IndexDamagedError, IndexMismatchError):
            DocumentIndex(folder)
        (folder / name).write_bytes(before)


# many


def test_threads_share_an_index(folder: Path) -> None:
    ours = reranker(DocumentIndex(folder))
    queries = [f"which {word} ran?" for word in ("wolf", "stone", "rain", "hill")]
    expected = [reranker(DocumentIndex(folder)).score(query, TEXTS) for query in queries]
    with ThreadPoolExecutor(4) as pool:
        scores = list(pool.map(lambda query: ours.score(query, TEXTS), queries * 4))
    assert scores == expected * 4


def test_documents_that_are_added_are_seen_after_a_refresh(folder: Path) -> None:
    index = DocumentIndex(folder)
    reranker().index([Document("moss", "d9")], folder, dtype="float16")
    assert (len(index), index.contains(["moss"])) == (4, [False])
    index.refresh()
    assert (len(index), index.contains(["moss"])) == (5, [True])


def test_an_index_may_be_moved(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder, tmp_path / "elsewhere")
    assert reranker(DocumentIndex(tmp_path / "elsewhere")).search(QUERY, 1)


def test_no_document_is_a_python_object_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = reranker()
    ours.index([Document(f"wolf {n}", f"d{n}") for n in range(300)], tmp_path)
    monkeypatch.setattr(
        "routehead_plugins.index.document_index._Contents.document",
        lambda *_: cast(Any, pytest.fail("a document was read")),
    )
    assert len(DocumentIndex(tmp_path)) == 300
