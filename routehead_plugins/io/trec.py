"""TREC runs and judgments, and scores that trec_eval reads in the order given."""

from __future__ import annotations

import math
import reprlib
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias, TypeVar

from routehead_plugins.errors import CollectionError, InputError
from routehead_plugins.io.text_files import (
    StrPath,
    atomic_write_text,
    malformed,
    numbered_lines,
    reject_repeated,
)

Qrels: TypeAlias = dict[str, dict[str, int]]
"""Query -> document -> judgment."""
Run: TypeAlias = dict[str, dict[str, float]]
"""Query -> document -> score, inserted best first."""
Rankings: TypeAlias = Mapping[str, Mapping[str, float] | Sequence[tuple[str, float]]]
"""Query -> documents with scores; the order given is the ranking."""

_LARGEST = 0x7F7FFFFF  # the bits of the largest finite single-precision number
_LARGEST_FLOAT: float = struct.unpack("<f", struct.pack("<i", _LARGEST))[0]
_SCORE_HEADERS = frozenset({"score", "relevance", "rel", "label"})
_Number = TypeVar("_Number", int, float)


def read_qrels(path: StrPath) -> Qrels:
    """Read judgments.

    Args:
        path: Either BEIR's three columns, tab-separated, with a header, or TREC's four,
            ``qid 0 docid relevance``.

    Raises:
        CollectionError: The file is missing or malformed, or contradicts itself.
    """
    qrels: Qrels = {}
    columns = 0
    expected = "BEIR's 'query-id<TAB>corpus-id<TAB>score' or TREC's 'qid 0 docid relevance'"
    for line, content in numbered_lines(path, expected):
        fields = content.split("\t")
        fields = fields if len(fields) == 3 else content.split()
        if len(fields) not in (3, 4) or len(fields) != (columns or len(fields)):
            raise malformed(
                path,
                line,
                f"{reprlib.repr(content)} has {len(fields)} columns; "
                f"expected {columns or '3 or 4'}, {expected}; repair the line.",
            )
        is_header = not columns and fields[-1].strip().lower() in _SCORE_HEADERS
        columns = len(fields)
        if is_header:
            continue
        query_id, doc_id = fields[0].strip(), fields[-2].strip()
        judgment = _number(int, fields[-1], "judgment", "an integer", path, line)
        if qrels.setdefault(query_id, {}).setdefault(doc_id, judgment) != judgment:
            raise malformed(
                path,
                line,
                f"document {doc_id!r} is judged {judgment} for query {query_id!r}, and "
                f"{qrels[query_id][doc_id]} before; expected one judgment; remove the wrong one.",
            )
    return qrels


def read_run(path: StrPath) -> Run:
    """Read a TREC run, best first whatever the order and ranks in the file.

    Equal scores are ordered as trec_eval does, by descending document id.

    Args:
        path: Lines of ``qid Q0 docid rank score tag``.

    Raises:
        CollectionError: The file is missing or malformed, or ranks a document twice.
    """
    run: Run = {}
    expected = "the six columns 'qid Q0 docid rank score tag'"
    for line, content in numbered_lines(path, expected):
        fields = content.split()
        if len(fields) != 6:
            raise malformed(
                path,
                line,
                f"{reprlib.repr(content)} has {len(fields)} columns; "
                f"expected {expected}; repair the line.",
            )
        query_id, _, doc_id, _, score, _ = fields
        scores = run.setdefault(query_id, {})
        reject_repeated(doc_id, scores, f"for query {query_id!r}, document", path, line)
        scores[doc_id] = _number(float, score, "score", "a finite number", path, line)
    return {
        query_id: dict(sorted(scores.items(), key=lambda hit: (hit[1], hit[0]), reverse=True))
        for query_id, scores in run.items()
    }


