"""Copies of the query: which passages count as one, and where the rest of the text stood."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routehead_plugins import Document
from routehead_plugins.scoring.copies import excerpt_documents, query_copies, without_copies

QUERY = "How far do grey wolves roam in winter?"
TEXT = "Stones are grey. Wolves eat them in winter, or so they say; how odd."


def copies(query: str, text: str) -> list[str]:
    return [text[start:end] for start, end in query_copies(query, text)]


@pytest.mark.parametrize(
    "copy",
    [
        "How far do grey wolves roam in winter",
        "HOW FAR DO GREY WOLVES ROAM IN WINTER",
        "how far, do grey -- wolves \n\n roam: in winter",
        "how fa\u200br do gr\u00adey wolves roam in win\u2060ter",
        "\uff48ow far do grey wolves roam in winter",  # a full-width letter
        "how far do do grey wolves just roam in winter",
    ],
)
def test_a_copy_is_seen_through_case_punctuation_and_hidden_characters(copy: str) -> None:
    assert copies(QUERY, f"{TEXT} So. {copy} is here. {TEXT}") == [copy]


@pytest.mark.parametrize(
    "text",
    [
        "",
        TEXT,
        "Grey wolves roam up to fifty kilometres a day in winter.",
        "winter in roam wolves grey do far how",  # another order
        " stone stone stone ".join(QUERY.split()),
    ],
)
def test_the_words_of_a_query_alone_are_no_copy(text: str) -> None:
    assert copies(QUERY, text) == []


def test_every_copy_is_taken() -> None:
    copy = QUERY.removesuffix("?")
    assert copies(QUERY, f"{copy}. A wolf ran over the hill and far away. {copy}!") == [copy, copy]
    assert copies(QUERY, f"A hill: {copy} {copy}") == [copy, copy]


def test_one_word_of_ten_may_be_missing_and_no_more() -> None:
    query = "a b c d e f g h i j"
    assert copies(query, "x x a b c d e g h i j x x") == ["a b c d e g h i j"]
    assert copies(query, "x x a b c d e g h j x x") == []
    assert copies("a b c d e", "x a b c d x") == []


@pytest.mark.parametrize("query", ["", "?!", "wolf", "grey wolf", "\u72fc\u306e\u7fa4\u308c"])
def test_topics_of_a_word_or_two_are_never_taken_for_copies(query: str) -> None:
    assert copies(query, f"{query} {query} and {query}") == []


def test_queries_without_spaces_are_compared_by_character() -> None:
    query = "\u51ac\u306b\u72fc\u306f\u3069\u3053\u3078"
    assert copies(query, f"\u5c71\u3002{query}\u5c71") == [query]


words = st.lists(st.sampled_from(["grey", "wolves", "roam", "in", "stone", "hill"]), max_size=30)


@given(words, st.lists(st.integers(0, 30), max_size=3))
@settings(deadline=None, max_examples=60)
def test_an_excerpt_is_the_text_without_its_copies_and_knows_where_its_characters_stood(
    rest: list[str], at: list[int]
) -> None:
    query = "in grey wolves roam"
    for index in at:
        rest.insert(index, query)
    text = " ".join(rest)
    excerpt = without_copies(query, text)
    kept = [i for i in range(len(text)) if not any(a <= i < b for a, b in excerpt.removed)]
    assert excerpt.text == "".join(text[index] for index in kept)
    assert query not in excerpt.text
    for start in range(len(kept)):
        for end in range(start + 1, len(kept) + 1):
            assert excerpt.original(start, end) == (kept[start], kept[end - 1] + 1)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ((9.0, 4.0, 2.0), [3.0, 4.0, 2.0]),
        ((9.0, None, 2.0), [None, None, 2.0]),
        ((None, 4.0, 2.0), [3.0, 4.0, 2.0]),
    ],
)
def test_a_copy_raises_no_score(
    scores: tuple[float | None, ...], expected: list[float | None]
) -> None:
    texts = [f"rain. {QUERY}", "a hill", "a stone"]
    documents = [Document(text, score=score) for text, score in zip(texts, scores, strict=True)]
    left = excerpt_documents(documents, [without_copies(QUERY, text) for text in texts])
    assert [document.score for document in left] == expected
    assert [document.text for document in left] == ["rain. ?", "a hill", "a stone"]


def test_scores_are_left_out_where_every_document_has_a_copy() -> None:
    (left,) = excerpt_documents([Document(QUERY, score=1.0)], [without_copies(QUERY, QUERY)])
    assert left.score is None
