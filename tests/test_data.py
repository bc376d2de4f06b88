"""Documents, heads, spans and rankings: small, immutable, and strict about their input."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from collections import UserDict
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from routehead_plugins import Document, Head, HeadSet, Ranking, ScoredDocument, Span
from routehead_plugins.data import (
    as_documents,
    check_count,
    check_flag,
    check_number,
    check_text,
    check_top_n,
)
from routehead_plugins.errors import InputError, short_repr

HUGE = 10**400
UNWRITABLE = 10**5000  # more digits than Python writes


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


# What every argument is checked for: the call, the wrong argument, words of the message.

WRONG: list[tuple[Callable[[Any], Any], Any, str]] = [
    (Document, None, "text=None is a NoneType; give a text."),
    (Document, 5, "text=5 is a int; give a text."),
    (Document, b"bytes", "text=b'bytes' is a bytes"),
    (Document, ["a", "b"], "text=['a', 'b'] is a list"),
    (Document, math.nan, "text=nan is a float"),
    (Document, Document("a"), "is a routehead_plugins.data.Document; give a text."),
    (partial(Document, "a"), 1.5, "id=1.5 is a float; give a text or None."),
    (partial(Document, "a"), True, "id=True is a bool"),
    (partial(Document, "a"), b"d1", "id=b'd1' is a bytes"),
    (partial(Document, "a"), UNWRITABLE, "id=<int> is a int"),
    (partial(Document, "a", None), [("k", 1)], "metadata=[('k', 1)] is a list; give a mapping"),
    (partial(Document, "a", None), "year=2001", "metadata='year=2001' is a str"),
    (partial(Document, "a", None, {}), "3", "score='3' must be a number"),
    (partial(Document, "a", None, {}), True, "score=True must be a number"),
    (partial(Document, "a", None, {}), np.True_, "must be a number"),
    (partial(Document, "a", None, {}), HUGE, "must be a number that a float can hold"),
    (partial(Document, "a", None, {}), UNWRITABLE, "score=<int> must be a number"),
    (partial(Document, "a", None, {}), Fraction(HUGE), "must be a number that a float can hold"),
    (partial(Document, "a", None, {}), 1j, "score=1j must be a number"),
    (partial(Document, "a", None, {}), np.complex64(1), "must be a number"),
    (partial(Document, "a", None, {}), [0.5], "score=[0.5] must be a number"),
    (partial(Document, "a", None, {}), np.array([0.5]), "score=array([0.5]) must be a number"),
    (partial(Document, "a", None, {}), np.str_("3"), "must be a number"),
    (check_top_n, "2", "top_n='2' is not a count; give a whole number, 1 or more."),
    (check_top_n, 1.5, "top_n=1.5 is not a count"),
    (check_top_n, True, "top_n=True is not a count"),
    (check_top_n, np.float32(2), "is not a count"),
    (check_top_n, np.int64(0), "returns nothing; give 1 or more, or None for all."),
    (check_top_n, -HUGE, "returns nothing"),
    (partial(check_count, "hits"), None, "hits=None is not a count"),
    (partial(check_count, "hits"), math.nan, "hits=nan is not a count"),
    (partial(check_count, "hits"), torch.tensor(2.0), "hits=tensor(2.) is not a count"),
    (partial(check_number, "weight"), math.inf, "weight=inf must be a finite number."),
    (partial(check_number, "weight"), None, "weight=None must be a finite number."),
    (partial(check_number, "share", least=0, most=1), "1", "must be a number from 0 to 1."),
    (partial(check_number, "share", least=0, most=1), 1.01, "share=1.01 must be a number from"),
    (partial(check_number, "weight", least=0), -0.1, "must be a finite number, 0 or more."),
    (partial(check_number, "weight", least=0), Decimal("sNaN"), "must be a finite number"),
    (partial(check_flag, "spans"), "yes", "spans='yes' must be True or False."),
    (partial(check_flag, "spans"), None, "spans=None must be True or False."),
    (partial(check_flag, "spans"), 1, "spans=1 must be True or False."),
    (partial(check_text, "query"), ["a"], "query=['a'] is a list; give a text."),
    (partial(check_text, "query"), "\n" * 9999, "is blank; give a text."),
    (as_documents, {"d1": "a", "d2": "b"}, "documents is a dict; give its values as a list."),
    (as_documents, UserDict(d="a"), "is a collections.UserDict; give its values as a list."),
    (as_documents, MappingProxyType({"d": "a"}), "is a mappingproxy; give its values as a list."),
    (as_documents, {"a", "b"}, "documents is a set, which has no order; give a list of texts"),
    (as_documents, frozenset("a"), "documents is a frozenset, which has no order"),
    (as_documents, None, "documents is a NoneType; give a list of texts or Documents."),
    (as_documents, 3, "documents is a int; give a list of texts or Documents."),
    (as_documents, b"ab", "documents is a bytes; give a list of texts"),
    (as_documents, bytearray(b"ab"), "documents is a bytearray; give a list of texts"),
    (as_documents, Document("a"), "documents is a routehead_plugins.data.Document; give a list"),
    (as_documents, Path("a"), "Path; give a list of texts"),
    (as_documents, np.array([["a", "b"]]), "documents is a numpy.ndarray; give a list of texts"),
    (as_documents, np.array("a"), "documents is a numpy.ndarray; give a list of texts"),
    (as_documents, ["a", ["b"]], "documents[1] is a list; give a str or a"),
    (as_documents, (text for text in ("a", math.nan)), "documents[1] is a float; give a str"),
    (as_documents, RANKING, "documents[0] is a routehead_plugins.data.ScoredDocument; give a str"),
]


@pytest.mark.parametrize(("call", "wrong", "words"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_argument_is_named_in_one_short_line(
    call: Callable[[Any], Any], wrong: Any, words: str
) -> None:
    with pytest.raises(InputError) as error:
        call(wrong)
    message = str(error.value)
    assert words in message
    assert len(message) < 300
    assert "\n" not in message


def test_numbers_of_other_libraries_become_pythons() -> None:
    for count in (2, np.int64(2), np.uint8(2), torch.tensor(2), np.array(2)):
        assert [type(check_count("k", count)), check_top_n(count)] == [int, 2]
    for number in (2, 2.0, np.float32(2), torch.tensor(2.0), Decimal(2), Fraction(2)):
        score = Document("a", score=number).score  # type: ignore[arg-type]
        assert (type(score), score) == (float, 2.0)
        assert type(check_number("weight", number, least=2, most=2)) is float
    for flag in (False, np.False_, torch.tensor(False)):
        assert check_flag("spans", flag) is False


def test_ids_that_are_whole_numbers_become_texts_and_no_metadata_is_empty() -> None:
    document = Document("a", id=np.int64(7), metadata=None)  # type: ignore[arg-type]
    assert document == Document("a", id="7", metadata={})


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_kept_as_they_are(score: float) -> None:
    assert repr(Document("a", score=score).score) == repr(score)


def test_documents_survive_copies_and_pickles() -> None:
    document = Document("a", id="d", metadata={"year": [2001]}, score=1.5)
    for restored in (copy.deepcopy(document), pickle.loads(pickle.dumps(document))):
        assert restored == document
    assert dataclasses.replace(document, score=2).score == 2.0


@pytest.mark.parametrize(
    "documents",
    [
        ("a", "b"),
        iter(["a", "b"]),
        (text for text in "ab"),
        {1: "a", 2: "b"}.values(),
        np.array(["a", "b"]),
        np.array(["a", Document("b")], dtype=object),
    ],
)
def test_whatever_has_an_order_is_a_list_of_documents(documents: Any) -> None:
    assert as_documents(documents) == [Document("a"), Document("b")]


@given(st.recursive(st.text() | st.integers() | st.binary(), st.lists, max_leaves=20))
@settings(deadline=None)
def test_a_value_in_a_message_is_one_short_line(value: Any) -> None:
    written = short_repr(value)
    assert len(written) <= 80
    assert len(written.splitlines()) <= 1
    written.encode()
