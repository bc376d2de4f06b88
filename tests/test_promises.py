"""What the project promises about itself: rooms, arrows, sizes, docstrings, and import costs."""

from __future__ import annotations

import ast
import builtins
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from itertools import chain
from pathlib import Path

import pytest

import routehead_plugins
from routehead_plugins import errors

ROOT = Path(__file__).parents[1]
PACKAGE = "routehead_plugins"
CORE = sorted((ROOT / PACKAGE).rglob("*.py"))
ADAPTERS = sorted((ROOT / "adapters").glob("*.py"))
OUTSIDE = sorted([*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "examples").glob("*.py")])
HEAVY = {"torch", "transformers", "jnius", "pyserini", "llama_index", "langchain_core", "scipy"}

# Importer -> what it may import: rooms by their face, and modules of the top level.
BELOW = {"heads", "data", "errors"}
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "files": {"errors"},
    "heads": {"errors", "files"},
    "data": {"errors", "heads"},
    "options": BELOW,
    "io": {"data", "errors", "files"},
    "evaluation": {"io", "data", "errors"},
    "backbone": {"files", "options"} | BELOW,
    "scoring": BELOW,
    "layouts": {"backbone", "scoring", "options"} | BELOW,
    "selection": {"backbone", "files", "io", "options"} | BELOW,
    "signals": {"layouts", "scoring", "backbone", "files", "io"} | BELOW,
    "alignment": {"backbone", "layouts", "scoring", "signals", "selection", "files"} | BELOW,
    "training": {"signals", "scoring", "selection", "io"} | BELOW,  # never runs the LLM
    "index": {"layouts", "scoring", "backbone", "files", "options"} | BELOW,
    "cross_encoder": {"data", "errors"},
    "reranker": {"cross_encoder", "index", "layouts", "scoring", "selection", "backbone", "options"}
    | BELOW,
    "__init__": {"reranker", "index", "selection", "backbone"} | BELOW,
}
ROOMS = {path.parent.name for path in CORE if path.parent != ROOT / PACKAGE}
# These see everything, and nobody imports them.
TOP = {"cli", "adapters"}
# The files that may touch the insides of transformers' models.
INSIDES = {"transformers.modeling_utils", "transformers.masking_utils", "transformers.cache_utils"}
# Words of an old dialect that are not to come back as names, see CONTRIBUTING; and where they stay.
DIALECT = {"found", "place", "places", "deal", "dealt", "taught", "turn", "opening", "written"}
OLD_NAMES = {
    "pseudo_labels.py": {"found"},  # a key in the files of routers
    "prompt.py": {"opening"},  # kept for code outside this project
}


def module_of(path: Path) -> str:
    """Dotted name of a file of the package, such as ``backbone.prompt``."""
    base = ROOT / PACKAGE if path.is_relative_to(ROOT / PACKAGE) else ROOT
    return ".".join(path.relative_to(base).with_suffix("").parts)


def home_of(path: Path) -> str:
    """Room of a file, or its own name at the top level."""
    return module_of(path).partition(".")[0]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(path: Path) -> set[tuple[str, str]]:
    """Absolute imports of a file, wherever in it: pairs of module and imported name, or ""."""
    pairs = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            pairs |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            pairs |= {(node.module or "", alias.name) for alias in node.names}
    return pairs


def own_imports(path: Path) -> Iterator[tuple[str, str]]:
    """Imports of our own modules, less the package's name; the package itself is ``""``."""
    for module, name in imports_of(path):
        if module == PACKAGE or module.startswith(f"{PACKAGE}."):
            yield module.removeprefix(PACKAGE).removeprefix("."), name


