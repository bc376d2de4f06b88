"""Names and options become selectors: heads, a router, or the router of the library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from routehead_plugins import HeadSet, Recipe
from routehead_plugins.errors import HeadError, InputError, ModelLoadError
from routehead_plugins.files import show_path
from routehead_plugins.options import RerankerOptions
from routehead_plugins.selection import names
from routehead_plugins.selection.names import (
    as_selector,
    choose_selector,
    shipped_router,
    split_methods,
)
from routehead_plugins.selection.published import published_heads
from routehead_plugins.selection.query_space import QuerySpace
from routehead_plugins.selection.router import HeadRouter, Router
from routehead_plugins.selection.selectors import AllHeads, FixedHeads, LayerInterval, Selector

SMOL = "smollm2-135m-instruct"


def make(model: str = "embedded", bias: float = 1.0) -> Router:
    return HeadRouter(
        heads=HeadSet(
            [(0, 1), (2, 3)], model=model, layout="parallel", recipe=Recipe(aggregation="log")
        ),
        space=QuerySpace.fit(torch.eye(3), 1),
        bias=torch.tensor([bias, -2.0]),
        projection=torch.zeros(1, 2),
        embeddings=torch.zeros(2, 1),
    )


def choose(model: str = "embedded", heads: Any = None, router: Any = None, **more: Any) -> Selector:
    return choose_selector(RerankerOptions(model, heads, router, **more))


@pytest.fixture(autouse=True)
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the routers that come with the library; it does not exist yet."""
    folder = tmp_path / "shipped"
    monkeypatch.setattr(names, "SHIPPED", folder)
    return folder


@pytest.fixture
def smol(shipped: Path) -> Path:
    make(bias=7.0).save_pretrained(shipped / SMOL)
    make(bias=8.0).save_pretrained(shipped / "another-llm")
    (shipped / "README.md").write_text("Routers.")
    return shipped / SMOL


def is_shipped(selector: object) -> bool:
    return isinstance(selector, Router) and selector.bias.tolist() == [7.0, -2.0]


# Heads


@pytest.mark.parametrize(
    ("heads", "selector"),
    [
        (None, AllHeads()),
        ("all", AllHeads()),
        ("layers", LayerInterval()),
        ("layers:10-19", LayerInterval(10, 19)),
        ("13-18,13-1", FixedHeads(HeadSet([(13, 18), (13, 1)]))),
        (" 13-18 , 13-1 ", FixedHeads(HeadSet([(13, 18), (13, 1)]))),
        (HeadSet([(1, 2)], method="qr"), FixedHeads(HeadSet([(1, 2)], method="qr"))),
        ([(1, 2), (0, 0)], FixedHeads(HeadSet([(1, 2), (0, 0)]))),
    ],
    ids=str,
)
def test_heads_can_be_asked_for_in_many_ways(heads: Any, selector: Selector) -> None:
    assert as_selector(heads) == selector


@pytest.mark.parametrize("kind", [str, Path])
def test_heads_can_be_asked_for_by_file(tmp_path: Path, kind: type) -> None:
    path = tmp_path / "heads.json"
    HeadSet([(1, 2)], model="tiny", scores=[0.5]).save(path)
    assert as_selector(kind(path)) == FixedHeads(HeadSet([(1, 2)], model="tiny", scores=[0.5]))


