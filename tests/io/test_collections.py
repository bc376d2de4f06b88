"""Collections, runs and requests: what is read, what is written, and what the errors say."""

from __future__ import annotations

import json
import math
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
from hypothesis import example, given, settings
from hypothesis import strategies as st

from routehead_plugins.data import Document
from routehead_plugins.errors import CollectionError, InputError
from routehead_plugins.io import beir as io
from routehead_plugins.io.beir import (
    Collection,
    load_collection,
    read_corpus,
    read_qrels,
    read_run,
    read_topics,
    write_run,
)
from routehead_plugins.io.rank_llm import Request, read_requests, write_requests
from routehead_plugins.io.text_files import atomic_write_text
from routehead_plugins.io.trec import decreasing_run, strictly_decreasing

# Imports on first use and slow disks are no failures.
UNHURRIED = settings(deadline=None)

LARGEST = float(np.finfo(np.float32).max)

SCORES = st.lists(st.floats(allow_nan=False), max_size=40)
# Few distinct values, so that ties and near ties are the rule.
CLOSE_SCORES = st.lists(
    st.sampled_from([0.0, -0.0, 1e-300, 2e-300, 5e-324, 1.0, 1.0 + 1e-12, -1.0, 1e300, -1e300]),
    max_size=40,
)
NAMES = st.text(st.characters(codec="utf-8"), min_size=1).filter(
    lambda name: name.split() == [name]
)
TEXTS = st.text(st.characters(codec="utf-8"))
RANKINGS = st.dictionaries(
    NAMES,
    st.lists(
        st.tuples(NAMES, st.floats(allow_nan=False)),
        min_size=1,
        max_size=12,
        unique_by=lambda hit: hit[0],
    ),
    max_size=4,
)


def file(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def beir(folder: Path) -> Path:
    file(
        folder, "corpus.jsonl", '{"_id":"d1","title":"","text":"one"}\n{"_id":"d2","text":"two"}\n'
    )
    file(folder, "queries.jsonl", '{"_id":"q1","text":"first"}\n{"_id":"q2","text":"second"}\n')
    file(folder, "qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\tunknown\t1\n")
    file(folder, "run.bm25.trec", "q1 Q0 d1 1 0.5 bm25\nq1 Q0 d2 2 1.5 bm25\nq1 Q0 d9 3 0.1 bm25\n")
    return folder


# BEIR folders


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


def test_candidates_come_best_first_with_their_scores(tmp_path: Path) -> None:
    collection = load_collection(beir(tmp_path))
    assert collection.candidates("q1", 2) == [
        Document("two", "d2", score=1.5),
        Document("one", "d1", score=0.5),
    ]
    assert collection.corpus["d2"].score is None


def test_a_query_that_found_nothing_has_no_candidates(tmp_path: Path) -> None:
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
    assert str(caught.value) == "depth=0 leaves nothing to re-rank; give 1 or more."


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


def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CollectionError) as caught:
        read_run(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} cannot be read (Is a directory); "
        "expected the six columns 'qid Q0 docid rank score tag'; check the path."
    )


# corpus


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


def test_byte_order_mark_crlf_and_blank_lines_are_tolerated(tmp_path: Path) -> None:
    path = file(tmp_path, "c.jsonl", b'\xef\xbb\xbf\r\n{"_id":"1","text":"a"}\r\n\r\n \n')
    assert read_corpus(path) == {"1": Document("a", "1")}
    topics = file(tmp_path, "t.tsv", b"\xef\xbb\xbf1\tone\r\n\r\n2\ttwo\r\n")
    assert read_topics(topics) == {"1": "one", "2": "two"}
    run = file(tmp_path, "r", b"\xef\xbb\xbfq Q0 d 1 2 t\r\n")
    assert read_run(run) == {"q": {"d": 2.0}}


def test_unicode_line_separators_do_not_end_a_line(tmp_path: Path) -> None:
    path = file(tmp_path, "c.jsonl", '{"_id":"1","text":"a\u2028b\x85c"}\n')
    assert read_corpus(path)["1"].text == "a\u2028b\x85c"


Reader = Callable[[Path], object]

