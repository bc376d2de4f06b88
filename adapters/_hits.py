"""Rankings in the shape that Pyserini gives to search results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from routehead_plugins.data import Document, Ranking


@dataclass(frozen=True, slots=True)
class Hit:
    """A re-ranked document; Pyserini's output writers take it for one of their hits.

    Attributes:
        docid: The document's id.
        score: The re-ranker's; higher is more relevant. Documents below the re-ranked ones
            have the lowest re-ranked score less 1, 2, 3 and so on.
        rank: Place after re-ranking, from 1.
        retrieval_score: The first stage's score, where there is one.
        retrieval_rank: The first stage's place, from 1.
        document: The text that was read.
    """

    docid: str
    score: float
    rank: int
    retrieval_score: float | None
    retrieval_rank: int
    document: Document


def hits_of(ranking: Ranking, documents: Sequence[Document]) -> list[Hit]:
    """Turn a ranking into hits, and let the documents that were not ranked follow.

    Args:
        ranking: Of the first documents.
        documents: All of them, as the first stage orders them.
    """
    depth = len(ranking)
    placed = [(scored.index, float(scored.score)) for scored in ranking]
    lowest = placed[-1][1]
    placed += [(index, lowest - (index - depth + 1)) for index in range(depth, len(documents))]
    return [
        Hit(
            docid=documents[index].id or str(index),
            score=score,
            rank=rank,
            retrieval_score=documents[index].score,
            retrieval_rank=index + 1,
            document=documents[index],
        )
        for rank, (index, score) in enumerate(placed, start=1)
    ]
