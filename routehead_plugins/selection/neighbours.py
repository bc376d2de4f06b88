"""A router without training: similar training queries vote with their labels, through FAISS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from routehead_plugins.data import check_count
from routehead_plugins.errors import missing_extra
from routehead_plugins.selection.router import Router


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class NeighbourRouter(Router):
    """Router by the labels of the nearest training queries.

    ``c_h(x)`` is the mean label of the nearest anchors, minus ``b_h``.

    Attributes:
        labels: Best logits for each anchor of the space, shape (anchors, heads).
        neighbours: Number of nearest anchors to average.

    Raises:
        InputError: A setting is out of range, or the shapes of the tensors do not match.
        MissingExtraError: FAISS is not installed.
    """

    labels: Tensor
    neighbours: int = 16

    kind = "neighbours"
    tensors: ClassVar = {"labels": "anchors heads"}
    settings = ("neighbours",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("neighbours", self.neighbours)
        try:
            import faiss  # an extra that no other router needs
        except ImportError as error:
            raise missing_extra(error, "faiss") from error
        anchors = self.space.projected_anchors
        index = faiss.IndexFlatIP(anchors.shape[1])
        index.add(anchors.numpy())
        object.__setattr__(self, "_index", index)

    def correction(self, queries: Tensor) -> Tensor:
        """Average the labels of the nearest anchors; see ``Router.correction``."""
        index: Any = object.__getattribute__(self, "_index")
        count = min(self.neighbours, len(self.labels))
        _, nearest = index.search(queries.contiguous().numpy(), count)
        return self.labels[torch.from_numpy(nearest)].mean(dim=1) - self.bias
