"""Group sequences into batches with little padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Group sequences of similar length, the longest first.

    Args:
        lengths: Number of tokens of each sequence.
        max_tokens: Maximum number of tokens of a batch, padding included; a longer sequence is a
            batch of its own.

    Yields:
        Indices of the sequences of a batch.
    """
    rest = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while rest:
        size = max(1, max_tokens // max(1, lengths[rest[0]]))
        yield rest[:size]
        rest = rest[size:]
