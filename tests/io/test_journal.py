"""The log of a long job: what survives a stop, and what does not."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routehead_plugins.errors import InputError
from routehead_plugins.io.journal import Journal

# Imports on first use and slow disks are no failures.
UNHURRIED = settings(deadline=None)

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial.jsonl")


def finished(path: Path, fingerprint: dict[str, int]) -> dict[str, object]:
    """What a job that starts now would find done."""
    with Journal(path, fingerprint) as journal:
        return dict(journal.done)


def test_a_new_job_finds_nothing_done(tmp_path: Path) -> None:
    assert finished(tmp_path / "run.trec", {"depth": 10}) == {}


def test_entries_are_on_disk_at_once_one_line_each(tmp_path: Path) -> None:
    path = tmp_path / "run.trec"
    with Journal(path, {"depth": 10}) as journal:
        journal.append("q1", [["d1", 0.5]])
        journal.append("q2", None)
        assert partial(path).read_text() == (
            '{"fingerprint": {"depth": 10}}\n["q1", [["d1", 0.5]]]\n["q2", null]\n'
        )
        assert journal.done == {"q1": [["d1", 0.5]], "q2": None}


def test_a_job_goes_on_where_an_exception_stopped_it(tmp_path: Path) -> None:
    path = tmp_path / "run.trec"

    def stopped() -> None:
        with Journal(path, {"depth": 10, "model": 1}) as journal:
            journal.append("q1", 1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    with Journal(path, {"model": 1, "depth": 10}) as journal:
        assert dict(journal.done) == {"q1": 1}
        journal.append("q2", 2)
    assert finished(path, {"depth": 10, "model": 1}) == {"q1": 1, "q2": 2}


def test_another_fingerprint_starts_afresh(tmp_path: Path) -> None:
    path = tmp_path / "run.trec"
    with Journal(path, {"depth": 10}) as journal:
        journal.append("q1", 1)
    assert finished(path, {"depth": 20}) == {}
    assert partial(path).read_text() == '{"fingerprint": {"depth": 20}}\n'
    assert finished(path, {"depth": 10}) == {}


def test_a_job_killed_at_any_byte_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "run.trec"
    with Journal(path, {"depth": 10}) as journal:
        journal.append("q1", 12)
        journal.append("q2", {"d": 34})
    whole = partial(path).read_bytes()
    header, first, _ = whole.splitlines(keepends=True)
    for cut in range(len(whole)):
        partial(path).write_bytes(whole[:cut])
        done = finished(path, {"depth": 10})
        assert done == ({} if cut < len(header) + len(first) else {"q1": 12})
        with Journal(path, {"depth": 10}) as journal:
            journal.append("q3", 3)
        assert finished(path, {"depth": 10}) == {**done, "q3": 3}


@pytest.mark.parametrize("line", ["garbage", '["q2"]', '[2, "x"]', '{"q2": 1}', "\xff"])
def test_nothing_is_believed_after_a_line_that_is_no_entry(tmp_path: Path, line: str) -> None:
    path = tmp_path / "run.trec"
    with Journal(path, {"depth": 10}) as journal:
        journal.append("q1", 1)
    with partial(path).open("a", encoding="latin-1") as stream:
        stream.write(line + '\n["q3", 3]\n')
    assert finished(path, {"depth": 10}) == {"q1": 1}
    assert partial(path).read_text() == '{"fingerprint": {"depth": 10}}\n["q1", 1]\n'


def test_a_later_entry_for_the_same_query_wins(tmp_path: Path) -> None:
    path = tmp_path / "run.trec"
    with Journal(path, {}) as journal:
        journal.append("q1", 1)
        journal.append("q1", 2)
        assert journal.done == {"q1": 2}
    assert finished(path, {}) == {"q1": 2}


def test_discard_removes_the_log(tmp_path: Path) -> None:
    path = tmp_path / "run.trec"
    with Journal(path, {}) as journal:
        journal.append("q1", 1)
        journal.discard()
        assert journal.done == {"q1": 1}
    assert list(tmp_path.iterdir()) == []
    journal.discard()


@UNHURRIED
@given(st.dictionaries(st.text(), VALUES, max_size=5))
def test_what_is_resumed_equals_what_was_recorded(entries: dict[str, object]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out"
        with Journal(path, {}) as journal:
            for key, value in entries.items():
                journal.append(key, json.loads(json.dumps(value)))
            first = dict(journal.done)
        assert finished(path, {}) == first == entries


def test_fresh_entries_look_as_resumed_ones_do(tmp_path: Path) -> None:
    with Journal(tmp_path / "out", {}) as journal:
        journal.append("q1", (("d1", 1),))
        assert journal.done["q1"] == [["d1", 1]]


def test_done_cannot_be_written_to(tmp_path: Path) -> None:
    with Journal(tmp_path / "out", {}) as journal, pytest.raises(TypeError):
        journal.done["q1"] = 1  # type: ignore[index]


def test_a_value_that_json_cannot_hold_is_refused_and_not_recorded(tmp_path: Path) -> None:
    with Journal(tmp_path / "out", {}) as journal:
        with pytest.raises(InputError) as caught:
            journal.append("q1", math.nan)
        assert str(caught.value).startswith("the entry for 'q1' cannot be written as JSON (")
        assert str(caught.value).endswith(
            "); expected text, finite numbers, lists and dicts; convert other values."
        )
        assert journal.done == {}
    assert finished(tmp_path / "out", {}) == {}


def test_a_fingerprint_that_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        Journal(tmp_path / "out", {"path": tmp_path})  # type: ignore[dict-item]
    assert str(caught.value) == (
        "the fingerprint cannot be written as JSON (Object of type PosixPath is not JSON "
        "serializable); expected text, finite numbers, lists and dicts; convert other values."
    )


def test_appending_to_a_closed_journal_is_refused(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "out", {})
    with pytest.raises(InputError) as caught:
        journal.append("q1", 1)
    assert str(caught.value) == (
        f"the journal {tmp_path}/out.partial.jsonl is not open; expected an open one; "
        "append inside its with block, before discard()."
    )


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught, Journal(tmp_path / "no" / "out", {}):
        pass
    assert str(caught.value) == (
        f"{tmp_path}/no/out.partial.jsonl cannot be written (No such file or directory); "
        "expected a file in an existing, writable folder; create the folder or name another file."
    )
