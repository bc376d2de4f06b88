"""Scoring against a loop over tokens, and the small sums by hand."""

from __future__ import annotations

import pytest
import reference
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from routehead_plugins import Head, Span
from routehead_plugins.scoring import token_scores as scoring
from routehead_plugins.scoring.token_scores import (
    document_signals,
    fuse,
    mean_over_heads,
    standardise,
)

HEADS = 3


@st.composite
def spans(draw: st.DrawFn) -> tuple[list[Span], int]:
    """Spans that do not overlap, in any order, with or without gaps; and the number of tokens."""
    found, end = [], draw(st.integers(0, 3))
    for size in draw(st.lists(st.integers(1, 12), min_size=1, max_size=5)):
        found.append(Span(end, end + size))
        end += size + draw(st.integers(0, 2))
    return draw(st.permutations(found)), end


def random_attention(seed: int, tokens: int) -> Tensor:
    """Skewed rows that sum to one, as attention has them; a few tokens are far below the rest."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(HEADS, tokens, generator=generator, dtype=torch.float64)
    scores[torch.rand(HEADS, tokens, generator=generator) < 0.1] -= 6
    return scores.softmax(dim=-1)


def looped(attention: Tensor, null: Tensor | None, found: list[Span], *, drop: bool) -> Tensor:
    table = reference.signals(
        attention[None],
        None if null is None else null[None],
        list(found),
        [Head(0, index) for index in range(len(attention))],
        drop_outliers=drop,
    )
    return torch.tensor(table, dtype=attention.dtype)


def assert_no_near_ties(tokens: Tensor, found: list[Span]) -> None:
    """Two sums in another order may disagree about a token that lies on the very threshold."""
    for start, end in found:
        inside = tokens[:, start:end]
        if end - start > 1:
            floor = inside.mean(dim=1, keepdim=True) - 2 * inside.std(dim=1, keepdim=True)
            assume(bool(((inside - floor).abs() > 1e-12).all()))


@given(spans(), st.integers(0, 2**31), st.booleans(), st.booleans())
@settings(deadline=None)
def test_signals_equal_a_loop_over_tokens(
    drawn: tuple[list[Span], int], seed: int, calibrate: bool, drop: bool
) -> None:
    found, tokens = drawn
    attention = random_attention(seed, tokens)
    null = random_attention(seed + 1, tokens) if calibrate else None
    assert_no_near_ties(attention if null is None else attention - null, found)
    signals = document_signals(attention, null, found, drop_outliers=drop)
    expected = looped(attention, null, found, drop=drop)
    torch.testing.assert_close(signals, expected, atol=1e-12, rtol=0)


@given(spans(), st.sampled_from([0.0, 0.25, -0.125, 0.1]))
@settings(deadline=None)
def test_documents_whose_tokens_are_all_equal_keep_every_token(
    drawn: tuple[list[Span], int], value: float
) -> None:
    found, tokens = drawn
    signals = document_signals(torch.full((HEADS, tokens), value), None, found)
    sums = torch.tensor([value * span.size for span in found]).expand(HEADS, -1)
    torch.testing.assert_close(signals, sums)


def test_a_document_of_one_token_scores_that_token() -> None:
    signals = document_signals(torch.tensor([[0.5, 0.3, 0.2]]), None, [Span(1, 2), Span(0, 1)])
    torch.testing.assert_close(signals, torch.tensor([[0.3, 0.5]]))


# Mean 0.5, unbiased deviation 0.25: the threshold is exactly 0, and the one token at 0 lies on it.
ON_THE_THRESHOLD = [0.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 1.0]


def test_a_token_on_the_threshold_and_one_below_it_are_left_out() -> None:
    values = torch.tensor([ON_THE_THRESHOLD])
    shifted = values - 0.25  # so that leaving the token out shows in the sum
    span = [Span(0, len(ON_THE_THRESHOLD))]
    assert document_signals(shifted, None, span).tolist() == [[2.5]]
    assert document_signals(shifted, None, span, drop_outliers=False).tolist() == [[2.25]]
    below = shifted.clone()
    below[0, 0] -= 0.5
    assert document_signals(below, None, span).tolist() == [[2.5]]


def test_calibration_is_subtracted_before_outliers_are_looked_for() -> None:
    attention = torch.tensor([[1.0] * 8])
    null = torch.tensor([[3.0] + [0.5] * 7])  # the null query stares at the first token
    assert document_signals(attention, null, [Span(0, 8)]).tolist() == [[3.5]]
    assert document_signals(attention, null, [Span(0, 8)], drop_outliers=False).tolist() == [[1.5]]


def test_outliers_are_looked_for_within_a_document_and_a_head() -> None:
    attention = torch.tensor([[0.5] * 7 + [0.01] * 3, [0.01] * 7 + [0.5] * 3])
    signals = document_signals(attention, None, [Span(0, 7), Span(7, 10)])
    torch.testing.assert_close(signals, torch.tensor([[3.5, 0.03], [0.07, 1.5]]))


def test_tokens_between_documents_count_for_none() -> None:
    attention = torch.tensor([[9.0, 0.25, 9.0, 0.5, 9.0]])
    signals = document_signals(attention, None, [Span(3, 4), Span(1, 2)], drop_outliers=False)
    assert signals.tolist() == [[0.5, 0.25]]


def test_the_attention_given_is_left_as_it_was() -> None:
    attention, null = random_attention(0, 9), random_attention(1, 9)
    copies = attention.clone(), null.clone()
    document_signals(attention, null, [Span(0, 4), Span(5, 9)])
    assert torch.equal(attention, copies[0])
    assert torch.equal(null, copies[1])


def test_every_head_has_the_same_say() -> None:
    signals = torch.tensor([[1.0, 2.0, 3.0], [3.0, 0.0, 6.0]])
    assert mean_over_heads(signals).tolist() == [2.0, 1.0, 4.5]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [([1.0, 3.0], [-1.0, 1.0]), ([0.0, 0.0, 3.0, 3.0], [-1.0, -1.0, 1.0, 1.0]), ([5.0], [0.0])],
)
def test_scores_are_standardised_by_their_own_spread(
    scores: list[float], expected: list[float]
) -> None:
    assert standardise(torch.tensor(scores)).tolist() == expected


@given(st.floats(-1e3, 1e3, width=32), st.integers(1, 30))
@settings(deadline=None)
def test_equal_scores_become_zeros(value: float, size: int) -> None:
    assert standardise(torch.full((size,), value)).tolist() == [0.0] * size


@given(
    st.lists(st.integers(-99, 99), min_size=2, max_size=30, unique=True),
    st.integers(-50, 50),
    st.integers(1, 50),
)
@settings(deadline=None)
def test_standardised_scores_know_neither_shift_nor_scale(
    values: list[int], shift: int, scale: int
) -> None:
    scores = torch.tensor(values, dtype=torch.float64)
    standard = standardise(scores)
    torch.testing.assert_close(standardise(scores * scale + shift), standard)
    assert standard.mean().item() == pytest.approx(0, abs=1e-12)
    assert standard.std(unbiased=False).item() == pytest.approx(1)
    assert standard.argsort().tolist() == scores.argsort().tolist()


@pytest.mark.parametrize(
    ("weight", "expected"), [(0.0, [-1.0, 1.0]), (0.5, [-0.5, 0.5]), (2.0, [1.0, -1.0])]
)
def test_the_first_stage_is_added_by_its_weight(weight: float, expected: list[float]) -> None:
    scores, first_stage = torch.tensor([0.1, 0.3]), torch.tensor([25.0, 5.0])
    torch.testing.assert_close(fuse(scores, first_stage, weight), torch.tensor(expected))


def test_a_first_stage_without_opinion_changes_nothing() -> None:
    scores = torch.tensor([0.5, 0.25, 0.75])
    assert torch.equal(fuse(scores, torch.full((3,), 7.0), 3.0), standardise(scores))


def test_residuals_are_large_where_little_was_expected() -> None:
    attention = torch.tensor([[0.26, 0.02, 0.0]])
    null = torch.tensor([[0.25, 0.01, 0.0]])
    expected = [0.01 / (0.5 + 1e-5), 0.01 / (0.1 + 1e-5), 0.0]
    assert scoring.residuals(attention, null).tolist() == pytest.approx(expected)
    assert scoring.residuals(attention, None).tolist() == pytest.approx([0.26, 0.02, 0.0])


@pytest.mark.parametrize("drop_outliers", [True, False])
def test_a_document_without_tokens_gets_zero_and_spoils_no_other(drop_outliers: bool) -> None:
    attention = torch.tensor([[0.1, 0.2, 0.4]])
    spans = [Span(0, 2), Span(2, 2), Span(2, 3)]
    signals = document_signals(attention, None, spans, drop_outliers=drop_outliers)
    assert signals[0].tolist() == pytest.approx([0.3, 0.0, 0.4])
