"""Measures, significance and the table, against slow and obvious references."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from routehead_plugins.errors import InputError
from routehead_plugins.evaluation.table import (
    DEFAULT_MEASURES,
    Evaluation,
    ResultTable,
    compare,
    evaluate,
    parse_measures,
)

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


def one_measure(**methods: Sequence[float]) -> dict[str, Evaluation]:
    return {
        name: Evaluation({"nDCG@10": {f"q{n}": value for n, value in enumerate(values)}})
        for name, values in methods.items()
    }


# measures


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


# evaluate


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
        "the run's queries, such as '1', are none of the judged ones, such as 'q1'; "
        "expected the same ids; use the run's own qrels."
    )


def test_judgments_that_judge_nothing_are_refused() -> None:
    with pytest.raises(InputError) as caught:
        evaluate({"q": [("a", 1.0)]}, {"q": {}})
    assert str(caught.value) == (
        "the qrels judge no document; expected judgments; check the qrels file."
    )


# compare


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


# the table


def table() -> ResultTable:
    qrels = {f"q{n}": {"a": 2, "b": 1} for n in range(6)}
    worst, best = [("c", 3.0), ("b", 2.0)], [("a", 3.0), ("b", 2.0)]
    measures = ["nDCG@10", "RR@10"]
    return ResultTable(
        {
            "tiny": {
                "bm25": evaluate({query: worst for query in qrels}, qrels, measures),
                "heads|13-1": evaluate({query: best for query in qrels}, qrels, measures),
            }
        },
        baseline="bm25",
        settings={"model": "embedded"},
        date="2026-11-21T00:00:00+00:00",
    )


def test_the_markdown_table_has_means_and_comparisons() -> None:
    assert table().to_markdown() == (
        "| collection | method | nDCG@10 | RR@10 | nDCG@10 - bm25 [95% CI] | p (Holm) "
        "| win/tie/loss |\n"
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |\n"
        "| tiny | bm25 | 0.2398 | 0.5000 | - | - | - |\n"
        "| tiny | heads\\|13-1 | 1.0000 | 1.0000 | +0.7602 [+0.7602, +0.7602] | 0.0312 "
        "| 6/0/0 |\n"
    )


def test_the_terminal_table_shows_the_same_cells() -> None:
    output = io.StringIO()
    Console(file=output, width=140).print(table().to_rich())
    title, *lines = output.getvalue().splitlines()
    assert title.strip() == "tiny"
    assert [re.split(" {2,}", line.strip()) for line in lines[3:5]] == [
        ["bm25", "0.2398", "0.5000", "-", "-", "-"],
        ["heads|13-1", "1.0000", "1.0000", "+0.7602 [+0.7602, +0.7602]", "0.0312", "6/0/0"],
    ]


def test_the_terminal_table_names_the_collections_where_there_are_several() -> None:
    one = table()
    two = replace(one, evaluations={"a": one.evaluations["tiny"], "b": one.evaluations["tiny"]})
    output = io.StringIO()
    Console(file=output, width=140).print(two.to_rich())
    starts = [line.split()[:2] for line in output.getvalue().splitlines() if line.strip()]
    assert ["a", "bm25"] in starts
    assert ["b", "bm25"] in starts


def test_the_json_file_holds_all_that_is_needed_to_repeat_it(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    table().write_json(path)
    content = json.loads(path.read_text())
    assert content == table().to_dict()
    assert content["date"] == "2026-11-21T00:00:00+00:00"
    assert content["settings"] == {"model": "embedded"}
    assert (content["baseline"], content["seed"]) == ("bm25", 0)
    assert {"python", "torch", "transformers", "routehead-plugins"} <= content["versions"].keys()
    tiny = content["collections"]["tiny"]
    assert tiny["methods"]["bm25"]["queries"] == 6
    assert tiny["methods"]["bm25"]["means"]["RR@10"] == 0.5
    assert tiny["methods"]["bm25"]["per_query"]["RR@10"] == {f"q{n}": 0.5 for n in range(6)}
    assert [(c["measure"], c["method"], c["wins"]) for c in tiny["comparisons"]] == [
        ("nDCG@10", "heads|13-1", 6),
        ("RR@10", "heads|13-1", 6),
    ]


def test_settings_that_json_cannot_hold_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        replace(table(), settings={"heads": {1}}).write_json(tmp_path / "table.json")
    assert str(caught.value) == (
        "settings={'heads': {1}} cannot be written as JSON (Object of type set is not JSON "
        "serializable); expected text, finite numbers, lists and dicts; convert them."
    )
    assert list(tmp_path.iterdir()) == []


def test_a_table_without_its_baseline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^baseline='bm26' was not evaluated; expected one of"):
        replace(table(), baseline="bm26").write_json(tmp_path / "table.json")


def test_importing_is_cheap() -> None:
    script = (
        "import sys, routehead_plugins.evaluation, routehead_plugins.collections\n"
        "heavy = {'torch', 'numpy', 'scipy', 'ir_measures', 'rich'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])
