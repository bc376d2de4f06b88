"""Options of the latency benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.latency.shapes import SHAPES
from routehead_plugins.errors import InputError

BYTES = "bytes"
DEFAULT_METHODS = "handwritten,icr,ours,parallel-cold,parallel-warm,likelihood,listwise,floor"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the command line; the help texts describe the fields."""

    sizes: Annotated[str, typer.Option(help="Numbers of documents.")] = "10,20,50,100"
    repeats: Annotated[int, typer.Option(min=1, help="Rounds after the warm-up.")] = 5
    methods: Annotated[str, typer.Option(help="Comma-separated.")] = DEFAULT_METHODS
    model: Annotated[
        str, typer.Option(help="embedded, a Hub id, a local directory, or a .gguf file.")
    ] = "embedded"
    shape: Annotated[
        str | None, typer.Option(help=f"Random weights instead: {', '.join(SHAPES)}.")
    ] = None
    tokenizer: Annotated[
        str, typer.Option(help="For --shape: like --model, or bytes if none is installed.")
    ] = "embedded"
    device: Annotated[str | None, typer.Option(help="Default: the fastest available.")] = None
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto"
    heads: Annotated[
        str,
        typer.Option(
            help="Heads of ours and parallel: spread (16 heads over the middle third of the "
            "layers), layers:10-19, 13-18,13-1, or a head-set file."
        ),
    ] = "spread"
    doc_tokens: Annotated[int, typer.Option(min=1, help="Tokens of every document.")] = 150
    budget: Annotated[
        float,
        typer.Option(help="Seconds per method and size; a slower method is timed once."),
    ] = 900.0
    memory: Annotated[bool, typer.Option(help="Measure peaks of memory as well.")] = True
    fresh: Annotated[bool, typer.Option(help="Ignore earlier results in the file.")] = False
    output: Annotated[
        Path | None, typer.Option(help="Default: benchmarks/results/latency-MODEL-DEVICE.json.")
    ] = None

    @property
    def label(self) -> str:
        """Name of the LLM, for files."""
        return self.shape or Path(self.model).name

    @property
    def document_counts(self) -> list[int]:
        """Numbers of documents, ascending.

        Raises:
            InputError: ``sizes`` is not a list of numbers.
        """
        parts = [part.strip() for part in self.sizes.split(",")]
        if not all(part.isdigit() and int(part) > 0 for part in parts):
            raise InputError(
                f"--sizes={self.sizes!r} is not a list of numbers; give numbers such as 10,20,50."
            )
        return sorted({int(part) for part in parts})

    @property
    def method_names(self) -> list[str]:
        """Names of the methods."""
        return [part.strip() for part in self.methods.split(",")]

    @property
    def subject(self) -> dict[str, str | int | None]:
        """The options that decide which LLM is measured on which documents."""
        names = ("model", "shape", "tokenizer", "device", "dtype", "heads", "doc_tokens")
        return {name: getattr(self, name) for name in names}
