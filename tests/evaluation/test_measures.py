"""Measures, against slow and obvious references."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routehead_plugins.errors import InputError
from routehead_plugins.evaluation.measures import DEFAULT_MEASURES, evaluate, parse_measures

# Imports on first use and slow disks are no failures.
UNHURRIED = settings(deadline=None)

DOCUMENTS = [f"d{number:02}" for number in range(30)]
JUDGMENTS = st.dictionaries(st.sampled_from(DOCUMENTS), st.integers(0, 3), min_size=1)
SCORES = st.sampled_from([0.0, 1e-300, 0.5, -1.0, 1e300]) | st.floats(allow_nan=False)


def ndcg_at_10(ranking: Sequence[str], judgments: dict[str, int]) -> float:
    """Straight from the definition: gains over log2(rank + 1), over the best order's."""

    def dcg(gains: Sequence[int]) -> float:
        return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains[:10], start=1))

    best = dcg(sorted(judgments.values(), reverse=True))
    return dcg([judgments.get(doc_id, 0) for doc_id in ranking]) / best if best else 0.0


def reciprocal_rank_at_10(ranking: Sequence[str], judgments: dict[str, int]) -> float:
    ranks = [r for r, doc_id in enumerate(ranking[:10], start=1) if judgments.get(doc_id, 0) > 0]
    return 1 / ranks[0] if ranks else 0.0


def recall_at_20(ranking: Sequence[str], judgments: dict[str, int]) -> float:
    relevant = {doc_id for doc_id, judgment in judgments.items() if judgment > 0}
    return len(relevant.intersection(ranking[:20])) / len(relevant) if relevant else 0.0


def test_the_default_measures_are_ndcg_rr_and_recall() -> None:
    assert [str(measure) for measure in parse_measures()] == ["nDCG@10", "RR@10", "R@20"]


@pytest.mark.parametrize(
    ("names", "parsed"),
    [
        (["MRR@10"], ["RR@10"]),
        (["RR@10", "MRR@10", "P@5"], ["RR@10", "P@5"]),  # the same measure counts once
        (["AP(rel=2)@100"], ["AP(rel=2)@100"]),
        ([" AP ", "nDCG(judged_only=True)@5"], ["AP", "nDCG(judged_only=True)@5"]),
    ],
)
def test_measures_are_written_as_in_ir_measures(names: list[str], parsed: list[str]) -> None:
    assert [str(measure) for measure in parse_measures(names)] == parsed


@pytest.mark.parametrize(
    "name",
    ["ndgc@10", "nDCG@ten", "nDCG@0", "nDCG@1.5", "nDCG@1.2.3", "P", "AP(rel)", "AP(x=1)", ""],
)
def test_a_measure_that_cannot_be_computed_is_refused(name: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_measures([name])
    assert str(caught.value) == (
        f"measure {name!r} cannot be computed; expected a name of ir_measures such as "
        "nDCG@10, RR@10, R@20 or AP(rel=2)@100; check the spelling."
    )


@pytest.mark.parametrize("names", [[], "nDCG@10"])
def test_measures_must_be_a_list_of_names(names: list[str] | str) -> None:
    with pytest.raises(InputError) as caught:
        parse_measures(names)
    assert str(caught.value) == (
        f"measures={names!r} is not a list of names; give one such as ['nDCG@10', 'RR@10', 'R@20']."
    )


@UNHURRIED
@given(st.lists(st.sampled_from(DOCUMENTS), unique=True), JUDGMENTS, st.data())
def test_every_measure_is_that_of_the_order_given(
    ranking: list[str], judgments: dict[str, int], data: st.DataObject
) -> None:
    # Scores that contradict the order must not matter.
    scores = {doc_id: data.draw(SCORES) for doc_id in ranking}
    evaluation = evaluate({"q": scores}, {"q": judgments})
    assert evaluation.means == pytest.approx(
        {
            "nDCG@10": ndcg_at_10(ranking, judgments),
            "RR@10": reciprocal_rank_at_10(ranking, judgments),
            "R@20": recall_at_20(ranking, judgments),
        }
    )


def test_a_ranking_may_be_pairs_or_a_mapping() -> None:
    qrels = {"q": {"a": 1}}
    assert evaluate({"q": [("b", 1.0), ("a", 1.0)]}, qrels) == evaluate(
        {"q": {"b": 1.0, "a": 1.0}}, qrels
    )


def test_judged_queries_that_the_run_lacks_count_as_zero() -> None:
    qrels = {"q1": {"a": 1}, "q2": {"b": 1}, "q3": {"c": 1}, "q4": {"c": 0}}
    evaluation = evaluate({"q1": [("a", 1.0)], "q3": []}, qrels)
    for measure in DEFAULT_MEASURES:
        assert evaluation.per_query(measure) == {"q1": 1.0, "q2": 0.0, "q3": 0.0, "q4": 0.0}
        assert evaluation.mean(measure) == 0.25


def test_queries_without_judgments_are_ignored() -> None:
    run = {"q1": [("a", 1.0)], "q2": [("a", 1.0)], "q3": [("a", 1.0)]}
    evaluation = evaluate(run, {"q1": {"a": 1}, "q2": {}}, ["nDCG@10"])
    assert evaluation.values == {"nDCG@10": {"q1": 1.0}}


def test_an_empty_run_scores_zero() -> None:
    assert evaluate({}, {"q": {"a": 1}}, ["nDCG@10"]).means == {"nDCG@10": 0.0}


def test_an_alias_finds_its_measure() -> None:
    evaluation = evaluate({"q": [("b", 2.0), ("a", 1.0)]}, {"q": {"a": 1}}, ["MRR@10"])
    assert evaluation.means == {"RR@10": 0.5}
    assert evaluation.mean("MRR@10") == 0.5


def test_a_measure_that_was_not_evaluated_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        evaluate({}, {"q": {"a": 1}}, ["nDCG@10", "R@20"]).mean("P@5")
    assert str(caught.value) == (
        "measure 'P@5' was not evaluated; expected one of nDCG@10, R@20; add it to the measures."
    )


def test_a_run_of_other_queries_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        evaluate({"1": [("a", 1.0)]}, {"q1": {"a": 1}})
    assert str(caught.value) == (
        "no query of the run is judged: the run has '1', the qrels have 'q1'; "
        "expected the same ids; use the run's own qrels."
    )


def test_judgments_that_judge_nothing_are_refused() -> None:
    with pytest.raises(InputError) as caught:
        evaluate({"q": [("a", 1.0)]}, {"q": {}})
    assert str(caught.value) == (
        "the qrels judge no document; expected judgments; check the qrels file."
    )


def test_importing_is_cheap() -> None:
    script = (
        "import sys, routehead_plugins.evaluation, routehead_plugins.io\n"
        "heavy = {'torch', 'numpy', 'scipy', 'ir_measures', 'rich'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])
