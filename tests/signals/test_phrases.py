"""Phrases of passages as queries: parts of their passage, reproducible, without judgments."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routehead_plugins.data import Document
from routehead_plugins.errors import InputError
from routehead_plugins.io import Collection
from routehead_plugins.signals import phrase_queries
from routehead_plugins.signals.phrases import QUESTIONS

TEXTS = [
    "The wolf ran over the hill. Rain fell on seven grey stones by the river in May.",
    "Cast iron pans are seasoned with oil! Soap wears the film off, and so does long soaking.",
    "A keeper lived in the tower until 1931, when its lamp was converted to electricity.",
]


def collection(texts: list[str]) -> Collection:
    corpus = {f"d{n}": Document(text, id=f"d{n}") for n, text in enumerate(texts)}
    return Collection("words", Path("words"), corpus, {"q": "an old query"}, {"q": {"d0": 1}})


def bare(text: str) -> str:
    return " ".join(text.casefold().split())


def without_question(query: str) -> str:
    folded = bare(query).rstrip("?")
    starts = [words for words in QUESTIONS if folded.startswith(f"{words} ")]
    return folded[len(max(starts, key=len)) + 1 :] if starts else folded


def test_words_of_a_phrase_come_from_one_passage_in_its_order() -> None:
    queries = phrase_queries(collection(TEXTS), 60).topics.values()
    assert len(queries) > 40
    for query in queries:
        words = [word.strip(".,;:!?") for word in without_question(query).split()]
        assert any(_in_order(words, text) for text in TEXTS), query


def _in_order(words: list[str], text: str) -> bool:
    rest = iter([word.strip(".,;:!?") for word in bare(text).split()])
    return all(word in rest for word in words)


def test_sentences_phrases_keywords_and_questions_are_drawn() -> None:
    queries = list(phrase_queries(collection(TEXTS), 60).topics.values())
    assert (
        "A keeper lived in the tower until 1931, when its lamp was converted to electricity."
        in (queries)
    )
    assert any(query.startswith(QUESTIONS) for query in queries)
    assert any(query.endswith("?") for query in queries)
    copied = [any(query in text for text in TEXTS) for query in queries]
    assert 0 < sum(copied) < len(queries)


def test_every_passage_is_used_before_any_is_used_again() -> None:
    texts = [" ".join([f"{word}{n}" for n in range(12)]) for word in "abcdef"]
    queries = phrase_queries(collection(texts), 6).topics.values()
    used = {without_question(query).split()[0][0] for query in queries}
    assert used == set("abcdef")


def test_there_are_no_judgments_and_no_candidates() -> None:
    drawn = phrase_queries(collection(TEXTS), 5)
    assert drawn.qrels == {}
    assert drawn.run is None
    assert set(drawn.topics) <= {f"words-phrase-{n}" for n in range(5)}
    assert "an old query" not in drawn.topics.values()


def test_the_seed_decides() -> None:
    one, same, other = (phrase_queries(collection(TEXTS), 9, seed=seed) for seed in (0, 0, 1))
    assert one.topics == same.topics
    assert one.topics != other.topics


@settings(max_examples=60)
@given(st.lists(st.text(max_size=80), min_size=1, max_size=4), st.integers(1, 12))
def test_any_texts_give_distinct_queries_with_words(texts: list[str], count: int) -> None:
    texts = [*texts, "one two three four"]
    queries = list(phrase_queries(collection(texts), count).topics.values())
    assert len(set(queries)) == len(queries) <= count
    assert all(query.strip() for query in queries)


def test_a_corpus_of_words_is_no_corpus() -> None:
    with pytest.raises(InputError, match=r"no document of 'words' has 4 words or more; give a"):
        phrase_queries(collection(["one two", ""]), 3)


def test_no_queries_cannot_be_asked_for() -> None:
    with pytest.raises(InputError, match="count=0 is not a count"):
        phrase_queries(collection(TEXTS), 0)
