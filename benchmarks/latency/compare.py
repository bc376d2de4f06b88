r"""Measure the time per query and the peak memory of every way to use an LLM as a re-ranker.

    python -m benchmarks.latency.compare                                     # the embedded LLM
    python -m benchmarks.latency.compare --shape qwen3-4b --device cuda      # random weights
    python -m benchmarks.latency.compare --sizes 2,4 --repeats 1 --no-memory # try it out
    python -m benchmarks.latency.compare --no-memory --sizes 10,100,1000 --doc-tokens 120 \
        --methods parallel-cold,parallel-warm,late-cold,late-warm,late-index,likelihood,tail \
        --output benchmarks/results/latency-late-embedded-cpu.json

Methods, all over the same documents of 150 tokens:

    handwritten     ICR written by hand: eager attention, all matrices, two full passes
    icr             ICR on this package's tap: sequential layout, every head, full depth
    ours            sequential layout, a head set, no layer below its deepest head
    parallel-cold   parallel layout, the same heads, nothing in the document cache
    parallel-warm   the same after another query over the same documents
    likelihood      query likelihood of the same LLM, best of several batch sizes
    listwise        RankGPT: the LLM writes a permutation, windows of 20 that move by 10
    floor           a bare forward over the prompt of `ours`, of as many layers
    late-cold       late layout, the same heads, nothing cached
    late-warm       the same, documents in the cache in memory
    late-index      the same, documents in an index on disk, int8
    tail            a bare forward over the query's tail, of as many layers

After a warm-up all methods run in every round, so that noise affects them equally; ratios are
formed within rounds. Results are written after every size: an interrupted run resumes when it is
called again with the same settings.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.common import RESULTS, provenance, run, with_options
from benchmarks.latency.methods import METHODS
from benchmarks.latency.options import DEFAULT_METHODS, Options
from benchmarks.latency.plot import plot_latency
from benchmarks.latency.report import markdown, targets
from benchmarks.latency.rounds import SHARE, Advance, measure, timed_names
from benchmarks.latency.subject import Subject, load_subject
from benchmarks.latency.workload import make_documents
from routehead_plugins.backbone import pick_device, pick_dtype
from routehead_plugins.cli.runtime import err
from routehead_plugins.errors import InputError
from routehead_plugins.io import atomic_write_text


def main(options: Options) -> None:
    """Measure time per query and peak memory of every way to re-rank with an LLM.

    Writes JSON with every round, prints tables in Markdown, draws a plot. Resumes an interrupted
    run with the same settings.
    """
    check_methods(options.method_names)
    device = pick_device(options.device)
    path = options.output or RESULTS / f"latency-{options.label}-{device.type}.json"
    results = measure_sizes(replace(options, device=str(device)), path)
    typer.echo(markdown(results))
    plot_latency(results, path.with_suffix(".svg"))


def check_methods(names: Sequence[str]) -> None:
    """Check that all methods exist."""
    unknown = [name for name in names if name not in METHODS or name in SHARE]
    if unknown:
        raise InputError(f"method {unknown[0]!r} is unknown; choose from {DEFAULT_METHODS}.")


def measure_sizes(options: Options, path: Path) -> dict[str, Any]:
    """Measure the sizes that a file lacks, write it after each, and return its content."""
    device = torch.device(options.device or "cpu")
    results = _stored(path, _settings(options, device), fresh=options.fresh)
    missing = [size for size in options.document_counts if str(size) not in results["sizes"]]
    if not missing:
        return results
    # "auto" is measured: a resumed run keeps the dtype of its first part.
    dtype = results.get("dtype") or str(pick_dtype(options.dtype, device))
    options = replace(options, dtype=dtype.removeprefix("torch."))
    with err.status(f"Loading {options.label} ..."):
        subject = load_subject(options)
        documents = make_documents(subject.llm.encoder, max(missing), options.doc_tokens)
    results |= _about(subject)
    with _progress(missing, options) as advance:
        for size in missing:
            record = measure(subject, options, documents[:size], advance)
            results["sizes"][str(size)] = record
            results["sizes"] = dict(sorted(results["sizes"].items(), key=lambda s: int(s[0])))
            results["date"] = record["date"]
            results["targets"] = targets(results["sizes"])
            atomic_write_text(path, json.dumps(results, indent=1) + "\n")
    return results


def _settings(options: Options, device: torch.device) -> dict[str, Any]:
    """Return the settings that two runs must share for their results to be in one file."""
    return {
        **{name: value for name, value in options.subject.items() if name != "device"},
        "model": options.label,
        "methods": options.method_names,
        "repeats": options.repeats,
        "budget": options.budget,
        "memory": options.memory,
        "machine": _machine(device),
        "versions": provenance()["versions"],
    }


def _machine(device: torch.device) -> dict[str, Any]:
    machine: dict[str, Any] = {
        "device": device.type,
        "system": platform.system(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model n"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _about(subject: Subject) -> dict[str, Any]:
    return {
        "dtype": str(subject.llm.dtype).removeprefix("torch."),
        "parameters": subject.model.num_parameters(),
        "layers": subject.llm.num_layers,
        "layers_of_ours": subject.heads.last_layer + 1,
        "heads": str(subject.heads),
        "context": subject.llm.max_tokens,
    }


def _stored(path: Path, settings: dict[str, Any], *, fresh: bool) -> dict[str, Any]:
    """Load the results of an earlier run with the same settings, or start new results."""
    if not fresh and path.exists():
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content.get("settings") == settings:
            return content
    command = shlex.join(["python", "-m", "benchmarks.latency.compare", *sys.argv[1:]])
    return {"command": command, "date": None, "settings": settings, "sizes": {}}


@contextmanager
def _progress(sizes: Sequence[int], options: Options) -> Iterator[Advance]:
    """Draw a bar on standard error, between measurements only: a thread would take time."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns, TextColumn("{task.description}"), console=err, auto_refresh=False
    ) as bar:
        steps = len(timed_names(options)) * (options.repeats + 1)
        task = bar.add_task("", total=len(sizes) * steps)

        def advance(description: str, steps: int) -> None:
            bar.update(task, advance=steps, description=description, refresh=True)

        yield advance


if __name__ == "__main__":
    run(with_options(main, Options))
