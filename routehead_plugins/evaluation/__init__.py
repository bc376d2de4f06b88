"""Measure rankings, compare methods, and lay the figures out in a table."""

from routehead_plugins.evaluation.measures import Evaluation, evaluate, parse_measures
from routehead_plugins.evaluation.significance import Comparison, compare
from routehead_plugins.evaluation.table import ResultTable

__all__ = ["Comparison", "Evaluation", "ResultTable", "compare", "evaluate", "parse_measures"]
