"""Copies of the query in documents, which draw attention whatever the document is about.

Heads that match words look at a repetition of the query before anything else, so that one copy
lifts an irrelevant document to the top. A copy says nothing that the query does not say; it can be
left out before the LLM reads the document.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from routehead_plugins.data import Document, Span
from routehead_plugins.scoring.evidence import NO_SPACES, maximal_segments

# Characters that nobody sees and that could hide a copy.
_HIDDEN = "\u00ad\u200b-\u200f\u2060-\u2064\ufeff"
# A word is a run of letters and digits; in scripts without spaces, every character is a word.
_WORD = re.compile(rf"[{NO_SPACES}]|[^\W{NO_SPACES}](?:[^\W{NO_SPACES}]|[{_HIDDEN}])*")
# A copy has this share of the query's words. Passages that answer a question often lack a tenth of
# its words, such as "who is": of 2,389 relevant passages of four collections, a share of 0.8 takes
# 38 for copies, 0.9 takes 13.
_SHARE = 0.9
# Two words are a topic rather than a query; where a character is a word, it counts as half a word.
_LEAST_WORDS = 3


@dataclass(frozen=True)
class Excerpt:
    """A text without some of its passages.

    Attributes:
        text: What is left, without anything in place of the passages.
        removed: Characters of each passage in the original text, ascending and apart.
    """

    text: str
    removed: tuple[Span, ...] = ()

    def original(self, start: int, end: int) -> Span:
        """Return the characters of the original text between the first and last of an excerpt.

        Args:
            start: First character, in ``text``.
            end: Character after the last, in ``text``; more than ``start``.
        """
        return Span(self._original_index(start), self._original_index(end - 1) + 1)

    def _original_index(self, index: int) -> int:
        for passage in self.removed:
            if index < passage.start:
                break
            index += passage.size
        return index


def without_copies(query: str, text: str) -> Excerpt:
    """Leave out the passages of a text that repeat the query; see ``query_copies``."""
    removed = query_copies(query, text)
    starts = [0, *(passage.end for passage in removed)]
    ends = [*(passage.start for passage in removed), len(text)]
    kept = "".join(text[start:end] for start, end in zip(starts, ends, strict=True))
    return Excerpt(kept, removed)


def excerpt_documents(documents: Sequence[Document], excerpts: Sequence[Excerpt]) -> list[Document]:
    """Replace the texts of documents by excerpts, and scores that a copy may have raised.

    Retrieval matched the copy as well. A document that had one is therefore scored like the mean of
    those that had none: neither for the copy nor against the document.

    Args:
        documents: The documents; not modified.
        excerpts: An excerpt of each.

    Returns:
        Documents without scores where none is without a copy.
    """
    pairs = list(zip(documents, excerpts, strict=True))
    honest = [document.score for document, excerpt in pairs if not excerpt.removed]
    known = [score for score in honest if score is not None]
    mean = fmean(known) if known and len(known) == len(honest) else None
    return [
        replace(document, text=excerpt.text, score=mean if excerpt.removed else document.score)
        for document, excerpt in pairs
    ]


def query_copies(query: str, text: str) -> tuple[Span, ...]:
    """Find passages of a text that repeat a query.

    A passage is the best local alignment of the text's words with the query's (Smith and Waterman,
    1981): 1 for each word of the query in its order, -1 for each other word, 0 for words of the
    query that are left out. It repeats the query if it has nine tenths of the query's words. Case,
    punctuation, line breaks and characters that are not seen do not matter. Queries of one or two
    words are never looked for.

    Returns:
        Characters of each passage, ascending and apart.
    """
    wanted = [word for _, word in _words(query)]
    if sum(0.5 if re.match(f"[{NO_SPACES}]", word) else 1 for word in wanted) < _LEAST_WORDS:
        return ()
    words, known, least = _words(text), set(wanted), math.ceil(_SHARE * len(wanted))
    # Alignments lie within runs of words in which those of the query prevail.
    runs = maximal_segments([1 if word in known else -1 for _, word in words])
    copies = []
    while runs:
        first, last = runs.pop()
        if last - first < least:
            continue
        start, end, matches = _best_alignment(wanted, [word for _, word in words[first:last]])
        if matches >= least:
            copies.append(Span(words[first + start][0].start, words[first + end - 1][0].end))
            runs += [(first, first + start), (first + end, last)]
    return tuple(sorted(copies))


def _words(text: str) -> list[tuple[Span, str]]:
    """Return the characters of every word, and the word in a form that compares alike."""
    hidden = re.compile(f"[{_HIDDEN}]")
    return [
        (Span(*match.span()), unicodedata.normalize("NFKC", hidden.sub("", match[0])).casefold())
        for match in _WORD.finditer(text)
    ]


def _best_alignment(query: Sequence[str], words: Sequence[str]) -> tuple[int, int, int]:
    """Align words with a query; return the range aligned and how many of its words match."""
    best, best_end = (0, 0, 0), 0
    # For every part of the query from its start: score, words that match, and minus the start.
    row = [(0, 0, 0)] * (len(query) + 1)
    for index, word in enumerate(words):
        above, row = row, [(0, 0, -index - 1)]
        for column, wanted in enumerate(query, start=1):
            score, matches, start = above[column]
            options = [row[-1], (score - 1, matches, start)]
            if word == wanted:
                score, matches, start = above[column - 1]
                options.append((score + 1, matches + 1, start))
            row.append(max(options))
        if row[-1][0] > best[0]:
            best, best_end = row[-1], index + 1
    return -best[2], best_end, best[1]
