"""How dataclasses become command-line options."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from routehead_plugins.cli import app
from routehead_plugins.cli.options import HEADS, LLM, PROMPT, SINGLE, with_options
from routehead_plugins.options import RerankerOptions

LOADING = {"model", "adapter", "revision", "trust_remote_code", "device", "dtype"}
LONG = {"long_documents", "chunk_tokens", "chunk_stride", "chunk_aggregation", "on_too_long"}
READING = {"max_doc_tokens", "layout", "window", "stride"}
SCORING = {"first_stage_weight", "document_cache", "refine", "drop_query_copies"}
KEPT = {"documents"}


@dataclass(frozen=True)
class Arguments:
    """Options of a command of its own."""

    name: Annotated[str, "A name."]
    count: Annotated[int, typer.Option(min=1, help="How many.")] = 3
    folders: Annotated[list[str] | None, "Folders.  [default: none]"] = None


def call(
    *arguments: str, names: tuple[str, ...] = (), **defaults: object
) -> tuple[str, list[tuple[Arguments, RerankerOptions]]]:
    """Call a command that only records what it gets."""
    calls = []

    @with_options(*names, **defaults)
    def command(arguments: Arguments, options: RerankerOptions) -> None:
        """Do something."""
        calls.append((arguments, options))

    single = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    single.command()(command)
    result = CliRunner().invoke(single, list(arguments), color=False)
    return " ".join(result.output.replace("│", " ").split()), calls


def test_options_fill_both_dataclasses() -> None:
    given = ["--name", "x", "--folders", "a", "--folders", "b", "--device", "cpu", "--window", "4"]
    _, calls = call(*given, names=("device", "window"))
    assert calls == [
        (Arguments("x", folders=["a", "b"]), RerankerOptions(device="cpu", window=4)),
    ]


def test_options_that_are_left_out_have_the_defaults_of_the_dataclasses() -> None:
    _, calls = call("--name", "x", names=tuple(LLM))
    assert calls == [(Arguments("x"), RerankerOptions())]


def test_a_command_has_defaults_of_its_own() -> None:
    output, _ = call("--help", names=("layout", "stride"), layout="parallel")
    assert "[default: parallel]" in output
    assert "[default: the one" not in output
    assert "[default: half a window]" in output
    _, calls = call("--name", "x", names=("layout",), layout="parallel")
    assert calls[0][1] == RerankerOptions(layout="parallel")


def test_wrong_options_are_refused_by_typer() -> None:
    assert "Missing option '--name'" in call()[0]
    assert "Invalid value for '--count'" in call("--name", "x", "--count", "0")[0]
    assert "No such option" in call("--name", "x", "--device", "cpu")[0]


def test_every_option_of_the_table_is_a_field_of_the_core() -> None:
    fields = {field.name for field in dataclasses.fields(RerankerOptions)}
    table = [*HEADS, *LLM, *PROMPT, *SINGLE]
    assert len(table) == len(set(table))
    # Those of the Hub come from its own environment; others are objects of Python.
    assert fields - set(table) == {"local_files_only", "token", "cache_dir", "model_kwargs"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("demo", LOADING | {"heads", "router"}),
        (
            "rerank",
            LOADING | READING | SCORING | KEPT | LONG | {"heads", "router"},
        ),
        ("index", LOADING | {"heads", "router", "max_doc_tokens", "on_too_long"}),
        ("detect", LOADING | READING),
        ("train", LOADING | READING | {"document_cache"}),
        ("evaluate", LOADING | READING | SCORING),
        ("inspect", LOADING),
    ],
)
def test_commands_have_the_options_of_the_llm_that_they_need(name: str, expected: set[str]) -> None:
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    given = {parameter.name for parameter in command.params}
    known = {field.name for field in dataclasses.fields(RerankerOptions)}
    # The router that is inspected is an argument of its own.
    assert given & known - ({"router"} if name == "inspect" else set()) == expected
