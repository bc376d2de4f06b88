"""Labels are chosen by what they are worth on documents they were not searched on."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tables import query_signals, table

from routehead_plugins import HeadSet
from routehead_plugins.signals import SignalSet
from routehead_plugins.training import reliability as module
from routehead_plugins.training.pseudo_labels import LabelOptions, Reliability, label_reliability
from routehead_plugins.training.reliability import LabelChoice, choose_labels, label_choices

HEADS = HeadSet([(0, 0), (0, 1), (1, 0), (1, 1)], model="tiny")
FEW = LabelOptions(candidates=4, max_heads=2)


def drawn(queries: int, relevant: int) -> SignalSet:
    """The first head knows the relevant documents; what the others say is noise."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(queries):
        gains = torch.zeros(12)
        gains[torch.randperm(12, generator=generator)[:relevant]] = 1
        signal = torch.randn(4, 12, generator=generator)
        signal[0] += 2 * gains
        found.append(query_signals(signal, gains.tolist(), query_id=f"q{number}"))
    return table(found, HEADS)


def test_every_utility_is_tried_with_and_without_shrinkage() -> None:
    choices = label_choices(LabelOptions(candidates=7, groups=2, seed=3))
    assert [(each.utility, each.shrinkage) for each in choices] == [
        ("ndcg", 0.0),
        ("ndcg", 0.5),
        ("correlation", 0.0),
        ("correlation", 0.5),
        ("margin", 0.0),
        ("margin", 0.5),
    ]
    assert {(each.candidates, each.groups, each.seed) for each in choices} == {(7, 2, 3)}


def test_what_keeps_most_is_chosen() -> None:
    signals, choices = drawn(12, 4), label_choices(FEW)
    kept = [label_reliability(signals, each).kept for each in choices]
    assert len(set(kept)) > 1
    found = choose_labels(signals, torch.zeros(12, 2), choices)
    assert found.options == choices[kept.index(max(kept))]
    assert found.reliability is not None
    assert found.reliability.kept == max(kept)


def test_of_a_single_choice_the_reliability_is_measured() -> None:
    signals = drawn(6, 4)
    found = choose_labels(signals, torch.zeros(6, 2), [FEW])
    assert found == LabelChoice(FEW, label_reliability(signals, FEW))


def test_where_nothing_can_be_halved_the_first_is_taken() -> None:
    found = choose_labels(drawn(6, 1), torch.zeros(6, 2), label_choices(FEW))
    assert found == LabelChoice(FEW, None)
    assert found.to_dict() == {"utility": "ndcg", "shrinkage": 0.0, "groups": None}


def test_a_choice_is_written_down_with_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = Reliability(found=0.98765, kept=0.8, static=0.81, chance=0.7, queries=9)

    def chosen(
        _: SignalSet, choices: Sequence[LabelOptions], **__: object
    ) -> tuple[LabelOptions, list[Reliability]]:
        return choices[0], [figures]

    monkeypatch.setattr(module, "most_reliable", chosen)
    found = choose_labels(drawn(2, 4), torch.zeros(2, 2), [FEW])
    assert found.to_dict() == {
        "utility": "ndcg",
        "shrinkage": 0.0,
        "groups": None,
        "found": 0.9877,
        "kept": 0.8,
        "static": 0.81,
        "chance": 0.7,
        "queries": 9,
    }
