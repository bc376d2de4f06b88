"""Heads that were chosen once are kept: fits take minutes, and tables are made more than once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from routehead_plugins import HeadSet
from routehead_plugins.errors import HeadError
from routehead_plugins.scoring import aggregation
from routehead_plugins.scoring import token_scores as scoring
from routehead_plugins.signals import SignalSet
from routehead_plugins.signals import measures as utility
from routehead_plugins.training import detection, weights
from routehead_plugins.training import proximal as _sparse

# What is chosen depends on these modules, whose changes the version does not tell.
_CODE = (aggregation, detection, scoring, utility, weights, _sparse)


def shelved(
    folder: Path | None, what: Any, train: SignalSet, choose: Callable[[], HeadSet]
) -> HeadSet:
    """Find heads that were chosen before from the same signals by the same code, or choose them.

    Args:
        folder: Where they are kept; ``None`` for nowhere.
        what: How they are chosen; must be JSON.
        train: What they are chosen from.
        choose: Chooses them.
    """
    if folder is None:
        return choose()
    name = hashlib.sha256(f"{json.dumps(what)} {_code()} {_content(train)}".encode()).hexdigest()
    path = folder / f"{name[:24]}.json"
    try:
        return HeadSet.load(path)
    except HeadError:  # not there, or half of it after a power cut
        found = choose()
        folder.mkdir(parents=True, exist_ok=True)
        found.save(path)
        return found


@cache
def _code() -> str:
    found = hashlib.sha256(torch.__version__.encode())
    for module in _CODE:
        found.update(Path(str(module.__file__)).read_bytes())
    return found.hexdigest()


def _content(train: SignalSet) -> str:
    found = hashlib.sha256(repr((str(train.heads), train.model, train.layout, train.data)).encode())
    for query in train.queries:
        found.update(repr((query.query_id, query.query, query.docids)).encode())
        for name in ("mass", "calibrated", "gains", "first_stage", "ideal_gains"):
            found.update(getattr(query, name).contiguous().numpy().tobytes())
    return found.hexdigest()
