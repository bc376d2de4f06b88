"""Shared parts of the benchmarks: command line, cached values, results and tables."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
import typer
from torch import Tensor

import routehead_plugins
from routehead_plugins import HeadSet, Recipe
from routehead_plugins.cli.runtime import check_names
from routehead_plugins.errors import RouteHeadError
from routehead_plugins.evaluation import ResultTable
from routehead_plugins.io import atomic_write_text, make_folder
from routehead_plugins.selection import FIRST_STAGE
from routehead_plugins.signals import SignalSet

RESULTS = Path(__file__).parent / "results"

_PACKAGE = Path(routehead_plugins.__file__).parent
_SIGNALS = ("mass", "calibrated", "gains", "first_stage", "ideal_gains", "averaged")
# The innermost lists and objects of indented JSON.
_INNERMOST = re.compile(r"[\[{]\n[^\[\]{}]*?[\]}]")

Options = TypeVar("Options")


# Command line


def run(command: Callable[..., None]) -> None:
    """Run a command with the arguments of the process; its errors end in one line and status 2."""
    try:
        typer.run(command)
    except RouteHeadError as error:
        typer.secho(f"{Path(sys.argv[0]).stem}: {error}", fg="red", err=True)
        sys.exit(2)


def with_options(
    command: Callable[[Options], object], options: type[Options]
) -> Callable[..., None]:
    """Give a command that takes one dataclass of options the signature that typer needs.

    Args:
        command: Function of the options.
        options: Dataclass whose annotations and defaults describe the command line.

    Returns:
        A function with one parameter per field.
    """

    def call(**values: Any) -> None:
        command(options(**values))

    hints = get_type_hints(options, include_extras=True)
    parameters = inspect.signature(options).parameters.values()
    described: Any = call
    described.__doc__ = command.__doc__
    described.__signature__ = inspect.Signature(
        [parameter.replace(annotation=hints[parameter.name]) for parameter in parameters]
    )
    return call


def command_line(module: str, names: Sequence[str], options: Mapping[str, Any]) -> str:
    """Write the command that repeats a run.

    Args:
        module: Name of the script's module.
        names: Positional arguments.
        options: Option -> value. ``None`` and ``False`` are left out, ``True`` is a flag.
    """
    words = []
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif value is not None and value is not False:
            words.append(f"{option}={value}")
    return shlex.join(["python", "-m", module, *names, *words])


def folders_by_name(folders: Sequence[Path]) -> dict[str, Path]:
    """Map the names of collections to their folders.

    Args:
        folders: BEIR folders.

    Raises:
        InputError: Two folders have the same name.
    """
    check_names(folders)
    return {path.resolve().name: path for path in folders}


# Cached values


def source_files(*parts: str) -> tuple[Path, ...]:
    """List source files of the package, given rooms such as ``"training"`` or modules."""
    paths = [_PACKAGE / part for part in parts]
    return tuple(
        file for path in paths for file in (sorted(path.glob("*.py")) if path.is_dir() else [path])
    )


FITTING = source_files("scoring", "selection", "signals", "training")
"""Source code that fitted heads and routers depend on."""


class Cache:
    """Folder of JSON files, so that an interrupted run resumes and tables can be made again.

    A file is found by a hash of its key, the source code, and the version of torch.

    Args:
        folder: Folder of the files, created with the first one; ``None`` keeps nothing.
        code: Source files that the values depend on.
    """

    def __init__(self, folder: Path | None, code: Iterable[Path] = FITTING) -> None:
        self.folder = folder
        self._code = tuple(code)

    def get(
        self, key: Sequence[Any], compute: Callable[[], Any], code: Iterable[Path] | None = None
    ) -> Any:
        """Load the value of a key, or compute and save it.

        Args:
            key: Everything besides the code that the value depends on, as JSON.
            compute: Returns the value, as JSON.
            code: Source files that this value depends on, if not those of the cache.

        Returns:
            The value after a round trip through JSON, whether loaded or computed.
        """
        if self.folder is None:
            return json.loads(json.dumps(compute()))
        source = _code_digest(self._code if code is None else tuple(code))
        name = hashlib.sha256(json.dumps([source, key], sort_keys=True).encode()).hexdigest()
        path = self.folder / f"{name[:24]}.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # missing, or cut off by a power failure
            text = json.dumps(compute())
        make_folder(self.folder, "cached values")
        atomic_write_text(path, text)
        return json.loads(text)

    def heads(self, key: Sequence[Any], compute: Callable[[], HeadSet]) -> HeadSet:
        """Load a head set, or compute and save it; see ``get``."""
        return heads_from_json(self.get(key, lambda: asdict(compute())))

    def scores(self, key: Sequence[Any], compute: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
        """Load float32 scores of several queries, or compute and save them; see ``get``."""
        rows = self.get(key, lambda: [scores.float().tolist() for scores in compute()])
        return [torch.tensor(row) for row in rows]


def heads_from_json(content: Mapping[str, Any]) -> HeadSet:
    """Rebuild a head set from its fields as ``dataclasses.asdict`` gives them."""
    return HeadSet(**{**content, "recipe": Recipe(**content["recipe"])})


def signals_digest(signals: SignalSet) -> str:
    """Hash everything in a set of signals that heads and routers are fitted to."""
    about = [str(signals.heads), signals.model, signals.layout, list(signals.data)]
    digest = hashlib.sha256(json.dumps(about).encode())
    for query in signals.queries:
        digest.update(repr((query.query_id, query.query, query.docids)).encode())
        for name in _SIGNALS:
            digest.update(getattr(query, name).contiguous().numpy().tobytes())
    return digest.hexdigest()


@cache
def _code_digest(files: tuple[Path, ...]) -> str:
    digest = hashlib.sha256(torch.__version__.encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


# Results


def provenance() -> dict[str, Any]:
    """Return the date and the versions of packages, as in the package's own results."""
    table = ResultTable({}, FIRST_STAGE).to_dict()
    return {"date": table["date"], "versions": table["versions"]}


def results_json(command: str, settings: Mapping[str, Any], parts: Mapping[str, Any]) -> str:
    """Write results as JSON.

    Args:
        command: The command that repeats the run.
        settings: Everything that the figures depend on.
        parts: Name -> figures, as JSON.
    """
    content = {"command": command, **provenance(), "settings": dict(settings), **parts}
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    # One line per figure would be ten thousands of lines. Line breaks stand between values only.
    return _INNERMOST.sub(lambda match: re.sub(r"\n *", " ", match[0]), text) + "\n"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Lay out cells as a Markdown table; the first row is the header."""
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (rows[0], rule, *rows[1:]))
