"""Run the LLM once over training queries and store the signals of every head."""

from routehead_plugins.signals.collect import CollectOptions, collect_signals, judged_queries
from routehead_plugins.signals.measures import (
    Judgments,
    correlation,
    margin,
    ndcg,
    reciprocal_rank,
)
from routehead_plugins.signals.store import QuerySignals, SignalSet, SignalStore
from routehead_plugins.signals.synthesize import consistent, synthesize_queries
from routehead_plugins.signals.teacher import collect_likelihoods, mix_teacher

__all__ = [
    "CollectOptions",
    "Judgments",
    "QuerySignals",
    "SignalSet",
    "SignalStore",
    "collect_likelihoods",
    "collect_signals",
    "consistent",
    "correlation",
    "judged_queries",
    "margin",
    "mix_teacher",
    "ndcg",
    "reciprocal_rank",
    "synthesize_queries",
]