OBJECT = "expected one JSON object; repair the line."
NAME = "expected text or an integer that names the record; add it."
FIELDS = "expected the six columns 'qid Q0 docid rank score tag'; repair the line."
CELLS = "BEIR's 'query-id<TAB>corpus-id<TAB>score' or TREC's 'qid 0 docid relevance'"
HEADER = "query-id\tcorpus-id\tscore\n"


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
        (
            read_corpus,
            "c.jsonl",
            "{oops}",
            1,
            "'{oops}' is not JSON (Expecting property name enclosed in double quotes: "
            f"line 1 column 2 (char 1)); {OBJECT}",
        ),
        (
            read_corpus,
            "c.jsonl",
            "[1]",
            1,
            "[1] is not a JSON object; expected one per line; repair the line.",
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
            read_corpus,
            "c.jsonl",
            b'{"_id":"1","text":"a"}\n{"_id":"2","text":"\xe9"}',
            2,
            "byte 0xe9 is not UTF-8; expected one JSON object per line with '_id', 'text' and "
            "maybe 'title'; save the file as UTF-8.",
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
        (read_run, "r", "q Q0 d 1 0.5", 1, f"'q Q0 d 1 0.5' has 5 columns; {FIELDS}"),
        (
            read_run,
            "r",
            "q Q0 d 1 2 t\np Q0 d 1 2 t\nq Q0 d 2 1 t",
            3,
            "for query 'q', document 'd' occurs twice; expected each id once; remove one.",
        ),
        (
            read_run,
            "r",
            "q Q0 d 1 nan t",
            1,
            "the score is 'nan'; expected a finite number; repair the line.",
        ),
        (
            read_run,
            "r",
            "q Q0 d 1 -inf t",
            1,
            "the score is '-inf'; expected a finite number; repair the line.",
        ),
        (
            read_run,
            "r",
            "q Q0 d 1 1_0 t",
            1,
            "the score is '1_0'; expected a finite number; repair the line.",
        ),
        (
            read_qrels,
            "t.tsv",
            HEADER + "q\td\t1.5",
            2,
            "the judgment is '1.5'; expected an integer; repair the line.",
        ),
        (
            read_qrels,
            "t.tsv",
            "q\td\thigh",
            1,
            "the judgment is 'high'; expected an integer; repair the line.",
        ),
        (
            read_qrels,
            "t.tsv",
            HEADER + "q\td",
            2,
            f"'q\\td' has 2 columns; expected 3, {CELLS}; repair the line.",
        ),
        (
            read_qrels,
            "t.txt",
            "q 0 d 1\nq d 1\n",
            2,
            f"'q d 1' has 3 columns; expected 4, {CELLS}; repair the line.",
        ),
        (
            read_qrels,
            "t.tsv",
            "only",
            1,
            f"'only' has 1 columns; expected 3 or 4, {CELLS}; repair the line.",
        ),
        (
            read_qrels,
            "t.txt",
            "q 0 d 1\nq 0 d 2",
            2,
            "document 'd' is judged 2 for query 'q', and 1 before; expected one judgment; "
            "remove the wrong one.",
        ),
        (
            read_requests,
            "r.jsonl",
            '{"query":"q","candidates":[]}',
            1,
            "{'candidates': [], 'query': 'q'} is not a request; expected an object 'query' and "
            "a list 'candidates'; repair the line.",
        ),
        (
            read_requests,
            "r.jsonl",
            '{"query":{"qid":1,"text":""},"candidates":[]}',
            1,
            "'text' is ''; expected a non-blank text; add it.",
        ),
        (
            read_requests,
            "r.jsonl",
            '{"query":{"qid":1,"text":"t"},"candidates":[]}\n'
            '{"query":{"qid":"1","text":"u"},"candidates":[]}',
            2,
            "query '1' occurs twice; expected each id once; remove one.",
        ),
        (
            read_requests,
            "r.jsonl",
            '{"query":{"qid":1,"text":"t"},"candidates":[{"docid":"a"}]}',
            1,
            "{'docid': 'a'} is not a candidate; expected an object with 'docid', 'score' and an "
            "object 'doc'; repair the line.",
        ),
        (
            read_requests,
            "r.jsonl",
            '{"query":{"qid":1,"text":"t"},"candidates":[{"docid":"a","doc":{"x":"y"}}]}',
            1,
            "'text' or 'segment' or 'contents' or 'content' or 'body' or 'passage' is None; "
            "expected a text; add it.",
        ),
        (
            read_requests,
            "r.jsonl",
            '{"query":{"qid":1,"text":"t"},"candidates":'
            '[{"docid":"a","score":NaN,"doc":{"text":"y"}}]}',
            1,
            "the score of document 'a' is nan; expected a finite number; repair the line.",
        ),
        (
            read_requests,
            "r.jsonl",
            '{"query":{"qid":1,"text":"t"},"candidates":'
            '[{"docid":"a","doc":{"text":"y"}},{"docid":"a","doc":{"text":"z"}}]}',
            1,
            "for query '1', document 'a' occurs twice; expected each id once; remove one.",
        ),
    ],
)
def test_a_malformed_line_is_named_with_its_problem(
    tmp_path: Path, reader: Reader, name: str, content: str | bytes, line: int, problem: str
) -> None:
    path = file(tmp_path, name, content)
    with pytest.raises(CollectionError) as caught:
        reader(path)
    assert str(caught.value) == f"{path}:{line}: {problem}"


