"""Scores of kept signals: the same as those of the re-ranker that runs the LLM."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from tables import query_signals, signal_set, table
from torch import Tensor

from routehead_plugins import Document, FrozenLM, HeadRoutedAttentionReranker, HeadSet, Recipe
from routehead_plugins.errors import HeadError
from routehead_plugins.io import Collection
from routehead_plugins.layouts import get_layout
from routehead_plugins.selection import FixedHeads, HeadRouter, QuerySpace, Selector
from routehead_plugins.signals import CollectOptions, QuerySignals, SignalSet, collect_signals, ndcg
from routehead_plugins.training.offline import (
    each_ndcg,
    offline_scores,
    routed_scores,
    with_first_stage,
)

LAYOUTS = ("sequential", "parallel")
HEADS = HeadSet.parse("2-1,0-3,1-0,2-0")
WEIGHTS = (0.5, -2.0, 0.1, 1.0)
CUT = 20
TEXTS = {
    "d0": "a wolf ran over the hill in the rain",
    "d1": "rain",
    "d2": " ",
    "d3": "seven grey stones by a river, one of them wet",
    "d4": "snow on the hill",
}
COLLECTION = Collection(
    "tiny",
    Path("tiny"),
    {key: Document(text, key) for key, text in TEXTS.items()},
    {"q0": "which wolf ran?", "q1": "where does it rain"},
    {"q0": {"d0": 1}, "q1": {"d1": 2, "d0": 1}},
    {
        "q0": {"d3": 9.0, "d2": 7.5, "d0": 4.0, "d1": 3.5, "d4": 3.0},
        "q1": {"d0": 2.0, "d1": 1.5, "d4": 0.5},
    },
)


@pytest.fixture(scope="module")
def llm() -> FrozenLM:
    return FrozenLM(families.tiny_model("llama"), families.tiny_tokenizer(), name="tiny")


@pytest.fixture(scope="module")
def collected(llm: FrozenLM, tmp_path_factory: pytest.TempPathFactory) -> dict[str, SignalSet]:
    folder = tmp_path_factory.mktemp("signals")
    options = CollectOptions(5, CUT)
    return {
        name: collect_signals(COLLECTION, llm, get_layout(name), folder, options)
        for name in LAYOUTS
    }


def reranked(llm: FrozenLM, selector: Selector, layout: str, query: QuerySignals) -> Tensor:
    """What the re-ranker says of a query's candidates, without the blank ones."""
    reranker = HeadRoutedAttentionReranker(llm, selector, layout=layout, max_doc_tokens=CUT)
    documents = COLLECTION.candidates(query.query_id, 5)
    scores = reranker.score(query.query, documents)
    shown = zip(documents, scores, strict=True)
    return torch.tensor([score for document, score in shown if not document.is_blank])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("first_stage_weight", [None, 0.0, 0.7])
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(weights=WEIGHTS),
        Recipe(weights=WEIGHTS, aggregation="standardised"),
        Recipe(weights=WEIGHTS, aggregation="log"),
        Recipe(aggregation="mean"),
        Recipe(aggregation="standardised"),
        Recipe(aggregation="log"),
    ],
    ids=lambda recipe: f"{recipe.aggregation}-{'weighted' if recipe.weights else 'equal'}",
)
def test_scores_are_those_of_the_reranker(
    llm: FrozenLM,
    collected: dict[str, SignalSet],
    layout: str,
    recipe: Recipe,
    first_stage_weight: float | None,
) -> None:
    recipe = replace(recipe, first_stage_weight=first_stage_weight)
    heads = replace(HEADS, recipe=recipe)
    assert [len(query.gains) for query in collected[layout].queries] == [4, 3]
    for query in collected[layout].queries:
        scores = offline_scores(query, heads, llm.heads)
        expected = reranked(llm, FixedHeads(heads), layout, query)
        # Without standardising, scores are small shares of attention.
        span = float(expected.max() - expected.min())
        torch.testing.assert_close(scores, expected, atol=1e-4 * span, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "settings",
    [{"reading": "weights", "threshold": 1.0}, {"reading": "gates", "max_heads": 2}],
    ids=["weights", "gates"],
)
def test_routed_scores_are_those_of_the_reranker(
    llm: FrozenLM,
    collected: dict[str, SignalSet],
    layout: str,
    settings: dict[str, Any],
) -> None:
    signals = collected[layout]
    embeddings = llm.embed([query.query for query in signals.queries], layer=2)
    draw = torch.Generator().manual_seed(0)
    router = HeadRouter(
        heads=replace(
            HEADS, layout=layout, recipe=Recipe(aggregation="log", first_stage_weight=0.3)
        ),
        space=QuerySpace.fit(embeddings, 2),
        bias=torch.tensor([0.9, -0.5, 0.0, 0.2]),
        projection=torch.tensor([[1.0]]),
        embeddings=torch.randn(4, 1, generator=draw),
        **settings,
    )
    routed = routed_scores(router, signals.queries, embeddings, llm.heads)
    chosen = [router.select(query.query, llm) for query in signals.queries]
    assert [len(heads) for heads in chosen] == [2, 1]
    assert chosen[0] != chosen[1]
    for scores, query in zip(routed, signals.queries, strict=True):
        torch.testing.assert_close(scores, reranked(llm, router, layout, query), atol=1e-4, rtol=0)


