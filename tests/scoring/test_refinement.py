"""The second reading of the best documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routehead_plugins import Document
from routehead_plugins.errors import InputError
from routehead_plugins.scoring import Refinement

NUMBERS = st.floats(-1e6, 1e6)


class Second:
    """Scores documents by their texts, which are numbers, and records what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[str], str | None]] = []

    def score(
        self, query: str, documents: Sequence[Document], *, instruction: str | None = None
    ) -> list[float]:
        self.asked.append((query, [document.text for document in documents], instruction))
        return [float(document.text) for document in documents]


def texts(*numbers: float) -> list[Document]:
    return [Document(repr(number)) for number in numbers]


def test_the_best_documents_are_read_again_best_first() -> None:
    second = Second()
    refined = Refinement(second, 2).refined([0.1, 0.5, 0.3], "why?", texts(7, 8, 9), "in short")
    assert second.asked == [("why?", ["9", "8"][::-1], "in short")]
    assert refined == [0.1, 8.0, 9.0]


def test_scores_below_those_of_other_documents_are_raised_together() -> None:
    refined = Refinement(Second(), 2).refined([4.0, 2.0, 3.0], "why?", texts(-6, 5, -2))
    assert refined[1] == 2.0
    assert refined[2] - refined[0] == pytest.approx(4)
    assert refined[0] == math.nextafter(2.0, math.inf)


@pytest.mark.parametrize("count", [3, 10])
def test_where_all_are_read_again_the_second_scores_stand(count: int) -> None:
    assert Refinement(Second(), count).refined([1.0, 2.0, 3.0], "why?", texts(-5, -9, 2)) == [
        -5.0,
        -9.0,
        2.0,
    ]


def test_no_documents_are_not_read() -> None:
    second = Second()
    assert Refinement(second, 2).refined([], "why?", []) == []
    assert not second.asked


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1), st.integers(1, 9))
def test_the_order_is_that_of_a_slow_cascade(pairs: list[tuple[float, float]], count: int) -> None:
    first, second = [list(column) for column in zip(*pairs, strict=True)]
    refined = Refinement(Second(), count).refined(first, "why?", texts(*second))
    ranks = sorted(range(len(first)), key=lambda index: -first[index])
    best, others = ranks[:count], ranks[count:]
    assert all(refined[index] == first[index] for index in others)
    assert all(refined[i] > first[j] for i in best for j in others)
    for i in best:
        for j in best:
            if second[i] > second[j]:
                assert refined[i] >= refined[j]


@pytest.mark.parametrize(
    ("scorer", "count", "message"),
    [
        (3, 2, "scorer is a int; give a re-ranker, such as a HeadRoutedAttentionReranker."),
        (Second, 2, "scorer is a type; give a re-ranker, such as a HeadRoutedAttentionReranker."),
        (Second(), 0, "count=0 is not a count; give a whole number, 1 or more."),
        (Second(), True, "count=True is not a count; give a whole number, 1 or more."),
    ],
)
def test_what_cannot_read_is_refused(scorer: Any, count: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        Refinement(scorer, count)
    assert str(error.value) == message
