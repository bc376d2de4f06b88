"""Choice of the heads to read for a query: selectors, routers, and the grammar of names."""

from routehead_plugins.backbone import check_pooling
from routehead_plugins.selection.names import (
    ALL,
    FIRST_STAGE,
    FUSED,
    ROUTED,
    as_selector,
    choose_selector,
    shipped_router,
    split_methods,
)
from routehead_plugins.selection.neighbours import NeighbourRouter
from routehead_plugins.selection.published import published_heads, published_names
from routehead_plugins.selection.query_space import QuerySpace, check_source
from routehead_plugins.selection.router import HeadRouter, Router
from routehead_plugins.selection.router_files import router_size
from routehead_plugins.selection.selectors import (
    AllHeads,
    FixedHeads,
    LayerInterval,
    Selector,
)

__all__ = [
    "ALL",
    "FIRST_STAGE",
    "FUSED",
    "ROUTED",
    "AllHeads",
    "FixedHeads",
    "HeadRouter",
    "LayerInterval",
    "NeighbourRouter",
    "QuerySpace",
    "Router",
    "Selector",
    "as_selector",
    "check_pooling",
    "check_source",
    "choose_selector",
    "published_heads",
    "published_names",
    "router_size",
    "shipped_router",
    "split_methods",
]
