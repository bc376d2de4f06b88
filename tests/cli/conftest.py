"""Commands called as a user calls them, on a tiny LLM in a local directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import wolves
from typer.testing import CliRunner, Result

from routehead_plugins.cli import app


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    wolves.write_collection(tmp_path / "wolves")
    return tmp_path / "wolves"


@pytest.fixture
def invoke(model: str) -> Callable[..., Result]:
    def call(*arguments: object) -> Result:
        return CliRunner().invoke(app, [*map(str, arguments), "--model", model], color=False)

    return call
