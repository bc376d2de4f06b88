"""Code that was written for a cross-encoder of sentence-transformers runs with a re-ranker."""

from __future__ import annotations

from typing import Any

import families
import numpy as np
import pytest
import torch

from routehead_plugins import FrozenLM, HeadRoutedAttentionReranker
from routehead_plugins.errors import InputError

QUERY, OTHER = "which wolf?", "where is rain?"
TEXTS = ["a wolf ran", "rain fell", "the hill"]


@pytest.fixture(scope="module")
def reranker() -> HeadRoutedAttentionReranker:
    llm = FrozenLM(families.tiny_model("llama"), families.tiny_tokenizer(), name="tiny")
    return HeadRoutedAttentionReranker(llm)


def test_documents_are_ranked_in_the_shape_of_a_cross_encoder(
    reranker: HeadRoutedAttentionReranker,
) -> None:
    expected = reranker.rerank(QUERY, TEXTS)
    ranked = reranker.rank(QUERY, TEXTS, return_documents=True)
    assert ranked == [
        {"corpus_id": hit.index, "score": hit.score, "text": hit.document.text} for hit in expected
    ]
    assert reranker.rank(QUERY, TEXTS, 2) == [
        {"corpus_id": hit.index, "score": hit.score} for hit in expected[:2]
    ]
    prompted = reranker.rank(QUERY, TEXTS, prompt="Only rain counts.", batch_size=8)
    instructed = reranker.rerank(QUERY, TEXTS, instruction="Only rain counts.")
    assert [hit["score"] for hit in prompted] == [hit.score for hit in instructed]


def test_pairs_of_a_query_are_scored_as_its_list(reranker: HeadRoutedAttentionReranker) -> None:
    pairs = [
        (QUERY, TEXTS[0]),
        (OTHER, TEXTS[1]),
        [QUERY, TEXTS[1]],
        (OTHER, TEXTS[2]),
        (QUERY, TEXTS[0]),
    ]
    own = reranker.score(QUERY, [TEXTS[0], TEXTS[1], TEXTS[0]])
    other = reranker.score(OTHER, [TEXTS[1], TEXTS[2]])
    expected = np.array([own[0], other[0], own[1], other[1], own[2]], dtype=np.float32)
    scores = reranker.predict(pairs, show_progress_bar=False, batch_size=2)
    assert isinstance(scores, np.ndarray)
    assert scores.dtype == np.float32
    assert np.array_equal(scores, expected)
    tensor = reranker.predict(pairs, convert_to_tensor=True)
    assert isinstance(tensor, torch.Tensor)
    assert np.array_equal(tensor.numpy(), expected)
    listed = reranker.predict(pairs, convert_to_numpy=False)
    assert isinstance(listed, list)
    assert [float(score) for score in listed] == expected.tolist()


def test_one_pair_gets_one_number(reranker: HeadRoutedAttentionReranker) -> None:
    score: Any = reranker.predict((QUERY, TEXTS[0]))
    assert isinstance(score, np.float32)
    assert float(score) == pytest.approx(reranker.score(QUERY, TEXTS[:1])[0])
    single: Any = reranker.predict([QUERY, TEXTS[0]], convert_to_tensor=True)
    assert single.shape == ()


def test_no_pairs_have_no_scores(reranker: HeadRoutedAttentionReranker) -> None:
    scores: Any = reranker.predict([])
    assert scores.shape == (0,)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([(QUERY,)], "inputs[0] has 1 texts; give a pair of a query and a document."),
        (
            [(QUERY, "a"), (QUERY, "a", "b")],
            "inputs[1] has 3 texts; give a pair of a query and a document.",
        ),
        ([(QUERY, "a"), 3], "inputs[1] is a int; give a pair of a query and a document."),
        ([(" ", "a")], "inputs[0][0]=' ' is blank; give a text."),
        ([(QUERY, 3)], "inputs[0][1]=3 is a int; give a text."),
        (QUERY, "inputs is one string; give a list of pairs of a query and a document."),
        ([QUERY], "inputs[0] has 1 texts; give a pair of a query and a document."),
    ],
)
def test_what_is_no_pair_is_refused(
    reranker: HeadRoutedAttentionReranker, inputs: Any, message: str
) -> None:
    with pytest.raises(InputError) as error:
        reranker.predict(inputs)
    assert str(error.value) == message


def test_a_prompt_has_no_name(reranker: HeadRoutedAttentionReranker) -> None:
    message = "prompt_name='facts' is not known, as there are no prompts with names; give the text"
    with pytest.raises(InputError, match=message):
        reranker.predict([(QUERY, TEXTS[0])], prompt_name="facts")
    with pytest.raises(InputError, match=message):
        reranker.rank(QUERY, TEXTS, prompt_name="facts")


@pytest.mark.filterwarnings("ignore")
def test_evaluators_of_sentence_transformers_take_a_reranker(
    reranker: HeadRoutedAttentionReranker,
) -> None:
    evaluation = pytest.importorskip("sentence_transformers.cross_encoder.evaluation")
    samples = [{"query": QUERY, "positive": TEXTS[:1], "negative": TEXTS[1:]}]
    evaluator = evaluation.CrossEncoderRerankingEvaluator(samples, at_k=3, write_csv=False)
    scores = reranker.score(QUERY, TEXTS)
    rank = 1 + sum(score > scores[0] for score in scores[1:])
    assert evaluator(reranker)["mrr@3"] == pytest.approx(1 / rank)
    correlation = evaluation.CrossEncoderCorrelationEvaluator(
        [(QUERY, text) for text in TEXTS], scores, write_csv=False
    )
    assert correlation(reranker)["spearman"] == pytest.approx(1)
    labels = [int(score == max(scores)) for score in scores]
    classification = evaluation.CrossEncoderClassificationEvaluator(
        [(QUERY, text) for text in TEXTS], labels, write_csv=False
    )
    assert classification(reranker)["average_precision"] == pytest.approx(1)