def faces_of(room: str) -> set[str]:
    """Names on a room's face."""
    for node in tree_of(ROOT / PACKAGE / room / "__init__.py").body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def functions_of(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", CORE, ids=named)
def test_imports_follow_the_arrows(path: Path) -> None:
    home = home_of(path)
    for module, name in own_imports(path):
        target = module.partition(".")[0] or name
        if module == "" and name == "__version__":
            continue
        assert target not in TOP or home == target or home in TOP, (module, name)
        if target != home and home not in TOP:
            assert target in ARROWS[home], f"{named(path)} imports {target}"


def test_the_arrows_make_no_circle() -> None:
    assert {*ARROWS} | TOP >= {home_of(path) for path in CORE}
    list(TopologicalSorter(ARROWS).static_order())  # raises CycleError


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_modules_of_a_room_make_no_circle(room: str) -> None:
    arrows: dict[str, set[str]] = {}
    for path in (ROOT / PACKAGE / room).glob("[!_]*.py"):
        # A room's own face imports all its modules.
        assert room not in {module for module, _ in own_imports(path)}, named(path)
        inside = {module for module, _ in own_imports(path) if module.startswith(f"{room}.")}
        arrows[module_of(path)] = inside
    list(TopologicalSorter(arrows).static_order())


def test_the_core_and_the_benchmarks_import_by_full_names() -> None:
    for path in [*CORE, *OUTSIDE]:
        for node in ast.walk(tree_of(path)):
            assert not (isinstance(node, ast.ImportFrom) and node.level), named(path)


def test_benchmarks_make_no_circle() -> None:
    arrows = {
        module_of(path): {module for module, _ in imports_of(path)}
        for path in (ROOT / "benchmarks").rglob("[!_]*.py")
    }
    list(TopologicalSorter(arrows).static_order())


def test_adapters_make_no_circle() -> None:
    arrows: dict[str, set[str]] = {}
    for path in (ROOT / "adapters").glob("*.py"):
        relative = [
            node
            for node in ast.walk(tree_of(path))
            if isinstance(node, ast.ImportFrom) and node.level == 1
        ]
        siblings = {node.module for node in relative if node.module}
        siblings |= {name.name for node in relative if not node.module for name in node.names}
        arrows[path.stem] = siblings
    list(TopologicalSorter(arrows).static_order())


@pytest.mark.parametrize("path", [*CORE, *ADAPTERS, *OUTSIDE], ids=named)
def test_a_room_is_entered_by_its_face(path: Path) -> None:
    home = home_of(path)
    for module, name in own_imports(path):
        room, _, inside = module.partition(".")
        if room in ROOMS and room != home:
            # Benchmarks share what the commands share.
            shared = path in OUTSIDE and module == "cli.runtime"
            assert shared or not inside, f"{named(path)} imports {module} past the face of {room}"
            assert shared or name in faces_of(room), f"{name} is not on the face of {room}"


def test_the_top_level_holds_eight_modules() -> None:
    modules = {path.name for path in (ROOT / PACKAGE).glob("*.py")}
    assert modules == {
        "__init__.py",
        "cross_encoder.py",
        "data.py",
        "errors.py",
        "files.py",
        "heads.py",
        "options.py",
        "reranker.py",
    }


def test_the_core_imports_no_framework() -> None:
    frameworks = {"adapters", "llama_index", "langchain_core", "pyserini", "jnius"}
    for path in CORE:
        packages = {module.partition(".")[0] for module, _ in imports_of(path)}
        assert not packages & frameworks, named(path)


def test_only_the_tap_and_the_cache_touch_the_insides_of_models() -> None:
    touching = {
        module_of(path)
        for path in [*CORE, *ADAPTERS]
        if {module for module, _ in imports_of(path)} & INSIDES
    }
    assert touching == {"backbone.attention", "backbone.kv_cache"}


def test_only_the_backbone_and_the_benchmarks_know_transformers() -> None:
    knowing = {
        home_of(path)
        for path in [*CORE, *ADAPTERS]
        if any(module.partition(".")[0] == "transformers" for module, _ in imports_of(path))
    }
    assert knowing == {"backbone"}


@pytest.mark.parametrize("path", [*CORE, *ADAPTERS, *OUTSIDE], ids=named)
def test_functions_keep_their_size(path: Path) -> None:
    for function in functions_of(path):
        arguments = function.args
        names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        assert (function.end_lineno or 0) - function.lineno < 60, function.name
        assert len(set(names) - {"self", "cls"}) <= 12, function.name


@pytest.mark.parametrize("path", [*CORE, *ADAPTERS], ids=named)
def test_names_are_plain_words(path: Path) -> None:
    names = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
    old = OLD_NAMES.get(path.name, set())
    assert not {name.strip("_") for name in names} & DIALECT - old


@cache
def error_makers() -> dict[str, str]:
    """Functions that make an error, by name: the class that they return."""
    classes = {name for name, value in vars(errors).items() if isinstance(value, type)}
    makers = {}
    for path in [*CORE, *ADAPTERS]:
        for function in functions_of(path):
            returned = "" if function.returns is None else ast.unparse(function.returns)
            if returned in classes:
                makers[function.name] = returned
    return makers


def raised_by(function: ast.AST) -> Iterator[str]:
    """Classes of the errors that a function raises itself, those made by a maker included."""
    makers = error_makers()
    for node in ast.walk(function):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = ast.unparse(node.exc.func).rpartition(".")[2]
            yield makers.get(name, name)


def test_docstrings_name_every_error_that_is_raised() -> None:
    """Ruff's DOC501 does not see through functions that make an error; this does."""
    assert error_makers()["missing_extra"] == "MissingExtraError"
    for path in [*CORE, *ADAPTERS]:
        for function in functions_of(path):
            docstring = ast.get_docstring(function) or ""
            if function.name.startswith("_") or "\n" not in docstring:
                continue
            for error in raised_by(function):
                if not error.startswith("_"):
                    assert f"{error}:" in docstring, (named(path), function.name, error)


def test_docstrings_name_only_errors_that_exist() -> None:
    known = {*vars(errors), *dir(builtins), "ValidationError"}
    for path in [*CORE, *ADAPTERS]:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                section = (ast.get_docstring(node) or "").partition("\nRaises:\n")[2]
                for name in re.findall(r"^    (\w+):", section.partition("\n\n")[0], re.MULTILINE):
                    assert name in known, (named(path), node.name, name)


def loaded_by(statement: str) -> set[str]:
    """Names of heavy packages that a statement loads in a fresh interpreter."""
    script = f"import sys\n{statement}\nprint(*sys.modules, sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return HEAVY & {name.partition(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize(
    "module",
    [
        "routehead_plugins",
        "routehead_plugins.cli",
        "routehead_plugins.cli.main",
        "routehead_plugins.errors",
        "routehead_plugins.evaluation",
        "routehead_plugins.io",
        "routehead_plugins.options",
        "routehead_plugins.adapters",
        "routehead_plugins.adapters.pyserini",
    ],
)
def test_importing_a_light_module_loads_nothing_heavy(module: str) -> None:
    assert loaded_by(f"import {module}") == set()


