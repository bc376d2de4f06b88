"""Readout: from the attention of the heads to one score per document."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from routehead_plugins.data import check_flag, check_number
from routehead_plugins.errors import InputError
from routehead_plugins.heads import Recipe
from routehead_plugins.scoring.aggregation import aggregate
from routehead_plugins.scoring.passages import Chunking
from routehead_plugins.scoring.reattn import Reweighting, reweighted_signals
from routehead_plugins.scoring.token_scores import (
    TokenAttention,
    document_signals,
    fuse,
    standardise,
    token_scores,
)

# Times any z-score, still a number of float32.
_LARGEST_WEIGHT = 1e30


@dataclass(frozen=True)
class DocumentSums:
    """Attention to each document, summed over its tokens.

    Attributes:
        calibrated: Minus that of the null query, shape (heads, documents); one row for the mean of
            all heads where no weights or aggregation ask for more.
        mass: Before calibration, shape (heads, documents); ``None`` where it is not asked for.
    """

    calibrated: Tensor
    mass: Tensor | None

    def gathered(self, chunking: Chunking, owners: Sequence[int]) -> DocumentSums:
        """Gather passages into documents; see ``Chunking.gathered``."""
        mass = None if self.mass is None else chunking.gathered(self.mass, owners)
        return DocumentSums(chunking.gathered(self.calibrated, owners), mass)


@dataclass(frozen=True)
class Readout:
    """Options for turning attention into scores.

    Attributes:
        drop_outliers: Whether to drop tokens that draw the attention of the null query.
        reweighting: Weights of tokens and documents (ReAttn); ``None`` for no weights.
        first_stage_weight: Weight of the candidates' own scores, both sides z-scored per query;
            ``None`` takes the weight fitted together with the heads, or 0.

    Raises:
        InputError: The weight is negative or not finite, or a value has another type.
    """

    drop_outliers: bool = True
    reweighting: Reweighting | None = None
    first_stage_weight: float | None = None

    def __post_init__(self) -> None:
        check_flag("drop_outliers", self.drop_outliers)
        if self.first_stage_weight is not None:
            weight = check_number("first_stage_weight", self.first_stage_weight, least=0)
            if weight > _LARGEST_WEIGHT:
                raise InputError(
                    f"first_stage_weight={weight!r} is beyond float32; give {_LARGEST_WEIGHT} or "
                    "less."
                )

    def scores(
        self, attention: TokenAttention, recipe: Recipe, first_stage: Sequence[float | None]
    ) -> Tensor:
        """Score documents.

        Args:
            attention: Attention of the heads to the prompt's tokens.
            recipe: How to combine the heads' signals.
            first_stage: Retrieval score of each document; ignored unless all have one.

        Returns:
            Shape (documents,), on the CPU.
        """
        return self.combined([self.sums(attention, recipe)], recipe, first_stage)

    def sums(self, attention: TokenAttention, recipe: Recipe) -> DocumentSums:
        """Sum what the heads pay to each document; documents may be read in several parts.

        Args:
            attention: Attention of the heads to the tokens of all documents, or of some.
            recipe: How to combine the heads' signals.
        """
        if recipe.aggregation is None and recipe.weights is None:
            # ICR averages first: a token is dropped only if it is an outlier of the average head.
            query = attention.query.mean(dim=0)[None]
            null = None if attention.null is None else attention.null.mean(dim=0)[None]
            average = _on_cpu(replace(attention, query=query, null=null))
            return DocumentSums(self._summed(average, drop_outliers=self.drop_outliers), None)
        attention = _on_cpu(attention)
        calibrated = self._summed(attention, drop_outliers=self.drop_outliers)
        mass = self._summed(replace(attention, null=None), drop_outliers=False)
        return DocumentSums(calibrated, mass)

    def combined(
        self, sums: Sequence[DocumentSums], recipe: Recipe, first_stage: Sequence[float | None]
    ) -> Tensor:
        """Combine the sums of all parts into one score per document; see ``scores``."""
        calibrated = torch.cat([part.calibrated for part in sums], dim=1)
        masses = [part.mass for part in sums if part.mass is not None]
        if not masses:
            return self._fused(calibrated[0], recipe, first_stage)
        mass = torch.cat(masses, dim=1)
        scores = aggregate(recipe.aggregation or "mean", calibrated, mass, recipe.weights)
        return self._fused(scores, recipe, first_stage)

    def signals(self, attention: TokenAttention) -> Tensor:
        """Compute each head's signals without ReAttn's weights: (heads, documents), on the CPU."""
        read = _on_cpu(attention)
        return document_signals(read.query, read.null, read.spans, drop_outliers=self.drop_outliers)

    def _summed(self, attention: TokenAttention, *, drop_outliers: bool) -> Tensor:
        """Sum the token scores of each document, with ReAttn's weights: (heads, documents)."""
        read = (attention.query, attention.null, attention.spans)
        if self.reweighting is None:
            return document_signals(*read, drop_outliers=drop_outliers)
        tokens = token_scores(*read, drop_outliers=drop_outliers)
        ids = attention.query_ids, attention.document_ids
        return reweighted_signals(tokens, attention.spans, *ids, self.reweighting)

    def _fused(self, scores: Tensor, recipe: Recipe, first_stage: Sequence[float | None]) -> Tensor:
        finite = [score for score in first_stage if score is not None and math.isfinite(score)]
        if len(finite) < len(first_stage):
            return scores
        # In float64, since retrieval scores may lie beyond what float32 can hold.
        retrieval = torch.tensor(finite, dtype=torch.float64, device="cpu")
        own, fitted = self.first_stage_weight, recipe.first_stage_weight
        if own is None and fitted is not None and recipe.weights is not None:
            # The weight was fitted to the sum in its own scale, which tells how certain heads are.
            return scores + fitted * standardise(retrieval).to(scores)
        weight = fitted if own is None else own
        return fuse(scores, retrieval, weight) if weight else scores


def _on_cpu(attention: TokenAttention) -> TokenAttention:
    """Move attention to the CPU, where sums over documents do not depend on chance."""
    # Accelerators add in an order that differs from call to call.
    null = None if attention.null is None else attention.null.cpu()
    return replace(attention, query=attention.query.cpu(), null=null)