# topics and judgments


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
    "content",
    [
        HEADER + "q1\td1\t2\nq2\td 2\t-1\n",  # BEIR; an id may hold a space between tabs
        "q1\td1\t2\nq2\td 2\t-1\n",  # BEIR without its header
        HEADER + "q1\td1\t2\nq1\td1\t2\nq2\td 2\t-1\n",  # the same judgment twice
    ],
)
def test_beir_judgments_are_read(tmp_path: Path, content: str) -> None:
    assert read_qrels(file(tmp_path, "t.tsv", content)) == {"q1": {"d1": 2}, "q2": {"d 2": -1}}


def test_trec_judgments_are_read(tmp_path: Path) -> None:
    path = file(tmp_path, "qrels.txt", "q1 0 d1 2\nq1\tQ0\td2\t0\nq2 0 d1 1\n")
    assert read_qrels(path) == {"q1": {"d1": 2, "d2": 0}, "q2": {"d1": 1}}


# runs


def test_a_run_is_read_best_first_with_ties_as_trec_eval_orders_them(tmp_path: Path) -> None:
    path = file(
        tmp_path, "r", "q Q0 a 1 1 t\np Q0 a 1 1 t\nq Q0 c 2 1.0 t\nq Q0 b 3 1 t\nq Q0 d 4 2 t\n"
    )
    run = read_run(path)
    assert list(run["q"]) == ["d", "c", "b", "a"]
    assert list(run) == ["q", "p"]
    judged = {"q": {"a": 1}}
    # 1 / rank of a: fourth
    assert reciprocal_ranks(judged, {"q": run["q"]}) == {"q": 1 / 4}


def reciprocal_ranks(
    qrels: dict[str, dict[str, int]], run: dict[str, dict[str, float]]
) -> dict[str, float]:
    """What trec_eval's own code makes of the scores."""
    results = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(run)
    return {query: values["recip_rank"] for query, values in results.items()}


def assert_evaluated_in_order(ranking: list[str], scores: dict[str, float]) -> None:
    for rank, doc_id in enumerate(ranking, start=1):
        assert reciprocal_ranks({"q": {doc_id: 1}}, {"q": scores}) == {"q": 1 / rank}


@UNHURRIED
@given(SCORES | CLOSE_SCORES)
@example([math.inf, math.inf, LARGEST, -LARGEST, -math.inf, -math.inf])
@example([-math.inf] * 5)
@example([3e-7, 2e-7, 1e-7])
def test_scores_fall_strictly_in_single_precision(scores: list[float]) -> None:
    single = np.array(strictly_decreasing(scores), dtype=np.float32)
    assert np.isfinite(single).all()
    assert (np.diff(single.astype(np.float64)) < 0).all()


@UNHURRIED
@given(st.lists(st.floats(-1e30, 1e30), unique_by=np.float32).map(lambda s: sorted(s)[::-1]))
def test_scores_that_fall_already_stay_as_they_are(scores: list[float]) -> None:
    assert strictly_decreasing(scores) == scores


