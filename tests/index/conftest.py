"""An index of a few documents, made with a tiny LLM."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from indexed import documents, reranker


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folder of an index of all documents, float16."""
    reranker().index(documents(), tmp_path / "index", dtype="float16")
    return tmp_path / "index"


@pytest.fixture
def forbid_forwards(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function after which no document may be run."""

    def forbid() -> None:
        def prefill(*_: object, **__: object) -> None:
            raise AssertionError("a document was run")

        monkeypatch.setattr("routehead_plugins.layouts.late.document_keys", prefill)

    return forbid
