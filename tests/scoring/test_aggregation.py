"""Aggregations against loops over heads and documents, and small sums by hand."""

from __future__ import annotations

import math
from statistics import fmean, pstdev

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from routehead_plugins.errors import InputError
from routehead_plugins.heads import AGGREGATIONS
from routehead_plugins.scoring.aggregation import COMPARABLE, aggregate, features
from routehead_plugins.scoring.token_scores import standardise

CALIBRATED = torch.tensor([[0.1, -0.2, 0.4], [0.3, 0.3, 0.3], [-0.5, 0.0, 0.5]])
MASS = torch.tensor([[0.2, 0.1, 0.5], [0.3, 0.3, 0.3], [0.0, 1e-12, 0.6]])
HOWS = ("mean", "standardised", "log")
HOWS_COMPARABLE = ["standardised", "log"]


def random_signals(seed: int, heads: int = 4, documents: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mass = torch.rand(heads, documents, generator=generator, dtype=torch.float64)
    mass[1] = 0.25  # a head that gives all documents the same
    null = torch.rand(heads, documents, generator=generator, dtype=torch.float64)
    null[1] = 0.125
    return mass - null, mass


def looped(how: str, calibrated: Tensor, mass: Tensor, weights: list[float] | None) -> list[float]:
    heads, documents = calibrated.shape
    if weights is None:
        weights = [1 / heads] * heads
    scores = [0.0] * documents
    for head in range(heads):
        row = calibrated[head].tolist()
        if how == "log":
            row = [math.log(max(value, 1e-9)) for value in mass[head].tolist()]
        if how in ("standardised", "log"):
            mean, deviation = fmean(row), pstdev(row)
            row = [(value - mean) / deviation if deviation > 1e-15 else 0.0 for value in row]
        for document in range(documents):
            scores[document] += weights[head] * row[document]
    return scores


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("weights", [None, [0.5, 2.0, -1.5, 0.0]], ids=["equal", "signed"])
@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_a_loop_over_heads_and_documents(
    how: str, weights: list[float] | None, seed: int
) -> None:
    calibrated, mass = random_signals(seed)
    scores = aggregate(how, calibrated, mass, weights)
    assert scores.tolist() == pytest.approx(looped(how, calibrated, mass, weights), abs=1e-12)


@pytest.mark.parametrize("how", HOWS)
def test_scores_are_weighted_sums_of_the_features(how: str) -> None:
    calibrated, mass = random_signals(7)
    weights = torch.tensor([0.3, -1.0, 0.0, 2.0], dtype=torch.float64)
    table = features(how, calibrated, mass)
    assert table.shape == calibrated.shape
    torch.testing.assert_close(aggregate(how, calibrated, mass, weights), weights @ table)


def test_the_mean_of_calibrated_signals_by_hand() -> None:
    assert aggregate("mean", CALIBRATED, MASS).tolist() == pytest.approx([-0.1 / 3, 0.1 / 3, 0.4])
    assert aggregate("mean", CALIBRATED, MASS, [1, 0, -1]).tolist() == pytest.approx(
        [0.6, -0.2, -0.1]
    )


def test_a_head_that_gives_all_documents_the_same_has_no_effect() -> None:
    for how in ("standardised", "log"):
        assert features(how, CALIBRATED, MASS)[1].tolist() == [0.0, 0.0, 0.0]


def test_attention_below_the_floor_is_all_the_same() -> None:
    row = features("log", CALIBRATED, MASS)[2]
    assert row[0] == row[1]
    assert row.tolist() == pytest.approx([-math.sqrt(0.5), -math.sqrt(0.5), math.sqrt(2)])


def test_constant_factors_of_a_head_cancel_in_the_logarithm() -> None:
    calibrated, mass = random_signals(3)
    factors = torch.tensor([[0.1], [1.0], [3.0], [0.5]], dtype=torch.float64)
    torch.testing.assert_close(
        features("log", calibrated, mass * factors), features("log", calibrated, mass)
    )


@given(
    st.lists(st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=3), min_size=1, max_size=4)
)
@settings(deadline=None)
def test_every_head_is_standardised_on_its_own(rows: list[list[float]]) -> None:
    signals = torch.tensor(rows)
    expected = torch.stack([standardise(row) for row in signals])
    torch.testing.assert_close(features("standardised", signals, signals), expected)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_head_whose_signals_are_not_finite_stays_visible(broken: float) -> None:
    signals = MASS.clone()
    signals[0, 1] = broken
    for how in ("standardised", "log"):
        table = features(how, signals, signals)
        assert table.isnan().all(dim=1).tolist() == [True, False, False]
        assert aggregate(how, signals, signals).isnan().all()


@pytest.mark.parametrize("how", HOWS)
def test_no_documents_have_no_scores_and_one_document_has_one(how: str) -> None:
    assert aggregate(how, torch.empty(2, 0), torch.empty(2, 0)).shape == (0,)
    one = aggregate(how, torch.tensor([[0.25]]), torch.tensor([[0.5]]))
    assert one.tolist() == [0.25 if how == "mean" else 0.0]


def test_signals_are_left_as_they_are() -> None:
    calibrated, mass = CALIBRATED.clone(), MASS.clone()
    for how in HOWS:
        aggregate(how, calibrated, mass)
    assert calibrated.equal(CALIBRATED)
    assert mass.equal(MASS)


def test_head_sets_record_every_aggregation() -> None:
    assert set(HOWS) == set(AGGREGATIONS)
    assert list(COMPARABLE) == HOWS_COMPARABLE


def test_an_unknown_aggregation_is_refused_with_those_there_are() -> None:
    with pytest.raises(InputError) as error:
        aggregate("median", CALIBRATED, MASS)
    assert str(error.value) == (
        "aggregation='median' does not exist; choose one of mean, standardised, log."
    )


def test_shapes_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(InputError) as error:
        aggregate("mean", CALIBRATED, MASS, [1.0, 2.0])
    assert str(error.value) == "weights have shape (2,) for 3 heads; give one weight per head."
    with pytest.raises(InputError, match=r"^calibrated has shape \(3, 3\) and mass \(2, 3\); "):
        features("log", CALIBRATED, MASS[:2])
