"""Features and weights of heads: those by which head sets are read at query time."""

from __future__ import annotations

import pytest
import torch

from routehead_plugins.alignment.head_weights import HeadWeights, features
from routehead_plugins.alignment.passes import Signals
from routehead_plugins.scoring.aggregation import aggregate
from routehead_plugins.scoring.aggregation import features as read_features


@pytest.fixture
def signals() -> Signals:
    generator = torch.Generator().manual_seed(0)
    mass, null = (torch.rand(3, 5, generator=generator) * 0.1 for _ in range(2))
    mass[0, 0] = 0  # raised to the least mass
    return Signals(mass, null)


@pytest.mark.parametrize(("kind", "how"), [("log", "log"), ("calibrated", "standardised")])
def test_standardised_features_are_those_of_the_readout(
    signals: Signals, kind: str, how: str
) -> None:
    expected = read_features(how, signals.calibrated, signals.mass)
    actual = features(signals, kind, standardise=True)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    weights = HeadWeights.equal("softmax", 3, torch.device("cpu"))
    scores = aggregate(how, signals.calibrated, signals.mass, weights.weights.detach())
    torch.testing.assert_close(weights.scores(actual).detach(), scores, atol=1e-4, rtol=0)


def test_features_that_are_not_standardised_are_centred(signals: Signals) -> None:
    table = features(signals, "log", standardise=False)
    torch.testing.assert_close(table.mean(dim=1), torch.zeros(3), atol=1e-5, rtol=0)
    ratio = torch.log(signals.mass[1, 0] / signals.mass[1, 1])
    torch.testing.assert_close(table[1, 0] - table[1, 1], ratio)


def test_equal_signals_have_finite_gradients() -> None:
    mass = torch.full((2, 4), 0.1, requires_grad=True)
    features(Signals(mass, None), "log", standardise=True).square().sum().backward()
    assert mass.grad is not None
    assert mass.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["softmax", "signed"])
def test_weights_begin_equal_and_sum_to_one(kind: str) -> None:
    weights = HeadWeights.equal(kind, 4, torch.device("cpu"))
    torch.testing.assert_close(weights.weights.detach(), torch.full((4,), 0.25))
    torch.testing.assert_close(weights.shares.detach(), torch.full((4,), 0.25))
    larger = HeadWeights.equal(kind, 4, torch.device("cpu"), 8.0)
    torch.testing.assert_close(larger.weights.detach(), torch.full((4,), 2.0))


def test_signed_weights_may_be_negative_and_their_shares_are_not() -> None:
    weights = HeadWeights.equal("signed", 2, torch.device("cpu"))
    with torch.no_grad():
        weights.logits.copy_(torch.tensor([-3.0, 1.0]))
        weights.log_scale.fill_(1.0)
    assert weights.weights.tolist() == pytest.approx([-3 * 2.71828, 2.71828], rel=1e-4)
    assert weights.shares.tolist() == pytest.approx([0.75, 0.25])
