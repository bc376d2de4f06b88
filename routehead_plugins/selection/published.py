"""Head sets by name: as they were published, and for the embedded LLM those that we detected.

A set is named after its method and its model: ``qr:Llama-3.1-8B-Instruct``. A second set of that
method and model is named after its data too: ``qr:Llama-3.1-8B-Instruct/longmemeval``; those of the
embedded LLM after their layout: ``core:embedded/parallel``. The names are those of the files in
``head_sets/``, so that a file put there is found.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import get_close_matches
from importlib.resources import as_file, files
from importlib.resources.abc import Traversable

from routehead_plugins.errors import HeadError
from routehead_plugins.heads import HeadSet

_SUFFIX = ".json"
_INSTRUCT = re.compile(r"-instruct(?=[-/]|$)")
_OWNER = re.compile(r"(?<=:)[^/]+/")


def published_names() -> tuple[str, ...]:
    """Name every set there is, in alphabetical order."""
    return tuple(_sets())


def published_heads(name: str) -> HeadSet:
    """Load a set by its name.

    Args:
        name: Such as ``"qr:Llama-3.1-8B-Instruct"``. The case of letters, the model's owner
            (``meta-llama/``) and a missing ``-Instruct`` make no difference.

    Raises:
        HeadError: There is no such set; the message lists those that there are.
    """
    sets = _sets()
    # Full names come last: they win over another model's name less its -Instruct.
    spellings = {_INSTRUCT.sub("", known.lower()): known for known in sets}
    spellings |= {known.lower(): known for known in sets}
    wanted = name.strip().lower()
    for spelling in (wanted, _OWNER.sub("", wanted, count=1)):
        if spelling in spellings:
            with as_file(sets[spellings[spelling]]) as path:
                return HeadSet.load(path)
    close = dict.fromkeys(spellings[near] for near in get_close_matches(wanted, spellings))
    hint = f"did you mean {' or '.join(close)}? There" if close else "there"
    raise HeadError(f"{name!r} is not a published head set; {hint} are {', '.join(sets)}.")


def looks_published(text: str) -> bool:
    """Whether a text is meant as the name of a published set rather than as a path."""
    method, colon, _ = text.partition(":")
    wanted = f"{method.strip().lower()}:"
    return bool(colon) and any(name.lower().startswith(wanted) for name in _sets())


def _sets() -> dict[str, Traversable]:
    """Name -> file."""
    root = files("routehead_plugins") / "assets" / "head_sets"
    found = {path.replace("/", ":", 1): file for path, file in _files(root) if "/" in path}
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def _files(folder: Traversable, above: str = "") -> Iterator[tuple[str, Traversable]]:
    """Every head-set file in a folder, with its path from there less the suffix."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _files(entry, f"{above}{entry.name}/")
        elif entry.name.endswith(_SUFFIX):
            yield above + entry.name.removesuffix(_SUFFIX), entry
