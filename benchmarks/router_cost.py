"""What routing costs beside the re-ranking that it is for."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from router_data import JUDGED, Corpora, RouterCollector, joined
from router_methods import STRENGTHS, Fit, Trainer
from router_report import markdown

from routehead_plugins import HeadRoutedAttentionReranker
from routehead_plugins.layouts import get_layout
from routehead_plugins.training.fit import FitOptions

_QUERIES = 5
_CACHE = "4GB"


def routing_cost(trainer: Trainer, collector: RouterCollector, corpora: Corpora) -> dict[str, Any]:
    """Time a router trained on everything there is.

    Returns:
        Medians over a few queries of the first collection, in milliseconds: of choosing heads
        alone, and of a whole re-ranking, choice included, without and with documents in the cache.
    """
    everything = joined([each for found in corpora.values() for each in found.values()])
    how = Fit(FitOptions(layer=collector.layers[-1]), STRENGTHS["listwise"])
    router, llm = trainer.router(how, everything), collector.llm
    collection = next(iter(corpora.values()))[JUDGED].collection
    found: dict[str, list[float]] = {"select": [], "cold": [], "warm": []}
    for query_id in list(collection.topics)[: _QUERIES + 1]:
        query = collection.topics[query_id]
        documents = collection.candidates(query_id, collector.job.hits)
        reranker = HeadRoutedAttentionReranker(
            llm,
            router,
            layout=get_layout(collector.layout, document_cache=_CACHE),
            max_doc_tokens=collector.job.llm.max_doc_tokens,
        )
        found["select"].append(_milliseconds(partial(router.select, query, llm)))
        for name in ("cold", "warm"):
            found[name].append(_milliseconds(partial(reranker.rerank, query, documents)))
    # The first one pays for whatever is loaded late.
    timed = {name: each[1:] or each for name, each in found.items()}
    return {
        "queries": len(timed["select"]),
        "documents": collector.job.hits,
        "device": str(llm.device),
        "milliseconds": {name: statistics.median(each) for name, each in timed.items()},
    }


def cost_table(cost: dict[str, Any]) -> str:
    """Lay out what routing costs, and its share of a re-ranking."""
    found = cost["milliseconds"]
    rows = [["", "ms", "share of routing"]]
    rows.append(["choose heads", f"{found['select']:.1f}", "-"])
    for name in ("cold", "warm"):
        share = found["select"] / found[name]
        rows.append([f"re-rank, {name} cache", f"{found[name]:.1f}", f"{share:.1%}"])
    about = f"medians of {cost['queries']} queries, {cost['documents']} documents"
    return f"### Cost of routing on {cost['device']}: {about}\n\n{markdown(rows)}"


def _milliseconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)