def test_a_tie_is_lowered_by_the_smallest_step() -> None:
    below = np.nextafter(np.float32(1), np.float32(0))
    assert strictly_decreasing([1.0, 1.0, 1.0, 0.5]) == [
        1.0,
        float(below),
        float(np.nextafter(below, np.float32(0))),
        0.5,
    ]
    smallest = float(np.nextafter(np.float32(0), np.float32(1)))
    assert strictly_decreasing([0.0, -0.0, 1e-300]) == [0.0, -smallest, -2 * smallest]


def test_no_scores_stay_none() -> None:
    assert strictly_decreasing([]) == []


@UNHURRIED
@given(RANKINGS)
def test_a_written_run_is_read_back_in_its_order(
    rankings: dict[str, list[tuple[str, float]]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.trec"
        write_run(path, rankings, "tag")
        read = read_run(path)
    assert {query: list(scores) for query, scores in read.items()} == {
        query: [doc_id for doc_id, _ in ranking] for query, ranking in rankings.items()
    }


@UNHURRIED
@given(RANKINGS)
def test_writing_what_was_read_changes_nothing(
    rankings: dict[str, list[tuple[str, float]]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder) / "1", Path(folder) / "2"
        write_run(first, rankings, "tag")
        write_run(second, read_run(first), "tag")
        assert first.read_bytes() == second.read_bytes()


@UNHURRIED
@given(CLOSE_SCORES)
def test_trec_eval_scores_a_written_run_in_the_order_given(scores: list[float]) -> None:
    # Ascending ids: trec_eval would turn every tie around.
    ranking = [(f"d{position:02}", score) for position, score in enumerate(scores)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.trec"
        write_run(path, {"q": ranking}, "tag")
        with path.open() as stream:
            parsed = pytrec_eval.parse_run(stream)
    assert_evaluated_in_order([doc_id for doc_id, _ in ranking], parsed.get("q", {}))


def test_a_run_has_trecs_columns_and_full_precision(tmp_path: Path) -> None:
    path = tmp_path / "run.trec"
    write_run(path, {"q1": [("b", 0.1 + 0.2), ("a", 1e-9)], "q2": {"c": np.float64(2)}}, "rh")
    assert path.read_text() == (
        "q1 Q0 b 1 0.30000000000000004 rh\nq1 Q0 a 2 1e-09 rh\nq2 Q0 c 1 2.0 rh\n"
    )


@pytest.mark.parametrize(
    ("run", "tag", "message"),
    [
        (
            {"q": [("d", math.nan)]},
            "t",
            "document 'd' of query 'q' has the score nan; expected a number; "
            "find out what computed it.",
        ),
        (
            {"q": [("d", 2.0), ("d", 1.0)]},
            "t",
            "document 'd' is ranked twice for query 'q'; expected each document once; "
            "remove the lower one.",
        ),
        (
            {"q": [("d 1", 2.0)]},
            "t",
            "document id 'd 1' is empty or holds white space; a TREC run separates its columns "
            "by spaces; rename it.",
        ),
        (
            {"": [("d", 2.0)]},
            "t",
            "query id '' is empty or holds white space; a TREC run separates its columns "
            "by spaces; rename it.",
        ),
        (
            {},
            "my tag",
            "tag 'my tag' is empty or holds white space; a TREC run separates its columns "
            "by spaces; rename it.",
        ),
    ],
)
def test_a_run_that_cannot_be_written_is_refused(
    tmp_path: Path, run: io.Rankings, tag: str, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        write_run(tmp_path / "run", run, tag)
    assert str(caught.value) == message
    assert list(tmp_path.iterdir()) == []


def test_the_callers_run_is_left_alone() -> None:
    run = {"q": {"a": 1.0, "b": 1.0}}
    assert decreasing_run(run)["q"]["b"] < 1.0
    assert run == {"q": {"a": 1.0, "b": 1.0}}


# requests


def test_requests_are_read_as_rank_llm_reads_them(tmp_path: Path) -> None:
    docs: list[dict[str, str | None]] = [
        {"contents": "c", "segment": "s", "title": "T"},
        {"passage": "p", "title": " "},
        {"body": "b", "text": None},
    ]
    candidates = [
        {"docid": 3, "score": 2, "doc": docs[0]},
        {"docid": "p", "score": None, "doc": docs[1]},
        {"docid": "b", "score": -0.5, "doc": docs[2]},
    ]
    record = {"query": {"text": "why", "qid": 12}, "candidates": candidates}
    assert read_requests(file(tmp_path, "r.jsonl", json.dumps(record))) == [
        Request(
            "12",
            "why",
            (
                Document("T\ns", "3", docs[0], 2.0),
                Document("p", "p", docs[1], None),
                Document("b", "b", docs[2], -0.5),
            ),
        )
    ]


DOCS = st.dictionaries(
    st.sampled_from(["url", "title", "headings"]), TEXTS | st.integers() | st.lists(TEXTS)
).flatmap(lambda extra: TEXTS.map(lambda text: extra | {"segment": text}))


@UNHURRIED
@given(
    st.dictionaries(
        NAMES,
        st.dictionaries(
            NAMES, st.tuples(DOCS, st.floats(allow_nan=False, allow_infinity=False)), max_size=3
        ),
        max_size=3,
    )
)
def test_requests_round_trip_without_loss(
    content: dict[str, dict[str, tuple[dict[str, object], float]]],
) -> None:
    records = [
        {
            "query": {"text": "why", "qid": query_id},
            "candidates": [
                {"docid": doc_id, "score": score, "doc": doc}
                for doc_id, (doc, score) in candidates.items()
            ],
        }
        for query_id, candidates in content.items()
    ]
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder) / "1.jsonl", Path(folder) / "2.jsonl"
        first.write_text("".join(json.dumps(record) + "\n" for record in records))
        write_requests(second, read_requests(first))
        assert first.read_text() == second.read_text()


@pytest.mark.parametrize(
    "document",
    [
        Document("plain", "d", {"url": "u"}, 1.5),
        Document("T\nplain", "d", {"title": "T"}),  # as read_corpus makes it
        Document("other", "d", {"title": "T"}),  # a title that the text does not hold
        Document("new", "d", {"contents": "old"}),  # a text that the caller changed
        Document("", "d"),
    ],
)
def test_any_document_keeps_its_text_id_and_score_in_a_request(
    tmp_path: Path, document: Document
) -> None:
    path = tmp_path / "r.jsonl"
    write_requests(path, [Request("q", "why", (document,))])
    [request] = read_requests(path)
    [read] = request.candidates
    assert (read.text, read.id, read.score) == (document.text, document.id, document.score)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            Document("t"),
            "candidate 0 of query 'q' has id=None; a request file names every document; "
            "give it an id.",
        ),
        (
            Document("t", "d", {"path": {1, 2}}),
            "query 'q' cannot be written as JSON (Object of type set is not JSON serializable); "
            "expected metadata of text, finite numbers, lists and dicts, and finite scores; "
            "convert it.",
        ),
    ],
)
def test_a_request_that_json_cannot_hold_is_refused(
    tmp_path: Path, document: Document, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        write_requests(tmp_path / "r.jsonl", [Request("q", "why", (document,))])
    assert str(caught.value) == message


# writing


def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = file(tmp_path, "out", "old")
    atomic_write_text(path, "new\r\nh\u00e9")
    assert path.read_bytes() == b"new\r\nh\xc3\xa9"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file(tmp_path, "out", "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError) as caught:
        atomic_write_text(path, "new")
    assert str(caught.value) == (
        f"{path} cannot be written (No space left on device); expected a file in an existing, "
        "writable folder; create the folder or name another file."
    )
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_written_file_is_readable_by_whom_the_umask_allows(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        atomic_write_text(tmp_path / "out", "x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o644


def test_a_link_is_followed_and_stays_a_link(tmp_path: Path) -> None:
    target, link = file(tmp_path, "target", "old"), tmp_path / "link"
    link.symlink_to(target)
    atomic_write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_a_device_is_written_to_directly() -> None:
    atomic_write_text("/dev/null", "x")
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize(
    ("name", "reason"), [("no/out", "No such file or directory"), ("", "Is a directory")]
)
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        atomic_write_text(tmp_path / name, "x")
    assert str(caught.value) == (
        f"{tmp_path / name} cannot be written ({reason}); expected a file in an existing, "
        "writable folder; create the folder or name another file."
    )


def test_half_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        write_run(tmp_path / "run", {"q": [("\ud83d", 1.0)]}, "t")
    assert str(caught.value) == (
        f"{tmp_path}/run cannot be written: character 5 of its text, '\\ud83d', is half of a "
        "surrogate pair; expected Unicode; replace it."
    )
