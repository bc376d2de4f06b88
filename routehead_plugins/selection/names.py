"""The grammar of names that ``heads=``, ``--heads`` and ``--methods`` accept.

``all``
    Every head of the LLM.
``layers``, ``layers:10-19``
    All heads of the middle third of the layers, or of the layers named.
``13-18,13-1``
    These heads, each as layer-head.
``qr:Llama-3.1-8B-Instruct``, ``weights:embedded/parallel``
    A head set that comes with the library: a method, a colon, and an LLM; see ``published``.
``routed``, ``routed:FOLDER``
    The router that comes with the library for the LLM, or another one by its folder or Hub id.
anything else
    The path of a head-set file.

In evaluations, ``bm25`` leaves the candidates in their order, and the suffix ``+bm25`` adds their
scores to those of a method. An LLM's name is ``embedded``, a Hub id, a folder or a ``.gguf`` file.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from routehead_plugins.backbone import EMBEDDED, Adapter
from routehead_plugins.errors import HeadError, InputError
from routehead_plugins.files import show_path
from routehead_plugins.heads import HeadSet
from routehead_plugins.options import HeadsLike, RerankerOptions
from routehead_plugins.selection.published import looks_published, published_heads, published_names
from routehead_plugins.selection.router import Router
from routehead_plugins.selection.selectors import (
    AllHeads,
    FixedHeads,
    LayerInterval,
    Selector,
    short_name,
)

SHIPPED = Path(__file__).parents[1] / "assets" / "routers"
"""Folder with a folder for each router that comes with the library, named after its LLM."""

ALL = "all"
ROUTED = "routed"
FIRST_STAGE = "bm25"
"""Name of the method that leaves the candidates in their order."""
FUSED = f"+{FIRST_STAGE}"
"""Suffix of the methods that add the candidates' scores."""

_INTERVAL = re.compile(r"layers(?::(\d{1,9})-(\d{1,9}))?")


def choose_selector(options: RerankerOptions) -> Selector:
    """Return the selector that the options ask for.

    Args:
        options: Options of the re-ranker. Without heads and router, the library's router is the
            default, but only in the layout that it was trained for; in the late layout, the heads
            that come with the library for the embedded LLM are.

    Raises:
        InputError: Both heads and a router are given, or the library has no router for the LLM.
        HeadError: The heads are misspelled.
        ModelLoadError: The router cannot be read.
    """
    heads, router = options.heads, options.router
    if heads is not None and router is not None:
        given = "router" if isinstance(router, Router) else f"router={str(router)!r}"
        raise InputError(f"heads={heads!r} and {given} both choose heads; leave one of them out.")
    if isinstance(heads, str) and heads.partition(":")[0] == ROUTED:
        _, colon, name = heads.partition(":")
        router, heads = name if colon else shipped_router(options.model), None
        if router is None:
            raise InputError(
                f"no router comes with the library for {options.model!r}; train one (routehead "
                'train) and give its folder, or heads="all".'
            )
    if heads is not None:
        return as_selector(heads)
    if isinstance(router, Router):
        return router
    if router is not None:
        return Router.from_pretrained(router, **options.hub)
    return _heads_of_the_llm(options) if options.adapter is None else _adapters_heads(options)


def _heads_of_the_llm(options: RerankerOptions) -> Selector:
    """Return the router or heads that come with the library for the options' LLM, or all."""
    folder = shipped_router(options.model)
    selector = AllHeads() if folder is None else Router.from_pretrained(folder)
    layout = options.layout if options.window is None else "sequential"
    if layout in (None, selector.layout):
        return selector
    # All heads would do in the late layout as well, but their keys are many times as large.
    own = None if folder is None or layout != "late" else f"ndcg:{EMBEDDED}/late"
    return FixedHeads(published_heads(own)) if own in published_names() else AllHeads()


def _adapters_heads(options: RerankerOptions) -> Selector:
    """Return the heads in the folder of the options' adapter, or all."""
    adapter = options.adapter
    if not isinstance(adapter, Adapter):
        adapter = Adapter.from_pretrained(adapter, **options.hub)
    return AllHeads() if adapter.heads is None else FixedHeads(adapter.heads)


def as_selector(heads: HeadsLike | None) -> Selector:
    """Turn heads, or their name, into a selector; see the top of this module.

    Args:
        heads: A name other than ``"routed"``, a path, a ``HeadSet``, or pairs; ``None`` for all.

    Raises:
        HeadError: The argument is invalid, or there is no published set of that name.
    """
    if heads is None or (isinstance(heads, str) and heads == ALL):
        return AllHeads()
    if isinstance(heads, str):
        interval = _INTERVAL.fullmatch(heads)
        if interval is not None:
            first, last = (None if bound is None else int(bound) for bound in interval.groups())
            return LayerInterval(first, last)
        if HeadSet.looks_like(heads):
            return FixedHeads(HeadSet.parse(heads))
        if looks_published(heads):
            return FixedHeads(published_heads(heads))
    if isinstance(heads, str | Path):
        if not os.path.isfile(heads):
            raise HeadError(
                f"heads='{show_path(heads)}' is neither a list of heads nor a file; give "
                '"all", "layers:10-19", "13-18,13-1", "qr:Llama-3.1-8B-Instruct" '
                "or the path of a head-set file."
            )
        return FixedHeads(HeadSet.load(heads))
    return FixedHeads(heads if isinstance(heads, HeadSet) else HeadSet(heads))


def shipped_router(model: str) -> Path | None:
    """Return the folder of the library's router for an LLM, or ``None`` if there is none.

    Args:
        model: The LLM's name.
    """
    # A local folder or file may hold any LLM; the embedded one is never a path.
    if model != EMBEDDED and os.path.exists(os.path.expanduser(model)):
        return None
    folders = {short_name(path.name): path for path in SHIPPED.glob("*/")}
    return folders.get(short_name(model))


def split_methods(text: str) -> list[str]:
    """Split a comma-separated list of methods; adjacent ``layer-head`` items are one method.

    Args:
        text: Such as ``"bm25,all,13-18,13-1,layers:10-19"``, which lists four methods.

    Raises:
        InputError: No method is named, or one is named twice.
    """
    methods: list[str] = []
    for item in (part.strip() for part in text.split(",")):
        is_head = HeadSet.looks_like(item.removesuffix(FUSED))
        if is_head and methods and HeadSet.looks_like(methods[-1]):
            methods[-1] += f",{item}"
        elif item:
            methods.append(item)
    if not methods:
        raise InputError('--methods names no method; give some, such as "bm25,all,layers".')
    repeated = [method for method in methods if methods.count(method) > 1]
    if repeated:
        raise InputError(f"method {repeated[0]!r} is named twice; name each method once.")
    return methods
