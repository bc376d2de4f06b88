"""What the project promises about itself: what an import costs, and who imports whom."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest

import routehead_plugins

ROOT = Path(__file__).parents[1]
CORE = sorted((ROOT / "routehead_plugins").glob("*.py"))
ADAPTERS = sorted((ROOT / "adapters").glob("*.py"))
EVERYTHING = [*CORE, *(ROOT / "routehead_plugins" / "commands").glob("*.py"), *ADAPTERS]
HEAVY = {"torch", "transformers", "jnius", "pyserini", "llama_index", "langchain_core", "scipy"}


def loaded_by(statement: str) -> set[str]:
    """Names of heavy packages that a statement loads in a fresh interpreter."""
    script = f"import sys\n{statement}\nprint(*sys.modules, sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return HEAVY & {name.partition(".")[0] for name in done.stdout.split()}


def imports_of(path: Path) -> set[str]:
    """Full names of the modules a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
    return names


@pytest.mark.parametrize(
    "module",
    [
        "routehead_plugins",
        "routehead_plugins.cli",
        "routehead_plugins.errors",
        "routehead_plugins.adapters",
        "routehead_plugins.adapters.pyserini",
    ],
)
def test_importing_a_light_module_loads_nothing_heavy(module: str) -> None:
    assert loaded_by(f"import {module}") == set()


def test_the_check_of_imports_can_fail() -> None:
    assert "torch" in loaded_by("import routehead_plugins; routehead_plugins.FrozenLM")


def test_importing_everything_patches_nothing_in_transformers() -> None:
    script = (
        "import transformers.modeling_utils as m\n"
        "before = dict(m.ALL_ATTENTION_FUNCTIONS._global_mapping)\n"
        "import routehead_plugins.reranker, routehead_plugins.backbone.attention\n"
        "assert dict(m.ALL_ATTENTION_FUNCTIONS._global_mapping) == before"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_public_name_exists() -> None:
    for name in routehead_plugins.__all__:
        assert getattr(routehead_plugins, name) is not None
    assert set(dir(routehead_plugins)) == set(routehead_plugins.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Rerank'"):
        _ = routehead_plugins.Rerank


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.stem)
def test_the_core_imports_no_framework_and_no_adapter(path: Path) -> None:
    outside = {
        "routehead_plugins.adapters",
        "adapters",
        "llama_index",
        "langchain_core",
        "pyserini",
    }
    imported = imports_of(path)
    assert not {name for name in imported if any(f"{name}.".startswith(f"{o}.") for o in outside)}
    if path.stem not in ("cli", "_training_cli"):
        assert not {name for name in imported if name.startswith("routehead_plugins.commands")}


def test_only_the_tap_and_the_cache_touch_the_insides_of_models() -> None:
    inside = {
        "transformers.modeling_utils",
        "transformers.masking_utils",
        "transformers.cache_utils",
    }
    touching = {path.name for path in EVERYTHING if imports_of(path) & inside}
    assert touching == {"attention.py", "cache.py"}


@pytest.mark.parametrize("path", EVERYTHING, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_modules_and_functions_keep_their_size(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= 350
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
            statements = node.body[1:] if ast.get_docstring(node) else node.body
            first = statements[0].lineno if statements else node.end_lineno
            assert node.end_lineno - first < 50, node.name


def test_every_extra_that_an_error_names_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = set()
    for path in EVERYTHING:
        source = path.read_text()
        named |= set(re.findall(r'"routehead-plugins\[([\w-]+)\]"', source))
        named |= set(re.findall(r'missing_extra\(\w+(?:\([^)]*\))?, "([\w-]+)"\)', source))
    assert {"embedded", "pyserini"} <= named
    assert named <= set(project["optional-dependencies"])


def test_every_pinned_version_satisfies_what_the_project_asks_for() -> None:
    from packaging.requirements import Requirement

    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    pins = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = chain(project["dependencies"], *project["optional-dependencies"].values())
    for requirement in map(Requirement, asked):
        if requirement.name != "routehead-plugins":
            name = re.sub(r"[-_.]+", "-", requirement.name).lower()
            assert requirement.specifier.contains(pins[name]), requirement
