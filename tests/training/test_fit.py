"""Training a router: planted kinds of queries are told apart, and nothing is made of noise."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tables import query_signals, signal_set, table
from torch import Tensor

from routehead_plugins import Head, HeadSet
from routehead_plugins.errors import InputError
from routehead_plugins.selection import HeadRouter, NeighbourRouter, Router
from routehead_plugins.signals import SignalSet
from routehead_plugins.training import correction, fit
from routehead_plugins.training.fit import OBJECTIVES, FitOptions, fit_router
from routehead_plugins.training.head_search import LabelOptions
from routehead_plugins.training.offline import each_ndcg, routed_scores
from routehead_plugins.training.pseudo_labels import pseudo_labels
from routehead_plugins.training.weights import choose_l1, fit_weights, split_folds

HEADS = HeadSet([(layer, index) for layer in range(3) for index in range(2)])
KINDS = (0, 4)  # the head that answers queries of each kind
LABELS = LabelOptions(candidates=6, max_heads=1, utility="margin")
Data = tuple[SignalSet, Tensor]


def draw(
    queries: int, seed: int, *, answering: Sequence[int] = KINDS, first_stage: float = 0.0
) -> Data:
    """Queries of two kinds that embeddings tell apart; one head answers each, others are noise."""
    generator = torch.Generator().manual_seed(seed)
    queries_drawn, embeddings = [], []
    for number in range(queries):
        kind = number % 2
        gains = torch.zeros(8)
        gains[torch.randperm(8, generator=generator)[:2]] = 1
        signal = torch.randn(len(HEADS), 8, generator=generator)
        signal[answering[kind]] += 3 * gains
        query = query_signals(0.01 * signal, gains.tolist(), query_id=f"{seed}-{number}")
        retrieval = torch.randn(8, generator=generator) + first_stage * gains
        queries_drawn.append(replace(query, mass=(signal - 4).exp(), first_stage=retrieval))
        embedding = 0.3 * torch.randn(4, generator=generator)
        embedding[0] += (-1, 1)[kind]
        embeddings.append(embedding)
    return table(queries_drawn, HEADS), torch.stack(embeddings)


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the steps will do here."""
    monkeypatch.setattr(correction, "_STEPS", 100)


@pytest.fixture(scope="module")
def routed() -> Data:
    return draw(80, 1)


@pytest.fixture(scope="module")
def static() -> Data:
    """The same head answers all queries."""
    return draw(40, 1, answering=(2, 2))


def options(objective: str, **changed: Any) -> FitOptions:
    given: dict[str, Any] = {
        "layer": 2,
        "coordinates": 4,
        "labels": LABELS,
        "strengths": (1.0, 0.3),
    }
    return FitOptions(objective=objective, **given | changed)


def ndcgs(router: Router, data: Data) -> Tensor:
    signals, embeddings = data
    scores = routed_scores(router, signals.queries, embeddings, signals.heads)
    return each_ndcg(scores, signals.queries)


def measured(router: Router, data: Data) -> float:
    return float(ndcgs(router, data).mean())


def without_correction(router: Router) -> Router:
    if isinstance(router, HeadRouter):
        return replace(router, embeddings=torch.zeros_like(router.embeddings))
    voting = cast(NeighbourRouter, router)
    return replace(voting, labels=voting.bias.expand(voting.labels.shape).contiguous())


