"""Files that are written whole or not at all, and JSON that is read within bounds."""

from __future__ import annotations

import os
import re
import resource
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from text_files import file

from routehead_plugins.errors import InputError, ModelLoadError
from routehead_plugins.files import (
    atomic_write_bytes,
    atomic_write_folder,
    atomic_write_text,
    check_nesting,
    check_output,
    parse_json,
    read_json,
    show,
    show_path,
)


def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = file(tmp_path, "out", "old")
    atomic_write_text(path, "new\r\nh\u00e9")
    assert path.read_bytes() == b"new\r\nh\xc3\xa9"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file(tmp_path, "out", "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError) as caught:
        atomic_write_text(path, "new")
    assert str(caught.value) == (
        f"{path} cannot be written (No space left on device); what was there before is whole; "
        "free some space and run it again."
    )
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_written_file_is_readable_by_whom_the_umask_allows(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        atomic_write_text(tmp_path / "out", "x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o644


def test_a_link_is_followed_and_stays_a_link(tmp_path: Path) -> None:
    target, link = file(tmp_path, "target", "old"), tmp_path / "link"
    link.symlink_to(target)
    atomic_write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_a_device_is_written_to_directly() -> None:
    atomic_write_text("/dev/null", "x")
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize(
    ("name", "reason"), [("no/out", "No such file or directory"), ("", "Is a directory")]
)
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        atomic_write_text(tmp_path / name, "x")
    assert str(caught.value) == (
        f"{tmp_path / name} cannot be written ({reason}); expected a file in an existing, "
        "writable folder; create the folder or name another file."
    )


def test_half_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        atomic_write_text(tmp_path / "out", "a\ud83d")
    assert str(caught.value) == (
        f"{tmp_path}/out cannot be written: character 1 of its text, '\\ud83d', is half of a "
        "surrogate pair; expected Unicode; replace it."
    )


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666, 0o755])
def test_the_mode_of_a_replaced_file_is_kept(tmp_path: Path, mode: int) -> None:
    path = file(tmp_path, "out", "old")
    path.chmod(mode)
    atomic_write_text(path, "new")
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_file_limit_leaves_the_old_file(tmp_path: Path) -> None:
    path = file(tmp_path, "out", "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(InputError, match=r"File too large.*free some space"):
            atomic_write_bytes(path, bytes(200_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_does_not_fit_stays_as_it_was(tmp_path: Path) -> None:
    older = {name: file(tmp_path, name, f"old {name}") for name in ("card", "data", "config")}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    files = {"card": b"new", "data": bytes(200_000), "config": b"new", "more": b"new"}
    try:
        with pytest.raises(InputError, match=r"data cannot be written \(File too large"):
            atomic_write_folder(tmp_path, files, "config")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        name: f"old {name}" for name in older
    }
    atomic_write_folder(tmp_path, files, "config")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_the_marker_of_a_folder_goes_first_and_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file(tmp_path, "config", "old")
    order: list[str] = []
    replace = Path.replace

    def record(source: Path, target: Path) -> Path:
        assert target.name == "config" or not (tmp_path / "config").exists()
        order.append(target.name)
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", record)
    atomic_write_folder(tmp_path, {"config": b"new", "data": b"new"}, "config")
    assert order == ["data", "config"]


def test_a_full_device_is_told_in_one_line() -> None:
    with pytest.raises(InputError) as caught:
        atomic_write_text("/dev/full", "x")
    assert str(caught.value) == (
        "/dev/full cannot be written (No space left on device); what was there before is whole; "
        "free some space and run it again."
    )


def test_concurrent_writes_leave_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "out"
    contents = [bytes([65 + number]) * 50_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda content: atomic_write_bytes(path, content), contents))
    assert path.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]


def test_a_read_only_file_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file(tmp_path, "out", "old")
    monkeypatch.setattr(os, "access", lambda _path, mode: mode != os.W_OK)  # also for root
    for write in (check_output, lambda path: atomic_write_text(path, "new")):
        with pytest.raises(InputError) as caught:
            write(path)
        assert str(caught.value) == (
            f"{path} cannot be written (the file is read-only); expected a file in an existing, "
            "writable folder; create the folder or name another file."
        )
    assert path.read_text() == "old"


def test_an_output_is_checked_without_a_trace(tmp_path: Path) -> None:
    path = file(tmp_path, "out", "old")
    for good in (path, tmp_path / "new", "/dev/null"):
        check_output(good)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (".", "Is a directory"),
        ("no/out", "No such file or directory"),
        ("file/out", "Not a directory"),
        ("/proc/out", "No such file or directory"),
        ("a\0b", "embedded null"),  # releases of Python word the rest differently
    ],
)
def test_an_output_that_cannot_be_written_is_told_before_the_work(
    tmp_path: Path, name: str, reason: str
) -> None:
    file(tmp_path, "file", "old")
    with pytest.raises(InputError) as caught:
        check_output(tmp_path / name)
    assert re.search(rf" cannot be written \(.*{reason}.*\); ", str(caught.value))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Expecting value: line 1 column 1 (char 0)"),
        (b"[1]", "[1] is not an object"),
        (b'{"a": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", "nested deeper than 100 levels"),
        (b'{"a": 1e400}', "the number '1e400' is too large"),
        (b'{"a": NaN}', "NaN is not a JSON number; null stands for a missing one"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "a number has 5001 digits; at most 308 are read"),
        (b'{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        (b"\xff\xfe{\0}\0", "byte 0xff is not UTF-8"),
    ],
)
def test_json_is_read_within_bounds(tmp_path: Path, content: bytes, reason: str) -> None:
    path = file(tmp_path, "c.json", content)
    with pytest.raises(ModelLoadError) as caught:
        read_json(path, "a router", ModelLoadError)
    assert str(caught.value) == (
        f"{path} cannot be read as JSON ({reason}); expected a router; repair it, or name another "
        "file."
    )


def test_json_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = file(tmp_path, "c.json", b'\xef\xbb\xbf{"a": [1, 2.5, null, "\\ud800"]}')
    assert read_json(path, "a router") == {"a": [1, 2.5, None, "\ud800"]}


@pytest.mark.parametrize(
    ("name", "problem"), [("no", "does not exist"), (".", "cannot be read (Is a directory)")]
)
def test_a_json_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, problem: str) -> None:
    path = tmp_path / name
    with pytest.raises(InputError) as caught:
        read_json(path, "a router")
    assert str(caught.value) == f"{path} {problem}; expected a router; check the path."


def test_values_and_paths_are_shortened_for_messages() -> None:
    assert show("a\nb") == "'a\\nb'"
    assert len(show(["x" * 100] * 100)) == 60
    assert show_path("/a\nb/c") == "/a\\nb/c"
    assert show_path("/" + "a" * 500) == "..." + "a" * 97


@pytest.mark.parametrize("deep", ["[" * 101, '{"a":' * 101, '["]"' + ",[" * 101])
def test_nesting_is_refused_before_a_parser_recurses(
    deep: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("json.loads", lambda *_, **__: pytest.fail("it was parsed"))
    with pytest.raises(ValueError, match="nested deeper than 100 levels"):
        parse_json(deep)


def test_files_of_a_model_may_be_nested_deeper_than_ours(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text("[" * 500 + "]" * 500)
    check_nesting(file)
    file.write_text('["[[", ' * 501 + "]" * 501)
    with pytest.raises(ValueError, match="nested deeper than 500 levels"):
        check_nesting(file)
