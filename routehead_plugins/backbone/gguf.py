"""Let transformers parse a GGUF file once per load; left to itself, it does so three times over."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np

_EXCHANGING = threading.RLock()  # the functions of a package are one per process


@contextmanager
def parsed_once() -> Iterator[None]:
    """Hand out one reader per file, and one table of tensor names per architecture, until the end.

    Transformers builds a reader for the configuration, for the weights and for the tokenizer, and
    a table of names for every module of the LLM. Meanwhile the package ``gguf`` hands out the ones
    it has made before; other threads are served as always.

    Raises:
        ImportError: The package ``gguf`` is not installed.
    """
    package: Any = importlib.import_module("gguf")
    with _EXCHANGING:
        if not isinstance(package.GGUFReader, type):
            yield  # exchanged by a call around this one, whose memory serves both
            return
        reader, names = package.GGUFReader, package.get_tensor_name_map
        try:
            package.GGUFReader = _once(reader, _on_plain_array(reader))
            package.get_tensor_name_map = _once(names, names)
            yield
        finally:
            package.GGUFReader, package.get_tensor_name_map = reader, names


def _once(usual: Callable[..., Any], remembered: Callable[..., Any]) -> Callable[..., Any]:
    """Call ``remembered`` once per set of arguments in this thread, and ``usual`` in others."""
    thread = threading.get_ident()
    memory = cache(remembered)

    def call(*args: Any, **kwargs: Any) -> Any:
        chosen = memory if threading.get_ident() == thread else usual
        return chosen(*args, **kwargs)

    return call


def _on_plain_array(reader: Any) -> Any:
    """Derive a reader that cuts up a plain array.

    A slice of ``np.memmap`` costs four times as much, and a vocabulary takes half a million of
    them. The file stays mapped all the same.
    """

    class PlainReader(reader):  # type: ignore[misc]  # the base is known only once it is imported
        def __setattr__(self, name: str, value: object) -> None:
            plain = np.asarray(value) if isinstance(value, np.memmap) else value
            super().__setattr__(name, plain)

    return PlainReader
