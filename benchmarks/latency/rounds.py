"""Measurement at one number of documents: warm-up, rounds of all methods, peaks of memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

import torch

from benchmarks.latency.baselines import forward_flops, matmul_rate
from benchmarks.latency.memory import can_measure, peak_over_now
from benchmarks.latency.methods import make_method
from benchmarks.latency.options import Options
from benchmarks.latency.peak import peak_in_process
from benchmarks.latency.report import summarise
from benchmarks.latency.subject import Method, Subject, UnavailableError, timed
from benchmarks.latency.workload import make_queries
from routehead_plugins.errors import PromptTooLongError

# Methods whose peak of memory is measured.
_WITH_MEMORY = ("handwritten", "ours", "parallel-cold")
# Parts of `ours`, timed for the share of tap and scoring.
SHARE = ("tails", "tails-untapped")
Advance = Callable[[str, int], None]


def timed_names(options: Options) -> list[str]:
    """Return the names of all methods and parts that are timed."""
    names = options.method_names
    return [*names, *(SHARE if "ours" in names else ())]


def measure(
    subject: Subject, options: Options, documents: Sequence[str], advance: Advance
) -> dict[str, Any]:
    """Time all methods on the same documents, alternating, then measure their memory.

    Args:
        subject: The LLM.
        options: How the LLM was loaded, and what to measure.
        documents: The documents that every query ranks.
        advance: Callback with the current work and the number of steps done.

    Returns:
        Every round, medians, ratios, peaks of memory, and the reasons why figures are missing.
    """
    queries = make_queries(subject.llm.encoder, options.repeats + 1)
    rounds, notes, skipped = _rounds(subject, options, documents, queries, advance)
    prompts = subject.prompts(queries[0], documents)
    lengths = [len(prompt.prefix) + len(prompt.tail) for prompt in prompts]
    operations = forward_flops(subject, lengths)
    rate = matmul_rate(subject.device, subject.llm.dtype)
    # Matrices by layer are a way around too little memory; their peak is not the method's.
    by_layer = [name for name, note in notes.items() if note.get("kept") == "one layer"]
    names = [name for name in _WITH_MEMORY if name in rounds and name not in by_layer]
    memory, failed = _memory(names, subject, options, documents)
    record: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "tokens": {"prompts": lengths, "per_document": subject.doc_tokens},
        "notes": notes,
        "flops": {
            "operations": operations,
            "matmul_per_second": rate,
            "seconds": operations / rate,
        },
        "memory": memory,
        "skipped": skipped,
        "skipped_memory": failed,
        "rounds": rounds,
    }
    return record | summarise(record, timed_names(options))


def _rounds(
    subject: Subject,
    options: Options,
    documents: Sequence[str],
    queries: Sequence[str],
    advance: Advance,
) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]], dict[str, str]]:
    """Return the seconds of every round, the methods' choices, and why methods did not run."""
    methods: dict[str, Method] = {}
    once: dict[str, float] = {}
    notes: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    for name in timed_names(options):
        advance(f"{len(documents)} documents, warm-up: {name}", 1)
        trial = _trial(name, subject, documents, queries[0])
        if isinstance(trial, str):
            skipped[name] = trial
        elif trial.seconds * options.repeats > options.budget:
            once[name] = trial.seconds
            trial.method.notes["rounds"] = "the warm-up alone: more would exceed the budget"
            notes[name] = trial.method.notes
        else:
            methods[name] = trial.method
        if name not in methods:
            advance(name, options.repeats)
    rounds: dict[str, list[float]] = {name: [] for name in methods}
    order = list(methods)
    for number, query in enumerate(queries[1:], start=1):
        for name in order:
            advance(f"{len(documents)} documents, round {number}: {name}", 1)
            methods[name].prepare(query)
            if not methods[name].remembers:
                subject.forget_tokens()
            rounds[name].append(timed(partial(methods[name].run, query), subject.device))
        order = order[1:] + order[:1]  # no method is always the first
    rounds |= {name: [seconds] for name, seconds in once.items()}
    notes |= {name: method.notes for name, method in methods.items() if method.notes}
    return rounds, notes, skipped


@dataclass(frozen=True)
class _Trial:
    method: Method
    seconds: float


def _trial(name: str, subject: Subject, documents: Sequence[str], query: str) -> _Trial | str:
    """Warm a method up, or return the reason why it cannot be measured."""
    try:
        method = make_method(name, subject, documents)
        if method.trial is None:
            method.prepare(query)
            seconds = timed(partial(method.run, query), subject.device)
        else:
            seconds = method.trial(query)
    except (UnavailableError, PromptTooLongError) as error:
        return str(error)
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        return "out of memory"
    return _Trial(method, seconds)


def _out_of_memory(error: BaseException) -> bool:
    # The CPU's allocator raises a plain RuntimeError.
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or "allocate memory" in str(error) or "not enough memory" in str(error)


def _memory(
    names: Sequence[str], subject: Subject, options: Options, documents: Sequence[str]
) -> tuple[dict[str, int], dict[str, str]]:
    """Return the peaks over the model in bytes, and why peaks are missing."""
    if not options.memory:
        return {}, {}
    if not can_measure(subject.device):
        reason = f"peaks cannot be measured on {subject.device.type} here"
        return {}, dict.fromkeys(names, reason)
    peaks: dict[str, int] = {}
    failed: dict[str, str] = {}
    for name in names:
        try:
            if subject.device.type == "cuda":
                peaks[name] = _peak(name, subject, documents)
            else:
                peaks[name] = peak_in_process(options, name, len(documents))
        except (UnavailableError, RuntimeError) as error:
            failed[name] = str(error)
    return peaks, failed


def _peak(name: str, subject: Subject, documents: Sequence[str]) -> int:
    (query,) = make_queries(subject.llm.encoder, 1)
    method = make_method(name, subject, documents)
    method.prepare(query)
    torch.cuda.empty_cache()
    return peak_over_now(partial(method.run, query), subject.device)
