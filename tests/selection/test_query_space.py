"""The space in which routers compare queries, against slow arithmetic and by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from routehead_plugins.errors import InputError
from routehead_plugins.selection.query_space import QuerySpace, mean_nearest

SEEDS = st.integers(0, 2**16)


def embeddings_of(count: int, width: int = 12, seed: int = 0) -> Tensor:
    """Coordinates that depend on each other, of very different sizes, one of which never varies."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, width, generator=generator) @ torch.randn(
        width, width, generator=generator
    )
    mixed[:, 3] = 7.0
    return mixed * torch.logspace(0, 2, width) + 5.0


def by_hand(anchors: Tensor, familiar: tuple[float, float], **changed: Any) -> QuerySpace:
    """A space for embeddings that are already standardised."""
    width = anchors.shape[1]
    given: dict[str, Any] = {
        "mean": torch.zeros(width),
        "deviation": torch.ones(width),
        "basis": torch.eye(width),
    }
    return QuerySpace(layer=1, anchors=anchors, familiar=familiar, **given | changed)


def slow_similarities(embeddings: Tensor, coordinates: int) -> Tensor:
    """Cosines after whitening by the eigenvectors of the correlation matrix."""
    varied = embeddings.double()[:, embeddings.std(dim=0) > 0]
    standard = (varied - varied.mean(dim=0)) / varied.std(dim=0, unbiased=False)
    values, vectors = torch.linalg.eigh(standard.T @ standard / len(standard))
    largest = values.argsort(descending=True)[:coordinates]
    projected = standard @ vectors[:, largest] / values[largest].sqrt()
    projected = projected / projected.norm(dim=1, keepdim=True)
    similarities: Tensor = projected @ projected.T
    return similarities.float()


def slow_standard(embeddings: Tensor, trained: Tensor) -> list[list[float]]:
    """Embeddings standardised by the mean and deviation of others, column by column."""
    columns = []
    for column, known in zip(embeddings.T.tolist(), trained.T.tolist(), strict=True):
        middle = sum(known) / len(known)
        deviation = math.sqrt(sum((number - middle) ** 2 for number in known) / len(known))
        varies = deviation > 1e-4
        columns.append([(n - middle) / deviation if varies else 0.0 for n in column])
    return [list(row) for row in zip(*columns, strict=True)]


def slow_distance(query: list[float], anchors: list[list[float]]) -> float:
    """Mean distance to the five nearest, or to all where there are fewer."""
    few = sorted(math.dist(query, anchor) for anchor in anchors)[:5]
    return sum(few) / len(few)


def slow_edges(anchors: list[list[float]]) -> tuple[float, float]:
    """Quantiles of how far each anchor is from the other ones."""
    away = sorted(
        slow_distance(query, anchors[:index] + anchors[index + 1 :])
        for index, query in enumerate(anchors)
    )

    def quantile(share: float) -> float:
        rank = share * (len(away) - 1)
        low, high = away[math.floor(rank)], away[math.ceil(rank)]
        return low + (high - low) * (rank - math.floor(rank))

    near = quantile(0.5)
    return near, max(quantile(0.95), near + 1e-3)


def slow_share(away: float, near: float, far: float) -> float:
    return min(1.0, max(0.0, (far - away) / (far - near)))


@pytest.mark.parametrize("coordinates", [2, 5, 64])
def test_similarities_are_cosines_of_whitened_principal_components(coordinates: int) -> None:
    embeddings = embeddings_of(30)
    queries = QuerySpace.fit(embeddings, 2, coordinates=coordinates)(embeddings)
    expected = slow_similarities(embeddings, coordinates)
    torch.testing.assert_close(queries @ queries.T, expected, atol=1e-4, rtol=0)


