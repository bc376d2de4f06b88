"""Files for tests of readers, and the error that a malformed line gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from routehead_plugins.errors import CollectionError

Reader = Callable[[Path], object]


def file(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def check_malformed(reader: Reader, path: Path, line: int, problem: str) -> None:
    """Check that reading a file gives exactly this error in this line."""
    with pytest.raises(CollectionError) as caught:
        reader(path)
    assert str(caught.value) == f"{path}:{line}: {problem}"
