"""Conversions are made once, are whole or absent, and stay within their limit."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from routehead_plugins.backbone.conversions import conversions, converted
from routehead_plugins.errors import InputError, ModelLoadError, TooLargeError

FLOAT, HALF = torch.float32, torch.bfloat16
Convert = Callable[[Path, Callable[[int], None]], None]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def new_file(folder: Path, name: str, content: bytes = b"weights") -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def writes(content: bytes, calls: list[Path] | None = None) -> Convert:
    def convert(folder: Path, announce: Callable[[int], None]) -> None:
        announce(len(content))
        assert not list(folder.iterdir())
        (folder / "model").write_bytes(content)
        if calls is not None:
            calls.append(folder)

    return convert


def never(*_: object) -> None:
    raise AssertionError("it is converted already")


def test_a_file_is_converted_once_for_a_number_format(tmp_path: Path) -> None:
    file = new_file(tmp_path, "a.gguf")
    folder = converted(file, FLOAT, writes(b"one"))
    assert folder is not None
    assert (folder / "model").read_bytes() == b"one"
    assert converted(file, FLOAT, never) == folder
    other = converted(file, HALF, writes(b"two"))
    assert other is not None
    assert other != folder
    assert {kept.dtype for kept in conversions()} == {"float32", "bfloat16"}
    assert {kept.name for kept in conversions()} == {"a.gguf"}


def test_its_content_names_it_not_its_path(tmp_path: Path) -> None:
    folder = converted(new_file(tmp_path, "a.gguf"), FLOAT, writes(b"one"))
    assert converted(new_file(tmp_path, "b.gguf"), FLOAT, never) == folder
    changed = new_file(tmp_path, "a.gguf", b"others")
    assert converted(changed, FLOAT, writes(b"new")) != folder


def test_a_failed_conversion_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path, *_: object) -> None:
        (folder / "model").write_bytes(b"half")
        raise ModelLoadError("broken")

    file = new_file(tmp_path, "a.gguf")
    with pytest.raises(ModelLoadError, match="broken"):
        converted(file, FLOAT, fail)
    assert not conversions()
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.name == "model"]
    assert converted(file, FLOAT, writes(b"whole")) is not None


def test_what_was_not_used_for_longest_gives_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROUTEHEAD_CACHE_LIMIT", "3KB")
    files = [new_file(tmp_path, f"{name}.gguf", name.encode()) for name in "abc"]
    for age, file in zip((30, 20), files, strict=False):
        folder = converted(file, FLOAT, writes(bytes(1000)))
        assert folder is not None
        os.utime(folder / "conversion.json", (time.time() - age, time.time() - age))
    assert converted(files[0], FLOAT, never) is not None  # used now
    converted(files[2], FLOAT, writes(bytes(1500)))
    assert [kept.name for kept in conversions()] == ["c.gguf", "a.gguf"]


def test_what_is_larger_than_the_limit_is_converted_only_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROUTEHEAD_CACHE_LIMIT", "1KB")
    file = new_file(tmp_path, "a.gguf")
    assert converted(file, FLOAT, writes(bytes(2000))) is None
    assert converted(file, FLOAT, never) is None
    assert not conversions()
    monkeypatch.setenv("ROUTEHEAD_CACHE_LIMIT", "1MB")
    assert converted(file, FLOAT, writes(bytes(2000))) is not None


def test_nothing_is_kept_where_the_limit_is_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROUTEHEAD_CACHE_LIMIT", "0")
    assert converted(new_file(tmp_path, "a.gguf"), FLOAT, never) is None
    assert not (tmp_path / "cache").exists()


def test_a_limit_that_is_no_size_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROUTEHEAD_CACHE_LIMIT", "much")
    with pytest.raises(InputError, match="ROUTEHEAD_CACHE_LIMIT='much' is not a size"):
        converted(new_file(tmp_path, "a.gguf"), FLOAT, never)


def test_a_cache_that_cannot_be_written_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("no folder")
    assert converted(new_file(tmp_path, "a.gguf"), FLOAT, writes(b"one")) is None


def test_threads_that_come_at_once_wait_for_one_conversion(tmp_path: Path) -> None:
    file, calls = new_file(tmp_path, "a.gguf"), list[Path]()

    def slow(folder: Path, announce: Callable[[int], None]) -> None:
        time.sleep(0.2)
        writes(b"one", calls)(folder, announce)

    folders: list[Path | None] = []
    threads = [
        threading.Thread(target=lambda: folders.append(converted(file, FLOAT, slow)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len(set(folders)) == 1
    assert None not in folders


_KILLED = """
import os, sys
from pathlib import Path
import torch
from routehead_plugins.backbone.conversions import converted

def convert(folder, announce):
    (folder / "model").write_bytes(b"half")
    os._exit(9)

converted(Path(sys.argv[1]), torch.float32, convert)
"""


def test_a_process_that_was_killed_leaves_no_conversion(tmp_path: Path) -> None:
    file = new_file(tmp_path, "a.gguf")
    assert subprocess.run([sys.executable, "-c", _KILLED, str(file)]).returncode == 9
    assert not conversions()
    folder = converted(file, FLOAT, writes(b"whole"))
    assert folder is not None
    assert (folder / "model").read_bytes() == b"whole"


def test_a_removed_conversion_is_made_again(tmp_path: Path) -> None:
    file = new_file(tmp_path, "a.gguf")
    converted(file, FLOAT, writes(b"one"))
    (kept,) = conversions()
    kept.remove()
    assert not conversions()
    folder = converted(file, FLOAT, writes(b"two"))
    assert folder is not None
    assert (folder / "model").read_bytes() == b"two"


def test_files_left_by_killed_processes_are_removed_after_a_day(tmp_path: Path) -> None:
    left = tmp_path / "cache" / "routehead" / "gguf" / "x.1.tmp"
    left.mkdir(parents=True)
    converted(new_file(tmp_path, "a.gguf"), FLOAT, writes(b"one"))
    assert left.is_dir()  # another process may be writing it
    os.utime(left, (time.time() - 100_000, time.time() - 100_000))
    converted(new_file(tmp_path, "b.gguf", b"b"), FLOAT, writes(b"two"))
    assert not left.exists()


def test_a_full_disk_is_no_error(tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    file = new_file(tmp_path, "a.gguf")
    assert converted(file, FLOAT, full) is None

    def too_large(*_: object) -> None:
        raise TooLargeError("too large")

    assert converted(file, FLOAT, too_large) is None
