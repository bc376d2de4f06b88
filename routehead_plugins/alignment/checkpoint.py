"""State of an interrupted run on disk: one file, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from routehead_plugins.errors import InputError, short_repr
from routehead_plugins.files import (
    StrPath,
    atomic_write_bytes,
    make_folder,
    open_input,
    open_locked,
    parse_json,
    reason,
    show_path,
)

_FILE, _LOCK = "state.safetensors", "state.lock"
_FORMAT, _VERSION = "routehead-alignment", 1


@dataclass(frozen=True)
class State:
    """What a run resumes from.

    Attributes:
        tensors: Parameters, the optimizer's state and the best parameters so far.
        progress: Other values, as JSON holds them.
    """

    tensors: Mapping[str, Tensor]
    progress: Mapping[str, Any]


class Checkpoint:
    """The folder of a run's state, locked for one process; see ``open_checkpoint``."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Use a folder.

        Args:
            folder: An existing folder.
            settings: All that the run depends on, as JSON holds it.
        """
        self._path = folder / _FILE
        self._settings = json.loads(json.dumps(settings))

    def read(self) -> State | None:
        """Read the state; ``None`` if there is none.

        Raises:
            InputError: It is damaged, or belongs to a run with other settings.
        """
        if not self._path.exists():
            return None
        try:
            settings, state = _content(self._path)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise InputError(
                f"{show_path(self._path)} cannot be resumed from ({reason(error)}); delete it to "
                "start anew."
            ) from error
        self._check(settings)
        return state

    def write(self, state: State) -> None:
        """Replace the state.

        Raises:
            InputError: The file cannot be written.
        """
        metadata = {
            "format": f"{_FORMAT} {_VERSION}",
            "settings": json.dumps(self._settings),
            "progress": json.dumps(state.progress),
        }
        # Cloned, as safetensors refuses tensors that share their memory.
        tensors = {name: tensor.cpu().clone() for name, tensor in state.tensors.items()}
        atomic_write_bytes(self._path, save(tensors, metadata))

    def _check(self, settings: Any) -> None:
        """Check that the run on disk had the same settings.

        Raises:
            InputError: It had not; the message names the first that differs.
        """
        own = self._settings
        theirs = settings if isinstance(settings, dict) else {}
        for name in sorted({*own, *theirs}):
            if own.get(name) != theirs.get(name):
                raise InputError(
                    f"{show_path(self._path)} is of a run with {name}="
                    f"{short_repr(theirs.get(name))}, this one has {short_repr(own.get(name))}; "
                    "repeat that run's settings, or delete the file to start anew."
                )


def _content(path: Path) -> tuple[Any, State]:
    """Read settings and state."""
    with safe_open(path, framework="pt") as stream:
        metadata = stream.metadata() or {}
    if metadata.get("format") != f"{_FORMAT} {_VERSION}":
        raise ValueError("it is not one of this release")
    with open_input(path) as file:
        tensors = load(file.read())
    return parse_json(metadata["settings"]), State(tensors, parse_json(metadata["progress"]))


@contextmanager
def open_checkpoint(folder: StrPath, settings: Mapping[str, Any]) -> Iterator[Checkpoint]:
    """Lock a folder for a run's state.

    Args:
        folder: The folder; it is made if it is missing.
        settings: All that the run depends on, as JSON holds it.

    Yields:
        The run's state on disk.

    Raises:
        InputError: The folder cannot be used, or another process uses it.
    """
    path = make_folder(folder, "the state of a training run")
    try:
        descriptor = open_locked(path / _LOCK)
    except BlockingIOError as error:
        raise InputError(
            f"'{show_path(path)}' is used by another process; wait for it, or name another folder."
        ) from error
    except OSError as error:
        raise InputError(
            f"'{show_path(path)}' cannot be locked ({reason(error)}); name another folder."
        ) from error
    try:
        yield Checkpoint(path, settings)
    finally:
        os.close(descriptor)