def test_queries_have_length_one_and_kept_coordinates_deviation_one() -> None:
    embeddings = embeddings_of(50)
    space = QuerySpace.fit(embeddings, 2, coordinates=4)
    torch.testing.assert_close(space(embeddings).norm(dim=1), torch.ones(50))
    raw = (embeddings - space.mean) / space.deviation @ space.basis
    torch.testing.assert_close(raw.T @ raw / 50, torch.eye(4), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("count", "asked", "kept"),
    [
        (40, 64, 11),  # one of twelve coordinates never varies
        (4, 64, 3),  # four points span three dimensions
        (40, 3, 3),
        (2, 64, 1),
    ],
)
def test_no_more_coordinates_are_kept_than_vary(count: int, asked: int, kept: int) -> None:
    space = QuerySpace.fit(embeddings_of(count), 2, coordinates=asked)
    assert space.basis.shape == (12, kept)
    assert bool(space.basis.isfinite().all())
    assert space.anchors.shape == (count, 12)
    assert space.projected_anchors.shape == (count, kept)
    assert (space.layer, space.mean.shape, space.deviation.shape) == (2, (12,), (12,))


def test_coordinates_that_do_not_vary_are_left_out() -> None:
    embeddings = embeddings_of(20)
    space = QuerySpace.fit(embeddings, 2)
    assert space.deviation.isinf().nonzero().tolist() == [[3]]
    moved = embeddings.clone()
    moved[:, 3] = 1000.0
    assert torch.equal(space(moved), space(embeddings))
    assert torch.equal(space.familiarity(moved), space.familiarity(embeddings))


@given(SEEDS, st.floats(-50, 50), st.floats(0.01, 100))
@settings(max_examples=25, deadline=None)
def test_the_scale_and_the_middle_of_coordinates_do_not_matter(
    seed: int, shift: float, scale: float
) -> None:
    embeddings = embeddings_of(20, seed=seed)
    moved = embeddings.clone()
    moved[:, 5] = embeddings[:, 5] * scale + shift
    one, other = (QuerySpace.fit(e, 2, coordinates=4) for e in (embeddings, moved))
    queries, others = one(embeddings), other(moved)
    torch.testing.assert_close(queries @ queries.T, others @ others.T, atol=2e-3, rtol=0)
    assert one.familiar == pytest.approx(other.familiar, abs=1e-2)


def test_the_mean_of_training_queries_is_projected_to_zero() -> None:
    space = QuerySpace.fit(embeddings_of(20), 2)
    assert torch.equal(space(space.mean[None]), torch.zeros(1, space.basis.shape[1]))


@pytest.mark.parametrize(
    ("count", "asked", "indices"),
    [(10, 4, [0, 3, 6, 9]), (5, 5, [0, 1, 2, 3, 4]), (3, 9, [0, 1, 2]), (7, 2, [0, 6])],
)
def test_anchors_are_spaced_evenly(count: int, asked: int, indices: list[int]) -> None:
    embeddings = embeddings_of(count)
    space = QuerySpace.fit(embeddings, 2, anchors=asked)
    standard = (embeddings - space.mean) / space.deviation
    assert torch.equal(space.anchors, standard[indices].half().float())


def test_512_anchors_are_kept_by_default() -> None:
    embeddings = embeddings_of(600)
    assert len(QuerySpace.fit(embeddings, 2).anchors) == 512
    assert len(QuerySpace.fit(embeddings, 2, anchors=600).anchors) == 600


def test_anchors_are_projected_like_their_queries() -> None:
    embeddings = embeddings_of(30)
    space = QuerySpace.fit(embeddings, 2, coordinates=4)
    # But for the rounding of anchors.
    torch.testing.assert_close(space.projected_anchors, space(embeddings), atol=5e-3, rtol=0)
    assert space.projected_anchors is space.projected_anchors


