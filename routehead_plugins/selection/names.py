"""Which selector is meant: heads, a router, or what comes with the library for the LLM."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from routehead_plugins.backbone import EMBEDDED
from routehead_plugins.errors import InputError
from routehead_plugins.heads import HeadSet
from routehead_plugins.selection.router import Router
from routehead_plugins.selection.selectors import AllHeads, Selector, as_selector

SHIPPED = Path(__file__).parents[1] / "assets" / "routers"
"""A folder for each router that comes with the library, named after its LLM."""

ROUTED = "routed"
_PREFIX = f"{ROUTED}:"
_EMBEDDED_LLM = "smollm2-135m-instruct"


def choose_selector(
    model: str,
    heads: HeadSet | str | Path | Sequence[tuple[int, int]] | None = None,
    router: Router | str | Path | None = None,
    *,
    layout: str | None = None,
    local_files_only: bool = False,
) -> Selector:
    """Find the selector that arguments ask for.

    Args:
        model: The LLM's name.
        heads: What ``as_selector`` reads; ``"routed"`` for the router that comes with the library,
            ``"routed:NAME"`` for another; ``None`` leaves it to the router.
        router: A router, its folder, or its id on the Hub; ``None`` takes the one that comes with
            the library for this LLM and layout, and every head where there is none.
        layout: The prompt layout that will be used, where that is settled already.
        local_files_only: Never ask the Hub, use what is in its local cache.

    Raises:
        InputError: Both heads and a router are given, or none comes with the library.
        HeadError: The heads are misspelled.
        ModelLoadError: The router cannot be read.
    """
    if isinstance(heads, str) and heads.startswith(_PREFIX):
        _check_alone(heads, router)
        router, heads = heads.removeprefix(_PREFIX), None
    elif heads == ROUTED:
        _check_alone(heads, router)
        router, heads = _named(model), None
    if heads is not None:
        _check_alone(heads, router)
        return as_selector(heads)
    if isinstance(router, Router):
        return router
    if router is not None:
        return Router.from_pretrained(router, local_files_only=local_files_only)
    folder = shipped_router(model)
    found = AllHeads() if folder is None else Router.from_pretrained(folder)
    # For another layout than it was trained for, it is no default.
    return found if layout in (None, found.layout) else AllHeads()


def shipped_router(model: str) -> Path | None:
    """Find the router that comes with the library for an LLM.

    Args:
        model: The LLM's name.

    Returns:
        Its folder; ``None`` where there is none.
    """
    # A folder or file may hold any LLM; the embedded one is itself, whatever lies about.
    local = model != EMBEDDED and os.path.exists(os.path.expanduser(model))
    if local or not SHIPPED.is_dir():
        return None
    found = (folder for folder in sorted(SHIPPED.iterdir()) if folder.is_dir())
    return next((folder for folder in found if _short(folder.name) == _short(model)), None)


def _short(name: str) -> str:
    """An LLM's name without its owner; `same_model` would look for folders of these names."""
    short = name.rsplit("/", 1)[-1].lower()
    return _EMBEDDED_LLM if short == EMBEDDED else short


def _named(model: str) -> Path:
    folder = shipped_router(model)
    if folder is None:
        raise InputError(
            f"no router comes with the library for {model!r}; train one (routehead train) and give "
            f'its folder, or heads="all".'
        )
    return folder


def _check_alone(heads: object, router: Router | str | Path | None) -> None:
    """Refuse a router beside heads."""
    if router is None:
        return
    given = "router" if isinstance(router, Router) else f"router={str(router)!r}"
    raise InputError(f"heads={heads!r} and {given} both choose heads; leave one of them out.")
