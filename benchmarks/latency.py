"""Measure the time per query and the peak memory of every way to use an LLM as a re-ranker.

    python benchmarks/latency.py                                       # the embedded LLM
    python benchmarks/latency.py --shape qwen3-4b --device cuda        # random weights, real shape
    python benchmarks/latency.py --sizes 2,4 --repeats 1 --no-memory   # try it out

Methods, all over the same documents of 150 tokens:

    handwritten     ICR written by hand: eager attention, all matrices, two full passes
    icr             ICR on this package's tap: sequential layout, every head, full depth
    ours            sequential layout, a head set, no layer below its deepest head
    parallel-cold   parallel layout, the same heads, nothing in the document cache
    parallel-warm   the same after another query over the same documents
    likelihood      query likelihood of the same LLM, best of several batch sizes
    listwise        RankGPT: the LLM writes a permutation, windows of 20 that move by 10
    floor           a bare forward over the prompt of `ours`, of as many layers

After a warm-up the methods take turns for a number of rounds, so that noise hits all of them alike;
ratios are formed within rounds. Results are written after every size: a run that was stopped goes
on where it was when it is called again with the same settings.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from latency_report import markdown, targets
from methods import METHODS
from plot import plot_latency
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rounds import SHARE, Advance, Job, measure
from subject import SHAPES, Subject, SubjectOptions, load_subject
from workload import make_documents

from routehead_plugins import __version__
from routehead_plugins.backbone import pick_device, pick_dtype
from routehead_plugins.errors import InputError, RouteHeadError
from routehead_plugins.io import atomic_write_text

RESULTS = Path(__file__).parent / "results"
DEFAULT_METHODS = "handwritten,icr,ours,parallel-cold,parallel-warm,likelihood,listwise,floor"


def main(
    sizes: Annotated[str, typer.Option(help="Numbers of documents.")] = "10,20,50,100",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds after the warm-up.")] = 5,
    methods: Annotated[str, typer.Option(help="Comma-separated.")] = DEFAULT_METHODS,
    model: Annotated[
        str, typer.Option(help="embedded, a Hub id, a local directory, or a .gguf file.")
    ] = "embedded",
    shape: Annotated[
        str | None, typer.Option(help=f"Random weights instead: {', '.join(SHAPES)}.")
    ] = None,
    tokenizer: Annotated[
        str, typer.Option(help="For --shape: what --model takes, or bytes where none is installed.")
    ] = "embedded",
    device: Annotated[str | None, typer.Option(help="[default: the fastest there is]")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    heads: Annotated[
        str,
        typer.Option(
            help="Heads of ours and parallel: spread (16 heads over the middle third of the "
            "layers), layers:10-19, 13-18,13-1, or a head-set file."
        ),
    ] = "spread",
    doc_tokens: Annotated[int, typer.Option(min=1, help="Tokens of every document.")] = 150,
    budget: Annotated[
        float,
        typer.Option(help="Seconds for one method at one size; what is dearer is run once."),
    ] = 900.0,
    memory: Annotated[bool, typer.Option(help="Measure peaks of memory as well.")] = True,
    fresh: Annotated[bool, typer.Option(help="Measure again what is already there.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="[default: benchmarks/results/latency-MODEL-DEVICE.json]")
    ] = None,
) -> None:
    """Measure time per query and peak memory of every way to re-rank with an LLM.

    Writes JSON with every round, prints tables in Markdown, draws a plot. Goes on where an earlier
    run with the same settings was stopped.
    """
    job = Job(_numbers(sizes), _names(methods), repeats, budget, memory)
    place = pick_device(device)
    options = SubjectOptions(model, shape, tokenizer, str(place), dtype, heads, doc_tokens)
    path = output or RESULTS / f"latency-{options.label}-{place.type}.json"
    results = run_job(job, options, path, fresh=fresh)
    typer.echo(markdown(results))
    plot_latency(results, path.with_suffix(".svg"))


def run_job(job: Job, options: SubjectOptions, path: Path, *, fresh: bool = False) -> Any:
    """Measure the sizes that are not in the file yet, writing it after each.

    Returns:
        What the file holds.
    """
    results = _stored(path, _settings(job, options), fresh=fresh)
    missing = [size for size in job.sizes if str(size) not in results["sizes"]]
    if missing:
        # "auto" is measured: what an earlier part of this run picked stays.
        device = pick_device(options.device)
        dtype = results.get("dtype") or str(pick_dtype(options.dtype, device))
        options = replace(options, dtype=dtype.removeprefix("torch."))
        console = Console(stderr=True)
        with console.status(f"Loading {options.label} ..."):
            subject = load_subject(options)
            documents = make_documents(subject.llm.encoder, max(missing), options.doc_tokens)
        results |= _about(subject)
        with _progress(console, missing, job) as advance:
            for size in missing:
                record = measure(subject, options, job, documents[:size], advance)
                results["sizes"][str(size)] = record
                results["sizes"] = dict(sorted(results["sizes"].items(), key=lambda s: int(s[0])))
                results["date"] = record["date"]
                results["targets"] = targets(results["sizes"])
                atomic_write_text(path, json.dumps(results, indent=1) + "\n")
    return results


def _settings(job: Job, options: SubjectOptions) -> dict[str, Any]:
    """What results of two runs must have in common to stand in one file."""
    place = torch.device(options.device)
    return {
        **{key: value for key, value in asdict(options).items() if key != "device"},
        "model": options.label,
        "methods": list(job.methods),
        "repeats": job.repeats,
        "budget": job.budget,
        "memory": job.memory,
        "machine": _machine(place),
        "versions": {
            "routehead-plugins": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers")},
        },
    }


def _machine(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {
        "device": device.type,
        "system": platform.system(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


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
    """What an earlier run left, if it had the same settings; otherwise the start of a new file."""
    if not fresh and path.exists():
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content.get("settings") == settings:
            return content
    command = shlex.join(["python", "benchmarks/latency.py", *sys.argv[1:]])
    return {"command": command, "date": None, "settings": settings, "sizes": {}}


@contextmanager
def _progress(console: Console, sizes: Sequence[int], job: Job) -> Iterator[Advance]:
    """Draw a bar on stderr, between measurements only: a drawing thread would take its share."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns, TextColumn("{task.description}"), console=console, auto_refresh=False
    ) as bar:
        task = bar.add_task("", total=len(sizes) * len(job.timed) * (job.repeats + 1))

        def advance(what: str, steps: int) -> None:
            bar.update(task, advance=steps, description=what, refresh=True)

        yield advance


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise InputError(f"--sizes={text!r} is not a list of numbers; give some, such as 10,20,50.")
    return sorted({int(part) for part in parts})


def _names(text: str) -> list[str]:
    names = [part.strip() for part in text.split(",")]
    unknown = [name for name in names if name not in METHODS or name in SHARE]
    if unknown:
        raise InputError(f"method {unknown[0]!r} is unknown; there are: {DEFAULT_METHODS}.")
    return names


if __name__ == "__main__":
    try:
        typer.run(main)
    except RouteHeadError as error:
        typer.secho(f"latency.py: {error}", fg="red", err=True)
        sys.exit(2)
