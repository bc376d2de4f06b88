"""Options that several commands share, for ``cli.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Option(
        help="The LLM: **embedded** (SmolLM2-135M-Instruct, offline), a Hub id such as "
        "Qwen/Qwen3-0.6B, a local directory, or a .gguf file."
    ),
]
Device = Annotated[
    str | None, typer.Option(help="cuda, mps or cpu.  [default: the fastest there is]")
]
Dtype = Annotated[
    str,
    typer.Option(help="auto, float32, bfloat16 or float16; auto takes what is measured faster."),
]
MaxDocTokens = Annotated[
    int | None, typer.Option(help="Cut longer documents here.  [default: no cut]")
]
Layout = Annotated[
    str | None,
    typer.Option(
        help="**sequential**: all documents in one prompt; **parallel**: each on its own, any "
        "number of them.  [default: the one the heads were chosen for, or sequential]"
    ),
]
DocumentCache = Annotated[
    str | None,
    typer.Option(help="Keep what was computed for documents, up to this size, such as 2GB."),
]
Window = Annotated[
    int | None,
    typer.Option(help="Documents read at once, sequential layout.  [default: all of them]"),
]
Stride = Annotated[
    int | None,
    typer.Option(help="Documents by which windows are apart.  [default: half a window]"),
]
Heads = Annotated[
    str | None,
    typer.Option(
        help="Heads to read: **all**, **layers:10-19** (or **layers**, the middle third), "
        "**13-18,13-1** (layer-head), a set that comes with the library such as "
        "**weights:embedded/parallel** or **qr:Llama-3.1-8B-Instruct**, the path of a head-set "
        "file, or **routed:FOLDER** for a router.  [default: all, or the LLM's own router]"
    ),
]
Router = Annotated[
    str | None,
    typer.Option(help="Chooses the heads per query: a folder from `routehead train`, or a Hub id."),
]
FirstStageWeight = Annotated[
    float,
    typer.Option(
        min=0,
        help="How much the candidates' own scores count, both sides standardised; 0: not at all.",
    ),
]
FittedWeight = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="How much the candidates' own scores count, both sides standardised.  [default: what "
        "was fitted with the heads, or 0]",
    ),
]
Signals = Annotated[
    Path | None,
    typer.Option(help="Where signals are kept for the next call.  [default: the user's cache]"),
]
