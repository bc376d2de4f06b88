"""From what was read of the heads to one score per document."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from routehead_plugins.errors import InputError
from routehead_plugins.heads import Recipe
from routehead_plugins.scoring.aggregation import aggregate
from routehead_plugins.scoring.reattn import Reweighting, reweighted_signals
from routehead_plugins.scoring.token_scores import (
    TokenAttention,
    document_signals,
    fuse,
    mean_over_heads,
    membership,
    standardise,
    token_scores,
)


@dataclass(frozen=True)
class Readout:
    """How attention becomes scores.

    Attributes:
        drop_outliers: Leave out tokens that the query without content stares at.
        reweighting: Weights on tokens and documents (ReAttn); ``None`` for none.
        first_stage_weight: Weight of the candidates' own scores, both sides standardised per query;
            ``None`` for the one that was fitted together with the heads, or 0.

    Raises:
        InputError: The weight is negative or no number.
    """

    drop_outliers: bool = True
    reweighting: Reweighting | None = None
    first_stage_weight: float | None = None

    def __post_init__(self) -> None:
        weight = self.first_stage_weight
        if weight is not None and not 0 <= weight < math.inf:
            raise InputError(f"first_stage_weight={weight!r} is not a weight; give 0 or more.")

    def scores(
        self, read: TokenAttention, recipe: Recipe, first_stage: Sequence[float | None]
    ) -> Tensor:
        """Score documents.

        Args:
            read: What the heads look at.
            recipe: How the heads' signals are combined.
            first_stage: Retrieval score of each document; left out unless all have one.

        Returns:
            Shape (documents,), on the CPU.
        """
        if recipe.aggregation is None and recipe.weights is None:
            # Heads are averaged before outliers are looked for: an outlier of one is none of all.
            null = None if read.null is None else mean_over_heads(read.null)[None]
            found = self._summed(mean_over_heads(read.query)[None], null, read)[0]
        else:
            calibrated = self._summed(read.query, read.null, read)
            mass = self._summed(read.query, None, read, drop_outliers=False)
            found = aggregate(recipe.aggregation or "mean", calibrated, mass, recipe.weights)
        return self._fused(found.cpu(), recipe, first_stage)

    def _summed(
        self,
        attention: Tensor,
        null: Tensor | None,
        read: TokenAttention,
        *,
        drop_outliers: bool | None = None,
    ) -> Tensor:
        """Signals of each head, shape (heads, documents)."""
        drop = self.drop_outliers if drop_outliers is None else drop_outliers
        tokens = token_scores(attention, null, read.spans, drop_outliers=drop)
        if self.reweighting is None:
            return tokens @ membership(read.spans, tokens)
        return reweighted_signals(
            tokens, read.spans, read.query_ids, read.document_ids, self.reweighting
        )

    def signals(self, read: TokenAttention) -> Tensor:
        """What each head says on its own, without weights on tokens; shape (heads, documents)."""
        return document_signals(
            read.query, read.null, read.spans, drop_outliers=self.drop_outliers
        ).cpu()

    def _fused(self, scores: Tensor, recipe: Recipe, first_stage: Sequence[float | None]) -> Tensor:
        carried = [score for score in first_stage if score is not None and math.isfinite(score)]
        if len(carried) < len(first_stage):
            return scores
        retrieval = torch.tensor(carried, dtype=scores.dtype)
        asked, fitted = self.first_stage_weight, recipe.first_stage_weight
        if asked is None and fitted is not None and recipe.weights is not None:
            # Fitted together: the weighted sum keeps its scale, which tells how sure heads are.
            return scores + fitted * standardise(retrieval)
        weight = fitted if asked is None else asked
        return fuse(scores, retrieval, weight) if weight else scores