def test_heads_that_signals_say_nothing_of_are_refused(
    llm: FrozenLM, collected: dict[str, SignalSet]
) -> None:
    query = collected["parallel"].queries[0]
    for weights in (None, (1.0, 2.0)):
        recipe = Recipe(weights=weights, aggregation="log")
        with pytest.raises(HeadError) as error:
            offline_scores(query, replace(HeadSet.parse("9-0,0-1"), recipe=recipe), llm.heads)
        assert str(error.value) == (
            "there are no signals of head 9-0; compute them for these heads."
        )


def test_heads_that_are_averaged_token_by_token_are_refused(
    llm: FrozenLM, collected: dict[str, SignalSet]
) -> None:
    with pytest.raises(HeadError) as error:
        offline_scores(collected["parallel"].queries[0], HeadSet.parse("0-1,1-1"), llm.heads)
    assert str(error.value) == (
        "heads 0-1,1-1 have no aggregation, so signals cannot be combined into scores; give one, "
        'such as "mean".'
    )


def test_signals_of_other_heads_than_those_available_are_refused(
    llm: FrozenLM, collected: dict[str, SignalSet]
) -> None:
    query = collected["parallel"].queries[0]
    for recipe in (Recipe(aggregation="mean"), Recipe(weights=WEIGHTS)):
        heads = replace(HEADS, recipe=recipe)
        with pytest.raises(HeadError) as error:
            offline_scores(query, heads, heads)
        assert str(error.value) == (
            f"the signals of query 'q0' have {len(llm.heads)} heads, but 4 are given as available; "
            "give the heads of the signals."
        )


def test_figures_are_those_of_each_query_alone() -> None:
    queries = signal_set(queries=4, grades=2).queries
    scores = [query.calibrated[0] for query in queries]
    values = each_ndcg(scores, queries)
    expected = [
        float(ndcg(row[None], query.gains, query.ideal_gains))
        for row, query in zip(scores, queries, strict=True)
    ]
    assert values.tolist() == expected
    assert len(set(expected)) == 4
    assert values.dtype == torch.float64
    assert each_ndcg([], []).shape == (0,)


@pytest.mark.parametrize(("signal", "weight"), [([0.4, 0.3, 0.2, 0.1], 2.0), ([1, 2, 3, 4], 0.25)])
def test_the_weight_of_the_first_stage_is_the_first_that_ranks_best(
    signal: list[float], weight: float
) -> None:
    # The first stage is right. Where the head is wrong, more of it is better.
    query = query_signals([signal], [0, 0, 0, 1])
    query = replace(query, first_stage=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    signals = table([query, replace(query, query_id="other")])
    heads = HeadSet(list(signals.heads), layout="late", recipe=Recipe(aggregation="mean"))
    fused = with_first_stage(signals, heads)
    assert fused.recipe == Recipe(aggregation="mean", first_stage_weight=weight)
    assert (fused.heads, fused.layout) == (heads.heads, "late")
