"""`routehead cache`: show what is kept in the user's cache, and remove it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from routehead_plugins.cli.options import with_options
from routehead_plugins.errors import InputError
from routehead_plugins.files import show_path
from routehead_plugins.io import user_cache

KINDS = {
    "llms": "GGUF files, converted for fast loading",
    "signals": "what training has read; a stopped job resumes from it",
    "dtype": "which number format is fast on this machine",
}
"""What is kept, by the names of --clear."""

# Names of folders that differ from those of kinds.
_FOLDERS = {"llms": "gguf"}


@dataclass(frozen=True)
class CacheArguments:
    """Options of `routehead cache`."""

    clear: Annotated[
        str | None,
        "Remove what is kept: **llms** (converted GGUF files), **signals** (of training), "
        "**dtype**, or **all**.",
    ] = None


@with_options()
def cache(arguments: CacheArguments) -> None:
    """Show what is kept in the user's cache, and remove it.

    A GGUF file is converted when it is first loaded, so that later loads take seconds. All
    conversions together take up to 20 GB; those that were not used for longest give way. The
    environment variable ROUTEHEAD_CACHE_LIMIT names another size, such as 50GB, or 0 for none.

    Example: routehead cache --clear llms
    """
    kinds = _kinds(arguments.clear)
    for kind in kinds:
        folder = _folder(kind)
        if folder.is_dir():
            shutil.rmtree(folder)
    table = Table("kept", "what", "size", "last used", box=SIMPLE_HEAD, pad_edge=False)
    for row in _rows():
        table.add_row(*row)
    console = Console()
    console.print(f"{show_path(_folder('llms').parent)}:" if table.rows else "Nothing is kept.")
    if table.rows:
        console.print(table)


def _kinds(clear: str | None) -> list[str]:
    """Return the kinds to remove.

    Raises:
        InputError: There is no such kind.
    """
    if clear is None:
        return []
    if clear not in {*KINDS, "all"}:
        raise InputError(f"--clear={clear} is not kept; choose {', '.join(KINDS)} or all.")
    return list(KINDS) if clear == "all" else [clear]


def _folder(kind: str) -> Path:
    """Return the folder of a kind.

    Raises:
        InputError: The user has no home.
    """
    folder = user_cache(_FOLDERS.get(kind, kind))
    if folder is None:
        raise InputError("there is no home folder, and so no cache; set XDG_CACHE_HOME.")
    return folder


def _rows() -> Iterator[tuple[str, str, str, str]]:
    """Describe every converted LLM, and the other kinds as a whole."""
    from routehead_plugins.backbone import conversions

    for conversion in conversions():
        what = f"{conversion.name}, {conversion.dtype}"
        yield "llms", what, _size(conversion.size), _date(conversion.used)
    for kind in ("signals", "dtype"):
        states = [file.stat() for file in _folder(kind).rglob("*") if file.is_file()]
        if states:
            used = max(state.st_mtime for state in states)
            yield kind, KINDS[kind], _size(sum(state.st_size for state in states)), _date(used)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
