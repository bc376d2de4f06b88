"""Read Pyserini's lists of prebuilt indexes at their first use, not when Pyserini is imported.

Pyserini 2.4 looks two of its prebuilt indexes up while it is imported, and downloads several lists
for that; without a network, even an index on disk could not be opened.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import threading
from collections.abc import Iterator, Mapping
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_MODULE = "pyserini.prebuilt_index_info"


def defer_index_lists() -> None:
    """Register a stand-in for Pyserini's module of lists, unless that is imported already.

    Pyserini below 2 keeps its lists in the package and is left alone, as is a Pyserini that is
    not installed.
    """
    try:
        major = int(importlib.metadata.version("pyserini").partition(".")[0])
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return
    if major < 2 or _MODULE in sys.modules:
        return
    spec = importlib.util.find_spec(_MODULE)
    if spec is not None and spec.loader is not None:
        sys.modules[_MODULE] = _Lists(spec, spec.loader)


class _Lists(ModuleType):
    """Pyserini's module of lists, executed when an entry of a list is asked for.

    Args:
        spec: Where the module is.
        loader: What executes it.
    """

    def __init__(self, spec: ModuleSpec, loader: Loader) -> None:
        super().__init__(spec.name)
        self.__spec__ = spec
        self.__file__ = spec.origin
        self.__package__ = spec.parent
        self._module_spec, self._module_loader = spec, loader
        self._lock = threading.RLock()
        self._executed: ModuleType | None = None

    def __getattr__(self, name: str) -> Any:
        """Return a list that is read later, or an attribute of the executed module."""
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return _List(self, name) if name.endswith("_INDEX_INFO") else getattr(self._real(), name)

    def _real(self) -> ModuleType:
        """Execute the module; after a failed download, the next call tries again.

        Raises:
            OSError: A list cannot be downloaded.
        """
        with self._lock:
            if self._executed is None:
                module = importlib.util.module_from_spec(self._module_spec)
                self._module_loader.exec_module(module)
                self._executed = module
            return self._executed


class _List(Mapping[str, Any]):
    """One list of prebuilt indexes by name.

    Args:
        lists: The module of lists.
        name: The list's name there.
    """

    def __init__(self, lists: _Lists, name: str) -> None:
        self._lists = lists
        self._name = name

    def _entries(self) -> Mapping[str, Any]:
        entries: Mapping[str, Any] = getattr(self._lists._real(), self._name)
        return entries

    def __getitem__(self, key: str) -> Any:
        return self._entries()[key]

    def __contains__(self, key: object) -> bool:
        # Pyserini's lists tell by the prefix of some names that they lack them, without a download.
        return key in self._entries()

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries())

    def __len__(self) -> int:
        return len(self._entries())
