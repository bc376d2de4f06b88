"""The log of a long job: what survives a stop, and what does not."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routehead_plugins.data import Document
from routehead_plugins.errors import InputError
from routehead_plugins.io import JSON
from routehead_plugins.io.journal import Journal, query_key

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
        header, *entries = map(json.loads, partial(path).read_text().splitlines())
        assert header == {"fingerprint": {"depth": 10}}
        assert [entry[:2] for entry in entries] == [["q1", [["d1", 0.5]]], ["q2", None]]
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


@pytest.mark.parametrize("line", ["garbage", "", '["q2"]', '["q2", 2, "0123456789abcdef"]', "\xff"])
def test_a_line_that_is_no_entry_is_dropped_and_later_ones_are_kept(
    tmp_path: Path, line: str
) -> None:
    path = tmp_path / "run.trec"
    with Journal(path, {"depth": 10}) as journal:
        journal.append("q1", 1)
        journal.append("q3", 3)
    whole = partial(path).read_bytes()
    header, first, third = whole.splitlines(keepends=True)
    partial(path).write_bytes(header + first + line.encode("latin-1") + b"\n" + third)
    assert finished(path, {"depth": 10}) == {"q1": 1, "q3": 3}
    assert partial(path).read_bytes() == whole


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "run.trec"
    entries: dict[str, JSON] = {
        "q1": [["d1", 1e-07], ["d\u00e9", 2.5]],
        "q2": [["d2", -3.0]],
        "q3": None,
    }
    with Journal(path, {"depth": 10}) as journal:
        for key, value in entries.items():
            journal.append(key, value)
    whole = partial(path).read_bytes()
    owners = [number for number, line in enumerate(whole.splitlines()) for _ in line + b"\n"]
    for position, owner in enumerate(owners):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        partial(path).write_bytes(damaged)
        done = finished(path, {"depth": 10})
        # A lost line end joins two entries, and a new one may split one.
        lost = {owner} if damaged[position] != 10 and whole[position] != 10 else {owner, owner + 1}
        assert all(done[key] == entries[key] for key in done)
        assert set(entries) - set(done) == {f"q{number}" for number in lost} & set(entries)


def test_entries_that_a_job_with_another_fingerprint_wrote_are_not_believed(
    tmp_path: Path,
) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    for path, depth in ((mine, 10), (theirs, 20)):
        with Journal(path, {"depth": depth}) as journal:
            journal.append("q1", depth)
    with partial(mine).open("ab") as stream:
        stream.write(partial(theirs).read_bytes())
    assert finished(mine, {"depth": 10}) == {"q1": 10}


def test_a_second_job_is_told_that_the_first_is_running(tmp_path: Path) -> None:
    path = tmp_path / "run.trec"
    with Journal(path, {"depth": 10}) as first:
        first.append("q1", 1)
        for depth in (10, 20):
            with pytest.raises(InputError) as caught, Journal(path, {"depth": depth}):
                pass
            assert str(caught.value) == (
                f"{partial(path)} is used by another job; expected one job per output; "
                "wait until it has ended, or name another output."
            )
        first.append("q2", 2)
    assert finished(path, {"depth": 10}) == {"q1": 1, "q2": 2}


def test_the_lock_ends_with_the_process(tmp_path: Path) -> None:
    path = tmp_path / "run.trec"
    script = (
        "import sys, time; from routehead_plugins.io.journal import Journal\n"
        f"with Journal({str(path)!r}, {{}}) as journal:\n"
        "    journal.append('q1', 1); print('ready', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        with pytest.raises(InputError, match="used by another job"):
            finished(path, {})
        process.kill()
    assert finished(path, {}) == {"q1": 1}


def test_without_locks_two_jobs_keep_their_entries_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    path = tmp_path / "run.trec"
    with Journal(path, {"depth": 10}) as first, Journal(path, {"depth": 20}) as second:
        for number in range(3):
            first.append(f"q{number}", 10)
            second.append(f"q{number}", 20)
        assert dict(first.done) == {"q0": 10, "q1": 10, "q2": 10}
        assert dict(second.done) == {"q0": 20, "q1": 20, "q2": 20}
    assert finished(path, {"depth": 20}) == {"q0": 20, "q1": 20, "q2": 20}


def test_a_log_that_is_removed_while_a_job_waits_for_it_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "run.trec"
    with Journal(path, {}) as first:
        first.append("q1", 1)
        first.discard()
        with Journal(path, {}) as second:
            second.append("q2", 2)
    assert finished(path, {}) == {"q2": 2}


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    path, precious = tmp_path / "run.trec", tmp_path / "precious"
    precious.write_text('{"fingerprint": {}}\n')
    for target in (precious, tmp_path / "missing"):
        partial(path).unlink(missing_ok=True)
        partial(path).symlink_to(target)
        with pytest.raises(InputError) as caught:
            finished(path, {})
        assert str(caught.value) == (
            f"{partial(path)} cannot be written (it is a link, which is never followed); "
            "nothing was changed; move it away, or name another output."
        )
    assert precious.read_text() == '{"fingerprint": {}}\n'
    assert not (tmp_path / "missing").exists()


def test_a_file_that_is_no_log_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "run.trec"
    partial(path).write_text("dear diary\n")
    with pytest.raises(InputError) as caught:
        finished(path, {})
    assert str(caught.value) == (
        f"{partial(path)} cannot be written (it is not a log of finished queries); "
        "nothing was changed; move it away, or name another output."
    )
    assert partial(path).read_text() == "dear diary\n"


def test_a_pipe_and_a_folder_are_refused(tmp_path: Path) -> None:
    os.mkfifo(partial(tmp_path / "pipe"))
    with pytest.raises(InputError, match="it is not a regular file"):
        finished(tmp_path / "pipe", {})
    partial(tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="Is a directory"):
        finished(tmp_path / "folder", {})


def test_the_mode_of_a_log_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "run.trec"
    with Journal(path, {"depth": 10}) as journal:
        journal.append("q1", 1)
    partial(path).chmod(0o600)
    finished(path, {"depth": 20})
    assert stat.S_IMODE(partial(path).stat().st_mode) == 0o600


def test_a_full_disk_leaves_a_valid_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.trec"
    write = os.write

    def full(descriptor: int, content: bytes) -> int:
        if len(content) < 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, content[:10])

    with Journal(path, {"depth": 10}) as journal:
        journal.append("q1", 1)
        whole = partial(path).read_bytes()
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(InputError) as caught:
            journal.append("q2", "x" * 30)
        monkeypatch.undo()
        assert str(caught.value) == (
            f"{partial(path)} cannot be written (No space left on device); "
            "what was there before is whole; free some space and run it again."
        )
        assert partial(path).read_bytes() == whole
        assert dict(journal.done) == {"q1": 1}
        journal.append("q3", 3)
    assert finished(path, {"depth": 10}) == {"q1": 1, "q3": 3}


def test_the_key_of_a_query_changes_with_its_text_and_candidates_only() -> None:
    document = Document("text", "d", {"url": "u"}, 1.0)
    key = query_key("q1", "why", [document])
    assert key.startswith("q1 ")
    assert query_key("q1", "why", [replace(document, metadata={})]) == key
    others = [
        query_key("q2", "why", [document]),
        query_key("q1", "how", [document]),
        query_key("q1", "why", []),
        *(
            query_key("q1", "why", [replace(document, **change)])
            for change in ({"text": "te"}, {"id": "e"}, {"score": 2.0}, {"score": None})
        ),
    ]
    assert len({key, *others}) == 1 + len(others)


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
