"""`routehead cache`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from routehead_plugins.backbone.conversions import conversions, converted
from routehead_plugins.cli import app


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path / "routehead"


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["cache", *arguments], color=False)


def fill(folder: Path) -> None:
    def convert(target: Path, *_: object) -> None:
        (target / "model").write_bytes(bytes(2_500_000))

    file = folder.parent / "tiny.gguf"
    file.write_bytes(b"weights")
    converted(file, torch.float32, convert)
    (folder / "signals" / "deep").mkdir(parents=True)
    (folder / "signals" / "deep" / "scores").write_bytes(bytes(1_200_000))


def test_what_is_kept_is_shown(folder: Path) -> None:
    fill(folder)
    result = invoke()
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    assert any(line.startswith("llms tiny.gguf, float32 2.5 MB 2") for line in lines)
    assert any(line.startswith("signals what training has read") for line in lines)


def test_an_empty_cache_is_no_error() -> None:
    assert invoke().output == "Nothing is kept.\n"
    assert invoke("--clear", "all").output == "Nothing is kept.\n"


def test_one_kind_is_removed_and_the_others_stay(folder: Path) -> None:
    fill(folder)
    result = invoke("--clear", "llms")
    assert result.exit_code == 0, result.output
    assert not conversions()
    assert (folder / "signals" / "deep" / "scores").is_file()
    assert invoke("--clear", "all").output == "Nothing is kept.\n"
    assert not (folder / "signals").exists()


def test_a_kind_that_does_not_exist_is_refused() -> None:
    result = invoke("--clear", "everything")
    assert result.exit_code != 0
    assert "--clear=everything is not kept; choose llms, signals, dtype or all." in str(
        result.exception
    )
