"""The list of checks, and the command that runs them."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.common import RESULTS, command_line, provenance, results_json
from benchmarks.trust.calls import check_soak, check_threads
from benchmarks.trust.fuzz import check_fuzz
from benchmarks.trust.jobs import check_full_disk, check_kills
from benchmarks.trust.network import check_sockets
from benchmarks.trust.precision import check_batches, check_dtypes
from benchmarks.trust.report import Outcome, Sizes, machine, table
from routehead_plugins.errors import InputError
from routehead_plugins.io import atomic_write_text

# Commands are forked from this process first, before others make it large.
CHECKS: dict[str, Callable[[Path, Sizes, int], Outcome]] = {
    "kills": check_kills,
    "full disk": check_full_disk,
    "fuzz": check_fuzz,
    "threads": check_threads,
    "soak": check_soak,
    "sockets": check_sockets,
    "batches": check_batches,
    "dtypes": check_dtypes,
}


def main(
    checks: Annotated[
        list[str] | None, typer.Argument(help=f"Of {', '.join(CHECKS)}; all by default.")
    ] = None,
    cases: Annotated[int, typer.Option(help="Damaged files.", min=1)] = Sizes.cases,
    kills: Annotated[int, typer.Option(help="Kills of each command.", min=1)] = Sizes.kills,
    calls: Annotated[int, typer.Option(help="Calls from threads.", min=1)] = Sizes.calls,
    queries: Annotated[int, typer.Option(help="Queries of the soak.", min=10)] = Sizes.queries,
    seed: int = 0,
    output: Annotated[Path, typer.Option(help="File of the figures.")] = RESULTS / "trust.json",
) -> None:
    """Run checks, print their table, and write their figures beside those of the others."""
    names = list(checks or CHECKS)
    sizes = Sizes(cases, kills, calls, queries)
    for name in names:
        if name not in CHECKS:
            raise InputError(f"check {name!r} does not exist; give some of {', '.join(CHECKS)}.")
    torch.set_num_threads(1)  # processes are forked, and the threads of OpenMP are not
    outcomes = {}
    for name in names:
        outcomes[name] = run_check(name, sizes, seed)
        write(output, outcomes)
    typer.echo(f"\n{table(outcomes)}")
    if not all(outcome["passed"] for outcome in outcomes.values()):
        raise typer.Exit(1)


def run_check(name: str, sizes: Sizes, seed: int) -> dict[str, Any]:
    """Run a check in a folder of its own, with no cache but its own; say how it ended.

    Returns:
        The outcome with the command, date, versions and machine, as JSON.
    """
    typer.echo(f"{name} ...", err=True)
    start = time.perf_counter()
    before = os.environ.get("XDG_CACHE_HOME")
    with tempfile.TemporaryDirectory(prefix="routehead-trust-") as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        try:
            outcome = CHECKS[name](Path(folder), sizes, seed)
        finally:
            os.environ.pop("XDG_CACHE_HOME")
            if before is not None:
                os.environ["XDG_CACHE_HOME"] = before
    seconds = round(time.perf_counter() - start)
    result = "passed" if outcome.passed else "FAILED"
    typer.echo(f"{name}: {result} in {seconds} s: {outcome.summary}", err=True)
    options = {key: value for key, value in vars(sizes).items() if value != getattr(Sizes, key)}
    command = command_line("benchmarks.trust", [name], options | {"seed": seed})
    about = {"command": command, **provenance(), "machine": machine(), "seconds": seconds}
    return about | outcome.to_dict()


def write(path: Path, outcomes: dict[str, dict[str, Any]]) -> None:
    """Write outcomes into a file, in the order of all checks; those of other checks stay."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))["checks"]
    except FileNotFoundError:
        stored = {}
    merged = stored | outcomes
    ordered = {name: merged[name] for name in CHECKS if name in merged}
    command = command_line("benchmarks.trust", [], {})
    atomic_write_text(path, results_json(command, {}, {"checks": ordered}))
