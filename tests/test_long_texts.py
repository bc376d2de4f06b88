"""Long documents are divided or cut, and nothing kills a list."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import families
import pytest

from routehead_plugins import (
    Document,
    FrozenLM,
    HeadRoutedAttentionReranker,
    HeadSet,
    Recipe,
    Usage,
)
from routehead_plugins.errors import InputError, PromptTooLongError, TruncationWarning
from routehead_plugins.options import RerankerOptions
from routehead_plugins.scoring import Chunking, LongTexts
from routehead_plugins.selection import FixedHeads

QUERY = "which wolf?"
LONG = "a wolf ran. rain fell all day. the hill was dark! stones lay there, and a wolf slept."
DOCUMENTS = ["rain", LONG, "", "a wolf", LONG[::-1]]
LAYOUTS = pytest.mark.parametrize("layout", ["sequential", "parallel", "late"])
ADVICE = {
    "sequential": "layout='parallel' has more room.",
    "parallel": "long_documents='chunk' reads documents whole.",
    "late": "long_documents='chunk' reads documents whole.",
}
LIMIT = 400  # tokens; the tiny tokenizer has one per character


@pytest.fixture(scope="module")
def llm() -> FrozenLM:
    return FrozenLM(families.tiny_model("llama"), families.tiny_tokenizer(), name="tiny")


@pytest.fixture(scope="module")
def small() -> FrozenLM:
    """An LLM with a context of few tokens."""
    model = families.tiny_model("llama")
    model.config.max_position_embeddings = LIMIT
    return FrozenLM(model, families.tiny_tokenizer(), name="small")


def passages(llm: FrozenLM, chunking: Chunking, documents: list[str]) -> list[list[str]]:
    return [
        [text[a:b] for a, b in chunking.divide(text, llm.encoder.offsets(text))]
        for text in documents
    ]


@LAYOUTS
@pytest.mark.parametrize("aggregation", ["max", "first", "mean_of_top(2)"])
def test_a_document_gets_what_its_passages_get(
    llm: FrozenLM, layout: str, aggregation: str
) -> None:
    chunking = Chunking(24, 20, aggregation)
    divided = HeadRoutedAttentionReranker(llm, layout=layout, long_texts=LongTexts(chunking))
    plain = HeadRoutedAttentionReranker(llm, layout=layout)
    texts = passages(llm, chunking, DOCUMENTS)
    assert [len(own) for own in texts] == [1, 5, 1, 1, 5]
    scores = iter(plain.score(QUERY, [text for own in texts for text in own]))
    parts = [[next(scores) for _ in own] for own in texts]
    top = {"max": 1, "mean_of_top(2)": 2}.get(aggregation)
    expected = [
        own[0] if top is None else sum(sorted(own)[-top:]) / min(top, len(own)) for own in parts
    ]
    assert divided.score(QUERY, DOCUMENTS) == pytest.approx(expected, abs=1e-6)


def test_heads_are_standardised_over_documents_not_passages(llm: FrozenLM) -> None:
    heads = HeadSet([(1, 0), (2, 3)], recipe=Recipe(weights=[1.0, 2.0], aggregation="standardised"))
    chunking = Chunking(24)
    reranker = HeadRoutedAttentionReranker(
        llm, FixedHeads(heads), layout="parallel", long_texts=LongTexts(chunking)
    )
    documents = [LONG, "a wolf", "rain"]
    scores = reranker.score(QUERY, documents)
    assert sum(scores) == pytest.approx(0, abs=1e-5)  # as z-scores over three documents are
    texts = passages(llm, chunking, documents)
    flat = [text for own in texts for text in own]
    signals = reranker.signals(QUERY, flat)
    ends = [len(texts[0]), len(texts[0]) + 1]
    gathered = [part.amax(dim=1) for part in signals.tensor_split(ends, dim=1)]
    columns = [[float(value[row]) for value in gathered] for row in range(2)]
    expected = [0.0] * 3
    for weight, column in zip((1.0, 2.0), columns, strict=True):
        mean = sum(column) / 3
        deviation = (sum((value - mean) ** 2 for value in column) / 3) ** 0.5
        for index, value in enumerate(column):
            expected[index] += weight * (value - mean) / deviation
    assert scores == pytest.approx(expected, rel=1e-3)


def test_documents_that_are_no_longer_are_read_as_without(llm: FrozenLM) -> None:
    plain = HeadRoutedAttentionReranker(llm, layout="parallel")
    divided = HeadRoutedAttentionReranker(
        llm, layout="parallel", long_texts=LongTexts(Chunking(200))
    )
    assert divided.score(QUERY, DOCUMENTS) == plain.score(QUERY, DOCUMENTS)


def test_a_document_is_cut_before_it_is_divided(llm: FrozenLM) -> None:
    def scores(documents: list[str], **options: Any) -> list[float]:
        reranker = HeadRoutedAttentionReranker(
            llm, layout="parallel", long_texts=LongTexts(Chunking(24)), **options
        )
        return reranker.score(QUERY, documents)

    cut = len(llm.encoder.offsets(LONG[:40]))
    assert scores([LONG, "rain"], max_doc_tokens=cut) == scores([LONG[:40], "rain"])


def test_spans_are_those_of_the_whole_document(llm: FrozenLM) -> None:
    reranker = HeadRoutedAttentionReranker(
        llm, layout="parallel", long_texts=LongTexts(Chunking(24, 16))
    )
    ranking = reranker.rerank(QUERY, DOCUMENTS, spans=True)
    spans = {hit.index: hit.spans for hit in ranking}
    assert spans[2] == ()
    assert max(span.end for span in spans[1]) > 48  # beyond the second passage
    for hit in ranking:
        ordered = sorted(hit.spans)
        assert all(0 <= span.start < span.end <= len(hit.document.text) for span in ordered)
        assert all(a.end <= b.start for a, b in itertools.pairwise(ordered))
        assert list(hit.spans) == sorted(hit.spans, key=lambda span: (-span.score, span.start))
        for span in hit.spans:  # passages start and end at words
            text = hit.document.text[span.start : span.end]
            assert text == text.strip()


@LAYOUTS
def test_a_document_over_the_context_is_cut_with_one_warning(small: FrozenLM, layout: str) -> None:
    reranker = HeadRoutedAttentionReranker(small, layout=layout)
    documents = ["rain", "wolf " * 300, "a wolf", "hill " * 200]
    with pytest.warns(TruncationWarning) as caught:
        ranking = reranker.rerank(QUERY, documents)
    assert len(caught) == 1
    assert str(caught[0].message) == (
        "2 of 4 documents did not fit the context of 'small', and only the beginning was read; "
        + ADVICE[layout]
    )
    assert caught[0].filename == __file__
    assert len(ranking) == 4
    assert ranking.usage.documents_cut == 2
    assert ranking.usage.document_tokens <= (LIMIT if layout == "sequential" else 4 * LIMIT)
    strict = HeadRoutedAttentionReranker(
        small, layout=layout, long_texts=LongTexts(on_too_long="error")
    )
    with pytest.raises(PromptTooLongError) as error:
        strict.rerank(QUERY, documents)
    cut = int(str(error.value).split("max_doc_tokens=")[1].split()[0])
    fitting = HeadRoutedAttentionReranker(small, layout=layout, max_doc_tokens=cut)
    expected = fitting.score(QUERY, documents)
    assert [hit.score for hit in sorted(ranking, key=lambda hit: hit.index)] == expected


def test_windows_cut_their_documents_alike(small: FrozenLM) -> None:
    reranker = HeadRoutedAttentionReranker.from_options(
        RerankerOptions(window=2, stride=1), small, FixedHeads(HeadSet([(1, 0)]))
    )
    documents = ["rain", "wolf " * 300, "a wolf " * 60, "hill"]
    with pytest.warns(TruncationWarning, match="2 of 4 documents did not fit"):
        assert len(reranker.rerank(QUERY, documents)) == 4


@LAYOUTS
def test_a_query_over_the_context_is_cut_and_documents_keep_room(
    small: FrozenLM, layout: str
) -> None:
    reranker = HeadRoutedAttentionReranker(small, layout=layout)
    query = "wolf " * 300
    with pytest.warns(TruncationWarning, match="the query did not fit the context of 'small'"):
        ranking = reranker.rerank(query, ["rain", "a wolf"])
    assert ranking.usage.query_cut
    assert 0 < ranking.usage.query_tokens < 400
    assert ranking.usage.documents_cut == 0
    with pytest.warns(TruncationWarning, match="1 of 1 documents and the query did not fit"):
        both = reranker.rerank(query, ["rain " * 300])
    assert both.usage.document_tokens > 50


def test_a_cut_query_is_its_beginning(small: FrozenLM) -> None:
    reranker = HeadRoutedAttentionReranker(small, layout="parallel")
    query = "wolf " * 300
    with pytest.warns(TruncationWarning):
        ranking = reranker.rerank(query, ["rain", "a wolf"])
    end = small.encoder.offsets(query)[ranking.usage.query_tokens - 1][1]
    beginning = query[:end]
    assert reranker.score(beginning, ["rain", "a wolf"]) == [
        hit.score for hit in sorted(ranking, key=lambda hit: hit.index)
    ]


@LAYOUTS
def test_what_was_read_is_counted(llm: FrozenLM, layout: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ranking = HeadRoutedAttentionReranker(llm, layout=layout).rerank(QUERY, DOCUMENTS)
    assert ranking.usage == Usage(
        query_tokens=len(llm.encoder.offsets(QUERY)),
        document_tokens=sum(len(llm.encoder.offsets(text)) for text in DOCUMENTS),
        passages=4,
    )
    assert HeadRoutedAttentionReranker(llm).rerank(QUERY, ["", " "]).usage == Usage()


def test_first_stage_scores_belong_to_documents(llm: FrozenLM) -> None:
    documents = [
        Document(LONG, score=1.0),
        Document("rain", score=9.0),
        Document("a wolf", score=3),
    ]
    reranker = HeadRoutedAttentionReranker(
        llm, layout="parallel", first_stage_weight=100.0, long_texts=LongTexts(Chunking(24))
    )
    assert [hit.index for hit in reranker.rerank(QUERY, documents)] == [1, 2, 0]


def test_options_name_what_becomes_of_long_texts(llm: FrozenLM) -> None:
    def long_texts(**options: Any) -> LongTexts:
        made = HeadRoutedAttentionReranker.from_options(
            RerankerOptions(heads="all", **options), llm
        )
        return made.long_texts

    assert long_texts() == LongTexts()
    assert long_texts(long_documents="chunk", on_too_long="error") == LongTexts(Chunking(), "error")
    given = {"chunk_tokens": 64, "chunk_stride": 32, "chunk_aggregation": "first"}
    assert long_texts(long_documents="chunk", **given) == LongTexts(Chunking(64, 32, "first"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"long_documents": "split"},
            "long_documents='split' does not exist; give truncate or chunk.",
        ),
        ({"on_too_long": None}, "on_too_long=None does not exist; give cut or error."),
        (
            {"chunk_tokens": 64},
            "chunk_tokens=64 is for long_documents='chunk'; give that too, or leave it out.",
        ),
        (
            {"chunk_aggregation": "first"},
            "chunk_aggregation='first' is for long_documents='chunk'; give that too, or leave it "
            "out.",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        RerankerOptions(**options)
    assert str(error.value) == message


def test_an_index_is_of_whole_documents(llm: FrozenLM, tmp_path: Any) -> None:
    options = RerankerOptions(heads="1-0", layout="late", long_documents="chunk")
    reranker = HeadRoutedAttentionReranker.from_options(options, llm)
    with pytest.raises(InputError, match="long_documents='chunk' divides documents, but"):
        reranker.index([Document("a", id="a")], tmp_path / "index")
    whole = HeadRoutedAttentionReranker.from_options(
        RerankerOptions(heads="1-0", layout="late"), llm
    )
    whole.index([Document("a", id="a")], tmp_path / "index")
    with pytest.raises(InputError, match="but this re-ranker reads an index of whole ones"):
        HeadRoutedAttentionReranker.from_options(
            RerankerOptions(heads="1-0", documents=str(tmp_path / "index"), long_documents="chunk"),
            llm,
        )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"chunking": 64}, "chunking is a int; give a Chunking, or None for none."),
        ({"on_too_long": "raise"}, "on_too_long='raise' does not exist; give cut or error."),
    ],
)
def test_objects_of_another_kind_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        LongTexts(**wrong)
    assert str(error.value) == message
