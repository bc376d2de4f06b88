"""Open the index that the options of a re-ranker name, and take from it what they leave open."""

from __future__ import annotations

from dataclasses import replace

from routehead_plugins.errors import InputError
from routehead_plugins.files import show_path
from routehead_plugins.index.document_index import DocumentIndex
from routehead_plugins.options import RerankerOptions


def open_documents(options: RerankerOptions) -> tuple[RerankerOptions, DocumentIndex | None]:
    """Open the index, if there is one.

    Args:
        options: Options of the re-ranker.

    Returns:
        The options with the layout and, where they name none, the heads and the cut of the index;
        and the index.

    Raises:
        InputError: The options name another layout, or no router for an index that needs one.
        IndexMismatchError: The folder holds no index, or one of another version.
        IndexDamagedError: The index is damaged.
    """
    if options.documents is None:
        return options, None
    if options.layout not in {None, "late"}:
        raise InputError(
            f"documents={show_path(options.documents)!r} is for the late layout, but "
            f"layout={options.layout!r}; leave one of them out."
        )
    index = DocumentIndex(options.documents)
    heads, config = options.heads, index.config
    if heads is None and options.router is None:
        if config.routed:
            raise InputError(
                f"the index {show_path(options.documents)} was made for a router; give the same "
                "router."
            )
        heads = config.heads
    cut = config.max_doc_tokens if options.max_doc_tokens is None else options.max_doc_tokens
    return replace(options, layout="late", heads=heads, max_doc_tokens=cut), index
