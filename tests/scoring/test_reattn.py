"""Reweighting against dictionaries and loops, and the small sums by hand."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from routehead_plugins import Span
from routehead_plugins.errors import InputError
from routehead_plugins.scoring.reattn import (
    Reweighting,
    entropy_factors,
    idf_weights,
    reweighted_signals,
)
from routehead_plugins.scoring.token_scores import document_signals

NEITHER = Reweighting(idf=False, entropy=0)
IDF_ALONE = Reweighting(entropy=0)

# Few different tokens, so that query and documents share many.
ids = st.lists(st.integers(0, 12), max_size=10)
documents = st.lists(ids, min_size=1, max_size=6)
alphas = st.sampled_from([0.0, 0.25, 1.0, 3.0])


def looped_weight(token: int, query: list[int], texts: list[list[int]]) -> float:
    frequencies = {t: sum(t in text for text in texts) for text in texts for t in text}
    if token not in query:
        return 1.0
    return math.log((len(texts) + 1) / (frequencies[token] + 1)) / math.log(len(texts) + 1)


def looped_factor(scores: list[float], alpha: float) -> float:
    total = sum(score for score in scores if score > 0)
    if sum(scores) <= 0 or len(scores) == 1:
        return 1.0
    shares = [score / total for score in scores if score > 0]
    entropy = -sum(share * math.log(share) for share in shares) / math.log(len(scores))
    return 1 + alpha * entropy


def looped_signals(
    token_scores: Tensor,
    spans: list[Span],
    query: list[int],
    texts: list[list[int]],
    reweighting: Reweighting,
) -> list[list[float]]:
    table = []
    for row in token_scores.tolist():
        signals = []
        for span, text in zip(spans, texts, strict=True):
            scores = row[span.start : span.end]
            if reweighting.idf:
                weights = [looped_weight(token, query, texts) for token in text]
                scores = [w * s for w, s in zip(weights, scores, strict=True)]
            signals.append(looped_factor(scores, reweighting.entropy) * sum(scores))
        table.append(signals)
    return table


@st.composite
def prompts(draw: st.DrawFn) -> tuple[list[list[int]], list[Span], Tensor]:
    """Documents, where they stand in any order and with gaps, and scores of two heads."""
    texts = draw(documents)
    spans, end = {}, draw(st.integers(0, 3))
    for index in draw(st.permutations(range(len(texts)))):
        spans[index] = Span(end, end + len(texts[index]))
        end += len(texts[index]) + draw(st.integers(0, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scores = torch.randn(2, end, generator=generator, dtype=torch.float64).exp() / 100
    scores[torch.rand(2, end, generator=generator) < draw(st.sampled_from([0, 0.3, 0.9]))] *= -1
    scores[torch.rand(2, end, generator=generator) < 0.1] = 0  # outliers that were dropped
    return texts, [spans[index] for index in range(len(texts))], scores


# Tokens 7 and 8 are the query's; three documents hold 7, one holds 8, and 1 is not in the query.
QUERY = [7, 8, 9]
TEXTS = [[7, 8, 1, 8], [1, 7], [7]]


def test_a_token_of_the_query_in_every_document_weighs_nothing_and_one_in_a_third_weighs_half() -> (
    None
):
    assert idf_weights(QUERY, TEXTS).tolist() == [0.0, 0.5, 1.0, 0.5, 1.0, 0.0, 0.0]


def test_a_token_in_two_of_three_documents_weighs_by_the_formula() -> None:
    expected = math.log(4 / 3) / math.log(4)
    assert idf_weights([5], [[5], [5], [6]]).tolist() == pytest.approx([expected, expected, 1.0])


@pytest.mark.parametrize("count", [1, 2, 6, 48, 1000])
def test_a_token_in_every_document_weighs_exactly_nothing(count: int) -> None:
    assert idf_weights([3], [[3]] * count).tolist() == [0.0] * count


def test_repeating_a_token_in_query_or_document_changes_no_weight() -> None:
    assert idf_weights([8, 8, 8], [[8, 8], [1]]).tolist() == pytest.approx(
        [math.log(3 / 2) / math.log(3)] * 2 + [1.0]
    )


@given(ids, documents)
@settings(deadline=None)
def test_weights_equal_a_loop_over_tokens(query: list[int], texts: list[list[int]]) -> None:
    expected = [looped_weight(token, query, texts) for text in texts for token in text]
    weights = idf_weights(query, texts)
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx(expected, abs=1e-6)


@given(ids, documents)
@settings(deadline=None)
def test_weights_lie_between_nothing_and_one(query: list[int], texts: list[list[int]]) -> None:
    weights = idf_weights(query, texts)
    assert bool(((weights >= 0) & (weights <= 1)).all())


@given(ids, documents)
@settings(deadline=None)
def test_the_order_of_documents_does_not_matter_for_the_weights(
    query: list[int], texts: list[list[int]]
) -> None:
    forth = idf_weights(query, texts).split([len(text) for text in texts])
    back = idf_weights(query, texts[::-1]).split([len(text) for text in texts[::-1]])
    assert all(torch.equal(a, b) for a, b in zip(forth, back[::-1], strict=True))


@pytest.mark.parametrize("texts", [[], [[]], [[], [1, 2], []]])
def test_documents_without_tokens_have_no_weights(texts: list[list[int]]) -> None:
    assert idf_weights([4], texts).tolist() == [1.0] * sum(map(len, texts))


def test_a_query_without_tokens_leaves_every_weight_at_one() -> None:
    assert idf_weights([], TEXTS).tolist() == [1.0] * 7


def test_an_even_document_gains_alpha_and_one_token_alone_nothing() -> None:
    scores = torch.tensor([[0.25, 0.25, 0.25, 0.25, 0.0, 0.5, 0.0, 0.0]])
    factors = entropy_factors(scores, [Span(0, 4), Span(4, 8)], 0.5)
    assert factors.tolist() == [[1.5, 1.0]]


def test_half_of_the_tokens_carrying_all_gain_half() -> None:
    scores = torch.tensor([[0.1, 0.0, 0.1, 0.0]])
    assert entropy_factors(scores, [Span(0, 4)], 2.0).tolist() == [pytest.approx([2.0])]


@given(prompts(), alphas)
@settings(deadline=None)
def test_factors_equal_a_loop_over_tokens(
    drawn: tuple[list[list[int]], list[Span], Tensor], alpha: float
) -> None:
    _, spans, scores = drawn
    expected = [[looped_factor(row[a:b], alpha) for a, b in spans] for row in scores.tolist()]
    torch.testing.assert_close(
        entropy_factors(scores, spans, alpha), torch.tensor(expected, dtype=scores.dtype)
    )


@given(prompts(), alphas)
@settings(deadline=None)
def test_factors_lie_between_one_and_one_plus_alpha(
    drawn: tuple[list[list[int]], list[Span], Tensor], alpha: float
) -> None:
    _, spans, scores = drawn
    factors = entropy_factors(scores.float(), spans, alpha)
    assert bool(((factors > 1 - 1e-6) & (factors < 1 + alpha + 1e-5)).all())


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1.0, 1e8])
def test_factors_do_not_know_how_large_scores_are(scale: float) -> None:
    scores = torch.tensor([[0.1, 0.3, -0.1, 0.2, 0.9]])
    spans = [Span(0, 4), Span(4, 5)]
    torch.testing.assert_close(
        entropy_factors(scores * scale, spans, 1.0), entropy_factors(scores, spans, 1.0)
    )


@pytest.mark.parametrize(
    "scores",
    [[0.0, 0.0, 0.0], [-0.1, -0.2, -0.3], [0.1, 0.1, -0.5], [0.25, -0.25, 0.0]],
    ids=["zeros", "negative", "negative in sum", "zero in sum"],
)
def test_a_document_whose_sum_is_not_positive_is_left_as_it_is(scores: list[float]) -> None:
    row, span = torch.tensor([scores]), [Span(0, 3)]
    assert entropy_factors(row, span, 5.0).tolist() == [[1.0]]
    signals = reweighted_signals(row, span, [], [[1, 2, 3]], Reweighting(entropy=5.0))
    assert torch.equal(signals, document_signals(row, None, span, drop_outliers=False))


def test_documents_of_one_token_and_of_none_are_left_as_they_are() -> None:
    scores, spans = torch.tensor([[0.5, 0.2, -0.1]]), [Span(0, 1), Span(1, 1), Span(2, 3)]
    assert entropy_factors(scores, spans, 1.0).tolist() == [[1.0, 1.0, 1.0]]
    signals = reweighted_signals(scores, spans, [4], [[1], [], [2]], Reweighting())
    assert signals.tolist() == [pytest.approx([0.5, 0.0, -0.1])]


def test_negative_tokens_count_in_the_sum_and_have_no_share() -> None:
    scores = torch.tensor([[0.5, 0.5, -0.25, -0.25]])
    spans, texts = [Span(0, 4)], [[1, 2, 3, 4]]
    # Two even shares among four tokens: half of the highest entropy.
    assert reweighted_signals(scores, spans, [], texts, Reweighting()).tolist() == [[0.75]]


def test_both_halves_together_by_hand() -> None:
    scores = torch.tensor([[0.25, 0.5, 0.25, 0.5, 9.0, 0.5, 0.5, 0.125]])
    spans = [Span(0, 4), Span(5, 7), Span(7, 8)]
    signals = reweighted_signals(scores, spans, QUERY, TEXTS, Reweighting(entropy=0.5))
    # Weighted [0, 1/4, 1/4, 1/4], [1/2, 0] and [0]; entropies log 3 / log 4, 0 and 0.
    expected = [0.75 * (1 + 0.5 * math.log(3) / math.log(4)), 0.5, 0.0]
    assert signals.tolist() == [pytest.approx(expected)]


def test_a_single_document_loses_what_it_shares_with_the_query() -> None:
    scores, spans = torch.tensor([[0.25, 0.5]]), [Span(0, 2)]
    assert reweighted_signals(scores, spans, [7], [[7, 1]], Reweighting()).tolist() == [[0.5]]
    assert reweighted_signals(scores, spans, [7, 1], [[7, 1]], Reweighting()).tolist() == [[0.0]]


def test_idf_alone_by_hand() -> None:
    scores = torch.tensor([[0.25, 0.5, 0.25, 0.5, 0.5, 0.5, 0.125]])
    spans = [Span(0, 4), Span(4, 6), Span(6, 7)]
    assert reweighted_signals(scores, spans, QUERY, TEXTS, IDF_ALONE).tolist() == [[0.75, 0.5, 0.0]]


def test_entropy_alone_needs_no_tokens() -> None:
    scores, spans = torch.tensor([[0.25, 0.25, 0.5]]), [Span(0, 2), Span(2, 3)]
    signals = reweighted_signals(scores, spans, [], [], Reweighting(idf=False))
    assert signals.tolist() == [[1.0, 0.5]]


@given(prompts(), ids, st.booleans(), alphas)
@settings(deadline=None)
def test_signals_equal_a_loop_over_tokens(
    drawn: tuple[list[list[int]], list[Span], Tensor], query: list[int], idf: bool, alpha: float
) -> None:
    texts, spans, scores = drawn
    reweighting = Reweighting(idf=idf, entropy=alpha)
    signals = reweighted_signals(scores, spans, query, texts, reweighting)
    expected = looped_signals(scores, spans, query, texts, reweighting)
    torch.testing.assert_close(
        signals, torch.tensor(expected, dtype=scores.dtype), atol=1e-6, rtol=1e-6
    )


@given(prompts(), ids)
@settings(deadline=None)
def test_neither_half_is_the_plain_sum_to_the_last_bit(
    drawn: tuple[list[list[int]], list[Span], Tensor], query: list[int]
) -> None:
    texts, spans, scores = drawn
    scores = scores.float()
    signals = reweighted_signals(scores, spans, query, texts, NEITHER)
    assert torch.equal(signals, document_signals(scores, None, spans, drop_outliers=False))


@given(prompts(), alphas)
@settings(deadline=None)
def test_a_query_that_shares_no_token_makes_idf_change_nothing(
    drawn: tuple[list[list[int]], list[Span], Tensor], alpha: float
) -> None:
    texts, spans, scores = drawn
    signals = [
        reweighted_signals(scores, spans, [99], texts, Reweighting(idf=idf, entropy=alpha))
        for idf in (True, False)
    ]
    assert torch.equal(*signals)


@given(prompts(), ids, alphas)
@settings(deadline=None)
def test_no_signal_falls_below_the_documents_negative_tokens(
    drawn: tuple[list[list[int]], list[Span], Tensor], query: list[int], alpha: float
) -> None:
    texts, spans, scores = drawn
    signals = reweighted_signals(scores, spans, query, texts, Reweighting(entropy=alpha))
    lowest = document_signals(scores.clamp(max=0), None, spans, drop_outliers=False)
    assert bool((signals >= lowest - 1e-9).all())


def test_tokens_between_documents_count_for_none() -> None:
    scores, spans = torch.tensor([[9.0, 0.25, -9.0, 0.5, 9.0]]), [Span(3, 4), Span(1, 2)]
    signals = reweighted_signals(scores, spans, [3], [[1], [2]], Reweighting())
    assert signals.tolist() == [[0.5, 0.25]]


def test_heads_do_not_know_of_one_another() -> None:
    scores = torch.tensor([[0.25, 0.5, 0.25, 0.5], [-0.25, 0.5, 0.125, 0.0]])
    spans, texts = [Span(0, 2), Span(2, 4)], [[7, 1], [8, 1]]
    together = reweighted_signals(scores, spans, QUERY, texts, Reweighting())
    alone = [reweighted_signals(row[None], spans, QUERY, texts, Reweighting()) for row in scores]
    torch.testing.assert_close(together, torch.cat(alone))


def test_all_is_computed_on_the_device_of_the_scores() -> None:
    # The meta device refuses to be mixed with another, and every machine has it.
    scores, spans = torch.empty(2, 6, device="meta"), [Span(3, 6), Span(0, 3)]
    signals = reweighted_signals(scores, spans, [7], [[7, 1, 2], [7, 3, 4]], Reweighting())
    assert (signals.device.type, signals.dtype, signals.shape) == ("meta", scores.dtype, (2, 2))


def test_the_scores_given_are_left_as_they_were() -> None:
    scores = torch.tensor([[0.25, 0.5, -0.25]])
    copy = scores.clone()
    reweighted_signals(scores, [Span(0, 3)], [7], [[7, 1, 2]], Reweighting())
    assert torch.equal(scores, copy)


def test_ids_of_a_document_before_its_cut_are_refused() -> None:
    with pytest.raises(InputError) as error:
        reweighted_signals(
            torch.ones(1, 4), [Span(0, 2), Span(2, 4)], [1], [[1, 2], [1, 2, 3]], Reweighting()
        )
    assert str(error.value) == (
        "document_ids[1] has 3 tokens, but its span has 2; "
        "give the tokens that were read, after any cut."
    )


@pytest.mark.parametrize("entropy", [-0.5, math.nan, math.inf])
def test_a_weight_that_is_negative_or_no_number_is_refused(entropy: float) -> None:
    with pytest.raises(InputError, match=r"^entropy=.* must be a finite number, 0 or more\.$"):
        Reweighting(entropy=entropy)


def test_a_reweighting_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        Reweighting().idf = False  # type: ignore[misc]
