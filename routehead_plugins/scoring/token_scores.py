"""Token attention to document scores: pure functions of tensors.

Equation numbers are those of ICR (arXiv 2410.02642).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from routehead_plugins.data import Span

_OUTLIER_DEVIATIONS = 2.0
# Attention below 1e-10 is as good as none; its root keeps residuals finite.
_LEAST_DEVIATION = 1e-5


@dataclass(frozen=True)
class TokenAttention:
    """Attention of the heads to the tokens of a prompt.

    Attributes:
        query: Attention of the query's tokens, averaged over them, shape (heads, tokens).
        null: The same for the query without content, or ``None`` where it was not asked for.
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
        null_attention: The same for a query without content, subtracted token by token (Eq. 2);
            ``None`` leaves the attention uncalibrated.
        spans: Tokens of each document, one span per document; an empty one gets 0.
        drop_outliers: Leave out tokens at or below their document's mean minus two standard
            deviations (Eq. 3): punctuation and the like that the null query stares at.

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
    """Calibrate every token (Eq. 2) and set outliers to zero (Eq. 3); see ``document_signals``.

    Returns:
        Shape (heads, tokens).
    """
    tokens = attention if null_attention is None else attention - null_attention
    if not drop_outliers:
        return tokens
    return tokens * _kept(tokens, membership(spans, tokens))


def mean_over_heads(signals: Tensor) -> Tensor:
    """Give every head the same say (Eq. 1, divided by the number of heads).

    Args:
        signals: Shape (heads, anything).

    Returns:
        Shape (anything,).
    """
    return signals.mean(dim=0)


def residuals(attention: Tensor, null_attention: Tensor | None) -> Tensor:
    """How far each token's attention stands out from what the null query would make expect.

    Pearson residuals, as if attention were counted: a difference that is small beside a title or a
    full stop, at which every query stares, is large at a word that only this query looks at.

    Args:
        attention: Mean over the query's tokens, shape (heads, tokens).
        null_attention: The same for a query without content; ``None`` leaves attention as it is.

    Returns:
        Mean over the heads, shape (tokens,).
    """
    if null_attention is None:
        return attention.mean(dim=0)
    deviation = null_attention.sqrt() + _LEAST_DEVIATION
    return ((attention - null_attention) / deviation).mean(dim=0)


def standardise(scores: Tensor) -> Tensor:
    """Shift and scale scores of one query to mean 0 and standard deviation 1.

    Args:
        scores: Shape (documents,). All equal, they become zeros.
    """
    if bool((scores == scores[0]).all()):  # rounding would make something of nothing
        return torch.zeros_like(scores)
    centred = scores - scores.mean()
    deviation = centred.square().mean().sqrt()
    return centred / deviation if deviation > 0 else torch.zeros_like(scores)


def fuse(scores: Tensor, first_stage: Tensor, weight: float) -> Tensor:
    """Add the retrieval scores, both sides standardised per query.

    Args:
        scores: Attention scores, shape (documents,).
        first_stage: Retrieval scores, shape (documents,).
        weight: How much a standard deviation of the retrieval score counts.
    """
    return standardise(scores) + weight * standardise(first_stage)


def membership(spans: Sequence[Span], like: Tensor) -> Tensor:
    """Mark with 1 where a token belongs to a document.

    Args:
        spans: Tokens of each document.
        like: Its last dimension are the tokens; its device and number format are taken.

    Returns:
        Shape (tokens, documents).

    As a matrix, sums over documents are one product: no loop, and the same sum on every run, which
    scattered additions on an accelerator do not promise.
    """
    tokens = torch.arange(like.shape[-1], device=like.device)[:, None]
    edges = torch.tensor(spans, device=like.device)  # (documents, 2)
    return ((tokens >= edges[:, 0]) & (tokens < edges[:, 1])).to(like.dtype)


def _kept(tokens: Tensor, members: Tensor) -> Tensor:
    """One where a token is no outlier of its document, shape (heads, tokens)."""
    sizes = members.sum(dim=0).clamp(min=1)
    means = (tokens @ members) / sizes  # (heads, documents)
    centred = tokens - means @ members.T
    # Unbiased, as in the paper's code; a document of one token has nothing to deviate from.
    deviations = ((centred.square() @ members) / (sizes - 1).clamp(min=1)).sqrt()
    floor = -_OUTLIER_DEVIATIONS * (deviations @ members.T)  # (heads, tokens)
    return ((centred > floor) | (floor == 0)).to(tokens.dtype)
