"""Building an index: adding, replacing, stopping, and what goes wrong."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import families
import pytest
from indexed import TEXTS, documents, reranker

from routehead_plugins import (
    Document,
    DocumentIndex,
    FrozenLM,
    HeadRoutedAttentionReranker,
    HeadSet,
)
from routehead_plugins.errors import (
    IndexMismatchError,
    InputError,
    PromptTooLongError,
    TruncationWarning,
)
from routehead_plugins.index import IndexBuilder, IndexConfig, IndexReport, shards
from routehead_plugins.layouts import LateLayout
from routehead_plugins.scoring import LongTexts
from routehead_plugins.selection import FixedHeads

QUERY = "which wolf ran?"


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_documents_that_are_there_are_left_as_they_are(folder: Path) -> None:
    before = files_of(folder)
    report = reranker().index(documents(), folder, dtype="float16")
    assert report == IndexReport(unchanged=4)
    assert files_of(folder) == before


def test_new_documents_are_added_and_changed_ones_replaced(folder: Path) -> None:
    changed = [Document("moss", "d0"), Document("fern", "d9"), documents()[1], Document(" ", "d8")]
    report = reranker().index(changed, folder, dtype="float16")
    assert report == IndexReport(added=1, replaced=1, unchanged=1, blank=1)
    assert report.documents == 4
    index = DocumentIndex(folder)
    assert len(index) == 5
    hits = reranker(index).search(QUERY, 10)
    assert sorted(str(hit.id) for hit in hits) == ["d0", "d1", "d2", "d3", "d9"]
    now = {"d0": "moss", "d1": TEXTS[1], "d2": TEXTS[2], "d3": TEXTS[3], "d9": "fern"}
    scores = dict(zip(now, reranker(index).score(QUERY, list(now.values())), strict=True))
    assert {hit.id: pytest.approx(hit.score, abs=1e-6) for hit in hits} == scores


def test_a_text_that_comes_back_is_current_again(folder: Path) -> None:
    ours = reranker()
    for text in ("moss", TEXTS[0]):
        assert ours.index([Document(text, "d0")], folder, dtype="float16").replaced == 1
    index = DocumentIndex(folder)
    assert len(index) == 4
    assert {hit.id for hit in reranker(index).search(QUERY)} == {"d0", "d1", "d2", "d3"}


def test_documents_without_ids_are_told_apart_by_their_texts(tmp_path: Path) -> None:
    report = reranker().index([Document(text) for text in [*TEXTS, TEXTS[0]]], tmp_path)
    assert report == IndexReport(added=4, unchanged=1)
    (hit, *_) = reranker(DocumentIndex(tmp_path)).search(QUERY)
    assert hit.id is None
    assert DocumentIndex(tmp_path).look_up([TEXTS[hit.number]])[0] is not None


def test_two_documents_may_have_one_text(tmp_path: Path) -> None:
    ours = reranker()
    assert ours.index([Document("rain", "a"), Document("rain", "b")], tmp_path).added == 2
    assert {hit.id for hit in reranker(DocumentIndex(tmp_path)).search("rain")} == {"a", "b"}


def test_an_id_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the id 'd0' occurs twice; give each document an id of"):
        reranker().index([*documents(), Document("moss", "d0")], tmp_path)


def test_a_document_that_does_not_fit_is_refused_and_the_others_stay(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = reranker()
    ours.long_texts = LongTexts(on_too_long="error")
    ours.llm.max_tokens = 64
    monkeypatch.setattr(type(ours.layout), "frame", lambda *_: DocumentIndex(folder).config.frame)
    with pytest.raises(PromptTooLongError, match=r"the longest document makes a prompt of "):
        ours.index([Document("moss " * 40, "d9")], folder, dtype="float16")
    assert DocumentIndex(folder).verify() == 4


def test_a_document_that_does_not_fit_is_cut_and_counted(tmp_path: Path) -> None:
    model = families.tiny_model("llama")
    model.config.max_position_embeddings = 300
    ours = HeadRoutedAttentionReranker(
        FrozenLM(model, families.tiny_tokenizer(), name="small"),
        FixedHeads(HeadSet([(1, 0)])),
        layout="late",
    )
    long = "moss " * 100
    report = ours.index([Document(long, "d1"), Document("rain", "d2")], tmp_path, dtype="float16")
    assert (report.added, report.cut) == (2, 1)
    kept = HeadRoutedAttentionReranker(
        ours.llm, ours.selector, layout=LateLayout(documents=DocumentIndex(tmp_path))
    )
    with pytest.warns(TruncationWarning, match="1 of 2 documents did not fit"):
        expected = ours.score("moss?", [long, "rain"])
    # What is kept is read without a warning: it was counted when it was indexed.
    assert kept.score("moss?", [long, "rain"]) == pytest.approx(expected, abs=1e-3)


def test_shards_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("routehead_plugins.index.builder._BATCH", 1)
    ours = reranker()
    config = ours.index_builder(tmp_path, dtype="float16")._config
    layout = cast(LateLayout, ours.layout)
    with IndexBuilder(tmp_path, ours.llm, layout, config, shard_bytes=1000) as builder:
        list(builder.add(documents()))
    assert len(list(tmp_path.glob("shard-*"))) > 2
    index = DocumentIndex(tmp_path)
    assert index.verify() == 4
    kept = reranker(index)
    assert [hit.id for hit in kept.search(QUERY)] == [
        hit.document.id for hit in kept.rerank(QUERY, documents())
    ]
    assert reranker().index(documents(), tmp_path, dtype="float16").unchanged == 4


# stopping


def test_a_job_that_was_killed_goes_on(tmp_path: Path, model: str) -> None:
    folder = tmp_path / "index"
    program = textwrap.dedent(
        f"""
        from routehead_plugins import Document, HeadRoutedAttentionReranker
        from routehead_plugins.index import builder
        builder._BATCH = 1
        ours = HeadRoutedAttentionReranker.from_pretrained(
            {model!r}, heads="1-0,2-3", layout="late", dtype="float32", device="cpu")
        ours.index((Document(f"wolf {{n}} " * 9, f"d{{n}}") for n in range(150)), {str(folder)!r})
        """
    )
    process = subprocess.Popen([sys.executable, "-c", program])
    log = folder / "commits.jsonl"
    while process.poll() is None and (not log.exists() or log.stat().st_size < 400):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(DocumentIndex(folder))
    assert 0 < done < 150
    subprocess.run([sys.executable, "-c", program], check=True)
    index = DocumentIndex(folder)
    assert index.verify() == len(index) == 150


def test_what_was_not_committed_is_cut_off(folder: Path) -> None:
    before = files_of(folder)
    for name in ("keys", "ids", "documents"):
        with (folder / "shard-00000" / f"{name}.bin").open("ab") as stream:
            stream.write(b"half of a document")
    with (folder / "commits.jsonl").open("ab") as stream:
        stream.write(b"[0, 7")
    assert DocumentIndex(folder).verify() == 4
    assert reranker().index(documents(), folder, dtype="float16").unchanged == 4
    assert files_of(folder) == before


def test_a_full_disk_leaves_the_index_as_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_of(folder)

    def full(stream: Any, content: bytes) -> None:
        stream.write(content[:3])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shards, "_write_all", full)
    message = r"index cannot be written \(No space left on device\); what was there before is whole"
    with pytest.raises(InputError, match=message):
        reranker().index([Document("moss", "d9")], folder, dtype="float16")
    assert files_of(folder) == before


def test_two_builders_do_not_share_an_index(folder: Path) -> None:
    with reranker().index_builder(folder, dtype="float16") as first:
        with pytest.raises(InputError, match="is used by another builder; wait until it has ended"):
            reranker().index(documents(), folder, dtype="float16")
        assert list(first.add([Document("moss", "d9")])) == [1]
    assert len(DocumentIndex(folder)) == 5


def test_nothing_is_added_outside_of_the_with_block(folder: Path) -> None:
    builder = reranker().index_builder(folder, dtype="float16")
    with pytest.raises(InputError, match="is not open; add documents inside its with block"):
        list(builder.add(documents()))
    with builder:
        pass
    with pytest.raises(InputError, match="is not open"):
        list(builder.add(documents()))


def test_a_generator_that_fails_leaves_what_was_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("routehead_plugins.index.builder._BATCH", 2)

    def broken() -> Iterator[Document]:
        yield from documents()[:3]
        raise RuntimeError("the source is gone")

    with pytest.raises(RuntimeError, match="the source is gone"):
        reranker().index(broken(), tmp_path)
    assert len(DocumentIndex(tmp_path)) == 2


# what does not fit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": "2-3"}, "was made with key heads="),
        ({"seed": 1}, "was made with weights="),
        ({"max_doc_tokens": 7}, "was made with max_doc_tokens=None, but now it is 7; use the same"),
    ],
)
def test_documents_of_another_kind_are_not_added(
    folder: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(IndexMismatchError, match=message):
        reranker(**change).index(documents(), folder, dtype="float16")


def test_one_index_has_one_number_format(folder: Path) -> None:
    with pytest.raises(IndexMismatchError, match="was made with dtype='float16', but now it is "):
        reranker().index(documents(), folder, dtype="int8")


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"holds other files, such as 'thesis.tex'; name a new"):
        reranker().index(documents(), tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_documents_whose_configuration_is_lost_are_not_read_as_others(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"holds other files, such as .commits\.jsonl.; "):
        reranker(seed=1).index(documents(), folder, dtype="float16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int4"}, "dtype='int4' is no format of an index; give int8 or float16"),
        ({"budget": 0}, "budget=0 keeps no token; give more than 0, up to 1 for all"),
        ({"budget": 2}, "budget=2"),
        ({"budget": "x"}, "budget='x'"),
    ],
)
def test_options_out_of_range_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        reranker().index(documents(), tmp_path / "index", **options)
    assert not (tmp_path / "index").exists()


def test_another_layout_keeps_no_documents(tmp_path: Path) -> None:
    ours = reranker()
    parallel = type(ours)(ours.llm, layout="parallel")
    with pytest.raises(InputError, match="layout='parallel' keeps no documents on disk; give lay"):
        parallel.index(documents(), tmp_path)


def test_a_configuration_comes_back_from_its_file(folder: Path) -> None:
    config = IndexConfig.load(folder)
    config.save(folder)
    assert IndexConfig.load(folder) == config
