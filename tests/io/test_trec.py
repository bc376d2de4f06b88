"""Judgments and runs, and scores that trec_eval reads in the order given."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
from hypothesis import example, given, settings
from hypothesis import strategies as st
from text_files import Reader, check_malformed, file

from routehead_plugins.errors import InputError
from routehead_plugins.io.trec import (
    Rankings,
    check_run_names,
    decreasing_run,
    read_qrels,
    read_run,
    strictly_decreasing,
    write_run,
)

# Imports on first use and slow disks are no failures.
UNHURRIED = settings(deadline=None)

LARGEST = float(np.finfo(np.float32).max)

SCORES = st.lists(st.floats(allow_nan=False), max_size=40)
# Few distinct values, so that ties and near ties are the rule.
CLOSE_SCORES = st.lists(
    st.sampled_from([0.0, -0.0, 1e-300, 2e-300, 5e-324, 1.0, 1.0 + 1e-12, -1.0, 1e300, -1e300]),
    max_size=40,
)
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(
    lambda name: name.split() == [name]
)
RANKINGS = st.dictionaries(
    NAMES,
    st.lists(
        st.tuples(NAMES, st.floats(allow_nan=False)),
        min_size=1,
        max_size=12,
        unique_by=lambda hit: hit[0],
    ),
    max_size=4,
)

FIELDS = "expected the six columns 'qid Q0 docid rank score tag'; repair the line."
CELLS = "BEIR's 'query-id<TAB>corpus-id<TAB>score' or TREC's 'qid 0 docid relevance'"
HEADER = "query-id\tcorpus-id\tscore\n"


@pytest.mark.parametrize(
    "content",
    [
        HEADER + "q1\td1\t2\nq2\td 2\t-1\n",  # BEIR; an id may hold a space between tabs
        "q1\td1\t2\nq2\td 2\t-1\n",  # BEIR without its header
        HEADER + "q1\td1\t2\nq1\td1\t2\nq2\td 2\t-1\n",  # the same judgment twice
    ],
)
def test_beir_judgments_are_read(tmp_path: Path, content: str) -> None:
    assert read_qrels(file(tmp_path, "t.tsv", content)) == {"q1": {"d1": 2}, "q2": {"d 2": -1}}


def test_trec_judgments_are_read(tmp_path: Path) -> None:
    path = file(tmp_path, "qrels.txt", "q1 0 d1 2\nq1\tQ0\td2\t0\nq2 0 d1 1\n")
    assert read_qrels(path) == {"q1": {"d1": 2, "d2": 0}, "q2": {"d1": 1}}


def test_a_run_is_read_best_first_with_ties_as_trec_eval_orders_them(tmp_path: Path) -> None:
    path = file(
        tmp_path, "r", "q Q0 a 1 1 t\np Q0 a 1 1 t\nq Q0 c 2 1.0 t\nq Q0 b 3 1 t\nq Q0 d 4 2 t\n"
    )
    run = read_run(path)
    assert list(run["q"]) == ["d", "c", "b", "a"]
    assert list(run) == ["q", "p"]
    judged = {"q": {"a": 1}}
    # 1 / rank of a: fourth
    assert reciprocal_ranks(judged, {"q": run["q"]}) == {"q": 1 / 4}


@pytest.mark.parametrize(
    ("reader", "name", "content", "line", "problem"),
    [
        (
            read_qrels,
            "t.tsv",
            HEADER + "q\td\t1.5",
            2,
            "the judgment is '1.5'; expected an integer; repair the line.",
        ),
        (
            read_qrels,
            "t.tsv",
            "q\td\thigh",
            1,
            "the judgment is 'high'; expected an integer; repair the line.",
        ),
        (
            read_qrels,
            "t.txt",
            "q 0 d " + "9" * 400,  # beyond every float
            1,
            f"the judgment is '{'9' * 27}...{'9' * 28}'; expected an integer; repair the line.",
        ),
        (
            read_qrels,
            "t.tsv",
            HEADER + "q\td",
            2,
            f"'q\\td' has 2 columns; expected 3, {CELLS}; repair the line.",
        ),
        (
            read_qrels,
            "t.txt",
            "q 0 d 1\nq d 1\n",
            2,
            f"'q d 1' has 3 columns; expected 4, {CELLS}; repair the line.",
        ),
        (
            read_qrels,
            "t.tsv",
            "only",
            1,
            f"'only' has 1 columns; expected 3 or 4, {CELLS}; repair the line.",
        ),
        (
            read_qrels,
            "t.txt",
            "q 0 d 1\nq 0 d 2",
            2,
            "document 'd' is judged 2 for query 'q', and 1 before; expected one judgment; "
            "remove the wrong one.",
        ),
        (read_run, "r", "q Q0 d 1 0.5", 1, f"'q Q0 d 1 0.5' has 5 columns; {FIELDS}"),
        (
            read_run,
            "r",
            "q Q0 d 1 2 t\np Q0 d 1 2 t\nq Q0 d 2 1 t",
            3,
            "for query 'q', document 'd' occurs twice; expected each id once; remove one.",
        ),
        (
            read_run,
            "r",
            "q Q0 d 1 nan t",
            1,
            "the score is 'nan'; expected a finite number; repair the line.",
        ),
        (
            read_run,
            "r",
            "q Q0 d 1 -inf t",
            1,
            "the score is '-inf'; expected a finite number; repair the line.",
        ),
        (
            read_run,
            "r",
            "q Q0 d 1 1_0 t",
            1,
            "the score is '1_0'; expected a finite number; repair the line.",
        ),
    ],
)
def test_a_malformed_line_is_named_with_its_problem(
    tmp_path: Path, reader: Reader, name: str, content: str | bytes, line: int, problem: str
) -> None:
    check_malformed(reader, file(tmp_path, name, content), line, problem)


def reciprocal_ranks(
    qrels: dict[str, dict[str, int]], run: dict[str, dict[str, float]]
) -> dict[str, float]:
    """What trec_eval's own code makes of the scores."""
    results = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(run)
    return {query: values["recip_rank"] for query, values in results.items()}


