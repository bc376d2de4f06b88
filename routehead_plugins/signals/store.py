"""Signals: what every head says of every candidate, computed once and kept on disk.

Everything that is learned (head sets, weights, routers) is learned from these tables; the LLM is
not run again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from routehead_plugins.errors import InputError
from routehead_plugins.heads import HeadSet
from routehead_plugins.io import atomic_write_bytes, atomic_write_text, make_folder

_TENSORS = (
    "mass",
    "null_mass",
    "calibrated",
    "gains",
    "first_stage",
    "ideal_gains",
    "averaged",
)


@dataclass(frozen=True)
class QuerySignals:
    """One query and its candidates, best first by the first stage.

    Attributes:
        query_id: The query.
        query: Its text.
        docids: The candidates.
        mass: Attention that each document receives from the query, shape (heads, documents).
        null_mass: The same from the query without content.
        calibrated: Their difference, outlier tokens left out head by head.
        gains: Judged relevance of the candidates, 0 where there is no judgment, shape (documents,).
        first_stage: Their retrieval scores, shape (documents,).
        ideal_gains: Judged relevance of all documents that have any, also of those that were not
            retrieved, descending.
        averaged: Calibrated signals of all heads averaged before outliers are left out, as in ICR,
            shape (documents,); empty where that was not computed.
    """

    query_id: str
    query: str
    docids: tuple[str, ...]
    mass: Tensor
    null_mass: Tensor
    calibrated: Tensor
    gains: Tensor
    first_stage: Tensor
    ideal_gains: Tensor
    averaged: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def has_contrast(self) -> bool:
        """Whether its candidates differ in relevance: without that there is nothing to learn."""
        return bool((self.gains != self.gains[:1]).any())


@dataclass(frozen=True)
class SignalSet:
    """Signals of many queries, all by the same heads.

    Attributes:
        heads: The heads, in the order of the signals' first dimension.
        model: The LLM.
        layout: The prompt layout.
        data: Names of the collections.
        queries: The signals.
    """

    heads: HeadSet
    model: str
    layout: str
    data: tuple[str, ...]
    queries: tuple[QuerySignals, ...]

    @cached_property
    def with_contrast(self) -> tuple[QuerySignals, ...]:
        """The queries that something can be learned from.

        Raises:
            InputError: There are none.
        """
        found = tuple(query for query in self.queries if query.has_contrast)
        if not found:
            raise InputError(
                f"none of the {len(self.queries)} queries of {', '.join(self.data)} has both "
                "relevant and other candidates; give judged queries with 2 or more candidates."
            )
        return found

    def subset(self, queries: Sequence[QuerySignals]) -> SignalSet:
        """The same for some of the queries."""
        return SignalSet(self.heads, self.model, self.layout, self.data, tuple(queries))

    def __add__(self, other: SignalSet) -> SignalSet:
        """Put two collections together.

        Raises:
            InputError: They are of different LLMs, heads or layouts.
        """
        for name in ("model", "layout", "heads"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                shown = ("other heads", "these") if name == "heads" else (theirs, mine)
                raise InputError(
                    f"signals of {name} {shown[0]!r} cannot be joined to signals of {shown[1]!r}; "
                    "compute both the same way."
                )
        data = tuple(dict.fromkeys((*self.data, *other.data)))
        return SignalSet(self.heads, self.model, self.layout, data, (*self.queries, *other.queries))


class SignalStore:
    """A folder with one file per query, each written whole or not at all.

    Files are found by a key that says what they were computed from. One that is damaged, or of
    other settings, counts as missing and is computed again.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        """Open or make the folder.

        Args:
            folder: Holds a folder for each combination of settings.
            settings: Everything the signals depend on; must be JSON.

        Raises:
            InputError: The folder cannot be made.
        """
        text = json.dumps(settings, sort_keys=True, indent=1)
        self._fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.folder = make_folder(Path(folder) / self._fingerprint, "signals")
        atomic_write_text(self.folder / "settings.json", text + "\n")

    def get(self, key: str) -> QuerySignals | None:
        """Read what is kept under a key, if it is there and sound."""
        try:
            tensors = load(self._path(key).read_bytes())
            header = json.loads(bytes(tensors.pop("header").tolist()))
            if (header["fingerprint"], header["key"]) != (self._fingerprint, key):
                return None
            return QuerySignals(
                header["query_id"],
                header["query"],
                tuple(header["docids"]),
                *map(tensors.pop, _TENSORS),
            )
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def put(self, key: str, signals: QuerySignals) -> None:
        """Keep the signals of a query under a key.

        Raises:
            InputError: The file cannot be written.
        """
        header = {
            "fingerprint": self._fingerprint,
            "key": key,
            "query_id": signals.query_id,
            "query": signals.query,
            "docids": signals.docids,
        }
        tensors = {name: getattr(signals, name).contiguous() for name in _TENSORS}
        tensors["header"] = torch.tensor(list(json.dumps(header).encode()), dtype=torch.uint8)
        atomic_write_bytes(self._path(key), save(tensors))

    def _path(self, key: str) -> Path:
        # Keys may hold anything, and names of files may not.
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"
