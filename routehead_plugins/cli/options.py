"""Command-line options, and the decorator that gives a command its options.

A command takes two dataclasses: one of its own, whose fields are annotated with their help or with
a ``typer.Option``, and ``RerankerOptions``, whose options are entries of the table below. To add an
option of the LLM, add a field to ``RerankerOptions`` and an entry to the table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import wraps
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, TypeAlias, get_type_hints

import typer

from routehead_plugins.options import RerankerOptions

Command: TypeAlias = Callable[..., None]

HEADS: Mapping[str, Any] = {
    "heads": Annotated[
        str | None,
        "Heads to read: **all**, **layers:10-19** (or **layers**, the middle third), "
        "**13-18,13-1** (layer-head), a set that comes with the library such as "
        "**weights:embedded/parallel** or **qr:Llama-3.1-8B-Instruct**, the path of a head-set "
        "file, or **routed:FOLDER** for a router.  [default: all, or the LLM's own router]",
    ],
    "router": Annotated[
        str | None, "Chooses the heads per query: a folder from `routehead train`, or a Hub id."
    ],
}
LLM: Mapping[str, Any] = {
    "model": Annotated[
        str,
        "The LLM: **embedded** (SmolLM2-135M-Instruct, offline), a Hub id such as "
        "Qwen/Qwen3-0.6B, a local directory, or a .gguf file.",
    ],
    "adapter": Annotated[
        str | None, "A LoRA adapter for the LLM: a folder from `routehead align`, or a Hub id."
    ],
    "revision": Annotated[
        str | None, "Branch, tag or commit of the LLM on the Hub.  [default: the latest]"
    ],
    "trust_remote_code": Annotated[
        bool, "Run code that comes with the LLM: only if you have read it."
    ],
    "device": Annotated[str | None, "cuda, mps or cpu.  [default: the fastest available]"],
    "dtype": Annotated[str, "auto (the faster on the device), float32, bfloat16 or float16."],
}
PROMPT: Mapping[str, Any] = {
    "max_doc_tokens": Annotated[
        int | None, "Truncate documents after this many tokens.  [default: no limit]"
    ],
    "layout": Annotated[
        str | None,
        "**sequential**: all documents in one prompt; **parallel**: a prompt for each, any number "
        "of them; **late**: the same, hidden from all but the heads that are read.  [default: the "
        "one the heads were chosen for, or sequential]",
    ],
    "window": Annotated[int | None, "Documents per prompt, sequential layout.  [default: all]"],
    "stride": Annotated[
        int | None, "Step between window starts, in documents.  [default: half a window]"
    ],
}
# Only some commands have these.
SINGLE: Mapping[str, Any] = {
    "document_cache": Annotated[
        str | None, "Reuse what was computed for documents, up to this size, such as 2GB."
    ],
    "first_stage_weight": Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Weight of the candidates' own scores, standardised per query.  [default: the "
            "one fitted with the heads, or 0]",
        ),
    ],
    "documents": Annotated[
        str | None,
        "Folder of a document index from `routehead index`: its documents need not be run.",
    ],
    "refine": Annotated[
        int | None,
        "Read this many of the best documents once more in the parallel layout (late layout).  "
        "[default: none]",
    ],
    "long_documents": Annotated[
        str,
        "**truncate** after --max-doc-tokens, or **chunk**: divide long documents into passages, "
        "each read on its own.",
    ],
    "chunk_tokens": Annotated[int | None, "Longest passage, in tokens.  [default: 256]"],
    "chunk_stride": Annotated[
        int | None, "Tokens from passage to passage.  [default: no common part]"
    ],
    "chunk_aggregation": Annotated[
        str, "What a document gets of its passages: **max**, **first**, or **mean_of_top(3)**."
    ],
    "on_too_long": Annotated[
        str, "Documents and queries that do not fit the LLM's context: **cut** or **error**."
    ],
    "drop_query_copies": Annotated[
        bool, "Leave out passages of documents that repeat the query before they are read."
    ],
}

Signals = Annotated[Path | None, "Folder that keeps signals.  [default: in the user's cache]"]
Seed = Annotated[int, "Random seed."]


def with_options(*names: str, **defaults: object) -> Callable[[Command], Command]:
    """Flatten the dataclasses that a command takes into keyword arguments, as typer expects.

    ``names`` are the options of the table, which fill ``RerankerOptions``; ``defaults`` replace
    defaults of its fields.
    """

    def decorate(function: Command) -> Command:
        classes = get_type_hints(function)
        del classes["return"]
        parameters = {
            name: _shared(names, defaults) if cls is RerankerOptions else _own(cls)
            for name, cls in classes.items()
        }

        @wraps(function)
        def command(**values: Any) -> None:
            arguments = {
                name: cls(**{option.name: values[option.name] for option in parameters[name]})
                for name, cls in classes.items()
            }
            function(**arguments)

        flat = [option for options in parameters.values() for option in options]
        command.__annotations__ = {option.name: option.annotation for option in flat}
        vars(command)["__signature__"] = Signature(flat)
        return command

    return decorate


def _shared(names: tuple[str, ...], defaults: Mapping[str, object]) -> list[Parameter]:
    """Return a parameter for each named option of the table."""
    table = {**HEADS, **LLM, **PROMPT, **SINGLE}
    fields = {field.name: field.default for field in dataclasses.fields(RerankerOptions)}
    return [_parameter(name, table[name], defaults.get(name, fields[name])) for name in names]


def _own(cls: type) -> list[Parameter]:
    """Return a parameter for each field of a command's own dataclass."""
    hints = get_type_hints(cls, include_extras=True)
    return [_parameter(f.name, hints[f.name], f.default) for f in dataclasses.fields(cls)]


def _parameter(name: str, annotation: Any, default: object) -> Parameter:
    """Return a parameter whose annotation typer can read."""
    (option,) = annotation.__metadata__
    if isinstance(option, str):
        # The help says what the default None stands for; typer adds any other default.
        text = option if default is None else option.partition("  [default:")[0]
        option = typer.Option(help=text)
    return Parameter(
        name,
        Parameter.KEYWORD_ONLY,
        default=Parameter.empty if default is dataclasses.MISSING else default,
        annotation=Annotated[annotation.__origin__, option],
    )
