"""Pools: near queries share documents, which the teacher scores for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from planted import config, tiny
from torch import Tensor

from routehead_plugins.alignment import AlignmentExample, align, pooled
from routehead_plugins.errors import InputError
from routehead_plugins.signals import EncoderTeacher

THINGS = ["wolf", "rain", "hill", "stone"]


def embed(text: str) -> Tensor:
    """One dimension per thing, how often the text names it."""
    return torch.tensor([float(text.count(thing)) for thing in THINGS]) + 0.01


def teacher() -> EncoderTeacher:
    def embed_all(texts: Sequence[str]) -> Tensor:
        return torch.stack([embed(text) for text in texts])

    return EncoderTeacher("counts", embed_all, embed_all)


def example(thing: str, number: int, *, grades: bool = False) -> AlignmentExample:
    other = THINGS[(THINGS.index(thing) + 1) % len(THINGS)]
    documents = [f"{thing} {thing} {number}", f"{other} {number}", f"{thing} {other} {number}"]
    return AlignmentExample(
        f"{thing} {number}", documents, [2, 0, 1] if grades else None, [1, 0, 0]
    )


def examples(*, grades: bool = False) -> list[AlignmentExample]:
    return [example(thing, number, grades=grades) for number in range(3) for thing in THINGS]


def pools_of(made: Sequence[AlignmentExample]) -> list[list[AlignmentExample]]:
    pools: dict[tuple[str, ...], list[AlignmentExample]] = {}
    for one in made:
        pools.setdefault(tuple(one.documents), []).append(one)
    return list(pools.values())


def test_near_queries_share_their_documents() -> None:
    pools = pools_of(pooled(examples(), teacher(), queries=3, documents=6))
    assert [len(pool) for pool in pools] == [3, 3, 3, 3]
    for pool in pools:
        assert len({one.query.split()[0] for one in pool}) == 1
        assert len(pool[0].documents) == 6


def test_every_query_is_kept_once() -> None:
    made = pooled(examples(), teacher(), queries=5, documents=4)
    assert sorted(one.query for one in made) == sorted(one.query for one in examples())
    assert [len(pool) for pool in pools_of(made)] == [5, 5, 2]


def test_scores_are_those_of_the_teacher_for_every_pair() -> None:
    for one in pooled(examples(), teacher(), queries=4, documents=8):
        expected = [float(embed(one.query) @ embed(text)) for text in one.documents]
        assert one.teacher == pytest.approx(expected)


def test_documents_are_candidates_half_of_them_of_one_query() -> None:
    given = examples()
    for pool in pools_of(pooled(given, teacher(), queries=3, documents=4)):
        own = [one for one in given if one.query in {member.query for member in pool}]
        counts = [len(set(pool[0].documents) & set(one.documents)) for one in own]
        assert sum(counts) == 4
        assert max(counts) >= 2


def test_documents_of_other_queries_have_grade_0() -> None:
    given = {one.query: one for one in examples(grades=True)}
    made = pooled(list(given.values()), teacher(), queries=3, documents=6)
    for one in made:
        assert one.grades is not None
        own = dict(zip(given[one.query].documents, [2.0, 0.0, 1.0], strict=True))
        assert list(one.grades) == [own.get(text, 0.0) for text in one.documents]
    # The best document of every query comes before others.
    assert all(2.0 in (one.grades or ()) for one in made)


def test_the_seed_decides() -> None:
    one, same, other = (pooled(examples(), teacher(), queries=3, seed=seed) for seed in (0, 0, 1))
    assert one == same
    assert one != other


def test_no_examples_make_no_pools() -> None:
    assert pooled([], teacher()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": 0}, "queries=0 is not a count"),
        ({"documents": 1}, "documents=1 leaves nothing to rank in a pool; give 2 or more"),
    ],
)
def test_pools_of_nothing_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pooled(examples(), teacher(), **options)


def test_training_learns_from_pools_and_keeps_all_their_documents() -> None:
    made = pooled(examples(), teacher(), queries=3, documents=6)
    settings = config(batch_queries=3, epochs=12, candidates=2, held_out=0.0, temperature=0.5)
    result = align(tiny(), made, settings, held_out=examples())
    looks = [record["held_out"]["loss"] for record in result.history if "held_out" in record]
    assert min(looks) < 0.9 * looks[0]
    # Four pools of three queries each: one pool per step.
    assert sum("losses" in record for record in result.history) == 4 * 12