def write_run(path: StrPath, run: Rankings, tag: str) -> None:
    """Write a TREC run that trec_eval scores in the order given.

    trec_eval ignores the ranks, keeps scores in single precision and breaks ties by document id.
    Scores are therefore written in full, and those that do not fall are lowered: see
    `strictly_decreasing`.

    Args:
        path: Where to write; the file appears whole or not at all.
        run: A ranking per query, best first.
        tag: Name of the method, without spaces.

    Raises:
        InputError: A score is NaN, a document is ranked twice, an id or the tag is empty or holds
            white space, or the file cannot be written.
    """
    _reject_spaces(tag, "tag")
    lines = []
    for query_id, scores in decreasing_run(run).items():
        _reject_spaces(query_id, "query id")
        for rank, (doc_id, score) in enumerate(scores.items(), start=1):
            _reject_spaces(doc_id, "document id")
            lines.append(f"{query_id} Q0 {doc_id} {rank} {score!r} {tag}\n")
    atomic_write_text(path, "".join(lines))


def decreasing_run(rankings: Rankings) -> Run:
    """Give every ranking scores that fall strictly in the order given.

    Args:
        rankings: A ranking per query, best first.

    Raises:
        InputError: A score is NaN, or a document is ranked twice.
    """
    run: Run = {}
    for query_id, ranking in rankings.items():
        hits = list(ranking.items() if isinstance(ranking, Mapping) else ranking)
        scores: dict[str, float] = {}
        for doc_id, score in hits:
            if math.isnan(score):
                raise InputError(
                    f"document {doc_id!r} of query {query_id!r} has the score nan; "
                    "expected a number; find out what computed it."
                )
            if doc_id in scores:
                raise InputError(
                    f"document {doc_id!r} is ranked twice for query {query_id!r}; "
                    "expected each document once; remove the lower one."
                )
            scores[doc_id] = score
        run[query_id] = dict(zip(scores, strictly_decreasing([*scores.values()]), strict=True))
    return run


def strictly_decreasing(scores: Sequence[float]) -> list[float]:
    """Lower scores by as little as possible until they fall strictly, in single precision too.

    Scores that already fall stay exactly as they are. Single precision because trec_eval (and
    pytrec_eval) store a score as a C float: 1e-300 and 2e-300 are equal to them.

    Args:
        scores: In the order of the ranking; infinite ones become the largest finite ones. No NaN.
    """
    decreasing = []
    ceiling = _LARGEST
    for behind, score in zip(range(len(scores) - 1, -1, -1), map(float, scores), strict=True):
        own = _ordinal(score)
        # Room is kept below for the scores that follow, so that none becomes infinite.
        place = max(min(own, ceiling), behind - _LARGEST)
        keep = place == own and abs(score) <= _LARGEST_FLOAT
        decreasing.append(score if keep else _single(place))
        ceiling = place - 1
    return decreasing


def _ordinal(score: float) -> int:
    """Number the finite single-precision floats in their order, zero being 0."""
    finite = max(-_LARGEST_FLOAT, min(score, _LARGEST_FLOAT))
    bits: int = struct.unpack("<i", struct.pack("<f", finite))[0]
    return bits if bits >= 0 else -(bits & 0x7FFFFFFF)


def _single(ordinal: int) -> float:
    bits = ordinal if ordinal >= 0 else -ordinal | 0x80000000
    value: float = struct.unpack("<f", struct.pack("<I", bits))[0]
    return value


def _number(
    kind: Callable[[str], _Number], text: str, name: str, expected: str, path: StrPath, line: int
) -> _Number:
    try:
        # Python reads 1_000 as a number; trec_eval does not.
        value = kind(text.replace("_", "?"))
    except ValueError as error:
        raise _not_a_number(text, name, expected, path, line) from error
    if not math.isfinite(value):
        raise _not_a_number(text, name, expected, path, line)
    return value


def _not_a_number(text: str, name: str, expected: str, path: StrPath, line: int) -> CollectionError:
    return malformed(
        path, line, f"the {name} is {reprlib.repr(text)}; expected {expected}; repair the line."
    )


def _reject_spaces(name: str, kind: str) -> None:
    if name.split() != [name]:
        raise InputError(
            f"{kind} {name!r} is empty or holds white space; a TREC run separates its columns "
            "by spaces; rename it."
        )
