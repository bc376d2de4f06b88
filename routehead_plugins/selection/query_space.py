"""Where a router compares queries: few coordinates, in which like queries lie close together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from routehead_plugins.backbone import check_pooling
from routehead_plugins.errors import InputError

_NEAREST = 5
_EDGES = (0.5, 0.95)  # quantiles of the anchors' own distances
_STEP = 1e-3  # at least this far apart, where all those are equal
_ROWS = 1024  # queries compared at once


@dataclass(frozen=True, eq=False)
class QuerySpace:
    """Embeddings of the frozen LLM, standardised, turned, cut to a few coordinates, of length 1.

    How familiar a query is shows in all standardised coordinates only: the few that are kept are
    those in which training queries differ, and of length 1 no query is far away.

    Attributes:
        layer: Of the LLM, after which queries are embedded.
        mean: Of the training queries' embeddings, shape (width,).
        deviation: Likewise; infinite where they do not vary.
        basis: Of standardised embeddings, shape (width, coordinates); scales as well.
        anchors: Standardised embeddings of training queries, shape (anchors, width). A router's
            files keep them in half precision.
        familiar: Two distances to the nearest anchors: up to the first a query is familiar, from
            the second on it is strange.
        pooling: How queries are embedded there, as ``FrozenLM.embed`` has it.

    Raises:
        InputError: A deviation is not above 0, the distances are not two that rise, or there is no
            such pooling.
    """

    layer: int
    mean: Tensor
    deviation: Tensor
    basis: Tensor
    anchors: Tensor
    familiar: tuple[float, float]
    pooling: str = "mean"

    tensors: ClassVar[Mapping[str, str]] = {
        "mean": "width",
        "deviation": "width",
        "basis": "width coordinates",
        "anchors": "anchors width",
    }

    def __post_init__(self) -> None:
        check_pooling(self.pooling)
        near, far = self.familiar
        if not 0 <= near < far < math.inf:
            raise InputError(
                f"familiar={self.familiar!r} are not two distances; give finite numbers from 0 on, "
                "the smaller one first."
            )
        if not bool((self.deviation > 0).all()):
            raise InputError("a deviation is not above 0; give infinity where nothing varies.")

    @classmethod
    def fit(
        cls,
        embeddings: Tensor,
        layer: int,
        *,
        pooling: str = "mean",
        coordinates: int = 64,
        anchors: int = 512,
    ) -> QuerySpace:
        """Find the space of some training queries.

        An LLM's states have a few coordinates tens of times larger than the others, in every text
        alike: all are standardised first. The principal components that are kept have deviation 1.

        Args:
            embeddings: From ``FrozenLM.embed``, shape (queries, width).
            layer: Of which they are.
            pooling: By which they are.
            coordinates: How many principal components are kept, at most.
            anchors: How many training queries are kept, evenly spaced in the order given; 2 or
                more.

        Raises:
            InputError: There are not two different queries.
        """
        mean = embeddings.mean(dim=0)
        deviation = embeddings.std(dim=0, unbiased=False)
        deviation = torch.where(deviation > 1e-6 * deviation.max(), deviation, torch.inf)
        standard = (embeddings - mean) / deviation
        _, sizes, turned = torch.linalg.svd(standard.double(), full_matrices=False)
        kept = min(coordinates, int((sizes > 1e-6 * sizes[0]).sum()))
        if not kept:
            raise InputError(
                f"all {len(embeddings)} queries are alike to the LLM; give two or more different "
                "ones to train on."
            )
        scale = len(embeddings) ** 0.5 / sizes[:kept]
        basis = (turned[:kept].T * scale).float()
        places = torch.linspace(0, len(standard) - 1, min(anchors, len(standard))).round().long()
        # As they come back from a file: a loaded router routes like the fitted one.
        some = standard[places].half().float()
        edges = _among_others(standard[places], some).quantile(torch.tensor(_EDGES))
        near, far = edges.tolist()
        familiar = (near, max(far, near + _STEP))
        return cls(layer, mean, deviation, basis, some, familiar, pooling)

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Bring embeddings here.

        Args:
            embeddings: From ``FrozenLM.embed``, shape (queries, width).

        Returns:
            Shape (queries, coordinates).
        """
        return self._placed(self._standardised(embeddings))

    @cached_property
    def places(self) -> Tensor:
        """The anchors in this space, shape (anchors, coordinates)."""
        return self._placed(self.anchors)

    def familiarity(self, embeddings: Tensor) -> Tensor:
        """How much like the training queries others are.

        The scale of a fitted space is the training queries' own: a query further from the anchors
        than 95 % of the anchors are from the other ones counts 0, one that is nearer than half of
        them counts 1.

        Args:
            embeddings: From ``FrozenLM.embed``, shape (queries, width).

        Returns:
            Between 0 and 1, shape (queries,).
        """
        near, far = self.familiar
        away = nearest(_distances(self._standardised(embeddings), self.anchors))
        return ((far - away) / (far - near)).clamp(0, 1)

    def _standardised(self, embeddings: Tensor) -> Tensor:
        return (embeddings - self.mean) / self.deviation

    def _placed(self, standardised: Tensor) -> Tensor:
        return torch.nn.functional.normalize(standardised @ self.basis, dim=-1)


def nearest(distances: Tensor, count: int = _NEAREST) -> Tensor:
    """Mean distance to the few nearest, shape (queries, anchors) -> (queries,)."""
    few = distances.topk(min(count, distances.shape[-1]), dim=-1, largest=False).values
    return few.mean(dim=-1)


def _distances(queries: Tensor, anchors: Tensor) -> Tensor:
    # By matrix products, small distances would be lost to rounding.
    return torch.cdist(queries, anchors, compute_mode="donot_use_mm_for_euclid_dist")


def _among_others(queries: Tensor, anchors: Tensor) -> Tensor:
    """How far each query is from all anchors but its own, which is the one in the same row."""
    count = min(_NEAREST, len(anchors) - 1)
    found = []
    for rows in torch.arange(len(queries)).split(_ROWS):
        distances = _distances(queries[rows], anchors)
        distances[torch.arange(len(rows)), rows] = torch.inf
        found.append(nearest(distances, count))
    return torch.cat(found)
