"""Batches: every sequence once, within the bound, padded little."""

from __future__ import annotations

from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from routehead_plugins.backbone.batching import batches


def test_the_longest_come_first_and_equal_ones_in_their_order() -> None:
    assert list(batches([2, 9, 3, 9, 2], 20)) == [[1, 3], [2, 0, 4]]
    assert list(batches([], 20)) == []


@given(st.lists(st.integers(0, 40)), st.integers(1, 60))
def test_every_sequence_is_in_one_batch_within_the_bound(lengths: list[int], bound: int) -> None:
    grouped = list(batches(lengths, bound))
    assert sorted(chain.from_iterable(grouped)) == list(range(len(lengths)))
    for batch in grouped:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= bound
