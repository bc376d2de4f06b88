"""The `routehead` command."""

from routehead_plugins.cli.main import app

__all__ = ["app"]
