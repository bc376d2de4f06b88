"""Query likelihood against one plain forward per document."""

from __future__ import annotations

import math
from typing import Any, cast

import families
import pytest
import torch

from routehead_plugins import FrozenLM
from routehead_plugins.backbone import frozen_lm as backbone
from routehead_plugins.backbone.text_tasks import QueryLikelihood
from routehead_plugins.errors import InputError, UnsupportedModelError

QUERY = "which wolf ran?"
DOCUMENTS = ["a wolf ran over the hill", "rain", "seven grey stones by a river, one of them wet"]


@pytest.mark.parametrize("family", families.CONFIGS)
def test_scores_equal_those_of_one_forward_per_document(family: str) -> None:
    model = families.tiny_model(family)
    tokenizer = families.tiny_tokenizer()
    expected = []
    (target,) = tokenizer([QUERY], add_special_tokens=False)["input_ids"]
    for document in DOCUMENTS:
        # Bytes need no space at the beginning of a word, and every prompt begins with a line break.
        text = f"Document:{document}\n\nQuery:"
        context = tokenizer(["\n" + text], add_special_tokens=False)["input_ids"][0]
        with torch.no_grad():
            output: Any = model(torch.tensor([context + target]))
        logs = output.logits[0, len(context) - 1 : -1].log_softmax(dim=-1)
        expected.append(float(logs[range(len(target)), target].mean()))
    found = QueryLikelihood(FrozenLM(model, tokenizer)).score(QUERY, DOCUMENTS)
    assert found == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 1e-2


@pytest.fixture(scope="module")
def llm() -> FrozenLM:
    return FrozenLM(families.tiny_model("llama"), families.tiny_tokenizer(), name="tiny")


def test_batches_do_not_change_scores(llm: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = QueryLikelihood(llm).score(QUERY, DOCUMENTS)
    monkeypatch.setattr(backbone, "_BATCH_TOKENS", 1)
    assert QueryLikelihood(llm).score(QUERY, DOCUMENTS) == pytest.approx(whole, abs=1e-5)


def test_blank_documents_are_the_least_likely_and_an_empty_list_has_no_scores(
    llm: FrozenLM,
) -> None:
    scores = QueryLikelihood(llm).score(QUERY, ["", DOCUMENTS[0], " \n"])
    assert scores[0] == scores[2] == -math.inf < scores[1] < 0
    assert QueryLikelihood(llm).score(QUERY, []) == []


def test_what_is_cut_off_is_not_read(llm: FrozenLM) -> None:
    cut = QueryLikelihood(llm, max_doc_tokens=4)
    assert cut.score(QUERY, ["abcdefgh"]) == pytest.approx(cut.score(QUERY, ["abcd"]), abs=1e-6)


def test_bad_input_is_refused(llm: FrozenLM) -> None:
    with pytest.raises(InputError, match="query=' ' is blank"):
        QueryLikelihood(llm).score(" ", DOCUMENTS)
    with pytest.raises(InputError, match="max_doc_tokens=0"):
        QueryLikelihood(llm, max_doc_tokens=0)


def test_an_llm_without_its_last_layers_is_refused(llm: FrozenLM) -> None:
    shallow = FrozenLM(families.tiny_model("llama"), families.tiny_tokenizer(), name="shallow")
    del cast(Any, shallow._view).layers[2:]
    shallow.heads = type(llm.heads)([head for head in llm.heads if head.layer < 2])
    with pytest.raises(UnsupportedModelError) as error:
        QueryLikelihood(shallow).score(QUERY, DOCUMENTS)
    assert str(error.value) == (
        "'shallow' was loaded without its last layers or its output projection and cannot tell "
        "likelihoods; load all of a causal LLM."
    )
