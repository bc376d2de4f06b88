"""A view of a model: a second tree of modules over the same parameters, with the tap in it.

The caller's model is never changed: hooks, configuration and attention implementation of the
original stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from routehead_plugins.backbone.attention import (
    StopForward,
    decoder_of,
    layers_of,
    refusal,
    register,
)
from routehead_plugins.backbone.model_state import tensors_of
from routehead_plugins.errors import UnsupportedModelError


def tapped_view(model: PreTrainedModel) -> PreTrainedModel:
    """Build a second tree of modules over the same parameters, with the tap as its attention."""
    _check_visible(model)
    # Frequencies that depend on the prompt are the view's own: forwards change them.
    shared = {id(tensor): tensor for tensor in tensors_of(model)}
    view: PreTrainedModel = copy.deepcopy(model, shared).eval()
    for module in view.modules():
        # The caller's hooks are for the caller's own forwards.
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    layers = layers_of(decoder_of(view))
    _number_layers(layers)
    _watch_layers(layers)
    # Early releases of transformers 5 run soft-capped models on SDPA, which ignores the soft cap.
    capped = getattr(view.config.get_text_config(decoder=True), "attn_logit_softcapping", None)
    name = register("sdpa" if view._supports_sdpa and not capped else "eager")
    if view._can_set_attn_implementation():
        view.set_attn_implementation(name)
    if view.config._attn_implementation != name:
        reason = "its code bypasses transformers' AttentionInterface"
        raise UnsupportedModelError(refusal(model, reason))
    return view


def _check_visible(model: nn.Module) -> None:
    """Check that modules and tensors are all there is to a model.

    Raises:
        UnsupportedModelError: Its adapter or its hooks do what a view cannot see.
    """
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise UnsupportedModelError(refusal(model, "its adapter adds tokens to every prompt"))
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod | WeightNorm | SpectralNorm):
                reason = f"hooks compute weights of {type(module).__name__}; make them permanent"
                raise UnsupportedModelError(refusal(model, reason))


def _number_layers(layers: nn.ModuleList) -> None:
    """Number layers by their order, which differs after the owner has removed some."""
    numbered: list[list[Any]] = [
        [module for module in layer.modules() if getattr(module, "layer_idx", None) is not None]
        for layer in layers
    ]
    numbers = [{int(module.layer_idx) for module in modules} for modules in numbered]
    # Families that number otherwise, such as two for one layer, or none, know why.
    if any(len(own) != 1 or min(own) < 0 for own in numbers):
        return
    for number, modules in enumerate(numbered):
        for module in modules:
            module.layer_idx = number


def _watch_layers(layers: nn.ModuleList) -> None:
    """Add hooks that keep the input of the layer a tap names, where a forward may end."""

    def watch(number: int) -> Callable[..., None]:
        def stop(_: nn.Module, states: tuple[Tensor, ...], options: dict[str, Any]) -> None:
            tap = options.get("routehead_tap")
            if tap is not None and tap.states_before == number:
                tap.states = states[0] if states else options["hidden_states"]
                if not tap.heads:
                    raise StopForward

        return stop

    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(watch(number), with_kwargs=True)


@contextmanager
def recomputing(layers: nn.ModuleList) -> Iterator[None]:
    """Let the layers of a view compute their intermediate results again for gradients.

    Args:
        layers: The layers. A forward ends inside the deepest one, which is left out.
    """
    try:
        for number, layer in enumerate(layers):
            layer.forward = _recomputed(number, layer.forward)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _recomputed(number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*states: Any, **options: Any) -> Any:
        tap = options.get("routehead_tap")
        if tap is not None and tap.last_layer <= number:
            return forward(*states, **options)
        return checkpoint(partial(forward, **options), *states, use_reentrant=False)

    return wrapped
