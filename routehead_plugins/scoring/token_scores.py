"""Token scores, document signals and z-scores.

Equation numbers are those of ICR (arXiv 2410.02642).
"""

from __future__ import annotations

import math
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
        kept: Where only some tokens of a document's text are read, their indices among all of
            them; ``None`` for a document that is read whole. Empty if all are.
        cut: Indices of the documents that were cut to fit the LLM's context.
        query_is_cut: Whether the query was.
    """

    query: Tensor
    null: Tensor | None
    spans: tuple[Span, ...]
    query_ids: tuple[int, ...] = ()
    document_ids: tuple[tuple[int, ...], ...] = ()
    kept: tuple[tuple[int, ...] | None, ...] = ()
    cut: frozenset[int] = frozenset()
    query_is_cut: bool = False


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
        spans: Tokens of each document, one span per document, in any order; they do not overlap,
            and an empty one gets 0.
        drop_outliers: Whether to drop tokens at or below their document's mean minus two standard
            deviations (Eq. 3), such as punctuation that draws the attention of the null query.

    Returns:
        Shape (heads, documents). Calibrated signals lie between -1 and 1, others between 0 and 1.
    """
    tokens = token_scores(attention, null_attention, spans, drop_outliers=drop_outliers)
    return document_sums(tokens, owners(spans, tokens), len(spans))


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
    return tokens * _inliers(tokens, spans)


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


def standardise(scores: Tensor, *, not_finite: float = 0.0) -> Tensor:
    """Compute z-scores: shift and scale scores to mean 0 and standard deviation 1.

    Args:
        scores: Floating point, shape (..., documents); each row is one query or head.
        not_finite: Value of rows in which a score is not finite: 0 where scores may be missing, NaN
            where that is a fault that callers must notice.

    Returns:
        The same shape and dtype, computed in float64. A row is zero where its scores are all equal.
    """
    if not scores.numel():
        return scores.clone()
    wide = scores.double()
    # Squares of scores beyond 1e154 would overflow even float64; a power of 2 scales exactly.
    wide = wide.ldexp(-wide.abs().amax(dim=-1, keepdim=True).frexp().exponent)
    centred = wide - wide.mean(dim=-1, keepdim=True)
    deviation = centred.square().mean(dim=-1, keepdim=True).sqrt()
    # Equal scores can have a deviation above 0 by rounding.
    equal = (scores == scores[..., :1]).all(dim=-1, keepdim=True)
    standard = torch.where(equal, 0.0, centred / deviation)
    finite = scores.isfinite().all(dim=-1, keepdim=True)
    return standard.where(finite, not_finite).to(scores.dtype)


def fuse(scores: Tensor, first_stage: Tensor, weight: float) -> Tensor:
    """Add the z-scored retrieval scores to the z-scored attention scores.

    Args:
        scores: Attention scores, shape (documents,).
        first_stage: Retrieval scores, shape (documents,); float64 where float32 cannot hold them.
        weight: Weight of the retrieval scores.

    Returns:
        Shape (documents,), in the dtype of ``scores``.
    """
    own = standardise(scores, not_finite=math.nan)
    return own + weight * standardise(first_stage).to(scores)


def owners(spans: Sequence[Span], like: Tensor) -> Tensor:
    """Return the index of each token's document, or the number of documents outside of them all.

    Args:
        spans: Tokens of each document; they do not overlap.
        like: Values of the tokens, shape (..., tokens).

    Returns:
        Shape (tokens,).
    """
    edges = torch.tensor(spans, dtype=torch.long, device="cpu").view(-1, 2)
    starts, sizes = edges[:, 0], edges[:, 1] - edges[:, 0]
    documents = torch.arange(len(spans), device="cpu").repeat_interleave(sizes)
    # The tokens of all spans, one after the other: a count over all, moved to each span's start.
    before = sizes.cumsum(dim=0) - sizes
    tokens = torch.arange(len(documents), device="cpu") + (starts - before)[documents]
    indices = torch.full((like.shape[-1],), len(spans), device="cpu")
    indices[tokens] = documents
    return indices.to(like.device)


def document_sums(values: Tensor, documents: Tensor, count: int) -> Tensor:
    """Sum the values of each document's tokens; the cost is linear in tokens.

    Args:
        values: Shape (heads, tokens).
        documents: Index of each token's document, as ``owners`` returns it.
        count: Number of documents.

    Returns:
        Shape (heads, documents). Added up in float64, one token after the other: a document's sum
        depends neither on the other documents nor, on the CPU, on the order of the additions.
    """
    sums = values.new_zeros(len(values), count + 1, dtype=torch.float64)
    # Head by head, so that a single head's values are held in float64 at once.
    for total, row in zip(sums, values, strict=True):
        total.index_add_(0, documents, row.double())
    return sums[:, :count].to(values.dtype)


def _inliers(tokens: Tensor, spans: Sequence[Span]) -> Tensor:
    """Return 1 for tokens that are not outliers of their document, else 0: (heads, tokens)."""
    documents, count = owners(spans, tokens), len(spans)
    sizes = torch.tensor([span.size for span in spans], device="cpu").to(tokens)
    means = document_sums(tokens, documents, count) / sizes.clamp(min=1)
    centred = tokens - spread(means, documents)
    # Unbiased, as in the paper's code; a document of one token has no deviation.
    squares = document_sums(centred.square(), documents, count)
    deviations = (squares / (sizes - 1).clamp(min=1)).sqrt()
    floor = -_OUTLIER_DEVIATIONS * spread(deviations, documents)
    return ((centred > floor) | (floor == 0)).to(tokens.dtype)


def spread(values: Tensor, documents: Tensor) -> Tensor:
    """Give each token its document's value, and 0 to tokens outside of all documents.

    Args:
        values: Shape (heads, documents).
        documents: Index of each token's document, as ``owners`` returns it.

    Returns:
        Shape (heads, tokens).
    """
    return torch.nn.functional.pad(values, (0, 1))[:, documents]
