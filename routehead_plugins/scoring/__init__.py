"""Scoring: pure functions of tensors, from token attention to one score per document."""

from routehead_plugins.scoring.aggregation import COMPARABLE, aggregate, features
from routehead_plugins.scoring.copies import Excerpt, excerpt_documents, without_copies
from routehead_plugins.scoring.evidence import apart, evidence_spans
from routehead_plugins.scoring.passages import Chunking, LongTexts, Passage
from routehead_plugins.scoring.readout import DocumentSums, Readout
from routehead_plugins.scoring.reattn import Reweighting
from routehead_plugins.scoring.refinement import Refinement
from routehead_plugins.scoring.token_scores import (
    TokenAttention,
    document_signals,
    fuse,
    residuals,
    standardise,
)

__all__ = [
    "COMPARABLE",
    "Chunking",
    "DocumentSums",
    "Excerpt",
    "LongTexts",
    "Passage",
    "Readout",
    "Refinement",
    "Reweighting",
    "TokenAttention",
    "aggregate",
    "apart",
    "document_signals",
    "evidence_spans",
    "excerpt_documents",
    "features",
    "fuse",
    "residuals",
    "standardise",
    "without_copies",
]
