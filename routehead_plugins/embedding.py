"""Make embeddings of a frozen LLM comparable."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
