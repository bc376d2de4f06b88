"""Evidence: the passages of a document that carried its score, from attention by token."""

from __future__ import annotations

import re
from collections.abc import Sequence

from routehead_plugins.data import Span, TextSpan

# A word is a run without spaces; in scripts without spaces, every character is a word.
NO_SPACES = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{NO_SPACES}]|[^\s{NO_SPACES}]+")


def evidence_spans(
    text: str, offsets: Sequence[tuple[int, int]], scores: Sequence[float]
) -> tuple[TextSpan, ...]:
    """Find the passages that carried a document's score.

    Token scores are summed into words, smoothed over each word and its two neighbours, and reduced
    by the document's mean. The passages are all maximal scoring segments of the result: runs of
    words that no extension on either side would improve.

    Args:
        text: The document.
        offsets: Characters ``[start, end)`` of every token read; later text was cut off.
        scores: Score of every token, in the order of the offsets.

    Returns:
        Spans that start and end at words and do not overlap, highest score first. A span's score is
        the sum of its words' scores above the document's mean.
    """
    words = [Span(*match.span()) for match in _WORD.finditer(text)]
    sums = _word_scores(words, offsets, scores)
    read_end = max((end for _, end in offsets), default=0)
    words = [word for word in words if word.start < read_end]
    if not words:
        return ()
    # Each word is averaged with its neighbours.
    windows = [sums[max(0, index - 1) : min(index + 2, len(words))] for index in range(len(words))]
    smooth = [sum(window) / len(window) for window in windows]
    mean = sum(smooth) / len(smooth)
    above = [score - mean for score in smooth]
    spans = [
        TextSpan(words[first].start, words[last - 1].end, sum(above[first:last]))
        for first, last in maximal_segments(above)
    ]
    return tuple(sorted(spans, key=lambda span: (-span.score, span.start)))


def apart(spans: Sequence[TextSpan]) -> tuple[TextSpan, ...]:
    """Leave out spans that overlap one of a higher score; the highest score comes first."""
    kept: list[TextSpan] = []
    for span in sorted(spans, key=lambda span: (-span.score, span.start)):
        if all(span.end <= other.start or other.end <= span.start for other in kept):
            kept.append(span)
    return tuple(kept)


def _word_scores(
    words: Sequence[Span], offsets: Sequence[tuple[int, int]], scores: Sequence[float]
) -> list[float]:
    """Sum token scores by word; a token belongs to the first word that reaches to its end."""
    # Tokens may start with the space before a word, so their ends are compared.
    sums = [0.0] * len(words)
    index = 0
    for (_, end), score in zip(offsets, scores, strict=True):
        while index < len(words) - 1 and words[index].end < end:
            index += 1
        if words:
            sums[index] += score
    return sums


def maximal_segments(scores: Sequence[float]) -> list[tuple[int, int]]:
    """Find all maximal scoring segments (Ruzzo and Tompa, ISMB 1999), as half-open index ranges."""
    # (start, end, sum before the start, sum up to the end)
    segments: list[tuple[int, int, float, float]] = []
    total = 0.0
    for index, score in enumerate(scores):
        before, total = total, total + score
        if score <= 0:
            continue
        start, low, high = index, before, total
        while True:
            # Joining may help with the nearest earlier segment that starts from a lower sum.
            joined = next(
                (i for i in range(len(segments) - 1, -1, -1) if segments[i][2] < low), None
            )
            if joined is None or segments[joined][3] >= high:
                break
            start, low = segments[joined][0], segments[joined][2]
            del segments[joined:]
        segments.append((start, index + 1, low, high))
    return [(start, end) for start, end, _, _ in segments]
