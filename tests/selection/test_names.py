"""Which selector is meant: heads, a router, or the router that comes with the library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from routehead_plugins import HeadSet
from routehead_plugins.errors import HeadError, InputError, ModelLoadError
from routehead_plugins.selection import names as selection
from routehead_plugins.selection.names import choose_selector, shipped_router
from routehead_plugins.selection.query_space import QuerySpace
from routehead_plugins.selection.router import HeadRouter, Router
from routehead_plugins.selection.selectors import AllHeads, FixedHeads, LayerInterval

SMOL = "smollm2-135m-instruct"


def make(model: str = "embedded", bias: float = 1.0) -> Router:
    return HeadRouter(
        heads=HeadSet([(0, 1), (2, 3)], model=model, layout="parallel", aggregation="log"),
        space=QuerySpace.fit(torch.eye(3), 1),
        bias=torch.tensor([bias, -2.0]),
        projection=torch.zeros(1, 2),
        embeddings=torch.zeros(2, 1),
    )


@pytest.fixture(autouse=True)
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where routers that come with the library lie; nothing yet."""
    folder = tmp_path / "shipped"
    monkeypatch.setattr(selection, "SHIPPED", folder)
    return folder


@pytest.fixture
def smol(shipped: Path) -> Path:
    make(bias=7.0).save_pretrained(shipped / SMOL)
    make(bias=8.0).save_pretrained(shipped / "another-llm")
    (shipped / "README.md").write_text("Routers.")
    return shipped / SMOL


def is_shipped(selector: object) -> bool:
    return isinstance(selector, Router) and selector.bias.tolist() == [7.0, -2.0]


# heads


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
def test_heads_are_taken_before_a_router_that_nobody_named(heads: Any, selector: Any) -> None:
    assert choose_selector("embedded", heads) == selector


@pytest.mark.parametrize("kind", [str, Path])
def test_heads_may_lie_in_a_file(tmp_path: Path, kind: type) -> None:
    HeadSet([(1, 2)], layout="parallel").save(tmp_path / "heads.json")
    expected = FixedHeads(HeadSet([(1, 2)], layout="parallel"))
    assert choose_selector("embedded", kind(tmp_path / "heads.json")) == expected


def test_misspelled_heads_are_refused() -> None:
    for heads in ("route", "Routed", "1-2;3-4"):
        with pytest.raises(HeadError, match="is neither a list of heads nor a file"):
            choose_selector("embedded", heads)


# a router


def test_a_router_is_taken_as_it_is() -> None:
    router = make()
    assert choose_selector("embedded", router=router) is router
    # Whoever composes the re-ranker complains of a layout that was asked for on purpose.
    assert choose_selector("embedded", router=router, layout="sequential") is router


@pytest.mark.parametrize("kind", [str, Path])
def test_a_router_may_lie_in_a_folder(tmp_path: Path, kind: type) -> None:
    make(bias=3.0).save_pretrained(tmp_path / "mine")
    for arguments in (
        {"router": kind(tmp_path / "mine")},
        {"heads": f"routed:{tmp_path / 'mine'}"},
    ):
        found = choose_selector("embedded", **arguments)
        assert isinstance(found, HeadRouter)
        assert found.bias.tolist() == [3.0, -2.0]


@pytest.mark.parametrize("local", [False, True])
def test_the_hub_is_asked_only_where_it_may_be(
    monkeypatch: pytest.MonkeyPatch, local: bool
) -> None:
    asked = []

    def load(name: str, *, local_files_only: bool = False) -> Router:
        asked.append((name, local_files_only))
        return make()

    monkeypatch.setattr(Router, "from_pretrained", load)
    choose_selector("embedded", router="me/mine", local_files_only=local)
    choose_selector("embedded", "routed:me/mine", local_files_only=local)
    assert asked == [("me/mine", local)] * 2


def test_a_router_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    missing = str(tmp_path / "no")
    for heads, router in ((None, missing), (f"routed:{missing}", None)):
        with pytest.raises(ModelLoadError, match="is not a folder; give the one that"):
            choose_selector("embedded", heads, router)


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
        choose_selector("embedded", heads, router)
    assert str(error.value) == (
        f"heads={heads!r} and {given} both choose heads; leave one of them out."
    )


# the router that comes with the library

NAMES = ["embedded", "HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct", SMOL]


@pytest.mark.parametrize("model", NAMES)
@pytest.mark.usefixtures("smol")
def test_the_router_that_comes_with_the_library_is_found_by_every_name_of_its_llm(
    model: str,
) -> None:
    for selector in (
        choose_selector(model),
        choose_selector(model, layout="parallel"),
        choose_selector(model, "routed"),
    ):
        assert is_shipped(selector)


@pytest.mark.usefixtures("smol")
def test_other_llms_read_every_head() -> None:
    for model in ("HuggingFaceTB/SmolLM2-360M-Instruct", "Qwen/Qwen3-0.6B"):
        assert choose_selector(model) == AllHeads()
        with pytest.raises(InputError) as error:
            choose_selector(model, "routed")
        assert str(error.value) == (
            f"no router comes with the library for {model!r}; train one (routehead train) and give "
            'its folder, or heads="all".'
        )


def test_where_no_router_comes_with_the_library_every_head_is_read(shipped: Path) -> None:
    assert shipped_router("embedded") is None
    shipped.mkdir()
    assert choose_selector("embedded") == AllHeads()
    (shipped / SMOL).write_text("no folder")
    assert choose_selector("embedded") == AllHeads()


def test_a_folder_of_the_same_name_may_hold_any_llm(
    smol: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    local = tmp_path / "llms" / "SmolLM2-135M-Instruct"
    local.mkdir(parents=True)
    for model in (str(local), "llms/SmolLM2-135M-Instruct", "~/llms/SmolLM2-135M-Instruct"):
        assert choose_selector(model) == AllHeads()
        with pytest.raises(InputError, match="no router comes with the library for"):
            choose_selector(model, "routed")
    assert choose_selector(str(local), f"routed:{smol}") != AllHeads()


@pytest.mark.usefixtures("smol")
def test_what_lies_in_the_working_folder_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (SMOL, "another-llm", "embedded"):
        (tmp_path / name).mkdir()
    assert shipped_router("Qwen/Qwen3-0.6B") is None
    assert is_shipped(choose_selector("embedded"))


@pytest.mark.usefixtures("smol")
def test_in_another_layout_every_head_is_read_unless_the_router_is_named() -> None:
    assert choose_selector("embedded", layout="sequential") == AllHeads()
    assert is_shipped(choose_selector("embedded", "routed", layout="sequential"))
