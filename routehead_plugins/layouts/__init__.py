"""Layouts: order, positions and passes of a prompt's pieces, which no other room knows.

Attention comes back in the caller's order of documents.
"""

from routehead_plugins.layouts.base import Layout, ReadOptions, check_null_share
from routehead_plugins.layouts.names import check_layout, get_layout, make_layout
from routehead_plugins.layouts.parallel import ParallelLayout
from routehead_plugins.layouts.sequential import SequentialLayout

__all__ = [
    "Layout",
    "ParallelLayout",
    "ReadOptions",
    "SequentialLayout",
    "check_layout",
    "check_null_share",
    "get_layout",
    "make_layout",
]
