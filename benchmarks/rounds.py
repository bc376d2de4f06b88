"""One number of documents: warm-up, rounds in which the methods take turns, peaks of memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

import torch
from baselines import forward_flops, matmul_rate
from latency_report import summarise
from memory import can_measure, extra_bytes, peak_over_now
from methods import make_method
from subject import Method, Subject, SubjectOptions, UnavailableError, timed
from workload import make_queries

from routehead_plugins.errors import PromptTooLongError

# Peaks of memory are measured of these.
_WITH_MEMORY = ("handwritten", "ours", "parallel-cold")
# Timed beside `ours` for the share of tap and scoring; no methods of their own.
SHARE = ("tails", "tails-untapped")
Advance = Callable[[str, int], None]


@dataclass(frozen=True)
class Job:
    """What to measure, besides the LLM.

    Attributes:
        sizes: Numbers of documents.
        methods: Names from ``METHODS``.
        repeats: Rounds after the warm-up.
        budget: Seconds for all rounds of one method at one size; what is dearer is timed once, in
            the warm-up.
        memory: Whether peaks of memory are measured.
    """

    sizes: Sequence[int]
    methods: Sequence[str]
    repeats: int
    budget: float
    memory: bool

    @property
    def timed(self) -> list[str]:
        """All that take turns."""
        return [*self.methods, *(SHARE if "ours" in self.methods else ())]


def measure(
    subject: Subject,
    options: SubjectOptions,
    job: Job,
    documents: Sequence[str],
    advance: Advance,
) -> dict[str, Any]:
    """Time all methods on some documents, in turns, then measure their memory.

    Args:
        subject: The LLM.
        options: How it was loaded, for processes of their own.
        job: What to measure.
        documents: What every query ranks.
        advance: Told what is done now, and how many steps of the bar that is.

    Returns:
        Every round, medians, ratios, peaks of memory, and why anything is missing.
    """
    queries = make_queries(subject.llm.encoder, job.repeats + 1)
    rounds, notes, skipped = _rounds(subject, job, documents, queries, advance)
    prompts = subject.prompts(queries[0], documents)
    lengths = [len(prompt.prefix) + len(prompt.tail) for prompt in prompts]
    operations = forward_flops(subject, lengths)
    rate = matmul_rate(subject.device, subject.llm.dtype)
    # By-layer matrices are what did not fit; their peak says nothing of the method.
    by_layer = [name for name, note in notes.items() if note.get("kept") == "one layer"]
    ran = [name for name in _WITH_MEMORY if name in rounds and name not in by_layer]
    memory, failed = _memory(ran, subject, options, job, documents)
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
    return record | summarise(record, job.timed)


def _rounds(
    subject: Subject, job: Job, documents: Sequence[str], queries: Sequence[str], advance: Advance
) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]], dict[str, str]]:
    """Seconds of every round, what methods chose, and why some did not run."""
    methods: dict[str, Method] = {}
    once: dict[str, float] = {}
    notes: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    for name in job.timed:
        advance(f"{len(documents)} documents, warm-up: {name}", 1)
        made = _tried(name, subject, documents, queries[0])
        if isinstance(made, str):
            skipped[name] = made
        elif made.seconds * job.repeats > job.budget:
            once[name] = made.seconds
            made.method.notes["rounds"] = "the warm-up alone: more would exceed the budget"
            notes[name] = made.method.notes
        else:
            methods[name] = made.method
        if name not in methods:
            advance(name, job.repeats)
    rounds: dict[str, list[float]] = {name: [] for name in methods}
    order = list(methods)
    for turn, query in enumerate(queries[1:]):
        for name in order:
            advance(f"{len(documents)} documents, round {turn + 1}: {name}", 1)
            methods[name].prepare(query)
            if not methods[name].remembers:
                subject.forget_tokens()
            rounds[name].append(timed(partial(methods[name].run, query), subject.device))
        order = order[1:] + order[:1]  # nobody is always the first
    rounds |= {name: [seconds] for name, seconds in once.items()}
    notes |= {name: method.notes for name, method in methods.items() if method.notes}
    return rounds, notes, skipped


@dataclass(frozen=True)
class _Trial:
    method: Method
    seconds: float


def _tried(name: str, subject: Subject, documents: Sequence[str], query: str) -> _Trial | str:
    """Warm a method up, or say why it is not measured."""
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
        return "memory did not suffice"
    return _Trial(method, seconds)


def _out_of_memory(error: BaseException) -> bool:
    # The CPU's allocator has no exception of its own.
    named = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return named or "allocate memory" in str(error) or "not enough memory" in str(error)


def _memory(
    names: Sequence[str],
    subject: Subject,
    options: SubjectOptions,
    job: Job,
    documents: Sequence[str],
) -> tuple[dict[str, int], dict[str, str]]:
    """Peaks over the model in bytes, and why some are missing."""
    if not job.memory:
        return {}, {}
    if not can_measure(subject.device):
        return {}, dict.fromkeys(names, f"peaks cannot be told on {subject.device.type} here")
    found: dict[str, int] = {}
    failed: dict[str, str] = {}
    for name in names:
        try:
            if subject.device.type == "cuda":
                found[name] = _peak(name, subject, documents)
            else:
                found[name] = extra_bytes(options, name, len(documents))
        except (UnavailableError, RuntimeError) as error:
            failed[name] = str(error)
    return found, failed


def _peak(name: str, subject: Subject, documents: Sequence[str]) -> int:
    (query,) = make_queries(subject.llm.encoder, 1)
    method = make_method(name, subject, documents)
    method.prepare(query)
    torch.cuda.empty_cache()
    return peak_over_now(partial(method.run, query), subject.device)
