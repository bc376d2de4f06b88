"""Losses against their formulas, written out number by number."""

from __future__ import annotations

import math

import pytest
import torch

from routehead_plugins.alignment import losses

SCORES = [0.3, -1.2, 2.0, 0.1, 0.9]


def softmax(values: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in values)
    return [math.exp(value) / total for value in values]


def test_distillation_is_the_divergence_from_the_teacher() -> None:
    teacher = [0.9, 0.1, 0.4, 0.2, 0.3]
    wanted, given = softmax([value / 0.1 for value in teacher]), softmax(SCORES)
    expected = sum(p * math.log(p / q) for p, q in zip(wanted, given, strict=True))
    actual = losses.distillation(torch.tensor(SCORES), torch.tensor(teacher), 0.1)
    assert float(actual) == pytest.approx(expected, rel=1e-5)


def test_distillation_is_zero_for_a_perfect_student() -> None:
    teacher = torch.tensor([0.9, 0.1, 0.4])
    assert float(losses.distillation(teacher / 0.1 + 7, teacher, 0.1)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_preference_counts_adjacent_grades_and_the_hardest_pairs(share: float) -> None:
    grades = [3, 0, 1, 1, 0]
    margins = [
        SCORES[i] - SCORES[j]
        for i in range(5)
        for j in range(5)
        if (grades[i], grades[j]) in ((3, 1), (1, 0))  # 3 and 0 are not adjacent
    ]
    assert len(margins) == 6
    hardest = sorted(margins)[: max(1, math.ceil(share * 6))]
    expected = sum(math.log(1 + math.exp(-margin)) for margin in hardest) / len(hardest)
    actual = losses.preference(torch.tensor(SCORES), torch.tensor(grades), share)
    assert float(actual) == pytest.approx(expected, rel=1e-5)


def test_preference_is_zero_without_different_grades() -> None:
    scores = torch.tensor(SCORES, requires_grad=True)
    loss = losses.preference(scores, torch.ones(5), 1.0)
    loss.backward()
    assert float(loss.detach()) == 0


def spread(scores: list[float]) -> float:
    mean = sum(scores) / len(scores)
    deviation = math.sqrt(sum((s - mean) ** 2 for s in scores) / len(scores))
    standard = sorted((s - mean) / deviation for s in scores)
    quarter = len(scores) // 4
    middle = standard[quarter : len(scores) - quarter]
    centre = sum(middle) / len(middle)
    own = math.sqrt(sum((z - centre) ** 2 for z in middle) / len(middle))
    return max(0.0, 1 - own / 0.5) ** 2


@pytest.mark.parametrize(
    ("scores", "least", "most"),
    [
        ([5.0, 0.1, 0.0, 0.0, 0.1, -5.0, 0.05, 0.02], 0.8, 1.0),  # nearly equal in the middle
        ([float(number) for number in range(200)], 0.0, 1e-4),  # evenly spaced
        ([1.0, 1.0, -1.0, -1.0], 0.0, 0.0),  # further apart than that
    ],
)
def test_spread_punishes_a_middle_of_nearly_equal_scores(
    scores: list[float], least: float, most: float
) -> None:
    actual = float(losses.spread(torch.tensor(scores)))
    assert least <= actual <= most
    assert actual == pytest.approx(spread(scores), abs=1e-4)


def test_spread_has_finite_gradients_where_all_scores_are_equal() -> None:
    for count in (1, 3, 8):
        scores = torch.zeros(count, requires_grad=True)
        losses.spread(scores).backward()
        assert scores.grad is not None
        assert scores.grad.isfinite().all()


@pytest.mark.parametrize(
    ("shares", "expected"),
    [([0.25] * 4, 1.0), ([1.0, 0, 0, 0], 0.0), ([0.5, 0.5, 0, 0], 0.5), ([1.0], 0.0)],
)
def test_head_entropy_is_low_where_few_heads_are_chosen(
    shares: list[float], expected: float
) -> None:
    assert float(losses.head_entropy(torch.tensor(shares))) == pytest.approx(expected, abs=1e-5)


def test_attention_entropy_is_low_where_the_chosen_heads_tell_documents_apart() -> None:
    mass = torch.tensor([[0.1, 0.1, 0.1, 0.1], [0.2, 0.0, 0.0, 0.0]])
    for shares, expected in (([1.0, 0.0], 1.0), ([0.0, 1.0], 0.0), ([0.25, 0.75], 0.25)):
        actual = float(losses.attention_entropy(mass, torch.tensor(shares)))
        assert actual == pytest.approx(expected, abs=1e-5)
    assert float(losses.attention_entropy(mass[:, :1], torch.tensor([1.0, 0.0]))) == 0
