"""Measures of how well scores rank the judged candidates of a query: pure functions of tensors.

`Judgments` measures many queries at a time; the functions of the same names measure one. Each
row of scores belongs to one head, or to one set of heads. Documents are in the order of the first
stage, ties keep that order, and all results are float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from routehead_plugins.scoring import standardise

DEPTH = 10
"""Ranks that count for nDCG."""

_LEAST_DEVIATION = 1e-9  # smaller standard deviations are rounding errors


@dataclass(frozen=True)
class Judgments:
    """Relevance of the candidates of several queries, padded to the longest list.

    The methods take scores of shape (queries, rows, documents), with any value in the padding for
    measures of ranks and 0 for the others, and return a tensor of shape (queries, rows).

    Attributes:
        gains: Judged relevance, shape (queries, documents), float64; 0 in the padding.
        sizes: Number of documents of each query, shape (queries,).
        ideal_gains: Highest judgments of all judged documents, retrieved or not, descending, shape
            (queries, ranks that count for nDCG), float64; 0 in the padding.
    """

    gains: Tensor
    sizes: Tensor
    ideal_gains: Tensor

    @classmethod
    def stack(
        cls, gains: Sequence[Tensor], ideal_gains: Sequence[Tensor], depth: int = DEPTH
    ) -> Judgments:
        """Pad the judgments of several queries to the same number of documents.

        Args:
            gains: Judgments of each query's candidates, shape (documents,).
            ideal_gains: Judgments of each query's judged documents, in any order.
            depth: Ranks that count for nDCG.
        """
        sizes = torch.tensor([len(row) for row in gains], device=gains[0].device)
        best = [row.sort(descending=True).values[:depth] for row in ideal_gains]
        return cls(_padded(gains), sizes, pad(_padded(best), (0, depth))[:, :depth])

    def __getitem__(self, rows: Tensor) -> Judgments:
        return Judgments(self.gains[rows], self.sizes[rows], self.ideal_gains[rows])

    @cached_property
    def present(self) -> Tensor:
        """Mask of the documents, false in the padding; shape (queries, documents)."""
        indices = torch.arange(self.gains.shape[1], device=self.gains.device)
        return indices < self.sizes[:, None]

    def ndcg(self, scores: Tensor) -> Tensor:
        """Measure nDCG; see the function `ndcg`."""
        gains = self._ranked(scores, self.gains, self.ideal_gains.shape[1])
        best = _discounted_sum(self.ideal_gains)[:, None]
        return torch.where(best > 0, _discounted_sum(gains) / best, 0.0)

    def reciprocal_rank(self, scores: Tensor, depth: int | None = None) -> Tensor:
        """Measure the reciprocal rank; see the function `reciprocal_rank`."""
        relevant = self._ranked(scores, (self.gains > 0).double(), depth)
        # The first relevant document has the largest quotient; the padding is for empty lists.
        return pad(relevant / _ranks(relevant), (0, 1)).amax(dim=-1)

    def correlation(self, scores: Tensor) -> Tensor:
        """Measure Pearson's correlation of judgments and scores whose mean is 0 in every row."""
        return self._projected(scores, self._correlation_weights)

    def margin(self, scores: Tensor) -> Tensor:
        """Measure the margin of scores whose mean is 0 in every row; see the function `margin`."""
        return self._projected(scores, self._margin_weights)

    @cached_property
    def _correlation_weights(self) -> Tensor:
        """Standardised gains over the number of documents, shape (queries, documents)."""
        sizes = self.sizes[:, None]
        centred = (self.gains - self.gains.sum(dim=1, keepdim=True) / sizes) * self.present
        deviation = (centred.square().sum(dim=1, keepdim=True) / sizes).sqrt()
        return torch.where(deviation > _LEAST_DEVIATION, centred / deviation / sizes, 0.0)

    @cached_property
    def _margin_weights(self) -> Tensor:
        """1 / count for relevant documents, -1 / count for others, shape (queries, documents)."""
        relevant = (self.gains > 0).double()
        other = self.present.double() - relevant
        counts = [kind.sum(dim=1, keepdim=True) for kind in (relevant, other)]
        both = (counts[0] > 0) & (counts[1] > 0)
        return torch.where(both, relevant / counts[0] - other / counts[1], 0.0)

    def _projected(self, scores: Tensor, weights: Tensor) -> Tensor:
        """Divide weighted sums of scores by their deviation; 0 where all scores are equal."""
        deviation = (scores.square().sum(dim=-1) / self.sizes[:, None]).sqrt()
        # A matrix product might round equal rows differently.
        products = torch.linalg.vecdot(scores, weights[:, None])
        return torch.where(deviation > _LEAST_DEVIATION, products / deviation, 0.0)

    def _ranked(self, scores: Tensor, gains: Tensor, depth: int | None) -> Tensor:
        """Arrange gains by descending score, shape (queries, rows, ranks)."""
        shown = scores.masked_fill(~self.present[:, None], -torch.inf)
        order = shown.argsort(dim=-1, descending=True, stable=True)[..., :depth]
        return gains[:, None].expand_as(scores).gather(2, order)


