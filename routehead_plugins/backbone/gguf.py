"""Make transformers parse a GGUF file once per load instead of three times."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np

_LOCK = threading.RLock()  # all threads share the functions of a package


@contextmanager
def parsed_once() -> Iterator[None]:
    """Cache readers by file and tables of tensor names by architecture inside the ``with`` block.

    Transformers builds a reader for the configuration, the weights and the tokenizer, and a table
    of names for every module of the LLM. Other threads still get the uncached functions of the
    package ``gguf``.

    Raises:
        ImportError: The package ``gguf`` is not installed.
    """
    package: Any = importlib.import_module("gguf")
    with _LOCK:
        if not isinstance(package.GGUFReader, type):
            yield  # already replaced by an enclosing block, whose cache serves both
            return
        reader, names = package.GGUFReader, package.get_tensor_name_map
        try:
            package.GGUFReader = _cached_here(reader, _plain_reader(reader))
            package.get_tensor_name_map = _cached_here(names, names)
            yield
        finally:
            package.GGUFReader, package.get_tensor_name_map = reader, names


def _cached_here(original: Callable[..., Any], replacement: Callable[..., Any]) -> Any:
    """Return a function: the cached replacement in this thread, the original in all others."""
    thread = threading.get_ident()
    cached = cache(replacement)

    def call(*args: Any, **kwargs: Any) -> Any:
        function = cached if threading.get_ident() == thread else original
        return function(*args, **kwargs)

    return call


def _plain_reader(reader: Any) -> Any:
    """Derive a reader that slices a plain array instead of an ``np.memmap``.

    Slicing an ``np.memmap`` costs four times as much, and a vocabulary takes half a million slices.
    The file stays memory-mapped.
    """

    class PlainReader(reader):  # type: ignore[misc]  # the base is known only after the import
        def __setattr__(self, name: str, value: object) -> None:
            plain = np.asarray(value) if isinstance(value, np.memmap) else value
            super().__setattr__(name, plain)

    return PlainReader
