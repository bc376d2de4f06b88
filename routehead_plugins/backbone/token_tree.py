"""Several continuations of one text as a single sequence: a tree of tokens.

The LLM runs the tokens that tails share once, and all tails in one pass over the documents' keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenTree:
    """Tokens of all tails; shared prefixes occur once.

    Attributes:
        ids: Token ids, parents before their children, shape (tokens,).
        depths: Number of tokens before each token on its path, shape (tokens,).
        sees: Mask of the path of each token, the token included, shape (tokens, tokens).
        weights: Weights that average over the tokens of each tail, shape (tails, tokens).
    """

    ids: Tensor
    depths: Tensor
    sees: Tensor
    weights: Tensor


def token_tree(tails: Sequence[Sequence[int]]) -> TokenTree:
    """Merge tails, none of them empty, where they share a prefix."""
    nodes: dict[tuple[int, int], int] = {}  # (parent, token id) -> index
    paths = []
    for tail in tails:
        parent, path = -1, []
        for token in tail:
            parent = nodes.setdefault((parent, token), len(nodes))
            path.append(parent)
        paths.append(path)
    sees = torch.eye(len(nodes), dtype=torch.bool)
    for index, (parent, _) in enumerate(nodes):
        if parent >= 0:
            sees[index] |= sees[parent]
    weights = torch.zeros(len(tails), len(nodes), dtype=torch.float32)
    for row, path in enumerate(paths):
        weights[row, path] = 1 / len(path)
    return TokenTree(
        ids=torch.tensor([token for _, token in nodes]),
        depths=sees.sum(dim=1) - 1,
        sees=sees,
        weights=weights,
    )
