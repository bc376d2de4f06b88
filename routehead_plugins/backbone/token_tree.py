"""Several continuations of one text as a single sequence: a tree of tokens.

Tails begin alike (the instruction) and part at the query. Run as a tree, the common tokens are run
once and all tails share one pass over the documents' keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenTree:
    """Tokens of all tails, every common beginning once.

    Attributes:
        ids: Token ids, parents before their children, shape (tokens,).
        depths: How many tokens stand before each one on its path, shape (tokens,).
        sees: The path of every token, itself included, shape (tokens, tokens).
        weights: For the mean over the tokens of each tail, shape (tails, tokens).
    """

    ids: Tensor
    depths: Tensor
    sees: Tensor
    weights: Tensor


def token_tree(tails: Sequence[Sequence[int]]) -> TokenTree:
    """Merge tails where they begin alike.

    Args:
        tails: Token ids of each tail, none of them empty.
    """
    places: dict[tuple[int, int], int] = {}  # (parent, token id) -> place
    parents: list[int] = []
    paths: list[list[int]] = []
    for tail in tails:
        parent, path = -1, []
        for token in tail:
            place = places.setdefault((parent, token), len(parents))
            if place == len(parents):
                parents.append(parent)
            path.append(place)
            parent = place
        paths.append(path)
    weights = torch.zeros(len(tails), len(parents))
    sees = torch.eye(len(parents), dtype=torch.bool)
    for tail_number, path in enumerate(paths):
        weights[tail_number, path] = 1 / len(path)
        sees[path, : path[-1] + 1] |= _before(path)
    return TokenTree(
        ids=torch.tensor([token for _, token in places]),
        depths=sees.sum(dim=1) - 1,
        sees=sees,
        weights=weights,
    )


def _before(path: Sequence[int]) -> Tensor:
    """For each token of a path, which places of the tree come before it on the path."""
    before = torch.zeros(len(path), path[-1] + 1, dtype=torch.bool)
    before[:, list(path)] = torch.ones(len(path), len(path)).tril().bool()
    return before
