"""Figures about a router: which heads it reads, how often, and how much queries differ."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from routehead_plugins.heads import HeadSet
from routehead_plugins.selection import Router

PAIRED = 500
"""Largest number of queries of a collection that are compared with each other."""

_TOLERANCE = 1e-5  # relative; means of equal votes round differently


@dataclass(frozen=True, eq=False)
class Use:
    """The heads that a router reads for the queries of one collection.

    Attributes:
        name: Name of the collection.
        logits: Logits of all heads, shape (queries, heads).
        read: Mask of the heads that are read, shape (queries, heads).
        familiarity: Familiarity of the queries to the router, shape (queries,).
        layers: Number of layers to run for each query, shape (queries,).
    """

    name: str
    logits: Tensor
    read: Tensor
    familiarity: Tensor
    layers: Tensor

    @classmethod
    def of(cls, name: str, router: Router, embeddings: Tensor) -> Use:
        """Route one or more queries of a collection.

        Args:
            name: Name of the collection.
            router: The router.
            embeddings: The result of ``Router.embed``, shape (queries, width).
        """
        logits = router.logits(embeddings)
        head_sets = [router.choose(row) for row in logits]
        read = torch.zeros_like(logits, dtype=torch.bool)
        for row, heads in enumerate(head_sets):
            read[row, router.heads.indices_of(list(heads))] = True
        layers = torch.tensor([heads.last_layer + 1 for heads in head_sets])
        return cls(name, logits, read, router.space.familiarity(embeddings), layers)

    @property
    def weights(self) -> Tensor:
        """Logits of the heads that are read, 0 for the others, shape (queries, heads)."""
        return torch.where(self.read, self.logits, 0.0)

    @property
    def share(self) -> Tensor:
        """Share of the queries that read each head, shape (heads,), float64."""
        return self.read.double().mean(dim=0)

    def figures(self) -> dict[str, Any]:
        """Summarise the collection."""
        count = self.read.sum(dim=1)
        return {
            "queries": len(self.read),
            "head_sets": len(self.read.unique(dim=0)),
            "heads_mean": _rounded(count.double().mean()),
            "heads_min": int(count.min()),
            "heads_max": int(count.max()),
            "layers_mean": _rounded(self.layers.double().mean()),
            "familiarity": _rounded(self.familiarity.double().mean()),
            "wholly_static": _rounded((self.familiarity == 0).double().mean()),
        }


@dataclass(frozen=True, eq=False)
class Inspection:
    """A router, and the heads it reads for the queries of several collections.

    Attributes:
        name: Name under which the router was loaded.
        router: The router.
        size: Size of the file with its tensors, in bytes.
        uses: One entry per collection; empty if no queries were routed.
        seed: Random seed of the queries that are compared with each other.
    """

    name: str
    router: Router
    size: int
    uses: Sequence[Use] = ()
    seed: int = 0

    def facts(self) -> dict[str, Any]:
        """Describe the router itself."""
        router, heads = self.router, self.router.heads
        return {
            "router": self.name,
            "kind": router.kind,
            "model": heads.model,
            "layout": heads.layout,
            "data": heads.data,
            "aggregation": heads.recipe.aggregation,
            "first_stage_weight": heads.recipe.first_stage_weight,
            "reading": router.reading,
            "threshold": router.threshold,
            "max_heads": router.max_heads,
            "max_doc_tokens": router.max_doc_tokens,
            "embedding_layer": router.space.layer,
            "embedding_pooling": router.space.pooling,
            "embedding_source": router.space.source,
            "anchors": len(router.space.anchors),
            "bytes": self.size,
            "candidate_heads": len(heads),
            "nonzero_bias": int((router.bias != 0).sum()),
            "static_heads": len(self.static),
            "deepest_layer": heads.last_layer,
        }

    @cached_property
    def static(self) -> HeadSet:
        """The heads for a wholly unfamiliar query."""
        return self.router.choose(self.router.bias)

    def static_heads(self, count: int) -> list[tuple[str, float]]:
        """Return the heads with the largest bias (in absolute value for weights), and the bias."""
        bias = self.router.bias
        size = bias.abs() if self.router.reading == "weights" else bias
        order = size.argsort(descending=True, stable=True)[:count].tolist()
        return [(str(self.router.heads[index]), float(bias[index])) for index in order]

    def used_heads(self, count: int | None = None) -> list[dict[str, Any]]:
        """Return the heads that are read most often, largest mean weight first among equals.

        Args:
            count: Largest number of heads; ``None`` for all that are ever read.

        Returns:
            For each ``head``: the ``share`` of all queries that read it, its ``mean_weight`` for
            these (``None`` for gates), its ``bias``, and its share in each of the ``collections``.
        """
        if not self.uses:
            return []
        share = self._read.double().mean(dim=0)
        mean = self._weights.double().sum(dim=0) / self._read.sum(dim=0).clamp(min=1)
        signed = self.router.reading == "weights"
        size = mean.abs() if signed else mean
        order = sorted(range(len(share)), key=lambda index: (-share[index], -size[index]))
        return [
            {
                "head": str(self.router.heads[index]),
                "share": _rounded(share[index]),
                "mean_weight": _rounded(mean[index]) if signed else None,
                "bias": _rounded(self.router.bias[index]),
                "collections": {use.name: _rounded(use.share[index]) for use in self.uses},
            }
            for index in order[:count]
            if share[index] > 0
        ]

    @cached_property
    def distances(self) -> dict[str, list[list[float | None]]]:
        """Mean distances between queries, as a matrix of collections for each measure.

        Means are over pairs of different queries; 0 stands for equal queries and 1 for nothing in
        common. The measures are ``"jaccard"`` for sets of heads and, if logits are weights,
        ``"cosine"`` for logits. ``None`` stands for collections without a pair.
        """
        if not self.uses:
            return {}
        reads, logits = [], []
        for use in self.uses:
            rows = _sample(len(use.read), PAIRED, f"{self.seed} {use.name}")
            reads.append(use.read[rows])
            logits.append(use.logits[rows])
        distances = {"jaccard": _mean_distances(reads, jaccard)}
        if self.router.reading == "weights":
            distances["cosine"] = _mean_distances(logits, cosine)
        return distances

    @cached_property
    def is_static(self) -> bool | None:
        """Whether all queries get the same heads and weights; ``None`` for fewer than 2 queries."""
        if self._queries < 2:
            return None
        weights = self._weights
        spread = (weights - weights[0]).abs().max()
        equal = self.router.reading == "gates" or bool(spread <= _TOLERANCE * weights.abs().max())
        return equal and self._head_sets == 1

    def verdict(self) -> str | None:
        """State in one sentence whether the router routes; ``None`` if no queries were routed."""
        if not self.uses:
            return None
        if self.is_static is None:
            return "One query does not tell whether this router is static; give more."
        same = f"All {self._queries} queries get the same heads"
        if self.is_static:
            return f"{same} with the same weights: this router is static."
        if self._head_sets == 1:
            return f"{same}; only their weights differ."
        return f"{self._queries} queries get {self._head_sets} different sets of heads."

    def as_json(self) -> dict[str, Any]:
        """Return all figures as JSON values."""
        names = [use.name for use in self.uses]
        return {
            **self.facts(),
            "description": self.router.description,
            "static": [
                {"head": head, "bias": bias} for head, bias in self.static_heads(len(self.static))
            ],
            "is_static": self.is_static,
            "verdict": self.verdict(),
            "collections": {use.name: use.figures() for use in self.uses},
            "heads": self.used_heads(),
            "compared_queries": PAIRED,
            "distances": {
                measure: {
                    name: dict(zip(names, row, strict=True))
                    for name, row in zip(names, rows, strict=True)
                }
                for measure, rows in self.distances.items()
            },
        }

    @property
    def _queries(self) -> int:
        return sum(len(use.read) for use in self.uses)

    @property
    def _read(self) -> Tensor:
        return torch.cat([use.read for use in self.uses])

    @property
    def _weights(self) -> Tensor:
        return torch.cat([use.weights for use in self.uses])

    @property
    def _head_sets(self) -> int:
        return len(self._read.unique(dim=0))


def jaccard(first: Tensor, second: Tensor) -> Tensor:
    """Compute 1 - intersection / union between the rows of two masks that have no empty rows."""
    first, second = first.double(), second.double()
    intersection = first @ second.T
    union = first.sum(dim=1)[:, None] + second.sum(dim=1) - intersection
    return 1 - intersection / union


def cosine(first: Tensor, second: Tensor) -> Tensor:
    """Compute 1 - cosine between the rows of two tensors, 0 between two rows of zeros."""
    first, second = normalize(first.double(), dim=1), normalize(second.double(), dim=1)
    both_zero = ~first.any(dim=1)[:, None] & ~second.any(dim=1)
    return (1 - first @ second.T).clamp(min=0).masked_fill(both_zero, 0.0)


def sampled(topics: Mapping[str, str], count: int | None, seed: str) -> list[str]:
    """Sample at most ``count`` queries, or all, from topics, id -> text, in their order."""
    texts = list(topics.values())
    return [texts[index] for index in _sample(len(texts), count, seed)]


def _sample(size: int, count: int | None, seed: str) -> list[int]:
    """Draw indices below ``size`` without repetition, ascending."""
    if count is None or count >= size:
        return list(range(size))
    return sorted(random.Random(seed).sample(range(size), count))


def _mean_distances(
    groups: Sequence[Tensor], distance: Callable[[Tensor, Tensor], Tensor]
) -> list[list[float | None]]:
    """Average distances between the rows of all groups, but not of a row to itself."""

    def mean(first: Tensor, second: Tensor) -> float | None:
        distances = distance(first, second)
        total, pairs = distances.sum(), distances.numel()
        if first is second:
            total, pairs = total - distances.diagonal().sum(), pairs - len(first)
        return _rounded(total / pairs) if pairs else None

    return [[mean(first, second) for second in groups] for first in groups]


def _rounded(number: Tensor) -> float:
    return round(float(number), 6) + 0.0  # not -0.0
