"""Losses of aligned heads: pure functions of the scores of one query's candidates.

Those after HeadRank (arXiv 2604.17237) follow its abstract; it publishes neither code nor all of
its formulas, so the formulas below are our own.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import softplus

# Standard deviation of the middle half of evenly spaced z-scores.
_EVEN_DEVIATION = 0.5
_LEAST = 1e-9


def distillation(scores: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of the candidates' distribution to a teacher's (arXiv 1503.02531).

    ``-sum_d softmax(teacher / temperature)_d * log softmax(scores)_d``, less the teacher's own
    entropy, which is constant: the Kullback-Leibler divergence, 0 for a perfect student. The scores
    have a learned scale in place of a temperature.

    Args:
        scores: Shape (documents,).
        teacher: The teacher's scores, same shape.
        temperature: Smaller values look at the teacher's best documents only.

    Returns:
        A scalar.
    """
    target = (teacher / temperature).log_softmax(dim=0)
    return (target.exp() * (target - scores.log_softmax(dim=0))).sum()


def preference(scores: Tensor, grades: Tensor, hard_share: float) -> Tensor:
    """Preference pairs of adjacent relevance grades, hard ones first (arXiv 2604.17237).

    ``mean of -log sigmoid(s_i - s_j)`` over pairs where the grade of ``i`` is the next one above
    that of ``j`` among the candidates; only the share of pairs with the smallest margins counts.

    Args:
        scores: Shape (documents,).
        grades: Relevance grades, same shape.
        hard_share: Share of the pairs that counts, above 0 and up to 1; at least one pair does.

    Returns:
        A scalar; 0 where all grades are equal.
    """
    levels = grades.unique()  # ascending
    margins = [
        (scores[grades == upper][:, None] - scores[grades == lower][None]).flatten()
        for lower, upper in pairwise(levels)
    ]
    if not margins:
        return scores.sum() * 0
    pairs = torch.cat(margins)
    count = max(1, math.ceil(hard_share * len(pairs)))
    return softplus(-pairs.topk(count, largest=False).values).mean()


def spread(scores: Tensor) -> Tensor:
    """Penalty on scores that are nearly equal in the middle of the list (arXiv 2604.17237).

    ``max(0, 1 - 2 * deviation)^2``, where the deviation is that of the z-scores of the middle half
    of the candidates, ranked by score: 1 where all of them are equal, 0 where they lie as far apart
    as evenly spaced scores do.

    Args:
        scores: Shape (documents,).

    Returns:
        A scalar; 0 for fewer than four documents.
    """
    count = len(scores)
    if count < 4:
        return scores.sum() * 0
    centred = scores - scores.mean()
    standard = centred / (centred.square().mean() + _LEAST).sqrt()
    middle = standard.sort().values[count // 4 : count - count // 4]
    deviation = ((middle - middle.mean()).square().mean() + _LEAST).sqrt()
    return (1 - deviation / _EVEN_DEVIATION).clamp(min=0).square()


def head_entropy(shares: Tensor) -> Tensor:
    """Entropy of the choice of heads (arXiv 2604.17237): low where few heads are chosen.

    ``-sum_h p_h log p_h / log(heads)``, between 0 and 1.

    Args:
        shares: Share ``p`` of each head in the score, shape (heads,), with sum 1.

    Returns:
        A scalar.
    """
    if len(shares) < 2:
        return shares.sum() * 0
    return -(shares * shares.clamp(min=_LEAST).log()).sum() / math.log(len(shares))


def attention_entropy(mass: Tensor, shares: Tensor) -> Tensor:
    """Entropy of the heads' attention over the candidates (arXiv 2604.17237).

    ``sum_h p_h * (-sum_d a_hd log a_hd / log(documents))``, where ``a`` is the head's attention to
    each document, divided by that to all of them; between 0 and 1. Low where the chosen heads tell
    documents apart.

    Args:
        mass: Attention to each document, shape (heads, documents).
        shares: Share ``p`` of each head in the score, shape (heads,), with sum 1.

    Returns:
        A scalar.
    """
    if mass.shape[1] < 2:
        return mass.sum() * 0
    attention = mass.clamp(min=_LEAST)
    attention = attention / attention.sum(dim=1, keepdim=True)
    entropies = -(attention * attention.log()).sum(dim=1) / math.log(mass.shape[1])
    return (shares * entropies).sum()
