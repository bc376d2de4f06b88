"""Head sets that come with the library: published ones, and our own for the embedded LLM.

A set is named after its method and its model: ``qr:Llama-3.1-8B-Instruct``. A second set of the
same method and model adds its data, ``qr:Llama-3.1-8B-Instruct/longmemeval``, and those of the
embedded LLM add their layout, ``core:embedded/parallel``. Names follow the files in
``assets/head_sets``: any head-set file put there gets one.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path

from routehead_plugins.errors import HeadError
from routehead_plugins.heads import HeadSet

_FOLDER = Path(__file__).parents[1] / "assets" / "head_sets"
_INSTRUCT = re.compile(r"-instruct(?=[-/]|$)")
_OWNER = re.compile(r"(?<=:)[^/]+/")


def published_names() -> tuple[str, ...]:
    """List the names of all sets, in alphabetical order."""
    return tuple(_sets())


def published_heads(name: str) -> HeadSet:
    """Load a set by its name.

    Args:
        name: Such as ``"qr:Llama-3.1-8B-Instruct"``. Case, the model's owner (``meta-llama/``) and
            a missing ``-Instruct`` are ignored.

    Raises:
        HeadError: There is no such set; the message lists all names.
    """
    sets = _sets()
    # Full names come last, so that they win over another model's name without its -Instruct.
    spellings = {_INSTRUCT.sub("", full.lower()): full for full in sets}
    spellings |= {full.lower(): full for full in sets}
    wanted = name.strip().lower()
    for spelling in (wanted, _OWNER.sub("", wanted, count=1)):
        if spelling in spellings:
            return HeadSet.load(sets[spellings[spelling]])
    close = dict.fromkeys(spellings[near] for near in get_close_matches(wanted, spellings))
    hint = f"did you mean {' or '.join(close)}? There" if close else "there"
    raise HeadError(f"{name!r} is not a published head set; {hint} are {', '.join(sets)}.")


def looks_published(text: str) -> bool:
    """Tell whether a text is the name of a published set rather than a path."""
    method, colon, _ = text.partition(":")
    prefix = f"{method.strip().lower()}:"
    return bool(colon) and any(name.lower().startswith(prefix) for name in _sets())


def _sets() -> dict[str, Path]:
    """Map names to files."""
    paths = {path.relative_to(_FOLDER): path for path in _FOLDER.rglob("*/*.json")}
    sets = {name.with_suffix("").as_posix().replace("/", ":", 1): paths[name] for name in paths}
    return dict(sorted(sets.items(), key=lambda item: item[0].lower()))
