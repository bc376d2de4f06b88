"""The `routehead` command: the typer app and its entry point.

Command modules import torch and transformers only when a command runs, so that help is fast.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from routehead_plugins import __version__
from routehead_plugins.cli.align import align
from routehead_plugins.cli.cache import cache
from routehead_plugins.cli.demo import demo
from routehead_plugins.cli.detect import detect
from routehead_plugins.cli.evaluate import evaluate
from routehead_plugins.cli.exits import EXIT_STATUSES, StoppedError, exit_status, prepare_streams
from routehead_plugins.cli.index import index
from routehead_plugins.cli.inspect import inspect
from routehead_plugins.cli.rerank import rerank
from routehead_plugins.cli.train import train


class _Commands(TyperGroup):
    """The commands; Ctrl-C is passed on as ``StoppedError``, since Typer would drop its message."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise StoppedError(str(error)) from error


app = typer.Typer(
    name="routehead",
    cls=_Commands,
    help="Re-rank documents with the attention heads of a frozen LLM.",
    epilog=EXIT_STATUSES,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"routehead {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


for _command in (demo, rerank, index, evaluate, detect, train, align, inspect, cache):
    app.command()(_command)


def main() -> None:
    """Run the command line; trouble ends in one line and a status of ``EXIT_STATUSES``."""
    prepare_streams()
    sys.exit(exit_status(app))
