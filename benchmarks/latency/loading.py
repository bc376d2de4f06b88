"""Measure how long GGUF files take to load: at first, and when they have been converted.

Every load is a process of its own; the import of the library is not counted. The cache of
conversions is an empty folder at the start.

Example: python -m benchmarks.latency.loading embedded llms/gemma3-270m.gguf
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from benchmarks.common import RESULTS, command_line, results_json, run
from routehead_plugins.errors import InputError
from routehead_plugins.io import atomic_write_text

_LOAD = """
import sys, time
import torch
from routehead_plugins.backbone import load
from routehead_plugins.backbone.conversions import conversions
started = time.perf_counter()
load(sys.argv[1], dtype=getattr(torch, sys.argv[2]), device=torch.device("cpu"))
print(time.perf_counter() - started, sum(kept.size for kept in conversions()))
"""


def seconds(name: str, dtype: str, **variables: str) -> tuple[float, int]:
    """Load an LLM in a new process.

    Returns:
        Seconds, and bytes of all conversions.

    Raises:
        InputError: It cannot be loaded.
    """
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _LOAD, name, dtype],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        raise InputError(f"{name} cannot be loaded: {process.stderr.strip()[-200:]}")
    taken, size = process.stdout.split()[-2:]
    return float(taken), int(size)


def main(
    llms: Annotated[list[str], typer.Argument(help='"embedded", or .gguf files.')],
    dtype: Annotated[str, typer.Option(help="Number format of the weights.")] = "float32",
    repeats: Annotated[int, typer.Option(help="Loads of the converted file.", min=1)] = 3,
) -> None:
    """Measure, print and write benchmarks/results/loading.json."""
    figures = {}
    for name in llms:
        with tempfile.TemporaryDirectory() as folder:
            first, size = seconds(name, dtype, XDG_CACHE_HOME=folder)
            later = [seconds(name, dtype, XDG_CACHE_HOME=folder)[0] for _ in range(repeats)]
        direct, _ = seconds(name, dtype, ROUTEHEAD_CACHE_LIMIT="0")
        figures[Path(name).stem] = {
            "first load, with conversion, s": first,
            "later loads, median, s": median(later),
            "without a cache, s": direct,
            "size of the conversion, MB": size / 1e6,
        }
        typer.echo(f"{name}: {figures[Path(name).stem]}")
    command = command_line("benchmarks.latency.loading", llms, {"dtype": dtype, "repeats": repeats})
    text = results_json(command, {"dtype": dtype}, figures)
    atomic_write_text(RESULTS / "loading.json", text)


if __name__ == "__main__":
    run(main)
