"""Every adapter reads a document index."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from indexed import TEXTS, documents
from langchain_core.documents import Document as LangChainDocument
from llama_index.core.schema import NodeWithScore, TextNode

from routehead_plugins import HeadRoutedAttentionReranker
from routehead_plugins.adapters.langchain import HeadRoutedCompressor
from routehead_plugins.adapters.llama_index import HeadRoutedRerank
from routehead_plugins.adapters.pyserini import HeadRoutedStage
from routehead_plugins.errors import IndexMismatchError

QUERY = "which wolf ran?"


@pytest.fixture
def options(model: str, tmp_path: Path) -> dict[str, Any]:
    """Options of a tiny LLM and an index of all documents."""
    loading: dict[str, Any] = {"model": model, "dtype": "float32", "device": "cpu"}
    reranker = HeadRoutedAttentionReranker.from_pretrained(
        heads="2-3,1-0", layout="late", **loading
    )
    reranker.index(documents(), tmp_path / "index")
    return {**loading, "documents": tmp_path / "index"}


def test_documents_of_an_index_are_not_run(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [
        hit.document.text
        for hit in HeadRoutedAttentionReranker.from_pretrained(**options).rerank(QUERY, TEXTS)
    ]

    def run(*_: object, **__: object) -> None:
        raise AssertionError("a document was run")

    monkeypatch.setattr("routehead_plugins.layouts.late.document_keys", run)
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in TEXTS]
    ranked = HeadRoutedRerank(**options).postprocess_nodes(nodes, query_str=QUERY)
    assert [node.text for node in ranked] == expected
    texts = [LangChainDocument(page_content=text) for text in TEXTS]
    compressed = HeadRoutedCompressor(top_n=4, **options).compress_documents(texts, QUERY)
    assert [document.page_content for document in compressed] == expected
    stage = HeadRoutedStage(None, corpus={}, **options)
    hits = stage.rerank_documents(QUERY, documents())
    assert [hit.document.text for hit in hits] == expected


def test_an_index_of_other_heads_is_refused_by_every_adapter(options: dict[str, Any]) -> None:
    wrong = options | {"heads": "3-3"}
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in TEXTS]
    texts = [LangChainDocument(page_content=text) for text in TEXTS]
    with pytest.raises(IndexMismatchError, match="holds no keys for key head 3-1"):
        HeadRoutedRerank(**wrong).postprocess_nodes(nodes, query_str=QUERY)
    with pytest.raises(IndexMismatchError, match="holds no keys for key head 3-1"):
        HeadRoutedCompressor(**wrong).compress_documents(texts, QUERY)
    with pytest.raises(IndexMismatchError, match="holds no keys for key head 3-1"):
        HeadRoutedStage(None, corpus={}, **wrong).rerank_documents(QUERY, documents())
