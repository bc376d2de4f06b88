"""Routers: their logits, and the heads that these become."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import families
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routers import HEADS, KINDS, LAYER, QUERIES, by_hand, fixed, make, random
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from routehead_plugins import FrozenLM, Recipe
from routehead_plugins.errors import (
    HeadError,
    InputError,
    MissingExtraError,
    RouterMismatchError,
)
from routehead_plugins.selection.names import shipped_router
from routehead_plugins.selection.neighbours import NeighbourRouter
from routehead_plugins.selection.query_space import QuerySpace
from routehead_plugins.selection.router import HeadRouter, Router


def dot(one: Tensor, two: Tensor) -> float:
    return sum(float(a) * float(b) for a, b in zip(one, two, strict=True))


def slow_logit(router: Router, embedding: Tensor, head: int) -> float:
    """The formula of the module, head by head, in plain numbers."""
    space = router.space
    standard = ((embedding - space.mean) / space.deviation).tolist()
    few = sorted(math.dist(anchor, standard) for anchor in space.anchors.tolist())[:5]
    near, far = space.familiar
    share = (far - sum(few) / len(few)) / (far - near)
    (query,) = space(embedding[None])
    cosines = [dot(anchor, query) for anchor in space.projected_anchors]
    bias = float(router.bias[head])
    if isinstance(router, HeadRouter):
        routed = torch.tensor([dot(row, query) for row in router.projection])
        correction = dot(routed, router.embeddings[head]) / math.sqrt(len(routed))
    else:
        voting = cast(NeighbourRouter, router)
        order = sorted(range(len(cosines)), key=lambda anchor: -cosines[anchor])
        votes = [float(voting.labels[anchor, head]) for anchor in order[: voting.neighbours]]
        correction = sum(votes) / len(votes) - bias
    return bias + min(1.0, max(0.0, share)) * correction


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changed", [{}, {"neighbours": 1}, {"neighbours": 99}])
def test_logits_follow_the_formula(
    kind: str, changed: dict[str, int], llm: FrozenLM, space: QuerySpace
) -> None:
    router = make(kind, space, **changed if kind == "neighbours" else {})
    embeddings = llm.embed(["where is z?", "a", "who has b?", "why e a?"], layer=LAYER)
    logits = router.logits(embeddings)
    assert logits.shape == (4, len(HEADS))
    shares = set()
    for embedding, row in zip(embeddings, logits.tolist(), strict=True):
        shares.add(float(space.familiarity(embedding[None])))
        for head in range(len(HEADS)):
            expected = slow_logit(router, embedding, head)
            assert row[head] == pytest.approx(expected, abs=1e-4)
    assert len(shares) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_query_far_from_all_anchors_gets_exactly_the_bias(kind: str) -> None:
    router = make(kind, by_hand())
    logits = router.logits(torch.tensor([[-3.0, 0.0, 0.0], [-1.0, 5.0, 2.0]]))
    assert torch.equal(logits, router.bias.expand(2, -1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_query_on_an_anchor_gets_the_whole_correction(kind: str) -> None:
    router = make(kind, by_hand())
    query = torch.eye(3)[:1]
    assert torch.equal(router.logits(query), router.bias + router.correction(query))
    assert not torch.allclose(router.logits(query), router.bias)


def test_with_one_neighbour_the_nearest_training_query_gives_its_label(space: QuerySpace) -> None:
    router = make("neighbours", space, neighbours=1)
    correction = router.correction(space.projected_anchors)
    labels = cast(NeighbourRouter, router).labels
    torch.testing.assert_close(correction + router.bias, labels)


@given(st.integers(0, 2**16), st.integers(1, 12), st.integers(1, 15))
@settings(max_examples=40, deadline=None)
def test_the_vote_is_that_of_a_slow_search(seed: int, anchors: int, neighbours: int) -> None:
    drawn = torch.nn.functional.normalize(random(anchors, 3, seed=seed))
    router = make("neighbours", by_hand(anchors=drawn), neighbours=neighbours)
    queries = torch.nn.functional.normalize(random(4, 3, seed=seed + 1))
    nearest = (queries @ drawn.T).argsort(dim=1, descending=True)[:, :neighbours]
    labels = cast(NeighbourRouter, router).labels
    votes = torch.stack([labels[row].mean(dim=0) for row in nearest])
    torch.testing.assert_close(router.correction(queries), votes - router.bias)


# From logits to heads


@pytest.mark.parametrize(
    ("logits", "changed", "heads", "weights"),
    [
        # Signed weights, the largest on either side first; those up to the threshold are left out.
        ([0.5, -2.0, 0.0, 1.0], {}, "0-1,0-3,0-0", [-2.0, 1.0, 0.5]),
        ([0.5, -2.0, 0.0, 1.0], {"threshold": 0.5}, "0-1,0-3", [-2.0, 1.0]),
        ([0.5, -2.0, 0.0, 1.0], {"max_heads": 1}, "0-1", [-2.0]),
        ([0.5, -2.0, 0.0, 1.0], {"threshold": 9.0}, "0-1", [-2.0]),  # one at least
        ([0.0, 0.0], {}, "0-0", [0.0]),
        ([1.0, -1.0, 1.0], {}, "0-0,0-1,0-2", [1.0, -1.0, 1.0]),  # ties keep the order
        ([1.0, -1.0, 1.0], {"max_heads": 2}, "0-0,0-1", [1.0, -1.0]),
        # Gates: only what is above the threshold, without weights.
        ([0.5, -2.0, 0.0, 1.0], {"reading": "gates"}, "0-3,0-0", None),
        ([0.5, -2.0, 0.0, 1.0], {"reading": "gates", "threshold": 0.5}, "0-3", None),
        ([0.5, -2.0, 0.0, 1.0], {"reading": "gates", "threshold": -3.0}, "0-3,0-0,0-2,0-1", None),
        ([0.5, -2.0, 0.0, 1.0], {"reading": "gates", "max_heads": 1}, "0-3", None),
        ([-2.0, -1.0, -3.0], {"reading": "gates"}, "0-1", None),  # one at least
        ([1.0, 2.0, 1.0, 2.0], {"reading": "gates"}, "0-1,0-3,0-0,0-2", None),
        ([1.0, 1.0, 1.0], {"reading": "gates", "max_heads": 2}, "0-0,0-1", None),
        ([1.0, 1.0], {"reading": "gates", "max_heads": 7}, "0-0,0-1", None),
    ],
)
def test_logits_become_heads(
    logits: list[float], changed: dict[str, Any], heads: str, weights: list[float] | None
) -> None:
    chosen = fixed(logits, **changed).choose(torch.tensor(logits))
    assert str(chosen) == heads
    assert chosen.recipe.weights == (None if weights is None else tuple(weights))


NUMBERS = st.floats(-4, 4, width=32)


@given(
    st.lists(NUMBERS, min_size=1, max_size=12),
    NUMBERS,
    st.none() | st.integers(1, 14),
    st.sampled_from(["gates", "weights"]),
)
@settings(deadline=None)
def test_any_logits_become_the_heads_of_a_slow_choice(
    logits: list[float], threshold: float, most: int | None, reading: str
) -> None:
    size = [abs(number) if reading == "weights" else number for number in logits]
    order = sorted(range(len(logits)), key=lambda head: -size[head])
    expected = [head for head in order if size[head] > threshold] or order[:1]
    router = fixed(logits, threshold=threshold, max_heads=most, reading=reading)
    chosen = router.choose(torch.tensor(logits))
    assert [head for _, head in chosen] == expected[:most]


@pytest.mark.parametrize("reading", ["gates", "weights"])
def test_a_choice_records_what_the_router_was_fitted_for(reading: str) -> None:
    chosen = fixed([1.0, 2.0], reading=reading).choose(torch.tensor([1.0, 2.0]))
    unweighted = replace(chosen.recipe, weights=None)
    recorded = replace(chosen, heads=[(0, 0)], recipe=unweighted)
    assert recorded == replace(HEADS, heads=[(0, 0)])
    assert (recorded.model, recorded.layout, recorded.method) == ("tiny", "parallel", "routed")


def test_it_loads_the_layers_of_its_heads_and_one_after_the_querys_embedding() -> None:
    router = fixed([1.0])
    assert router.layout == "parallel"
    routing = fixed([1.0], projection=torch.ones(1, 3), embeddings=torch.ones(1, 1))
    assert routing.layers(4) == LAYER + 1
    assert replace(routing, heads=replace(HEADS, heads=[(7, 0)])).layers(30) == 8


@pytest.mark.parametrize("name", ["projection", "embeddings"])
def test_without_a_correction_queries_are_not_even_embedded(
    name: str, llm: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"projection": torch.ones(1, 3), "embeddings": torch.ones(3, 1)}
    assert fixed([1.0, -2.0, 0.0], **given).routes
    static = fixed([1.0, -2.0, 0.0], **given | {name: torch.zeros_like(given[name])})
    assert not static.routes
    assert static.layers(4) == 1 < LAYER + 1
    monkeypatch.setattr(FrozenLM, "embed", None)
    chosen = static.select_all(["one", "two"], llm)
    assert chosen == [static.choose(static.bias)] * 2
    other = replace(static, heads=replace(static.heads, model="org/other"))
    with pytest.raises(RouterMismatchError, match="was trained for 'org/other'"):
        other.select("one", llm)


def test_routers_are_told_apart_by_any_of_their_numbers(router: Router) -> None:
    assert repr(router) == repr(replace(router))
    assert repr(router).startswith(f"{type(router).__name__}('tiny', 5 heads, ")
    (name, *_) = router.tensors
    tensor = getattr(router, name).clone()
    tensor[-1, -1] += 1e-6
    others: list[dict[str, Any]] = [{name: tensor}, {"threshold": 0.1}, {"description": {"a": 1}}]
    assert len({repr(router), *(repr(replace(router, **changed)) for changed in others)}) == 4


# With an LLM


def test_queries_get_the_same_heads_one_by_one_and_all_at_once(
    router: Router, llm: FrozenLM
) -> None:
    queries = [*QUERIES[::3], " ", "something else altogether"]
    together = router.select_all(queries, llm)
    assert len({heads.heads for heads in together}) > 2
    for query, heads in zip(queries, together, strict=True):
        alone = router.select(query, llm)
        assert alone.heads == heads.heads
        assert alone.recipe.weights == pytest.approx(heads.recipe.weights, abs=1e-4)
        assert replace(alone, recipe=Recipe()) == replace(heads, recipe=Recipe())
        assert replace(alone.recipe, weights=None) == replace(heads.recipe, weights=None)
    assert router.select_all([], llm) == []


def test_it_chooses_by_the_logits_of_the_querys_embedding(router: Router, llm: FrozenLM) -> None:
    (logits,) = router.logits(llm.embed(["who has g?"], layer=LAYER))
    assert router.select("who has g?", llm) == router.choose(logits)


@pytest.mark.parametrize("query", ["", " \n"])
def test_a_blank_query_gets_the_heads_of_the_bias(
    router: Router, llm: FrozenLM, query: str
) -> None:
    assert router.select(query, llm) == router.choose(router.bias)
    assert router.select_all(["a", query], llm)[1] == router.choose(router.bias)


def test_an_llm_without_the_layers_it_does_not_need_gets_the_same_heads(
    router: Router, llm: FrozenLM, tmp_path: Path
) -> None:
    families.tiny_model("llama").save_pretrained(tmp_path)
    families.tiny_tokenizer().save_pretrained(tmp_path)
    shallow = FrozenLM.from_pretrained(str(tmp_path), dtype="float32", layers=router.layers)
    assert shallow.heads.last_layer == 2
    chosen, expected = router.select("why h?", shallow), router.select("why h?", llm)
    assert chosen.heads == expected.heads
    assert chosen.recipe.weights == pytest.approx(expected.recipe.weights, abs=1e-4)


@pytest.mark.parametrize("query", ["", "where is a?"])
def test_another_llm_is_refused_by_both_names(router: Router, query: str) -> None:
    other = FrozenLM(families.tiny_model("qwen2"), families.tiny_tokenizer(), name="org/other")
    with pytest.raises(RouterMismatchError) as error:
        router.select(query, other)
    assert str(error.value) == (
        "the router was trained for 'tiny', but the LLM is 'org/other'; train one for it "
        "(routehead train), or leave the router out."
    )


@pytest.mark.parametrize("query", ["", "where is a?"])
def test_an_llm_of_another_width_is_refused_whatever_its_name(
    router: Router, tmp_path: Path, query: str
) -> None:
    config = LlamaConfig(**families.CONFIGS["llama"].to_dict() | {"hidden_size": 16, "head_dim": 4})
    narrow = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # A folder can have any name.
    other = FrozenLM(narrow.eval(), families.tiny_tokenizer(), name=str(tmp_path))
    with pytest.raises(RouterMismatchError) as error:
        router.select(query, other)
    assert "trained for 'tiny'" in str(error.value)
    assert repr(str(tmp_path)) in str(error.value)


def test_a_router_that_names_no_llm_takes_any_of_the_right_width(
    space: QuerySpace, llm: FrozenLM
) -> None:
    router = make("heads", space, heads=replace(HEADS, model=None))
    assert router.select("a", llm).model is None


@pytest.mark.parametrize("query", ["", "where is a?"])
def test_heads_that_the_llm_does_not_have_are_named(
    space: QuerySpace, llm: FrozenLM, query: str
) -> None:
    heads = replace(HEADS, heads=[*HEADS.heads[:4], (7, 7)])
    with pytest.raises(HeadError) as error:
        make("heads", space, heads=heads).select(query, llm)
    assert str(error.value).startswith("'tiny' has no head 7-7; ")


# Invalid settings and tensors


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"reading": "tea"}, "reading='tea' is not one of gates, weights; give one of them."),
        ({"threshold": math.nan}, "threshold=nan must be a finite number."),
        ({"max_heads": 0}, "max_heads=0 is not a count; give a whole number, 1 or more."),
        ({"max_heads": -1}, "max_heads=-1 is not a count; give a whole number, 1 or more."),
        (
            {"max_doc_tokens": 0},
            "max_doc_tokens=0 is not a count; give a whole number, 1 or more.",
        ),
        (
            {"bias": torch.zeros(4)},
            "the router's bias has shape (4,); expected (heads=5), none of them 0.",
        ),
        (
            {"space": by_hand(anchors=torch.zeros(0, 3))},
            "the router's anchors has shape (0, 3); expected (anchors=any, width=3), "
            "none of them 0.",
        ),
        (
            {"space": by_hand(anchors=torch.zeros(4, 2))},
            "the router's anchors has shape (4, 2); expected (anchors=any, width=3), "
            "none of them 0.",
        ),
        (
            {"space": replace(by_hand(), deviation=torch.ones(2))},
            "the router's deviation has shape (2,); expected (width=3), none of them 0.",
        ),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_invalid_settings_are_refused_in_one_line(
    kind: str, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as error:
        make(kind, **{"space": by_hand()} | changed)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("kind", "changed", "message"),
    [
        (
            "heads",
            {"projection": torch.zeros(3, 4)},
            "the router's projection has shape (3, 4); expected (d=any, coordinates=3), "
            "none of them 0.",
        ),
        (
            "heads",
            {"embeddings": torch.zeros(5, 2)},
            "the router's embeddings has shape (5, 2); expected (heads=5, d=3), none of them 0.",
        ),
        (
            "heads",
            {"embeddings": torch.zeros(5)},
            "the router's embeddings has shape (5,); expected (heads=5, d=3), none of them 0.",
        ),
        (
            "neighbours",
            {"labels": torch.zeros(2, 5)},
            "the router's labels has shape (2, 5); expected (anchors=1, heads=5), none of them 0.",
        ),
        (
            "neighbours",
            {"neighbours": 0},
            "neighbours=0 is not a count; give a whole number, 1 or more.",
        ),
    ],
)
def test_tensors_that_do_not_fit_each_other_are_refused_in_one_line(
    kind: str, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as error:
        make(kind, by_hand(), **changed)
    assert str(error.value) == message


def test_neighbours_need_faiss_and_nothing_else_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make("neighbours", by_hand()).save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert make("heads", by_hand()).choose(torch.ones(5))
    builds: list[Callable[[], Router]] = [
        lambda: make("neighbours", by_hand()),
        lambda: Router.from_pretrained(tmp_path),
    ]
    for build in builds:
        with pytest.raises(MissingExtraError) as error:
            build()
        assert str(error.value) == (
            "package 'faiss' is not installed; run: pip install \"routehead-plugins[faiss]\""
        )


def test_a_router_over_detected_heads_leaves_their_scores_and_their_source_behind() -> None:
    detected = replace(HEADS, scores=[0.5, 0.4, 0.3, 0.2, 0.1], source="a paper")
    router = replace(fixed([0.0, 3.0, -2.0, 0.0, 0.0]), heads=detected)
    chosen = router.choose(router.bias)
    assert list(chosen) == [(2, 3), (1, 0)]
    assert (chosen.scores, chosen.source) == (None, None)
    assert isinstance(router, HeadRouter)
    assert list(router.trimmed().heads) == [(2, 3), (1, 0)]


def test_a_class_without_a_kind_of_its_own_replaces_no_other() -> None:
    class Shared(HeadRouter):
        """Something that several kinds might share."""

    folder = shipped_router("embedded")
    assert folder is not None
    assert type(Router.from_pretrained(folder)) is HeadRouter
    assert Shared.kind == "heads"


def test_a_router_of_the_late_layouts_pass_chooses_by_its_embedding() -> None:
    space = replace(by_hand(), source="tail")
    router = make("heads", space, max_heads=2)
    assert router.tail_layer == LAYER
    assert replace(router, space=by_hand()).tail_layer is None
    assert replace(fixed([1.0, 2.0]), space=space).tail_layer is None  # it embeds nothing
    llm = FrozenLM(families.tiny_model("llama"), families.tiny_tokenizer(), name="tiny")
    embedding = torch.tensor([1.0, 0.2, 0.1])
    chosen = router.select_by(embedding, llm)
    assert chosen == router.choose(router.logits(embedding[None])[0])
    assert router.select(" ", llm) == router.choose(router.bias)
    with pytest.raises(InputError) as error:
        router.select("why?", llm)
    assert str(error.value) == (
        "the router embeds queries in the pass that reads them; use it with "
        "HeadRoutedAttentionReranker, or embed them by LateLayout().embed."
    )
    with pytest.raises(RouterMismatchError):
        router.select_by(torch.ones(4), llm)
    with pytest.raises(RouterMismatchError):
        replace(router, heads=replace(HEADS, model="another")).select_by(embedding, llm)
