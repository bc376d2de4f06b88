"""Rotary embeddings that depend on the length of the prompt, such as LongRoPE and dynamic NTK.

Transformers chooses their frequencies by the largest position in a forward, and dynamic NTK also by
those of earlier forwards. Here a prompt is run in several forwards, and keys are kept for other
prompts. Therefore these embeddings are told the length of the whole prompt: its documents and its
tails are rotated alike, as in one forward over all of it, whatever was run before.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def depends_on_length(module: nn.Module) -> bool:
    """Return whether a module is a rotary embedding whose frequencies depend on the length."""
    return any(kind == "longrope" or "dynamic" in kind for kind in _kinds(module).values())


def _kinds(module: nn.Module) -> dict[str | None, str]:
    """Return a rotary embedding's kind by type of layer; ``None`` stands for all layers."""
    kinds = getattr(module, "rope_type", None)
    by_layer = kinds if isinstance(kinds, dict) else {None: kinds}
    return {layer: kind for layer, kind in by_layer.items() if isinstance(kind, str)}


def longest_prompt(config: Any) -> int | None:
    """Return the number of tokens that a model takes; ``None`` if nothing limits it.

    Args:
        config: The configuration of its decoder.
    """
    limit: int | None = getattr(config, "max_position_embeddings", None)
    parameters = getattr(config, "rope_parameters", None) or {}
    if limit and parameters.get("rope_type") == "dynamic":
        # The limit is the original one, which dynamic NTK extends.
        return int(limit * parameters["factor"])
    return limit


class PromptLength:
    """Length of the prompt that a view of a model runs, for the rotary embeddings in it."""

    def __init__(self, view: nn.Module) -> None:
        """Add hooks to the rotary embeddings that depend on the length."""
        self._tokens: int | None = None
        self._modules = [module for module in view.modules() if depends_on_length(module)]
        for module in self._modules:
            module.register_forward_pre_hook(self._extend, with_kwargs=True)
            module.register_forward_hook(self._trim)

    @property
    def matters(self) -> bool:
        """Whether the view has such embeddings at all."""
        return bool(self._modules)

    @contextmanager
    def set_to(self, tokens: int | None) -> Iterator[None]:
        """Rotate as in a prompt of this length; ``None``: as in one that ends with the forward."""
        before, self._tokens = self._tokens, tokens
        try:
            yield
        finally:
            self._tokens = before

    def key(self, tokens: int) -> Hashable:
        """Return a key that is equal for all lengths at which tokens are rotated alike."""
        values = []
        with torch.inference_mode(), self.set_to(tokens):
            for module in self._modules:
                device = next(module.buffers()).device
                like = torch.zeros(1, 1, 1, dtype=torch.float32, device=device)
                position = torch.ones(1, 1, dtype=torch.long, device=device)
                for layer in _kinds(module):
                    for factors in _tensors(module(like, position, *([layer] if layer else []))):
                        values.append(factors.cpu().numpy().tobytes())
        return tuple(values)

    def _extend(
        self, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Add the last position of the prompt to those that are rotated."""
        names = ("x", "position_ids", "layer_type")
        options = dict(zip(names, arguments, strict=False)) | options
        positions: Tensor = options["position_ids"]
        first = positions.new_zeros(positions.shape)[..., :1]
        # The beginning of a sequence makes dynamic NTK forget longer ones.
        module.forward(**options | {"position_ids": first})
        if self._tokens is not None:
            last = torch.full_like(first, self._tokens - 1)
            options["position_ids"] = torch.cat([positions, last], dim=-1)
        return (), options

    def _trim(self, _: nn.Module, __: Any, output: Any) -> Any:
        """Remove the factors of the position that was added."""
        if self._tokens is None:
            return output
        if isinstance(output, Tensor):
            return output[..., :-1, :]
        return tuple(factors[..., :-1, :] for factors in output)


def _tensors(output: Tensor | Iterable[Tensor]) -> Iterable[Tensor]:
    return [output] if isinstance(output, Tensor) else output
