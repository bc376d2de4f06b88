"""Detectors compared with loops over heads and documents, and on planted heads."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import PLANTED, query_signals, signal_set, table

from routehead_plugins import Head, HeadSet
from routehead_plugins.errors import InputError
from routehead_plugins.signals import QuerySignals, SignalSet
from routehead_plugins.training.detection import (
    TEMPERATURES,
    best_interval,
    choose_temperature,
    contrast,
    detect,
    discriminability,
    relevant_mass,
    single_head_ndcg,
)

UNHURRIED = settings(deadline=None, max_examples=40)
METHODS = ("ndcg", "qr", "core", "layers", "discriminability")
RANKED = tuple(method for method in METHODS if method != "layers")

# The obvious way: one query, one head and one document at a time.

Row = Sequence[float]


def slow_ndcg(signal: Row, query: QuerySignals) -> float:
    gains = query.gains.tolist()
    order = sorted(range(len(gains)), key=lambda index: -signal[index])
    ranked_gains = [gains[index] for index in order]
    best = sorted(query.ideal_gains.tolist(), reverse=True)
    dcg, ideal = (
        sum(max(gain, 0) / math.log2(rank + 1) for rank, gain in enumerate(ranked[:10], start=1))
        for ranked in (ranked_gains, best)
    )
    return dcg / ideal if ideal else 0.0


def slow_mass(mass: Row, query: QuerySignals) -> float:
    return sum(a for a, gain in zip(mass, query.gains.tolist(), strict=True) if gain > 0)


def slow_contrast(mass: Row, query: QuerySignals, temperature: float) -> float:
    pairs = list(zip(mass, query.gains.tolist(), strict=True))
    positives = [math.exp(a / temperature) for a, gain in pairs if gain > 0]
    negatives = sum(math.exp(a / temperature) for a, gain in pairs if gain <= 0)
    return sum(positive / (positive + negatives) for positive in positives) / len(positives)


def slow_discriminability(signal: Row, mass: Row, query: QuerySignals) -> float:
    grades: dict[float, list[float]] = {}
    for value, gain in zip(signal, query.gains.tolist(), strict=True):
        grades.setdefault(gain, []).append(value)
    gaps = []
    for lower, upper in pairwise(sorted(grades)):
        both = grades[lower] + grades[upper]
        mean = sum(both) / len(both)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in both) / len(both))
        low, high = (sum(grades[g]) / len(grades[g]) for g in (lower, upper))
        gaps.append((high - low) / deviation if len(set(both)) > 1 else 0.0)
    shares = [a / sum(mass) for a in mass] if sum(mass) > 0 else [1 / len(mass) for _ in mass]
    entropy = -sum(share * math.log(share) for share in shares if share > 0)
    return sum(gaps) / len(gaps) * (1 - entropy / math.log(len(mass)))


def slow_average(
    signals: SignalSet, score: Callable[[Row, Row, QuerySignals], float]
) -> list[float]:
    """Mean over the queries that have contrast, head by head."""
    queries = [query for query in signals.queries if len(set(query.gains.tolist())) > 1]
    return [
        math.fsum(
            score(query.calibrated[head].tolist(), query.mass[head].tolist(), query)
            for query in queries
        )
        / len(queries)
        for head in range(len(signals.heads))
    ]


def slow_interval(signals: SignalSet) -> tuple[int, int, float]:
    """First and last layer of the best interval, and its nDCG."""
    layers = sorted({head.layer for head in signals.heads})
    intervals = []
    for first in layers:
        for last in (layer for layer in layers if layer >= first):
            inside = [i for i, head in enumerate(signals.heads) if first <= head.layer <= last]
            figures = []
            for query in signals.with_contrast:
                rows = query.calibrated[inside].tolist()
                means = [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]
                figures.append(slow_ndcg(means, query))
            intervals.append((round(math.fsum(figures) / len(figures), 9), -last, -first))
    quality, last, first = max(intervals)
    return -first, -last, quality


SETS = st.builds(
    signal_set,
    st.integers(0, 2**31),
    queries=st.integers(1, 5),
    documents=st.sampled_from([(2, 2), (2, 14), (8, 12)]),
    layers=st.integers(1, 4),
    width=st.integers(1, 3),
    grades=st.integers(1, 3),
    planted=st.sampled_from([(), PLANTED]),
    noise=st.sampled_from([0.0, 1.0]),
    step=st.sampled_from([None, 0.0625]),
)


@UNHURRIED
@given(SETS)
def test_ndcg_equals_loops(signals: SignalSet) -> None:
    expected = slow_average(signals, lambda signal, _, query: slow_ndcg(signal, query))
    assert single_head_ndcg(signals).tolist() == pytest.approx(expected, abs=1e-12)


@UNHURRIED
@given(SETS)
def test_qr_equals_loops(signals: SignalSet) -> None:
    expected = slow_average(signals, lambda _, mass, query: slow_mass(mass, query))
    assert relevant_mass(signals).tolist() == pytest.approx(expected, abs=1e-12)


@UNHURRIED
@given(SETS, st.sampled_from([0.01, 0.1, 1.0]))
def test_core_equals_loops(signals: SignalSet, temperature: float) -> None:
    expected = slow_average(signals, lambda _, mass, query: slow_contrast(mass, query, temperature))
    assert contrast(signals, temperature).tolist() == pytest.approx(expected, abs=1e-12)


@UNHURRIED
@given(SETS)
def test_discriminability_equals_loops(signals: SignalSet) -> None:
    expected = slow_average(signals, slow_discriminability)
    assert discriminability(signals).tolist() == pytest.approx(expected, abs=1e-9)


@UNHURRIED
@given(SETS)
def test_layers_equal_loops_over_all_intervals(signals: SignalSet) -> None:
    first, last, quality = slow_interval(signals)
    heads = detect(signals, "layers")
    assert heads.method == f"layers:{first}-{last}"
    assert list(heads) == [head for head in signals.heads if first <= head.layer <= last]
    assert heads.scores == pytest.approx([quality] * len(heads), abs=1e-8)


# Planted heads.


@pytest.mark.parametrize("method", RANKED)
@pytest.mark.parametrize("grades", [1, 3])
@pytest.mark.parametrize("seed", range(5))
def test_planted_heads_are_found(method: str, grades: int, seed: int) -> None:
    signals = signal_set(seed, queries=20, grades=grades)
    assert set(detect(signals, method, 2)) == set(PLANTED)


@pytest.mark.parametrize("seed", range(5))
def test_the_interval_of_planted_layers_is_found(seed: int) -> None:
    planted = [(layer, index) for layer in (2, 3) for index in range(3)]
    signals = signal_set(seed, queries=40, layers=6, planted=planted, noise=1.5)
    assert detect(signals, "layers").method == "layers:2-3"


def test_the_head_set_records_how_it_was_chosen() -> None:
    signals = signal_set(data=("first", "second"))
    heads = detect(signals, "ndcg", 5)
    scores = single_head_ndcg(signals)
    assert (heads.model, heads.layout, heads.method) == ("tiny", "sequential", "ndcg")
    assert heads.data == "first, second, 8 queries"
    assert heads.source is None
    assert heads.scores == tuple(scores.sort(descending=True).values[:5].tolist())
    assert heads.scores == tuple(scores[list(signals.heads).index(head)].item() for head in heads)
    assert heads.heads == tuple(Head(*head) for head in heads)


def test_all_heads_can_be_chosen() -> None:
    signals = signal_set()
    assert sorted(detect(signals, "qr", 12)) == list(signals.heads)


def test_the_temperature_is_recorded_whether_given_or_chosen() -> None:
    signals = signal_set()
    chosen = choose_temperature(signals, 3, seed=7)
    assert chosen in TEMPERATURES
    assert detect(signals, "core", 3, temperature=0.02).method == "core(temperature=0.02)"
    assert detect(signals, "core", 3, seed=7).method == f"core(temperature={chosen})"
    assert detect(signals, "core", 3, seed=7) == detect(signals, "core", 3, temperature=chosen)


# Order and ties.


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("step", [None, 0.125])
@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_the_queries_changes_nothing(
    method: str, step: float | None, seed: int
) -> None:
    signals = signal_set(seed, queries=9, step=step, planted=())
    queries = list(signals.queries)
    random.Random(seed).shuffle(queries)
    assert detect(signals.subset(queries), method, 12) == detect(signals, method, 12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("step", [None, 0.125])
@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_the_heads_changes_nothing(method: str, step: float | None, seed: int) -> None:
    signals = signal_set(seed, step=step, planted=())
    order = random.Random(seed).sample(range(12), 12)
    moved = SignalSet(
        HeadSet([signals.heads[index] for index in order]),
        signals.model,
        signals.layout,
        signals.data,
        tuple(
            replace(query, mass=query.mass[order], calibrated=query.calibrated[order])
            for query in signals.queries
        ),
    )
    # Sums over heads, unlike those over queries, may differ in the last digit.
    detected, expected = detect(moved, method, 12), detect(signals, method, 12)
    assert (detected.heads, detected.method) == (expected.heads, expected.method)
    assert detected.scores == pytest.approx(expected.scores)


@pytest.mark.parametrize("method", RANKED)
def test_equal_heads_are_taken_from_shallow_to_deep(method: str) -> None:
    row = [0.4, 0.1, 0.2]
    queries = [query_signals([row] * 4, [0, 1, 0], query_id=name) for name in "ab"]
    signals = table(queries, [(5, 0), (0, 9), (0, 2), (5, 1)])
    assert str(detect(signals, method, 3)) == "0-2,0-9,5-0"


def test_heads_with_the_same_values_on_different_queries_are_equal() -> None:
    # Added in the order of the queries, 0.1 + 0.2 + 0.3 is more than 0.3 + 0.2 + 0.1.
    masses = ([0.1, 0.3], [0.2, 0.2], [0.3, 0.1])
    queries = [
        query_signals([[late, 0.0], [early, 0.0]], [1, 0], query_id=f"q{number}")
        for number, (early, late) in enumerate(masses)
    ]
    signals = table(queries, [(3, 0), (1, 0)])
    assert str(detect(signals, "qr", 2)) == "1-0,3-0"
    assert len(set(detect(signals, "qr", 2).scores or ())) == 1


def test_of_equal_intervals_the_one_that_ends_first_is_taken() -> None:
    good, none = [0.1, 0.3], [0.0, 0.0]
    query = query_signals([none, good, none, good], [0, 1])
    heads = [(layer, 0) for layer in (2, 4, 6, 8)]
    detected = detect(table([query], heads), "layers")
    assert detected.method == "layers:2-4"  # not 4-4, which begins later, nor 2-8
    assert detected.scores == (1.0, 1.0)


def test_layers_outside_an_interval_do_not_reach_it_as_rounding() -> None:
    # As a difference of sums from layer 0, the second layer would rank these documents.
    query = query_signals([[0.1, 0.7, 0.2], [0.3, 0.3, 0.3]], [1, 0, 0])
    assert detect(table([query], [(0, 0), (1, 0)]), "layers").method == "layers:1-1"


def test_an_interval_counts_all_heads_of_its_layers() -> None:
    # Alone, each head of layer 1 is wrong on one of the queries; together they are right.
    first = query_signals([[0.9, 0.0], [0.5, 0.4], [0.1, 0.9]], [0, 1], query_id="a")
    second = query_signals([[0.9, 0.0], [0.1, 0.9], [0.5, 0.4]], [0, 1], query_id="b")
    heads = detect(table([first, second], [(0, 0), (1, 0), (1, 1)]), "layers", count=0)
    assert heads.heads == (Head(1, 0), Head(1, 1))
    assert heads.scores == (1.0, 1.0)


def test_detection_leaves_the_signals_as_they_were() -> None:
    signals, again = signal_set(3), signal_set(3)
    for method in METHODS:
        detect(signals, method)
    for query, same in zip(signals.queries, again.queries, strict=True):
        assert torch.equal(query.mass, same.mass)
        assert torch.equal(query.calibrated, same.calibrated)
        assert torch.equal(query.gains, same.gains)


# The signals that each method uses.


def test_only_ndcg_layers_and_gaps_are_calibrated() -> None:
    signals = signal_set(1)
    other = signals.subset(
        [replace(query, calibrated=query.calibrated.flip(1)) for query in signals.queries]
    )
    assert torch.equal(relevant_mass(signals), relevant_mass(other))
    assert torch.equal(contrast(signals, 0.1), contrast(other, 0.1))
    for detector in (single_head_ndcg, best_interval, discriminability):
        assert not torch.equal(detector(signals), detector(other))


@pytest.mark.parametrize("method", METHODS)
def test_queries_without_contrast_are_left_out(method: str) -> None:
    signals = signal_set(2)
    none = query_signals(torch.rand(12, 5), [0] * 5, query_id="none")
    all_of_them = query_signals(torch.rand(12, 5), [1] * 5, query_id="all")
    single = query_signals(torch.rand(12, 1), [1], query_id="single")
    more = signals.subset([none, *signals.queries, all_of_them, single])
    assert detect(more, method) == detect(signals, method)


def test_core_leaves_out_queries_whose_candidates_are_all_relevant_or_all_not() -> None:
    signals = signal_set(2)
    graded = query_signals(torch.rand(12, 3), [1, 2, 3], query_id="graded")
    unjudged = query_signals(torch.rand(12, 3), [0, -1, 0], query_id="spam")
    more = signals.subset([graded, unjudged, *signals.queries])
    assert torch.equal(contrast(more, 0.1), contrast(signals, 0.1))


def test_core_compares_each_relevant_document_with_the_other_documents_only() -> None:
    query = query_signals([[0.3, 0.2, 0.1]], [2, 1, 0])
    expected = (1 / (1 + math.exp(-2)) + 1 / (1 + math.exp(-1))) / 2
    assert contrast(table([query]), 0.1).tolist() == pytest.approx([expected])


def test_core_at_the_lowest_temperature_is_the_share_of_queries_won() -> None:
    queries = [
        query_signals([[0.9, 0.1], [0.1, 0.9]], gains, query_id=f"q{number}")
        for number, gains in enumerate([[1, 0], [1, 0], [0, 1]])
    ]
    assert contrast(table(queries), min(TEMPERATURES)).tolist() == pytest.approx([2 / 3, 1 / 3])


def test_discriminability_favours_heads_that_attend_to_few_documents() -> None:
    signal = [0.2, -0.1, -0.1, 0.0]
    masses = [[0.9, 0.01, 0.01, 0.01], [0.3, 0.2, 0.2, 0.2], [0.2] * 4, [0.0] * 4]
    query = query_signals([signal] * 4, [1, 0, 0, 0], mass=masses)
    focused, blurred, even, absent = discriminability(table([query])).tolist()
    assert focused > blurred > 0
    assert even == pytest.approx(0, abs=1e-6)
    assert absent == pytest.approx(0, abs=1e-6)


def test_discriminability_measures_every_step_between_grades() -> None:
    # Both heads have the best document on top; only the first tells the others apart.
    query = query_signals([[0.9, 0.5, 0.1], [0.9, 0.1, 0.5]], [2, 1, 0], mass=[[0.9, 0, 0]] * 2)
    assert discriminability(table([query])).tolist() == pytest.approx([2.0, 0.0])


# The temperature.


def lucky_and_steady() -> SignalSet:
    """Head 0-0 sometimes stares at the relevant document, head 0-1 always prefers it a little."""
    queries = []
    for number in range(20):
        lucky = [0.9, 0.0, 0.0] if number % 3 == 0 else [0.0, 0.01, 0.0]
        signal = [lucky, [0.012, 0.01, 0.01]]
        queries.append(query_signals(signal, [1, 0, 0], query_id=f"q{number}"))
    return table(queries)


def test_the_chosen_temperature_detects_the_better_ranking_head() -> None:
    signals = lucky_and_steady()
    assert str(detect(signals, "core", 1, temperature=1.0)) == "0-0"
    for seed in range(5):
        assert str(detect(signals, "core", 1, seed=seed)) == "0-1"


def test_of_equal_temperatures_the_middle_one_is_taken() -> None:
    same = table([query_signals([[0.2, 0.1]], [1, 0], query_id=name) for name in "abc"])
    assert choose_temperature(same, 1) == 0.01


def test_the_temperature_is_chosen_on_queries_that_heads_were_not_detected_on() -> None:
    # By attention, the first head is found up to 0.1 and the second above, on either query; by
    # calibrated signal, each is right on one of them. So the held-out query decides.
    mass = [[0.2, 0.0, 0.0], [0.5, 0.0, 0.4]]
    right, wrong = [0.2, 0.0, 0.0], [0.0, 0.2, 0.2]
    cold = query_signals([right, wrong], [1, 0, 0], query_id="cold", mass=mass)
    hot = query_signals([wrong, right], [1, 0, 0], query_id="hot", mass=mass)
    signals = table([cold, hot])
    assert {choose_temperature(signals, 1, seed) for seed in range(16)} == {0.003, 1.0}
    assert choose_temperature(signals, 1, 3) == choose_temperature(table([hot, cold]), 1, 3)


def test_heads_are_not_detected_on_the_queries_that_choose_the_temperature() -> None:
    # On "clear" the first head is found at any temperature, on "subtle" the second above 0.1, and
    # the second is right. With "clear" among those that heads are found on, all are equal.
    right, wrong = [0.2, 0.0, 0.0], [0.0, 0.2, 0.2]
    attention = {
        "clear": [[0.9, 0.0, 0.0], [0.0, 0.9, 0.0]],
        "subtle": [[0.2, 0.0, 0.0], [0.5, 0.0, 0.4]],
    }
    queries = [
        query_signals([wrong, right], [1, 0, 0], query_id=name, mass=mass)
        for name, mass in attention.items()
    ]
    chosen = {choose_temperature(table(queries), 1, seed) for seed in range(16)}
    assert chosen == {0.01, 1.0}


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "nDCG"},
            "method='nDCG' does not exist; choose one of ndcg, qr, core, layers, discriminability.",
        ),
        (
            {"method": "qr", "count": 0},
            "count=0 is out of range; give 1 to 12, the number of heads with signals.",
        ),
        (
            {"method": "core", "count": 13},
            "count=13 is out of range; give 1 to 12, the number of heads with signals.",
        ),
        (
            {"method": "ndcg", "temperature": 0.1},
            "temperature=0.1 is for method='core'; leave it out.",
        ),
        *(
            (
                {"method": "core", "temperature": temperature},
                f"temperature={temperature} is out of range; give a finite number above 0, or None "
                "to choose one.",
            )
            for temperature in (0, -0.1, math.inf, math.nan)
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        detect(signal_set(), **options)  # type: ignore[arg-type]
    assert str(caught.value) == message


@pytest.mark.parametrize("method", METHODS)
def test_single_candidates_are_refused(method: str) -> None:
    signals = table([query_signals([[0.1]], [1], query_id=name) for name in "ab"])
    with pytest.raises(InputError) as caught:
        detect(signals, method, 1)
    assert str(caught.value) == (
        "none of the 2 queries of written has both relevant and other candidates; "
        "give judged queries with 2 or more candidates."
    )


def test_core_refuses_queries_that_differ_in_grades_alone() -> None:
    signals = table([query_signals([[0.1, 0.2]], [1, 2])])
    with pytest.raises(InputError) as caught:
        detect(signals, "core", 1, temperature=0.1)
    assert str(caught.value) == (
        "no query of written has both relevant candidates and candidates that are not; "
        "method='core' compares the two: give queries with both."
    )


def test_a_temperature_is_not_chosen_on_a_single_query() -> None:
    signals = table([query_signals([[0.1, 0.2]], [0, 1])])
    with pytest.raises(InputError) as caught:
        detect(signals, "core", 1)
    assert str(caught.value) == (
        "only 1 query has both relevant and other candidates, but choosing a temperature takes "
        "2 or more; give more queries, or a temperature."
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["mass", "calibrated"])
def test_signals_that_are_not_finite_are_refused(name: str, value: float) -> None:
    good = query_signals([[0.1, 0.2]], [0, 1], query_id="good")
    wrong = replace(good, query_id="wrong", **{name: torch.tensor([[value, 0.2]])})  # type: ignore[arg-type]
    with pytest.raises(InputError) as caught:
        detect(table([good, wrong]), "ndcg", 1)
    assert str(caught.value) == (
        "signals of query 'wrong' are not finite numbers; compute them again with "
        'dtype="float32".'
    )
