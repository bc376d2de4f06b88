"""State of a caller's model, to notice when its owner has changed it.

A view shares the parameters of a model, but has modules of its own. What the owner changes in the
modules afterwards would pass it by: merging or disabling an adapter, replacing layers, setting an
attribute.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Iterator
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from routehead_plugins.backbone.rotary import depends_on_length

_ATOMS = frozenset({int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device})
# Of every module: the mode and the hooks, which views do without, and the parts, recorded apart.
_OF_MODULES = frozenset(vars(nn.Module()))
# Of models: what is not read when layers run, or is set by running them.
_UNREAD = frozenset({"generation_config", "warnings_issued", "_output_capturing_hooks_installed"})
# Of configurations: the attention implementation, as views have one of their own.
_UNREAD_SETTINGS = frozenset({"_attn_implementation_internal", "_attn_implementation"})
# Values of a tensor that are compared.
_SAMPLES = 8
# Values of a tensor that a fingerprint depends on.
_FINGERPRINT_SAMPLES = 64


def is_history(module: nn.Module, name: str) -> bool:
    """Return whether an attribute or buffer is left behind by forwards of other lengths."""
    if name.startswith("original") or "_original_" in name:
        return False
    return name.endswith(("inv_freq", "max_seq_len_cached")) and depends_on_length(module)


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Yield all tensors of a model that its forwards read and leave as they are."""
    yield from model.parameters()
    for module in model.modules():
        for name, value in (*module._buffers.items(), *vars(module).items()):
            # Others are computed in a forward.
            if isinstance(value, Tensor) and value.is_leaf and not is_history(module, name):
                yield value


class ModelState:
    """State of a model's modules: equal to another one if views of both compute alike.

    It consists of the tree of modules, their attributes, the identity of their parameters and
    buffers, and the values of their configurations. The values of tensors are not in it.
    """

    def __init__(self, model: nn.Module) -> None:
        """Record the state of all modules."""
        self._numbers: dict[int, int] = {}
        # Dictionaries with their keys and values, and other containers with a copy.
        self._mappings: list[tuple[dict[str, Any], list[str], list[Any]]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._values = list(self._of_modules(model))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelState) and self._values == other._values

    __hash__ = None  # type: ignore[assignment]

    @property
    def holds(self) -> bool:
        """Whether nothing was set since; false also where a value was replaced by an equal one."""
        for mapping, keys, values in self._mappings:
            if list(mapping) != keys or not all(map(is_, mapping.values(), values)):
                return False
        return all(_copied(container) == copied for container, copied in self._containers)

    def _of_modules(self, model: nn.Module) -> Iterator[Any]:
        """Yield the state of a module and of those in it."""
        stack: list[tuple[str, nn.Module | None]] = [("", model)]
        while stack:
            name, module = stack.pop()
            if module is None or id(module) in self._numbers:
                yield name, self._numbers.get(id(module))
                continue
            self._numbers[id(module)] = len(self._numbers)
            yield name, type(module), *self._of_module(module)
            stack.extend(module._modules.items())

    def _of_module(self, module: nn.Module) -> Iterator[Any]:
        for mapping in (vars(module), module._parameters, module._buffers, module._modules):
            if mapping:
                self._mappings.append((mapping, list(mapping), list(mapping.values())))
        for name, value in vars(module).items():
            if name not in _OF_MODULES and name not in _UNREAD and not is_history(module, name):
                yield name, self._of_value(value)
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if not is_history(module, name):
                yield name, id(tensor)

    def _of_value(self, value: Any) -> Any:
        if type(value) in _ATOMS:
            return value
        if isinstance(value, PreTrainedConfig):
            if id(value) in self._numbers:
                return self._numbers[id(value)]
            self._numbers[id(value)] = len(self._numbers)
            value = _Settings(value)
        copied = _copied(value)
        if not isinstance(copied, _Same):
            self._containers.append((value, copied))
        return copied


class _Settings:
    """The values of a configuration."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config

    def values(self) -> dict[str, Any]:
        values = vars(self.config).items()
        return {name: value for name, value in values if name not in _UNREAD_SETTINGS}


class _Same:
    """An object that is equal to itself only."""

    def __init__(self, value: object) -> None:
        self._value = value  # kept, so that no other object gets its id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value is other._value

    __hash__ = None  # type: ignore[assignment]


def _copied(value: Any) -> Any:
    """Copy a container of plain values; all other objects in it are compared by identity."""
    if type(value) in _ATOMS:
        return value
    if isinstance(value, _Settings):
        return _copied(value.values())
    if isinstance(value, PreTrainedConfig):
        return _copied(_Settings(value))
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [type(value), *map(_copied, value)]
    if isinstance(value, set | frozenset):
        return set(value)
    return _Same(value)


class Weights:
    """The tensors of a model, to notice when their values change."""

    def __init__(self, model: nn.Module) -> None:
        """Remember the tensors, not their values."""
        self._tensors = list(tensors_of(model))
        self._addresses: list[int] = []
        self._samples: list[list[Tensor]] = []

    def key(self) -> Hashable:
        """Return a key that changes with the values.

        Optimizers, ``load_state_dict``, ``to`` and every other operation on the tensors are
        noticed. Writing into ``.data`` passes their version counters by: it is noticed where it
        changes one of some values that are compared, spread evenly over every tensor.
        """
        addresses = [tensor.data_ptr() for tensor in self._tensors]
        if addresses != self._addresses:
            self._addresses, self._samples = addresses, _samples(self._tensors)
        digest = hashlib.blake2b(digest_size=16)
        for views in self._samples:
            digest.update(torch.cat(views).view(torch.uint8).cpu().numpy().tobytes())
        # Tensors made in inference mode have no version counter.
        versions = tuple(-1 if t.is_inference() else t._version for t in self._tensors)
        return tuple(addresses), versions, digest.digest()


@torch.no_grad()
def _samples(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Return views of a few values of each tensor, by number format and device."""
    groups: dict[Hashable, list[Tensor]] = {}
    for tensor in tensors:
        count = min(_SAMPLES, tensor.numel())
        if tensor.is_meta or not count:
            continue
        try:
            view = tensor.detach().as_strided((count,), (tensor.numel() // count,))
        except (RuntimeError, TypeError):
            continue  # a format of its own, such as a sparse or a quantised one
        groups.setdefault((type(view), view.dtype, view.device), []).append(view)
    return list(groups.values())


@torch.no_grad()
def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Return a digest of values that are spread evenly over some tensors, for records on disk.

    It is the same in every process and number format: the values are rounded to bfloat16.

    Args:
        tensors: Tensors in an order that does not vary; those without values are skipped.
    """
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        if tensor.is_meta or not tensor.numel():
            continue
        plain: Any = tensor.detach()
        if type(plain) is not Tensor and hasattr(plain, "dequantize"):
            plain = plain.dequantize()  # a kind of its own, such as torchao's
        flat = plain.reshape(-1)
        count = min(_FINGERPRINT_SAMPLES, len(flat))
        indices = torch.arange(count, device=flat.device) * (len(flat) // count)
        digest.update(str(tuple(tensor.shape)).encode())
        sample = flat[indices].to(torch.bfloat16).view(torch.int16)
        digest.update(sample.cpu().numpy().tobytes())
    return digest.hexdigest()
