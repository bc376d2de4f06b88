"""Pools: queries that are near each other, all of them ranked against the same documents.

In the late layout a document is read without a query. Its keys then serve any number of queries,
whose tails are short: a pool of 24 queries and 20 documents takes little more time than one query
with 20 documents, and teaches 480 scores in place of 20. A bi-encoder scores them all for the price
of their embeddings.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from routehead_plugins.alignment.examples import AlignmentExample
from routehead_plugins.data import check_count
from routehead_plugins.errors import InputError
from routehead_plugins.signals import EncoderTeacher


def pooled(
    examples: Sequence[AlignmentExample],
    teacher: EncoderTeacher,
    *,
    queries: int = 24,
    documents: int = 20,
    seed: int = 0,
) -> list[AlignmentExample]:
    """Gather examples into pools.

    A pool is a random query with those nearest to it that are in no pool yet. Half of its documents
    are candidates of the first query, the others are candidates of the other queries in turn.

    Args:
        examples: Queries with candidates.
        teacher: Scores the documents of a pool for all of its queries.
        queries: Queries per pool; the last pool has fewer.
        documents: Documents per pool, at most.
        seed: Random seed.

    Returns:
        The same queries, pool after pool; those of a pool have the same documents. Documents that
        are no candidates of a query have grade 0 for it, as unjudged documents have in qrels.

    Raises:
        InputError: There are fewer than 1 query or 2 documents per pool.
    """
    check_count("queries", queries)
    if check_count("documents", documents) < 2:
        raise InputError("documents=1 leaves nothing to rank in a pool; give 2 or more.")
    if not examples:
        return []
    chance = random.Random(f"pools {seed}")
    vectors = teacher.query_vectors([example.query for example in examples])
    made: list[AlignmentExample] = []
    for members in _groups(normalize(vectors, dim=-1), queries, chance):
        own = [examples[index] for index in members]
        texts = _documents(own, documents, chance)
        scores = teacher.scores(vectors[members], texts)
        made += [
            AlignmentExample(example.query, texts, _grades(example, texts), row)
            for example, row in zip(own, scores.tolist(), strict=True)
        ]
    return made


def _groups(vectors: Tensor, size: int, chance: random.Random) -> list[list[int]]:
    """Divide rows into groups of near ones."""
    order = list(range(len(vectors)))
    chance.shuffle(order)
    free = torch.ones(len(vectors), dtype=torch.bool)
    groups = []
    for first in order:
        if not free[first]:
            continue
        nearness = (vectors @ vectors[first]).masked_fill(~free, -torch.inf)
        nearness[first] = torch.inf
        members = nearness.topk(min(size, int(free.sum()))).indices.tolist()
        free[members] = False
        groups.append(members)
    return groups


def _documents(
    examples: Sequence[AlignmentExample], count: int, chance: random.Random
) -> list[str]:
    """Draw the documents of a pool; the best graded ones of its queries come before others."""
    shuffled = [_shuffled(example, chance) for example in examples]
    first, others = shuffled[0], shuffled[1:]
    chosen = dict.fromkeys(first[: max(1, count // 2)])
    longest = max(map(len, shuffled))
    for rank in range(longest):
        for texts in others:
            if rank < len(texts) and len(chosen) < count:
                chosen[texts[rank]] = None
    for text in first:
        if len(chosen) < count:
            chosen[text] = None
    return list(chosen)


def _shuffled(example: AlignmentExample, chance: random.Random) -> list[str]:
    """Shuffle an example's documents; the best graded one comes first."""
    texts = list(dict.fromkeys(example.documents))
    chance.shuffle(texts)
    if example.grades is not None:
        grades = dict(zip(example.documents, example.grades, strict=True))
        texts.sort(key=lambda text: grades[text] < max(grades.values()))
    return texts


def _grades(example: AlignmentExample, texts: Sequence[str]) -> list[float] | None:
    if example.grades is None:
        return None
    grades = dict(zip(example.documents, example.grades, strict=True))
    return [grades.get(text, 0.0) for text in texts]
