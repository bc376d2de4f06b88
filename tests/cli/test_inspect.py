"""`routehead inspect`: figures of routers whose every choice is known."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor

from routehead_plugins import FrozenLM, HeadSet
from routehead_plugins.cli import inspect as command
from routehead_plugins.cli.inspect import InspectArguments, inspect_router, render
from routehead_plugins.errors import (
    CollectionError,
    InputError,
    MissingExtraError,
    ModelLoadError,
    RouterMismatchError,
)
from routehead_plugins.heads import Recipe
from routehead_plugins.options import RerankerOptions
from routehead_plugins.selection import HeadRouter, NeighbourRouter, QuerySpace, Router
from routehead_plugins.training import Inspection, Use, sampled
from routehead_plugins.training import inspection as _inspection
from routehead_plugins.training.inspection import cosine, jaccard

HEADS = HeadSet(
    [(0, 0), (0, 1), (1, 0), (2, 1)],
    model="tiny",
    layout="parallel",
    data="some questions",
    recipe=Recipe(aggregation="log", first_stage_weight=0.5),
)
# Logits of three queries, head by head.
LOGITS = [[2.0, 1.0, 0.0, 0.0], [2.0, 0.0, 1.0, 0.0], [-2.0, 0.0, 0.0, 4.0]]
FIRST, SECOND, THIRD = torch.eye(3)
STRANGE = torch.full((3,), -1.0)


def space() -> QuerySpace:
    """The three queries are familiar, and their opposite is wholly strange."""
    anchor = torch.full((1, 3), 3**-0.5)
    return QuerySpace(1, torch.zeros(3), torch.ones(3), torch.eye(3), anchor, (1.0, 2.0))


def by_hand(logits: list[list[float]] = LOGITS, **changed: Any) -> HeadRouter:
    """A router whose logits for three queries are given; for strange ones they are zero."""
    settings: dict[str, Any] = {"heads": HEADS, "space": space(), "bias": torch.zeros(4)}
    settings |= {
        "projection": torch.eye(3) * 3**0.5,
        "embeddings": torch.tensor(logits).T.contiguous(),
    }
    return HeadRouter(**settings | changed)


def use(router: Router, *queries: Tensor, name: str = "here") -> Use:
    return Use.of(name, router, torch.stack(queries))


def inspection(*uses: Use, router: Router | None = None) -> Inspection:
    return Inspection("my-router", router or by_hand(), 1234, uses)


def shown(found: Inspection) -> list[str]:
    """The lines on a wide terminal, with single blanks."""
    console = Console(file=io.StringIO(), width=160)
    console.print(render(found))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return [" ".join(line.split()) for line in lines]


# Figures


def test_a_collections_figures_are_those_of_its_queries() -> None:
    assert use(by_hand(), FIRST, SECOND, THIRD, STRANGE).figures() == {
        "queries": 4,
        "head_sets": 4,
        "heads_mean": 1.75,  # a strange query gets one head, of weight 0
        "heads_min": 1,
        "heads_max": 2,
        "layers_mean": 1.75,
        "familiarity": 0.75,
        "wholly_static": 0.25,
    }


def test_heads_are_named_by_how_often_they_are_read() -> None:
    router = by_hand()
    here = use(router, FIRST, SECOND, THIRD)
    there = use(router, FIRST, FIRST, FIRST, name="there")
    heads = inspection(here, there).used_heads()
    assert [(row["head"], row["share"]) for row in heads] == [
        ("0-0", 1.0),
        ("0-1", round(4 / 6, 6)),
        ("2-1", round(1 / 6, 6)),  # weighs more than 1-0
        ("1-0", round(1 / 6, 6)),
    ]
    assert [row["mean_weight"] for row in heads] == pytest.approx([8 / 6, 1, 4, 1], abs=1e-5)
    assert [row["collections"] for row in heads] == [
        {"here": 1.0, "there": 1.0},
        {"here": 0.333333, "there": 1.0},
        {"here": 0.333333, "there": 0.0},
        {"here": 0.333333, "there": 0.0},
    ]
    assert inspection(here, there).used_heads(2) == heads[:2]


def test_heads_that_are_never_read_are_not_named() -> None:
    found = inspection(use(by_hand(), FIRST))
    assert [row["head"] for row in found.used_heads()] == ["0-0", "0-1"]
    assert inspection().used_heads() == []


def test_gates_have_no_weights_and_no_distance_between_them() -> None:
    router = by_hand(reading="gates")
    found = inspection(use(router, FIRST, SECOND, THIRD), router=router)
    assert [(row["head"], row["share"], row["mean_weight"]) for row in found.used_heads()] == [
        ("0-0", 0.666667, None),
        ("2-1", 0.333333, None),
        ("0-1", 0.333333, None),
        ("1-0", 0.333333, None),
    ]
    assert found.distances == {"jaccard": [[pytest.approx((2 / 3 + 1 + 1) / 3, abs=1e-6)]]}


def test_distances_are_means_over_pairs_of_different_queries() -> None:
    router = by_hand()
    here = use(router, FIRST, SECOND, THIRD)
    there = use(router, FIRST, FIRST, name="there")
    found = inspection(here, there).distances
    assert found["jaccard"] == [
        pytest.approx([2 / 3, 4 / 9], abs=1e-6),
        pytest.approx([4 / 9, 0.0], abs=1e-6),
    ]
    # cosines: 4/5 of the first two, -4/10 of either with the third
    assert found["cosine"] == [
        pytest.approx([1.0, 1.6 / 3], abs=1e-6),
        pytest.approx([1.6 / 3, 0.0], abs=1e-6),
    ]


def test_a_single_query_has_no_distance_from_itself() -> None:
    router = by_hand()
    found = inspection(use(router, FIRST), use(router, SECOND, SECOND, name="there"))
    assert found.distances["jaccard"] == [[None, 0.666667], [0.666667, 0.0]]


def test_no_more_queries_are_compared_than_need_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_inspection, "PAIRED", 2)
    router = by_hand()
    found = [
        Inspection("r", router, 1, [use(router, FIRST, FIRST, SECOND)], seed).distances["jaccard"]
        for seed in range(20)
    ]
    assert found == [
        Inspection("r", router, 1, [use(router, FIRST, FIRST, SECOND)], seed).distances["jaccard"]
        for seed in range(20)
    ]
    # One pair of the three, by the seed.
    assert {each for ((each,),) in found} == {0.0, 0.666667}


ROWS = st.integers(1, 6)


@given(ROWS, ROWS, st.integers(0, 2**16))
@settings(deadline=None)
def test_distances_are_those_of_a_slow_loop(many: int, others: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    one, two = (
        torch.randint(-2, 3, (count, 4), generator=generator).float() for count in (many, others)
    )
    one[:, 0] = two[:, 0] = 1  # sets are not empty
    apart, turned = jaccard(one > 0, two > 0), cosine(one, two)
    for i, row in enumerate(one.tolist()):
        for j, other in enumerate(two.tolist()):
            first = {place for place, number in enumerate(row) if number > 0}
            second = {place for place, number in enumerate(other) if number > 0}
            expected = 1 - len(first & second) / len(first | second)
            assert float(apart[i, j]) == pytest.approx(expected)
            product = sum(a * b for a, b in zip(row, other, strict=True))
            norms = sum(a * a for a in row) ** 0.5 * sum(b * b for b in other) ** 0.5
            assert float(turned[i, j]) == pytest.approx(1 - product / norms, abs=1e-12)


def test_rows_of_zeros_are_the_same_and_far_from_all_others() -> None:
    logits = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    assert cosine(logits, logits).tolist() == [[0.0, 1.0], [1.0, 0.0]]


# Whether it routes at all


def test_a_router_that_gives_all_queries_the_same_is_called_static() -> None:
    router = by_hand([LOGITS[0]] * 3)
    found = inspection(use(router, FIRST, SECOND), use(router, THIRD, name="there"), router=router)
    assert found.is_static is True
    verdict = "All 3 queries get the same heads with the same weights: this router is static."
    assert found.verdict() == verdict
    assert shown(found)[-1] == verdict
    assert found.distances == {"jaccard": [[0.0, 0.0], [0.0, None]]} | {
        "cosine": [[0.0, 0.0], [0.0, None]]
    }


def test_gates_that_are_always_the_same_are_called_static() -> None:
    logits = [[2.0, 1.0, -1.0, -1.0], [9.0, 8.0, -3.0, -1.0], [2.0, 0.1, -1.0, -9.0]]
    router = by_hand(logits, reading="gates")
    found = inspection(use(router, FIRST, SECOND, THIRD), router=router)
    assert found.is_static is True


def test_votes_that_differ_by_rounding_alone_are_called_static() -> None:
    generator = torch.Generator().manual_seed(0)
    anchors = torch.nn.functional.normalize(torch.randn(60, 3, generator=generator))
    bias = torch.rand(4, generator=generator)
    router = NeighbourRouter(
        heads=HEADS,
        space=replace(space(), anchors=anchors, familiar=(0.0, 9.0)),
        bias=bias,
        labels=bias.repeat(60, 1),
        neighbours=13,
    )
    found = inspection(use(router, *anchors[:20]), router=router)
    assert not torch.equal(found.uses[0].weights[0], bias)
    assert found.is_static is True


def test_a_router_that_only_weighs_differently_is_not_called_static() -> None:
    router = by_hand([[2.0, 1.0, 0.0, 0.0], [2.0, 1.1, 0.0, 0.0], [2.0, 1.0, 0.0, 0.0]])
    found = inspection(use(router, FIRST, SECOND, THIRD), router=router)
    assert found.is_static is False
    assert found.verdict() == "All 3 queries get the same heads; only their weights differ."


def test_a_router_that_routes_says_into_how_many_sets() -> None:
    found = inspection(use(by_hand(), FIRST, SECOND, FIRST))
    assert found.is_static is False
    assert found.verdict() == "3 queries get 2 different sets of heads."


def test_one_query_tells_nothing_and_no_query_less() -> None:
    alone = inspection(use(by_hand(), FIRST))
    assert alone.is_static is None
    assert alone.verdict() == ("One query does not tell whether this router is static; give more.")
    assert (inspection().is_static, inspection().verdict()) == (None, None)


# On the terminal


def test_the_terminal_shows_what_the_router_is() -> None:
    router = by_hand(
        bias=torch.tensor([0.0, -2.0, 0.5, 0.0]),
        max_heads=3,
        max_doc_tokens=120,
        description={"objective": "listwise", "held_out_ndcg@10": {"static": 0.4, "1.0": 0.5}},
    )
    lines = shown(inspection(router=router))
    assert [line for line in lines if line.strip("─")] == [
        "router my-router",
        "kind heads, read as weights",
        "LLM tiny",
        "layout parallel",
        "trained on some questions",
        "documents cut at 120 tokens",
        "signals log",
        "first-stage weight 0.5",
        "queries embedded after layer 1, mean; 1 anchors",
        "heads at most, P 3",
        "threshold 0",
        "heads to choose from 4, 2 with a weight of their own; 2 for unfamiliar queries",
        "depth layer 2 at most; 3 layers are loaded",
        "size 1.2 KB",
        "objective listwise",
        'held_out_ndcg@10 {"static": 0.4, "1.0": 0.5}',
        "Heads with the largest static bias",
        "head bias",
        "0-1 -2.0000",
        "1-0 +0.5000",
        "0-0 +0.0000",
        "2-1 +0.0000",
    ]


def test_what_is_not_recorded_is_said_to_be_so() -> None:
    router = by_hand(heads=HeadSet(HEADS), reading="gates")
    lines = shown(inspection(router=router))
    assert "LLM not recorded" in lines
    assert "layout any" in lines
    assert "documents cut at -" in lines
    assert "heads at most, P all" in lines
    assert "first-stage weight -" in lines


def test_the_terminal_shows_what_the_router_does() -> None:
    router = by_hand()
    here = use(router, FIRST, SECOND, THIRD)
    there = use(router, FIRST, STRANGE, name="there [x]")
    lines = shown(inspection(here, there))
    assert "head queries here there [x] mean weight static bias" in lines
    assert "0-0 100.0% 100.0% 100.0% +0.8000 +0.0000" in lines
    assert "2-1 20.0% 33.3% 0.0% +4.0000 +0.0000" in lines
    assert "here 3 3 2.0 2 2 2.0 1.000 0.0%" in lines
    assert "there [x] 2 2 1.5 1 2 1.0 0.500 50.0%" in lines
    assert "Mean distance of queries' sets of heads (Jaccard)" in lines
    assert "here 0.6667 0.4722" in lines
    assert "there [x] 0.4722 0.5000" in lines
    assert "Mean distance of queries' weights (cosine)" in lines
    assert lines[-1] == "5 queries get 4 different sets of heads."


def test_one_collection_needs_no_matrix_and_one_query_has_no_distance() -> None:
    router = by_hand(reading="gates")
    lines = shown(inspection(use(router, FIRST), router=router))
    assert "head queries static bias" in lines
    assert "here -" in lines
    assert "Mean distance of queries' weights (cosine)" not in lines


def test_no_more_than_twenty_heads_are_shown() -> None:
    many = [(layer, index) for layer in range(6) for index in range(5)]
    router = by_hand(
        heads=replace(HEADS, heads=many),
        bias=torch.arange(30.0) + 1,
        embeddings=torch.zeros(30, 3),
    )
    heads = [str(head) for head in router.heads]
    for found in (inspection(router=router), inspection(use(router, FIRST), router=router)):
        named = [line.split()[0] for line in shown(found) if line]
        assert [name for name in named if name in heads] == heads[:9:-1]


# From a folder, with an LLM


TOPICS = {f"q{n}": f"{what} {n}?" for n, what in enumerate(["who", "where is", "why"] * 5)}


@pytest.fixture(scope="module")
def llm(model: str) -> FrozenLM:
    return FrozenLM.from_pretrained(model, dtype="float32")


@pytest.fixture(scope="module")
def trained(llm: FrozenLM) -> Router:
    """For the tiny LLM, with numbers drawn at random."""
    fitted = QuerySpace.fit(llm.embed(list(TOPICS.values())[::2], layer=2), 2, coordinates=4)
    generator = torch.Generator().manual_seed(0)
    return HeadRouter(
        heads=replace(HEADS, model=llm.name),
        space=fitted,
        bias=torch.randn(4, generator=generator),
        projection=torch.randn(2, 4, generator=generator) * 3,
        embeddings=torch.randn(4, 2, generator=generator),
        threshold=0.8,
    )


@pytest.fixture
def folder(trained: Router, tmp_path: Path) -> str:
    trained.save_pretrained(tmp_path / "router")
    return str(tmp_path / "router")


def topics_at(path: Path, topics: dict[str, str] = TOPICS) -> Path:
    """A folder with nothing but queries."""
    path.mkdir()
    rows = [json.dumps({"_id": key, "text": text}) for key, text in topics.items()]
    (path / "queries.jsonl").write_text("\n".join(rows))
    return path


def inspected(folder: str, *collections: Path, seed: int = 0, **changed: Any) -> Inspection:
    arguments = InspectArguments(folder, list(collections) or None, **changed)
    return inspect_router(arguments, RerankerOptions(dtype="float32"), seed)


def test_queries_are_routed_as_the_router_routes_them(
    folder: str, trained: Router, llm: FrozenLM, tmp_path: Path
) -> None:
    found = inspected(folder, topics_at(tmp_path / "here"))
    assert found.size == (Path(folder) / "model.safetensors").stat().st_size
    (routed,) = found.uses
    expected = trained.select_all(list(TOPICS.values()), llm)
    assert len({heads.heads for heads in expected}) > 1
    for heads, read, weights in zip(expected, routed.read, routed.weights, strict=True):
        places = [HEADS.heads.index(head) for head in heads]
        assert read.nonzero()[:, 0].tolist() == sorted(places)
        assert weights[places].tolist() == pytest.approx(heads.recipe.weights, abs=1e-4)


def test_a_router_that_tells_no_queries_apart_is_inspected_as_deep_as_it_embeds(
    folder: str, trained: Router, tmp_path: Path
) -> None:
    static = replace(
        cast(HeadRouter, trained),
        heads=replace(trained.heads, heads=list(HEADS)[:2]),
        bias=trained.bias[:2],
        embeddings=torch.zeros(2, 2),
    )
    assert static.layers(9) < static.space.layer
    static.save_pretrained(tmp_path / "static")
    here = topics_at(tmp_path / "here")
    (found,) = inspected(str(tmp_path / "static"), here).uses
    (routed,) = inspected(folder, here).uses
    assert found.familiarity.tolist() == pytest.approx(routed.familiarity.tolist(), abs=1e-4)


def test_some_queries_are_drawn_by_the_seed(folder: str, tmp_path: Path) -> None:
    here = topics_at(tmp_path / "here")
    found = [inspected(folder, here, queries=4, seed=seed).uses for seed in (0, 0, 1)]
    logits = [use.logits for (use,) in found]
    assert len(logits[0]) == 4
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_drawn_queries_keep_their_order() -> None:
    texts = list(TOPICS.values())
    drawn = sampled(TOPICS, 6, "0 here")
    assert len(set(drawn)) == 6
    assert drawn == sorted(drawn, key=texts.index)
    assert sampled(TOPICS, None, "0") == sampled(TOPICS, 15, "0") == sampled(TOPICS, 99, "0")


def test_the_bundled_queries_are_routed_by_default(folder: str) -> None:
    (routed,) = inspected(folder).uses
    assert (routed.name, len(routed.read)) == ("bundled", 80)


def test_without_queries_no_llm_is_loaded(
    folder: str, trained: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "load_llm", None)
    found = inspected(folder, queries=0)
    assert found.uses == []
    assert found.static == trained.choose(trained.bias)
    assert "Heads with the largest static bias" in shown(found)


def test_the_llm_is_the_one_that_the_router_was_trained_for(
    folder: str, model: str, tmp_path: Path
) -> None:
    here = topics_at(tmp_path / "here")
    routed = inspected(folder, here).uses[0]
    named = inspected(folder, here, model=model).uses[0]
    assert torch.equal(routed.logits, named.logits)


def test_another_llm_is_refused_by_both_names(trained: Router, model: str, tmp_path: Path) -> None:
    router = replace(trained, heads=replace(trained.heads, model="org/other"))
    wide: dict[str, Any] = {
        "mean": torch.zeros(7),
        "deviation": torch.ones(7),
        "basis": torch.ones(7, 4),
    }
    found = replace(router, space=replace(router.space, **wide, anchors=torch.ones(2, 7)))
    found.save_pretrained(tmp_path / "router")
    with pytest.raises(RouterMismatchError) as error:
        inspected(str(tmp_path / "router"), topics_at(tmp_path / "here"), model=model)
    assert "trained for 'org/other'" in str(error.value)
    assert repr(model) in str(error.value)


def test_a_router_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError):
        inspected(str(tmp_path / "none"))


def test_the_json_holds_every_figure(folder: str, tmp_path: Path) -> None:
    here, there = topics_at(tmp_path / "here"), topics_at(tmp_path / "there", {"1": "who?"})
    output = tmp_path / "made" / "out.json"
    found = inspected(folder, here, there, output=output)
    written = json.loads(output.read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(found.as_json()))
    assert list(written["collections"]) == ["here", "there"]
    assert written["verdict"] == found.verdict()
    assert written["distances"]["cosine"]["there"]["there"] is None


KNOWN_FACTS = {
    "router": "my-router",
    "kind": "heads",
    "model": "tiny",
    "layout": "parallel",
    "data": "some questions",
    "aggregation": "log",
    "first_stage_weight": 0.5,
    "reading": "weights",
    "threshold": 0.0,
    "max_heads": None,
    "max_doc_tokens": None,
    "embedding_layer": 1,
    "embedding_pooling": "mean",
    "embedding_source": "query",
    "anchors": 1,
    "bytes": 1234,
    "candidate_heads": 4,
    "nonzero_bias": 1,
    "static_heads": 1,
    "deepest_layer": 2,
}
HALF = {"share": 0.5, "mean_weight": 1.0, "bias": 0.0, "collections": {"here": 0.5}}
KNOWN_FIGURES = {
    "queries": 2,
    "head_sets": 2,
    "heads_mean": 2.0,
    "heads_min": 2,
    "heads_max": 2,
    "layers_mean": 1.5,
    "familiarity": 1.0,
    "wholly_static": 0.0,
}


def test_the_json_of_a_known_router_is_known() -> None:
    router = by_hand(bias=torch.tensor([0.0, 0.0, 0.0, 0.25]), description={"queries": 3})
    router = replace(router, embeddings=router.embeddings - router.bias[:, None])
    found = inspection(use(router, FIRST, SECOND), router=router).as_json()
    assert found == {
        **KNOWN_FACTS,
        "description": {"queries": 3},
        "static": [{"head": "2-1", "bias": 0.25}],
        "is_static": False,
        "verdict": "2 queries get 2 different sets of heads.",
        "collections": {"here": KNOWN_FIGURES},
        "heads": [
            {"head": "0-0", **HALF, "share": 1.0, "mean_weight": 2.0, "collections": {"here": 1.0}},
            {"head": "0-1", **HALF},
            {"head": "1-0", **HALF},
        ],
        "compared_queries": 500,
        "distances": {
            "jaccard": {"here": {"here": 0.666667}},
            "cosine": {"here": {"here": 0.2}},
        },
    }


# The plot


@pytest.mark.parametrize(
    ("name", "start"), [("heads.svg", b"<?xml"), ("heads.png", b"\x89PNG"), ("heads.SVG", b"<?xml")]
)
def test_the_plot_is_the_same_file_for_the_same_figures(
    folder: str, tmp_path: Path, name: str, start: bytes
) -> None:
    pytest.importorskip("matplotlib")
    here, there = topics_at(tmp_path / "here"), topics_at(tmp_path / "$a_b$ & c", {"1": "who?"})
    first, second = tmp_path / "made" / name, tmp_path / name
    for path in (first, second):
        inspected(folder, here, there, plot=path)
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes().startswith(start)
    if start == b"<?xml":
        drawn = first.read_text(encoding="utf-8")
        assert "here: 15 queries" in drawn
        assert "$a_b$ &amp; c: 1 queries" in drawn
        assert "dc:date" not in drawn


def test_shares_lie_by_layer_and_head() -> None:
    cells = command._grid(HEADS, torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64))
    assert cells.nan_to_num(-1).tolist() == [
        pytest.approx([0.1, 0.3, -1]),
        pytest.approx([0.2, -1, 0.4]),
    ]


def test_without_matplotlib_the_extra_is_named_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError) as error:
        inspected("none", plot=tmp_path / "heads.svg")
    assert str(error.value) == (
        "package 'matplotlib' is not installed; run: pip install \"routehead-plugins[plot]\""
    )


# What is refused


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"queries": -1}, "--queries=-1 must be 0 or more."),
        (
            {"plot": Path("heads.pdf")},
            "--plot=heads.pdf has an unsupported format; use .svg or .png.",
        ),
        (
            {"plot": Path("heads.svg"), "queries": 0},
            "--queries=0 leaves nothing to draw; give more, or leave out --plot.",
        ),
        ({"plot": Path("/")}, "--plot=/ is a folder; name a file."),
        ({"output": Path("/")}, "--output=/ is a folder; name a file."),
        (
            {"collection": [Path("a/nq"), Path("b/nq")]},
            "two collections are called 'nq'; give each once, or rename one.",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(
    changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as error:
        inspect_router(InspectArguments("none", **changed), RerankerOptions())
    assert str(error.value) == message


def test_queries_that_are_missing_are_refused_before_the_llm_is_loaded(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "load_llm", None)
    with pytest.raises(CollectionError) as error:
        inspected(folder, tmp_path / "none")
    assert str(error.value).startswith(f"{tmp_path / 'none' / 'queries.jsonl'} does not exist; ")
    empty = topics_at(tmp_path / "empty", {})
    with pytest.raises(CollectionError) as error:
        inspected(folder, empty)
    assert str(error.value) == (
        f"{empty / 'queries.jsonl'} contains no queries; give a folder with queries to route."
    )
