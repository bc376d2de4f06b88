"""Run the LLM once over training queries and store the signals of every head."""

from routehead_plugins.signals.collect import (
    CollectOptions,
    collect_signals,
    judged_queries,
    non_blank_candidates,
)
from routehead_plugins.signals.measures import (
    Judgments,
    correlation,
    margin,
    ndcg,
    reciprocal_rank,
)
from routehead_plugins.signals.phrases import phrase_queries
from routehead_plugins.signals.store import QuerySignals, SignalSet, SignalStore
from routehead_plugins.signals.synthesize import consistent, synthesize_queries
from routehead_plugins.signals.teacher import collect_likelihoods, mix_teacher, with_teacher
from routehead_plugins.signals.teachers import (
    CrossEncoderTeacher,
    EncoderTeacher,
    LikelihoodTeacher,
    Teacher,
    collect_teacher,
    load_teacher,
)

__all__ = [
    "CollectOptions",
    "CrossEncoderTeacher",
    "EncoderTeacher",
    "Judgments",
    "LikelihoodTeacher",
    "QuerySignals",
    "SignalSet",
    "SignalStore",
    "Teacher",
    "collect_likelihoods",
    "collect_signals",
    "collect_teacher",
    "consistent",
    "correlation",
    "judged_queries",
    "load_teacher",
    "margin",
    "mix_teacher",
    "ndcg",
    "non_blank_candidates",
    "phrase_queries",
    "reciprocal_rank",
    "synthesize_queries",
    "with_teacher",
]
