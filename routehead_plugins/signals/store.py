"""Signals of every head for every candidate, computed once and kept on disk.

A signal is the attention that a document receives from the query at one head. Head sets, weights
and routers are all fitted on these tables, so training does not run the LLM again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from routehead_plugins import __version__
from routehead_plugins.backbone import FrozenLM
from routehead_plugins.errors import InputError
from routehead_plugins.heads import HeadSet
from routehead_plugins.io import JSON, StrPath, atomic_write_bytes, atomic_write_text, make_folder

_TENSORS = ("mass", "calibrated", "gains", "first_stage", "ideal_gains", "averaged")


@dataclass(frozen=True)
class QuerySignals:
    """The signals and judgments of one query's candidates, in first-stage order.

    Attributes:
        query_id: Id of the query.
        query: Text of the query.
        docids: Ids of the candidates.
        mass: Attention that each document receives from the query, shape (heads, documents).
        calibrated: The same less the attention from the null query, with outlier tokens dropped
            head by head, shape (heads, documents).
        gains: Judged relevance of the candidates, 0 for unjudged ones, shape (documents,).
        first_stage: Retrieval scores of the candidates, shape (documents,).
        ideal_gains: Judged relevance of all relevant documents, retrieved or not, descending.
        averaged: Calibrated attention averaged over all heads before outlier tokens are dropped, as
            in ICR, shape (documents,); empty if it was not computed.
    """

    query_id: str
    query: str
    docids: tuple[str, ...]
    mass: Tensor
    calibrated: Tensor
    gains: Tensor
    first_stage: Tensor
    ideal_gains: Tensor
    averaged: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def has_contrast(self) -> bool:
        """Whether the candidates differ in relevance; without that, nothing can be learned."""
        return bool((self.gains != self.gains[:1]).any())


@dataclass(frozen=True)
class SignalSet:
    """Signals of many queries at the same heads.

    Attributes:
        heads: The heads, in the order of the signals' first dimension.
        model: Name of the LLM.
        layout: Name of the prompt layout.
        data: Names of the collections.
        queries: The signals of each query.
        adapter: Label of the LLM's adapter; ``None`` for none.
    """

    heads: HeadSet
    model: str
    layout: str
    data: tuple[str, ...]
    queries: tuple[QuerySignals, ...]
    adapter: str | None = None

    @cached_property
    def with_contrast(self) -> tuple[QuerySignals, ...]:
        """The queries whose candidates differ in relevance.

        Raises:
            InputError: No query has such candidates.
        """
        queries = tuple(query for query in self.queries if query.has_contrast)
        if not queries:
            raise InputError(
                f"none of the {len(self.queries)} queries of {', '.join(self.data)} has both "
                "relevant and other candidates; give judged queries with 2 or more candidates."
            )
        return queries

    def check_finite(self) -> None:
        """Check that the signals of the queries with contrast are finite numbers.

        Raises:
            InputError: A signal is infinite or not a number, or no query has contrast.
        """
        for query in self.with_contrast:
            if not (query.mass.isfinite().all() and query.calibrated.isfinite().all()):
                raise InputError(
                    f"signals of query {query.query_id!r} are not finite numbers; compute them "
                    'again with dtype="float32".'
                )

    def subset(self, queries: Sequence[QuerySignals]) -> SignalSet:
        """Return a set with the given queries and the same heads, LLM, layout and data."""
        return replace(self, queries=tuple(queries))

    def restricted(self, heads: HeadSet) -> SignalSet:
        """Return the signals of some heads alone, in the order of these.

        Raises:
            HeadError: There are no signals of a head.
        """
        indices = self.heads.indices_of(list(heads))
        queries = [
            replace(query, mass=query.mass[indices], calibrated=query.calibrated[indices])
            for query in self.queries
        ]
        return replace(self, heads=HeadSet(list(heads)), queries=tuple(queries))

    def __add__(self, other: SignalSet) -> SignalSet:
        """Concatenate the queries of two sets.

        Raises:
            InputError: The sets differ in LLM, adapter, layout or heads.
        """
        for name in ("model", "layout", "adapter"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise InputError(
                    f"signals of {name} {theirs!r} cannot be joined to signals of {name} {mine!r}; "
                    "compute both the same way."
                )
        if self.heads != other.heads:
            raise InputError(
                "signals of different heads cannot be joined; compute both for the same heads."
            )
        data = tuple(dict.fromkeys((*self.data, *other.data)))
        return replace(self, data=data, queries=(*self.queries, *other.queries))


class SignalStore:
    """A folder with one file per query; a file is written whole or not at all.

    A file's name is the hash of a key that describes what the signals were computed from. A file
    that is damaged, was written with other settings, or has no checksum of its content, counts as
    missing.
    """

    def __init__(self, folder: StrPath, settings: Mapping[str, JSON]) -> None:
        """Open the folder of these settings, or create it.

        Args:
            folder: Parent of the folders of all settings.
            settings: Everything the signals depend on besides the keys.

        Raises:
            InputError: The folder cannot be created.
        """
        text = json.dumps(settings, sort_keys=True, indent=1)
        self._fingerprint = sha256(text, 16)
        self.folder = make_folder(Path(folder) / self._fingerprint, "signals")
        atomic_write_text(self.folder / "settings.json", text + "\n")

    def get(self, key: str) -> QuerySignals | None:
        """Read the signals with a key; ``None`` if there are none, or the file is damaged."""
        try:
            tensors = load(self.path(key).read_bytes())
            if bytes(tensors.pop("checksum").tolist()) != _checksum(tensors):
                return None
            header = json.loads(bytes(tensors["header"].tolist()))
            if (header["fingerprint"], header["key"]) != (self._fingerprint, key):
                return None
            return QuerySignals(
                header["query_id"],
                header["query"],
                tuple(header["docids"]),
                **{name: tensors[name] for name in _TENSORS},
            )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None

    def put(self, key: str, signals: QuerySignals) -> None:
        """Write the signals of a query under a key."""
        header = {"fingerprint": self._fingerprint, "key": key}
        header |= {name: getattr(signals, name) for name in ("query_id", "query", "docids")}
        # Cloned, as safetensors refuses tensors that share their memory.
        tensors = {name: getattr(signals, name).contiguous().clone() for name in _TENSORS}
        tensors["header"] = _as_tensor(json.dumps(header).encode())
        tensors["checksum"] = _as_tensor(_checksum(tensors))
        atomic_write_bytes(self.path(key), save(tensors))

    def path(self, key: str) -> Path:
        """Return the file of the signals with a key."""
        # Keys may hold characters that file names may not.
        return self.folder / f"{sha256(key, 24)}.safetensors"


def _as_tensor(content: bytes) -> Tensor:
    return torch.tensor(list(content), dtype=torch.uint8)


def _checksum(tensors: Mapping[str, Tensor]) -> bytes:
    """Compute a hash of names, types, shapes and values."""
    return hashlib.sha256(save(dict(tensors))).digest()


def sha256(text: str, length: int = 64) -> str:
    """Return the first hexadecimal digits of a text's hash."""
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def llm_settings(llm: FrozenLM, **others: JSON) -> dict[str, JSON]:
    """Return the settings that stored results depend on; files are named after their hash."""
    adapter = {} if llm.adapter is None else {"adapter": llm.adapter.fingerprint}
    settings = {"model": llm.name, "dtype": str(llm.dtype), **adapter, **others}
    return settings | {"version": __version__}
