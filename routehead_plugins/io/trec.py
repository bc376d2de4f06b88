"""Read and write TREC runs and judgments, so that trec_eval keeps the order given."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias, TypeVar

from routehead_plugins.errors import CollectionError, InputError
from routehead_plugins.files import StrPath, atomic_write_text, show
from routehead_plugins.io.text_files import is_writable_name, read_lines, reject_repeated

Qrels: TypeAlias = dict[str, dict[str, int]]
"""Query id -> document id -> judgment."""
Run: TypeAlias = dict[str, dict[str, float]]
"""Query id -> document id -> score, inserted best first."""
Rankings: TypeAlias = Mapping[str, Mapping[str, float] | Sequence[tuple[str, float]]]
"""Query id -> documents with scores; the order given is the ranking."""

_SCORE_HEADERS = frozenset({"score", "relevance", "rel", "label"})
_Number = TypeVar("_Number", int, float)


def read_qrels(path: StrPath) -> Qrels:
    """Read judgments.

    Args:
        path: BEIR's three columns, tab-separated, with or without a header, or TREC's four,
            ``qid 0 docid relevance``.

    Raises:
        CollectionError: The file is missing or malformed, or contradicts itself.
    """
    qrels: Qrels = {}
    columns = 0
    expected = "BEIR's 'query-id<TAB>corpus-id<TAB>score' or TREC's 'qid 0 docid relevance'"
    for location, line in read_lines(path, expected):
        fields = line.split("\t")
        fields = fields if len(fields) == 3 else line.split()
        if len(fields) not in (3, 4) or len(fields) != (columns or len(fields)):
            raise CollectionError(
                f"{location}: {show(line, 48)} has {len(fields)} columns; "
                f"expected {columns or '3 or 4'}, {expected}; repair the line."
            )
        is_header = not columns and fields[-1].strip().lower() in _SCORE_HEADERS
        columns = len(fields)
        if is_header:
            continue
        query_id, doc_id = fields[0].strip(), fields[-2].strip()
        judgment = _number(int, fields[-1], "judgment", "an integer", location)
        if qrels.setdefault(query_id, {}).setdefault(doc_id, judgment) != judgment:
            raise CollectionError(
                f"{location}: document {show(doc_id)} is judged {judgment} for query "
                f"{show(query_id)}, and {qrels[query_id][doc_id]} before; expected one judgment; "
                "remove the wrong one."
            )
    return qrels


def read_run(path: StrPath) -> Run:
    """Read a TREC run, best score first; the order and the ranks in the file are ignored.

    Equal scores are ordered as trec_eval does, by descending document id.

    Args:
        path: Lines of ``qid Q0 docid rank score tag``.

    Raises:
        CollectionError: The file is missing or malformed, or ranks a document twice.
    """
    run: Run = {}
    expected = "the six columns 'qid Q0 docid rank score tag'"
    for location, line in read_lines(path, expected):
        fields = line.split()
        if len(fields) != 6:
            raise CollectionError(
                f"{location}: {show(line)} has {len(fields)} columns; "
                f"expected {expected}; repair the line."
            )
        query_id, _, doc_id, _, score, _ = fields
        scores = run.setdefault(query_id, {})
        reject_repeated(doc_id, scores, f"for query {show(query_id)}, document", location)
        scores[doc_id] = _number(float, score, "score", "a finite number", location)
    return {
        query_id: dict(sorted(scores.items(), key=lambda hit: (hit[1], hit[0]), reverse=True))
        for query_id, scores in run.items()
    }


def _number(
    kind: Callable[[str], _Number], text: str, name: str, expected: str, location: str
) -> _Number:
    try:
        # Python reads 1_000 as a number; trec_eval does not.
        value = kind(text.replace("_", "?"))
        if not math.isfinite(value):
            raise ValueError(text)
    except (ValueError, OverflowError) as error:
        raise CollectionError(
            f"{location}: the {name} is {show(text)}; expected {expected}; repair the line."
        ) from error
    return value


def write_run(path: StrPath, run: Rankings, tag: str) -> None:
    """Write a TREC run that trec_eval scores in the order given.

    trec_eval ignores the ranks, keeps scores in single precision and breaks ties by document id.
    Scores are therefore written with all their digits, and lowered where they would tie or rise:
    see `strictly_decreasing`.

    Args:
        path: Path of the file, which appears whole or not at all.
        run: A ranking per query, best first.
        tag: Name of the method, without spaces.

    Raises:
        InputError: A score is NaN, a document is ranked twice, an id or the tag is empty or holds
            white space, see `check_run_names`, or the file cannot be written.
    """
    check_run_names(tag)
    lines = []
    for query_id, scores in decreasing_run(run).items():
        _check_name(query_id, "query id")
        for rank, (doc_id, score) in enumerate(scores.items(), start=1):
            _check_name(doc_id, "document id")
            lines.append(f"{query_id} Q0 {doc_id} {rank} {score!r} {tag}\n")
    atomic_write_text(path, "".join(lines))


def check_run_names(tag: str, query_ids: Iterable[str] = (), doc_ids: Iterable[str] = ()) -> None:
    """Check that `write_run` can write names, before the work for the run is done.

    Args:
        tag: Name of the method.
        query_ids: Ids of queries.
        doc_ids: Ids of documents.

    Raises:
        InputError: A name is empty, or holds white space or what no text file can hold.
    """
    _check_name(tag, "tag")
    for query_id in query_ids:
        _check_name(query_id, "query id")
    for doc_id in doc_ids:
        _check_name(doc_id, "document id")


def _check_name(name: str, kind: str) -> None:
    if name.split() != [name]:
        raise InputError(
            f"{kind} {show(name)} is empty or holds white space; a TREC run separates its columns "
            "by spaces; rename it."
        )
    if not is_writable_name(name):
        raise InputError(
            f"{kind} {show(name)} holds a null character or half of a surrogate pair; "
            "expected Unicode; rename it."
        )


def decreasing_run(rankings: Rankings) -> Run:
    """Lower scores where needed so that they decrease strictly in the order given.

    Args:
        rankings: A ranking per query, best first.

    Raises:
        InputError: A score is NaN, or a document is ranked twice.
    """
    run: Run = {}
    for query_id, ranking in rankings.items():
        scores: dict[str, float] = {}
        for doc_id, score in ranking.items() if isinstance(ranking, Mapping) else ranking:
            if math.isnan(score):
                raise InputError(
                    f"document {show(doc_id)} of query {show(query_id)} has the score nan; "
                    "expected a number; find out what computed it."
                )
            if doc_id in scores:
                raise InputError(
                    f"document {show(doc_id)} is ranked twice for query {show(query_id)}; "
                    "expected each document once; remove the lower one."
                )
            scores[doc_id] = score
        run[query_id] = dict(zip(scores, strictly_decreasing([*scores.values()]), strict=True))
    return run


def strictly_decreasing(scores: Sequence[float]) -> list[float]:
    """Lower scores by as little as possible until they decrease strictly in single precision.

    Scores that already do so stay exactly as they are. Single precision matters because trec_eval
    and pytrec_eval store a score as a C float, in which 1e-300 and 2e-300 are equal. Infinite
    scores become finite.
    """
    import numpy as np

    largest, infinity = float(np.finfo(np.float32).max), np.float32(np.inf)
    # Lower bounds that leave a finite number for every score that follows.
    bounds: list[np.float32] = []
    for _ in scores:
        bounds.append(np.nextafter(bounds[-1] if bounds else -infinity, infinity))
    decreasing = []
    previous = infinity
    for score, bound in zip(map(float, scores), reversed(bounds), strict=True):
        single = np.float32(max(-largest, min(score, largest)))
        lowered = max(min(single, np.nextafter(previous, -infinity)), bound)
        is_unchanged = lowered == single and abs(score) <= largest
        decreasing.append(score if is_unchanged else float(lowered))
        previous = lowered
    return decreasing
