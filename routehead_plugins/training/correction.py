"""Learn the correction that a router adds to its bias: projection and head embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from routehead_plugins.signals import QuerySignals
from routehead_plugins.training.proximal import Listwise, tabulate

Loss = Callable[[Tensor, Tensor], Tensor]
"""Function of the bias, shape (heads,), and the correction, shape (queries, heads)."""

_STEPS = 200
_RATE = 0.01


# A caller's autocast would round the products to half the digits.
@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
def learn(loss: Loss, queries: Tensor, bias: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Minimise a loss over the projection and the heads' embeddings, on all queries at once.

    From queries of shape (queries, coordinates) and the fixed bias of shape (heads,), learn the
    projection, shape (rank, coordinates), and the embeddings, shape (heads, rank).
    """
    generator = torch.Generator().manual_seed(seed)
    projection = torch.randn(
        rank, queries.shape[1], generator=generator, dtype=torch.float32
    ).requires_grad_()
    # Zeros, so that training starts without a correction.
    embeddings = torch.zeros(len(bias), rank, dtype=torch.float32).requires_grad_()
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
    """Return the listwise loss of ``training.weights`` with bias and correction as weights.

    The penalty is the mean over queries of the squared length of the correction.
    """
    table = tabulate(queries, aggregation, first_stage=first_stage_weight is not None)
    signals = table.features[..., :-1].float() * table.scale[:-1].float()
    first_stage = table.features[..., -1].float() * (first_stage_weight or 0.0)
    entropy = Listwise(table.judgments.gains.float(), table.judgments.present)

    def loss(bias: Tensor, correction: Tensor) -> Tensor:
        scores = torch.einsum("qdh,qh->qd", signals, bias + correction) + first_stage
        penalty = correction.square().sum(dim=1).mean()
        return entropy.losses(scores).mean() + strength * penalty

    return loss


def cross_entropy(gates: Tensor, strength: float) -> Loss:
    """Return the cross-entropy of the router's gates with pseudo-labels, shape (queries, heads).

    The penalty is the mean gate: an L1 norm, as gates are positive.
    """
    labels = gates.float()

    def loss(bias: Tensor, correction: Tensor) -> Tensor:
        logits = bias + correction
        entropy = binary_cross_entropy_with_logits(logits, labels)
        return entropy + strength * logits.sigmoid().mean()

    return loss
