"""Learn what a router adds to its bias: W and the embeddings of heads, by gradient descent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from routehead_plugins.signals import QuerySignals
from routehead_plugins.training.proximal import tabulate

Loss = Callable[[Tensor, Tensor], Tensor]
"""Of the bias and of the correction, each (queries, heads) or (heads,): a number."""

_STEPS = 200
_RATE = 0.01


def learn(loss: Loss, queries: Tensor, bias: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Minimise a loss over W and the heads' embeddings, all queries at once.

    Args:
        loss: Penalty included.
        queries: In the router's space, shape (queries, coordinates).
        bias: Stays as it is, shape (heads,).
        rank: Length of a head's embedding.
        seed: Of where W starts. Embeddings start at zero, and so does the correction.

    Returns:
        W of shape (rank, coordinates), embeddings of shape (heads, rank).
    """
    generator = torch.Generator().manual_seed(seed)
    projection = torch.randn(rank, queries.shape[1], generator=generator).requires_grad_()
    embeddings = torch.zeros(len(bias), rank).requires_grad_()
    optimizer = torch.optim.Adam([projection, embeddings], lr=_RATE)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        correction = queries @ projection.T @ embeddings.T / math.sqrt(rank)
        torch.autograd.backward(loss(bias, correction))
        optimizer.step()
    return projection.detach(), embeddings.detach()


def listwise(
    queries: Sequence[QuerySignals],
    aggregation: str,
    first_stage_weight: float | None,
    strength: float,
) -> Loss:
    """Cross-entropy of scores and judgments, as ``training.weights`` has it.

    Args:
        queries: The signals, all with contrast.
        aggregation: What is weighted.
        first_stage_weight: Of the standardised retrieval score.
        strength: Of the penalty, the mean over queries of the squared length of the correction.
    """
    table = tabulate(
        queries, aggregation, "listwise", first_stage=first_stage_weight is not None, spread=0.0
    )
    signals = table.features[..., :-1].float() * table.scale[:-1].float()
    first_stage = table.features[..., -1].float() * (first_stage_weight or 0.0)
    gains = table.gains.clamp(min=0).float()
    # Of a query without any gain nothing is asked.
    target = gains / gains.sum(dim=1, keepdim=True).clamp(min=1e-30)
    absent = ~table.present[..., 0]

    def loss(bias: Tensor, correction: Tensor) -> Tensor:
        scores = torch.einsum("qdh,qh->qd", signals, bias + correction) + first_stage
        shown = scores.masked_fill(absent, -1e9).log_softmax(dim=1)
        penalty = correction.square().sum(dim=1).mean()
        return -(target * shown).sum(dim=1).mean() + strength * penalty

    return loss


def cross_entropy(gates: Tensor, strength: float) -> Loss:
    """Cross-entropy of gates and pseudo-labels.

    Args:
        gates: The labels, shape (queries, heads); bool.
        strength: Of the penalty, the mean gate: an L1 norm, as gates are positive.
    """
    wanted = gates.float()

    def loss(bias: Tensor, correction: Tensor) -> Tensor:
        logits = bias + correction
        entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted)
        return entropy + strength * logits.sigmoid().mean()

    return loss
