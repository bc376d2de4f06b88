"""LoRA adapters (arXiv 2106.09685): files of the library peft, and their place in a view.

An adapter lives in a view of a model, never in the model itself: the view's modules are replaced,
the parameters that it shares with the model are neither changed nor marked.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from routehead_plugins.errors import (
    InputError,
    ModelLoadError,
    UnsupportedModelError,
    class_name,
    missing_extra,
    short_repr,
)
from routehead_plugins.files import (
    StrPath,
    atomic_write_folder,
    encode_json,
    encode_text,
    make_folder,
    open_input,
    parse_json,
    reason,
    show_path,
)
from routehead_plugins.heads import HeadSet

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
HEADS_FILE = "heads.json"
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
"""Names of the projections that an adapter changes by default."""

# The name under which peft files an adapter within a module.
_SLOT = "default"
# Digits of a fingerprint in a label.
_DIGITS = 12
# What peft puts before the names of parameters in files.
_PREFIX = "base_model.model."


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter.

    Attributes:
        name: Name under which records and messages mention it.
        config: Content of its ``adapter_config.json``.
        weights: Float32 tensors under the names of its ``adapter_model.safetensors``.
        heads: The heads that its folder says are to be read with it; ``None`` if it names none.
    """

    name: str
    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    heads: HeadSet | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Adapter):
            return NotImplemented
        return (self.name, self.fingerprint) == (other.name, other.fingerprint)

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @property
    def label(self) -> str:
        """Short name with the beginning of the fingerprint, for records and messages."""
        short = re.split(r"[/\\]", self.name.rstrip("/\\"))[-1]
        return f"{show_path(short, 40)}-{self.fingerprint[:_DIGITS]}"

    @cached_property
    def fingerprint(self) -> str:
        """Digest of all that changes what the LLM computes, for records on disk."""
        settings = {
            name: self.config.get(name)
            for name in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
        }
        digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
        for name in sorted(self.weights):
            digest.update(name.encode())
            content = self.weights[name].detach().float().cpu().contiguous()
            digest.update(content.numpy().tobytes())
        return digest.hexdigest()

    @classmethod
    def from_pretrained(
        cls,
        name: StrPath,
        *,
        local_files_only: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: StrPath | None = None,
    ) -> Adapter:
        """Load an adapter.

        Args:
            name: A folder as peft writes it, or an id on the Hub, to which all options apply.
            local_files_only: Whether to use only the local cache of the Hub, never the network.
            revision: Branch, tag or commit; ``None`` for the latest.
            token: Access token; ``None`` takes the one of ``hf auth login``, ``False`` none.
            cache_dir: Folder of the local cache; ``None`` for the usual one.

        Raises:
            InputError: The name is not a text.
            ModelLoadError: There is no such adapter, or it is not a plain LoRA adapter.
            HeadError: The head set in its folder is damaged.
        """
        hub = {"local_files_only": local_files_only, "revision": revision, "token": token}
        folder = _find_folder(name, {**hub, "cache_dir": cache_dir})
        try:
            config: Any = parse_json(_content(folder / CONFIG_FILE).decode("utf-8-sig"))
            weights = load(_content(folder / WEIGHTS_FILE))
            _check_kind(config, weights)
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelLoadError(
                f"the adapter {_shown(name)} cannot be read ({reason(error)}); train it again, or "
                "fetch it again."
            ) from error
        heads = HeadSet.load(folder / HEADS_FILE) if (folder / HEADS_FILE).is_file() else None
        weights = {key: tensor.float() for key, tensor in weights.items()}
        return cls(str(name), config, weights, heads)

    def files(self) -> dict[str, bytes]:
        """Return the content of the files of its folder: those of peft, and its heads."""
        text = encode_json(dict(self.config), "the adapter's settings", indent=2, sort_keys=True)
        tensors = {key: value.detach().float().cpu().clone() for key, value in self.weights.items()}
        heads = {} if self.heads is None else {HEADS_FILE: self.heads.to_json().encode()}
        weights = save(tensors, {"format": "pt"})
        return {CONFIG_FILE: f"{text}\n".encode(), WEIGHTS_FILE: weights, **heads}

    def save_pretrained(
        self, folder: StrPath, others: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        """Write a folder that ``from_pretrained`` and peft read, all files or none.

        Args:
            folder: The folder; made if it is missing.
            others: Texts of further files, by their names.

        Raises:
            InputError: The folder cannot be written.
        """
        path = make_folder(folder, "adapters")
        texts = {name: encode_text(path / name, text) for name, text in others.items()}
        atomic_write_folder(path, {**self.files(), **texts}, CONFIG_FILE)


def same_adapter(recorded: str | None, adapter: Adapter | None) -> bool:
    """Tell whether a recorded label is that of an adapter, under whatever name."""
    if recorded is None or adapter is None:
        return recorded is None and adapter is None
    return recorded[-_DIGITS:] == adapter.fingerprint[:_DIGITS]


def new_adapter(
    name: str,
    view: nn.Module,
    *,
    layers: Sequence[int],
    rank: int,
    alpha: float,
    projections: Sequence[str],
    seed: int,
) -> Adapter:
    """Make an adapter that changes nothing yet.

    The first factor is drawn from the uniform distribution between -1 and 1, divided by the root
    of the number of inputs, and the second is 0, as in peft.

    Args:
        name: Name of the adapter.
        view: The LLM's view.
        layers: Layers whose projections it changes.
        rank: Rank of the change.
        alpha: The change is multiplied by ``alpha / rank``.
        projections: Names of the projections.
        seed: Random seed.

    Raises:
        UnsupportedModelError: These layers have no such projections.
    """
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    names = set()
    for path, module in view.named_modules():
        projection = path.rpartition(".")[2]
        if (
            projection in projections
            and _layer_of(path) in layers
            and isinstance(module, nn.Linear)
        ):
            bound = module.in_features**-0.5
            first = torch.empty(rank, module.in_features).uniform_(
                -bound, bound, generator=generator
            )
            weights[f"{_PREFIX}{path}.lora_A.weight"] = first
            weights[f"{_PREFIX}{path}.lora_B.weight"] = torch.zeros(module.out_features, rank)
            names.add(projection)
    if not weights:
        raise UnsupportedModelError(
            f"{type(view).__name__!r} has no linear projections called "
            f"{', '.join(projections)}; name those of its attention."
        )
    options = {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(names),
        "layers_to_transform": sorted(layers),
    }
    return Adapter(name, options | {"peft_type": "LORA", "task_type": "CAUSAL_LM"}, weights)


def inject(view: nn.Module, adapter: Adapter, parameters: dict[str, nn.Parameter]) -> None:
    """Put an adapter into a view.

    Args:
        view: The view; parameters that it shares with a model stay as they are.
        adapter: The adapter.
        parameters: Parameters of the adapter by their names in files, which the view is given;
            missing ones are made from the adapter's weights.

    Raises:
        MissingExtraError: peft is not installed.
        UnsupportedModelError: The model has an adapter of its own, or this one is for another LLM.
    """
    with without_gradients(view):
        _replace_modules(view, adapter)
    view.eval()
    device = next(view.parameters()).device
    _replace_parameters(view, adapter, parameters, device)


def _replace_modules(view: nn.Module, adapter: Adapter) -> None:
    """Let peft replace the projections that an adapter changes."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise missing_extra(error, "align") from error
    if any(isinstance(module, BaseTunerLayer) for module in view.modules()):
        raise UnsupportedModelError(
            f"{type(view).__name__!r} has an adapter of peft already; merge it with "
            "merge_and_unload() before it gets another."
        )
    known = set(LoraConfig.__dataclass_fields__)
    options = {key: value for key, value in adapter.config.items() if key in known}
    try:
        inject_adapter_in_model(LoraConfig(**options), view, adapter_name=_SLOT)
    except (ValueError, TypeError) as error:
        raise _misfit(view, adapter, reason(error)) from error


def _replace_parameters(
    view: nn.Module, adapter: Adapter, parameters: dict[str, nn.Parameter], device: torch.device
) -> None:
    """Give the injected modules the adapter's parameters."""
    layers = -1
    used = set()
    for path, module in view.named_modules():
        layers = max(layers, _layer_of(path))
        for own, expected in list(module._parameters.items()):
            if expected is None or ".lora_" not in f".{path}":
                continue
            key = f"{_PREFIX}{path}.{own}".replace(f".{_SLOT}.", ".")
            weight = adapter.weights.get(key)
            if weight is None or weight.shape != expected.shape:
                raise _misfit(view, adapter, f"{key.removeprefix(_PREFIX)} is missing or differs")
            if key not in parameters or parameters[key].device != device:
                values = parameters.get(key, weight).detach()
                # A copy of its own, which inference mode cannot claim.
                with torch.inference_mode(False):
                    parameters[key] = nn.Parameter(values.to(device).float().clone())
            module._parameters[own] = parameters[key]
            used.add(key)
    unused = [key for key in adapter.weights if key not in used and _layer_of(key) <= layers]
    if unused:  # those of layers that were not loaded are not missed
        raise _misfit(view, adapter, f"it has no {unused[0].removeprefix(_PREFIX)}")


def _misfit(view: nn.Module, adapter: Adapter, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the adapter {_shown(adapter.name)} does not fit {type(view).__name__!r} ({why}); load "
        "the LLM that it was trained for."
    )


@contextmanager
def without_gradients(view: nn.Module) -> Iterator[None]:
    """Let a view's parameters stand for constants, without marking them: a model shares them.

    Parameters of an adapter are left out.
    """
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for path, module in view.named_modules():
            if ".lora_" in f".{path}":
                continue
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.requires_grad:
                    replaced.append((module, name, parameter))
                    module._parameters[name] = nn.Parameter(parameter.detach(), requires_grad=False)
        yield
    finally:
        for module, name, parameter in replaced:
            module._parameters[name] = parameter


def _layer_of(path: str) -> int:
    """Return the number of the layer that a module or parameter is in; -1 outside of all."""
    return next((int(part) for part in path.split(".") if part.isdecimal()), -1)


def _check_kind(config: Any, weights: Mapping[str, Tensor]) -> None:
    """Check that an adapter adds products of two factors to projections, and nothing else."""
    if not isinstance(config, dict):
        raise ValueError(f"{CONFIG_FILE} is not an object")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"its type is {short_repr(config.get('peft_type'))}, not LORA")
    others = ("modules_to_save", "use_dora", "trainable_token_indices", "target_parameters")
    for name in others:
        if config.get(name):
            raise ValueError(f"it sets {name}, which is not read")
    if config.get("bias", "none") != "none":
        raise ValueError("it changes biases")
    strange = [key for key in weights if ".lora_A." not in key and ".lora_B." not in key]
    if strange or not weights:
        raise ValueError(f"it holds {show_path(strange[0], 60)}" if strange else "it is empty")


