"""Many calls of one re-ranker: from many threads, and for a long time."""

from __future__ import annotations

import gc
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from ctypes import CDLL
from pathlib import Path
from typing import Any

from benchmarks.trust.report import Outcome, Sizes
from benchmarks.trust.subject import make_texts, tiny_llm
from routehead_plugins import HeadRoutedAttentionReranker
from routehead_plugins.layouts import make_layout
from routehead_plugins.options import RerankerOptions

THREADS = 32
LAYOUTS = ("sequential", "parallel")

_QUERIES = 12
_DOCUMENTS = 4
# Smaller than the documents of all queries, so that some are dropped and computed again.
_CACHE = "200KB"
_SOAK_CACHE = "1MB"
# Resident memory may grow by this share between the first measure and the last.
_GROWTH = 0.05


def check_threads(folder: Path, sizes: Sizes, seed: int) -> Outcome:  # noqa: ARG001
    """Call from many threads at once, with a cache of documents; compare with one thread."""
    figures: dict[str, Any] = {}
    for layout in LAYOUTS:
        rng = random.Random(seed)
        texts = make_texts(rng, 2 * _QUERIES)
        requests = [(query, rng.sample(texts, _DOCUMENTS)) for query in make_texts(rng, _QUERIES)]
        alone, shared = _reranker(layout, _CACHE), _reranker(layout, _CACHE)
        expected = [alone.score(query, documents) for query, documents in requests]
        order = [rng.randrange(_QUERIES) for _ in range(sizes.calls)]
        with ThreadPoolExecutor(THREADS) as pool:
            drawn = [requests[index] for index in order]
            scores = list(pool.map(shared.score, *zip(*drawn, strict=True)))
        pairs = zip(order, scores, strict=True)
        different = sum(values != expected[index] for index, values in pairs)
        figures[layout] = {"calls": len(scores), "different": different}
    different = sum(figure["different"] for figure in figures.values())
    return Outcome(
        not different,
        f"{THREADS} threads, {sizes.calls:,} calls in each layout with a document cache: "
        f"{different} differ from one thread in any bit",
        figures,
    )


def check_soak(folder: Path, sizes: Sizes, seed: int) -> Outcome:  # noqa: ARG001
    """Read new documents for every query, with a bounded cache; measure resident memory."""
    rng = random.Random(seed)
    rerankers = [_reranker(layout, _SOAK_CACHE) for layout in LAYOUTS]
    marks = [sizes.queries // 10, sizes.queries // 2, sizes.queries]
    memory = {}
    for number in range(1, sizes.queries + 1):
        query, *documents = make_texts(rng, 1 + _DOCUMENTS)
        rerankers[number % len(rerankers)].rerank(query, documents)
        if number in marks:
            memory[number] = round(_resident_megabytes(), 1)
    first, last = memory[marks[0]], memory[marks[-1]]
    growth = last / first - 1
    measured = ", ".join(f"{value:.0f} MB after {number:,}" for number, value in memory.items())
    return Outcome(
        growth <= _GROWTH,
        f"{sizes.queries:,} queries, half in each layout, with a document cache of {_SOAK_CACHE}: "
        f"resident memory {measured} ({growth:+.1%}; at most {_GROWTH:+.0%})",
        {"resident memory, MB": memory, "growth": round(growth, 4)},
    )


def _reranker(layout: str, cache: str) -> HeadRoutedAttentionReranker:
    options = RerankerOptions("tiny", layout=layout, document_cache=cache)
    return HeadRoutedAttentionReranker(tiny_llm(), layout=make_layout(options, layout))


def _resident_megabytes() -> float:
    """Return the process's resident memory, once what was freed is given back to the system."""
    gc.collect()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library, without such a function
            CDLL("libc.so.6").malloc_trim(0)
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096 / 1e6
