"""Spans of evidence: maximal segments, words, and the original text."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routehead_plugins.scoring.evidence import evidence_spans, maximal_segments


def slow_maximal_segments(scores: list[float]) -> list[tuple[int, int]]:
    """The definition: take the best segment, then search left and right of it."""

    def search(first: int, last: int) -> list[tuple[int, int]]:
        ranges = [(a, b) for a in range(first, last) for b in range(a + 1, last + 1)]
        # Of equal sums the shortest: a segment has no worthless ends.
        best = max(ranges, key=lambda r: (sum(scores[r[0] : r[1]]), r[0] - r[1]), default=None)
        if best is None or sum(scores[best[0] : best[1]]) <= 0:
            return []
        return [*search(first, best[0]), best, *search(best[1], last)]

    return search(0, len(scores))


def test_the_example_of_the_paper_is_solved_as_in_the_paper() -> None:
    scores = [4, -5, 3, -3, 1, 2, -2, 2, -2, 1, 5]
    assert maximal_segments(scores) == [(0, 1), (2, 3), (4, 11)]


@given(st.lists(st.integers(-20, 20).filter(bool), max_size=12))
def test_segments_equal_their_definition_where_sums_are_distinct(values: list[int]) -> None:
    # Powers make every segment's sum distinct, so that there are no ties.
    scores = [float(value * 1000 + 0.001 * 2**index) for index, value in enumerate(values)]
    assert maximal_segments(scores) == slow_maximal_segments(scores)


def test_the_strongest_words_are_one_span_in_the_original_text() -> None:
    text = "  Rain fell.  A grey wolf ran."
    #        tokens: Rain/ fell/ ./ A/ grey/ wo/ lf/ ran/ .
    offsets = [
        (2, 6),
        (6, 11),
        (11, 12),
        (13, 15),
        (15, 20),
        (20, 23),
        (23, 25),
        (25, 29),
        (29, 30),
    ]
    scores = [0, 0, 0, 0, 0.3, 0.2, 0.3, 0, 0]
    (span,) = evidence_spans(text, offsets, [float(score) for score in scores])
    # Words: 0 0 0 .3 .5 0; averaged: 0 0 .1 .267 .267 .25; their mean is .147.
    assert text[span.start : span.end] == "grey wolf ran."
    assert span.score == pytest.approx(0.8 / 3 + 0.8 / 3 + 0.25 - 3 * (0.8 / 3 * 2 + 0.35) / 6)


def test_text_that_was_cut_off_is_no_evidence() -> None:
    spans = evidence_spans("one two three four", [(0, 3), (3, 7)], [0.0, 1.0])
    assert [(span.start, span.end) for span in spans] == []  # averaged, both words are alike
    spans = evidence_spans("one two three four", [(0, 3), (3, 7), (7, 13)], [0.0, 0.0, 1.0])
    assert [(span.start, span.end) for span in spans] == [(4, 13)]


def test_equal_scores_point_nowhere() -> None:
    assert evidence_spans("one two", [(0, 3), (3, 7)], [0.5, 0.5]) == ()
    assert evidence_spans("", [], []) == ()
    assert evidence_spans(" \n", [(0, 2)], [1.0]) == ()


def test_scripts_without_spaces_are_split_into_characters() -> None:
    spans = evidence_spans("狼が走る", [(0, 1), (1, 2), (2, 3), (3, 4)], [1.0, 0.0, 0.0, 0.0])
    assert [(span.start, span.end) for span in spans] == [(0, 2)]


@given(st.text(max_size=40), st.lists(st.floats(-1, 1), max_size=40))
def test_spans_never_overlap_and_begin_and_end_with_a_word(text: str, values: list[float]) -> None:
    offsets = [(index, index + 1) for index in range(len(text))]
    scores = (values + [0.0] * len(text))[: len(text)]
    spans = sorted(evidence_spans(text, offsets, scores))
    for span in spans:
        assert 0 <= span.start < span.end <= len(text)
        assert not text[span.start].isspace()
        assert not text[span.end - 1].isspace()
    for one, other in pairwise(spans):
        assert one.end <= other.start
