"""The `routehead` command."""

from routehead_plugins.cli.main import app, main

__all__ = ["app", "main"]
