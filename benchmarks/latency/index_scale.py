"""Measure a document index that is large: opening, looking up, searching, and memory.

    python -m benchmarks.latency.index_scale

Keys are random; their LLM is the embedded one, and their heads those of the late layout that come
with the library. Opening and looking up are measured at a million short documents, a search at a
hundred thousand of 120 tokens. Writes benchmarks/results/index-scale.json.
"""

from __future__ import annotations

import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.common import RESULTS, command_line, results_json, run
from benchmarks.latency.subject import timed
from routehead_plugins import DocumentIndex, FrozenLM, HeadRoutedAttentionReranker
from routehead_plugins.cli.runtime import err, load_llm
from routehead_plugins.index import RECORD, IndexConfig, Rows, ShardWriter, id_hash, text_hash
from routehead_plugins.io import atomic_write_text
from routehead_plugins.layouts import LateLayout
from routehead_plugins.options import RerankerOptions
from routehead_plugins.selection import choose_selector

_CPU = torch.device("cpu")
_BATCH = 1000
_QUERY = "what do bees do in winter"


def main(
    documents: Annotated[int, typer.Option(help="Documents to open and look up.")] = 1_000_000,
    tokens: Annotated[int, typer.Option(help="Tokens of each.")] = 4,
    searched: Annotated[int, typer.Option(help="Documents to search.")] = 100_000,
    searched_tokens: Annotated[int, typer.Option(help="Tokens of each.")] = 120,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = RESULTS,
) -> None:
    """Make both indexes in a temporary folder, measure, and write."""
    options = RerankerOptions(layout="late", dtype="float32", device="cpu")
    llm = load_llm(options, choose_selector(options))
    given = {
        "documents": documents,
        "tokens": tokens,
        "searched": searched,
        "searched_tokens": searched_tokens,
    }
    folder = Path(tempfile.mkdtemp(prefix="routehead-"))
    try:
        _make(folder / "many", llm, documents, tokens)
        opened = _open(folder / "many", documents)
        shutil.rmtree(folder / "many")
        _make(folder / "long", llm, searched, searched_tokens)
        search = _search(folder / "long", llm)
    finally:
        shutil.rmtree(folder)
    text = results_json(
        command_line("benchmarks.latency.index_scale", [], given),
        {**given, "threads": torch.get_num_threads()},
        {"opening": opened, "search": search},
    )
    atomic_write_text(output / "index-scale.json", text)
    for name, value in (opened | search).items():
        typer.echo(f"{name}: {value:,.3f}")


def _make(folder: Path, llm: FrozenLM, count: int, tokens: int) -> None:
    """Write documents of random keys."""
    selector = choose_selector(RerankerOptions(layout="late"))
    config = IndexConfig.of(llm, LateLayout().frame(llm), selector.candidates(llm))
    folder.mkdir()
    config.save(folder)
    writer = ShardWriter(folder, config, 2**30)
    err.print(f"Writing {count:,} documents of {tokens} tokens ...")
    for start in range(0, count, _BATCH):
        writer.append(list(_documents(config, start, min(_BATCH, count - start), tokens)))
    writer.close()


def _documents(
    config: IndexConfig, start: int, count: int, tokens: int
) -> Iterator[tuple[Any, Rows, bytes]]:
    random = np.random.default_rng(start)
    shape, scales = (tokens, config.columns.width), (tokens, len(config.columns.heads))
    positions = np.arange(tokens, dtype="<i4") + len(config.frame.prefix)
    for number in range(start, start + count):
        record = np.zeros((), RECORD)
        record["text"], record["id"] = text_hash(f"text {number}"), id_hash(str(number))
        record["text_tokens"] = tokens
        rows = Rows(
            random.integers(-127, 128, shape, dtype="i1"),
            np.full(scales, 0.02, "<f2"),
            positions,
            positions,
        )
        yield record, rows, str(number).encode()


def _open(folder: Path, count: int) -> dict[str, float]:
    before = _resident()
    indexes: list[DocumentIndex] = []
    opening = timed(lambda: indexes.append(DocumentIndex(folder)), _CPU)
    (index,) = indexes
    texts = [f"text {number}" for number in range(0, count, max(1, count // 1000))]
    first = timed(lambda: index.look_up(texts), _CPU)
    again = timed(lambda: index.look_up(texts), _CPU)
    length = timed(lambda: len(index), _CPU)
    return {
        "seconds to open": opening,
        "seconds to look up the first thousand": first,
        "seconds to look up a thousand": again,
        "seconds to count documents": length,
        "megabytes of memory": (_resident() - before) / 1e6,
        "gigabytes on disk": index.nbytes / 1e9,
    }


def _search(folder: Path, llm: FrozenLM) -> dict[str, float]:
    index, selector = DocumentIndex(folder), choose_selector(RerankerOptions(layout="late"))
    layout = LateLayout(documents=index)
    reranker = HeadRoutedAttentionReranker(llm, selector, layout=layout)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    first = timed(lambda: reranker.search(_QUERY), _CPU)
    again = timed(lambda: reranker.search(_QUERY), _CPU)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds of the first search, with checksums": first,
        "seconds of a search": again,
        "gigabytes of keys": index.nbytes / 1e9,
        # Pages of mapped files count, although the system may drop them.
        "megabytes of peak memory, mapped files included": (after - before) / 1e3,
    }


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    run(main)
