"""Where in a document the answer is: attention by token to spans of characters."""

from __future__ import annotations

import re
from collections.abc import Sequence

from routehead_plugins.data import Span, TextSpan

# Runs of anything but space; where a script writes none, every character is a word.
_NO_SPACES = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_NO_SPACES}]|[^\s{_NO_SPACES}]+")


def evidence_spans(
    text: str, offsets: Sequence[tuple[int, int]], scores: Sequence[float]
) -> tuple[TextSpan, ...]:
    """Find the passages that carried a document's score.

    Tokens are summed into words, every word is averaged with its two neighbours, and of what lies
    above the document's mean all maximal scoring segments are taken: runs that no word before or
    after would improve.

    Args:
        text: The document.
        offsets: Characters ``[start, end)`` of every token read; later text was cut off.
        scores: Score of every token, in the same order.

    Returns:
        Spans that begin and end with a word, most telling first; none overlap. A span's score is
        how far its words stand above the document's mean, summed.
    """
    words = [Span(*match.span()) for match in _WORD.finditer(text)]
    sums = _word_scores(words, offsets, scores)
    read = max((end for _, end in offsets), default=0)
    words = [word for word in words if word.start < read]
    if not words:
        return ()
    smooth = _averaged(sums[: len(words)])
    mean = sum(smooth) / len(smooth)
    above = [score - mean for score in smooth]
    spans = [
        TextSpan(words[first].start, words[last - 1].end, sum(above[first:last]))
        for first, last in maximal_segments(above)
    ]
    return tuple(sorted(spans, key=lambda span: (-span.score, span.start)))


def _word_scores(
    words: Sequence[Span], offsets: Sequence[tuple[int, int]], scores: Sequence[float]
) -> list[float]:
    """Sum tokens into the word in which they begin; a token may begin with the space before it."""
    sums = [0.0] * len(words)
    place = 0
    for (_, end), score in zip(offsets, scores, strict=True):
        while place < len(words) - 1 and words[place].end < end:
            place += 1
        if words:
            sums[place] += score
    return sums


def _averaged(scores: Sequence[float]) -> list[float]:
    """Average every place with its neighbours: words answer together, not alone."""
    windows = (scores[max(0, place - 1) : place + 2] for place in range(len(scores)))
    return [sum(window) / len(window) for window in windows]


def maximal_segments(scores: Sequence[float]) -> list[tuple[int, int]]:
    """Find all maximal scoring segments (Ruzzo and Tompa, ISMB 1999).

    Args:
        scores: Positive where a place speaks for itself, negative where it does not.

    Returns:
        Half-open ranges, ascending, each with a positive sum.
    """
    # (start, end, sum before the start, sum up to the end)
    segments: list[tuple[int, int, float, float]] = []
    total = 0.0
    for place, score in enumerate(scores):
        before, total = total, total + score
        if score <= 0:
            continue
        start, low, high = place, before, total
        while True:
            # The nearest segment that begins lower: it may be worth joining.
            joined = next(
                (i for i in range(len(segments) - 1, -1, -1) if segments[i][2] < low), None
            )
            if joined is None or segments[joined][3] >= high:
                break
            start, low = segments[joined][0], segments[joined][2]
            del segments[joined:]
        segments.append((start, place + 1, low, high))
    return [(start, end) for start, end, _, _ in segments]
