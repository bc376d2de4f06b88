"""Documents, heads, spans and rankings: small, immutable, and strict about their input."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routehead_plugins import Document, Head, HeadSet, Ranking, ScoredDocument, Span
from routehead_plugins.data import as_documents, check_text
from routehead_plugins.errors import InputError


@given(st.integers(0, 99), st.integers(0, 99))
@settings(deadline=None)
def test_a_head_is_written_layer_dash_head_and_equals_its_pair(layer: int, index: int) -> None:
    head = Head(layer, index)
    assert str(head) == f"{layer}-{index}"
    assert head == (layer, index)


@given(st.integers(0, 50), st.integers(0, 50))
@settings(deadline=None)
def test_a_span_is_half_open(start: int, size: int) -> None:
    span = Span(start, start + size)
    assert span.size == size == len(range(*span))


@pytest.mark.parametrize(
    ("text", "blank"),
    [("", True), (" \n\t\u00a0\u3000", True), ("a", False), (" . ", False), ("\u200b", False)],
)
def test_a_document_is_blank_when_it_is_white_space(text: str, blank: bool) -> None:
    assert Document(text).is_blank is blank


def test_a_document_needs_no_more_than_its_text() -> None:
    document = Document("a text")
    assert (document.id, document.metadata, document.score) == (None, {}, None)
    assert document.metadata is not Document("another").metadata


HITS = tuple(ScoredDocument(index, -float(index), Document(f"text {index}")) for index in (2, 0, 1))
RANKING = Ranking("a query", HITS, HeadSet([(0, 1)]))


@pytest.mark.parametrize(
    ("item", "field"),
    [(Document("a"), "text"), (HITS[0], "score"), (RANKING, "hits")],
    ids=["document", "hit", "ranking"],
)
def test_nothing_can_be_reassigned_or_added(item: Any, field: str) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(item, field, None)
    with pytest.raises((AttributeError, TypeError)):  # slots; TypeError on some versions of Python
        object.__setattr__(item, "not_a_field", 1)


def test_a_ranking_is_a_sequence_of_its_hits() -> None:
    assert isinstance(RANKING, Sequence)
    assert len(RANKING) == 3
    assert list(RANKING) == list(HITS)
    assert [hit.index for hit in RANKING] == [2, 0, 1]
    assert (RANKING[0], RANKING[-1], RANKING[1:]) == (HITS[0], HITS[2], HITS[1:])
    assert HITS[1] in RANKING
    assert RANKING.index(HITS[1]) == 1
    assert list(reversed(RANKING)) == list(HITS[::-1])
    with pytest.raises(IndexError):
        RANKING[3]


def test_an_empty_ranking_is_false() -> None:
    assert not Ranking("a query", (), HeadSet(()))


def test_texts_and_documents_may_be_mixed_and_documents_are_passed_on_as_they_are() -> None:
    given_document = Document("two", id="d2", metadata={"year": 2001}, score=1.5)
    documents: list[str | Document] = ["one", given_document]
    assert as_documents(documents) == [Document("one"), given_document]
    assert as_documents(documents)[1] is given_document
    assert documents == ["one", given_document]


@pytest.mark.parametrize("documents", [[], ()])
def test_no_documents_are_no_documents(documents: Sequence[str]) -> None:
    assert as_documents(documents) == []


def test_one_string_is_not_a_list_of_documents() -> None:
    with pytest.raises(InputError) as error:
        as_documents("a text")
    assert str(error.value) == "documents is one string; give a list of texts or Documents."


@pytest.mark.parametrize(
    ("wrong", "kind"), [(None, "NoneType"), (b"bytes", "bytes"), ({"text": "a"}, "dict")]
)
def test_an_item_that_is_no_text_is_named_by_its_place(wrong: Any, kind: str) -> None:
    with pytest.raises(InputError) as error:
        as_documents(["a", wrong])
    assert str(error.value) == (
        f"documents[1] is a {kind}; give a str or a routehead_plugins.Document."
    )


def test_a_text_that_says_something_is_accepted() -> None:
    check_text("query", " a ")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "query='' is blank; give a text."),
        (" \n", "query=' \\n' is blank; give a text."),
        (None, "query=None is a NoneType; give a text."),
        (b"a", "query=b'a' is a bytes; give a text."),
    ],
)
def test_a_text_that_says_nothing_is_refused(value: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        check_text("query", value)
    assert str(error.value) == message