def test_the_check_of_imports_can_fail() -> None:
    assert "torch" in loaded_by("import routehead_plugins; routehead_plugins.FrozenLM")


def test_importing_everything_patches_nothing_in_transformers() -> None:
    modules = [module_of(path).removesuffix(".__init__") for path in CORE]
    everything = ", ".join(f"{PACKAGE}.{name}" for name in modules if name != "__init__")
    script = (
        "import transformers.modeling_utils as m\n"
        "before = dict(m.ALL_ATTENTION_FUNCTIONS._global_mapping)\n"
        f"import {everything}\n"
        "assert dict(m.ALL_ATTENTION_FUNCTIONS._global_mapping) == before"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_public_name_exists() -> None:
    for name in routehead_plugins.__all__:
        assert getattr(routehead_plugins, name) is not None
    assert set(dir(routehead_plugins)) == set(routehead_plugins.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Rerank'"):
        _ = routehead_plugins.Rerank


def test_every_extra_that_an_error_names_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set()
    for path in [*CORE, *ADAPTERS]:
        source = path.read_text()
        extras |= set(re.findall(r'"routehead-plugins\[([\w-]+)\]"', source))
        extras |= set(re.findall(r'missing_extra\(\w+(?:\([^)]*\))?, "([\w-]+)"\)', source))
    assert {"embedded", "pyserini"} <= extras
    assert extras <= set(project["optional-dependencies"])


def test_every_pinned_version_satisfies_what_the_project_asks_for() -> None:
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if "==" in line and not line.startswith("#")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = chain(project["dependencies"], *project["optional-dependencies"].values())
    for requirement in map(Requirement, required):
        if requirement.name != "routehead-plugins":
            name = _normal(requirement.name)
            # One version for each Python, where they differ.
            versions = [
                str(next(iter(pin.specifier)).version) for pin in pins if _normal(pin.name) == name
            ]
            assert versions, requirement
            assert all(requirement.specifier.contains(version) for version in versions), requirement


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
