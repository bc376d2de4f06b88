"""The stage on real Lucene: indexing, BM25, texts that come back."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest

from routehead_plugins.adapters import _jvm
from routehead_plugins.adapters.pyserini import (
    HeadRoutedStage,
    bm25_run,
    build_index,
    load_topics,
)
from routehead_plugins.data import Document, Ranking, ScoredDocument
from routehead_plugins.errors import CollectionError, InputError
from routehead_plugins.io import read_corpus

CORPUS = [
    {"_id": "cats", "title": "Cats", "text": "A cat purrs when it is content."},
    {"_id": "dogs", "title": "Dogs", "text": "A dog barks at a cat and at the moon."},
    {"_id": "owls", "title": "", "text": "Owls hunt mice at night."},
    {"_id": "mice", "title": "", "text": "Mice hide from every cat and every owl.", "url": "m"},
    {"_id": "tide", "title": "Tides", "text": "The moon pulls the sea."},
    {"_id": "café", "title": "", "text": "Un café, s'il vous plaît \u2615"},
    {"_id": "rain", "title": "", "text": "Rain falls on the plain."},
    {"_id": 7, "title": "", "text": "Seven is a number and an id."},
    {"_id": "none", "title": "", "text": "  "},
    {"_id": "html", "title": "<b>", "text": '<p>Markup & "quotes"\tand\nlines</p>'},
]
PURRING = "A cat purrs when it is content."


class ShortestFirst:
    """A re-ranker whose order is plain to see."""

    def rerank(
        self, query: str, documents: Sequence[Document], top_n: int | None = None
    ) -> Ranking:
        scored = [ScoredDocument(i, -float(len(d.text)), d) for i, d in enumerate(documents)]
        ranked = sorted(scored, key=lambda hit: -hit.score)[:top_n]
        heads: Any = None
        return Ranking(query, tuple(ranked), heads)


def write_corpus(path: Path, records: Sequence[Any] = CORPUS) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lucene")
    built: Path = build_index(write_corpus(folder / "corpus.jsonl"), folder / "index")
    return built


@pytest.fixture(scope="module")
def stage(index: Path) -> Any:
    return HeadRoutedStage.from_index(index, ShortestFirst(), hits=5)


def test_bm25_finds_documents_with_their_texts_and_scores(stage: Any) -> None:
    documents = stage.retrieve("why do cats purr")
    assert [document.id for document in documents] == ["cats", "dogs", "mice"]
    assert documents[0].text == f"Cats\n{PURRING}"
    assert dict(documents[0].metadata) == {"title": "Cats"}
    assert documents[2].text == "Mice hide from every cat and every owl."
    assert dict(documents[2].metadata) == {"url": "m"}
    assert documents[0].score > documents[1].score > documents[2].score > 0


def test_titles_are_searched(stage: Any) -> None:
    assert [document.id for document in stage.retrieve("tides")] == ["tide"]


def test_what_bm25_finds_is_reranked(stage: Any) -> None:
    hits = stage.search("why do cats purr", k=2)
    assert [(hit.docid, hit.rank, hit.retrieval_rank) for hit in hits] == [
        ("cats", 1, 1),
        ("mice", 2, 3),
    ]
    assert [hit.score for hit in hits] == [-36.0, -39.0]


def test_a_run_of_bm25_is_what_search_finds(stage: Any) -> None:
    topics = {1: "cat", "moon": "the moon", "stop": "the of", "blank": " "}
    run = bm25_run(stage.searcher, topics, hits=2, threads=2)
    assert list(run) == ["1", "moon", "stop", "blank"]
    assert {qid: list(scores) for qid, scores in run.items()} == {
        "1": ["cats", "dogs"],
        "moon": ["tide", "dogs"],
        "stop": [],
        "blank": [],
    }
    for qid, query in topics.items():
        hits = stage.searcher.search(query, 2)
        assert run[str(qid)] == {hit.docid: hit.score for hit in hits}


def test_a_run_is_reranked_with_texts_from_the_index(stage: Any) -> None:
    run = {7: {"owls": 3.0, "none": 2.0, "rain": 1.0}}
    [(qid, hits)] = stage.rerank_run(run, {"7": "q"}, depth=2)
    assert qid == "7"
    assert [(hit.docid, hit.score) for hit in hits] == [
        ("none", -2.0),
        ("owls", -24.0),
        ("rain", -25.0),
    ]


@pytest.mark.parametrize("record", CORPUS, ids=lambda record: str(record["_id"]))
def test_every_document_comes_back_as_it_was(stage: Any, record: dict[str, Any]) -> None:
    run = {"q": {record["_id"]: 1.0}}
    [(_, [hit])] = stage.rerank_run(run, {"q": "query"})
    title = f"{record['title']}\n" if record["title"] else ""
    assert (hit.docid, hit.document.text) == (str(record["_id"]), title + record["text"])


def test_texts_read_the_same_from_the_index_and_from_the_corpus(tmp_path: Path) -> None:
    records = [
        {"_id": "1", "title": "Bridges", "text": "Bridges\nof Bern"},
        {"_id": "2", "title": " T ", "text": " T \nbody"},
        {"_id": "3", "title": "", "text": "alone"},
        {"_id": "4", "title": " ", "text": "with a blank title"},
        {"_id": "5", "title": "Bridges", "text": ""},
        {"_id": "6", "title": "Bridges", "contents": "Bridges\nin contents"},
        {"_id": "7", "title": None, "text": "no title"},
        {"_id": "8", "title": 5, "text": "5\nnumbers"},
        {"_id": "9", "title": "", "text": "", "body": "another field"},
        {"_id": "10", "contents": "contents", "segment": "another field"},
        {"_id": "11", "title": "Two\nlines", "text": "Two\nlines"},
        {"_id": "12", "title": "T", "text": "", "contents": "another field"},
    ]
    path = write_corpus(tmp_path / "corpus.jsonl", records)
    corpus = read_corpus(path)
    stage = HeadRoutedStage.from_index(build_index(path, tmp_path / "index"))
    documents = stage.documents([(docid, 1.0) for docid in corpus])
    assert {d.id: d.text for d in documents} == {d.id: d.text for d in corpus.values()}


def test_half_an_emoji_ends_nothing(tmp_path: Path) -> None:
    documents = [Document("a cat \udc3a purrs", "cat"), Document("a dog\x00 barks", "a\x00b c")]
    stage = HeadRoutedStage.from_index(build_index(documents, tmp_path / "index"), ShortestFirst())
    topics = {"1": "cat", "2\ud83d": "\udc3a dog \ud83d", 3: "\ud83d", "4\x00": "barks\x00"}
    run = bm25_run(stage.searcher, topics)
    assert {qid: list(scores) for qid, scores in run.items()} == {
        "1": ["cat"],
        "2\ud83d": ["a\x00b c"],
        "3": [],
        "4\x00": ["a\x00b c"],
    }
    assert [hit.docid for hit in stage.search("cat \ud83d")] == ["cat"]
    assert [document.text for document in stage.retrieve("purrs")] == ["a cat ? purrs"]
    with pytest.raises(CollectionError, match=r"^document 'x\\ud83d' is neither in the index nor"):
        stage.documents([("x\ud83d", 1.0)])
    with pytest.raises(CollectionError, match=r"^the id 'x\\ud83d' has half of a surrogate pair"):
        build_index([Document("a", "x\ud83d")], tmp_path / "other")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"corpus": None}, "corpus is a NoneType; give a list of Documents."),
        ({"corpus": {"d": Document("a", "d")}}, "corpus is a dict; give its values as a list."),
        ({"corpus": ["a"]}, "corpus[0] is a str; give a routehead_plugins.Document, or the path"),
        ({"index_dir": 5}, "index_dir=5 is a int; give a path."),
        ({"threads": "2"}, "threads='2' is not a count"),
        ({"overwrite": "no"}, "overwrite='no' must be True or False."),
    ],
    ids=range(6),
)
def test_a_wrong_argument_of_indexing_is_named(
    tmp_path: Path, wrong: dict[str, Any], words: str
) -> None:
    right = {"corpus": [Document("a", "d")], "index_dir": tmp_path / "index"}
    with pytest.raises(InputError) as error:
        build_index(**right | wrong)
    assert words in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"k1": "0.9"}, "k1='0.9' must be a finite number, 0 or more."),
        ({"b": 2}, "b=2 must be a number from 0 to 1."),
        ({"hits": 2.5}, "hits=2.5 is not a count"),
        ({"index_dir": None}, "index_dir=None is a NoneType; give a path."),
    ],
    ids=range(4),
)
def test_a_wrong_argument_of_opening_is_named(
    index: Path, wrong: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError) as error:
        HeadRoutedStage.from_index(**{"index_dir": index} | wrong)
    assert words in str(error.value)


def test_documents_can_be_indexed_from_memory(tmp_path: Path) -> None:
    documents = (Document(f"cat number {i}", str(i), {"lost": True}) for i in range(3))
    stage = HeadRoutedStage.from_index(build_index(documents, tmp_path / "index", threads=2))
    assert sorted(
        (document.id, document.text, dict(document.metadata)) for document in stage.retrieve("cat")
    ) == [("0", "cat number 0", {}), ("1", "cat number 1", {}), ("2", "cat number 2", {})]


def test_a_folder_of_a_collection_can_be_indexed(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus.jsonl", [{"id": 1, "contents": "a cat"}])
    stage = HeadRoutedStage.from_index(build_index(tmp_path, tmp_path / "deep" / "index"))
    assert [(d.id, d.text) for d in stage.retrieve("cat")] == [("1", "a cat")]


def test_parameters_of_bm25_change_the_scores(index: Path, stage: Any) -> None:
    flat = HeadRoutedStage.from_index(index, ShortestFirst(), k1=0.0, b=0.0)
    scores = [document.score for document in flat.retrieve("cat")]
    # With k1 = 0 only idf is left, and Anserini parts ties by a millionth.
    assert max(scores) - min(scores) < 1e-5
    assert scores != [document.score for document in stage.retrieve("cat")]


def test_two_threads_may_search_at_once(stage: Any) -> None:
    rankings: list[list[str]] = []

    def search() -> None:
        rankings.extend([hit.docid for hit in stage.search("cat")] for _ in range(20))

    threads = [threading.Thread(target=search) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rankings == [["cats", "mice", "dogs"]] * 40


def test_a_query_of_thousands_of_words_is_answered(stage: Any) -> None:
    query = " ".join(f"word{i}" for i in range(3000)) + " tides"
    assert [document.id for document in stage.retrieve(query)] == ["tide"]


def test_indexing_and_searching_print_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = build_index(write_corpus(tmp_path / "corpus.jsonl"), tmp_path / "index")
    HeadRoutedStage.from_index(folder, ShortestFirst()).search("cat")
    assert capfd.readouterr() == ("", "")


def test_an_existing_index_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    build_index([Document("old cat", "old")], folder)
    with pytest.raises(CollectionError) as error:
        build_index([Document("new cat", "new")], folder)
    assert str(error.value) == (
        f"index_dir={str(folder)!r} already holds a Lucene index; expected a new folder; "
        "open it with HeadRoutedStage.from_index, or pass overwrite=True to replace it."
    )
    assert [d.id for d in HeadRoutedStage.from_index(folder).retrieve("cat")] == ["old"]
    build_index([Document("new cat", "new")], folder, overwrite=True)
    assert [d.id for d in HeadRoutedStage.from_index(folder).retrieve("cat")] == ["new"]
    assert os.listdir(tmp_path) == ["index"]


def test_a_folder_that_is_no_index_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CollectionError) as error:
        build_index([Document("cat", "1")], tmp_path, overwrite=True)
    assert str(error.value) == (
        f"index_dir={str(tmp_path)!r} exists and is not a Lucene index; "
        "expected a new or empty folder; choose another."
    )
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_an_interrupted_build_leaves_the_old_index_and_nothing_else(tmp_path: Path) -> None:
    def interrupted() -> Iterator[Document]:
        yield Document("new cat", "new")
        raise KeyboardInterrupt

    build_index([Document("old cat", "old")], tmp_path / "index")
    with pytest.raises(KeyboardInterrupt):
        build_index(interrupted(), tmp_path / "index", overwrite=True)
    with pytest.raises(KeyboardInterrupt):
        build_index(interrupted(), tmp_path / "other")
    assert os.listdir(tmp_path) == ["index"]
    assert [d.id for d in HeadRoutedStage.from_index(tmp_path / "index").retrieve("cat")] == ["old"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"_id": "1", "text": "a"}', "{"], r"corpus\.jsonl:2: '\{' is not JSON"),
        (['{"text": "a"}'], r"corpus\.jsonl:1: '_id' or 'id' is None; expected text or an integer"),
        (['{"_id": "1", "title": "a"}'], r"corpus\.jsonl:1: 'text' or 'contents' is None"),
        (['{"_id": "1", "text": "a"}'] * 2, r"^document '1' occurs twice in the corpus; expected"),
        ([], r"^the corpus has no document; expected one or more; check the file\.$"),
    ],
)
def test_a_malformed_corpus_is_told_and_leaves_nothing(
    tmp_path: Path, lines: list[str], message: str
) -> None:
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    with pytest.raises(CollectionError, match=message):
        build_index(tmp_path / "corpus.jsonl", tmp_path / "index")
    assert os.listdir(tmp_path) == ["corpus.jsonl"]


def test_a_document_that_lucene_refuses_is_told(tmp_path: Path) -> None:
    with pytest.raises(CollectionError, match=r"^Lucene took 1 of the 2 documents from 'fine' to "):
        build_index([Document("cat", "fine"), Document("cat", "x" * 40_000)], tmp_path / "index")


def test_a_document_without_an_id_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        build_index([Document("a", "1"), Document("b")], tmp_path / "index")
    assert str(error.value) == (
        "documents[1] has no id; Lucene finds documents by id; give each Document an id=."
    )


def test_an_index_made_without_raw_texts_says_so(tmp_path: Path) -> None:
    indexer = _jvm.load("pyserini.index.lucene").LuceneIndexer(str(tmp_path / "index"))
    indexer.add_doc_dict({"id": "d", "contents": "a cat"})
    indexer.close()
    stage = HeadRoutedStage.from_index(tmp_path / "index", ShortestFirst())
    with pytest.raises(CollectionError, match=r"^the index stores no text for document 'd'; "):
        stage.search("cat")
    with_corpus = HeadRoutedStage.from_index(
        tmp_path / "index", ShortestFirst(), corpus={"d": Document("a cat")}
    )
    assert [hit.docid for hit in with_corpus.search("cat")] == ["d"]


def test_a_candidate_of_another_index_is_named(stage: Any) -> None:
    with pytest.raises(CollectionError, match=r"^document 'stranger' is neither in the index nor "):
        list(stage.rerank_run({"1": {"stranger": 1.0}}, {"1": "q"}))


def test_a_folder_without_an_index_is_told(tmp_path: Path) -> None:
    with pytest.raises(CollectionError) as error:
        HeadRoutedStage.from_index(tmp_path)
    assert str(error.value) == (
        f"index_dir={str(tmp_path)!r} holds no Lucene index; expected a folder made by "
        "build_index or Pyserini; check the path, or build it."
    )


def test_an_unknown_prebuilt_index_is_named_and_nothing_printed(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pyserini 2 downloads its lists of names.
    util = _jvm.load("pyserini.util")
    for name in [name for name in vars(util) if name.endswith("_INDEX_INFO")]:
        monkeypatch.setattr(util, name, {})
    with pytest.raises(CollectionError) as error:
        HeadRoutedStage.from_prebuilt("nonesuch")
    assert str(error.value) == (
        "no prebuilt index 'nonesuch' (Unrecognized index name nonesuch); expected a name from "
        "LuceneSearcher.list_prebuilt_indexes(); check the name and the network."
    )
    assert capfd.readouterr() == ("", "")


def test_a_prebuilt_index_is_searched_once_downloaded(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lucene = _jvm.load("pyserini.search.lucene")
    monkeypatch.setattr(
        lucene.LuceneSearcher,
        "from_prebuilt_index",
        lambda name: lucene.LuceneSearcher(str(index)) if name == "known" else None,
    )
    stage = HeadRoutedStage.from_prebuilt("known", ShortestFirst(), hits=1)
    assert [hit.docid for hit in stage.search("tides")] == ["tide"]


def test_trec_topics_are_read_from_a_local_file_with_the_ids_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "topics.trec"
    path.write_text("<top>\n<num> Number: 80_2\n<title> why cats purr\n<desc> why\n</top>\n")
    assert load_topics(path) == {"80_2": "why cats purr"}


def test_a_prebuilt_index_that_cannot_be_looked_up_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(_name: str) -> None:
        raise URLError(OSError("no\nroute"))

    searcher = _jvm.load("pyserini.search.lucene").LuceneSearcher
    monkeypatch.setattr(searcher, "from_prebuilt_index", offline)
    with pytest.raises(CollectionError) as error:
        HeadRoutedStage.from_prebuilt("robust04")
    assert str(error.value) == (
        "no prebuilt index 'robust04' (<urlopen error no route>); expected a name from "
        "LuceneSearcher.list_prebuilt_indexes(); check the name and the network."
    )


def test_unknown_topics_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # Pyserini 2 downloads its list of names.
    monkeypatch.setattr(_jvm.load("pyserini.search._base"), "_topics_mapping", {}, raising=False)
    with pytest.raises(CollectionError) as error:
        load_topics("nonesuch")
    assert str(error.value) == (
        "topics 'nonesuch' are neither a file nor known to Pyserini; expected a .tsv, .jsonl or "
        ".trec file, or a name such as 'dl19-passage'; check the spelling."
    )


def test_topics_by_name_have_ids_of_one_type(monkeypatch: pytest.MonkeyPatch) -> None:
    topics = {19: {"title": "one"}, "x": {"title": "two", "description": "more"}}
    monkeypatch.setattr(_jvm.load("pyserini.search"), "get_topics", lambda _name: topics)
    assert load_topics("dl19-passage") == {"19": "one", "x": "two"}


@pytest.mark.parametrize("java", [True, False], ids=["Pyserini 1", "Pyserini 2"])
def test_topics_that_cannot_be_downloaded_are_told(
    monkeypatch: pytest.MonkeyPatch, java: bool
) -> None:
    def offline(_name: str) -> None:
        if java:
            raise _jvm.load("jnius").JavaException("java.io.IOException: no route\nat ...")
        raise URLError("no route")

    monkeypatch.setattr(_jvm.load("pyserini.search"), "get_topics", offline)
    with pytest.raises(CollectionError) as error:
        load_topics("dl19-passage")
    assert str(error.value) == (
        "topics 'dl19-passage' could not be downloaded; Pyserini fetches them from GitHub; "
        "check the network, or give a .tsv, .jsonl or .trec file."
    )
