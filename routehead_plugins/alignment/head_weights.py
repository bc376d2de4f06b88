"""The score of a document: learned weights of the heads times their signals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from routehead_plugins.alignment.passes import Signals

# Smaller attention is raised to this value, as at query time.
_LEAST_MASS = 1e-9
# Keeps the gradient of the deviation of equal signals finite.
_LEAST_VARIANCE = 1e-10

SIGNALS = ("log", "calibrated")
"""Kinds of signals: logarithms of attention, or attention minus that of the null query."""

WEIGHTS = ("softmax", "signed")
"""Kinds of weights: positive ones that sum to a learned scale, or any numbers."""


def features(signals: Signals, kind: str, *, standardise: bool) -> Tensor:
    """Turn what the heads pay into what their weights are learned on.

    Args:
        signals: Attention to the documents of a query.
        kind: One of ``SIGNALS``.
        standardise: Whether each head is z-scored over the documents, as head sets are read; else
            only its mean is subtracted.

    Returns:
        Shape (heads, documents), float32.
    """
    table = signals.mass.clamp(min=_LEAST_MASS).log() if kind == "log" else signals.calibrated
    centred = table - table.mean(dim=1, keepdim=True)
    if not standardise:
        return centred
    # Calibrated sums may be tiny; their own scale must not drown in the constant.
    size = centred.detach().abs().amax(dim=1, keepdim=True).clamp(min=_LEAST_MASS)
    centred = centred / size
    return centred / (centred.square().mean(dim=1, keepdim=True) + _LEAST_VARIANCE).sqrt()


@dataclass(frozen=True)
class HeadWeights:
    """Learned weights of the heads.

    Attributes:
        kind: One of ``WEIGHTS``.
        logits: Shape (heads,); the weights themselves where they are signed.
        log_scale: Logarithm of the sum of softmax weights, a scalar.
    """

    kind: str
    logits: nn.Parameter
    log_scale: nn.Parameter

    @classmethod
    def equal(cls, kind: str, count: int, device: torch.device, scale: float = 1.0) -> HeadWeights:
        """Make equal weights that sum to ``scale``."""
        start = 0.0 if kind == "softmax" else 1 / count
        logits = torch.full((count,), start, dtype=torch.float32, device=device)
        log_scale = torch.tensor(math.log(scale), dtype=torch.float32, device=device)
        return cls(kind, nn.Parameter(logits), nn.Parameter(log_scale))

    @torch.no_grad()
    def set(self, weights: Tensor) -> None:
        """Take over the weight of each head, shape (heads,); above 0 for softmax weights."""
        total = weights.abs().sum()
        shares = weights / total
        self.logits.copy_(shares.log() if self.kind == "softmax" else shares)
        self.log_scale.copy_(total.log())

    @property
    def weights(self) -> Tensor:
        """Weight of each head, shape (heads,)."""
        if self.kind == "signed":
            return self.logits * self.log_scale.exp()
        return self.logits.softmax(dim=0) * self.log_scale.exp()

    @property
    def shares(self) -> Tensor:
        """Share of each head in the sum of all weights' sizes, shape (heads,)."""
        sizes = self.weights.abs()
        return sizes / sizes.sum().clamp(min=_LEAST_MASS)

    def scores(self, table: Tensor) -> Tensor:
        """Score documents by their ``features``, shape (documents,)."""
        return self.weights @ table

    def tensors(self) -> dict[str, nn.Parameter]:
        """Return the parameters by their names in files."""
        return {"heads.logits": self.logits, "heads.log_scale": self.log_scale}
