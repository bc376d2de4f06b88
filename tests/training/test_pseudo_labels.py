"""Pseudo-labels and their reliability: a search in plain Python, planted heads, and noise."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import PLANTED, query_signals, signal_set, table
from torch import Tensor

from routehead_plugins import Head, HeadSet
from routehead_plugins.errors import InputError, MissingExtraError
from routehead_plugins.scoring import aggregate, standardise
from routehead_plugins.signals import QuerySignals, SignalSet, measures
from routehead_plugins.training import head_search
from routehead_plugins.training.detection import detect, single_head_ndcg
from routehead_plugins.training.head_search import UTILITIES, LabelOptions, measure
from routehead_plugins.training.pseudo_labels import (
    LabelChoice,
    Labels,
    Reliability,
    choose_labels,
    label_choices,
    label_reliability,
    pseudo_labels,
)

UNHURRIED = settings(deadline=None, max_examples=40)
EQUAL = 1e-9  # what differs by less is equal


def one_by_one(name: str, scores: Tensor, query: QuerySignals) -> Tensor:
    """The utility of each row of scores by the functions for one query."""
    if name == "ndcg":
        return measures.ndcg(scores, query.gains, query.ideal_gains)
    return getattr(measures, name)(scores, query.gains)  # type: ignore[no-any-return]


# The obvious way: one query, one move and one document at a time.


def slow_standardised(row: Sequence[float]) -> list[float]:
    if len(set(row)) == 1:
        return [0.0] * len(row)
    mean = math.fsum(row) / len(row)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in row) / len(row))
    return [(value - mean) / deviation for value in row]


def slow_scores(rows: Sequence[Sequence[float]]) -> list[float]:
    # Rounded, so that the order in which heads are added does not decide about ties.
    columns = zip(*(slow_standardised(row) for row in rows), strict=True)
    return [round(math.fsum(column), 10) / len(rows) for column in columns]


def slow_ndcg(scores: Sequence[float], query: QuerySignals) -> float:
    gains = query.gains.tolist()
    ranked = [gains[index] for index in sorted(range(len(gains)), key=lambda i: -scores[i])]
    dcg, ideal = (
        math.fsum(max(gain, 0.0) / math.log2(rank + 2) for rank, gain in enumerate(order[:10]))
        for order in (ranked, sorted(query.ideal_gains.tolist(), reverse=True))
    )
    return dcg / ideal if ideal else 0.0


def slow_reciprocal_rank(scores: Sequence[float], query: QuerySignals) -> float:
    gains = query.gains.tolist()
    order = sorted(range(len(gains)), key=lambda i: -scores[i])
    return next((1 / rank for rank, i in enumerate(order, start=1) if gains[i] > 0), 0.0)


def slow_correlation(scores: Sequence[float], query: QuerySignals) -> float:
    pairs = zip(slow_standardised(scores), slow_standardised(query.gains.tolist()), strict=True)
    return math.fsum(score * gain for score, gain in pairs) / len(scores)


def slow_margin(scores: Sequence[float], query: QuerySignals) -> float:
    pairs = list(zip(slow_standardised(scores), query.gains.tolist(), strict=True))
    relevant = [score for score, gain in pairs if gain > 0]
    others = [score for score, gain in pairs if gain <= 0]
    if not relevant or not others:
        return 0.0
    return math.fsum(relevant) / len(relevant) - math.fsum(others) / len(others)


SLOW = {
    "ndcg": slow_ndcg,
    "reciprocal_rank": slow_reciprocal_rank,
    "correlation": slow_correlation,
    "margin": slow_margin,
}


def slow_worth(
    queries: Sequence[QuerySignals],
    heads: set[int],
    static: dict[int, float],
    options: LabelOptions,
) -> tuple[float, float]:
    """Objective and margin of a set, heads being indices among all."""
    values, margins = [], []
    for query in queries:
        scores = slow_scores([query.calibrated[head].tolist() for head in sorted(heads)])
        values.append(SLOW[options.utility](scores, query))
        margins.append(slow_margin(scores, query))
    own = math.fsum(static[head] for head in heads) / len(heads)
    share = 1 - options.shrinkage
    value = share * math.fsum(values) / len(queries) + options.shrinkage * own
    return value, share * math.fsum(margins) / len(queries)


def first_best(worths: Sequence[tuple[float, float]]) -> int:
    most = max(value for value, _ in worths)
    equal = [index for index, (value, _) in enumerate(worths) if value >= most - EQUAL]
    widest = max(worths[index][1] for index in equal)
    return next(index for index in equal if worths[index][1] >= widest - EQUAL)


def slow_search(
    queries: Sequence[QuerySignals], static: dict[int, float], options: LabelOptions
) -> set[int]:
    """One set for some queries; ``static`` are the candidates, in order, with their utilities."""
    chosen: set[int] = set()
    now = -math.inf
    swap = False
    while True:
        outside = [head for head in static if head not in chosen]
        leaving = [{old} for old in static if old in chosen] if swap else [set[int]()]
        moves = [chosen - old | {new} for old in leaving for new in outside]
        worths = [slow_worth(queries, move, static, options) for move in moves]
        if moves and worths[best := first_best(worths)][0] > now + EQUAL:
            chosen, now, swap = moves[best], worths[best][0], True
        elif swap and len(chosen) < min(options.max_heads, len(static)):
            swap = False
        else:
            return chosen


def sets_of(signals: SignalSet, labels: Labels) -> list[set[int]]:
    """The set of each query, as indices among the heads of the signals."""
    indices = signals.heads.indices_of(labels.heads)
    return [{indices[head] for head in row.nonzero()[:, 0].tolist()} for row in labels.gates]


def static_of(signals: SignalSet, labels: Labels) -> dict[int, float]:
    indices = signals.heads.indices_of(labels.heads)
    return dict(zip(indices, labels.heads.scores or (), strict=True))


def utilities_of(signals: SignalSet, labels: Labels, name: str = "ndcg") -> Tensor:
    """The utility of each query's set on all of its documents, shape (queries,)."""
    indices = signals.heads.indices_of(labels.heads)
    return measure(name, signals.with_contrast, indices, labels.gates[:, None])[:, 0]


