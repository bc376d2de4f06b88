"""Layouts by name."""

from __future__ import annotations

from routehead_plugins.backbone import BytesCache, DocumentKeys, KeyValueCache
from routehead_plugins.errors import InputError, short_repr
from routehead_plugins.layouts.base import Layout
from routehead_plugins.layouts.late import DocumentStore, LateLayout
from routehead_plugins.layouts.parallel import ParallelLayout
from routehead_plugins.layouts.sequential import PREFIX_BYTES, SequentialLayout, check_window
from routehead_plugins.options import RerankerOptions

LAYOUTS = ("sequential", "parallel", "late")


def get_layout(
    name: str | None,
    *,
    document_cache: int | str | None = None,
    window: int | None = None,
    stride: int | None = None,
    documents: DocumentStore | None = None,
) -> Layout:
    """Make a layout by name; see ``RerankerOptions``.

    Args:
        name: One of ``LAYOUTS``; ``None`` for the sequential one.
        document_cache: Memory for keys and values that later queries reuse.
        window: Documents read at once in the sequential layout; ``None`` for all.
        stride: Step between window starts, in documents; ``None`` for half a window.
        documents: Documents that are kept, for the late layout.

    Raises:
        InputError: There is no layout of that name, or a setting does not fit it.
    """
    if name not in (None, *LAYOUTS):
        raise InputError(
            f"layout={short_repr(name)} is unknown; give one of: {', '.join(LAYOUTS)}."
        )
    check_window(window, stride)
    if name in (None, "sequential"):
        size = PREFIX_BYTES if document_cache is None else document_cache
        return SequentialLayout(window, stride, KeyValueCache(size))
    if window is not None:
        raise InputError(
            f"window={window!r} is for the sequential layout; "
            f"the {name} one takes any number of documents: leave it out."
        )
    if name == "late":
        cache: BytesCache[DocumentKeys] | None = None
        if document_cache is not None:
            cache = BytesCache(document_cache)
        return LateLayout(cache, documents=documents)
    return ParallelLayout(None if document_cache is None else KeyValueCache(document_cache))


def make_layout(
    options: RerankerOptions,
    chosen_for: str | None = None,
    documents: DocumentStore | None = None,
) -> Layout:
    """Make the layout that the options name, or else the one that the heads were chosen for."""
    return get_layout(
        chosen_for if options.layout is None else options.layout,
        document_cache=options.document_cache,
        window=options.window,
        stride=options.stride,
        documents=documents,
    )


def check_layout(layout: Layout, chosen_for: str | None) -> None:
    """Check that the layout in use is the one that the heads record; ``None`` fits any.

    Raises:
        InputError: They differ.
    """
    if chosen_for not in (None, layout.name):
        raise InputError(
            f"the heads were chosen for the {chosen_for} layout, but layout={layout.name!r}; "
            "leave layout out, or choose heads for this one."
        )
