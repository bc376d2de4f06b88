"""Losses of the correction against slow loops, and its gradient descent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from tables import query_signals, signal_set
from torch import Tensor

from routehead_plugins.scoring import features, standardise
from routehead_plugins.signals import QuerySignals
from routehead_plugins.training.correction import Loss, cross_entropy, learn, listwise

SIGNALS = signal_set(queries=5, documents=(2, 7), layers=2, grades=3)
QUERIES, HEADS = SIGNALS.queries, len(SIGNALS.heads)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow_listwise(
    queries: Sequence[QuerySignals],
    how: str,
    weight: float | None,
    strength: float,
    bias: Tensor,
    correction: Tensor,
) -> float:
    """Query by query, head by head, document by document, in float64."""
    losses = []
    for query, added in zip(queries, correction.tolist(), strict=True):
        table = features(how, query.calibrated.double(), query.mass.double()).tolist()
        retrieval = standardise(query.first_stage.double()).tolist()
        weights = [fixed + more for fixed, more in zip(bias.tolist(), added, strict=True)]
        scores = [
            sum(w * row[index] for w, row in zip(weights, table, strict=True))
            + (weight or 0.0) * retrieval[index]
            for index in range(len(query.gains))
        ]
        gains = [max(gain, 0.0) for gain in query.gains.tolist()]
        whole = math.log(sum(math.exp(score) for score in scores))
        loss = -sum(g / sum(gains) * (s - whole) for g, s in zip(gains, scores, strict=True))
        losses.append(loss + strength * sum(more**2 for more in added))
    return math.fsum(losses) / len(losses)


@pytest.mark.parametrize("how", ["standardised", "log", "mean"])
@pytest.mark.parametrize(("weight", "strength"), [(None, 0.0), (0.0, 0.3), (0.7, 0.0), (0.7, 0.3)])
def test_the_listwise_loss_is_that_of_a_slow_loop(
    how: str, weight: float | None, strength: float
) -> None:
    assert len({len(query.gains) for query in QUERIES}) > 1
    spam = QUERIES[0].gains.clone()
    spam[QUERIES[0].gains.argmin()] = -2.0  # as some collections judge
    queries = [replace(QUERIES[0], gains=spam), *QUERIES[1:]]
    bias, correction = random(HEADS, seed=1), random(len(queries), HEADS, seed=2)
    loss = listwise(queries, how, weight, strength)(bias, correction)
    expected = slow_listwise(queries, how, weight, strength, bias, correction)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_slopes_of_the_listwise_loss_are_finite_differences_of_the_slow_one() -> None:
    bias, correction = random(HEADS, seed=1), random(len(QUERIES), HEADS, seed=2).requires_grad_()
    torch.autograd.backward(listwise(QUERIES, "standardised", 0.7, 0.3)(bias, correction))
    assert correction.grad is not None
    point = correction.detach().double()
    for index in ((0, 0), (1, 3), (4, HEADS - 1)):
        moved = []
        for step in (1e-5, -1e-5):
            there = point.clone()
            there[index] += step
            moved.append(slow_listwise(QUERIES, "standardised", 0.7, 0.3, bias, there))
        slope = (moved[0] - moved[1]) / 2e-5
        assert abs(slope) > 1e-3
        assert float(correction.grad[index]) == pytest.approx(slope, abs=1e-5)


def test_a_query_with_nothing_relevant_asks_for_nothing() -> None:
    useless = query_signals(QUERIES[0].calibrated[:, :2], [0.0, -1.0])
    assert useless.has_contrast
    bias, correction = random(HEADS, seed=1), random(2, HEADS, seed=2).requires_grad_()
    loss = listwise([useless, QUERIES[1]], "standardised", None, 0.0)(bias, correction)
    alone = listwise([QUERIES[1]], "standardised", None, 0.0)(bias, correction[1:])
    assert float(loss.detach()) == pytest.approx(float(alone.detach()) / 2, rel=1e-5)
    torch.autograd.backward(loss)
    assert correction.grad is not None
    assert not correction.grad[0].any()
    assert correction.grad[1].any()


@pytest.mark.parametrize("strength", [0.0, 0.4])
def test_the_cross_entropy_is_that_of_a_slow_loop(strength: float) -> None:
    gates = random(4, HEADS, seed=3) > 0.5
    bias, correction = random(HEADS, seed=1), random(4, HEADS, seed=2)
    entropies, means = [], []
    for labels, added in zip(gates.tolist(), correction.tolist(), strict=True):
        for label, fixed, more in zip(labels, bias.tolist(), added, strict=True):
            gate = 1 / (1 + math.exp(-fixed - more))
            entropies.append(-math.log(gate if label else 1 - gate))
            means.append(gate)
    expected = (sum(entropies) + strength * sum(means)) / (4 * HEADS)
    loss = cross_entropy(gates, strength)(bias, correction)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


# the descent

POINTS = torch.nn.functional.normalize(random(len(QUERIES), 3, seed=4))
BIAS = random(HEADS, seed=1)


def losses(strength: float = 0.0) -> list[Loss]:
    gates = random(len(QUERIES), HEADS, seed=3) > 0.5
    return [cross_entropy(gates, strength), listwise(QUERIES, "standardised", 0.5, strength)]


@pytest.mark.parametrize("kind", [0, 1])
def test_the_descent_starts_without_a_correction_and_lowers_the_loss(kind: int) -> None:
    loss, corrections, biases = losses()[kind], [], []

    def recorded(bias: Tensor, correction: Tensor) -> Tensor:
        corrections.append(correction.detach().clone())
        biases.append(bias.clone())
        return loss(bias, correction)

    projection, embeddings = learn(recorded, POINTS, BIAS, 2, seed=5)
    assert (projection.shape, embeddings.shape) == ((2, 3), (HEADS, 2))
    assert not projection.requires_grad
    assert not embeddings.requires_grad
    assert not corrections[0].any()
    assert corrections[1].any()
    assert all(torch.equal(bias, BIAS) for bias in biases)
    learned = POINTS @ projection.T @ embeddings.T / math.sqrt(2)  # as routers have it
    start, end = (float(loss(BIAS, correction)) for correction in (corrections[0], learned))
    assert end < 0.9 * start
    torch.testing.assert_close(learned, corrections[-1], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("kind", [0, 1])
def test_the_same_seed_learns_the_same_and_another_one_starts_elsewhere(kind: int) -> None:
    first, second, other = (learn(losses()[kind], POINTS, BIAS, 2, seed) for seed in (5, 5, 6))
    for one, two, three in zip(first, second, other, strict=True):
        assert torch.equal(one, two)
        assert not torch.allclose(one, three, atol=0.1)


def test_a_penalty_keeps_the_listwise_correction_small() -> None:
    sizes = []
    for strength in (0.0, 0.3, 30.0):
        projection, embeddings = learn(losses(strength)[1], POINTS, BIAS, 2, seed=5)
        sizes.append(float((POINTS @ projection.T @ embeddings.T).square().mean()))
    assert sizes[0] > 3 * sizes[1] > 0
    assert sizes[1] > 30 * sizes[2]