OPTIONS = st.builds(
    LabelOptions,
    candidates=st.integers(1, 8),
    max_heads=st.integers(1, 4),
    utility=st.sampled_from(list(UTILITIES)),
    shrinkage=st.sampled_from([0.0, 0.3, 1.0]),
)

SETS = st.builds(
    signal_set,
    st.integers(0, 2**31),
    queries=st.integers(1, 4),
    documents=st.sampled_from([(2, 3), (2, 14), (5, 8)]),
    layers=st.just(3),
    grades=st.integers(1, 3),
    planted=st.sampled_from([(), PLANTED]),
    noise=st.just(2.0),
    step=st.sampled_from([None, 0.0625]),
)


@UNHURRIED
@given(SETS, OPTIONS)
def test_the_search_equals_one_in_plain_python(signals: SignalSet, options: LabelOptions) -> None:
    labels = pseudo_labels(signals, options)
    static = static_of(signals, labels)
    expected = [slow_search([query], static, options) for query in signals.with_contrast]
    assert sets_of(signals, labels) == expected


@settings(deadline=None, max_examples=40)
@given(SETS, OPTIONS)
def test_the_search_for_all_queries_equals_one_in_plain_python(
    signals: SignalSet, options: LabelOptions
) -> None:
    options = replace(options, groups=1)
    embeddings = torch.rand(len(signals.with_contrast), 3)
    labels = pseudo_labels(signals, options, embeddings=embeddings)
    expected = slow_search(signals.with_contrast, static_of(signals, labels), options)
    assert sets_of(signals, labels) == [expected] * len(labels.gates)


@pytest.mark.parametrize("name", ["ndcg", "correlation", "margin"])
def test_swaps_find_what_additions_alone_do_not(name: str) -> None:
    better = 0
    for seed in range(20):
        signals = signal_set(seed, queries=1, documents=(14, 14), layers=3, grades=3, planted=())
        labels = pseudo_labels(signals, LabelOptions(max_heads=3, utility=name))
        query = signals.queries[0]
        rows = standardise(query.calibrated.double())
        chosen: list[int] = []
        best = []
        for _ in range(3):
            moves = [[*chosen, head] for head in range(9) if head not in chosen]
            sums = torch.stack([rows[move].sum(dim=0) for move in moves])
            figures = one_by_one(name, sums, query)
            chosen = moves[int(figures.argmax())]
            best.append(figures.max().item())
        better += utilities_of(signals, labels, name).item() > max(best) + EQUAL
    assert better > 0


