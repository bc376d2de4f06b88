"""The `routehead` program: help, version, and how errors end it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from routehead_plugins import __version__
from routehead_plugins.cli import app


def test_help_comes_at_once_and_loads_no_torch() -> None:
    script = (
        "import sys; from routehead_plugins.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'jnius', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().endswith("[]")
    for name in ("demo", "rerank", "index", "evaluate", "detect", "train", "inspect"):
        assert name in done.stdout


@pytest.mark.parametrize(
    "name", ["demo", "rerank", "index", "evaluate", "detect", "train", "inspect"]
)
def test_every_command_explains_itself(name: str) -> None:
    result = CliRunner().invoke(app, [name, "--help"], terminal_width=200, color=False)
    assert result.exit_code == 0
    assert "--model" in result.output


def test_the_version_is_printed() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"routehead {__version__}\n"


def test_the_program_prints_one_line_and_ends_with_status_two(tmp_path: Path) -> None:
    script = (
        "import sys; from routehead_plugins.cli.main import main; sys.argv[0] = 'routehead'; main()"
    )
    command_line = [sys.executable, "-c", script, "rerank", "--output", str(tmp_path / "x.trec")]
    done = subprocess.run(command_line, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "routehead: there are no queries; give --topics, or --requests.\n"
