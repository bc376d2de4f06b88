"""Signals on disk and in sets: what is read was written whole, with the same settings."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tables import query_signals, signal_set, table

from routehead_plugins import HeadSet
from routehead_plugins.errors import InputError
from routehead_plugins.io import JSON
from routehead_plugins.signals.store import QuerySignals, SignalStore

SIGNALS = signal_set(queries=2)
SETTINGS: dict[str, JSON] = {"model": "tiny", "heads": 12}


def same(one: QuerySignals | None, other: QuerySignals) -> bool:
    return one is not None and all(
        torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs
        for mine, theirs in zip(vars(one).values(), vars(other).values(), strict=True)
    )


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    store = SignalStore(tmp_path, SETTINGS)
    assert store.get("a/b?") is None
    for key, query in zip(("a/b?", "b"), SIGNALS.queries, strict=True):
        store.put(key, query)
    again = SignalStore(tmp_path, SETTINGS)
    assert same(again.get("a/b?"), SIGNALS.queries[0])
    assert same(again.get("b"), SIGNALS.queries[1])
    assert SignalStore(tmp_path, {**SETTINGS, "heads": 13}).get("b") is None


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    store = SignalStore(tmp_path, SETTINGS)
    store.put("a", SIGNALS.queries[0])
    (path,) = store.folder.glob("*.safetensors")
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        assert store.get("a") is None, position
    path.write_bytes(whole)
    assert same(store.get("a"), SIGNALS.queries[0])


def test_a_file_without_its_checksum_counts_as_missing(tmp_path: Path) -> None:
    store = SignalStore(tmp_path, SETTINGS)
    store.put("a", SIGNALS.queries[0])
    (path,) = store.folder.glob("*.safetensors")
    tensors = load_file(path)
    del tensors["checksum"]
    save_file(tensors, path)
    assert store.get("a") is None


def test_the_file_of_another_key_or_of_other_settings_is_not_believed(tmp_path: Path) -> None:
    store, other = SignalStore(tmp_path, SETTINGS), SignalStore(tmp_path, {"model": "other"})
    for target, key in ((store, "a"), (store, "b"), (other, "a")):
        target.put(key, SIGNALS.queries[0])
    path = store.path("a")
    for source in (store.path("b"), other.path("a")):
        path.write_bytes(source.read_bytes())
        assert store.get("a") is None


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="signals cannot be kept in"):
        SignalStore(tmp_path / "file", {})


def test_sets_of_the_same_kind_can_be_joined() -> None:
    joined = SIGNALS + replace(SIGNALS, data=("other",))
    assert (joined.data, len(joined.queries)) == (("random", "other"), 4)
    with pytest.raises(InputError) as error:
        _ = SIGNALS + replace(SIGNALS, layout="parallel")
    assert str(error.value) == (
        "signals of layout 'parallel' cannot be joined to signals of layout 'sequential'; "
        "compute both the same way."
    )
    with pytest.raises(InputError) as error:
        _ = SIGNALS + replace(SIGNALS, heads=HeadSet.parse("0-0"))
    assert str(error.value) == (
        "signals of different heads cannot be joined; compute both for the same heads."
    )


def test_a_set_without_contrast_is_refused() -> None:
    flat = table([query_signals([[0.1, 0.2]], [1, 1])], data=("tiny",))
    for use in (lambda: flat.with_contrast, flat.check_finite):
        with pytest.raises(InputError) as error:
            use()
        assert str(error.value) == (
            "none of the 1 queries of tiny has both relevant and other candidates; "
            "give judged queries with 2 or more candidates."
        )


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["mass", "calibrated"])
def test_signals_that_are_not_finite_are_refused(name: str, value: float) -> None:
    good = query_signals([[0.1, 0.2]], [0, 1], query_id="good")
    broken = torch.tensor([[value, 0.2]])
    wrong = replace(good, query_id="wrong", **{name: broken})  # type: ignore[arg-type]
    table([good, good]).check_finite()
    table([good, replace(wrong, gains=torch.ones(2))]).check_finite()  # never learned from
    with pytest.raises(InputError) as error:
        table([good, wrong]).check_finite()
    assert str(error.value) == (
        "signals of query 'wrong' are not finite numbers; compute them again with "
        'dtype="float32".'
    )
