"""Attention to scores: which steps are taken for which recipe, and fusion as it was fitted."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from routehead_plugins import Recipe
from routehead_plugins.data import Span
from routehead_plugins.errors import InputError
from routehead_plugins.scoring import TokenAttention
from routehead_plugins.scoring.aggregation import aggregate
from routehead_plugins.scoring.readout import Readout
from routehead_plugins.scoring.reattn import Reweighting, reweighted_signals
from routehead_plugins.scoring.token_scores import document_signals, standardise, token_scores

PLAIN = Recipe()
SPANS = (Span(1, 5), Span(6, 9), Span(9, 12))
IDS = ((1, 2, 3, 4), (5, 2, 6), (7, 8, 9))


def token_attention(seed: int, *, null: bool = True) -> TokenAttention:
    draw = torch.Generator().manual_seed(seed)
    query, empty = (torch.rand(3, 12, generator=draw).softmax(dim=1) for _ in range(2))
    return TokenAttention(query, empty if null else None, SPANS, (2, 3), IDS)


NONE = (None, None, None)


@given(st.integers(0, 10**6), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=30)
def test_plain_heads_are_averaged_before_outliers_are_dropped(
    seed: int, null: bool, drop: bool
) -> None:
    attention = token_attention(seed, null=null)
    mean_null = None if attention.null is None else attention.null.mean(dim=0)[None]
    expected = document_signals(
        attention.query.mean(dim=0)[None], mean_null, SPANS, drop_outliers=drop
    )
    scores = Readout(drop_outliers=drop).scores(attention, PLAIN, NONE)
    torch.testing.assert_close(scores, expected[0], atol=1e-7, rtol=0)


@pytest.mark.parametrize("aggregation", ["mean", "standardised", "log"])
@pytest.mark.parametrize("weights", [None, (0.5, -2.0, 0.1)])
def test_heads_with_an_aggregation_are_aggregated_signal_by_signal(
    aggregation: str, weights: tuple[float, ...] | None
) -> None:
    attention = token_attention(1)
    recipe = Recipe(aggregation=aggregation, weights=weights)
    calibrated = document_signals(attention.query, attention.null, SPANS)
    mass = document_signals(attention.query, None, SPANS, drop_outliers=False)
    expected = aggregate(aggregation, calibrated, mass, weights)
    torch.testing.assert_close(
        Readout().scores(attention, recipe, NONE), expected, atol=1e-6, rtol=0
    )


def test_weights_without_an_aggregation_weigh_the_signals_themselves() -> None:
    attention = token_attention(2)
    recipe = Recipe(weights=(1.0, 0.0, -1.0))
    calibrated = document_signals(attention.query, attention.null, SPANS)
    torch.testing.assert_close(
        Readout().scores(attention, recipe, NONE), calibrated[0] - calibrated[2]
    )


def test_a_fitted_first_stage_is_added_to_the_weighted_sum_in_its_own_scale() -> None:
    attention, retrieval = token_attention(3), (3.0, 1.0, 7.0)
    recipe = Recipe(weights=(1.0, 2.0, 3.0), aggregation="standardised", first_stage_weight=0.5)
    bare = Readout(first_stage_weight=0.0).scores(attention, recipe, retrieval)
    z = standardise(torch.tensor(retrieval))
    torch.testing.assert_close(Readout().scores(attention, recipe, retrieval), bare + 0.5 * z)
    # A weight given by the caller adds two standardised sides.
    own = Readout(first_stage_weight=2.0).scores(attention, recipe, retrieval)
    torch.testing.assert_close(own, standardise(bare) + 2.0 * z)


def test_a_fitted_first_stage_of_plain_heads_is_between_two_standardised_sides() -> None:
    attention, retrieval = token_attention(4), (3.0, 1.0, 7.0)
    fitted = Recipe(first_stage_weight=0.5)
    expected = Readout(first_stage_weight=0.5).scores(attention, PLAIN, retrieval)
    torch.testing.assert_close(Readout().scores(attention, fitted, retrieval), expected)
    plain = Readout().scores(attention, PLAIN, NONE)
    torch.testing.assert_close(
        expected, standardise(plain) + 0.5 * standardise(torch.tensor(retrieval))
    )


@pytest.mark.parametrize("weight", [None, 0.7])
@pytest.mark.parametrize("scale", [1e20, 1e39, 1e300])
def test_retrieval_scores_too_large_for_float32_count_like_small_ones(
    scale: float, weight: float | None
) -> None:
    attention = token_attention(7)
    recipe = Recipe(weights=(1.0, 2.0, 3.0), aggregation="log", first_stage_weight=0.5)
    readout = Readout(first_stage_weight=weight)
    small = readout.scores(attention, recipe, (3.0, 1.0, 7.0))
    large = readout.scores(attention, recipe, (3.0 * scale, scale, 7.0 * scale))
    torch.testing.assert_close(large, small)
    assert not torch.allclose(
        large, Readout(first_stage_weight=0.0).scores(attention, recipe, NONE)
    )


@pytest.mark.parametrize("missing", [None, math.nan, math.inf])
def test_without_a_score_on_every_document_the_first_stage_is_left_out(
    missing: float | None,
) -> None:
    attention = token_attention(5)
    plain = Readout().scores(attention, PLAIN, NONE)
    assert torch.equal(
        Readout(first_stage_weight=1.0).scores(attention, PLAIN, (1.0, missing, 2.0)), plain
    )


@pytest.mark.parametrize("recipe", [PLAIN, Recipe(aggregation="log")], ids=["plain", "log"])
def test_token_weights_compose_with_any_recipe(recipe: Recipe) -> None:
    attention, weights = token_attention(6), Reweighting(entropy=0.7)
    scores = Readout(reweighting=weights).scores(attention, recipe, NONE)
    assert not torch.allclose(scores, Readout().scores(attention, recipe, NONE))
    if recipe.aggregation is None:
        assert attention.null is not None
        tokens = token_scores(attention.query.mean(0)[None], attention.null.mean(0)[None], SPANS)
        expected = reweighted_signals(tokens, SPANS, (2, 3), IDS, weights)[0]
        torch.testing.assert_close(scores, expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_an_invalid_weight_is_refused(weight: float) -> None:
    with pytest.raises(InputError) as error:
        Readout(first_stage_weight=weight)
    assert str(error.value) == f"first_stage_weight={weight!r} must be a finite number, 0 or more."
