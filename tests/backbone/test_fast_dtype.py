"""The faster number format: timed briefly, and remembered per machine in the user's cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from routehead_plugins.backbone import fast_dtype as module
from routehead_plugins.backbone.fast_dtype import fast_dtype

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of the user; what is pretended here must not reach other tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fast_dtype.cache_clear()
    yield tmp_path
    fast_dtype.cache_clear()


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Replace the timings, in seconds by number of rows; return the numbers that were timed."""

    def replace(few: tuple[float, float], many: tuple[float, float] = (1.0, 1.0)) -> list[int]:
        timed: list[int] = []

        def best_times(_: torch.device, rows: int) -> tuple[float, float]:
            timed.append(rows)
            return few if rows < 100 else many

        monkeypatch.setattr(module, "_best_times", best_times)
        return timed

    return replace


def answer_anew(device: torch.device = CPU) -> torch.dtype:
    """Answer as a new process would."""
    fast_dtype.cache_clear()
    return fast_dtype(device)


@pytest.mark.parametrize(
    ("float32", "bfloat16", "picked"),
    [
        (2.0, 1.0, torch.bfloat16),
        (1.31, 1.0, torch.bfloat16),
        (1.29, 1.0, torch.float32),  # not worth four digits
        (1.0, 1.0, torch.float32),
        (1.0, 20.0, torch.float32),
    ],
)
def test_bfloat16_is_taken_where_it_is_measured_to_be_worth_it(
    pretend: Callable[..., list[int]], float32: float, bfloat16: float, picked: torch.dtype
) -> None:
    timed = pretend((1e-3, 1e-3), (float32, bfloat16))
    assert fast_dtype(CPU) == picked
    assert timed == [8, 256]


def test_where_bfloat16_is_hopeless_over_a_few_tokens_it_is_not_timed_further(
    pretend: Callable[..., list[int]],
) -> None:
    timed = pretend((1e-3, 3e-3), (9.0, 1.0))
    assert fast_dtype(CPU) == torch.float32
    assert timed == [8]
    assert answer_anew() == torch.float32
    assert timed == [8]


def test_a_machine_too_slow_or_busy_to_time_many_tokens_is_timed_again_in_the_next_process(
    pretend: Callable[..., list[int]], cache_folder: Path
) -> None:
    timed = pretend((0.5, 0.4), (9.0, 1.0))
    assert [fast_dtype(CPU), fast_dtype(CPU)] == [torch.float32] * 2
    assert timed == [8]
    assert answer_anew() == torch.float32
    assert timed == [8, 8]
    assert list(cache_folder.iterdir()) == []


def test_runs_end_when_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(1000))
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    monkeypatch.setattr(module, "_MAX_SECONDS", 12)
    assert module._best_times(CPU, 2) == (1, 1)
    # Four readings a run and one to see whether time is left, for the runs after the second.
    assert next(seconds) == 1 + 4 * 2 + (1 + 4) + 1


def test_the_shortest_of_twenty_five_runs_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [(9.0, 8.0), (4.0, 7.0), (7.0, 3.0)] * 8 + [(2.0, 5.0)]
    readings: list[float] = [0.0]
    for number, (float32, bfloat16) in enumerate(runs):
        readings += [0.0] * (number > 1) + [0.0, float32, 0.0, bfloat16]
    clock = iter(readings)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert module._best_times(CPU, 2) == (2.0, 3.0)
    assert list(clock) == []


def test_the_answer_is_kept_per_machine_and_setting(
    pretend: Callable[..., list[int]], cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = pretend((1e-3, 1e-3), (2.0, 1.0))
    assert answer_anew() == answer_anew() == torch.bfloat16
    assert timed == [8, 256]
    (path,) = (cache_folder / "routehead" / "dtype").iterdir()
    assert path.read_text().startswith(f"torch.bfloat16\ntorch {torch.__version__}\ndevice cpu\n")
    changes: list[Callable[[], None]] = [
        lambda: monkeypatch.setattr(torch, "get_num_threads", lambda: 77),
        lambda: monkeypatch.setattr(torch, "__version__", "9.9"),
        lambda: monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2"),
        lambda: monkeypatch.setattr(module, "_processor", lambda: ["another one"]),
    ]
    for count, change in enumerate(changes, start=2):
        change()
        assert answer_anew() == torch.bfloat16
        assert len(timed) == 2 * count
    assert answer_anew(torch.device("meta")) == torch.bfloat16
    assert len(timed) == 2 * len(changes) + 4
    assert answer_anew() == torch.bfloat16
    assert len(timed) == 2 * len(changes) + 4


def damaged(content: bytes) -> list[bytes]:
    head, rest = content.split(b"\n", 1)
    return [
        b"",
        head,
        head + b"\n",
        content[:-2],
        content + b"more",
        b"torch.float64\n" + rest,
        b"torch.bfloat16\n" + rest.replace(b"threads", b"treads"),
        b"\xff" * 100,
        b"[" * 100_000,
    ]


def test_a_damaged_answer_is_measured_again_and_replaced(
    pretend: Callable[..., list[int]], cache_folder: Path
) -> None:
    timed = pretend((1e-3, 1e-3), (1.0, 1.0))
    answer_anew()
    (path,) = (cache_folder / "routehead" / "dtype").iterdir()
    good = path.read_bytes()
    for count, bad in enumerate(damaged(good), start=2):
        path.write_bytes(bad)
        assert answer_anew() == torch.float32
        assert len(timed) == 2 * count
        assert path.read_bytes() == good
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("kind", ["file", "pipe", "folder"])
def test_a_cache_that_cannot_be_used_is_none(
    pretend: Callable[..., list[int]], cache_folder: Path, kind: str
) -> None:
    timed = pretend((1e-3, 1e-3), (1.0, 1.0))
    if kind == "file":
        (cache_folder / "routehead").write_text("in the way")
    else:
        path = module._answer_path(module._setting(CPU))
        assert path is not None
        path.parent.mkdir(parents=True)
        if kind == "pipe":
            os.mkfifo(path)
        else:
            path.mkdir()
    assert answer_anew() == answer_anew() == torch.float32
    assert len(timed) == 4


def test_a_user_without_a_home_is_answered(
    pretend: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "relative/folders/are/ignored")
    monkeypatch.setattr(Path, "home", no_home)
    pretend((1e-3, 1e-3), (2.0, 1.0))
    assert answer_anew() == torch.bfloat16


def test_without_its_variable_the_cache_is_in_the_home_folder(
    pretend: Callable[..., list[int]], cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: cache_folder)
    pretend((1e-3, 1e-3), (2.0, 1.0))
    answer_anew()
    assert len(list((cache_folder / ".cache" / "routehead" / "dtype").iterdir())) == 1
