"""Long documents: divide their texts into passages, and gather what the passages get.

A document gets what the best of its passages get, or the first one: MaxP and FirstP of Dai and
Callan (arXiv 1905.09217). Passages are gathered head by head, before heads are standardised and
combined, so that documents of many passages are compared with those of one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from routehead_plugins.data import Span, check_count
from routehead_plugins.errors import InputError, class_name, short_repr
from routehead_plugins.scoring.copies import Excerpt

LEAST_TOKENS = 8
"""Fewest tokens of a passage."""

# Ends of sentences, with what closes them, and of lines.
_END = re.compile(r"[.!?][\"')\]\u201d\u2019]*\s+|[\u3002\uff01\uff1f]|\n+")
# Share of a passage, from its end, in which the end of a sentence is looked for.
_NEAR = 0.25
_MEAN_OF_TOP = re.compile(r"mean_of_top\((\d+)\)")


@dataclass(frozen=True)
class Chunking:
    """How long documents are divided, and how their passages are gathered.

    Attributes:
        tokens: Longest passage.
        stride: Tokens from the start of a passage to that of the next; ``None``: passages follow
            each other without a common part.
        aggregation: What a document gets at each head: ``"max"`` of its passages, ``"first"``, or
            ``"mean_of_top(3)"``, the mean of the three largest.

    Raises:
        InputError: A value is out of range.
    """

    tokens: int = 256
    stride: int | None = None
    aggregation: str = "max"

    def __post_init__(self) -> None:
        tokens = check_count("chunk_tokens", self.tokens)
        if tokens < LEAST_TOKENS:
            raise InputError(f"chunk_tokens={tokens} is too short; give {LEAST_TOKENS} or more.")
        if self.stride is not None and check_count("chunk_stride", self.stride) > tokens:
            raise InputError(
                f"chunk_stride={self.stride} leaves text out; give 1 to {tokens}, the length of a "
                "passage."
            )
        check_aggregation(self.aggregation)

    def divide(self, text: str, offsets: Sequence[tuple[int, int]]) -> list[Span]:
        """Divide a text; sentences are not torn where one ends near the end of a passage.

        Args:
            text: The text.
            offsets: Characters of each of its tokens, in their order.

        Returns:
            Characters of the passages; all of the text in one if it is no longer.
        """
        count = len(offsets)
        if count <= self.tokens:
            return [Span(0, len(text))]
        ends = _sentence_ends(text, offsets)
        overlap = 0 if self.stride is None else self.tokens - self.stride
        passages, start = [], 0
        while True:
            end = min(start + self.tokens, count)
            if end < count:
                nearest = [e for e in ends if end - _NEAR * self.tokens < e <= end]
                end = max(nearest, default=end)
            # From token to token, so that nothing between two passages is left out.
            first = offsets[start][0] if start else 0
            passages.append(Span(first, offsets[end - 1][1] if end < count else len(text)))
            if end == count:
                return passages
            start = max(start + 1, end - overlap)

    def gathered(self, values: Tensor, owners: Sequence[int]) -> Tensor:
        """Gather the values of passages.

        Args:
            values: Shape (heads, passages).
            owners: Index of each passage's document: from 0, ascending, without gaps.

        Returns:
            Shape (heads, documents).
        """
        columns = torch.tensor(owners, device="cpu")
        sizes = columns.bincount().tolist()
        if len(sizes) == len(owners):
            return values
        return torch.stack([self._gathered(own) for own in values.split(sizes, dim=1)], dim=1)

    def _gathered(self, values: Tensor) -> Tensor:
        """Gather the passages of one document: (heads, passages) to (heads,)."""
        if self.aggregation == "first":
            return values[:, 0]
        top = check_aggregation(self.aggregation)
        best: Tensor = values.topk(min(top, values.shape[1]), dim=1).values
        return best.mean(dim=1)


@dataclass(frozen=True)
class LongTexts:
    """What becomes of texts that are long.

    Attributes:
        chunking: How documents are divided; ``None`` reads them as they are.
        on_too_long: What becomes of a document or query that does not fit the LLM's context:
            ``"cut"`` warns and reads its beginning, ``"error"`` refuses the list.

    Raises:
        InputError: A value is neither.
    """

    chunking: Chunking | None = None
    on_too_long: str = "cut"

    def __post_init__(self) -> None:
        if self.chunking is not None and not isinstance(self.chunking, Chunking):
            raise InputError(
                f"chunking is a {class_name(self.chunking)}; give a Chunking, or None for none."
            )
        if self.on_too_long not in ("cut", "error"):
            raise InputError(
                f"on_too_long={short_repr(self.on_too_long)} does not exist; give cut or error."
            )


@dataclass(frozen=True)
class Passage:
    """A part of a document that is read on its own.

    Attributes:
        document: Index of the document.
        excerpt: What is read of the document.
        span: Characters of the passage in the excerpt.
    """

    document: int
    excerpt: Excerpt
    span: Span

    @property
    def text(self) -> str:
        """The text of the passage."""
        return self.excerpt.text[self.span.start : self.span.end]

    def original(self, start: int, end: int) -> Span:
        """Return the characters of the document between two of the passage; see ``Excerpt``."""
        return self.excerpt.original(self.span.start + start, self.span.start + end)


def check_aggregation(aggregation: object) -> int:
    """Check the name of an aggregation.

    Returns:
        How many of a document's passages count.

    Raises:
        InputError: There is no such aggregation.
    """
    if aggregation in ("max", "first"):
        return 1
    match = _MEAN_OF_TOP.fullmatch(aggregation) if isinstance(aggregation, str) else None
    if match is None or not int(match[1]):
        raise InputError(
            f"chunk_aggregation={short_repr(aggregation)} does not exist; give max, first or "
            "mean_of_top(3)."
        )
    return int(match[1])


def _sentence_ends(text: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Return after which numbers of tokens a sentence or line ends, ascending."""
    ends, index = [], 0
    for match in _END.finditer(text):
        # White space may belong to the next token: compare with what is before it.
        while index < len(offsets) and offsets[index][1] <= match.end():
            index += 1
        ends.append(index)
    return ends
