"""A router that is not learned: the labels of similar training queries vote, found by FAISS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from routehead_plugins.errors import missing_extra
from routehead_plugins.selection import router_files as files
from routehead_plugins.selection.router import Router


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class NeighbourRouter(Router):
    """The vote of the nearest training queries: nothing is trained but their labels.

    ``c_h(x)`` is the mean label of the nearest anchors, less ``b_h``.

    Attributes:
        labels: What is best for each of the space's anchors, shape (anchors, heads).
        neighbours: How many vote.

    Raises:
        InputError: See ``Router``.
        MissingExtraError: FAISS is not installed.
    """

    labels: Tensor
    neighbours: int = 16

    kind = "neighbours"
    tensors: ClassVar = {"labels": "anchors heads"}
    numbers = ("neighbours",)

    def __post_init__(self) -> None:
        super().__post_init__()
        files.check_count("neighbours", self.neighbours)
        try:
            import faiss  # every other router does without
        except ImportError as error:
            raise missing_extra(error, "faiss") from error
        places = self.space.places
        index = faiss.IndexFlatIP(places.shape[1])
        index.add(places.numpy())
        object.__setattr__(self, "_index", index)

    def correction(self, queries: Tensor) -> Tensor:
        """See ``Router.correction``."""
        index: Any = object.__getattribute__(self, "_index")
        count = min(self.neighbours, len(self.labels))
        _, places = index.search(queries.contiguous().numpy(), count)
        return self.labels[torch.from_numpy(places)].mean(dim=1) - self.bias
