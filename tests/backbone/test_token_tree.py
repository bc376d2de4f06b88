"""Tails as one tree: the tails are its paths, and a token sees its own path only."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from routehead_plugins.backbone.token_tree import token_tree

tails = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=4)


def test_a_shared_prefix_occurs_once() -> None:
    tree = token_tree([[7, 8, 9], [7, 5]])
    assert tree.ids.tolist() == [7, 8, 9, 5]
    assert tree.depths.tolist() == [0, 1, 2, 1]
    assert tree.sees.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]
    torch.testing.assert_close(
        tree.weights, torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0], [1 / 2, 0, 0, 1 / 2]])
    )


def test_the_same_token_after_different_ones_occurs_twice() -> None:
    assert token_tree([[1, 2], [3, 2]]).ids.tolist() == [1, 2, 3, 2]


@given(tails)
def test_every_token_sees_its_own_path_and_nothing_else(given_tails: list[list[int]]) -> None:
    tree = token_tree(given_tails)
    for tail, weights in zip(given_tails, tree.weights, strict=True):
        path = weights.nonzero().flatten().tolist()
        assert tree.ids[path].tolist() == tail
        assert tree.depths[path].tolist() == list(range(len(tail)))
        for position, row in enumerate(path):
            assert tree.sees[row].nonzero().flatten().tolist() == path[: position + 1]
    distinct = {tuple(tail[:end]) for tail in given_tails for end in range(1, len(tail) + 1)}
    assert len(tree.ids) == len(distinct)
