"""A small judged collection, for tests of commands."""

from __future__ import annotations

import json
from pathlib import Path

from routehead_plugins.io import write_run

CORPUS = {
    "d1": "Wolves hunt in packs.",
    "d2": "Rain falls on the hill.",
    "d3": "A wolf ran over the hill in the rain.",
    "d4": "Grey stones lie by a river.",
}
QUERIES = {"1": "where did the wolf run", "2": "stones in the rain"}
RUN = {"1": {"d1": 3.0, "d3": 2.0, "d2": 1.0}, "2": {"d4": 2.0, "d2": 1.0}}


def write_collection(folder: Path) -> None:
    """Write the collection as a BEIR folder with a run."""
    (folder / "qrels").mkdir(parents=True)
    rows = [json.dumps({"_id": key, "title": "", "text": text}) for key, text in CORPUS.items()]
    (folder / "corpus.jsonl").write_text("\n".join(rows))
    rows = [json.dumps({"_id": int(key), "text": text}) for key, text in QUERIES.items()]
    (folder / "queries.jsonl").write_text("\n".join(rows))
    (folder / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\n1\td3\t2\n1\td1\t1\n2\td4\t1\n"
    )
    write_run(folder / "run.bm25.trec", RUN, "bm25")
