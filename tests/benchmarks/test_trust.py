"""The checks of trust: a fault is noticed, and processes end as they are said to."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import fuzzing
import pytest
import typer

from benchmarks.trust import checks, forks, fuzz
from benchmarks.trust.report import Outcome, Sizes, table
from routehead_plugins.errors import InputError


def outcome(*, passed: bool) -> Outcome:
    return Outcome(passed, "3 of 3", {"count": 3})


def test_a_failed_check_is_written_and_ends_in_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "trust.json"
    ends = {"fuzz": True, "soak": True}
    for name in ends:
        monkeypatch.setitem(checks.CHECKS, name, lambda *_, name=name: outcome(passed=ends[name]))
    checks.main(["fuzz"], seed=4, output=output)
    ends["soak"] = False
    with pytest.raises(typer.Exit) as caught:
        checks.main(["soak"], kills=2, output=output)
    assert caught.value.exit_code == 1
    assert "| soak | 3 of 3 | **no** |" in capsys.readouterr().out
    content = json.loads(output.read_text())["checks"]
    assert {name: check["passed"] for name, check in content.items()} == {
        "fuzz": True,
        "soak": False,
    }
    assert content["fuzz"]["command"] == "python -m benchmarks.trust fuzz --seed=4"
    assert content["soak"]["command"] == "python -m benchmarks.trust soak --kills=2 --seed=0"
    assert content["soak"]["count"] == 3


def test_an_unknown_check_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="check 'fuz' does not exist; give some of kills"):
        checks.main(["fuz"], output=tmp_path / "trust.json")
    assert list(tmp_path.iterdir()) == []


def test_a_raw_error_of_a_reader_fails_the_fuzz(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = fuzzing.KINDS["run"]

    def read(path: Path) -> None:
        kind.read(path)
        raise ZeroDivisionError

    assert fuzz.check_fuzz(tmp_path, Sizes(cases=33), 0).passed
    broken = type(kind)(read, kind.examples)
    monkeypatch.setitem(fuzzing.KINDS, "run", broken)
    failed = fuzz.check_fuzz(tmp_path, Sizes(cases=110), 0)
    assert not failed.passed
    assert all("ZeroDivisionError" in text for text in failed.figures["failures"])


@pytest.mark.parametrize(("program", "status"), [(lambda: None, 0), (lambda: sys.exit(2), 2)])
def test_a_forked_function_ends_with_its_status(program: object, status: int) -> None:
    assert forks.run_forked(program).status == status  # type: ignore[arg-type]


def test_what_a_forked_function_raises_is_reported() -> None:
    ended = forks.run_forked(lambda: 1 / 0)
    assert ended.status == 70
    assert ended.messages == ["Traceback: ZeroDivisionError('division by zero')"]


def test_a_forked_function_is_killed() -> None:
    ended = forks.run_forked(lambda: time.sleep(60), kill_after=0.05)
    assert ended.status is None
    assert ended.seconds < 60


def test_commands_are_those_of_users() -> None:
    ended = forks.run_command(["rerank", "--hits", "many"])
    assert ended.status == 2


def test_the_table_names_what_failed() -> None:
    rows = {name: outcome(passed=name == "a").to_dict() for name in "ab"}
    assert table(rows).splitlines()[2:] == ["| a | 3 of 3 | yes |", "| b | 3 of 3 | **no** |"]
