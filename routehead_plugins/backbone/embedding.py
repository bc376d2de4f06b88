"""Make embeddings of a frozen LLM's states, and make them comparable."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from routehead_plugins.errors import InputError

POOLINGS = ("mean", "last")
"""Ways of making one vector of a text's states."""


@dataclass(frozen=True)
class Standardiser:
    """Shifts and scales every coordinate by its mean and deviation over a corpus.

    Attributes:
        mean: Shape (width,).
        deviation: Shape (width,), nowhere zero.
    """

    mean: Tensor
    deviation: Tensor

    @classmethod
    def fit(cls, embeddings: Tensor) -> Standardiser:
        """Measure a corpus.

        Args:
            embeddings: Of the documents, shape (documents, width).
        """
        deviation = embeddings.std(dim=0, unbiased=False)
        return cls(embeddings.mean(dim=0), torch.where(deviation > 0, deviation, 1.0))

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Standardise and bring to length 1, so that an inner product is a cosine.

        Args:
            embeddings: Of documents or queries, shape (texts, width).
        """
        return torch.nn.functional.normalize((embeddings - self.mean) / self.deviation, dim=-1)


def pooled(states: Tensor, lengths: Tensor, pooling: str) -> Tensor:
    """Make one vector of each text's states.

    Args:
        states: Shape (texts, tokens, width), padded on the right.
        lengths: How many tokens each text has, shape (texts,).
        pooling: One of ``POOLINGS``. The mean leaves out the first token, which all others lean on.

    Returns:
        Shape (texts, width), float32; zeros for a text without tokens to look at.
    """
    places = torch.arange(states.shape[1], device=states.device)[None]
    kept = (places > 0) & (places < lengths[:, None])
    if pooling == "last":
        kept = kept & (places == lengths[:, None] - 1)
    sums = (states.float() * kept.float()[..., None]).sum(dim=1)
    found: Tensor = sums / kept.float().sum(dim=1, keepdim=True).clamp(min=1)
    return found


def check_pooling(pooling: str) -> None:
    """Refuse what is no way of pooling.

    Raises:
        InputError: It is none of ``POOLINGS``.
    """
    if pooling not in POOLINGS:
        raise InputError(
            f"pooling={pooling!r} does not exist; choose one of {', '.join(POOLINGS)}."
        )