def assert_evaluated_in_order(ranking: list[str], scores: dict[str, float]) -> None:
    for rank, doc_id in enumerate(ranking, start=1):
        assert reciprocal_ranks({"q": {doc_id: 1}}, {"q": scores}) == {"q": 1 / rank}


@UNHURRIED
@given(SCORES | CLOSE_SCORES)
@example([math.inf, math.inf, LARGEST, -LARGEST, -math.inf, -math.inf])
@example([-math.inf] * 5)
@example([3e-7, 2e-7, 1e-7])
def test_scores_decrease_strictly_in_single_precision(scores: list[float]) -> None:
    single = np.array(strictly_decreasing(scores), dtype=np.float32)
    assert np.isfinite(single).all()
    assert (np.diff(single.astype(np.float64)) < 0).all()


@UNHURRIED
@given(st.lists(st.floats(-1e30, 1e30), unique_by=np.float32).map(lambda s: sorted(s)[::-1]))
def test_scores_that_decrease_already_stay_as_they_are(scores: list[float]) -> None:
    assert strictly_decreasing(scores) == scores


def test_a_tie_is_lowered_by_the_smallest_step() -> None:
    below = np.nextafter(np.float32(1), np.float32(0))
    assert strictly_decreasing([1.0, 1.0, 1.0, 0.5]) == [
        1.0,
        float(below),
        float(np.nextafter(below, np.float32(0))),
        0.5,
    ]
    smallest = float(np.nextafter(np.float32(0), np.float32(1)))
    assert strictly_decreasing([0.0, -0.0, 1e-300]) == [0.0, -smallest, -2 * smallest]


def test_no_scores_stay_none() -> None:
    assert strictly_decreasing([]) == []