def tensors(router: Router) -> dict[str, Tensor]:
    parts = (router, router.space)
    named = {field.name: getattr(part, field.name) for part in parts for field in fields(part)}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def same(one: Router, other: Router) -> bool:
    ours, theirs = tensors(one), tensors(other)
    equal = all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)
    return equal and (one.heads, one.description) == (other.heads, other.description)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_router_learns_which_head_answers_which_kind(objective: str, routed: Data) -> None:
    router = fit_router(*routed, options(objective))
    unseen = draw(60, 2)
    assert measured(router, unseen) > measured(without_correction(router), unseen) + 0.05
    first = [router.choose(logits)[0] for logits in router.logits(unseen[1])]
    right = [head == HEADS[KINDS[index % 2]] for index, head in enumerate(first)]
    assert sum(right) > 0.75 * len(right)
    assert router.description is not None
    assert router.description["strength"] in (0.3, 1.0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_correction_is_kept_where_there_is_nothing_to_route(
    objective: str, static: Data
) -> None:
    router = fit_router(*static, options(objective))
    assert router.description is not None
    assert router.description["strength"] is None
    strange = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    for embeddings in (static[1], 5 * strange):
        logits = router.logits(embeddings)
        assert torch.equal(logits, router.bias.expand_as(logits))
    assert int(router.bias.argmax()) == next(
        index for index, head in enumerate(router.heads) if head == HEADS[2]
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_single_strength_is_taken_as_it_is(objective: str, static: Data) -> None:
    router = fit_router(*static, options(objective, strengths=(0.5,)))
    queries = len(static[0].queries)
    assert router.description == {"objective": objective, "queries": queries, "strength": 0.5}
    assert not torch.equal(router.logits(static[1]), router.bias.expand(queries, -1))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    "data",
    [
        draw(80, 1),
        draw(24, 3, answering=(2, 2)),  # by the listwise objective, one query is better alone
        draw(5, 1),  # one held out
    ],
    ids=["clear", "unclear", "few"],
)
def test_strengths_are_compared_on_a_fifth_that_is_not_trained_on(
    objective: str, data: Data
) -> None:
    signals, embeddings = data
    router = fit_router(signals, embeddings, options(objective))
    held_out = torch.tensor(split_folds(signals.queries, 5, 0)) == 0
    test, train = (
        (signals.subset([signals.queries[n] for n in mask.nonzero()[:, 0]]), embeddings[mask])
        for mask in (held_out, ~held_out)
    )
    figures = {}
    for strength in (1.0, 0.3):
        alone = fit_router(*train, options(objective, strengths=(strength,)))
        figures[strength] = ndcgs(alone, test)
        static = ndcgs(without_correction(alone), test)
    best = 1.0 if figures[1.0].mean() >= figures[0.3].mean() else 0.3
    better = figures[best] - static
    error = better.numpy().std(ddof=1) / len(better) ** 0.5 if len(better) > 1 else math.inf
    means = {"static": static} | {str(strength): values for strength, values in figures.items()}
    assert router.description == {
        "objective": objective,
        "queries": len(signals.queries),
        "strength": best if float(better.mean()) > 2.000001 * error else None,
        "held_out_queries": len(better),
        "held_out_ndcg@10": {
            name: round(float(values.mean()), 4) for name, values in means.items()
        },
    }


@pytest.mark.parametrize(
    ("differences", "chosen"),
    [
        ([[0.1, 0.2] * 4, [0.1] * 8], 1.0),
        ([[0.1] * 8, [0.1, 0.2] * 4], 0.3),
        ([[0.1] * 8, [0.1] * 8], 1.0),  # of equals the first
        ([[0.0] * 8, [-0.1] * 8], None),
        ([[0.4, -0.3] * 4, [-0.1] * 8], None),  # mean 0.05, standard error 0.13
        ([[0.4, -0.1] * 4, [-0.1] * 8], None),  # mean 0.15, standard error 0.09
        ([[0.4, 0.0] * 4, [-0.1] * 8], 1.0),  # mean 0.2, standard error 0.08
        ([[0.0] * 7 + [0.4], [0.0] * 8], None),  # what one query says alone
        ([[0.0] * 7 + [1 / 3], [0.0] * 8], None),
        ([[0.0] * 6 + [0.4] * 2, [0.0] * 8], None),  # 1.5 standard errors
        ([[0.0] * 5 + [0.4] * 3, [0.0] * 8], 1.0),  # 2.05
        ([[0.5], [0.1]], None),  # likewise
    ],
)
def test_a_correction_is_kept_where_it_is_better_by_more_than_two_standard_errors(
    routed: Data,
    monkeypatch: pytest.MonkeyPatch,
    differences: list[list[float]],
    chosen: float | None,
) -> None:
    static = torch.full((len(differences[0]),), 0.25, dtype=torch.float64)
    values = iter([static, *(static + torch.tensor(row).double() for row in differences)])
    monkeypatch.setattr(fit, "each_ndcg", lambda *_: next(values))
    description = fit_router(*routed, options("listwise")).description
    assert cast(Any, description)["strength"] == chosen


def test_the_bias_is_the_static_weights(static: Data) -> None:
    signals, embeddings = static
    router = fit_router(signals, embeddings, options("listwise", aggregation="log"))
    kept = [part != 0 for part in split_folds(signals.queries, 5, 0)]
    train = signals.subset([q for q, keep in zip(signals.queries, kept, strict=True) if keep])
    weights = fit_weights(signals, aggregation="log", l1=choose_l1(train, aggregation="log"))
    assert weights.recipe.weights is not None
    bias = dict(zip(router.heads, router.bias.tolist(), strict=True))
    # Nothing is corrected, so that heads without a weight are left out.
    assert bias == pytest.approx(dict(zip(weights, weights.recipe.weights, strict=True)))
    assert 0 < len(bias) < len(HEADS)
    recorded = router.heads
    assert (recorded.model, recorded.layout, recorded.data) == ("tiny", "sequential", "written")
    assert (recorded.recipe.aggregation, recorded.recipe.weights) == ("log", None)
    assert recorded.recipe.first_stage_weight == weights.recipe.first_stage_weight
    assert (router.reading, router.max_heads, router.space.layer) == ("weights", None, 2)


def test_the_bias_of_gates_is_how_often_a_head_is_in_a_label(static: Data) -> None:
    signals, embeddings = static
    labels = pseudo_labels(signals, LABELS)
    shares = [0.01 if share == 0 else share for share in labels.gates.float().mean(dim=0).tolist()]
    assert 0.01 in shares
    router = fit_router(signals, embeddings, options("labels", strengths=(9.0,)))
    logits = [math.log(share / (1 - share)) for share in shares]
    assert router.bias.tolist() == pytest.approx(logits, abs=1e-5)
    voting = fit_router(signals, embeddings, options("neighbours", strengths=(9.0,)))
    assert voting.bias.tolist() == pytest.approx(shares)
    assert cast(NeighbourRouter, voting).labels.bool().equal(labels.gates)
    for gated in (router, voting):
        assert list(gated.heads) == list(labels.heads)
        assert (gated.reading, gated.max_heads) == ("gates", 1)
        assert gated.heads.recipe.aggregation == "standardised"


@pytest.mark.parametrize("objective", ["labels", "neighbours"])
def test_gates_without_a_correction_read_the_best_few_heads(
    objective: str, static: Data, routed: Data
) -> None:
    four = options(objective, labels=replace(LABELS, max_heads=4))
    for data, answering in ((static, {HEADS[2]}), (routed, {HEADS[kind] for kind in KINDS})):
        router = fit_router(*data, four)
        assert set(router.choose(router.bias)) == answering


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_first_stage_counts_where_it_knows_something(objective: str) -> None:
    helped, misled = (draw(20, 3, first_stage=knows) for knows in (2.0, -2.0))
    few = options(objective, strengths=(9.0,))
    weight = fit_router(*helped, few).heads.recipe.first_stage_weight
    assert weight is not None
    assert weight > 0.2
    assert fit_router(*misled, few).heads.recipe.first_stage_weight == 0.0
    left_out = fit_router(*helped, replace(few, first_stage=False))
    assert left_out.heads.recipe.first_stage_weight is None


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_heads_that_are_too_deep_are_as_if_they_were_not_there(
    objective: str, routed: Data
) -> None:
    signals, embeddings = routed
    single = options(objective, strengths=(0.3,), max_layer=1)
    router = fit_router(signals, embeddings, single)
    assert {head.layer for head in router.heads} == {0, 1}
    shallow = [
        replace(query, **{name: getattr(query, name)[:4] for name in ("mass", "calibrated")})
        for query in signals.queries
    ]
    rest = replace(signals, heads=HeadSet(HEADS[:4]), queries=tuple(shallow))
    assert same(router, fit_router(rest, embeddings, replace(single, max_layer=None)))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_queries_without_contrast_make_no_difference(objective: str, routed: Data) -> None:
    signals, embeddings = routed
    flat = replace(signals.queries[3], query="flat", gains=torch.ones(8))
    more = signals.subset([flat, *signals.queries, flat])
    around = torch.cat([torch.full((1, 4), 9.0), embeddings, torch.zeros(1, 4)])
    single = options(objective, strengths=(0.3,))
    assert same(fit_router(more, around, single), fit_router(signals, embeddings, single))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_fits_are_the_same_and_leave_the_signals_as_they_were(
    objective: str, routed: Data
) -> None:
    signals, embeddings = routed
    before = copy.deepcopy((signals, embeddings))
    first = fit_router(signals, embeddings, options(objective, max_layer=2))
    assert same(first, fit_router(signals, embeddings, options(objective, max_layer=2)))
    assert torch.equal(embeddings, before[1])
    assert signals.heads == before[0].heads
    for query, old in zip(signals.queries, before[0].queries, strict=True):
        for name in ("mass", "calibrated", "gains", "first_stage", "ideal_gains"):
            assert torch.equal(getattr(query, name), getattr(old, name))


def test_another_seed_holds_out_other_queries(routed: Data) -> None:
    # A vote leaves nothing else to chance.
    routers = [fit_router(*routed, options("neighbours", seed=seed)) for seed in (0, 1)]
    figures = [cast(Any, router.description)["held_out_ndcg@10"]["static"] for router in routers]
    assert figures[0] != figures[1]


def test_every_training_query_has_a_vote() -> None:
    router = fit_router(*draw(1030, 4), options("neighbours", strengths=(0.0,)))
    assert cast(NeighbourRouter, router).labels.shape == (1030, 6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_router_scores_the_same_once_it_is_loaded(
    objective: str, routed: Data, tmp_path: Path
) -> None:
    signals, embeddings = routed
    router = fit_router(signals, embeddings, options(objective, strengths=(0.3,)))
    router.save_pretrained(tmp_path)
    loaded = Router.from_pretrained(tmp_path)
    assert loaded.description == router.description
    for one, other in zip(
        routed_scores(router, signals.queries, embeddings, signals.heads),
        routed_scores(loaded, signals.queries, embeddings, signals.heads),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_a_few_queries_of_noise_still_make_a_router() -> None:
    # A penalty that leaves a head on eight of them leaves none on all ten.
    signals = signal_set(2, queries=10, planted=[], layers=2)
    embeddings = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    kept = [part != 0 for part in split_folds(signals.queries, 5, 0)]
    train = signals.subset([q for q, keep in zip(signals.queries, kept, strict=True) if keep])
    with pytest.raises(InputError, match="no head of 'tiny' gets a weight"):
        fit_weights(signals, l1=choose_l1(train))
    router = fit_router(signals, embeddings, options("listwise"))
    assert router.bias.any()


# refused arguments


def test_embeddings_must_be_one_per_query(routed: Data) -> None:
    signals, embeddings = routed
    with pytest.raises(InputError) as error:
        fit_router(signals, embeddings[:-1], options("listwise"))
    assert str(error.value) == "there are 79 embeddings for 80 queries; give one for each."


def test_queries_that_are_all_without_contrast_are_refused() -> None:
    signals = table([query_signals([[0.1, 0.2]], [1, 1], query_id=f"q{n}") for n in range(3)])
    with pytest.raises(InputError) as error:
        fit_router(signals, torch.randn(3, 4), options("listwise"))
    assert str(error.value) == (
        "none of the 3 queries of written has both relevant and other candidates; give judged "
        "queries with 2 or more candidates."
    )


def test_one_query_is_too_few_to_hold_some_out(routed: Data) -> None:
    signals, embeddings = routed
    with pytest.raises(InputError, match="one query cannot be cross-validated"):
        fit_router(signals.subset(signals.queries[:1]), embeddings[:1], options("labels"))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_head_is_above_the_first_layer(objective: str, routed: Data) -> None:
    with pytest.raises(InputError) as error:
        fit_router(*routed, options(objective, max_layer=-1))
    assert str(error.value) == "max_layer=-1 leaves no head of 'tiny'; give 0 or more."
    only = fit_router(*routed, options(objective, max_layer=0, strengths=(1.0,)))
    assert set(only.heads) <= {Head(0, 0), Head(0, 1)}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"objective": "magic"},
            "objective='magic' does not exist; choose one of listwise, labels, neighbours.",
        ),
        ({"rank": 0}, "rank=0 is not a count; give a whole number, 1 or more."),
        ({"coordinates": -2}, "coordinates=-2 is not a count; give a whole number, 1 or more."),
        (
            {"strengths": ()},
            "strengths=() must be a non-empty list of finite numbers >= 0.",
        ),
        (
            {"strengths": (1.0, -0.1)},
            "strengths=(1.0, -0.1) must be a non-empty list of finite numbers >= 0.",
        ),
        (
            {"strengths": (math.nan,)},
            "strengths=(nan,) must be a non-empty list of finite numbers >= 0.",
        ),
    ],
)
def test_options_out_of_range_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        FitOptions(layer=1, **changed)
    assert str(error.value) == message
