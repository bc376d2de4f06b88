"""Measure rankings, compare methods, and lay the figures out in a table."""

from routehead_plugins.evaluation.table import (
    Comparison,
    Evaluation,
    ResultTable,
    compare,
    evaluate,
    parse_measures,
)

__all__ = ["Comparison", "Evaluation", "ResultTable", "compare", "evaluate", "parse_measures"]
