"""Selectors: the heads they choose."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import families
import pytest

from routehead_plugins import FrozenLM, HeadSet
from routehead_plugins.errors import HeadError
from routehead_plugins.selection.published import published_heads
from routehead_plugins.selection.selectors import AllHeads, FixedHeads, LayerInterval


def llm_of(layers: int, heads: int = 2) -> FrozenLM:
    """An LLM with only what selectors look at."""
    every = HeadSet([(layer, index) for layer in range(layers) for index in range(heads)])
    llm = SimpleNamespace(name="tiny", heads=every, num_layers=layers, adapter_label=None)
    return cast(FrozenLM, llm)


@pytest.fixture(scope="module")
def llm() -> FrozenLM:
    return FrozenLM(families.tiny_model("llama"), families.tiny_tokenizer(), name="tiny")


def test_all_heads_are_all_the_llm_has(llm: FrozenLM) -> None:
    heads = AllHeads().select("q", llm)
    assert list(heads) == [(layer, index) for layer in range(4) for index in range(4)]


@pytest.mark.parametrize(
    ("layers", "middle"),
    [(2, (0, 0)), (3, (1, 1)), (4, (1, 1)), (6, (2, 3)), (28, (9, 17)), (30, (10, 19))],
)
def test_the_interval_is_the_middle_third_by_default(layers: int, middle: tuple[int, int]) -> None:
    first, last = middle
    heads = LayerInterval().select("q", llm_of(layers))
    assert list(heads) == [(layer, i) for layer in range(first, last + 1) for i in range(2)]
    assert (heads.model, heads.method) == ("tiny", f"layers:{first}-{last}")


@pytest.mark.parametrize(
    ("first", "last", "layers"),
    [(0, 3, [0, 1, 2, 3]), (2, 2, [2]), (None, 3, [1, 2, 3]), (0, None, [0, 1])],
)
def test_an_interval_includes_both_ends(
    llm: FrozenLM, first: int | None, last: int | None, layers: list[int]
) -> None:
    heads = LayerInterval(first, last).select("q", llm)
    assert list(heads.by_layer) == layers
    assert set(heads.by_layer.values()) == {(0, 1, 2, 3)}


@pytest.mark.parametrize(("first", "last"), [(0, 4), (4, 4), (9, 12), (3, 2)])
def test_an_interval_that_the_llm_does_not_have_is_refused(
    llm: FrozenLM, first: int, last: int
) -> None:
    with pytest.raises(HeadError) as error:
        LayerInterval(first, last).select("q", llm)
    assert str(error.value) == (
        f"layers {first}-{last} are not layers of 'tiny'; "
        "it has layers 0 to 3, given as first-last."
    )


def test_fixed_heads_are_the_same_for_every_query(llm: FrozenLM) -> None:
    heads = HeadSet.parse("3-1,0-2")
    assert FixedHeads(heads).select("one", llm) is heads
    assert FixedHeads(heads).select("two", llm) is heads


def test_fixed_heads_that_the_llm_does_not_have_are_refused(llm: FrozenLM) -> None:
    with pytest.raises(HeadError) as error:
        FixedHeads(HeadSet.parse("3-1,3-4")).select("q", llm)
    assert str(error.value) == (
        "'tiny' has no head 3-4; it has layers 0 to 3 with 4 heads each, counted from 0."
    )


def test_published_heads_that_the_llm_does_not_have_are_refused(llm: FrozenLM) -> None:
    unnamed = replace(published_heads("core:phi-4"), model=None)
    with pytest.raises(HeadError, match="'tiny' has no head 17-1"):
        FixedHeads(unnamed).select("q", llm)


@pytest.mark.parametrize(
    ("chosen_for", "model"),
    [
        (None, "tiny"),
        ("tiny", "tiny"),
        ("meta-llama/Llama-3.1-8B-Instruct", "unsloth/llama-3.1-8b-instruct"),
        ("embedded", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("meta-llama/Llama-3.1-8B-Instruct", str(Path(__file__).parent)),
    ],
)
def test_heads_are_taken_by_the_llm_they_were_chosen_for(
    chosen_for: str | None, model: str
) -> None:
    llm = FrozenLM(families.tiny_model("llama"), families.tiny_tokenizer(), name=model)
    heads = HeadSet.parse("0-1")
    assert FixedHeads(replace(heads, model=chosen_for)).select("q", llm) == replace(
        heads, model=chosen_for
    )


def test_heads_of_another_llm_are_refused_by_name() -> None:
    llm = FrozenLM(families.tiny_model("llama"), families.tiny_tokenizer(), name="Qwen/Qwen3-8B")
    with pytest.raises(HeadError) as error:
        FixedHeads(HeadSet([(0, 1)], model="microsoft/phi-4")).select("q", llm)
    assert str(error.value) == (
        "the heads were chosen for 'microsoft/phi-4', but the LLM is 'Qwen/Qwen3-8B'; choose heads "
        "for this one, or give them as layer-head to try them all the same."
    )
