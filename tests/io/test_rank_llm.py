"""Request files: read as rank_llm reads them, written without loss."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_files import file

from routehead_plugins.data import Document
from routehead_plugins.errors import CollectionError, InputError
from routehead_plugins.io.rank_llm import Request, read_requests, write_requests

# Imports on first use and slow disks are no failures.
UNHURRIED = settings(deadline=None)

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(
    lambda name: name.split() == [name]
)
TEXTS = st.text(st.characters(codec="utf-8"))
DOCS = st.dictionaries(
    st.sampled_from(["url", "title", "headings"]), TEXTS | st.integers() | st.lists(TEXTS)
).flatmap(lambda extra: TEXTS.map(lambda text: extra | {"segment": text}))


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


@pytest.mark.parametrize(
    ("name", "content", "line", "problem"),
    [
        (
            "r.jsonl",
            '{"query":"q","candidates":[]}',
            1,
            "{'candidates': [], 'query': 'q'} is not a request; expected an object 'query' and "
            "a list 'candidates'; repair the line.",
        ),
        (
            "r.jsonl",
            '{"query":{"qid":1,"text":""},"candidates":[]}',
            1,
            "'text' is ''; expected a non-blank text; add it.",
        ),
        (
            "r.jsonl",
            '{"query":{"qid":1,"text":"t"},"candidates":[]}\n'
            '{"query":{"qid":"1","text":"u"},"candidates":[]}',
            2,
            "query '1' occurs twice; expected each id once; remove one.",
        ),
        (
            "r.jsonl",
            '{"query":{"qid":1,"text":"t"},"candidates":[{"docid":"a"}]}',
            1,
            "{'docid': 'a'} is not a candidate; expected an object with 'docid', 'score' and an "
            "object 'doc'; repair the line.",
        ),
        (
            "r.jsonl",
            '{"query":{"qid":1,"text":"t"},"candidates":[{"docid":"a","doc":{"x":"y"}}]}',
            1,
            "'text' or 'segment' or 'contents' or 'content' or 'body' or 'passage' is None; "
            "expected a text; add it.",
        ),
        (
            "r.jsonl",
            '{"query":{"qid":1,"text":"t"},"candidates":'
            '[{"docid":"a","score":true,"doc":{"text":"y"}}]}',
            1,
            "the score of document 'a' is True; expected a finite number; repair the line.",
        ),
        (
            "r.jsonl",
            '{"query":{"qid":1,"text":"t"},"candidates":'
            '[{"docid":"a","doc":{"text":"y"}},{"docid":"a","doc":{"text":"z"}}]}',
            1,
            "for query '1', document 'a' occurs twice; expected each id once; remove one.",
        ),
    ],
)
def test_a_malformed_line_is_named_with_its_problem(
    tmp_path: Path, name: str, content: str | bytes, line: int, problem: str
) -> None:
    path = file(tmp_path, name, content)
    with pytest.raises(CollectionError) as caught:
        read_requests(path)
    assert str(caught.value) == f"{path}:{line}: {problem}"


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
            "the metadata or a score of query 'q' cannot be written as JSON (Object of type set is "
            "not JSON serializable); expected text, finite numbers, lists and dicts; convert other "
            "values.",
        ),
    ],
)
def test_a_request_that_json_cannot_hold_is_refused(
    tmp_path: Path, document: Document, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        write_requests(tmp_path / "r.jsonl", [Request("q", "why", (document,))])
    assert str(caught.value) == message
