"""Query likelihood: how well a document predicts the query, one forward per document.

What people would run on the same LLM instead, and the yardstick for everything in this house
(UPR, arXiv 2204.07496).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from routehead_plugins.backbone.frozen_lm import FrozenLM
from routehead_plugins.backbone.prompt import check_max_doc_tokens
from routehead_plugins.data import Document, as_documents, check_text, written


class QueryLikelihood:
    """Scores documents by the mean log likelihood of the query's tokens.

    Attributes:
        llm: The frozen LLM, loaded with all its layers.
        max_doc_tokens: Longer documents are cut here.
    """

    def __init__(self, llm: FrozenLM, *, max_doc_tokens: int | None = None) -> None:
        """Compose.

        Raises:
            InputError: ``max_doc_tokens`` is below 1.
        """
        check_max_doc_tokens(max_doc_tokens)
        self.llm = llm
        self.max_doc_tokens = max_doc_tokens

    def score(self, query: str, documents: Sequence[str | Document]) -> list[float]:
        """Score documents, in the order given.

        Args:
            query: What is looked for.
            documents: The candidates; blank ones get minus infinity.

        Returns:
            Natural logarithms, mean over the query's tokens.

        Raises:
            InputError: The query is blank, or a candidate is no text.
            UnsupportedModelError: The LLM was loaded without its last layers.
        """
        check_text("query", query)
        candidates = as_documents(documents)
        scores = [-math.inf] * len(candidates)
        places = written(candidates)
        contexts, target = self.llm.encoder.question(
            query, [candidates[index].text for index in places], self.max_doc_tokens
        )
        found = self.llm.log_likelihoods(contexts, target) / len(target)
        for index, score in zip(places, found.tolist(), strict=True):
            scores[index] = score
        return scores
