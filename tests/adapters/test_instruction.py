"""An instruction given to an adapter is the re-ranker's, and a query's own comes first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import families
import pytest
from langchain_core.documents import Document as LangChainDocument
from llama_index.core.schema import NodeWithScore, TextNode

from routehead_plugins import Document, FrozenLM, HeadRoutedAttentionReranker, Ranking
from routehead_plugins.adapters.langchain import HeadRoutedCompressor
from routehead_plugins.adapters.llama_index import HeadRoutedRerank
from routehead_plugins.adapters.pyserini import HeadRoutedStage
from routehead_plugins.errors import InputError

QUERY, INSTRUCTION, OWN = "which wolf?", "Only facts count.", "Only rain counts."
TEXTS = ["a wolf ran", "rain fell", "the hill"]


@pytest.fixture(scope="module")
def reranker() -> HeadRoutedAttentionReranker:
    llm = FrozenLM(families.tiny_model("llama"), families.tiny_tokenizer(), name="tiny")
    return HeadRoutedAttentionReranker(llm)


def expected(reranker: HeadRoutedAttentionReranker, instruction: str | None) -> list[float]:
    return [hit.score for hit in reranker.rerank(QUERY, TEXTS, instruction=instruction)]


@pytest.mark.parametrize("instruction", [None, INSTRUCTION])
def test_llama_index_passes_it_on(
    reranker: HeadRoutedAttentionReranker, instruction: str | None
) -> None:
    postprocessor = HeadRoutedRerank(reranker=reranker, instruction=instruction)
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in TEXTS]
    ranked = postprocessor.postprocess_nodes(nodes, query_str=QUERY)
    assert [node.score for node in ranked] == expected(reranker, instruction)


@pytest.mark.parametrize("instruction", [None, INSTRUCTION])
def test_langchain_passes_it_on(
    reranker: HeadRoutedAttentionReranker, instruction: str | None
) -> None:
    compressor = HeadRoutedCompressor(reranker=reranker, instruction=instruction)
    documents = [LangChainDocument(text) for text in TEXTS]
    ranked = compressor.compress_documents(documents, QUERY)
    scores = [document.metadata["relevance_score"] for document in ranked]
    assert scores == expected(reranker, instruction)


class Corpus:
    """A searcher that finds all texts."""

    def search(self, query: str, k: int) -> list[Any]:
        assert query == QUERY
        return [type("Hit", (), {"docid": text, "score": 1.0}) for text in TEXTS[:k]]


@pytest.mark.parametrize("stages", [None, INSTRUCTION])
@pytest.mark.parametrize("own", [None, OWN])
def test_pyserini_passes_on_the_querys_own_or_the_stages(
    reranker: HeadRoutedAttentionReranker, stages: str | None, own: str | None
) -> None:
    corpus = {text: Document(text, id=text) for text in TEXTS}
    stage = HeadRoutedStage(Corpus(), reranker, corpus=corpus, instruction=stages)
    scores = expected(reranker, own or stages)
    assert [hit.score for hit in stage.search(QUERY, instruction=own)] == scores
    hits = Corpus().search(QUERY, 3)
    assert [hit.score for hit in stage.rerank_hits(QUERY, hits, instruction=own)] == scores
    documents = list(corpus.values())
    found = stage.rerank_documents(QUERY, documents, instruction=own)
    assert [hit.score for hit in found] == scores
    run = {"1": dict.fromkeys(TEXTS, 1.0)}
    instructions = None if own is None else {"1": own, "2": "Not for this query."}
    ((_, hits),) = stage.rerank_run(run, {"1": QUERY}, instructions=instructions)
    assert [hit.score for hit in hits] == scores


class Plain:
    """A re-ranker of another kind, which knows no instructions."""

    def rerank(
        self, query: str, documents: Sequence[Document], top_n: int | None = None
    ) -> Ranking:
        raise AssertionError(query, documents, top_n)


@pytest.mark.parametrize(
    "make",
    [
        lambda text: HeadRoutedRerank(instruction=text),
        lambda text: HeadRoutedCompressor(instruction=text),
        lambda text: HeadRoutedStage(Corpus(), Plain(), corpus={}, instruction=text),
    ],
    ids=["llama-index", "langchain", "pyserini"],
)
def test_a_blank_instruction_is_refused(make: Any) -> None:
    with pytest.raises(InputError, match=r"^instruction=' ' is blank; give a text\.$"):
        make(" ")
