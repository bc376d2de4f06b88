"""Index a corpus with Lucene, search it with BM25, re-rank the results, write a run."""

import sys
import tempfile
from pathlib import Path

from routehead_plugins.adapters.pyserini import HeadRoutedStage, bm25_run, build_index
from routehead_plugins.io import BUNDLED, load_collection, write_run


def main(folder: Path) -> None:
    """Re-rank two queries of the bundled collection into ``folder``."""
    collection = load_collection(BUNDLED)
    topics = dict(list(collection.topics.items())[7:9])
    index = build_index(BUNDLED, folder / "index")
    stage = HeadRoutedStage.from_index(index, model="embedded", hits=10)

    for query in topics.values():
        print(query)
        for hit in stage.search(query, k=3):
            print(f"  {hit.rank}. (BM25 {hit.retrieval_rank:2}) {hit.document.metadata['title']}")

    run = bm25_run(stage.searcher, topics, hits=20)
    reranked = dict(stage.rerank_run(run, topics, depth=10))
    write_run(
        folder / "reranked.trec",
        {query_id: [(hit.docid, hit.score) for hit in hits] for query_id, hits in reranked.items()},
        tag="routehead",
    )
    print(f"run of {len(reranked)} queries: reranked.trec")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
