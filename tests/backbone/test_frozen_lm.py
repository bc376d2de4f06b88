"""Embeddings from the frozen LLM, and what else of it is asked for directly."""

from __future__ import annotations

import families
import pytest
import reference
import torch

from routehead_plugins import FrozenLM
from routehead_plugins.backbone import frozen_lm as backbone
from routehead_plugins.backbone.text_tasks import Standardiser
from routehead_plugins.errors import InputError

TEXTS = ["a wolf ran over the hill", "", "rain", "seven grey stones by a river", "rain"]


@pytest.fixture(scope="module", params=["llama", "gemma2", "gpt-oss"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def llm(family: str) -> FrozenLM:
    return FrozenLM(families.tiny_model(family), families.tiny_tokenizer(), name=family)


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("layer", [0, 2, 4])
def test_an_embedding_is_the_mean_or_last_state_of_a_text_on_its_own(
    llm: FrozenLM, family: str, layer: int, pooling: str
) -> None:
    model = reference.eager_twin(families.tiny_model(family))
    found = llm.embed(TEXTS, layer=layer, pooling=pooling)
    assert found.shape == (5, 32)
    for row, text in zip(found, TEXTS, strict=True):
        (ids,) = llm.encoder.plain([text])
        with torch.no_grad():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0]
        # Without the first token; nothing is left of a blank text.
        seen = states[1:] if pooling == "mean" else states[-1:]
        expected = seen.mean(dim=0) if text else torch.zeros(32)
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-5)


def test_batches_do_not_change_embeddings(llm: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    together = llm.embed(TEXTS)
    monkeypatch.setattr(backbone, "_BATCH_TOKENS", 1)
    torch.testing.assert_close(llm.embed(TEXTS), together, atol=1e-5, rtol=1e-5)


def test_four_fifths_of_the_layers_are_the_default(llm: FrozenLM) -> None:
    torch.testing.assert_close(llm.embed(["rain"]), llm.embed(["rain"], layer=3))


def test_long_texts_are_cut(llm: FrozenLM) -> None:
    cut = llm.embed(["a wolf ran over the hill"], max_tokens=6)
    torch.testing.assert_close(cut, llm.embed(["a wolf"]), atol=1e-5, rtol=1e-5)


def test_no_texts_give_no_embeddings(llm: FrozenLM) -> None:
    assert llm.embed([]).shape == (0, 32)


@pytest.mark.parametrize("layer", [-1, 5])
def test_a_layer_that_is_not_there_is_refused(llm: FrozenLM, family: str, layer: int) -> None:
    with pytest.raises(InputError) as error:
        llm.embed(["rain"], layer=layer)
    assert str(error.value) == f"layer={layer} is not a layer of {family!r}; give 0 to 4."


def test_the_llm_says_where_and_in_what_format_it_runs(llm: FrozenLM) -> None:
    assert (llm.device, llm.dtype) == (torch.device("cpu"), torch.float32)
    assert (llm.num_layers, llm.max_tokens, len(llm.heads)) == (4, 4096, 16)


def test_standardised_embeddings_have_length_one_and_no_common_direction() -> None:
    embeddings = torch.tensor([[100.0, 1.0, 7.0], [104.0, 3.0, 7.0]])
    standardise = Standardiser.fit(embeddings)
    # Means 102, 2, 7; deviations 2, 1, none.
    half = 0.5**0.5
    expected = torch.tensor([[-half, -half, 0.0], [half, half, 0.0]])
    torch.testing.assert_close(standardise(embeddings), expected)


def test_the_embedded_llm_finds_a_passage_by_its_states(embedded: FrozenLM) -> None:
    passages = [
        "Yeast gives off gas while it eats sugar, and the loaf rises.",
        "A star twinkles because the air bends its light.",
        "Interest on a loan is paid every month.",
    ]
    vectors = embedded.embed(passages)
    standardise = Standardiser.fit(vectors)
    queries = ["why does bread dough grow", "why do stars flicker at night", "cost of a credit"]
    best = (standardise(embedded.embed(queries)) @ standardise(vectors).T).argmax(dim=1)
    assert best.tolist() == [0, 1, 2]
