"""Damaged files end in a short error, or are read; none is believed that has a checksum."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fuzzing import KINDS, FileKind, check_read, damaged_files, journal_kind, signals_kind


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_ends_in_one_short_line(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    for example in kind.examples:
        assert check_read(kind, example, tmp_path) is None
    errors = [check_read(kind, content, tmp_path) for content in damaged_files(kind, 1, 40)]
    assert sum(error is not None for error in errors) >= 8


@pytest.mark.parametrize("make_kind", [journal_kind, signals_kind])
def test_nothing_damaged_is_believed(make_kind: Callable[[Path], FileKind], tmp_path: Path) -> None:
    kind = make_kind(tmp_path)
    for content in (*kind.examples, *damaged_files(kind, 1, 60)):
        check_read(kind, content, tmp_path)


def test_an_error_of_another_kind_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        check_read(FileKind(lambda _: 1 / 0, (b"x",)), b"x", tmp_path)