@UNHURRIED
@given(RANKINGS)
def test_a_written_run_is_read_back_in_its_order(
    rankings: dict[str, list[tuple[str, float]]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.trec"
        write_run(path, rankings, "tag")
        read = read_run(path)
    assert {query: list(scores) for query, scores in read.items()} == {
        query: [doc_id for doc_id, _ in ranking] for query, ranking in rankings.items()
    }


@UNHURRIED
@given(RANKINGS)
def test_writing_what_was_read_changes_nothing(
    rankings: dict[str, list[tuple[str, float]]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder) / "1", Path(folder) / "2"
        write_run(first, rankings, "tag")
        write_run(second, read_run(first), "tag")
        assert first.read_bytes() == second.read_bytes()


@UNHURRIED
@given(CLOSE_SCORES)
def test_trec_eval_scores_a_written_run_in_the_order_given(scores: list[float]) -> None:
    # Ascending ids: trec_eval would turn every tie around.
    ranking = [(f"d{position:02}", score) for position, score in enumerate(scores)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.trec"
        write_run(path, {"q": ranking}, "tag")
        with path.open() as stream:
            parsed = pytrec_eval.parse_run(stream)
    assert_evaluated_in_order([doc_id for doc_id, _ in ranking], parsed.get("q", {}))


def test_a_run_has_trecs_columns_and_full_precision(tmp_path: Path) -> None:
    path = tmp_path / "run.trec"
    write_run(path, {"q1": [("b", 0.1 + 0.2), ("a", 1e-9)], "q2": {"c": np.float64(2)}}, "rh")
    assert path.read_text() == (
        "q1 Q0 b 1 0.30000000000000004 rh\nq1 Q0 a 2 1e-09 rh\nq2 Q0 c 1 2.0 rh\n"
    )


@pytest.mark.parametrize(
    ("run", "tag", "message"),
    [
        (
            {"q": [("d", math.nan)]},
            "t",
            "document 'd' of query 'q' has the score nan; expected a number; "
            "find out what computed it.",
        ),
        (
            {"q": [("d", 2.0), ("d", 1.0)]},
            "t",
            "document 'd' is ranked twice for query 'q'; expected each document once; "
            "remove the lower one.",
        ),
        (
            {"q": [("d 1", 2.0)]},
            "t",
            "document id 'd 1' is empty or holds white space; a TREC run separates its columns "
            "by spaces; rename it.",
        ),
        (
            {"": [("d", 2.0)]},
            "t",
            "query id '' is empty or holds white space; a TREC run separates its columns "
            "by spaces; rename it.",
        ),
        (
            {"q\ud83d": [("d", 1.0)]},
            "t",
            "query id 'q\\ud83d' holds a null character or half of a surrogate pair; "
            "expected Unicode; rename it.",
        ),
        (
            {},
            "my tag",
            "tag 'my tag' is empty or holds white space; a TREC run separates its columns "
            "by spaces; rename it.",
        ),
    ],
)
def test_a_run_that_cannot_be_written_is_refused(
    tmp_path: Path, run: Rankings, tag: str, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        write_run(tmp_path / "run", run, tag)
    assert str(caught.value) == message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tag", "query_ids", "doc_ids", "start"),
    [
        ("my tag", ["q"], ["d"], "tag 'my tag' is empty or holds white space"),
        ("t", ["q", "q 2"], ["d"], "query id 'q 2' is empty or holds white space"),
        ("t", ["q"], ["d", ""], "document id '' is empty or holds white space"),
        ("t", ["q"], ["d\0"], "document id 'd\\x00' holds a null character"),
    ],
)
def test_names_that_no_run_can_hold_are_refused_before_the_work(
    tag: str, query_ids: list[str], doc_ids: list[str], start: str
) -> None:
    check_run_names("t", ["q"], ["d"])
    with pytest.raises(InputError) as caught:
        check_run_names(tag, query_ids, doc_ids)
    assert str(caught.value).startswith(start)


def test_the_callers_run_is_left_alone() -> None:
    run = {"q": {"a": 1.0, "b": 1.0}}
    assert decreasing_run(run)["q"]["b"] < 1.0
    assert run == {"q": {"a": 1.0, "b": 1.0}}
