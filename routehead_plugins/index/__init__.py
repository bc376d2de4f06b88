"""Documents on disk, reduced to their keys at the heads that may be read."""

from routehead_plugins.index.builder import IndexBuilder, IndexReport
from routehead_plugins.index.config import DTYPES, IndexConfig
from routehead_plugins.index.document_index import (
    DocumentIndex,
    IndexChunk,
    id_hash,
    text_hash,
)
from routehead_plugins.index.options import open_documents
from routehead_plugins.index.reduction import kept_rows, quantised, rows_of
from routehead_plugins.index.search import SearchHit, read_all
from routehead_plugins.index.shards import RECORD, Rows, ShardWriter

__all__ = [
    "DTYPES",
    "RECORD",
    "DocumentIndex",
    "IndexBuilder",
    "IndexChunk",
    "IndexConfig",
    "IndexReport",
    "Rows",
    "SearchHit",
    "ShardWriter",
    "id_hash",
    "kept_rows",
    "open_documents",
    "quantised",
    "read_all",
    "rows_of",
    "text_hash",
]
