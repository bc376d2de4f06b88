"""Sequences in batches that are padded little."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Group sequences of like length, the longest first: the largest batch comes before all others.

    Args:
        lengths: Tokens of each sequence.
        max_tokens: Tokens of a batch, padding included; a longer sequence is a batch of its own.

    Yields:
        Places of the sequences of a batch.
    """
    rest = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    while rest:
        size = max(1, max_tokens // max(1, lengths[rest[0]]))
        yield rest[:size]
        rest = rest[size:]
