"""What routing costs beside the re-ranking that it is for."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from router_data import JUDGED, Corpora, RouterCollector, joined
from router_methods import STRENGTHS, Fit, Trainer
from router_report import markdown

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
    """Time routers trained on everything there is, and query likelihood by the same LLM.

    Returns:
        Medians over a few queries of the first collection, in milliseconds: of choosing heads
        alone; of a whole re-ranking, choice included, without and with documents in the cache; the
        same with static weights; of query likelihood.
    """
    everything = joined([each for found in corpora.values() for each in found.values()])
    how = Fit(FitOptions(layer=collector.layers[-1]), STRENGTHS["listwise"])
    routed, static = (
        trainer.router(each, everything) for each in (how, replace(how, strength=None))
    )
    llm, cut = collector.llm, collector.job.llm.max_doc_tokens
    likelihood = QueryLikelihood(llm, max_doc_tokens=cut)
    collection = next(iter(corpora.values()))[JUDGED].collection
    found: dict[str, list[float]] = {name: [] for name in _TIMED}
    for query_id in list(collection.topics)[: _QUERIES + 1]:
        query = collection.topics[query_id]
        documents = collection.candidates(query_id, collector.job.hits)
        found["select"].append(_milliseconds(partial(routed.select, query, llm)))
        for router, prefix in ((routed, ""), (static, "static_")):
            layout = get_layout(collector.layout, document_cache=_CACHE)
            reranker = HeadRoutedAttentionReranker(llm, router, layout=layout, max_doc_tokens=cut)
            for name in ("cold", "warm"):
                taken = _milliseconds(partial(reranker.rerank, query, documents))
                found[f"{prefix}{name}"].append(taken)
        found["likelihood"].append(_milliseconds(partial(likelihood.score, query, documents)))
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
    rows = [["", "ms", "share of routing", "share of likelihood"]]
    for name, what in _TIMED.items():
        share = f"{found['select'] / found[name]:.1%}" if name in ("cold", "warm") else "-"
        rows.append([what, f"{found[name]:.1f}", share, f"{found[name] / found['likelihood']:.1%}"])
    about = f"medians of {cost['queries']} queries, {cost['documents']} documents"
    return f"### Cost of routing on {cost['device']}: {about}\n\n{markdown(rows)}"


def _milliseconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)
