"""A second reading of the best documents, as in a cascade of re-rankers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from routehead_plugins.data import Document, check_count
from routehead_plugins.errors import InputError, class_name


class Scorer(Protocol):
    """Anything that scores documents, such as ``HeadRoutedAttentionReranker``."""

    def score(
        self, query: str, documents: Sequence[Document], *, instruction: str | None = None
    ) -> list[float]:
        """Score documents, in the order given.

        Args:
            query: The query.
            documents: The candidates.
            instruction: Which documents are relevant to this query.
        """


@dataclass(frozen=True)
class Refinement:
    """A second reading of the best documents.

    Attributes:
        scorer: Reads them, such as a re-ranker in the parallel layout.
        count: How many of the best documents it reads.

    Raises:
        InputError: There is no ``score``, or the count is below 1.
    """

    scorer: Scorer
    count: int

    def __post_init__(self) -> None:
        if not hasattr(self.scorer, "score") or isinstance(self.scorer, type):
            raise InputError(
                f"scorer is a {class_name(self.scorer)}; give a re-ranker, such as a "
                "HeadRoutedAttentionReranker."
            )
        check_count("count", self.count)

    def refined(
        self,
        scores: Sequence[float],
        query: str,
        documents: Sequence[Document],
        instruction: str | None = None,
    ) -> list[float]:
        """Replace the scores of the best documents by those of the second reading.

        These are raised by the same amount, if need be, so that all stay above the others.

        Args:
            scores: Scores of the first reading, one per document.
            query: The query.
            documents: All candidates.
            instruction: Which documents are relevant to this query.
        """
        order = sorted(range(len(scores)), key=lambda index: -scores[index])
        best, others = order[: self.count], order[self.count :]
        if not best:
            return []
        again = self.scorer.score(query, [documents[i] for i in best], instruction=instruction)
        # At least the next larger number: a tie would be broken by the order of the candidates.
        least = math.nextafter(scores[others[0]], math.inf) if others else -math.inf
        lift = max(0.0, least - min(again)) if others else 0.0
        refined = list(scores)
        for index, score in zip(best, again, strict=True):
            refined[index] = max(score + lift, least)
        return refined
