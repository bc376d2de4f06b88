"""mkdocs hook: write the reference of the command line into cli.md while the site is built."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

REFERENCE = "<!-- reference of the command line -->"
"""Stands in a page where the reference goes."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marker by what Typer says of every command.

    Args:
        markdown: Text of the page.

    Returns:
        The text with the reference.
    """
    return markdown.replace(REFERENCE, reference()) if REFERENCE in markdown else markdown


def reference() -> str:
    """Describe every command and its options in Markdown, one heading for each command."""
    command = [sys.executable, "-m", "typer", "routehead_plugins.cli.main", "utils", "docs"]
    done = subprocess.run(
        [*command, "--name", "routehead"], capture_output=True, text=True, check=True
    )
    # The page has a title of its own.
    return done.stdout.partition("\n")[2]
