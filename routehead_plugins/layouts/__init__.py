"""How the pieces of a prompt are arranged and run.

A layout decides order, positions and passes; no other room knows them. Attention comes back in the
caller's order of documents.
"""

from routehead_plugins.layouts.base import Layout, ReadOptions, check_null_share
from routehead_plugins.layouts.names import check_layout, get_layout, make_layout
from routehead_plugins.layouts.parallel import ParallelLayout
from routehead_plugins.layouts.sequential import SequentialLayout, check_window

__all__ = [
    "Layout",
    "ParallelLayout",
    "ReadOptions",
    "SequentialLayout",
    "check_layout",
    "check_null_share",
    "check_window",
    "get_layout",
    "make_layout",
]
