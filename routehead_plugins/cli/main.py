"""The `routehead` command: the typer app and its entry point.

Command modules import torch and transformers only when a command runs, so that help is fast.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from routehead_plugins import __version__
from routehead_plugins.cli.demo import demo
from routehead_plugins.cli.detect import detect
from routehead_plugins.cli.evaluate import evaluate
from routehead_plugins.cli.inspect import inspect
from routehead_plugins.cli.rerank import rerank
from routehead_plugins.cli.train import train
from routehead_plugins.errors import RouteHeadError

app = typer.Typer(
    name="routehead",
    help="Re-rank documents with the attention heads of a frozen LLM.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
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


for _command in (demo, rerank, evaluate, detect, train, inspect):
    app.command()(_command)


def main() -> None:
    """Run the command line; errors in the arguments end in one line and status 2."""
    try:
        app()
    except RouteHeadError as error:
        typer.secho(f"routehead: {error}", fg="red", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.secho("routehead: stopped; run the same command again to resume.", err=True)
        sys.exit(130)
