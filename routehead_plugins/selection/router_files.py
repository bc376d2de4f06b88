"""A router's folder, ``config.json`` and ``model.safetensors``, on disk and on the Hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from routehead_plugins.errors import InputError, ModelLoadError
from routehead_plugins.io import atomic_write_bytes, atomic_write_text

CONFIG_FILE, TENSORS_FILE, CARD_FILE = "config.json", "model.safetensors", "README.md"
_FORMAT, _VERSION = "routehead-router", 1
_HALF = ("anchors",)  # by far the largest; ``QuerySpace.fit`` rounds them already


def write_folder(
    folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], card: str | None
) -> None:
    """Write all files; the configuration comes last, without which it is no router.

    Raises:
        InputError: The folder cannot be written, or the configuration is not JSON.
    """
    path = Path(folder)
    header = {"format": _FORMAT, "version": _VERSION}
    # What is there is only touched once nothing but the disk can fail.
    try:
        text = json.dumps(header | dict(config), indent=1, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"the router's description is not JSON ({error}); describe it by texts and numbers."
        ) from error
    content = _packed(tensors)
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / CONFIG_FILE).unlink(missing_ok=True)
        if card is not None:
            atomic_write_text(path / CARD_FILE, card)
        atomic_write_bytes(path / TENSORS_FILE, content)
        atomic_write_text(path / CONFIG_FILE, text + "\n")
    except OSError as error:
        raise InputError(
            f"the router cannot be written to {str(folder)!r} ({error}); name another folder."
        ) from error


def digest(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Tell one router from another, by all that would be written."""
    text = json.dumps(config, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode() + _packed(tensors)).hexdigest()[:12]


def _packed(tensors: Mapping[str, Tensor]) -> bytes:
    # Slices of larger tensors would carry those along, and transposed ones are refused.
    whole = {
        name: tensor.to(torch.float16 if name in _HALF else torch.float32).clone(
            memory_format=torch.contiguous_format
        )
        for name, tensor in tensors.items()
    }
    return save(whole)


def read_folder(
    name: str | Path, *, local_files_only: bool = False
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the configuration and the tensors.

    Raises:
        ModelLoadError: There is no such router, it is of another version, or files are damaged.
    """
    folder = locate(name, local_files_only=local_files_only)
    try:
        config: Any = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = load((folder / TENSORS_FILE).read_bytes())
    except (OSError, ValueError, SafetensorError) as error:
        raise damaged(name, error) from error
    if not isinstance(config, dict) or config.get("format") != _FORMAT:
        raise ModelLoadError(
            f"{str(name)!r} is not a router's folder: {CONFIG_FILE} lacks "
            f'"format": "{_FORMAT}"; give what `routehead train` wrote.'
        )
    if config.get("version") != _VERSION:
        raise ModelLoadError(
            f"the router {str(name)!r} has version {config.get('version')!r}; this release reads "
            f"version {_VERSION}: upgrade routehead-plugins."
        )
    if not isinstance(config.get("description"), dict | None):
        raise damaged(name, TypeError("its description is not an object"))
    return config, tensors


def check_shapes(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, str], sizes: Mapping[str, int]
) -> None:
    """Refuse tensors that do not fit each other.

    Args:
        tensors: By their names.
        shapes: Names of each one's axes, such as ``"heads d"``.
        sizes: Of axes. One that is not given is as long as in the first tensor that has it.

    Raises:
        InputError: A tensor is of another shape, or empty.
    """
    known = dict(sizes)
    for name, axes in ((name, axes.split()) for name, axes in shapes.items()):
        shape = tuple(tensors[name].shape)
        expected = tuple(known.get(axis) for axis in axes)
        fits = len(shape) == len(axes) and 0 not in shape
        if not fits or any(known.setdefault(a, n) != n for a, n in zip(axes, shape, strict=True)):
            wanted = ", ".join(f"{a}={n or 'any'}" for a, n in zip(axes, expected, strict=True))
            raise InputError(
                f"the router's {name} has shape {shape}; expected ({wanted}), none of them 0."
            )


def check_count(name: str, value: object) -> None:
    """Accept a whole number from 1 on.

    Raises:
        InputError: It is something else.
    """
    if not isinstance(value, int) or value < 1:
        raise InputError(f"{name}={value!r} is not a count; give 1 or more.")


def damaged(name: str | Path, error: Exception) -> ModelLoadError:
    """Say that a router's files cannot be used."""
    lacks = f"{CONFIG_FILE} or {TENSORS_FILE} lacks {error}"
    line = lacks if isinstance(error, KeyError) else f"{type(error).__name__}: {_line(error)}"
    return ModelLoadError(
        f"the router {str(name)!r} cannot be read ({line}); train it again, or fetch it again."
    )


def push_folder(folder: str | Path, repo_id: str, *, private: bool) -> str:
    """Upload a folder to the Hub, and give the address of the commit.

    Raises:
        InputError: The Hub cannot be reached, or refuses.
    """
    hub = HfApi(library_name="routehead-plugins")
    # Each release of the Hub's client has its own kinds of errors for lines that are down.
    try:
        hub.create_repo(repo_id, private=private, exist_ok=True)
        return str(hub.upload_folder(repo_id=repo_id, folder_path=folder))
    except Exception as error:
        raise InputError(
            f"the router cannot be uploaded to {repo_id!r} ({_line(error)}); check the name, the "
            "network, and that you are logged in (hf auth login)."
        ) from error


def _line(error: Exception) -> str:
    """The first line of an error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def locate(name: str | Path, *, local_files_only: bool = False) -> Path:
    """Find a router's folder, in the Hub's cache where it comes from there.

    Raises:
        ModelLoadError: There is no such router.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if not isinstance(name, str) or name.count("/") != 1 or path.exists():
        raise ModelLoadError(
            f"router={str(name)!r} is not a folder; give the one that `routehead train` wrote, or "
            "the id of a repository on the Hub."
        )
    try:
        patterns = [CONFIG_FILE, TENSORS_FILE, CARD_FILE]
        return Path(
            snapshot_download(name, allow_patterns=patterns, local_files_only=local_files_only)
        )
    except Exception as error:  # likewise
        raise ModelLoadError(
            f"router={name!r} is neither a folder nor to be had from the Hub ({_line(error)}); "
            "check the name, or give the folder that `routehead train` wrote."
        ) from error
