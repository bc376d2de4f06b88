"""Time of choosing heads per query, beside the re-ranking itself."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.common import markdown_table
from benchmarks.routers.data import JUDGED, Corpora, RouterCollector, join_samples
from benchmarks.routers.methods import FORCED_STRENGTHS, Fit, Trainer
from routehead_plugins import HeadRoutedAttentionReranker
from routehead_plugins.backbone import QueryLikelihood
from routehead_plugins.layouts import get_layout
from routehead_plugins.training import FitOptions

_QUERIES = 5
_CACHE = "4GB"
_TIMED = {
    "select": "choose heads",
    "cold": "re-rank, cold cache",
    "warm": "re-rank, warm cache",
    "static_cold": "static weights, cold cache",
    "static_warm": "static weights, warm cache",
    "likelihood": "query likelihood",
}


def routing_cost(trainer: Trainer, collector: RouterCollector, corpora: Corpora) -> dict[str, Any]:
    """Time routers trained on all samples, and query likelihood by the same LLM.

    Returns:
        Medians over a few queries of the first collection, in milliseconds: of choosing heads
        alone; of a whole re-ranking, choice included, without and with documents in the cache; the
        same with static weights; of query likelihood.
    """
    everything = join_samples([s for samples in corpora.values() for s in samples.values()])
    how = Fit(FitOptions(layer=collector.layers[-1]), FORCED_STRENGTHS["listwise"])
    routed = trainer.router(how, everything)
    static = trainer.router(replace(how, strength=None), everything)
    llm, options = collector.llm, collector.options
    likelihood = QueryLikelihood(llm, max_doc_tokens=options.max_doc_tokens)
    collection = next(iter(corpora.values()))[JUDGED].collection
    times: dict[str, list[float]] = {name: [] for name in _TIMED}
    for query_id in list(collection.topics)[: _QUERIES + 1]:
        query = collection.topics[query_id]
        documents = collection.candidates(query_id, options.hits)
        times["select"].append(_milliseconds(partial(routed.select, query, llm)))
        for router, prefix in ((routed, ""), (static, "static_")):
            reranker = HeadRoutedAttentionReranker(
                llm,
                router,
                layout=get_layout(collector.layout, document_cache=_CACHE),
                max_doc_tokens=options.max_doc_tokens,
            )
            for name in ("cold", "warm"):
                milliseconds = _milliseconds(partial(reranker.rerank, query, documents))
                times[f"{prefix}{name}"].append(milliseconds)
        times["likelihood"].append(_milliseconds(partial(likelihood.score, query, documents)))
    # The first query includes warm-ups.
    timed = {name: values[1:] or values for name, values in times.items()}
    return {
        "queries": len(timed["select"]),
        "documents": options.hits,
        "device": str(llm.device),
        "milliseconds": {name: statistics.median(values) for name, values in timed.items()},
    }


def cost_table(cost: dict[str, Any]) -> str:
    """Lay out the cost of routing, and its share of a re-ranking."""
    times = cost["milliseconds"]
    rows = [["", "ms", "share of routing", "share of likelihood"]]
    for name, label in _TIMED.items():
        share = f"{times['select'] / times[name]:.1%}" if name in ("cold", "warm") else "-"
        of_likelihood = f"{times[name] / times['likelihood']:.1%}"
        rows.append([label, f"{times[name]:.1f}", share, of_likelihood])
    about = f"medians of {cost['queries']} queries, {cost['documents']} documents"
    return f"### Cost of routing on {cost['device']}: {about}\n\n{markdown_table(rows)}"


def _milliseconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)
