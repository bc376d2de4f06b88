"""Routers in folders and on the Hub: what is saved comes back, what is damaged is refused."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from routers import HEADS, KINDS, LAYER, QUERIES, by_hand, fixed, make, random
from safetensors.torch import load_file, save_file
from torch import Tensor

from routehead_plugins import FrozenLM
from routehead_plugins.errors import (
    InputError,
    ModelLoadError,
)
from routehead_plugins.selection import router_files as files
from routehead_plugins.selection.neighbours import NeighbourRouter
from routehead_plugins.selection.query_space import QuerySpace
from routehead_plugins.selection.router import HeadRouter, Router
from routehead_plugins.selection.router_files import router_size


def same(router: Router, other: Router) -> bool:
    """Whether two routers are the same in everything."""

    def equal(one: Any, two: Any) -> bool:
        if isinstance(one, QuerySpace):
            return all(equal(getattr(one, f.name), getattr(two, f.name)) for f in fields(one))
        return torch.equal(one, two) if isinstance(one, Tensor) else bool(one == two)

    names = [field.name for field in fields(router)]
    return type(router) is type(other) and all(
        equal(getattr(router, name), getattr(other, name)) for name in names
    )


@pytest.mark.parametrize("kind", [Router, HeadRouter, NeighbourRouter])
def test_a_saved_router_comes_back_as_it_was_by_any_of_the_classes(
    kind: type[Router], router: Router, llm: FrozenLM, tmp_path: Path
) -> None:
    router = replace(router, max_heads=3, max_doc_tokens=120, description={"nDCG@10": [0.5, None]})
    router.save_pretrained(tmp_path / "a" / "router")
    loaded = kind.from_pretrained(tmp_path / "a" / "router")
    assert same(loaded, router)
    embeddings = llm.embed(QUERIES, layer=LAYER)
    assert torch.equal(loaded.logits(embeddings), router.logits(embeddings))
    assert loaded.select("who has h?", llm) == router.select("who has h?", llm)
    assert sorted(p.name for p in (tmp_path / "a" / "router").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-1, 1) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=4,
)


@given(
    kind=st.sampled_from(KINDS),
    reading=st.sampled_from(["gates", "weights"]),
    threshold=st.floats(allow_nan=False, allow_infinity=False),
    most=st.none() | st.integers(1, 2**40),
    cut=st.none() | st.integers(1, 2**40),
    description=st.none() | st.dictionaries(st.text(), JSON, max_size=3),
    named=st.tuples(*[st.none() | st.text()] * 3),
    weight=st.none() | st.floats(0, 1e30),
)
@settings(max_examples=25, deadline=None)
def test_all_settings_come_back(
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    reading: str,
    threshold: float,
    most: int | None,
    cut: int | None,
    description: dict[str, Any] | None,
    named: tuple[str | None, str | None, str | None],
    weight: float | None,
) -> None:
    folder = tmp_path_factory.getbasetemp() / "router-recorded"
    model, layout, data = named
    recipe = replace(HEADS.recipe, first_stage_weight=weight)
    router = make(
        kind,
        by_hand(),
        heads=replace(HEADS, recipe=recipe, model=model, layout=layout, data=data),
        reading=reading,
        threshold=threshold,
        max_heads=most,
        max_doc_tokens=cut,
        description=description,
    )
    router.save_pretrained(folder)
    assert same(Router.from_pretrained(str(folder)), router)


def test_a_folder_holds_what_the_documentation_says(tmp_path: Path) -> None:
    router = make("neighbours", by_hand(), description={"queries": 7}, max_heads=3)
    router.save_pretrained(tmp_path, card="# A card\n")
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) == {
        "format": "routehead-router",
        "version": 1,
        "kind": "neighbours",
        "model": "tiny",
        "layout": "parallel",
        "data": "some questions",
        "calibration": "null query",
        "aggregation": "log",
        "first_stage_weight": 0.5,
        "max_doc_tokens": None,
        "reading": "weights",
        "threshold": 0.0,
        "max_heads": 3,
        "embedding_layer": 2,
        "embedding_pooling": "mean",
        "embedding_source": "query",
        "familiar": [0.5, 2.0],
        "neighbours": 4,
        "description": {"queries": 7},
        "heads": ["0-1", "2-3", "1-0", "2-0", "0-3"],
    }
    tensors = load_file(tmp_path / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "mean": (3,),
        "deviation": (3,),
        "basis": (3, 3),
        "anchors": (1, 3),
        "bias": (5,),
        "labels": (1, 5),
    }
    half = [name for name, tensor in tensors.items() if tensor.dtype != torch.float32]
    assert half == ["anchors"]
    assert tensors["anchors"].dtype == torch.float16
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "# A card\n"


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_router_is_saved_byte_for_byte_as_it_was(
    kind: str, space: QuerySpace, tmp_path: Path
) -> None:
    # A coordinate that does not vary has an infinite deviation, which must come back as well.
    deviation = space.deviation.clone()
    deviation[1] = torch.inf
    router = make(kind, replace(space, deviation=deviation))
    router.save_pretrained(tmp_path / "first")
    loaded = Router.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    assert repr(loaded) == repr(router)
    for name in ("config.json", "model.safetensors"):
        first, second = (tmp_path / folder / name for folder in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()


def test_a_router_for_an_llm_of_576_coordinates_is_smaller_than_a_megabyte(tmp_path: Path) -> None:
    space = QuerySpace.fit(random(600, 576), LAYER, coordinates=32)
    make("heads", space).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 1_000_000


@pytest.mark.parametrize("source", ["query", "tail"])
def test_what_embeds_the_queries_is_kept(source: str, tmp_path: Path) -> None:
    make("heads", replace(by_hand(), source=source)).save_pretrained(tmp_path)
    assert Router.from_pretrained(tmp_path).space.source == source


def test_routers_of_before_it_was_recorded_embed_queries_alone(tmp_path: Path) -> None:
    make("heads", by_hand()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    del config["embedding_source"]
    path.write_text(json.dumps(config), encoding="utf-8")
    assert Router.from_pretrained(tmp_path).space.source == "query"


def test_a_card_is_only_replaced_by_another(tmp_path: Path) -> None:
    router = make("heads", by_hand())
    for card, expected in (("# One\n", "# One\n"), (None, "# One\n"), ("# Two\n", "# Two\n")):
        router.save_pretrained(tmp_path, card=card)
        assert (tmp_path / "README.md").read_text(encoding="utf-8") == expected


def test_slices_and_transposed_tensors_are_saved_alone(tmp_path: Path) -> None:
    projection = random(3, 1000).T[:2]
    router = make("heads", by_hand(), projection=projection, embeddings=random(5, 2))
    router.save_pretrained(tmp_path)
    assert same(Router.from_pretrained(tmp_path), router)
    assert (tmp_path / "model.safetensors").stat().st_size < 1500


def test_tensors_of_half_precision_are_read_as_float32(tmp_path: Path) -> None:
    make("neighbours", by_hand()).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)
    logits = Router.from_pretrained(tmp_path).logits(torch.eye(3))
    assert logits.dtype == torch.float32


# Folders that are damaged


def configured(**changed: Any) -> Callable[[Path], None]:
    """Change keys of the configuration."""

    def damage(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(config | changed), encoding="utf-8")

    return damage


def reshaped(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    """Change a tensor."""

    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        save_file(tensors | {name: change(tensors[name]).contiguous()}, path)

    return damage


def halved(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return damage


def replaced(content: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "config.json").write_bytes(content)

    return damage


def refused(folder: Path) -> str:
    """The one-line error about a folder, which it must name."""
    with pytest.raises(ModelLoadError) as error:
        Router.from_pretrained(folder)
    message = str(error.value)
    assert message.isprintable()
    assert len(message) < 300
    assert str(folder)[-70:] in message
    return message


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "config.json").unlink(), "FileNotFoundError"),
        (lambda folder: (folder / "model.safetensors").unlink(), "FileNotFoundError"),
        (halved("config.json"), "JSONDecodeError"),
        (halved("model.safetensors"), "SafetensorError"),
        (lambda folder: (folder / "config.json").write_text(""), "JSONDecodeError"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff{}"), "UnicodeDecodeError"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "SafetensorError"),
        (lambda folder: (folder / "config.json").write_text("[]"), 'lacks "format": '),
        (configured(format="routehead-heads"), 'lacks "format": "routehead-router"'),
        (configured(version=2), "has version 2; this release reads version 1"),
        (configured(kind="oracle"), "kind is 'oracle', not one of heads, neighbours"),
        (configured(kind=["heads"]), "TypeError"),
        (configured(reading="tea"), "reading='tea' is not one of gates, weights"),
        (configured(threshold="high"), "threshold='high' must be a finite number"),
        (configured(threshold=True), "threshold=True must be a finite number"),
        (configured(threshold=math.inf), "Infinity is not a JSON number"),
        (configured(threshold=10**400), "a number has 401 digits"),
        (configured(max_heads=0), "max_heads=0 is not a count"),
        (configured(max_heads="all"), "max_heads='all' is not a count"),
        (configured(max_doc_tokens=-1), "max_doc_tokens=-1 is not a count"),
        (configured(description=[1]), "TypeError: its description is not an object"),
        (configured(familiar=[0.1]), "ValueError"),
        (configured(familiar=[0.1, math.nan]), "NaN is not a JSON number"),
        (configured(familiar=[0.1, "0.5"]), "familiar='0.5' must be a finite number"),
        (configured(familiar="12"), "familiar='1' must be a finite number"),
        (configured(familiar=None), "TypeError"),
        (configured(embedding_layer="last"), "layer='last' must be a whole number from 0"),
        (configured(embedding_layer="1"), "layer='1' must be a whole number from 0"),
        (configured(embedding_layer=1.5), "layer=1.5 must be a whole number from 0"),
        (configured(embedding_layer=-1), "layer=-1 must be a whole number from 0 to 10,000"),
        (configured(embedding_layer=10**9), "must be a whole number from 0 to 10,000"),
        (configured(model=["x"]), "model=['x'] is a list"),
        (configured(version="x" * 999), "upgrade routehead-plugins"),
        (configured(kind="x" * 999), "kind is 'xxxxx"),
        (configured(reading="x" * 999), "reading='xxxxx"),
        (configured(heads="0-1"), "its heads are not a list"),
        (configured(heads={"0-1": 1}), "its heads are not a list"),
        (replaced(b"[" * 100_000), "nested deeper than 100 levels"),
        (replaced(b'{"format":' * 5000), "nested deeper than 100 levels"),
        (replaced(b'{"format": 1, "format": 1}'), "the key 'format' occurs twice"),
        (configured(embedding_pooling="median"), "InputError"),
        (configured(embedding_source="air"), "InputError"),
        (configured(embedding_source=["tail"]), "InputError"),
        (configured(heads=["0-1", "2-3", "1-0", "2-0"]), "expected (heads=4)"),
        (configured(heads=["0-1", "2-3", "1-0", "2-0", "0-1"]), "head 0-1 is given twice"),
        (configured(heads=[]), "'' is not a head"),
        (configured(heads=5), "TypeError"),
        (configured(aggregation="sum"), "aggregation='sum' does not exist"),
        (configured(first_stage_weight=-1), "first_stage_weight=-1 must be a finite number"),
        (configured(familiar=[0.5, 0.5]), "familiar=(0.5, 0.5) must be two increasing distances"),
        (reshaped("mean", lambda t: t[:2]), "the router's deviation has shape (3,)"),
        (reshaped("deviation", lambda t: t[:2]), "the router's deviation has shape (2,)"),
        (reshaped("deviation", lambda t: t * 0), "a deviation is not above 0"),
        (reshaped("deviation", lambda t: t * torch.nan), "a deviation is not above 0"),
        (reshaped("mean", lambda t: t[0]), "the router's mean has shape ()"),
        (reshaped("basis", lambda t: t[:, 0]), "the router's basis has shape (3,)"),
        (reshaped("anchors", lambda t: t[:, :2]), "the router's anchors has shape (1, 2)"),
        (reshaped("anchors", lambda t: t[:0]), "the router's anchors has shape (0, 3)"),
        (reshaped("bias", lambda t: t[:1]), "the router's bias has shape (1,)"),
        (reshaped("bias", lambda t: t[:, None]), "the router's bias has shape (5, 1)"),
        (reshaped("bias", lambda t: t.to(torch.int8)), "bias holds torch.int8, not floating-point"),
        (reshaped("mean", lambda t: t.to(torch.bool)), "mean holds torch.bool, not floating-point"),
        (reshaped("basis", lambda t: t.double() * 0 + 1e300), "a number that is not finite"),
        (reshaped("bias", lambda t: t / 0), "a number that is not finite"),
        (reshaped("anchors", lambda t: t * torch.nan), "a number that is not finite"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_folder_is_named_in_one_line(
    kind: str, damage: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    make(kind, by_hand()).save_pretrained(tmp_path)
    damage(tmp_path)
    assert said in refused(tmp_path)


@pytest.mark.parametrize(
    ("kind", "damage", "said"),
    [
        ("heads", reshaped("projection", lambda t: t[:2]), "expected (heads=5, d=2)"),
        ("heads", reshaped("projection", lambda t: t[:, :2]), "projection has shape (3, 2)"),
        ("heads", reshaped("embeddings", lambda t: t[:, :2]), "embeddings has shape (5, 2)"),
        ("heads", reshaped("embeddings", lambda t: t[:4]), "embeddings has shape (4, 3)"),
        ("heads", configured(kind="neighbours"), "lacks 'labels'"),
        ("neighbours", reshaped("labels", lambda t: t[:, :4]), "labels has shape (1, 4)"),
        ("neighbours", reshaped("labels", lambda t: t.repeat(2, 1)), "labels has shape (2, 5)"),
        ("neighbours", configured(neighbours=0), "neighbours=0 is not a count"),
        ("neighbours", configured(neighbours="few"), "neighbours='few' is not a count"),
        ("neighbours", configured(kind="heads"), "lacks 'projection'"),
    ],
)
def test_the_values_of_a_single_kind_are_checked_too(
    kind: str, damage: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    make(kind, by_hand()).save_pretrained(tmp_path)
    damage(tmp_path)
    assert said in refused(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_or_tensor_that_is_missing_is_named(kind: str, tmp_path: Path) -> None:
    make(kind, by_hand()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in config.keys() - {"format", "version", "calibration", "embedding_source"}:
        path.write_text(json.dumps({k: v for k, v in config.items() if k != key}))
        assert f"(config.json or model.safetensors lacks {key!r})" in refused(tmp_path)
    path.write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    for name in tensors:
        rest = {k: v for k, v in tensors.items() if k != name}
        save_file(rest, tmp_path / "model.safetensors")
        assert f"(config.json or model.safetensors lacks {name!r})" in refused(tmp_path)


@given(st.sampled_from(["config.json", "model.safetensors"]), st.data())
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_truncated_file_is_refused(tmp_path: Path, name: str, data: st.DataObject) -> None:
    make("heads", by_hand()).save_pretrained(tmp_path)
    content = (tmp_path / name).read_bytes()
    # Without its last line feed the configuration is still whole.
    cut = data.draw(st.integers(0, len(content) - 2))
    (tmp_path / name).write_bytes(content[:cut])
    refused(tmp_path)


# Saving that fails


@pytest.mark.parametrize("function", ["fsync", "open"])
def test_a_save_without_space_leaves_the_older_router(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    make("heads", by_hand()).save_pretrained(tmp_path, card="# A card\n")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    whole, calls = getattr(os, function), iter(range(9))

    def full(*arguments: Any) -> Any:
        if next(calls) == 1:
            raise OSError(28, "No space left on device")
        return whole(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, function, full)
        with pytest.raises(InputError) as raised:
            make("heads", by_hand()).save_pretrained(tmp_path, card="# Another\n")
    assert str(raised.value) == (
        f"{tmp_path}/model.safetensors cannot be written (No space left on device); what was there "
        "before is whole; free some space and run it again."
    )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_save_that_fails_in_the_middle_leaves_no_router(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = make("heads", by_hand())
    router.save_pretrained(tmp_path)

    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "replace", broken)
    with pytest.raises(InputError, match=r"model\.safetensors cannot be written"):
        router.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()
    refused(tmp_path)


def test_a_folder_that_is_a_file_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "router"
    path.write_text("mine")
    with pytest.raises(InputError) as error:
        make("heads", by_hand()).save_pretrained(path)
    assert str(error.value).startswith(f"the router cannot be written to {str(path)!r} (")
    assert path.read_text() == "mine"


@pytest.mark.parametrize("description", [{"a": {1, 2}}, {"a": torch.ones(1)}, {(1, 2): "a"}])
def test_a_description_that_is_not_json_leaves_the_former_router_as_it_was(
    tmp_path: Path, description: dict[Any, Any]
) -> None:
    router = make("heads", by_hand())
    router.save_pretrained(tmp_path)
    with pytest.raises(InputError) as error:
        replace(router, description=description).save_pretrained(tmp_path)
    assert str(error.value).startswith("the router's description cannot be written as JSON (")
    assert same(Router.from_pretrained(tmp_path), router)


# The Hub


@pytest.mark.parametrize("local", [True, False])
def test_without_the_network_a_hub_id_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local: bool
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelLoadError) as error:
        Router.from_pretrained("owner/router", local_files_only=local)
    message = str(error.value)
    assert message.startswith(
        "router='owner/router' is not a folder and cannot be fetched from the Hub ("
    )
    assert message.endswith("; check the name, or give the folder that `routehead train` wrote.")
    assert "\n" not in message


@pytest.mark.parametrize("error", [RuntimeError("proxy\nand more"), ValueError(), OSError(" \n")])
def test_any_error_of_the_hubs_client_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(files, "snapshot_download", fail)
    with pytest.raises(ModelLoadError) as raised:
        Router.from_pretrained("owner/router")
    reason = "proxy and more" if isinstance(error, RuntimeError) else type(error).__name__
    assert f"from the Hub ({reason}); check" in str(raised.value)
    assert raised.value.__cause__ is error


DEFAULTS = {
    "local_files_only": False,
    "revision": None,
    "token": None,
    "cache_dir": None,
    "force_download": False,
}
OTHERS = {
    "local_files_only": True,
    "revision": "v1",
    "token": "secret",
    "cache_dir": "cache",
    "force_download": True,
}


@pytest.mark.parametrize("options", [{}, {"revision": "v1"}, OTHERS], ids=len)
def test_a_router_comes_from_the_hub_with_the_files_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    router = make("heads", by_hand())
    router.save_pretrained(tmp_path)
    requests = []

    def download(name: str, **options: object) -> str:
        requests.append((name, options))
        return str(tmp_path)

    monkeypatch.setattr(files, "snapshot_download", download)
    assert same(Router.from_pretrained("owner/router", **options), router)
    patterns = ["config.json", "model.safetensors", "README.md"]
    assert requests == [("owner/router", {"allow_patterns": patterns} | DEFAULTS | options)]


def test_a_revision_is_read_from_the_given_cache_without_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--owner--router"
    routers = {"old": fixed([1.0, 2.0]), "new": fixed([3.0, 4.0])}
    for revision, router in routers.items():
        router.save_pretrained(repository / "snapshots" / f"commit-{revision}")
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(f"commit-{revision}")
    for revision, router in routers.items():
        loaded = Router.from_pretrained("owner/router", revision=revision, cache_dir=tmp_path)
        assert same(loaded, router)
    with pytest.raises(ModelLoadError, match="cannot be fetched from the Hub"):
        Router.from_pretrained("owner/router", revision="other", cache_dir=tmp_path)


def test_the_size_of_a_router_is_read_from_its_folder_or_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--router"
    folder = repository / "snapshots" / "commit"
    fixed([1.0, 2.0]).save_pretrained(folder)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("commit")
    size = (folder / "model.safetensors").stat().st_size
    assert router_size(str(folder)) == router_size("owner/router") == size > 0
    with pytest.raises(ModelLoadError, match="cannot be fetched from the Hub"):
        router_size("owner/other")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="cannot be read"):
        router_size(str(folder))


def test_a_damaged_folder_is_not_warned_of_in_a_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ModelLoadError):
        Router.from_pretrained(tmp_path)
    assert not caplog.records


@pytest.mark.parametrize("name", ["router", "a/b/c", Path("owner/router")])
def test_a_name_that_is_neither_a_folder_nor_an_id_is_refused_without_asking_the_hub(
    name: str | Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "snapshot_download", None)
    with pytest.raises(ModelLoadError) as error:
        Router.from_pretrained(name)
    assert str(error.value) == (
        f"router={str(name)!r} is not a folder; give the one that `routehead train` wrote, or the "
        "id of a repository on the Hub."
    )


def test_a_file_is_not_a_router(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the message shortens long paths
    path = Path("config.json")
    path.write_text("{}")
    with pytest.raises(ModelLoadError) as error:
        Router.from_pretrained(path)
    assert str(error.value).startswith("router='config.json' is not a folder; ")


@pytest.mark.parametrize("card", [None, "# A card\n"])
@pytest.mark.parametrize("options", [{}, {"private": True, "token": "secret", "revision": "v2"}])
def test_pushing_uploads_exactly_the_folders_files(
    router: Router,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    card: str | None,
    options: dict[str, Any],
) -> None:
    calls: list[object] = []

    class Hub:
        def __init__(self, token: str | None) -> None:
            calls.append(token)

        def create_repo(self, repo_id: str, **options: object) -> SimpleNamespace:
            calls.append((repo_id, options))
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, repo_id: str, folder_path: Path, **options: object) -> object:
            assert options.pop("commit_message")
            calls.append((repo_id, {k: v for k, v in options.items() if v is not None}))
            for path in folder_path.iterdir():
                (tmp_path / path.name).write_bytes(path.read_bytes())
            return Address()

    class Address:
        def __str__(self) -> str:
            return "https://hub/commit/1"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)
    assert router.push_to_hub("owner/router", card=card, **options) == "https://hub/commit/1"
    branch = {"revision": options["revision"]} if options else {}
    assert calls == [
        options.get("token"),
        ("owner/router", {"private": bool(options), "exist_ok": True}),
        ("owner/router", {"repo_type": "model"} | branch),
    ]
    names = ["config.json", "model.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md"] * bool(card) + names
    assert same(Router.from_pretrained(tmp_path), router)


def test_a_description_that_is_not_json_creates_no_repository(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", None)
    with pytest.raises(InputError, match=r"^the router's description cannot be written as JSON \("):
        make("heads", by_hand(), description={"a": {1}}).push_to_hub("owner/router")


def test_an_upload_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError) as error:
        make("heads", by_hand()).push_to_hub("owner/router")
    message = str(error.value)
    assert message.startswith("the router cannot be uploaded to 'owner/router' (")
    assert message.endswith(
        "); check the name, the network, and that you are logged in (hf auth login)."
    )
    assert "\n" not in message


@pytest.mark.parametrize("name", [1, None, ["folder"], b"folder"])
def test_a_name_of_another_type_is_refused(name: Any) -> None:
    with pytest.raises(InputError) as error:
        Router.from_pretrained(name)
    assert str(error.value) == (
        f"router={name!r} is a {type(name).__name__}; give a router, its folder, or its id on the "
        "Hub."
    )


def test_local_files_only_is_a_flag(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^local_files_only='yes' must be True or False"):
        Router.from_pretrained(tmp_path, local_files_only=cast(Any, "yes"))


@pytest.mark.parametrize("name", ["x" * 9999, f"owner/{'x' * 9999}", "a\0b", "a\0/b", "", "a/b/c"])
def test_a_name_that_no_router_can_have_is_refused_in_one_short_line(name: str) -> None:
    with pytest.raises(ModelLoadError) as error:
        Router.from_pretrained(name, local_files_only=True)
    message = str(error.value)
    assert message.isprintable()
    assert len(message) < 300


def test_a_pipe_in_a_folder_is_refused(tmp_path: Path) -> None:
    make("heads", by_hand()).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "model.safetensors")
    assert "it is a pipe that nobody writes to" in refused(tmp_path)


def test_more_heads_than_there_are_is_no_limit(tmp_path: Path) -> None:
    router = replace(make("heads", by_hand()), max_heads=10**300)
    router.save_pretrained(tmp_path)
    loaded = Router.from_pretrained(tmp_path)
    assert len(loaded.choose(loaded.bias)) == len(make("heads", by_hand()).choose(router.bias))
