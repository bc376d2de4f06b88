"""The space in which a router compares queries."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from routehead_plugins.backbone import check_pooling, isolated
from routehead_plugins.errors import InputError, short_repr

SOURCES = ("query", "tail")
"""What queries are embedded by: their text alone, or the tail of their prompt (late layout)."""

_NEAREST = 5
_QUANTILES = (0.5, 0.95)  # of the anchors' distances to one another, for `familiar`
_STEP = 1e-3  # least difference of the two, where those distances are all equal
_MAX_LAYER = 10_000  # of any LLM
_ROWS = 1024  # queries compared at once


@dataclass(frozen=True, eq=False)
class QuerySpace:
    """Query embeddings of the frozen LLM: z-scored, PCA-projected, L2-normalised.

    Familiarity is measured between the z-scored embeddings, before projection: the projection keeps
    the directions in which training queries differ, and after normalisation no query is far away.

    Attributes:
        layer: Layer of the LLM after which queries are embedded.
        mean: Mean of the training queries' embeddings, shape (width,).
        deviation: Their standard deviation, shape (width,); infinite for constant coordinates.
        basis: Principal components, scaled to deviation 1, shape (width, coordinates).
        anchors: Z-scored training queries, shape (anchors, width); half precision in files.
        familiar: Two mean distances to the nearest anchors: up to the first, a query is fully
            familiar; from the second on, it is wholly unfamiliar.
        pooling: Pooling method of the embeddings; see ``FrozenLM.embed``.
        source: One of ``SOURCES``: embeddings are those of ``FrozenLM.embed``, or those of
            ``LateLayout.embed``, which the pass that reads the query makes on the way.

    Raises:
        InputError: A deviation is not positive, or the layer, the distances, the pooling or the
            source are invalid.
    """

    layer: int
    mean: Tensor
    deviation: Tensor
    basis: Tensor
    anchors: Tensor
    familiar: tuple[float, float]
    pooling: str = "mean"
    source: str = "query"

    tensors: ClassVar[Mapping[str, str]] = {
        "mean": "width",
        "deviation": "width",
        "basis": "width coordinates",
        "anchors": "anchors width",
    }

    def __post_init__(self) -> None:
        layer: object = self.layer
        if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer <= _MAX_LAYER:
            raise InputError(
                f"layer={short_repr(layer)} must be a whole number from 0 to {_MAX_LAYER:,}."
            )
        check_pooling(self.pooling)
        check_source(self.source)
        near, far = self.familiar
        if not 0 <= near < far < math.inf:
            raise InputError(
                f"familiar={self.familiar!r} must be two increasing distances; give finite "
                "numbers, 0 or more, the smaller one first."
            )
        if not bool((self.deviation > 0).all()):
            raise InputError(
                "a deviation is not above 0; give infinity for coordinates that do not vary."
            )

    @classmethod
    def fit(
        cls,
        embeddings: Tensor,
        layer: int,
        *,
        pooling: str = "mean",
        source: str = "query",
        coordinates: int = 64,
        anchors: int = 512,
    ) -> QuerySpace:
        """Fit the space to training queries.

        A few coordinates of an LLM's states are tens of times larger than the others whatever the
        text, so all coordinates are z-scored before the principal components are computed.

        Args:
            embeddings: From ``FrozenLM.embed`` or ``LateLayout.embed``, shape (queries, width).
            layer: Layer after which they were computed.
            pooling: Pooling method with which they were computed.
            source: What they were computed from, one of ``SOURCES``.
            coordinates: Maximum number of principal components.
            anchors: Maximum number of queries to keep, 2 or more, evenly spaced in their order.

        Raises:
            InputError: All queries have the same embedding.
        """
        mean = embeddings.mean(dim=0)
        deviation = embeddings.std(dim=0, unbiased=False)
        deviation = torch.where(deviation > 1e-6 * deviation.max(), deviation, torch.inf)
        standard = (embeddings - mean) / deviation
        _, singular, components = torch.linalg.svd(standard.double(), full_matrices=False)
        rank = min(coordinates, int((singular > 1e-6 * singular[0]).sum()))
        if not rank:
            raise InputError(
                f"all {len(embeddings)} queries have the same embedding; give two or more "
                "different queries to train on."
            )
        basis = (components[:rank].T * (len(embeddings) ** 0.5 / singular[:rank])).float()
        indices = torch.linspace(0, len(standard) - 1, min(anchors, len(standard))).round().long()
        # Rounded as in a router's files, so that a loaded router routes like the fitted one.
        rounded = standard[indices].half().float()
        distances = _distances_to_others(standard[indices], rounded)
        near, far = distances.quantile(torch.tensor(_QUANTILES)).tolist()
        familiar = (near, max(far, near + _STEP))
        return cls(layer, mean, deviation, basis, rounded, familiar, pooling, source)

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Project embeddings into the space: (queries, width) to (queries, coordinates)."""
        return self._projected(self._z_scores(embeddings))

    @cached_property
    def projected_anchors(self) -> Tensor:
        """The anchors in the space, shape (anchors, coordinates)."""
        return self._projected(self.anchors)

    @isolated(torch.device("cpu"))
    def familiarity(self, embeddings: Tensor) -> Tensor:
        """Measure how similar queries are to the training queries.

        In a fitted space, a query scores 0 if it is further from the anchors than 95 % of the
        anchors are from one another, and 1 if it is nearer than half of them.

        Args:
            embeddings: From ``FrozenLM.embed``, shape (queries, width).

        Returns:
            Between 0 and 1, shape (queries,).
        """
        near, far = self.familiar
        distances = mean_nearest(_distances(self._z_scores(embeddings), self.anchors))
        return ((far - distances) / (far - near)).clamp(0, 1)

    def _z_scores(self, embeddings: Tensor) -> Tensor:
        return (embeddings - self.mean) / self.deviation

    @isolated(torch.device("cpu"))
    def _projected(self, z_scores: Tensor) -> Tensor:
        return torch.nn.functional.normalize(z_scores @ self.basis, dim=-1)


def check_source(source: object) -> None:
    """Check what queries are embedded by.

    Raises:
        InputError: It is not one of ``SOURCES``.
    """
    if source not in SOURCES:
        raise InputError(
            f"source={short_repr(source)} is not one of {', '.join(SOURCES)}; give one of them."
        )


def mean_nearest(distances: Tensor, count: int = _NEAREST) -> Tensor:
    """Average each query's smallest distances: (queries, anchors) to (queries,)."""
    count = min(count, distances.shape[-1])
    return distances.topk(count, dim=-1, largest=False).values.mean(dim=-1)


def _distances(queries: Tensor, anchors: Tensor) -> Tensor:
    # Matrix products would lose small distances to rounding.
    return torch.cdist(queries, anchors, compute_mode="donot_use_mm_for_euclid_dist")


def _distances_to_others(queries: Tensor, anchors: Tensor) -> Tensor:
    """Measure each query's distance to the nearest anchors other than the one in its own row."""
    count = min(_NEAREST, len(anchors) - 1)
    parts = []
    for rows in torch.arange(len(queries)).split(_ROWS):
        distances = _distances(queries[rows], anchors)
        distances[torch.arange(len(rows)), rows] = torch.inf
        parts.append(mean_nearest(distances, count))
    return torch.cat(parts)
