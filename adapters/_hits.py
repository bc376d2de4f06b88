"""Rankings in the form of Pyserini's search results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from routehead_plugins.data import Document, Ranking


@dataclass(frozen=True, slots=True)
class Hit:
    """A re-ranked document; Pyserini's output writers accept it as a hit.

    Attributes:
        docid: The document's id.
        score: The re-ranker's score; higher is more relevant. Documents below the re-ranked ones
            have the lowest re-ranked score minus 1, 2, 3 and so on.
        rank: Rank after re-ranking, from 1.
        retrieval_score: The first stage's score, if any.
        retrieval_rank: Rank in the first stage, from 1.
        document: The document that was read.
    """

    docid: str
    score: float
    rank: int
    retrieval_score: float | None
    retrieval_rank: int
    document: Document


def hits_of(ranking: Ranking, documents: Sequence[Document]) -> list[Hit]:
    """Turn a ranking of the first documents into hits, followed by the other documents."""
    depth = len(ranking)
    scores = [(scored.index, float(scored.score)) for scored in ranking]
    score = scores[-1][1]
    for index in range(depth, len(documents)):
        # One less is the same number if the score is large.
        score = min(score - 1, math.nextafter(score, -math.inf))
        scores.append((index, score))
    return [
        Hit(
            docid=documents[index].id or str(index),
            score=score,
            rank=rank,
            retrieval_score=documents[index].score,
            retrieval_rank=index + 1,
            document=documents[index],
        )
        for rank, (index, score) in enumerate(scores, start=1)
    ]