def _find_folder(name: object, hub: Mapping[str, Any]) -> Path:
    """Return an adapter's folder, in the Hub's cache if the name is a repository's id."""
    if not isinstance(name, str | Path):
        raise InputError(
            f"adapter={short_repr(name)} is a {class_name(name)}; give an Adapter, its folder, or "
            "its id on the Hub."
        )
    path = Path(name)
    with suppress(OSError, ValueError):  # longer than any path, or with a zero in it
        if path.is_dir() and name:
            return path
        if isinstance(name, str) and name.count("/") == 1 and not path.exists():
            return _fetched(name, hub)
    raise ModelLoadError(
        f"adapter={_shown(name)} is not a folder; give the one that `routehead align` wrote, or "
        "the id of a repository on the Hub."
    )


def _fetched(name: str, hub: Mapping[str, Any]) -> Path:
    # Which errors a broken connection raises depends on the release of the Hub's client.
    try:
        patterns = [CONFIG_FILE, WEIGHTS_FILE, HEADS_FILE]
        return Path(snapshot_download(name, allow_patterns=patterns, **hub))
    except Exception as error:
        raise ModelLoadError(
            f"adapter={_shown(name)} is not a folder and cannot be fetched from the Hub "
            f"({reason(error)}); check the name, or give the folder that `routehead align` wrote."
        ) from error


def _content(path: Path) -> bytes:
    with open_input(path) as stream:
        return stream.read()


def _shown(name: StrPath) -> str:
    return repr(show_path(name, 80))