def test_a_path_is_a_path_whatever_it_looks_like(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    HeadSet([(1, 2)]).save("3-4")
    assert as_selector(Path("3-4")) == FixedHeads(HeadSet([(1, 2)]))
    assert as_selector("3-4") == FixedHeads(HeadSet([(3, 4)]))


@pytest.mark.parametrize("name", ["qr:Llama-3.1-8B-Instruct", "core:Phi-4", "CoRe:microsoft/phi-4"])
def test_published_heads_can_be_asked_for_by_name(name: str) -> None:
    assert as_selector(name) == FixedHeads(published_heads(name))


def test_a_published_set_that_does_not_exist_is_not_taken_for_a_file() -> None:
    with pytest.raises(HeadError) as error:
        as_selector("qr:Llama-3.1-8B-Instrukt")
    assert "is not a published head set; did you mean qr:Llama-3.1-8B-Instruct" in str(error.value)


WRONG = ["13-18;13-1", "no/such/file.json", "layers:3", "layers:a-b", "ALL", "", ".", "1-2,", "C:x"]


# A list of every head with one mistake in it is longer than a file name may be.
@pytest.mark.parametrize("heads", [*WRONG, Path("no-file"), "1-1," * 200 + "1_2"])
def test_a_text_that_names_no_heads_is_refused(heads: str | Path) -> None:
    with pytest.raises(HeadError) as error:
        as_selector(heads)
    assert str(error.value) == (
        f"heads='{show_path(heads)}' is neither a list of heads nor a file; "
        'give "all", "layers:10-19", "13-18,13-1", "qr:Llama-3.1-8B-Instruct" '
        "or the path of a head-set file."
    )


@pytest.mark.parametrize("heads", [5, [1, 2], ["1-2"], [(1, 2, 3)], [("a", "b")]], ids=str)
def test_a_value_that_names_no_heads_is_refused(heads: Any) -> None:
    with pytest.raises(HeadError):
        as_selector(heads)


@pytest.mark.parametrize(
    ("heads", "selector"),
    [
        ("all", AllHeads()),
        ("layers:1-2", LayerInterval(1, 2)),
        ("1-2,0-3", FixedHeads(HeadSet.parse("1-2,0-3"))),
        ([(1, 2)], FixedHeads(HeadSet([(1, 2)]))),
        (HeadSet([(1, 2)], method="qr"), FixedHeads(HeadSet([(1, 2)], method="qr"))),
    ],
    ids=str,
)
@pytest.mark.usefixtures("smol")
def test_heads_win_over_the_router_of_the_library(heads: Any, selector: Any) -> None:
    assert choose("embedded", heads) == selector


@pytest.mark.parametrize("kind", [str, Path])
def test_heads_may_lie_in_a_file(tmp_path: Path, kind: type) -> None:
    HeadSet([(1, 2)], layout="parallel").save(tmp_path / "heads.json")
    expected = FixedHeads(HeadSet([(1, 2)], layout="parallel"))
    assert choose("embedded", kind(tmp_path / "heads.json")) == expected


def test_misspelled_heads_are_refused() -> None:
    for heads in ("route", "Routed", "1-2;3-4"):
        with pytest.raises(HeadError, match="is neither a list of heads nor a file"):
            choose("embedded", heads)


# A router


def test_a_router_is_taken_as_it_is() -> None:
    router = make()
    assert choose("embedded", router=router) is router
    # A layout that does not fit is refused by the re-ranker.
    assert choose("embedded", router=router, layout="sequential") is router


@pytest.mark.parametrize("kind", [str, Path])
def test_a_router_may_lie_in_a_folder(tmp_path: Path, kind: type) -> None:
    make(bias=3.0).save_pretrained(tmp_path / "mine")
    for arguments in (
        {"router": kind(tmp_path / "mine")},
        {"heads": f"routed:{tmp_path / 'mine'}"},
    ):
        router = choose("embedded", **arguments)
        assert isinstance(router, HeadRouter)
        assert router.bias.tolist() == [3.0, -2.0]


@pytest.mark.parametrize("local", [False, True])
def test_the_hub_is_not_asked_with_local_files_only(
    monkeypatch: pytest.MonkeyPatch, local: bool
) -> None:
    loaded = []

    def load(name: str, **options: Any) -> Router:
        loaded.append((name, options))
        return make()

    monkeypatch.setattr(Router, "from_pretrained", load)
    options = {"local_files_only": local, "token": "hf_own", "cache_dir": "cache"}
    choose("embedded", router="me/mine", **options)
    choose("embedded", "routed:me/mine", **options)
    assert loaded == [("me/mine", options)] * 2


def test_a_router_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    missing = str(tmp_path / "no")
    for heads, router in ((None, missing), (f"routed:{missing}", None)):
        with pytest.raises(ModelLoadError, match="is not a folder; give the one that"):
            choose("embedded", heads, router)


@pytest.mark.parametrize(
    ("heads", "router", "given"),
    [
        ("all", "mine", "router='mine'"),
        ("1-2", Path("mine"), "router='mine'"),
        ("routed", "mine", "router='mine'"),
        ("routed:other", "mine", "router='mine'"),
        ("all", make(), "router"),
        ("routed", make(), "router"),
    ],
    ids=str,
)
def test_heads_and_a_router_together_are_refused_in_one_line(
    heads: str, router: Any, given: str
) -> None:
    with pytest.raises(InputError) as error:
        choose("embedded", heads, router)
    assert str(error.value) == (
        f"heads={heads!r} and {given} both choose heads; leave one of them out."
    )


# The router that comes with the library

NAMES = ["embedded", "HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct", SMOL]


@pytest.mark.parametrize("model", NAMES)
@pytest.mark.usefixtures("smol")
def test_the_router_that_comes_with_the_library_is_found_by_every_name_of_its_llm(
    model: str,
) -> None:
    for selector in (
        choose(model),
        choose(model, layout="parallel"),
        choose(model, "routed"),
    ):
        assert is_shipped(selector)


@pytest.mark.usefixtures("smol")
def test_other_llms_read_every_head() -> None:
    for model in ("HuggingFaceTB/SmolLM2-360M-Instruct", "Qwen/Qwen3-0.6B"):
        assert choose(model) == AllHeads()
        with pytest.raises(InputError) as error:
            choose(model, "routed")
        assert str(error.value) == (
            f"no router comes with the library for {model!r}; train one (routehead train) and give "
            'its folder, or heads="all".'
        )


def test_where_no_router_comes_with_the_library_every_head_is_read(shipped: Path) -> None:
    assert shipped_router("embedded") is None
    shipped.mkdir()
    assert choose("embedded") == AllHeads()
    (shipped / SMOL).write_text("no folder")
    assert choose("embedded") == AllHeads()


def test_a_folder_of_the_same_name_may_hold_any_llm(
    smol: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    local = tmp_path / "llms" / "SmolLM2-135M-Instruct"
    local.mkdir(parents=True)
    for model in (str(local), "llms/SmolLM2-135M-Instruct", "~/llms/SmolLM2-135M-Instruct"):
        assert choose(model) == AllHeads()
        with pytest.raises(InputError, match="no router comes with the library for"):
            choose(model, "routed")
    assert choose(str(local), f"routed:{smol}") != AllHeads()


@pytest.mark.usefixtures("smol")
def test_what_lies_in_the_working_folder_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (SMOL, "another-llm", "embedded"):
        (tmp_path / name).mkdir()
    assert shipped_router("Qwen/Qwen3-0.6B") is None
    assert is_shipped(choose("embedded"))


@pytest.mark.usefixtures("smol")
def test_in_another_layout_every_head_is_read_unless_the_router_is_named() -> None:
    assert choose("embedded", layout="sequential") == AllHeads()
    assert is_shipped(choose("embedded", "routed", layout="sequential"))


# Methods of an evaluation


@pytest.mark.parametrize(
    ("text", "methods"),
    [
        ("bm25,all", ["bm25", "all"]),
        ("bm25, 13-18,13-1 ,all", ["bm25", "13-18,13-1", "all"]),
        ("13-18,all,13-1", ["13-18", "all", "13-1"]),
        ("1-1,2-2+bm25", ["1-1,2-2+bm25"]),
    ],
)
def test_neighbouring_heads_are_one_method(text: str, methods: list[str]) -> None:
    assert split_methods(text) == methods


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" ,", '--methods names no method; give some, such as "bm25,all,layers".'),
        ("all,bm25,all", "method 'all' is named twice; name each method once."),
    ],
)
def test_unclear_methods_are_refused(text: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        split_methods(text)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "heads", ["x" * 9999, "layers:1-" + "9" * 5000, "1-" + "9" * 5000], ids=len
)
def test_a_message_about_heads_is_short(heads: str) -> None:
    with pytest.raises(HeadError) as error:
        as_selector(heads)
    assert len(str(error.value)) < 300


def test_heads_may_be_an_array_of_pairs() -> None:
    pairs: Any = np.array([[1, 2], [0, 3]])
    assert as_selector(pairs) == FixedHeads(HeadSet([(1, 2), (0, 3)]))