@pytest.mark.parametrize(
    ("count", "anchors"),
    [
        (2, 2),
        (3, 3),  # fewer others than neighbours are looked for
        (6, 6),
        (60, 60),
        (60, 20),
    ],
)
def test_the_scale_of_familiarity_is_the_anchors_own(count: int, anchors: int) -> None:
    embeddings = embeddings_of(count)
    space = QuerySpace.fit(embeddings, 2, coordinates=4, anchors=anchors)
    indices = torch.linspace(0, count - 1, anchors).round().long()
    expected = slow_edges(slow_standard(embeddings[indices], embeddings))
    assert space.familiar == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize(("count", "anchors"), [(3, 3), (40, 40), (40, 15)])
def test_familiarity_is_that_of_a_slow_search(count: int, anchors: int) -> None:
    embeddings = embeddings_of(count)
    space = QuerySpace.fit(embeddings, 2, coordinates=2, anchors=anchors)
    indices = torch.linspace(0, count - 1, anchors).round().long()
    known = slow_standard(embeddings[indices], embeddings)
    middle = embeddings.mean(dim=0)
    factors = torch.tensor([0.0, 0.5, 1.0, 1.3, 2.0]).repeat(8)[:, None]
    others = middle + factors * (embeddings_of(40, seed=1) - middle)
    near, far = slow_edges(known)
    expected = [
        slow_share(slow_distance(query, known), near, far)
        for query in slow_standard(others, embeddings)
    ]
    # Anchors are rounded, to which a step is sensitive.
    assert space.familiarity(others).tolist() == pytest.approx(expected, abs=1e-2)
    assert {0.0, 1.0} < set(expected)


def test_anchors_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = QuerySpace.fit(embeddings_of(50), 2, anchors=20)
    monkeypatch.setattr("routehead_plugins.selection.query_space._ROWS", 7)
    assert QuerySpace.fit(embeddings_of(50), 2, anchors=20).familiar == whole.familiar


def test_one_anchor_in_twenty_is_strange_and_half_are_familiar() -> None:
    embeddings = embeddings_of(200)
    space = QuerySpace.fit(embeddings, 2, coordinates=4)
    # Each query is compared by a space without its own anchor.
    rest = [torch.arange(200) != index for index in range(200)]
    shares = [
        float(replace(space, anchors=space.anchors[rest[n]]).familiarity(embeddings[n : n + 1]))
        for n in range(200)
    ]
    assert sum(share == 0 for share in shares) == 10
    assert sum(share == 1 for share in shares) == 100


