"""LlamaIndex: re-rank in a query engine; one LLM embeds the nodes and re-ranks them.

MockLLM stands in for the LLM that answers; needs the extras llama-index and embedded.
"""

from typing import Any

from llama_index.core import VectorStoreIndex
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.embeddings import BaseEmbedding
from llama_index.core.llms import MockLLM
from llama_index.core.schema import NodeWithScore, TextNode

from routehead_plugins import FrozenLM, HeadRoutedAttentionReranker
from routehead_plugins.adapters.llama_index import HeadRoutedRerank
from routehead_plugins.backbone import Standardiser
from routehead_plugins.io import BUNDLED, load_collection


class FrozenEmbedding(BaseEmbedding):
    """Embeddings from the hidden states of the LLM that re-ranks."""

    _llm: FrozenLM = PrivateAttr()
    _standardise: Standardiser = PrivateAttr()

    def __init__(self, llm: FrozenLM, sample: list[str], **fields: Any) -> None:
        super().__init__(**fields)
        self._llm, self._standardise = llm, Standardiser.fit(llm.embed(sample))

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._standardise(self._llm.embed([text]))[0].tolist()

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)


def show(title: str, hits: list[NodeWithScore]) -> None:
    """Print scores and titles."""
    print(title, *(f"{hit.score:10.4f}  {hit.text.splitlines()[0]}" for hit in hits), sep="\n")


def main() -> None:
    """Ask two questions and print the nodes that the answers would be based on."""
    collection = load_collection(BUNDLED)
    nodes = [TextNode(id_=key, text=d.text) for key, d in list(collection.corpus.items())[:57]]
    llm = FrozenLM.from_pretrained("embedded")
    index = VectorStoreIndex(nodes, embed_model=FrozenEmbedding(llm, [n.text for n in nodes]))
    reranker = HeadRoutedAttentionReranker(llm, first_stage_weight=1.0)
    rerank = HeadRoutedRerank(top_n=3, reranker=reranker)
    engine = index.as_query_engine(MockLLM(), similarity_top_k=8, node_postprocessors=[rerank])
    for query in (collection.topics["q04"], collection.topics["q15"]):
        show(f"\n{query}\n  before", index.as_retriever(similarity_top_k=3).retrieve(query))
        show("  after", engine.query(query).source_nodes)


if __name__ == "__main__":
    main()