def ndcg(scores: Tensor, gains: Tensor, ideal_gains: Tensor, depth: int = DEPTH) -> Tensor:
    """Measure nDCG as trec_eval and ir_measures do.

    A judgment is its own gain, those below 0 count as 0, and the discount is log2(rank + 1).

    Args:
        scores: Shape (heads, documents).
        gains: Judgments of the documents, shape (documents,).
        ideal_gains: Judgments of all judged documents, retrieved or not, in any order.
        depth: Ranks that count.

    Returns:
        Shape (heads,), between 0 and 1; 0 if no judgment is above 0.
    """
    return Judgments.stack([gains], [ideal_gains], depth).ndcg(scores.double()[None])[0]


def reciprocal_rank(scores: Tensor, gains: Tensor, depth: int | None = None) -> Tensor:
    """Measure 1 / rank of the first relevant document, one whose judgment is above 0.

    Args:
        scores: Shape (heads, documents).
        gains: Judgments of the documents, shape (documents,).
        depth: Ranks that count; ``None`` for all.

    Returns:
        Shape (heads,); 0 if there is no relevant document.
    """
    return _unranked(gains).reciprocal_rank(scores.double()[None], depth)[0]


def correlation(scores: Tensor, gains: Tensor) -> Tensor:
    """Measure Pearson's correlation of scores and judgments.

    Unlike a measure of ranks it changes with every score, and so is less noisy with few documents.

    Args:
        scores: Shape (heads, documents).
        gains: Judgments of the documents, shape (documents,).

    Returns:
        Shape (heads,), between -1 and 1; 0 where the scores, or the judgments, are all equal.
    """
    return _unranked(gains).correlation(standardise(scores.double())[None])[0]


def margin(scores: Tensor, gains: Tensor) -> Tensor:
    """Measure how far relevant documents lie above the others, in standard deviations.

    Args:
        scores: Shape (heads, documents).
        gains: Judgments of the documents, shape (documents,); above 0 is relevant.

    Returns:
        Mean of the relevant less mean of the others, over the deviation of all; shape (heads,). 0
        where the scores are all equal, or if documents of either kind are missing.
    """
    return _unranked(gains).margin(standardise(scores.double())[None])[0]


def _unranked(gains: Tensor) -> Judgments:
    """Return the judgments of one query for all measures but nDCG."""
    size = torch.tensor([len(gains)], device=gains.device)
    return Judgments(gains.double()[None], size, gains.new_zeros(1, 0))


def _padded(rows: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True).double()


def _ranks(gains: Tensor) -> Tensor:
    """Return 1, 2, ... for the last dimension."""
    return torch.arange(1, gains.shape[-1] + 1, dtype=torch.float64, device=gains.device)


def _discounted_sum(gains: Tensor) -> Tensor:
    """Sum discounted gains in the order of their ranks, shape (..., ranks) -> (...).

    The terms are added one after the other, as trec_eval does: the best order then has an nDCG of
    exactly 1, and equal rankings have equal sums.
    """
    discounted = gains.clamp(min=0) / (_ranks(gains) + 1).log2()
    return pad(discounted, (0, 1)).cumsum(dim=-1)[..., -1]  # padded, as there may be no ranks
