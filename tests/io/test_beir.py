"""Test collections: folders, documents, queries and candidates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from text_files import Reader, check_malformed, file

from routehead_plugins.data import Document
from routehead_plugins.errors import CollectionError, InputError
from routehead_plugins.io.beir import (
    Collection,
    load_collection,
    read_corpus,
    read_instructions,
    read_topics,
)

NAME = "expected text or an integer that names the record; add it."
CELLS = "BEIR's 'query-id<TAB>corpus-id<TAB>score' or TREC's 'qid 0 docid relevance'"


def beir(folder: Path) -> Path:
    file(
        folder, "corpus.jsonl", '{"_id":"d1","title":"","text":"one"}\n{"_id":"d2","text":"two"}\n'
    )
    file(folder, "queries.jsonl", '{"_id":"q1","text":"first"}\n{"_id":"q2","text":"second"}\n')
    file(folder, "qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\tunknown\t1\n")
    file(folder, "run.bm25.trec", "q1 Q0 d1 1 0.5 bm25\nq1 Q0 d2 2 1.5 bm25\nq1 Q0 d9 3 0.1 bm25\n")
    return folder


def test_a_beir_folder_is_loaded_whole(tmp_path: Path) -> None:
    folder = beir(tmp_path / "tiny")
    assert load_collection(str(folder)) == Collection(
        name="tiny",
        path=folder,
        corpus={"d1": Document("one", "d1"), "d2": Document("two", "d2")},
        topics={"q1": "first", "q2": "second"},
        qrels={"q1": {"d1": 2, "unknown": 1}},
        run={"q1": {"d2": 1.5, "d1": 0.5, "d9": 0.1}},
    )


def test_a_folder_without_a_run_has_none(tmp_path: Path) -> None:
    (beir(tmp_path) / "run.bm25.trec").unlink()
    assert load_collection(tmp_path).run is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "qrels/test.tsv",
            "1\td1\t2\n2\td1\t1\n3\td1\t1\n",
            "no query of qrels/test.tsv is in queries.jsonl: the former has the ids '1', '2', "
            "the latter 'q1', 'q2'; expected the same ids; rename those of one file.",
        ),
        (
            "qrels/test.tsv",
            "q1\tD1\t2\n",
            "no document of qrels/test.tsv is in corpus.jsonl: the former has the ids 'D1', "
            "the latter 'd1', 'd2'; expected the same ids; rename those of one file.",
        ),
        (
            "run.bm25.trec",
            "Q1 Q0 d1 1 0.5 bm25\n",
            "no query of run.bm25.trec is in queries.jsonl: the former has the ids 'Q1', "
            "the latter 'q1', 'q2'; expected the same ids; rename those of one file.",
        ),
        (
            "queries.jsonl",
            "",
            "no query of qrels/test.tsv is in queries.jsonl: the former has the ids 'q1', "
            "the latter none; expected the same ids; rename those of one file.",
        ),
    ],
)
def test_files_that_use_other_ids_are_named_with_ids_of_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str, message: str
) -> None:
    file(beir(tmp_path), name, content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CollectionError) as caught:
        load_collection(".")
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("qrels/test.tsv", ""),
        ("run.bm25.trec", ""),
        ("qrels/test.tsv", "q1\td1\t1\nq9\td9\t1\n"),
        ("queries.jsonl", '{"_id":"q1","text":"first"}\n'),
    ],
)
def test_files_need_not_name_the_same_queries_and_documents(
    tmp_path: Path, name: str, content: str
) -> None:
    load_collection(file(beir(tmp_path), name, content).parents[name.count("/")])


def test_candidates_come_best_first_with_their_scores(tmp_path: Path) -> None:
    collection = load_collection(beir(tmp_path))
    assert collection.candidates("q1", 2) == [
        Document("two", "d2", score=1.5),
        Document("one", "d1", score=0.5),
    ]
    assert collection.corpus["d2"].score is None


def test_a_query_that_the_run_lacks_has_no_candidates(tmp_path: Path) -> None:
    assert load_collection(beir(tmp_path)).candidates("q2", 10) == []


def test_a_candidate_that_the_corpus_lacks_is_named(tmp_path: Path) -> None:
    collection = load_collection(beir(tmp_path))
    with pytest.raises(CollectionError) as caught:
        collection.candidates("q1", 3)
    assert str(caught.value) == (
        f"query 'q1': the run names document 'd9', which {tmp_path}/corpus.jsonl lacks; "
        "expected a run over this corpus; use the run and the corpus of one index."
    )


def test_candidates_of_an_unknown_query_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CollectionError) as caught:
        load_collection(beir(tmp_path)).candidates("q3", 3)
    assert str(caught.value) == (
        f"query 'q3' is not in {tmp_path}/queries.jsonl; expected one of its ids; "
        "check the query id."
    )


def test_candidates_without_a_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CollectionError) as caught:
        Collection("c", tmp_path, {}, {"q1": "first"}, {}).candidates("q1", 3)
    assert str(caught.value) == (
        f"{tmp_path} has no run.bm25.trec; expected a run with the candidates; run BM25 first."
    )


def test_a_depth_of_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_collection(beir(tmp_path)).candidates("q1", 0)
    assert str(caught.value) == "depth=0 is not a count; give a whole number, 1 or more."


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CollectionError) as caught:
        load_collection(tmp_path / "none")
    assert str(caught.value) == (
        f"{tmp_path}/none is not a folder; expected a BEIR folder with corpus.jsonl, "
        "queries.jsonl and qrels/test.tsv; check the path."
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("corpus.jsonl", "one JSON object per line with '_id', 'text' and maybe 'title'"),
        ("queries.jsonl", "one JSON object per line with '_id' and 'text'"),
        (
            "qrels/test.tsv",
            "BEIR's 'query-id<TAB>corpus-id<TAB>score' or TREC's 'qid 0 docid relevance'",
        ),
    ],
)
def test_a_missing_file_of_a_folder_is_named(tmp_path: Path, name: str, expected: str) -> None:
    (beir(tmp_path) / name).unlink()
    with pytest.raises(CollectionError) as caught:
        load_collection(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}/{name} does not exist; expected {expected}; check the path."
    )


def test_title_and_text_are_joined_and_other_keys_kept(tmp_path: Path) -> None:
    path = file(
        tmp_path,
        "c.jsonl",
        '{"_id": 7, "title": "T", "text": "t", "url": "u"}\n'
        '{"id": "x", "contents": "pyserini"}\n'
        '{"_id": "b", "text": "", "title": null}\n',
    )
    assert list(read_corpus(path).items()) == [
        ("7", Document("T\nt", "7", {"title": "T", "url": "u"})),
        ("x", Document("pyserini", "x")),
        ("b", Document("", "b", {"title": None})),
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("q.jsonl", '{"_id": "1", "text": "a b"}\n{"_id": 2, "text": "c"}'),  # BEIR
        ("q.jsonl", '{"qid": 1, "query": "a b"}\n{"qid": "2", "query": "c"}'),
        ("q.json", '{"id": 1, "query": "a b"}\n{"id": "2", "text": "c"}'),
        ("q.tsv", "1\ta b\n2\tc\n"),
        ("q.txt", "1\t a b \n2\tc"),
    ],
)
def test_topics_are_read_in_every_format(tmp_path: Path, name: str, content: str) -> None:
    assert list(read_topics(file(tmp_path, name, content)).items()) == [("1", "a b"), ("2", "c")]


@pytest.mark.parametrize(
    ("reader", "name", "content", "line", "problem"),
    [
        (
            read_corpus,
            "c.jsonl",
            '{"_id":"1","text":"a"}\n\n{"_id":"1","text":"b"}',
            3,
            "document '1' occurs twice; expected each id once; remove one.",
        ),
        (read_corpus, "c.jsonl", '{"text":"a"}', 1, f"'_id' or 'id' is None; {NAME}"),
        (read_corpus, "c.jsonl", '{"_id":true,"text":"a"}', 1, f"'_id' or 'id' is True; {NAME}"),
        (read_corpus, "c.jsonl", '{"_id":" ","text":"a"}', 1, f"'_id' or 'id' is ' '; {NAME}"),
        (
            read_corpus,
            "c.jsonl",
            '{"_id":"1","text":["a"]}',
            1,
            "'text' or 'contents' is ['a']; expected a text; add it.",
        ),
        (
            read_topics,
            "q.jsonl",
            '{"_id":"1","text":" "}',
            1,
            "'text' or 'query' is ' '; expected a non-blank text; add it.",
        ),
        (
            read_topics,
            "q.jsonl",
            '{"text":"a"}',
            1,
            f"'_id' or 'qid' or 'query_id' or 'id' is None; {NAME}",
        ),
        (
            read_topics,
            "q.jsonl",
            '{"_id":"1","text":"a"}\n{"_id":1,"text":"b"}',
            2,
            "query '1' occurs twice; expected each id once; remove one.",
        ),
        (
            read_topics,
            "q.tsv",
            "1 no tab",
            1,
            "'1 no tab' is not a query; expected an id, a tab and a non-blank text; "
            "repair the line.",
        ),
        (
            read_topics,
            "q.tsv",
            "1\ta\n2\t ",
            2,
            "'2\\t ' is not a query; expected an id, a tab and a non-blank text; repair the line.",
        ),
    ],
)
def test_a_malformed_line_is_named_with_its_problem(
    tmp_path: Path, reader: Reader, name: str, content: str | bytes, line: int, problem: str
) -> None:
    check_malformed(reader, file(tmp_path, name, content), line, problem)


def test_instructions_of_queries_are_read_from_json(tmp_path: Path) -> None:
    topics = tmp_path / "queries.jsonl"
    lines = [
        {"_id": "1", "text": "a wolf", "instruction": "Only facts count."},
        {"qid": 2, "query": "rain"},
        {"_id": "3", "text": "hill", "instruction": None},
    ]
    topics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_instructions(topics) == {"1": "Only facts count."}
    assert read_instructions(tmp_path / "topics.tsv") == {}
    topics.write_text(json.dumps({"_id": "1", "text": "a wolf", "instruction": " "}))
    with pytest.raises(CollectionError, match=r"queries\.jsonl:1: 'instruction' is ' '"):
        read_instructions(topics)
