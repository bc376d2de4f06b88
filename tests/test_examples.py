"""Every example runs unchanged and is short; the LLM is loaded once for all."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from routehead_plugins import FrozenLM

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(
    example: Path,
    embedded: FrozenLM,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def loaded(name: str, **_: Any) -> FrozenLM:
        assert name == "embedded"
        return embedded

    monkeypatch.setattr(FrozenLM, "from_pretrained", loaded)
    monkeypatch.setattr(sys, "argv", [str(example)])
    runpy.run_path(str(example), run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) >= 3


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short(example: Path) -> None:
    assert len(example.read_text().splitlines()) <= 60
