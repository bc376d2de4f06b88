"""Measures of rankings, against loops over documents and against ir_measures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import ir_measures
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from routehead_plugins.signals.measures import correlation, margin, ndcg, reciprocal_rank

# Imports on first use and slow disks are no failures.
UNHURRIED = settings(deadline=None)

GAINS = st.lists(st.integers(-1, 3), min_size=1, max_size=14)


@st.composite
def judged_scores(draw: st.DrawFn) -> tuple[Tensor, list[int], list[int]]:
    """Scores of three heads, often equal; gains; gains of documents that were not retrieved."""
    gains = draw(GAINS)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scores = torch.randn(3, len(gains), generator=generator)
    if draw(st.booleans()):
        scores = scores.round()
    return scores, gains, draw(st.lists(st.integers(-1, 3), max_size=3))


def ranked(scores: Sequence[float]) -> list[int]:
    """Indices, best first; the sort is stable, so that ties keep the candidates' order."""
    return sorted(range(len(scores)), key=lambda index: -scores[index])


def by_ir_measures(
    measure: ir_measures.Measure, scores: Sequence[float], judgments: Sequence[int]
) -> float:
    order = ranked(scores)
    run = {"q": {f"d{index}": float(-rank) for rank, index in enumerate(order)}}
    qrels = {"q": {f"d{index}": judgment for index, judgment in enumerate(judgments)}}
    return float(ir_measures.calc_aggregate([measure], qrels, run)[measure])


@UNHURRIED
@given(judged_scores(), st.sampled_from([1, 3, 10]))
def test_ndcg_is_that_of_ir_measures(
    drawn: tuple[Tensor, list[int], list[int]], depth: int
) -> None:
    scores, gains, missed = drawn
    values = ndcg(scores, torch.tensor(gains), torch.tensor(gains + missed), depth)
    measure = ir_measures.nDCG @ depth
    expected = [by_ir_measures(measure, row.tolist(), gains + missed) for row in scores]
    assert values.tolist() == pytest.approx(expected, abs=1e-12)


@UNHURRIED
@given(judged_scores(), st.sampled_from([1, 3, None]))
def test_the_reciprocal_rank_is_that_of_ir_measures(
    drawn: tuple[Tensor, list[int], list[int]], depth: int | None
) -> None:
    scores, gains, _ = drawn
    values = reciprocal_rank(scores, torch.tensor(gains), depth)
    measure = ir_measures.RR if depth is None else ir_measures.RR @ depth
    expected = [by_ir_measures(measure, row.tolist(), gains) for row in scores]
    assert values.tolist() == pytest.approx(expected, abs=1e-12)


def test_ndcg_by_hand() -> None:
    scores = torch.tensor([[0.3, 0.2, 0.1], [0.1, 0.2, 0.3]])
    values = ndcg(scores, torch.tensor([2.0, 0.0, 1.0]), torch.tensor([2.0, 1.0, 1.0]))
    best = 2 + 1 / math.log2(3) + 1 / 2
    assert values.tolist() == pytest.approx([2.5 / best, 2 / best])


@UNHURRIED
@given(GAINS.filter(lambda gains: max(gains) > 0))
def test_the_best_order_has_an_ndcg_of_exactly_one(gains: list[int]) -> None:
    judgments = torch.tensor(gains, dtype=torch.float32)
    assert ndcg(judgments[None], judgments, judgments).tolist() == [1.0]


def test_equal_scores_keep_the_order_of_the_candidates() -> None:
    scores = torch.zeros(1, 40)
    first = torch.tensor([1.0] + [0.0] * 39)
    assert ndcg(scores, first, first).tolist() == [1.0]
    assert reciprocal_rank(scores, first.flip(0)).tolist() == [1 / 40]


def test_without_anything_relevant_ranks_are_worth_nothing() -> None:
    scores = torch.tensor([[0.3, 0.2], [0.1, 0.2]])
    gains = torch.tensor([0.0, -1.0])
    assert ndcg(scores, gains, torch.tensor([])).tolist() == [0.0, 0.0]
    assert reciprocal_rank(scores, gains).tolist() == [0.0, 0.0]


def test_without_candidates_ranks_are_worth_nothing() -> None:
    scores, gains = torch.empty(2, 0), torch.empty(0)
    assert ndcg(scores, gains, torch.tensor([1.0])).tolist() == [0.0, 0.0]
    assert reciprocal_rank(scores, gains).tolist() == [0.0, 0.0]
    assert correlation(scores, gains).tolist() == [0.0, 0.0]
    assert margin(scores, gains).tolist() == [0.0, 0.0]


def slow_moments(values: Sequence[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))


def slow_correlation(scores: Sequence[float], gains: Sequence[float]) -> float:
    if len(set(scores)) == 1 or len(set(gains)) == 1:
        return 0.0
    (mean, deviation), (middle, spread) = slow_moments(scores), slow_moments(gains)
    pairs = zip(scores, gains, strict=True)
    return sum((s - mean) * (g - middle) for s, g in pairs) / len(gains) / deviation / spread


def slow_margin(scores: Sequence[float], gains: Sequence[float]) -> float:
    pairs = list(zip(scores, gains, strict=True))
    relevant = [score for score, gain in pairs if gain > 0]
    others = [score for score, gain in pairs if gain <= 0]
    if not relevant or not others or len(set(scores)) == 1:
        return 0.0
    gap = sum(relevant) / len(relevant) - sum(others) / len(others)
    return gap / slow_moments(scores)[1]


@UNHURRIED
@given(judged_scores())
def test_smooth_utilities_equal_loops(drawn: tuple[Tensor, list[int], list[int]]) -> None:
    scores, gains, _ = drawn
    judgments = torch.tensor(gains, dtype=torch.float32)
    rows = scores.tolist()
    assert correlation(scores, judgments).tolist() == pytest.approx(
        [slow_correlation(row, gains) for row in rows], abs=1e-9
    )
    assert margin(scores, judgments).tolist() == pytest.approx(
        [slow_margin(row, gains) for row in rows], abs=1e-9
    )


def test_smooth_utilities_know_neither_shift_nor_scale() -> None:
    scores = torch.randn(4, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gains = torch.tensor([0.0, 2, 0, 0, 1, 0, 0, 0, 1])
    for utility in (correlation, margin):
        torch.testing.assert_close(utility(5 * scores - 3, gains), utility(scores, gains))
        torch.testing.assert_close(utility(-scores, gains), -utility(scores, gains))


def test_equal_scores_say_nothing_however_their_mean_is_rounded() -> None:
    gains = torch.tensor([1.0, 0, 0, 0, 0, 0, 0])
    for value in (0.1, 0.7, 1 / 3):
        scores = torch.full((1, 7), value, dtype=torch.float64)
        assert correlation(scores, gains).tolist() == [0.0]
        assert margin(scores, gains).tolist() == [0.0]


def test_scores_whose_squares_vanish_say_as_much_as_others() -> None:
    scores = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    gains = torch.tensor([1.0, 0.0, 0.0])
    for utility in (correlation, margin):
        torch.testing.assert_close(utility(scores * 1e-200, gains), utility(scores, gains))


def test_every_utility_has_one_figure_per_head_in_float64() -> None:
    scores, gains = torch.randn(5, 6), torch.tensor([1, 0, 0, 2, 0, 0])
    values = [
        ndcg(scores, gains, gains),
        reciprocal_rank(scores, gains),
        correlation(scores, gains),
        margin(scores, gains),
    ]
    assert [(figures.shape, figures.dtype) for figures in values] == [((5,), torch.float64)] * 4
