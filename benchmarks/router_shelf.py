"""What was computed once is kept: a report of hours goes on where it was stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from routehead_plugins.io import atomic_write_text
from routehead_plugins.scoring import aggregation
from routehead_plugins.scoring import token_scores as scoring
from routehead_plugins.selection import query_space, router
from routehead_plugins.signals import measures as utility
from routehead_plugins.training import (
    correction,
    detection,
    fit,
    offline,
    weights,
)
from routehead_plugins.training import (
    head_search as _search,
)
from routehead_plugins.training import (
    proximal as _sparse,
)
from routehead_plugins.training import (
    pseudo_labels as labels,
)

Code = tuple[str, ...]
"""Files whose changes the version does not tell."""


def _files(*modules: ModuleType) -> Code:
    return tuple(str(module.__file__) for module in modules)


# What the penalty of weights depends on: choosing it takes longer than all else together, and must
# not be done again because something else was changed.
PENALTY = _files(aggregation, scoring, utility, weights, _sparse)
_EVERYTHING = (
    *PENALTY,
    *_files(detection, query_space, router, _search, correction, fit, labels, offline),
    str(Path(__file__).with_name("router_methods.py")),
)


class Shelf:
    """A folder of JSON files, found by what their content depends on.

    Args:
        folder: Made when something is put there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def kept(self, what: Sequence[Any], make: Callable[[], Any], code: Code = _EVERYTHING) -> Any:
        """Find something, or make and keep it.

        Args:
            what: All that it depends on besides the code; must be JSON.
            make: Gives it, as JSON.
            code: That it depends on.

        Returns:
            What JSON makes of it, found or made.
        """
        name = hashlib.sha256(
            json.dumps([_digest(code), what], sort_keys=True).encode()
        ).hexdigest()
        path = self.folder / f"{name[:24]}.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not there, or half of it after a power cut
            text = json.dumps(make())
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, text)
        return json.loads(text)

    def scores(self, what: Sequence[Any], make: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
        """The same for scores of several queries, which are float32."""
        found = self.kept(what, lambda: [each.float().tolist() for each in make()])
        return [torch.tensor(each) for each in found]


@cache
def _digest(code: Code) -> str:
    found = hashlib.sha256(torch.__version__.encode())
    for path in code:
        found.update(Path(path).read_bytes())
    return found.hexdigest()
