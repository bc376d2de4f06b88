"""LlamaIndex: a query engine over the bundled collection, before and after re-ranking.

Everything runs here, without network or API keys: the retriever counts shared words, the embedded
LLM re-ranks, and LlamaIndex's MockLLM stands in for the LLM that writes the answer.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path

from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

import routehead_plugins
from routehead_plugins.adapters.llama_index import HeadRoutedRerank
from routehead_plugins.collections import load_collection

BUNDLED = Path(routehead_plugins.__file__).parent / "bundled"
QUERIES = ("q02", "q03", "q21", "q41")


class WordRetriever(BaseRetriever):
    """Ranks nodes by the words they share with the query, rare words first."""

    def __init__(self, nodes: list[TextNode], top_k: int) -> None:
        super().__init__()
        self._words = [(node, set(re.findall(r"\w+", node.text.lower()))) for node in nodes]
        self._frequency = Counter(word for _, words in self._words for word in words)
        self._top_k = top_k

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        asked = set(re.findall(r"\w+", query_bundle.query_str.lower()))
        hits = [
            NodeWithScore(
                node=node,
                score=sum(math.log(len(self._words) / self._frequency[w]) for w in asked & words),
            )
            for node, words in self._words
        ]
        return sorted(hits, key=lambda hit: -hit.get_score())[: self._top_k]


def main() -> None:
    """Ask a few questions and print what the answer is written from."""
    collection = load_collection(BUNDLED)
    nodes = [TextNode(id_=doc_id, text=doc.text) for doc_id, doc in collection.corpus.items()]
    retriever = WordRetriever(nodes, top_k=10)
    rerank = HeadRoutedRerank("embedded", top_n=3)
    engine = RetrieverQueryEngine.from_args(
        retriever, llm=MockLLM(max_tokens=1), node_postprocessors=[rerank]
    )
    for query_id in QUERIES:
        query = collection.topics[query_id]
        print(f"\n{query}")
        for name, found in (
            ("before", retriever.retrieve(query)[:3]),
            ("after", engine.query(query).source_nodes),
        ):
            for hit in found:
                grade = collection.qrels[query_id].get(hit.node_id, 0)
                title = hit.text.partition("\n")[0]
                print(f"  {name:6}  {hit.score:8.4f}  grade {grade}  {title}")


if __name__ == "__main__":
    main()
