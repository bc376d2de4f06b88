"""Passages cover a text, end with sentences where they can, and are gathered head by head."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from routehead_plugins.errors import InputError
from routehead_plugins.scoring.passages import Chunking


def words(text: str) -> list[tuple[int, int]]:
    """Tokens as many tokenizers make them: a word with the space before it."""
    return [match.span() for match in re.finditer(r"\s*\S+", text)]


def divided(text: str, **options: Any) -> list[str]:
    return [text[a:b] for a, b in Chunking(**options).divide(text, words(text))]


def test_a_text_that_is_no_longer_stays_whole() -> None:
    assert divided("a b c d e f g h ", tokens=8) == ["a b c d e f g h "]
    assert divided("", tokens=8) == [""]


def test_passages_follow_each_other() -> None:
    text = " ".join(str(number) for number in range(20))
    assert divided(text, tokens=8) == [
        "0 1 2 3 4 5 6 7",
        " 8 9 10 11 12 13 14 15",
        " 16 17 18 19",
    ]


def test_passages_overlap_by_what_the_stride_is_shorter() -> None:
    text = " ".join(str(number) for number in range(14))
    assert divided(text, tokens=8, stride=5) == [
        "0 1 2 3 4 5 6 7",
        " 5 6 7 8 9 10 11 12",
        " 10 11 12 13",
    ]


def test_a_passage_ends_with_a_sentence_that_ends_nearby() -> None:
    text = "one two three four five six seven. eight nine ten eleven twelve thirteen"
    assert divided(text, tokens=8) == [
        "one two three four five six seven.",
        " eight nine ten eleven twelve thirteen",
    ]
    far = "one two three. four five six seven eight nine ten"
    assert divided(far, tokens=8) == ["one two three. four five six seven eight", " nine ten"]


def test_lines_end_sentences_too() -> None:
    text = "one two three four five six seven\neight nine ten"
    assert divided(text, tokens=8) == ["one two three four five six seven", "\neight nine ten"]


@given(
    st.lists(st.sampled_from(["a", "b.", "c\n", "dd", "e!)", "\u3002"]), max_size=80),
    st.integers(8, 20),
    st.data(),
)
def test_passages_cover_every_token_and_are_short_enough(
    parts: list[str], tokens: int, data: st.DataObject
) -> None:
    text = " ".join(parts)
    stride = data.draw(st.none() | st.integers(1, tokens))
    offsets = words(text)
    spans = Chunking(tokens, stride).divide(text, offsets)
    assert spans[0].start == 0
    assert spans[-1].end == len(text)
    for first, second in itertools.pairwise(spans):
        assert first.start < second.start <= first.end <= second.end
    for span in spans[:-1]:
        inside = [offset for offset in offsets if offset[0] >= span.start and offset[1] <= span.end]
        assert 1 <= len(inside) <= tokens


def slow_gathered(values: list[list[float]], owners: list[int], how: str) -> list[list[float]]:
    gathered = []
    for row in values:
        documents: dict[int, list[float]] = {}
        for value, owner in zip(row, owners, strict=True):
            documents.setdefault(owner, []).append(value)
        top = {"max": 1, "mean_of_top(2)": 2}.get(how)
        gathered.append(
            [
                own[0] if top is None else sum(sorted(own)[-top:]) / min(top, len(own))
                for own in documents.values()
            ]
        )
    return gathered


@pytest.mark.parametrize("how", ["max", "first", "mean_of_top(2)"])
def test_passages_are_gathered_head_by_head(how: str) -> None:
    values, owners = torch.rand(3, 6, dtype=torch.float64), [0, 0, 0, 1, 2, 2]
    actual = Chunking(aggregation=how).gathered(values, owners)
    assert actual.tolist() == slow_gathered(values.tolist(), owners, how)


@pytest.mark.parametrize("how", ["max", "first", "mean_of_top(2)"])
def test_documents_of_one_passage_keep_their_values(how: str) -> None:
    values = torch.rand(3, 4)
    assert torch.equal(Chunking(aggregation=how).gathered(values, [0, 1, 2, 3]), values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 7}, "chunk_tokens=7 is too short; give 8 or more."),
        ({"tokens": "9"}, "chunk_tokens='9' is not a count; give a whole number, 1 or more."),
        (
            {"tokens": 9, "stride": 10},
            "chunk_stride=10 leaves text out; give 1 to 9, the length of a passage.",
        ),
        ({"stride": 0}, "chunk_stride=0 is not a count; give a whole number, 1 or more."),
        (
            {"aggregation": "sum"},
            "chunk_aggregation='sum' does not exist; give max, first or mean_of_top(3).",
        ),
        (
            {"aggregation": "mean_of_top(0)"},
            "chunk_aggregation='mean_of_top(0)' does not exist; give max, first or mean_of_top(3).",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        Chunking(**options)
    assert str(error.value) == message
