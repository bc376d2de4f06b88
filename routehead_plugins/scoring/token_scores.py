"""Token scores, document signals and z-scores.

Equation numbers are those of ICR (arXiv 2410.02642).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from routehead_plugins.data import Span

_OUTLIER_DEVIATIONS = 2.0
# The root of 1e-10, below which attention is negligible; keeps residuals finite.
_LEAST_DEVIATION = 1e-5


@dataclass(frozen=True)
class TokenAttention:
    """Attention of the heads to the tokens of a prompt.

    Attributes:
        query: Mean attention of the query's tokens, shape (heads, tokens).
        null: Mean attention of the null query's tokens, same shape; ``None`` without calibration.
        spans: Tokens of each document's text, in the caller's order.
        query_ids: Token ids of the query itself.
        document_ids: Token ids of each document's text, in the caller's order.
    """

    query: Tensor
    null: Tensor | None
    spans: tuple[Span, ...]
    query_ids: tuple[int, ...] = ()
    document_ids: tuple[tuple[int, ...], ...] = ()


def document_signals(
    attention: Tensor,
    null_attention: Tensor | None,
    spans: Sequence[Span],
    *,
    drop_outliers: bool = True,
) -> Tensor:
    """Sum the attention each document receives from the query.

    Args:
        attention: Mean over the query's tokens, shape (heads, tokens).
        null_attention: Mean over the null query's tokens, shape (heads, tokens), subtracted token
            by token (Eq. 2); ``None`` leaves the attention uncalibrated.
        spans: Tokens of each document, one span per document; an empty one gets 0.
        drop_outliers: Whether to drop tokens at or below their document's mean minus two standard
            deviations (Eq. 3), such as punctuation that draws the attention of the null query.

    Returns:
        Shape (heads, documents). Calibrated signals lie between -1 and 1, others between 0 and 1.
    """
    tokens = token_scores(attention, null_attention, spans, drop_outliers=drop_outliers)
    return tokens @ membership(spans, tokens)


def token_scores(
    attention: Tensor,
    null_attention: Tensor | None,
    spans: Sequence[Span],
    *,
    drop_outliers: bool = True,
) -> Tensor:
    """Calibrate tokens (Eq. 2) and zero outliers (Eq. 3), with ``document_signals``' arguments."""
    tokens = attention if null_attention is None else attention - null_attention
    if not drop_outliers:
        return tokens
    return tokens * _inliers(tokens, membership(spans, tokens))


def residuals(attention: Tensor, null_attention: Tensor | None) -> Tensor:
    """Measure how far each token's attention exceeds what the null query predicts.

    Computes Pearson residuals, as if attention were counted: the same difference is small at a
    title or a full stop, which every query attends to, and large at a word that only this query
    attends to.

    Args:
        attention: Mean over the query's tokens, shape (heads, tokens).
        null_attention: The same for the null query; ``None`` returns the attention itself.

    Returns:
        Mean over the heads, shape (tokens,).
    """
    if null_attention is None:
        return attention.mean(dim=0)
    deviation = null_attention.sqrt() + _LEAST_DEVIATION
    return ((attention - null_attention) / deviation).mean(dim=0)


def standardise(scores: Tensor) -> Tensor:
    """Compute z-scores: shift and scale scores to mean 0 and standard deviation 1.

    Args:
        scores: Floating point, shape (..., documents); each row is one query or head.

    Returns:
        The same shape and dtype. A row is zero where its scores are all equal, and where one of
        them is not finite.
    """
    centred = scores - scores.mean(dim=-1, keepdim=True)
    deviation = centred.square().mean(dim=-1, keepdim=True).sqrt()
    # Equal scores can have a deviation above 0 by rounding, and tiny ones a deviation of 0.
    differ = (scores != scores[..., :1]).any(dim=-1, keepdim=True) & (deviation > 0)
    return torch.where(differ, centred / deviation, 0.0)


def fuse(scores: Tensor, first_stage: Tensor, weight: float) -> Tensor:
    """Add the z-scored retrieval scores to the z-scored attention scores.

    Args:
        scores: Attention scores, shape (documents,).
        first_stage: Retrieval scores, shape (documents,).
        weight: Weight of the retrieval scores.

    Returns:
        Shape (documents,).
    """
    return standardise(scores) + weight * standardise(first_stage)


def membership(spans: Sequence[Span], like: Tensor) -> Tensor:
    """Return 1 where a token belongs to a document, else 0, shape (tokens, documents).

    With this matrix a sum over documents is one product, which needs no loop and is deterministic;
    scattered additions on an accelerator are not.
    """
    tokens = torch.arange(like.shape[-1], device=like.device)[:, None]
    edges = torch.tensor(spans, device=like.device)  # (documents, 2)
    return ((tokens >= edges[:, 0]) & (tokens < edges[:, 1])).to(like.dtype)


def _inliers(tokens: Tensor, members: Tensor) -> Tensor:
    """Return 1 for tokens that are not outliers of their document, else 0: (heads, tokens)."""
    sizes = members.sum(dim=0).clamp(min=1)
    means = (tokens @ members) / sizes  # (heads, documents)
    centred = tokens - means @ members.T
    # Unbiased, as in the paper's code; a document of one token has no deviation.
    deviations = ((centred.square() @ members) / (sizes - 1).clamp(min=1)).sqrt()
    floor = -_OUTLIER_DEVIATIONS * (deviations @ members.T)  # (heads, tokens)
    return ((centred > floor) | (floor == 0)).to(tokens.dtype)
