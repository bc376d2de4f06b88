"""Nothing but a name on the Hub needs the network, and importing leaves no trace on the disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import families
import pytest
from no_network import FORBIDDEN

LOADS = """
import sys
from functools import partial
from routehead_plugins import FrozenLM, HeadRouter
from routehead_plugins.backbone import load_tokenizer
from routehead_plugins.errors import ModelLoadError
from routehead_plugins.selection import as_selector, published_names

folder, router = sys.argv[1:]
options = {"dtype": "float32", "device": "cpu"}

def refused(load, name, flag=True):
    try:
        load(name, local_files_only=flag)
    except ModelLoadError as error:
        print(error)
    else:
        raise SystemExit(f"{name} was loaded")

# First of all, before the Hub's client could remember anything.
FrozenLM.from_pretrained("someone/tiny", local_files_only=True, **options)
load_tokenizer("someone/tiny", local_files_only=True)
for flag in (True, False):
    FrozenLM.from_pretrained(folder, local_files_only=flag, **options)
    HeadRouter.from_pretrained(router, local_files_only=flag)
FrozenLM.from_pretrained("embedded", layers=lambda _: 1, **options)
load_llm = partial(FrozenLM.from_pretrained, **options)  # "auto" is remembered on the disk
for load in (load_llm, load_tokenizer, HeadRouter.from_pretrained):
    refused(load, "someone/missing")
    refused(load, "missing")
as_selector(published_names()[0])
raise SystemExit("\\n".join(attempts) or 0)
"""

IMPORTS = """
import importlib, pkgutil, sys
import routehead_plugins, routehead_plugins.adapters
from routehead_plugins.errors import MissingExtraError

for package in (routehead_plugins, routehead_plugins.adapters):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if module.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(module.name)
        except MissingExtraError:
            pass
from typer.testing import CliRunner
from routehead_plugins.cli.main import app
assert CliRunner().invoke(app, ["--help"]).exit_code == 0
raise SystemExit("\\n".join(attempts) or 0)
"""


def run(code: str, *arguments: str, home: Path, **variables: str) -> str:
    """Run code in a new process without the network, in an empty home; return what it prints."""
    dropped = ("HF_", "XDG_", "TRANSFORMERS_")
    kept = {name: os.environ[name] for name in os.environ if not name.startswith(dropped)}
    process = subprocess.run(
        [sys.executable, "-c", FORBIDDEN + code, *arguments],
        env=kept | {"HOME": str(home), "USERPROFILE": str(home)} | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    families.tiny_model("llama").save_pretrained(folder)
    families.tiny_tokenizer().save_pretrained(folder)
    return folder


def test_local_files_are_loaded_without_a_look_at_the_network(folder: Path, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    router = next((Path(__file__).parents[2] / "routehead_plugins/assets/routers").iterdir())
    home = tmp_path / "home"
    home.mkdir()
    printed = run(LOADS, str(folder), str(router), home=home, HF_HUB_CACHE=str(tmp_path / "hub"))
    lines = printed.splitlines()
    assert len(lines) == 6
    assert all("missing" in line and len(line) < 300 for line in lines)
    kept = {path.relative_to(home).parts[:3] for path in home.rglob("*") if path.is_file()}
    assert kept <= {(".cache", "routehead", "gguf"), (".cache", "routehead", "dtype")}


def test_imports_and_help_touch_neither_the_network_nor_the_home_folder(tmp_path: Path) -> None:
    run(IMPORTS, home=tmp_path)
    assert list(tmp_path.iterdir()) == []
