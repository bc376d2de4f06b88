"""Layouts decide the order, the positions and the passes of a prompt's pieces.

No other room knows them: attention is returned in the caller's order of documents.
"""

from routehead_plugins.layouts.base import Layout, ReadOptions, check_null_share
from routehead_plugins.layouts.late import (
    DocumentStore,
    LateDocument,
    LateFrame,
    LateLayout,
    LateTails,
    piece_of_rows,
)
from routehead_plugins.layouts.names import check_layout, get_layout, make_layout
from routehead_plugins.layouts.parallel import ParallelLayout
from routehead_plugins.layouts.sequential import SequentialLayout

__all__ = [
    "DocumentStore",
    "LateDocument",
    "LateFrame",
    "LateLayout",
    "LateTails",
    "Layout",
    "ParallelLayout",
    "ReadOptions",
    "SequentialLayout",
    "check_layout",
    "check_null_share",
    "get_layout",
    "make_layout",
    "piece_of_rows",
]
