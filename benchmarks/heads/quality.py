"""Measure every selector on collections and write the tables.

    python -m benchmarks.heads.quality                       # the bundled collection
    python -m benchmarks.heads.quality DIR [DIR ...]         # BEIR folders of your own

Each collection gives benchmarks/results/quality-NAME.json (every query, versions, settings), by
`routehead evaluate`. An interrupted run resumes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.common import RESULTS, run
from routehead_plugins.cli import app
from routehead_plugins.io import BUNDLED


def main(
    collections: Annotated[list[Path] | None, typer.Argument(help="BEIR folders.")] = None,
    methods: str = "bm25,all,all+bm25,layers,layers+bm25",
    model: str = "embedded",
    dtype: str = "auto",
    hits: int = 20,
    max_doc_tokens: int = 120,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = RESULTS,
) -> None:
    """Measure every selector on collections and write the tables."""
    output.mkdir(parents=True, exist_ok=True)
    for collection in collections or [BUNDLED]:
        options = {
            "collection": collection,
            "methods": methods,
            "measures": f"nDCG@10,RR@10,R@{hits}",
            "hits": hits,
            "model": model,
            "dtype": dtype,
            "max-doc-tokens": max_doc_tokens,
            "output": output / f"quality-{collection.resolve().name}.json",
        }
        arguments = [f"--{name}={value}" for name, value in options.items()]
        app(["evaluate", *arguments], standalone_mode=False)


if __name__ == "__main__":
    run(main)