@pytest.mark.parametrize("seed", range(3))
def test_queries_of_another_cloud_are_strange_however_alike_in_the_coordinates(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(6, 48, generator=generator)
    here, there = (20 * torch.randn(48, generator=generator) for _ in range(2))
    own = here + torch.randn(400, 6, generator=generator) @ spread
    foreign = there + torch.randn(60, 6, generator=generator) @ spread
    space = QuerySpace.fit(own[::2], 2, coordinates=4)
    assert space.familiarity(foreign).tolist() == [0.0] * 60
    assert float((space.familiarity(own[1::2]) > 0.5).float().mean()) > 0.5
    # In the coordinates alone nothing would be far away.
    torch.testing.assert_close(space(foreign).norm(dim=1), torch.ones(60))


def test_familiarity_falls_linearly_between_two_distances() -> None:
    space = by_hand(torch.tensor([[1.0, 0.0]]), (1.0, 3.0))
    away = torch.tensor([0.0, 1.0, 1.5, 2.5, 3.0, 9.0])
    queries = torch.stack([torch.ones(6), away], dim=1)
    assert space.familiarity(queries).tolist() == [1.0, 1.0, 0.75, 0.25, 0.0, 0.0]


def test_embeddings_are_standardised_before_they_are_compared() -> None:
    space = by_hand(
        torch.tensor([[1.0, 0.0, 0.0]]),
        (0.0, 4.0),
        mean=torch.tensor([3.0, -1.0, 5.0]),
        deviation=torch.tensor([2.0, 0.5, math.inf]),
    )
    queries = torch.tensor([[5.0, -1.0, 5.0], [5.0, 0.0, 5.0], [7.0, -1.0, 99.0]])
    assert space.familiarity(queries).tolist() == [1.0, 0.5, 0.75]
    torch.testing.assert_close(space(queries[2:]), torch.tensor([[1.0, 0.0, 0.0]]))


def test_the_five_nearest_anchors_are_asked() -> None:
    distances = torch.tensor([[9.1, 0.9, 9.0, 0.5, 0.4, 0.6, 0.5]])
    torch.testing.assert_close(mean_nearest(distances), torch.tensor([2.9 / 5]))
    torch.testing.assert_close(mean_nearest(distances, 2), torch.tensor([0.45]))
    torch.testing.assert_close(mean_nearest(distances[:, :2]), torch.tensor([5.0]))


@given(SEEDS, st.integers(1, 9), st.floats(0, 4), st.floats(0.01, 4))
@settings(deadline=None)
def test_familiarity_lies_between_0_and_1_and_never_rises_as_queries_go_away(
    seed: int, anchors: int, near: float, more: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    anchors_drawn = torch.randn(anchors, 3, generator=generator)
    queries = 2 * torch.randn(20, 3, generator=generator)
    familiarity = by_hand(anchors_drawn, (near, near + more)).familiarity(queries)
    assert float(familiarity.min()) >= 0
    assert float(familiarity.max()) <= 1
    order = mean_nearest(torch.cdist(queries, anchors_drawn)).argsort()
    assert bool((familiarity[order].diff() <= 1e-4).all())


def test_a_query_is_as_familiar_alone_as_among_others() -> None:
    space = QuerySpace.fit(embeddings_of(50), 2)
    others = embeddings_of(40, seed=1)
    alone = torch.cat([space.familiarity(query[None]) for query in others])
    assert torch.equal(alone, space.familiarity(others))


def test_training_queries_that_come_often_leave_a_scale() -> None:
    embeddings = embeddings_of(4).repeat(10, 1)
    space = QuerySpace.fit(embeddings, 2)
    near, far = space.familiar
    assert 0 <= near < far < 0.1
    assert float(space.familiarity(embeddings).min()) > 0.9  # but for the rounding of anchors
    assert space.familiarity(embeddings_of(4, seed=1)).tolist() == [0.0] * 4


@pytest.mark.parametrize("count", [1, 4])
def test_queries_with_one_embedding_are_refused(count: int) -> None:
    with pytest.raises(InputError) as error:
        QuerySpace.fit(torch.ones(count, 6), 2)
    assert str(error.value) == (
        f"all {count} queries have the same embedding; give two or more different queries to "
        "train on."
    )


@pytest.mark.parametrize(
    "familiar", [(math.nan, 1.0), (1.0, math.nan), (0.0, math.inf), (1.0, 1.0), (2.0, 1.0), (-1, 1)]
)
def test_distances_that_do_not_increase_are_refused(familiar: tuple[float, float]) -> None:
    with pytest.raises(InputError) as error:
        by_hand(torch.eye(2), familiar)
    assert str(error.value) == (
        f"familiar={familiar!r} must be two increasing distances; give finite numbers, 0 or more, "
        "the smaller one first."
    )


@pytest.mark.parametrize("deviation", [0.0, -1.0, math.nan])
def test_a_deviation_that_is_not_positive_is_refused(deviation: float) -> None:
    with pytest.raises(InputError) as error:
        by_hand(torch.eye(2), (0.0, 1.0), deviation=torch.tensor([1.0, deviation]))
    assert str(error.value) == (
        "a deviation is not above 0; give infinity for coordinates that do not vary."
    )


def test_spaces_can_be_compared() -> None:
    space = by_hand(torch.eye(2), (0.0, 1.0))
    assert space in [space]
    assert space != by_hand(torch.eye(2), (0.0, 1.0))
