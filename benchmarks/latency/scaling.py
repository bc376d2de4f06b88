"""Measure time against the number of documents: the readout alone, and a whole query.

    python -m benchmarks.latency.scaling

The whole query runs the embedded LLM up to a few heads of its sixth layer, in the parallel layout,
over different documents of 24 tokens; the readout gets random attention of 64 heads to as many
tokens. Both should take the same time per document whatever their number. Writes
benchmarks/results/scaling-embedded-cpu.json and prints its table as Markdown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.common import RESULTS, command_line, markdown_table, results_json, run
from benchmarks.latency.workload import make_documents, make_queries
from routehead_plugins import HeadRoutedAttentionReranker, Recipe, Span
from routehead_plugins.cli.runtime import err, load_llm, settings
from routehead_plugins.io import atomic_write_text
from routehead_plugins.options import RerankerOptions
from routehead_plugins.scoring import Readout, TokenAttention

TOKENS = 24
HEADS = 64
READ = "5-0,5-4,5-8"


@dataclass(frozen=True)
class Row:
    """Seconds for a number of documents: the shortest of several runs, as noise only adds time."""

    documents: int
    readout: float
    query: float


def main(
    sizes: Annotated[str, typer.Option(help="Numbers of documents.")] = "100,500,1000,2000,5000",
    repeats: int = 3,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = RESULTS,
) -> None:
    """Measure every size, print and write."""
    options = RerankerOptions(
        heads=READ, layout="parallel", dtype="float32", device="cpu", max_doc_tokens=TOKENS
    )
    llm = load_llm(options)
    reranker = HeadRoutedAttentionReranker.from_options(options, llm)
    counts = [int(size) for size in sizes.split(",")]
    texts = make_documents(llm.encoder, 100, TOKENS)
    # Numbers make them different.
    documents = [f"{index} {texts[index % len(texts)]}" for index in range(max(counts))]
    (query,) = make_queries(llm.encoder, 1)
    reranker.score(query, documents[:50])  # warm-up
    rows = []
    for count in counts:
        err.print(f"{count} documents ...")
        attention = _attention(count)
        rows.append(
            Row(
                count,
                _shortest(partial(_read_out, attention), repeats),
                _shortest(partial(reranker.score, query, documents[:count]), repeats),
            )
        )
    text = results_json(
        command_line("benchmarks.latency.scaling", [], {"sizes": sizes, "repeats": repeats}),
        settings(options) | {"heads": READ, "threads": torch.get_num_threads()},
        {"rows": [vars(row) for row in rows]},
    )
    atomic_write_text(output / "scaling-embedded-cpu.json", text)
    typer.echo(table(rows))


def table(rows: Sequence[Row]) -> str:
    """Format the times, and per document as a ratio to the first row, as Markdown."""
    lines = [["documents", "readout", "per document", "query", "per document"]]
    for row in rows:
        cells = [f"{row.documents:,}"]
        for name in ("readout", "query"):
            seconds, first = getattr(row, name), getattr(rows[0], name)
            ratio = (seconds / row.documents) / (first / rows[0].documents)
            cells += [f"{seconds:.3g} s", f"{ratio:.2f}x"]
        lines.append(cells)
    return markdown_table(lines)


def _attention(documents: int) -> TokenAttention:
    generator = torch.Generator().manual_seed(0)
    shape = (HEADS, documents * TOKENS)
    query, null = (torch.rand(shape, generator=generator) / shape[1] for _ in range(2))
    starts = range(0, shape[1], TOKENS)
    return TokenAttention(query, null, tuple(Span(start, start + TOKENS) for start in starts))


def _read_out(attention: TokenAttention) -> None:
    recipe = Recipe(aggregation="standardised", weights=(1.0,) * HEADS)
    Readout().scores(attention, recipe, [None] * len(attention.spans))


def _shortest(call: Callable[[], object], repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


if __name__ == "__main__":
    run(main)
