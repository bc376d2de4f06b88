"""A router's files, in a folder or on the Hub: ``config.json``, ``model.safetensors``, a card."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from routehead_plugins.data import check_flag
from routehead_plugins.errors import InputError, ModelLoadError, class_name, short_repr
from routehead_plugins.files import (
    atomic_write_folder,
    encode_json,
    encode_text,
    open_input,
    parse_json,
    reason,
    show_path,
)

CONFIG_FILE, TENSORS_FILE, CARD_FILE = "config.json", "model.safetensors", "README.md"
_FORMAT, _VERSION = "routehead-router", 1
_HALF = ("anchors",)  # by far the largest tensor; ``QuerySpace.fit`` rounds it already


class RouterFiles(ModelHubMixin):
    """The contents of a router's files: settings, tensors, and the text of a model card, if any.

    ``push_to_hub`` is the mixin's. Saving and loading are not: the mixin's save adds a card where
    none is given, and an upload would overwrite the card on the Hub with it; its load fetches one
    file at a time, possibly from two commits, and logs a warning before an error.
    """

    def __init__(
        self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], card: str | None = None
    ) -> None:
        self.config, self.tensors, self.card = config, tensors, card
        header = {"format": _FORMAT, "version": _VERSION}
        name = "the router's description"
        text = encode_json(
            header | dict(config), name, indent=1, ensure_ascii=False, allow_nan=False
        )
        self._text = text + "\n"

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Write all files or none; ``config.json``, which makes the folder a router, comes last."""
        folder, content = Path(save_directory), _packed(self.tensors)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"the router cannot be written to {_shown(folder)} ({reason(error)}); name another "
                "folder."
            ) from error
        texts = {CONFIG_FILE: self._text}
        if self.card is not None:
            texts[CARD_FILE] = self.card
        files = {name: encode_text(folder / name, text) for name, text in texts.items()}
        files[TENSORS_FILE] = content
        atomic_write_folder(folder, files, CONFIG_FILE)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, **options: Any
    ) -> RouterFiles:
        """Read the configuration and the tensors; options are those of ``snapshot_download``."""
        name = pretrained_model_name_or_path
        folder = _find_folder(name, options)
        try:
            config: Any = parse_json(_content(folder / CONFIG_FILE).decode("utf-8-sig"))
            tensors = load(_content(folder / TENSORS_FILE))
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelLoadError(unreadable(name, error)) from error
        if not isinstance(config, dict) or config.get("format") != _FORMAT:
            raise ModelLoadError(
                f"{_shown(name)} is not a router's folder: {CONFIG_FILE} lacks "
                f'"format": "{_FORMAT}"; give what `routehead train` wrote.'
            )
        if config.get("version") != _VERSION:
            raise ModelLoadError(
                f"the router {_shown(name)} has version {short_repr(config.get('version'))}; this "
                f"release reads version {_VERSION}: upgrade routehead-plugins."
            )
        if not isinstance(config.get("description"), dict | None):
            raise ModelLoadError(unreadable(name, TypeError("its description is not an object")))
        return cls(config, tensors)


def router_size(name: str) -> int:
    """Return the size of a router's tensors in bytes.

    Args:
        name: A folder, or the id of a repository that is in the Hub's cache.

    Raises:
        ModelLoadError: There is no such router.
    """
    folder = _find_folder(name, {"local_files_only": True})
    try:
        return (folder / TENSORS_FILE).stat().st_size
    except OSError as error:
        raise ModelLoadError(unreadable(name, error)) from error


def unreadable(name: str | Path, error: Exception) -> str:
    """Return the message for a router whose files cannot be used."""
    why = f"{type(error).__name__}: {reason(error)}"
    if isinstance(error, KeyError):
        why = f"{CONFIG_FILE} or {TENSORS_FILE} lacks {error}"
    return f"the router {_shown(name)} cannot be read ({why}); train it again, or fetch it again."


def _shown(name: str | Path) -> str:
    return repr(show_path(name, 80))


def _content(path: Path) -> bytes:
    with open_input(path) as stream:
        return stream.read()


def fingerprint(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Compute a short hash of everything that would be written."""
    text = json.dumps(config, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode() + _packed(tensors)).hexdigest()[:12]


def check_shapes(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, str], sizes: Mapping[str, int]
) -> None:
    """Check tensors against the names of their axes, such as ``"heads d"``; none may be empty.

    A size that is missing is taken from the first tensor that has the axis.

    Raises:
        InputError: The shapes do not match.
    """
    sizes = dict(sizes)
    for name, axes in ((name, axes.split()) for name, axes in shapes.items()):
        shape = tuple(tensors[name].shape)
        expected = tuple(sizes.get(axis) for axis in axes)
        fits = len(shape) == len(axes) and 0 not in shape
        if not fits or any(sizes.setdefault(a, n) != n for a, n in zip(axes, shape, strict=True)):
            wanted = ", ".join(f"{a}={n or 'any'}" for a, n in zip(axes, expected, strict=True))
            raise InputError(
                f"the router's {name} has shape {shape}; expected ({wanted}), none of them 0."
            )


def _packed(tensors: Mapping[str, Tensor]) -> bytes:
    packed = {}
    for name, tensor in tensors.items():
        rounded = tensor.half() if name in _HALF else tensor.float()
        # Cloned, as safetensors refuses transposed tensors and saves the storage behind a slice.
        packed[name] = rounded.clone(memory_format=torch.contiguous_format)
    return save(packed)


def _find_folder(name: str | Path, options: Mapping[str, Any]) -> Path:
    """Return a router's folder, in the Hub's cache if the name is a repository's id."""
    if not isinstance(name, str | Path):
        raise InputError(
            f"router={short_repr(name)} is a {class_name(name)}; give a router, its folder, or its "
            "id on the Hub."
        )
    check_flag("local_files_only", options.get("local_files_only", False))
    path = Path(name)
    with suppress(OSError, ValueError):  # longer than any path, or with a zero in it
        if path.is_dir() and name:
            return path
        if isinstance(name, str) and name.count("/") == 1 and not path.exists():
            return _fetched(name, options)
    raise ModelLoadError(
        f"router={_shown(name)} is not a folder; give the one that `routehead train` wrote, or "
        "the id of a repository on the Hub."
    )


def _fetched(name: str, options: Mapping[str, Any]) -> Path:
    patterns = [CONFIG_FILE, TENSORS_FILE, CARD_FILE]
    # Which errors a broken connection raises depends on the release of the Hub's client.
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, **options))
    except Exception as error:
        raise ModelLoadError(
            f"router={_shown(name)} is not a folder and cannot be fetched from the Hub "
            f"({reason(error)}); check the name, or give the folder that `routehead train` "
            "wrote."
        ) from error
