"""Scoring against a loop over tokens, and the small sums by hand."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from routehead_plugins import Head, Span
from routehead_plugins.scoring.token_scores import document_signals, fuse, residuals, standardise

HEADS = 3


@st.composite
def spans(draw: st.DrawFn) -> tuple[list[Span], int]:
    """Spans that do not overlap, in any order, with or without gaps; and the number of tokens."""
    drawn, end = [], draw(st.integers(0, 3))
    for size in draw(st.lists(st.integers(1, 12), min_size=1, max_size=5)):
        drawn.append(Span(end, end + size))
        end += size + draw(st.integers(0, 2))
    return draw(st.permutations(drawn)), end


def random_attention(seed: int, tokens: int) -> Tensor:
    """Skewed rows that sum to one, as attention has them; a few tokens are far below the rest."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(HEADS, tokens, generator=generator, dtype=torch.float64)
    scores[torch.rand(HEADS, tokens, generator=generator) < 0.1] -= 6
    return scores.softmax(dim=-1)


def looped(attention: Tensor, null: Tensor | None, documents: list[Span], *, drop: bool) -> Tensor:
    table = reference.signals(
        attention[None],
        None if null is None else null[None],
        list(documents),
        [Head(0, index) for index in range(len(attention))],
        drop_outliers=drop,
    )
    return torch.tensor(table, dtype=attention.dtype)


def assert_no_near_ties(tokens: Tensor, documents: list[Span]) -> None:
    """Two sums in another order may disagree about a token that lies on the very threshold."""
    for start, end in documents:
        inside = tokens[:, start:end]
        if end - start > 1:
            floor = inside.mean(dim=1, keepdim=True) - 2 * inside.std(dim=1, keepdim=True)
            assume(bool(((inside - floor).abs() > 1e-12).all()))


@given(spans(), st.integers(0, 2**31), st.booleans(), st.booleans())
@settings(deadline=None)
def test_signals_equal_a_loop_over_tokens(
    drawn: tuple[list[Span], int], seed: int, calibrate: bool, drop: bool
) -> None:
    documents, tokens = drawn
    attention = random_attention(seed, tokens)
    null = random_attention(seed + 1, tokens) if calibrate else None
    assert_no_near_ties(attention if null is None else attention - null, documents)
    signals = document_signals(attention, null, documents, drop_outliers=drop)
    expected = looped(attention, null, documents, drop=drop)
    torch.testing.assert_close(signals, expected, atol=1e-12, rtol=0)


@given(spans(), st.sampled_from([0.0, 0.25, -0.125, 0.1]))
@settings(deadline=None)
def test_documents_whose_tokens_are_all_equal_keep_every_token(
    drawn: tuple[list[Span], int], value: float
) -> None:
    documents, tokens = drawn
    signals = document_signals(torch.full((HEADS, tokens), value), None, documents)
    sums = torch.tensor([value * span.size for span in documents]).expand(HEADS, -1)
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


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_row_with_a_score_that_is_not_finite_becomes_zeros_or_what_is_wanted(
    broken: float,
) -> None:
    scores = torch.tensor([[1.0, broken, 3.0], [1.0, 1.0, 4.0], [broken, broken, broken]])
    for row in (0, 2):
        assert standardise(scores[row]).tolist() == [0.0] * 3
        assert standardise(scores)[row].tolist() == [0.0] * 3
        assert standardise(scores, not_finite=math.nan)[row].isnan().all()
    assert torch.equal(standardise(scores)[1], standardise(scores[1]))


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e20, 1e155, 1e300])
def test_scores_of_any_size_are_standardised_alike(scale: float) -> None:
    scores = torch.tensor([1.0, 5.0, -2.0, 5.5], dtype=torch.float64)
    torch.testing.assert_close(standardise(scores * scale), standardise(scores))


def test_an_outlier_of_any_size_lies_as_far_away_as_z_scores_can() -> None:
    scores = torch.tensor([3.0, 2.0, -1e30, 1.0], dtype=torch.float64)
    expected = torch.tensor([1, 1, -3, 1], dtype=torch.float64) / math.sqrt(3)
    torch.testing.assert_close(standardise(scores), expected)


def one_row(scores: Tensor) -> Tensor:
    """The formula for one row, in float64."""
    if bool((scores == scores[0]).all()):
        return torch.zeros_like(scores)
    centred = scores.double() - scores.double().mean()
    return (centred / centred.square().mean().sqrt()).to(scores.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("documents", [1, 2, 7, 20, 100])
@pytest.mark.parametrize("seed", range(4))
def test_rows_are_standardised_alike_in_any_shape(
    dtype: torch.dtype, documents: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, 3, documents, generator=generator).to(dtype)
    scores[0, 1] = scores[0, 1, 0]
    expected = torch.stack([one_row(row) for row in scores.flatten(0, 1)])
    for shaped in (scores, scores.flatten(0, 1)):
        batch = standardise(shaped)
        assert (batch.shape, batch.dtype) == (shaped.shape, dtype)
        torch.testing.assert_close(batch.flatten(0, -2), expected)
    alone = torch.stack([standardise(row) for row in scores.flatten(0, 1)])
    assert torch.equal(alone, batch.flatten(0, -2))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3), (2, 0, 4)])
def test_no_scores_stay_no_scores(shape: tuple[int, ...]) -> None:
    assert standardise(torch.empty(shape)).shape == shape


@given(
    st.lists(st.integers(-99, 99), min_size=2, max_size=30, unique=True),
    st.integers(-50, 50),
    st.integers(1, 50),
)
@settings(deadline=None)
def test_standardised_scores_depend_on_neither_shift_nor_scale(
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


def test_an_all_equal_first_stage_changes_nothing() -> None:
    scores = torch.tensor([0.5, 0.25, 0.75])
    assert torch.equal(fuse(scores, torch.full((3,), 7.0), 3.0), standardise(scores))


def test_residuals_are_large_where_little_was_expected() -> None:
    attention = torch.tensor([[0.26, 0.02, 0.0]])
    null = torch.tensor([[0.25, 0.01, 0.0]])
    expected = [0.01 / (0.5 + 1e-5), 0.01 / (0.1 + 1e-5), 0.0]
    assert residuals(attention, null).tolist() == pytest.approx(expected)
    assert residuals(attention, None).tolist() == pytest.approx([0.26, 0.02, 0.0])


@pytest.mark.parametrize("drop_outliers", [True, False])
def test_a_document_without_tokens_gets_zero_and_spoils_no_other(drop_outliers: bool) -> None:
    attention = torch.tensor([[0.1, 0.2, 0.4]])
    spans = [Span(0, 2), Span(2, 2), Span(2, 3)]
    signals = document_signals(attention, None, spans, drop_outliers=drop_outliers)
    assert signals[0].tolist() == pytest.approx([0.3, 0.0, 0.4])


def test_a_document_is_summed_alike_whatever_stands_beside_it() -> None:
    attention, null = random_attention(2, 40).float(), random_attention(3, 40).float()
    alone = document_signals(attention, null, [Span(7, 19)])
    among = document_signals(attention, null, [Span(20, 40), Span(7, 19), Span(0, 6)])
    assert torch.equal(among[:, 1:2], alone)


def test_fusion_keeps_scores_that_are_not_finite_visible() -> None:
    scores = torch.tensor([0.5, math.nan, 0.75])
    assert fuse(scores, torch.tensor([1.0, 2.0, 3.0]), 1.0).isnan().all()
