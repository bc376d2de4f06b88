"""What a router makes of queries, in figures: which heads, how often, how differently."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from routehead_plugins.heads import HeadSet
from routehead_plugins.selection import Router

PAIRED = 500
"""Queries of each collection that are compared with each other, at most."""

# Votes are means of like numbers, which round differently: weights this near are the same.
_SAME = 1e-5


@dataclass(frozen=True, eq=False)
class Use:
    """What a router made of one collection's queries.

    Attributes:
        name: The collection.
        weights: Logits of the heads that are read, and 0 of the others, shape (queries, heads).
        read: Which heads are read, shape (queries, heads); bool.
        logits: Of all heads, shape (queries, heads).
        familiarity: Of the queries, shape (queries,).
        layers: How many layers each query has to run, shape (queries,).
    """

    name: str
    weights: Tensor
    read: Tensor
    logits: Tensor
    familiarity: Tensor
    layers: Tensor

    @classmethod
    def of(cls, name: str, router: Router, embeddings: Tensor) -> Use:
        """Route queries.

        Args:
            name: The collection.
            router: The router.
            embeddings: From ``Router.embed``, one query at least, shape (queries, width).
        """
        logits = router.logits(embeddings)
        read = torch.zeros_like(logits, dtype=torch.bool)
        places = {head: place for place, head in enumerate(router.heads)}
        chosen = [router.choose(each) for each in logits]
        for row, heads in enumerate(chosen):
            read[row, [places[head] for head in heads]] = True
        return cls(
            name=name,
            weights=torch.where(read, logits, 0.0),
            read=read,
            logits=logits,
            familiarity=router.space.familiarity(embeddings),
            layers=torch.tensor([heads.last_layer + 1 for heads in chosen]),
        )

    @property
    def share(self) -> Tensor:
        """Share of the queries that read each head, shape (heads,), float64."""
        return self.read.double().mean(dim=0)

    def figures(self) -> dict[str, Any]:
        """What can be said of the collection by itself."""
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
    """A router, and what it made of queries.

    Attributes:
        name: As the router was asked for.
        router: The router.
        size: Of its tensors' file, in bytes.
        uses: One for each collection; none where no queries were routed.
        seed: Of the queries that are compared with each other.
    """

    name: str
    router: Router
    size: int
    uses: Sequence[Use] = ()
    seed: int = 0

    def facts(self) -> dict[str, Any]:
        """What holds whatever the query."""
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
            "anchors": len(router.space.anchors),
            "bytes": self.size,
            "candidate_heads": len(heads),
            "nonzero_bias": int((router.bias != 0).sum()),
            "static_heads": len(self.static),
            "deepest_layer": heads.last_layer,
        }

    @cached_property
    def static(self) -> HeadSet:
        """The heads of a query of which nothing is known."""
        return self.router.choose(self.router.bias)

    def static_heads(self, count: int) -> list[tuple[str, float]]:
        """The heads with the largest bias, in size where biases are signed weights.

        Args:
            count: How many, at most.

        Returns:
            Pairs of head and bias.
        """
        bias = self.router.bias
        size = bias.abs() if self.router.reading == "weights" else bias
        order = size.argsort(descending=True, stable=True)[:count].tolist()
        return [(str(self.router.heads[place]), float(bias[place])) for place in order]

    def used_heads(self, count: int | None = None) -> list[dict[str, Any]]:
        """The heads that are read most often; among equals, those that weigh most.

        Args:
            count: How many, at most; ``None`` for all that are read at all.

        Returns:
            For each ``head``: ``share`` of all queries that read it, ``mean_weight`` over those
            (``None`` for gates), its ``bias``, and its share in each of the ``collections``.
        """
        if not self.uses:
            return []
        read = torch.cat([use.read for use in self.uses])
        weights = torch.cat([use.weights for use in self.uses]).double()
        share = read.double().mean(dim=0)
        mean = weights.sum(dim=0) / read.sum(dim=0).clamp(min=1)
        signed = self.router.reading == "weights"
        size = mean.abs() if signed else mean
        order = sorted(range(len(share)), key=lambda place: (-share[place], -size[place]))
        return [
            {
                "head": str(self.router.heads[place]),
                "share": _rounded(share[place]),
                "mean_weight": _rounded(mean[place]) if signed else None,
                "bias": _rounded(self.router.bias[place]),
                "collections": {use.name: _rounded(use.share[place]) for use in self.uses},
            }
            for place in order[:count]
            if share[place] > 0
        ]

    @cached_property
    def distances(self) -> dict[str, list[list[float | None]]]:
        """How differently queries are routed, a row and a column for each collection.

        Means over pairs of different queries, 0 for the same and 1 for nothing in common:
        ``"jaccard"`` of the sets of heads and, where logits are weights, ``"cosine"`` of the
        logits. ``None`` where there is no pair.
        """
        if not self.uses:
            return {}
        drawn = [_drawn(len(use.read), f"{self.seed} {use.name}") for use in self.uses]
        pairs = list(zip(self.uses, drawn, strict=True))
        found = {"jaccard": _matrix([use.read[rows] for use, rows in pairs], jaccard)}
        if self.router.reading == "weights":
            found["cosine"] = _matrix([use.logits[rows] for use, rows in pairs], cosine)
        return found

    @cached_property
    def is_static(self) -> bool | None:
        """Whether all queries get the same heads, equally weighted; ``None`` for fewer than two."""
        if sum(len(use.read) for use in self.uses) < 2:
            return None
        weights = torch.cat([use.weights for use in self.uses])
        spread = (weights - weights[0]).abs().max()
        near = self.router.reading == "gates" or bool(spread <= _SAME * weights.abs().max())
        return near and self._head_sets == 1

    @property
    def _head_sets(self) -> int:
        return len(torch.cat([use.read for use in self.uses]).unique(dim=0))

    def verdict(self) -> str | None:
        """Whether it routes at all, in a sentence; ``None`` where no queries were routed."""
        queries = sum(len(use.read) for use in self.uses)
        if not queries:
            return None
        if self.is_static is None:
            return "One query does not tell whether this router is static; give more."
        if self.is_static:
            return (
                f"All {queries} queries get the same heads with the same weights: this router is "
                "static."
            )
        if self._head_sets == 1:
            return f"All {queries} queries get the same heads; only their weights differ."
        return f"{queries} queries get {self._head_sets} different sets of heads."

    def as_json(self) -> dict[str, Any]:
        """Everything, for a file."""
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


def jaccard(one: Tensor, two: Tensor) -> Tensor:
    """Distances of sets of heads: 1 less the share of the union that both have.

    Args:
        one: Which heads are read, one at least in each row, shape (queries, heads); bool.
        two: Likewise, shape (others, heads).

    Returns:
        Shape (queries, others), float64.
    """
    first, second = one.double(), two.double()
    both = first @ second.T
    either = first.sum(dim=1)[:, None] + second.sum(dim=1) - both
    return 1 - both / either


def cosine(one: Tensor, two: Tensor) -> Tensor:
    """Distances of logits: 1 less their cosine, and 0 between two rows of zeros.

    Args:
        one: Shape (queries, heads).
        two: Shape (others, heads).

    Returns:
        From 0 to 2, shape (queries, others), float64.
    """
    first, second = (torch.nn.functional.normalize(each.double(), dim=1) for each in (one, two))
    blank = ~first.any(dim=1)[:, None] & ~second.any(dim=1)
    return (1 - first @ second.T).clamp(min=0).masked_fill(blank, 0.0)


def _matrix(
    parts: Sequence[Tensor], distance: Callable[[Tensor, Tensor], Tensor]
) -> list[list[float | None]]:
    """Mean distances between the rows of all parts; within a part no row is its own pair."""
    rows: list[list[float | None]] = []
    for place, one in enumerate(parts):
        row: list[float | None] = []
        for other, two in enumerate(parts):
            own = len(one) if place == other else 0
            pairs = len(one) * len(two) - own
            total = distance(one, two)
            total = total.sum() - (total.diagonal().sum() if own else 0.0)
            row.append(_rounded(total / pairs) if pairs else None)
        rows.append(row)
    return rows


def _drawn(count: int, seed: str) -> list[int]:
    if count <= PAIRED:
        return list(range(count))
    return sorted(random.Random(seed).sample(range(count), PAIRED))


def sampled(topics: Mapping[str, str], count: int | None, seed: str) -> list[str]:
    """Draw queries, which stay in their order.

    Args:
        topics: Their texts by their ids.
        count: How many, at most; ``None`` for all.
        seed: Of the draw.
    """
    texts = list(topics.values())
    if count is None or count >= len(texts):
        return texts
    return [texts[place] for place in sorted(random.Random(seed).sample(range(len(texts)), count))]


def _rounded(number: Tensor) -> float:
    return round(float(number), 6) + 0.0