@UNHURRIED
@given(SETS, st.integers(0, 2**31), st.sampled_from(list(UTILITIES)))
def test_many_queries_at_a_time_measure_as_one_by_one(
    signals: SignalSet, seed: int, name: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    queries, indices = signals.queries, [7, 0, 3, 5]
    gates = torch.rand(len(queries), 6, 4, generator=generator) < 0.5
    gates[:, :, 0] |= ~gates.any(dim=2)
    values = measure(name, queries, indices, gates)
    assert (values.shape, values.dtype) == ((len(queries), 6), torch.float64)
    for query, sets, figures in zip(queries, gates, values, strict=True):
        rows = standardise(query.calibrated[indices].double())
        rows = (rows * 2**36).round() / 2**36  # as the search does, for sums that are exact
        expected = one_by_one(name, sets.double() @ rows, query)
        assert figures.tolist() == pytest.approx(expected.tolist(), abs=1e-9)


def test_a_set_is_worth_what_its_aggregated_scores_are() -> None:
    signals = signal_set(4, queries=6, documents=(5, 15), grades=3, planted=())
    labels = pseudo_labels(signals, LabelOptions(candidates=12))
    sets = sets_of(signals, labels)
    for query, chosen, figure in zip(
        signals.queries, sets, utilities_of(signals, labels), strict=True
    ):
        rows = sorted(chosen)
        scores = aggregate("standardised", query.calibrated[rows].double(), query.mass[rows])
        assert figure.item() == pytest.approx(one_by_one("ndcg", scores[None], query).item())


def test_more_documents_and_queries_than_fit_in_a_batch_make_no_difference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    signals = signal_set(5, queries=13, documents=(2, 30), grades=2, planted=())
    embeddings = torch.rand(13, 2, generator=torch.Generator().manual_seed(0))
    choices = [LabelOptions(), LabelOptions(utility="correlation"), LabelOptions(groups=4)]

    def searched(choice: LabelOptions) -> tuple[Tensor, Tensor]:
        labels = pseudo_labels(signals, choice, embeddings=embeddings)
        return labels.gates, utilities_of(signals, labels, choice.utility)

    before = [searched(choice) for choice in choices]
    monkeypatch.setattr(head_search, "_TABLE", 12 * 30 * 3)
    monkeypatch.setattr(head_search, "_SCORES", 100)
    for choice, (gates, utilities) in zip(choices, before, strict=True):
        parts = searched(choice)
        assert torch.equal(parts[0], gates)
        torch.testing.assert_close(parts[1], utilities)


def test_the_order_of_the_queries_makes_no_difference() -> None:
    signals = signal_set(6, queries=9, documents=(2, 14), planted=())
    order = random.Random(0).sample(range(9), 9)
    moved = signals.subset([signals.queries[index] for index in order])
    options = LabelOptions(utility="margin", shrinkage=0.2)
    labels, other = pseudo_labels(signals, options), pseudo_labels(moved, options)
    assert other.heads == labels.heads
    assert torch.equal(other.gates, labels.gates[order])
    figures, others = label_reliability(signals), label_reliability(moved)
    assert (others.found, others.kept) == pytest.approx((figures.found, figures.kept))


def test_two_searches_are_the_same() -> None:
    signals = signal_set(7, planted=())
    first, second = pseudo_labels(signals), pseudo_labels(signals)
    assert torch.equal(first.gates, second.gates)
    assert torch.equal(utilities_of(signals, first), utilities_of(signals, second))
    assert label_reliability(signals) == label_reliability(signals)


# Labels.


def test_the_candidates_are_the_best_single_heads_and_say_where_from() -> None:
    signals = signal_set(1, data=("first", "second"))
    flat = query_signals(torch.rand(12, 5), [1] * 5, query_id="flat")
    more = signals.subset([flat, *signals.queries])
    labels = pseudo_labels(more, LabelOptions(candidates=5))
    assert tuple(labels.heads) == tuple(detect(signals, "ndcg", 5))
    assert (labels.heads.model, labels.heads.layout) == ("tiny", "sequential")
    assert (labels.heads.method, labels.heads.recipe.aggregation) == (
        "pseudo-labels",
        "standardised",
    )
    assert labels.heads.data == "first, second, 8 queries"
    best = single_head_ndcg(signals).sort(descending=True).values[:5]
    assert labels.heads.scores == tuple(best.tolist())
    assert (labels.gates.shape, labels.gates.dtype) == ((8, 5), torch.bool)


@pytest.mark.parametrize("name", UTILITIES)
def test_candidates_are_chosen_by_the_utility_that_is_maximised(name: str) -> None:
    signals = signal_set(2, grades=3, planted=())
    figures = [one_by_one(name, query.calibrated, query) for query in signals.queries]
    expected = torch.stack(figures).mean(dim=0).sort(descending=True, stable=True)
    labels = pseudo_labels(signals, LabelOptions(candidates=4, utility=name))
    assert signals.heads.indices_of(labels.heads) == expected.indices[:4].tolist()
    assert labels.heads.scores == pytest.approx(expected.values[:4].tolist())


@pytest.mark.parametrize("name", UTILITIES)
@pytest.mark.parametrize(("candidates", "most"), [(1, 3), (4, 2), (12, 8), (99, 99)])
def test_every_query_has_a_head_and_none_too_many(name: str, candidates: int, most: int) -> None:
    signals = signal_set(3, queries=20, planted=())
    labels = pseudo_labels(
        signals, LabelOptions(candidates=candidates, max_heads=most, utility=name)
    )
    counts = labels.gates.sum(dim=1)
    assert labels.gates.shape == (20, min(candidates, 12))
    assert 1 <= int(counts.min()) <= int(counts.max()) <= min(candidates, most)


def test_a_head_is_found_even_where_no_head_is_worth_anything() -> None:
    signals = table([query_signals([[0.0, 0.1, 0.2], [0.5, 0.5, 0.5]], [1, 0, 0])])
    labels = pseudo_labels(signals, LabelOptions(utility="margin"))
    assert labels.heads.heads == (Head(0, 1), Head(0, 0))
    assert labels.gates.tolist() == [[True, False]]
    assert utilities_of(signals, labels, "margin").tolist() == [0.0]


def test_of_heads_with_equal_ndcg_the_one_with_the_larger_margin_is_taken() -> None:
    query = query_signals([[0.9, 0.8, 0.0], [0.9, 0.1, 0.0], [0.0, 0.5, 0.9]], [1, 0, 0])
    labels = pseudo_labels(table([query]))
    assert labels.heads[:2] == (Head(0, 0), Head(0, 1))
    assert labels.gates.tolist() == [[False, True, False]]


def test_of_equal_heads_the_first_candidate_is_taken() -> None:
    row = [0.9, 0.1, 0.0]
    signals = table([query_signals([row] * 3, [1, 0, 0])], [(3, 0), (1, 1), (1, 0)])
    labels = pseudo_labels(signals)
    assert str(labels.heads) == "1-0,1-1,3-0"
    assert labels.gates.tolist() == [[True, False, False]]


def test_heads_that_are_right_only_together_are_found() -> None:
    # Each has another wrong document on top.
    signals = table([query_signals([[0.5, 0.9, 0.0, 0.0], [0.5, 0.0, 0.9, 0.0]], [1, 0, 0, 0])])
    labels = pseudo_labels(signals)
    assert labels.gates.tolist() == [[True, True]]
    assert utilities_of(signals, labels).tolist() == [1.0]


def test_ideal_documents_that_were_not_retrieved_count() -> None:
    signals = table([query_signals([[0.9, 0.1]], [1, 0], ideal_gains=[1, 1, 0])])
    labels = pseudo_labels(signals)
    assert utilities_of(signals, labels).tolist() == pytest.approx([1 / (1 + 1 / math.log2(3))])


# Remedies.


@pytest.mark.parametrize("name", UTILITIES)
def test_shrunk_wholly_labels_are_the_same_for_every_query(name: str) -> None:
    signals = signal_set(8, queries=12, grades=2, planted=())
    twins = signals.subset(  # equal heads, so that ties have to be broken
        [replace(query, calibrated=query.calibrated.repeat(2, 1)[:12]) for query in signals.queries]
    )
    for same in (signals, twins):
        labels = pseudo_labels(same, LabelOptions(utility=name, shrinkage=1.0))
        assert sets_of(same, labels) == [{same.heads.indices_of(labels.heads)[0]}] * 12


def test_shrinkage_takes_worse_sets_of_better_heads() -> None:
    signals = signal_set(9, queries=30, planted=())
    figures = []
    for shrinkage in (0.0, 0.9, 1.0):
        labels = pseudo_labels(signals, LabelOptions(shrinkage=shrinkage, utility="correlation"))
        static = torch.tensor(labels.heads.scores, dtype=torch.float64)
        means = (labels.gates * static).sum(dim=1) / labels.gates.sum(dim=1)
        worth = utilities_of(signals, labels, "correlation")
        figures.append((float(worth.mean()), float(means.mean())))
    own_worth, static_worth = zip(*figures, strict=True)
    assert sorted(own_worth, reverse=True) == list(own_worth)
    assert sorted(static_worth) == list(static_worth)


@pytest.mark.parametrize("name", UTILITIES)
@pytest.mark.parametrize("shrinkage", [0.0, 0.6])
def test_queries_of_a_group_share_the_set_that_is_best_for_them(
    name: str, shrinkage: float
) -> None:
    signals = signal_set(10, queries=10, layers=3, grades=2, planted=())
    kinds = [0, 1, 1, 0, 2, 2, 1, 0, 0, 2]
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.eye(3)[kinds] + 0.01 * torch.rand(10, 3, generator=generator)
    options = LabelOptions(
        groups=3, candidates=6, max_heads=3, utility=name, shrinkage=shrinkage, seed=3
    )
    labels = pseudo_labels(signals, options, embeddings=embeddings)
    sets, static = sets_of(signals, labels), static_of(signals, labels)
    for kind in range(3):
        inside = [index for index in range(10) if kinds[index] == kind]
        queries = [signals.queries[index] for index in inside]
        expected = slow_search(queries, static, options)
        assert [sets[index] for index in inside] == [expected] * len(inside)


def test_as_many_groups_as_queries_give_each_its_own_set() -> None:
    signals = signal_set(11, queries=6, planted=())
    embeddings = torch.eye(6)
    shared = pseudo_labels(signals, LabelOptions(groups=6), embeddings=embeddings)
    assert torch.equal(shared.gates, pseudo_labels(signals).gates)


def test_equal_embeddings_make_one_group_however_many_are_asked_for(
    capfd: pytest.CaptureFixture[str],
) -> None:
    signals = signal_set(12, queries=6, planted=())
    labels = pseudo_labels(signals, LabelOptions(groups=4), embeddings=torch.ones(6, 3))
    assert len({tuple(row) for row in labels.gates.tolist()}) == 1
    assert capfd.readouterr() == ("", "")


def test_embeddings_are_not_looked_at_without_groups() -> None:
    signals = signal_set(13)
    labels = pseudo_labels(signals, embeddings=torch.ones(1))
    assert torch.equal(labels.gates, pseudo_labels(signals).gates)


# Reliability.


def noise(queries: int = 80, documents: int = 20, heads: int = 24, seed: int = 0) -> SignalSet:
    """Heads that know nothing."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for number in range(queries):
        gains = torch.zeros(documents)
        gains[torch.randperm(documents, generator=generator)[:6]] = 1.0
        signal = torch.randn(heads, documents, generator=generator)
        drawn.append(query_signals(signal, gains.tolist(), query_id=f"q{number}"))
    return table(drawn)


def test_what_is_found_in_noise_is_not_kept() -> None:
    reliability = label_reliability(noise())
    assert reliability.queries == 80
    assert reliability.found > 0.97
    assert reliability.kept == pytest.approx(reliability.chance, abs=0.06)
    assert reliability.kept == pytest.approx(reliability.static, abs=0.06)
    assert reliability.kept < 0.7


@pytest.mark.parametrize("name", UTILITIES)
def test_a_planted_perfect_head_is_found_and_kept(name: str) -> None:
    signals = noise()
    queries = [
        replace(query, calibrated=torch.cat([query.calibrated[:-1], query.gains[None]]))
        for query in signals.queries
    ]
    planted = signals.subset(queries)
    reliability = label_reliability(planted, LabelOptions(utility=name, max_heads=1))
    assert (reliability.found, reliability.kept, reliability.static) == (1.0, 1.0, 1.0)
    assert reliability.chance < 0.8


def test_heads_that_know_one_kind_of_query_are_kept_by_groups_of_the_kind() -> None:
    signals = noise(queries=60)
    queries, embeddings = [], torch.zeros(60, 2)
    for index, query in enumerate(signals.queries):
        embeddings[index, index % 2] = 1.0
        signal = query.calibrated.clone()
        signal[index % 2] += 1.5 * query.gains
        signal[1 - index % 2] -= 1.5 * query.gains
        queries.append(replace(query, calibrated=signal))
    choices = [LabelOptions(), LabelOptions(groups=1), LabelOptions(groups=2)]
    routed = signals.subset(queries)
    figures = [label_reliability(routed, c, embeddings=embeddings) for c in choices]
    assert choose_labels(routed, embeddings, choices) == LabelChoice(choices[2], figures[2])
    assert figures[1].kept == figures[1].static  # one group is what static means
    assert figures[2].kept > figures[2].static + 0.1
    assert figures[2].kept > figures[0].kept + 0.03


def test_reliability_is_ndcg_whatever_is_maximised() -> None:
    signals = signal_set(14, queries=20, documents=(10, 20), grades=3)
    for name in UTILITIES:
        reliability = label_reliability(signals, LabelOptions(utility=name))
        for figure in (reliability.found, reliability.kept, reliability.static, reliability.chance):
            assert 0 <= figure <= 1
    # Of the whole ideal list, half of the documents could not make an nDCG of 1.
    perfect = signal_set(14, queries=20, documents=(10, 20), noise=0.0)
    assert label_reliability(perfect).found == 1.0


def test_smooth_utilities_keep_more_than_reciprocal_ranks() -> None:
    signals = signal_set(15, queries=60, documents=(20, 20), grades=3, noise=3.0)
    choices = [LabelOptions(utility=name) for name in ("reciprocal_rank", "correlation")]
    figures = [label_reliability(signals, choice) for choice in choices]
    assert choose_labels(signals, None, choices) == LabelChoice(choices[1], figures[1])
    assert figures[1].kept > figures[0].kept


def test_the_first_of_equally_reliable_options_is_chosen() -> None:
    signals = signal_set(16)
    choices = [LabelOptions(shrinkage=0.25, max_heads=2), LabelOptions(shrinkage=0.25, max_heads=2)]
    assert choose_labels(signals, None, choices).options is choices[0]


def test_the_seed_decides_the_halves() -> None:
    signals = signal_set(17, planted=())
    figures = [label_reliability(signals, LabelOptions(seed=seed)) for seed in (0, 1, 0)]
    assert figures[0] == figures[2]
    assert figures[0] != figures[1]


@pytest.mark.parametrize(
    ("gains", "measurable"),
    [
        ([1, 0], False),
        ([1, 1, 0], False),
        ([1, 1, 0, 0], True),
        ([2, 1, 0, 0, 0], True),
        ([2, 1, 1, 1, 0], True),  # the only 2 and the only 0 on different sides
        ([3, 2, 1, 0], True),
        ([1, 0, 0, 0, 0, -1], False),  # a half without anything relevant, of two grades though
        ([2, 2, 1, 1], True),
        ([1] * 9 + [0], False),
    ],
)
def test_queries_are_halved_wherever_both_halves_can_have_contrast(
    gains: Sequence[float], measurable: bool
) -> None:
    easy = query_signals(torch.rand(2, 8), [1, 0] * 4, query_id="easy")
    for seed in range(10):
        order = random.Random(seed).sample(list(gains), len(gains))
        query = query_signals(torch.rand(2, len(gains)), order, query_id="hard")
        reliability = label_reliability(table([easy, query]), LabelOptions(seed=seed))
        assert reliability.queries == 1 + measurable


def test_reliability_leaves_out_the_embeddings_of_queries_it_leaves_out() -> None:
    signals = noise(queries=6)
    hard = query_signals(torch.rand(24, 2), [1, 0], query_id="hard")
    more = signals.subset([hard, *signals.queries])
    embeddings = torch.eye(7)
    embeddings[0] = math.nan
    options = LabelOptions(groups=2)
    assert label_reliability(more, options, embeddings=embeddings) == label_reliability(
        signals, options, embeddings=embeddings[1:]
    )


def test_labels_leave_the_signals_as_they_were() -> None:
    signals, again = signal_set(19), signal_set(19)
    pseudo_labels(signals)
    label_reliability(signals)
    for query, same in zip(signals.queries, again.queries, strict=True):
        assert torch.equal(query.calibrated, same.calibrated)
        assert torch.equal(query.mass, same.mass)
        assert torch.equal(query.gains, same.gains)


# Choices.

FEW = LabelOptions(candidates=4, max_heads=2)
FOUR = HeadSet([(0, 0), (0, 1), (1, 0), (1, 1)], model="tiny")


def one_knows(queries: int, relevant: int) -> SignalSet:
    """The first of four heads knows the relevant documents; the others are noise."""
    drawn = []
    generator = torch.Generator().manual_seed(0)
    for number in range(queries):
        gains = torch.zeros(12)
        gains[torch.randperm(12, generator=generator)[:relevant]] = 1
        signal = torch.randn(4, 12, generator=generator)
        signal[0] += 2 * gains
        drawn.append(query_signals(signal, gains.tolist(), query_id=f"q{number}"))
    return table(drawn, FOUR)


def test_every_utility_is_tried_with_and_without_shrinkage() -> None:
    choices = label_choices(LabelOptions(candidates=7, groups=2, seed=3))
    assert [(choice.utility, choice.shrinkage) for choice in choices] == [
        ("ndcg", 0.0),
        ("ndcg", 0.5),
        ("correlation", 0.0),
        ("correlation", 0.5),
        ("margin", 0.0),
        ("margin", 0.5),
    ]
    assert {(choice.candidates, choice.groups, choice.seed) for choice in choices} == {(7, 2, 3)}


def test_the_most_reliable_choice_is_taken() -> None:
    signals, choices = one_knows(12, 4), label_choices(FEW)
    kept = [label_reliability(signals, choice).kept for choice in choices]
    assert len(set(kept)) > 1
    chosen = choose_labels(signals, torch.zeros(12, 2), choices)
    assert chosen.options == choices[kept.index(max(kept))]
    assert chosen.reliability is not None
    assert chosen.reliability.kept == max(kept)


def test_the_reliability_of_a_single_choice_is_measured() -> None:
    signals = one_knows(6, 4)
    chosen = choose_labels(signals, torch.zeros(6, 2), [FEW])
    assert chosen == LabelChoice(FEW, label_reliability(signals, FEW))


def test_where_no_query_can_be_halved_the_first_choice_is_taken() -> None:
    chosen = choose_labels(one_knows(6, 1), torch.zeros(6, 2), label_choices(FEW))
    assert chosen == LabelChoice(FEW, None)
    assert chosen.to_dict() == {"utility": "ndcg", "shrinkage": 0.0, "groups": None}


def test_a_choice_is_written_with_its_reliability() -> None:
    reliability = Reliability(found=0.98765, kept=0.8, static=0.81, chance=0.7, queries=9)
    assert LabelChoice(FEW, reliability).to_dict() == {
        "utility": "ndcg",
        "shrinkage": 0.0,
        "groups": None,
        "found": 0.9877,
        "kept": 0.8,
        "static": 0.81,
        "chance": 0.7,
        "queries": 9,
    }


# Refused arguments.


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"candidates": 0}, "candidates=0 is not a count; give a whole number, 1 or more."),
        ({"max_heads": -1}, "max_heads=-1 is not a count; give a whole number, 1 or more."),
        ({"groups": 0}, "groups=0 is not a count; give a whole number, 1 or more."),
        (
            {"utility": "map"},
            "utility='map' does not exist; choose one of ndcg, reciprocal_rank, correlation, "
            "margin.",
        ),
        ({"shrinkage": 1.5}, "shrinkage=1.5 must be from 0 to 1."),
        ({"shrinkage": math.nan}, "shrinkage=nan must be from 0 to 1."),
    ],
)
def test_options_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        LabelOptions(**values)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (
            None,
            "groups=2 cannot be made of embeddings None; give one per query with contrast: "
            "(8, width).",
        ),
        (
            torch.ones(7, 3),
            "groups=2 cannot be made of embeddings of shape (7, 3); give one per query with "
            "contrast: (8, width).",
        ),
        (
            torch.ones(8),
            "groups=2 cannot be made of embeddings of shape (8,); give one per query with "
            "contrast: (8, width).",
        ),
        (
            torch.full((8, 3), math.nan),
            "embeddings are not finite numbers; compute them again.",
        ),
    ],
)
def test_groups_need_embeddings(embeddings: Tensor | None, message: str) -> None:
    signals = signal_set(20, documents=(20, 20))
    for function in (pseudo_labels, label_reliability):
        with pytest.raises(InputError) as error:
            function(signals, LabelOptions(groups=2), embeddings=embeddings)
        assert str(error.value) == message


def test_more_groups_than_queries_are_refused() -> None:
    with pytest.raises(InputError) as error:
        pseudo_labels(signal_set(21), LabelOptions(groups=9), embeddings=torch.rand(8, 2))
    assert str(error.value) == "groups=9 cannot be made of 8 queries; give fewer."


def test_groups_without_faiss_name_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingExtraError, match=r'pip install "routehead-plugins\[faiss\]"'):
        pseudo_labels(signal_set(22), LabelOptions(groups=2), embeddings=torch.rand(8, 2))
    assert len(pseudo_labels(signal_set(22)).gates) == 8


def test_signals_that_are_no_numbers_are_refused() -> None:
    signals = signal_set(23)
    broken = replace(signals.queries[1], calibrated=signals.queries[1].calibrated * math.inf)
    for function in (pseudo_labels, label_reliability):
        with pytest.raises(InputError) as error:
            function(signals.subset([signals.queries[0], broken]))
        assert str(error.value) == (
            "signals of query 'q1' are not finite numbers; compute them again with "
            'dtype="float32".'
        )


def test_queries_without_contrast_alone_are_refused() -> None:
    flat = query_signals(torch.rand(2, 3), [1, 1, 1])
    for function in (pseudo_labels, label_reliability):
        with pytest.raises(
            InputError, match=r"^none of the 1 queries of written has both relevant"
        ):
            function(table([flat]))


def test_queries_that_cannot_be_halved_alone_are_refused() -> None:
    query = query_signals(torch.rand(2, 3), [1, 0, 0])
    with pytest.raises(InputError) as error:
        label_reliability(table([query]))
    assert str(error.value) == (
        "none of the 1 queries of written has relevant and other documents for two halves; give "
        "more candidates per query."
    )


def test_no_options_to_choose_from_are_refused() -> None:
    with pytest.raises(InputError) as error:
        choose_labels(signal_set(24), None, [])
    assert str(error.value) == "there are no label options to choose from; give at least one."


def test_signals_that_are_not_finite_are_not_taken_for_queries_without_halves() -> None:
    whole = signal_set()
    broken = whole.subset(
        [replace(query, calibrated=query.calibrated * math.nan) for query in whole.queries]
    )
    with pytest.raises(InputError, match="are not finite numbers"):
        choose_labels(broken, None, [LabelOptions(candidates=4)])
    alone = LabelOptions(candidates=4, groups=len(whole.queries) + 1)
    embeddings = torch.randn(len(whole.with_contrast), 3)
    assert choose_labels(whole, embeddings, [alone]) == LabelChoice(alone, None)
