"""Run the LLM once over training queries and keep what every head says."""

from routehead_plugins.signals.collect import CollectOptions, collect_signals
from routehead_plugins.signals.measures import correlation, margin, ndcg, reciprocal_rank
from routehead_plugins.signals.store import QuerySignals, SignalSet
from routehead_plugins.signals.synthesize import consistent, synthesize_queries
from routehead_plugins.signals.teacher import collect_likelihoods, mix_teacher

__all__ = [
    "CollectOptions",
    "QuerySignals",
    "SignalSet",
    "collect_likelihoods",
    "collect_signals",
    "consistent",
    "correlation",
    "margin",
    "mix_teacher",
    "ndcg",
    "reciprocal_rank",
    "synthesize_queries",
]
