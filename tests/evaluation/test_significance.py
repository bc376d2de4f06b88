"""Confidence intervals and significance tests, against exact enumeration."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routehead_plugins.errors import InputError
from routehead_plugins.evaluation.measures import Evaluation
from routehead_plugins.evaluation.significance import compare

# Imports on first use and slow disks are no failures.
UNHURRIED = settings(deadline=None)


def one_measure(**methods: Sequence[float]) -> dict[str, Evaluation]:
    return {
        name: Evaluation({"nDCG@10": {f"q{n}": value for n, value in enumerate(values)}})
        for name, values in methods.items()
    }


@UNHURRIED
@given(st.lists(st.sampled_from([-0.5, -0.25, 0.0, 0.25, 1.0]), min_size=1, max_size=9))
def test_p_is_the_share_of_sign_flips_at_least_as_extreme(differences: list[float]) -> None:
    base = [0.5] * len(differences)
    evaluations = one_measure(base=base, other=[0.5 + d for d in differences])
    flips = itertools.product((1, -1), repeat=len(differences))
    sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in flips]
    extreme = sum(total >= abs(sum(differences)) for total in sums)
    [comparison] = compare(evaluations, "base", "nDCG@10")
    assert comparison.p == pytest.approx(extreme / len(sums))


def test_a_comparison_counts_wins_ties_and_losses() -> None:
    evaluations = one_measure(base=[0.5, 0.5, 0.5, 0.1 + 0.2], other=[0.6, 0.9, 0.4, 0.3])
    [comparison] = compare(evaluations, "base", "nDCG@10")
    assert (comparison.wins, comparison.ties, comparison.losses) == (2, 1, 1)
    assert comparison.queries == 4
    assert comparison.difference == pytest.approx(0.1)
    assert (comparison.method, comparison.baseline, comparison.measure) == (
        "other",
        "base",
        "nDCG@10",
    )


def test_p_values_are_corrected_by_holms_method() -> None:
    evaluations = one_measure(
        base=[0.0] * 8, six=[1.0] * 6 + [0.0] * 2, eight=[1.0] * 8, seven=[1.0] * 7 + [0.0]
    )
    six, eight, seven = compare(evaluations, "base", "nDCG@10")
    # Of 256 sign flips 2, 4 and 8 are as extreme: times 3, 2 and 1, never decreasing.
    assert [c.method for c in (six, eight, seven)] == ["six", "eight", "seven"]
    assert (eight.p, eight.p_holm) == pytest.approx((2 / 256, 6 / 256))
    assert (seven.p, seven.p_holm) == pytest.approx((4 / 256, 8 / 256))
    assert (six.p, six.p_holm) == pytest.approx((8 / 256, 8 / 256))


def test_holms_correction_stops_at_one_and_never_falls() -> None:
    evaluations = one_measure(base=[0.0] * 3, equal=[0.0] * 3, mixed=[1.0, -1.0, 1.0])
    assert [c.p_holm for c in compare(evaluations, "base", "nDCG@10")] == [1.0, 1.0]


def test_the_interval_is_that_of_the_resampled_mean() -> None:
    # The mean of two draws from {0, 1} is 0, 1/2, 1 with probability 1/4, 1/2, 1/4.
    [two] = compare(one_measure(base=[0.0, 0.0], other=[0.0, 1.0]), "base", "nDCG@10")
    assert (two.low, two.high) == (0.0, 1.0)
    values = np.random.default_rng(7).normal(0.1, 0.3, size=400)
    [many] = compare(one_measure(base=[0.0] * 400, other=values.tolist()), "base", "nDCG@10")
    error = 1.96 * values.std() / math.sqrt(400)
    assert (many.low, many.high) == pytest.approx(
        (values.mean() - error, values.mean() + error), abs=2e-3
    )


def test_a_large_sample_is_tested_by_resampling() -> None:
    values = np.random.default_rng(7).normal(0.03, 0.3, size=400)
    [comparison] = compare(one_measure(base=[0.0] * 400, other=values.tolist()), "base", "nDCG@10")
    # The sign-flip distribution of a mean of 400 is close to normal.
    deviation = math.sqrt((values**2).sum()) / 400
    normal = math.erfc(abs(values.mean()) / deviation / math.sqrt(2))
    assert comparison.p == pytest.approx(normal, abs=0.02)


def test_a_single_query_proves_nothing() -> None:
    [comparison] = compare(one_measure(base=[0.25], other=[1.0]), "base", "nDCG@10")
    assert (comparison.p, comparison.low, comparison.high) == (1.0, 0.75, 0.75)


def test_equal_differences_have_an_interval_of_no_width() -> None:
    [equal] = compare(one_measure(base=[0.25] * 5, other=[0.5] * 5), "base", "nDCG@10")
    assert (equal.low, equal.high) == (0.25, 0.25)
    [same] = compare(one_measure(base=[0.25] * 5, other=[0.25] * 5), "base", "nDCG@10")
    assert (same.p, same.low, same.high) == (1.0, 0.0, 0.0)


def test_the_same_seed_gives_the_same_figures_whatever_the_other_methods() -> None:
    values = np.random.default_rng(3).random((3, 50)).tolist()
    evaluations = one_measure(base=values[0], one=values[1], two=values[2])
    first, second = compare(evaluations, "base", "nDCG@10", seed=5)
    assert compare(evaluations, "base", "nDCG@10", seed=5) == [first, second]
    [alone] = compare({k: evaluations[k] for k in ("base", "two")}, "base", "nDCG@10", seed=5)
    assert replace(alone, p_holm=second.p_holm) == second
    assert compare(evaluations, "base", "nDCG@10", seed=6) != [first, second]


def test_the_baseline_alone_has_no_comparison() -> None:
    assert compare(one_measure(base=[0.5]), "base", "nDCG@10") == []


def test_a_baseline_that_was_not_evaluated_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        compare(one_measure(all=[1.0], qr=[1.0]), "bm25", "nDCG@10")
    assert str(caught.value) == (
        "baseline='bm25' was not evaluated; expected one of all, qr; evaluate it too."
    )


def test_methods_on_different_queries_are_not_compared() -> None:
    with pytest.raises(InputError) as caught:
        compare(one_measure(bm25=[0.5, 0.5], all=[0.5]), "bm25", "nDCG@10")
    assert str(caught.value) == (
        "'all' was evaluated on 1 queries and the baseline 'bm25' on 2, which are not the same; "
        "expected one set; use the same qrels for both."
    )
