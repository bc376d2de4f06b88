"""Small sets of signals, random or given as numbers, for tests of training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from routehead_plugins import HeadSet
from routehead_plugins.signals import QuerySignals, SignalSet

PLANTED = ((1, 2), (2, 0))


def query_signals(
    signal: Sequence[Sequence[float]] | Tensor,
    gains: Sequence[float],
    *,
    query_id: str = "q",
    mass: Sequence[Sequence[float]] | Tensor | None = None,
    ideal_gains: Sequence[float] | None = None,
) -> QuerySignals:
    """Build the signals of a query from numbers.

    Args:
        signal: Calibrated signals, shape (heads, documents).
        gains: Shape (documents,).
        query_id: Id of the query, also used in its text.
        mass: Uncalibrated signals; by default the calibrated ones.
        ideal_gains: In any order; by default the candidates' own.
    """
    calibrated = torch.as_tensor(signal, dtype=torch.float32)
    uncalibrated = calibrated if mass is None else torch.as_tensor(mass, dtype=torch.float32)
    documents = len(gains)
    return QuerySignals(
        query_id=query_id,
        query=f"What is {query_id}?",
        docids=tuple(f"{query_id}-d{index}" for index in range(documents)),
        mass=uncalibrated,
        calibrated=calibrated,
        gains=torch.tensor(gains, dtype=torch.float32),
        first_stage=torch.arange(documents, 0, -1, dtype=torch.float32),
        ideal_gains=torch.tensor(
            sorted(gains if ideal_gains is None else ideal_gains, reverse=True),
            dtype=torch.float32,
        ),
    )


def table(
    queries: Sequence[QuerySignals],
    heads: Sequence[tuple[int, int]] | None = None,
    data: Sequence[str] = ("written",),
) -> SignalSet:
    """Build a set of signals from queries.

    Args:
        queries: One or more.
        heads: One per row of the signals; by default heads of layer 0.
        data: Names of the collections.
    """
    rows = len(queries[0].calibrated)
    named = HeadSet(heads or [(0, index) for index in range(rows)])
    return SignalSet(named, "tiny", "sequential", tuple(data), tuple(queries))


def signal_set(
    seed: int = 0,
    *,
    queries: int = 8,
    documents: tuple[int, int] = (8, 12),
    layers: int = 4,
    width: int = 3,
    grades: int = 1,
    planted: Sequence[tuple[int, int]] = PLANTED,
    noise: float = 0.3,
    step: float | None = None,
    data: Sequence[str] = ("random",),
) -> SignalSet:
    """Draw a set in which the planted heads follow relevance and the others are random.

    Mass is positive and adds up to less than 1 over the documents of a query, as attention does.
    Every query has at least one relevant and one other candidate.

    Args:
        seed: Random seed.
        queries: Number of queries.
        documents: Fewest and most candidates of a query, at least 2.
        layers: Number of layers.
        width: Heads per layer; the heads are (0, 0), (0, 1), ...
        grades: Highest judgment; the lowest is 0.
        planted: Heads whose attention grows with the judgment.
        noise: Noise of the planted heads; with 0 they order the candidates perfectly, ties aside.
        step: Round signals to multiples, so that many are equal; a power of 2 keeps sums exact.
        data: Names of the collections.
    """
    generator = torch.Generator().manual_seed(seed)
    heads = [(layer, index) for layer in range(layers) for index in range(width)]
    follows = torch.tensor([head in planted for head in heads])[:, None]

    def draw_query(query_id: str) -> QuerySignals:
        size = int(torch.randint(documents[0], documents[1] + 1, (), generator=generator))
        gains = _gains(size, grades, generator)
        random = torch.randn(2, len(heads), size, generator=generator)
        scale = torch.where(follows, noise, 1.0)
        mass = (scale * random[0] + torch.where(follows, 4 * gains / grades, 0.0)).softmax(dim=-1)
        null = (scale * random[1]).softmax(dim=-1)
        # The share of its attention that a head spends on the documents.
        share = 0.2 + 0.7 * torch.rand(len(heads), 1, generator=generator)
        mass, null = mass * share, null * torch.where(follows, share, 0.5)
        if step is not None:
            mass, null = ((values / step).round() * step for values in (mass, null))
        missed = torch.randint(0, grades + 1, (2,), generator=generator)  # judged, not retrieved
        ideal = [*gains.tolist(), *missed.tolist()]
        return query_signals(
            mass - null, gains.tolist(), query_id=query_id, mass=mass, ideal_gains=ideal
        )

    return table([draw_query(f"q{number}") for number in range(queries)], heads, data)


def _gains(size: int, grades: int, generator: torch.Generator) -> Tensor:
    """Draw judgments, most of them 0, at least one above 0 and one 0."""
    gains = torch.randint(1, grades + 1, (size,), generator=generator)
    gains[torch.rand(size, generator=generator) < 0.7] = 0
    relevant, other = torch.randperm(size, generator=generator)[:2]
    gains[relevant] = torch.randint(1, grades + 1, (), generator=generator)
    gains[other] = 0
    return gains.float()
