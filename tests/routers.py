"""Small routers, with numbers that are random or written out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from routehead_plugins import HeadSet, Recipe
from routehead_plugins.selection.neighbours import NeighbourRouter
from routehead_plugins.selection.query_space import QuerySpace
from routehead_plugins.selection.router import HeadRouter, Router

HEADS = HeadSet(
    [(0, 1), (2, 3), (1, 0), (2, 0), (0, 3)],
    model="tiny",
    layout="parallel",
    data="some questions",
    method="routed",
    recipe=Recipe(aggregation="log", first_stage_weight=0.5),
)
QUERIES = [f"{what} {which}?" for what in ("where is", "who has", "why") for which in "abcdefgh"]
KINDS = ("heads", "neighbours")
LAYER = 2

Make = Callable[..., Router]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(kind: str, space: QuerySpace, **changed: Any) -> Router:
    """A router of a kind on a space, with numbers drawn at random."""
    heads, anchors, coordinates = len(HEADS), len(space.anchors), space.basis.shape[-1]
    shared: dict[str, Any] = {"heads": HEADS, "space": space, "bias": random(heads, seed=1)}
    if kind == "heads":
        own = {"projection": random(3, coordinates, seed=2), "embeddings": random(heads, 3, seed=3)}
        return HeadRouter(**shared | own | changed)
    labels = {"labels": random(anchors, heads, seed=4), "neighbours": 4}
    return NeighbourRouter(**shared | labels | changed)


def by_hand(
    *, anchors: Tensor | None = None, familiar: tuple[float, float] = (0.5, 2.0)
) -> QuerySpace:
    """A space of three coordinates that only normalises embeddings."""
    anchors = torch.eye(3)[:1] if anchors is None else anchors
    return QuerySpace(LAYER, torch.zeros(3), torch.ones(3), torch.eye(3), anchors, familiar)


def fixed(bias: list[float], **changed: Any) -> Router:
    """A router whose heads are 0-0, 0-1, ... and whose logits are its bias."""
    heads = replace(HEADS, heads=[(0, index) for index in range(len(bias))])
    zeros = {"projection": torch.zeros(1, 3), "embeddings": torch.zeros(len(bias), 1)}
    return HeadRouter(heads=heads, space=by_hand(), bias=torch.tensor(bias), **zeros | changed)
