"""Keys and values of an LLM: cut, joined, and cached within a bound."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from cachetools import LRUCache
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from routehead_plugins.errors import InputError, short_repr

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class KeyValues:
    """Keys and values of consecutive tokens, for later tokens to look back at.

    Attributes:
        layers: Keys and values of the leading layers, each of shape (1, key heads, tokens, dim).
        start: Position of the first token.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    start: int

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return int(self.layers[0][0].shape[2])

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + self.tokens

    @property
    def last_layer(self) -> int:
        """The deepest layer whose keys and values are here."""
        return len(self.layers) - 1

    @property
    def nbytes(self) -> int:
        """Size of the tensors in bytes, whether or not they share memory with others."""
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers)

    def copied(self) -> KeyValues:
        """Copy the tensors, so that the larger ones they were cut from can be freed."""
        layers = tuple((keys.clone(), values.clone()) for keys, values in self.layers)
        return KeyValues(layers, self.start)


class _JoinedLayer(DynamicLayer):
    """A layer of a cache over several pieces, which it leaves as they are.

    The keys and values that a forward adds are joined to the pieces for that forward only.
    """

    def __init__(self, pieces: Sequence[tuple[Tensor, Tensor]], past: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._pieces = pieces
        self._past = sum(keys.shape[2] for keys, _ in pieces) if past is None else past
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        self.keys, self.values = key_states, value_states
        if not self._pieces:
            return key_states, value_states
        keys = torch.cat([*(keys for keys, _ in self._pieces), key_states], dim=2)
        values = torch.cat([*(values for _, values in self._pieces), value_states], dim=2)
        return keys, values

    def get_seq_length(self) -> int:
        return self._past + (0 if self.keys is None else int(self.keys.shape[2]))


def joined(
    pieces: Sequence[KeyValues],
    *,
    last_layer: int,
    batch: int = 1,
    past: int | None = None,
) -> DynamicCache:
    """Make a cache of several pieces, one after the other; each layer is joined when it runs.

    Args:
        pieces: Keys and values to join; not modified.
        last_layer: The deepest layer that will be run.
        batch: Number of sequences that follow the same pieces.
        past: Number of tokens that the cache says it holds, from which transformers decides whether
            a layer needs a mask; ``None`` for those of the pieces.
    """
    cache = DynamicCache()
    for layer in range(last_layer + 1):
        expanded = [
            (keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1))
            for keys, values in (piece.layers[layer] for piece in pieces)
        ]
        cache.layers.append(_JoinedLayer(expanded, past))
    return cache


def added(cache: DynamicCache, lengths: Sequence[int], *, start: int) -> list[KeyValues]:
    """Cut out what a forward added to a cache made by ``joined``: views, one per sequence.

    Tokens of a sequence beyond its length are padding.
    """
    layers = [(layer.keys, layer.values) for layer in cast(list[Any], cache.layers)]
    return [
        KeyValues(
            tuple(
                (keys[row : row + 1, :, :length], values[row : row + 1, :, :length])
                for keys, values in layers
            ),
            start,
        )
        for row, length in enumerate(lengths)
    ]


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


_Kept = TypeVar("_Kept", bound=_Sized)


class BytesCache(Generic[_Kept]):
    """Cache with a limit in bytes; drops what was least recently used. Thread-safe.

    Attributes:
        hits: Number of successful look-ups.
        misses: Number of failed look-ups.
    """

    def __init__(self, max_bytes: int | str) -> None:
        """Create an empty cache.

        Args:
            max_bytes: A number of bytes, or a text such as ``"2GB"`` or ``"512 MiB"``.

        Raises:
            InputError: ``max_bytes`` is neither.
        """
        self._held: LRUCache[Hashable, _Kept] = LRUCache(
            parse_bytes(max_bytes), getsizeof=lambda kept: kept.nbytes
        )
        self._lock = threading.Lock()
        self.hits = self.misses = 0

    def __len__(self) -> int:
        return len(self._held)

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return int(self._held.currsize)

    def look_up(
        self, key: Hashable, suits: Callable[[_Kept], bool] = lambda _: True
    ) -> _Kept | None:
        """Look up a key; ``None`` if it is missing, or what is kept does not suit."""
        with self._lock:
            kept = self._held.get(key)
            if kept is None or not suits(kept):
                self.misses += 1
                return None
            self.hits += 1
            return kept

    def put(self, key: Hashable, kept: _Kept) -> None:
        """Store a value if it fits the limit; drop the least recently used for it."""
        with self._lock:
            self._held.pop(key, None)
            if kept.nbytes <= self._held.maxsize:
                self._held[key] = kept

    def clear(self) -> None:
        """Drop everything, which frees its memory."""
        with self._lock:
            self._held.clear()


class KeyValueCache(BytesCache[KeyValues]):
    """Cache of keys and values of all layers."""

    def get(self, key: Hashable, *, last_layer: int) -> KeyValues | None:
        """Look up a key; ``None`` if it is missing, or not as deep as ``last_layer``."""
        return self.look_up(key, lambda kept: kept.last_layer >= last_layer)


def parse_bytes(size: int | str, name: str = "document_cache") -> int:
    """Parse a size such as ``"2GB"`` or ``"512 MiB"``, or check a number of bytes.

    Args:
        size: The size.
        name: What it is called in messages.

    Raises:
        InputError: It is neither.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    parsed = 0.0 if match is None else float(match[1]) * _UNITS[match[2].upper()]
    if not 1 <= parsed < math.inf:
        raise InputError(
            f'{name}={short_repr(size)} is not a size; give "2GB", "512MiB" or a number of bytes.'
        )
    return int(parsed)
