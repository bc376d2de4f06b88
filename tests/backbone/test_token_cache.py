"""Token ids: tokenized once, in one batch, within a bound."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import families
from hypothesis import given
from hypothesis import strategies as st

from routehead_plugins.backbone.prompt import PromptEncoder, TokenCache


class Characters:
    """One token per character, and a record of every batch."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def __call__(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        self.batches.append(list(texts))
        return [tuple(map(ord, text)) for text in texts]


def test_new_texts_are_tokenized_in_one_batch_and_equal_ones_once() -> None:
    encode = Characters()
    cache = TokenCache(encode)
    assert cache(["ab", "c", "ab"]) == [(97, 98), (99,), (97, 98)]
    assert cache(["c", "d"]) == [(99,), (100,)]
    assert encode.batches == [["ab", "c"], ["d"]]


def test_the_longest_unused_goes_first() -> None:
    encode = Characters()
    cache = TokenCache(encode, max_tokens=4)
    cache(["aa", "bb"])
    cache(["aa"])
    cache(["c"])
    cache(["aa", "bb"])
    assert encode.batches[-1] == ["bb"]


@given(st.lists(st.lists(st.text("ab", max_size=4), max_size=5), max_size=8))
def test_answers_are_those_of_the_tokenizer_and_the_bound_holds(calls: list[list[str]]) -> None:
    cache = TokenCache(Characters(), max_tokens=6)
    for texts in calls:
        assert cache(texts) == Characters()(texts)
        assert cache._tokens == sum(map(len, cache._held.values())) <= 6


def test_threads_keep_the_count_right() -> None:
    cache = TokenCache(Characters(), max_tokens=50)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: cache([f"{n * k % 37}" for k in range(20)]), range(200)))
    assert cache._tokens == sum(map(len, cache._held.values())) <= 50


def test_a_prompt_tokenizes_a_document_once() -> None:
    encoder = PromptEncoder(families.tiny_tokenizer())
    first = encoder.pieces("q", ["a wolf", "rain"], numbered=True)
    again = encoder.pieces("q", ["rain", "a wolf"], numbered=True)
    assert len(encoder._documents) == 2
    assert {piece.ids[3:] for piece in first.documents} == {
        piece.ids[3:] for piece in again.documents
    }
    cut = encoder.pieces("q", ["a wolf"], numbered=False, max_doc_tokens=2)
    assert cut.documents[0].text.size == 2
    assert len(encoder._documents) == 2
