"""How well single heads rank the candidates of one query: pure functions of tensors.

Scores have shape (heads, documents), figures shape (heads,), in float64; a row may as well be a set
of heads. Documents stand best first by the first stage, and ties keep that order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def ndcg(scores: Tensor, gains: Tensor, ideal_gains: Tensor, depth: int = 10) -> Tensor:
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
    best = _discounted(ideal_gains.double().sort(descending=True).values[:depth])
    found = _discounted(gains.double()[_order(scores)][:, :depth])
    return found / best if best > 0 else torch.zeros_like(found)


def reciprocal_rank(scores: Tensor, gains: Tensor, depth: int | None = None) -> Tensor:
    """Measure 1 / rank of the first relevant document, one whose judgment is above 0.

    Args:
        scores: Shape (heads, documents).
        gains: Judgments of the documents, shape (documents,).
        depth: Ranks that count; ``None`` for all.

    Returns:
        Shape (heads,); 0 if there is no relevant document.
    """
    relevant = (gains > 0).double()[_order(scores)][:, :depth]
    # The first relevant document has the largest share; the padding is for no documents at all.
    return pad(relevant / _ranks(relevant), (0, 1)).amax(dim=-1)


def correlation(scores: Tensor, gains: Tensor) -> Tensor:
    """Measure Pearson's correlation of scores and judgments.

    Unlike a measure of ranks it changes with every score, and so is less noisy with few documents.

    Args:
        scores: Shape (heads, documents).
        gains: Judgments of the documents, shape (documents,).

    Returns:
        Shape (heads,), between -1 and 1; 0 where the scores, or the judgments, are all equal.
    """
    products = _standardised(scores) * _standardised(gains[None])
    return products.sum(dim=-1) / max(len(gains), 1)


def margin(scores: Tensor, gains: Tensor) -> Tensor:
    """Measure how far relevant documents lie above the others, in standard deviations.

    Args:
        scores: Shape (heads, documents).
        gains: Judgments of the documents, shape (documents,); above 0 is relevant.

    Returns:
        Mean of the relevant less mean of the others, over the deviation of all; shape (heads,). 0
        where the scores are all equal, or one of the two kinds is missing.
    """
    relevant = gains > 0
    if not relevant.any() or relevant.all():
        return torch.zeros(len(scores), dtype=torch.float64, device=scores.device)
    standard = _standardised(scores)
    return standard[:, relevant].mean(dim=-1) - standard[:, ~relevant].mean(dim=-1)


def _order(scores: Tensor) -> Tensor:
    """Places of the documents, best first, shape (heads, documents)."""
    return scores.argsort(dim=-1, descending=True, stable=True)


def _ranks(gains: Tensor) -> Tensor:
    """1, 2, ... for the last dimension."""
    return torch.arange(1, gains.shape[-1] + 1, dtype=torch.float64, device=gains.device)


def _discounted(gains: Tensor) -> Tensor:
    """Sum gains in order of rank, shape (..., ranks) -> (...).

    One after the other as trec_eval does, so that the best order comes to exactly 1 and heads with
    the same ranking to the same number.
    """
    discounted = gains.clamp(min=0) / (_ranks(gains) + 1).log2()
    return pad(discounted, (0, 1)).cumsum(dim=-1)[..., -1]  # padded, as there may be no ranks


def _standardised(scores: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 in each row; zeros where all are equal."""
    centred = scores.double() - scores.double().mean(dim=-1, keepdim=True)
    deviation = centred.square().mean(dim=-1, keepdim=True).sqrt()
    # Rounding would make something of nothing.
    differ = (scores != scores[:, :1]).any(dim=-1, keepdim=True) & (deviation > 0)
    return torch.where(differ, centred / deviation, 0.0)
