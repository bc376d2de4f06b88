"""Settings that the caller's thread or process has for other models change no result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import families
import pytest
import routers
import torch
from torch import _GLOBAL_DEVICE_CONTEXT

from routehead_plugins import (
    Document,
    FrozenLM,
    HeadRoutedAttentionReranker,
    HeadSet,
    Recipe,
)
from routehead_plugins.backbone.isolation import isolated
from routehead_plugins.backbone.text_tasks import QueryLikelihood
from routehead_plugins.layouts import ReadOptions, get_layout
from routehead_plugins.scoring import Reweighting
from routehead_plugins.selection import FixedHeads

QUERY = "how deep is the quarry?"
DOCUMENTS = ["The quarry is 40 m deep.", "slate", "Lorries take the slate to the harbour at noon."]
FAMILIES = ["llama", "gemma3"]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        # Unset as it was: early releases of PyTorch fail where it was set to None.
        torch.set_default_device(None)
        if hasattr(_GLOBAL_DEVICE_CONTEXT, "device_context"):
            del _GLOBAL_DEVICE_CONTEXT.device_context


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast to bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "float16 by default": lambda: default_dtype(torch.float16),
    # Tensors without values on the meta device: any that is used ends the call.
    "another device by default": lambda: default_device("meta"),
    "without gradients": torch.no_grad,
    "in inference mode": torch.inference_mode,
    "deterministic algorithms": deterministic,
}


def wrap(family: str) -> FrozenLM:
    return FrozenLM(families.tiny_model(family), families.tiny_tokenizer())


def results(llm: FrozenLM, layouts: list[Any]) -> list[Any]:
    """Everything that an LLM computes, exactly."""
    computed: list[Any] = [
        llm.embed(DOCUMENTS),
        llm.embed(DOCUMENTS, layer=llm.num_layers, pooling="last"),
        QueryLikelihood(llm).score(QUERY, DOCUMENTS),
        llm.write("Q: ", ["slate", "a"], max_tokens=4, temperature=1.0, seed=3),
    ]
    for layout in layouts:
        attention = layout.read(llm, QUERY, DOCUMENTS, llm.heads, ReadOptions())
        computed += [attention.query, attention.null]
    return computed


def assert_same(computed: list[Any], expected: list[Any]) -> None:
    for one, other in zip(computed, expected, strict=True):
        if isinstance(other, torch.Tensor):
            torch.testing.assert_close(one, other, atol=0, rtol=0)  # and the same dtype
        else:
            assert one == other


def make_layouts() -> list[Any]:
    return [get_layout("sequential"), get_layout("parallel", document_cache="1MB")]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def expected(family: str) -> list[Any]:
    return results(wrap(family), make_layouts())


@pytest.mark.parametrize("setting", SETTINGS)
def test_results_are_the_same_inside_a_setting_and_after_it(
    family: str, expected: list[Any], setting: str
) -> None:
    llm, layouts = wrap(family), make_layouts()
    with SETTINGS[setting]():
        assert_same(results(llm, layouts), expected)
    # What was computed inside is still in the caches.
    assert_same(results(llm, layouts), expected)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_model_may_be_wrapped_inside_a_setting(setting: str) -> None:
    model = families.tiny_model("llama")
    with SETTINGS[setting]():
        llm = FrozenLM(model, families.tiny_tokenizer())
    assert llm.heads == wrap("llama").heads
    torch.testing.assert_close(llm.embed(DOCUMENTS), wrap("llama").embed(DOCUMENTS), atol=0, rtol=0)


@pytest.mark.parametrize("setting", ["float64 by default", "another device by default"])
def test_a_model_may_be_loaded_inside_a_setting(model: str, setting: str) -> None:
    expected = results(FrozenLM.from_pretrained(model, dtype="float32"), make_layouts())
    with SETTINGS[setting]():
        llm = FrozenLM.from_pretrained(model, dtype="float32", device="cpu")
    assert_same(results(llm, make_layouts()), expected)


def test_the_settings_of_the_thread_are_back_after_a_call_and_after_an_error() -> None:
    llm = wrap("llama")
    with torch.autocast("cpu", dtype=torch.float16), default_device("meta"):
        llm.embed(DOCUMENTS)
        with pytest.raises(ValueError, match="empty"):
            llm.read(list, [(5, 6)], llm.heads)  # nothing to look back at
        assert torch.get_autocast_dtype("cpu") == torch.float16
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_default_device().type == "meta"


def test_the_llm_is_lent_without_autocast() -> None:
    llm = wrap("llama")
    ids = torch.tensor([[5, 6, 7]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with llm.causal_lm("cannot be lent") as model:
            assert model(ids).logits.dtype == torch.float32
        with isolated(torch.device("cpu")):
            assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("layout", ["sequential", "parallel"])
def test_scores_are_the_same_inside_a_setting(layout: str, setting: str) -> None:
    llm, recipe = wrap("llama"), Recipe(aggregation="log", weights=[0.7, -0.2, 1.1])
    heads = HeadSet([(1, 2), (0, 3), (2, 0)], recipe=recipe)
    documents = [Document(text, score=1 / number) for number, text in enumerate(DOCUMENTS, 3)]

    def scores() -> list[Any]:
        weighted = HeadRoutedAttentionReranker(llm, FixedHeads(heads), first_stage_weight=0.3)
        plain = HeadRoutedAttentionReranker(llm, layout=layout, reweighting=Reweighting())
        ranking = plain.rerank(QUERY, documents, spans=True)
        spans = [hit.spans for hit in ranking]
        signals = [plain.signals(QUERY, documents), plain.signals(QUERY, [])]
        return [*signals, weighted.score(QUERY, documents), plain.score(QUERY, documents), spans]

    expected = scores()
    with SETTINGS[setting]():
        assert_same(scores(), expected)


@pytest.mark.parametrize("kind", routers.KINDS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_routers_route_alike_inside_a_setting(kind: str, setting: str) -> None:
    space = routers.by_hand(anchors=routers.random(9, 3, seed=5))
    router = routers.make(kind, space)
    queries = routers.random(4, 3, seed=6)
    expected = router.logits(queries)
    assert (expected - router.bias).abs().max() > 0.01  # it does route
    with SETTINGS[setting]():
        computed = router.logits(queries)
        heads = [router.choose(row) for row in computed]
    torch.testing.assert_close(computed, expected, atol=0, rtol=0)
    assert heads == [router.choose(row) for row in expected]
