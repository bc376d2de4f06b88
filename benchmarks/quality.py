"""Measure every selector on collections and write the table.

    python benchmarks/quality.py                       # the bundled collection
    python benchmarks/quality.py DIR [DIR ...]         # BEIR folders of your own

Each collection gives benchmarks/results/quality-NAME.json (every query, versions, settings) and its
table is printed as Markdown. A run that was stopped goes on where it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from routehead_plugins.cli.evaluate import EvaluationJob, run_evaluation, split_methods
from routehead_plugins.cli.runtime import ModelOptions
from routehead_plugins.io import BUNDLED

RESULTS = Path(__file__).parent / "results"


def main(
    collections: Annotated[list[Path] | None, typer.Argument(help="BEIR folders.")] = None,
    methods: str = "bm25,all,all+bm25,layers,layers+bm25",
    model: str = "embedded",
    dtype: str = "auto",
    hits: int = 20,
    max_doc_tokens: int = 120,
) -> None:
    """Measure every selector on collections and write the tables."""
    for collection in collections or [BUNDLED]:
        table = run_evaluation(
            EvaluationJob(
                collections=[collection],
                methods=split_methods(methods),
                hits=hits,
                measures=["nDCG@10", "RR@10", f"R@{hits}"],
                baseline="bm25",
                first_stage_weight=1.0,
                output=RESULTS / f"quality-{collection.resolve().name}.json",
                llm=ModelOptions(model, None, dtype, max_doc_tokens),
            )
        )
        typer.echo(table.to_markdown())


if __name__ == "__main__":
    typer.run(main)
