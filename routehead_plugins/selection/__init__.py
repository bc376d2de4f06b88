"""Which heads to read for a query."""

from routehead_plugins.selection.names import ROUTED, choose_selector
from routehead_plugins.selection.neighbours import NeighbourRouter
from routehead_plugins.selection.query_space import QuerySpace
from routehead_plugins.selection.router import HeadRouter, Router
from routehead_plugins.selection.selectors import AllHeads, FixedHeads, Selector, as_selector

__all__ = [
    "ROUTED",
    "AllHeads",
    "FixedHeads",
    "HeadRouter",
    "NeighbourRouter",
    "QuerySpace",
    "Router",
    "Selector",
    "as_selector",
    "choose_selector",
]
