"""Embeddings and query likelihood, against plain forwards of one text at a time."""

from __future__ import annotations

import math
from typing import Any

import families
import pytest
import reference
import torch

from routehead_plugins import FrozenLM
from routehead_plugins.backbone import text_tasks
from routehead_plugins.backbone.text_tasks import QueryLikelihood, Standardiser
from routehead_plugins.errors import InputError, RouteHeadError, UnsupportedModelError

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
    embeddings = llm.embed(TEXTS, layer=layer, pooling=pooling)
    assert embeddings.shape == (5, 32)
    for row, text in zip(embeddings, TEXTS, strict=True):
        (ids,) = llm.encoder.plain([text])
        with torch.no_grad():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0]
        # Without the first token; nothing is left of a blank text.
        seen = states[1:] if pooling == "mean" else states[-1:]
        expected = seen.mean(dim=0) if text else torch.zeros(32)
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-5)


def test_batches_do_not_change_embeddings(llm: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    together = llm.embed(TEXTS)
    monkeypatch.setattr(text_tasks, "_BATCH_TOKENS", 1)
    torch.testing.assert_close(llm.embed(TEXTS), together, atol=1e-5, rtol=1e-5)


def test_four_fifths_of_the_layers_are_the_default(llm: FrozenLM) -> None:
    torch.testing.assert_close(llm.embed(["rain"]), llm.embed(["rain"], layer=3))


def test_long_texts_are_cut(llm: FrozenLM) -> None:
    cut = llm.embed(["a wolf ran over the hill"], max_tokens=6)
    torch.testing.assert_close(cut, llm.embed(["a wolf"]), atol=1e-5, rtol=1e-5)


def test_no_texts_give_no_embeddings(llm: FrozenLM) -> None:
    assert llm.embed([]).shape == (0, 32)


@pytest.mark.parametrize("layer", [-1, 5])
def test_a_layer_that_does_not_exist_is_refused(llm: FrozenLM, family: str, layer: int) -> None:
    with pytest.raises(InputError) as error:
        llm.embed(["rain"], layer=layer)
    assert str(error.value) == f"layer={layer} is not a layer of {family!r}; give 0 to 4."


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


QUERY = "which wolf ran?"
DOCUMENTS = ["a wolf ran over the hill", "rain", "seven grey stones by a river, one of them wet"]


@pytest.mark.parametrize("family", families.CONFIGS)
def test_scores_equal_those_of_one_forward_per_document(family: str) -> None:
    model = families.tiny_model(family)
    # Early releases of transformers ignore soft caps unless attention is eager.
    twin = reference.eager_twin(model)
    tokenizer = families.tiny_tokenizer()
    expected = []
    (target,) = tokenizer([QUERY], add_special_tokens=False)["input_ids"]
    for document in DOCUMENTS:
        # Bytes need no space at the beginning of a word, and every prompt begins with a line break.
        text = f"Document:{document}\n\nQuery:"
        context = tokenizer(["\n" + text], add_special_tokens=False)["input_ids"][0]
        with torch.no_grad():
            output: Any = twin(torch.tensor([context + target]))
        logs = output.logits[0, len(context) - 1 : -1].log_softmax(dim=-1)
        expected.append(float(logs[range(len(target)), target].mean()))
    scores = QueryLikelihood(FrozenLM(model, tokenizer)).score(QUERY, DOCUMENTS)
    assert scores == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 1e-2


@pytest.fixture(scope="module")
def llama() -> FrozenLM:
    return FrozenLM(families.tiny_model("llama"), families.tiny_tokenizer(), name="tiny")


def test_batches_do_not_change_likelihoods(
    llama: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = QueryLikelihood(llama).score(QUERY, DOCUMENTS)
    monkeypatch.setattr(text_tasks, "_BATCH_TOKENS", 1)
    assert QueryLikelihood(llama).score(QUERY, DOCUMENTS) == pytest.approx(whole, abs=1e-5)


def test_blank_documents_are_the_least_likely_and_an_empty_list_has_no_scores(
    llama: FrozenLM,
) -> None:
    scores = QueryLikelihood(llama).score(QUERY, ["", DOCUMENTS[0], " \n"])
    assert scores[0] == scores[2] == -math.inf < scores[1] < 0
    assert QueryLikelihood(llama).score(QUERY, []) == []


def test_text_behind_the_cut_is_not_read(llama: FrozenLM) -> None:
    cut = QueryLikelihood(llama, max_doc_tokens=4)
    assert cut.score(QUERY, ["abcdefgh"]) == pytest.approx(cut.score(QUERY, ["abcd"]), abs=1e-6)


def test_bad_input_is_refused(llama: FrozenLM) -> None:
    with pytest.raises(InputError, match="query=' ' is blank"):
        QueryLikelihood(llama).score(" ", DOCUMENTS)
    with pytest.raises(InputError, match="max_doc_tokens=0"):
        QueryLikelihood(llama, max_doc_tokens=0)


def test_an_llm_without_its_last_layers_is_refused() -> None:
    model: Any = families.tiny_model("llama")
    del model.model.layers[2:]
    shallow = FrozenLM(model, families.tiny_tokenizer(), name="shallow")
    with pytest.raises(UnsupportedModelError) as error:
        QueryLikelihood(shallow).score(QUERY, DOCUMENTS)
    assert str(error.value) == (
        "'shallow' was loaded without its last layers or its output projection and cannot compute "
        "likelihoods; load the whole causal LLM."
    )


def test_damaged_weights_give_an_error_instead_of_embeddings_and_likelihoods() -> None:
    model = families.tiny_model("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.down_proj.weight")[0, 0] = torch.nan
    llm = FrozenLM(model, families.tiny_tokenizer(), name="damaged")
    message = "^'damaged' computed numbers that are not finite in float32; its weights are damaged"
    with pytest.raises(RouteHeadError, match=message):
        llm.embed(["rain"])
    with pytest.raises(RouteHeadError, match=message):
        QueryLikelihood(llm).score("rain", ["a wolf"])


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ("a wolf", "texts is one string; give a list of texts."),
        (None, "texts is a NoneType; give a list of texts."),
        ({"d": "a"}, "texts is a dict; give its values as a list."),
        (["a", 5], "texts[1]=5 is a int; give a text."),
    ],
    ids=range(4),
)
def test_texts_to_embed_of_a_wrong_type_are_named(texts: Any, words: str) -> None:
    llm = FrozenLM(families.tiny_model("llama"), families.tiny_tokenizer())
    with pytest.raises(InputError) as error:
        llm.embed(texts)
    assert str(error.value) == words
