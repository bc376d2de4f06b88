"""A view of a model: a second tree of modules over the same parameters, with the tap in it.

The caller's model is never changed: hooks, configuration and attention implementation of the
original stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import chain
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from routehead_plugins.backbone.attention import (
    StopForward,
    decoder_of,
    layers_of,
    refusal,
    register,
)
from routehead_plugins.backbone.rotary import depends_on_length
from routehead_plugins.errors import UnsupportedModelError


def tapped_view(model: PreTrainedModel) -> PreTrainedModel:
    """Build a second tree of modules over the same parameters, with the tap as its attention."""
    # Frequencies that depend on the prompt are the view's own: forwards change them.
    fixed = (m.buffers(recurse=False) for m in model.modules() if not depends_on_length(m))
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), *fixed)}
    view: PreTrainedModel = copy.deepcopy(model, shared).eval()
    for module in view.modules():
        # The caller's hooks are for the caller's own forwards.
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    _watch_layers(view)
    # Early releases of transformers 5 run soft-capped models on SDPA, which ignores the soft cap.
    capped = getattr(view.config.get_text_config(decoder=True), "attn_logit_softcapping", None)
    name = register("sdpa" if view._supports_sdpa and not capped else "eager")
    if view._can_set_attn_implementation():
        view.set_attn_implementation(name)
    if view.config._attn_implementation != name:
        reason = "its code bypasses transformers' AttentionInterface"
        raise UnsupportedModelError(refusal(model, reason))
    return view


def _watch_layers(view: PreTrainedModel) -> None:
    """Add hooks that end a forward before the layer a tap names, and keep that layer's input."""

    def watch(number: int) -> Callable[..., None]:
        def stop(_: nn.Module, states: tuple[Tensor, ...], options: dict[str, Any]) -> None:
            tap = options.get("routehead_tap")
            if tap is not None and tap.states_before == number:
                tap.states = states[0] if states else options["hidden_states"]
                raise StopForward

        return stop

    for number, layer in enumerate(layers_of(decoder_of(view))):
        layer.register_forward_pre_hook(watch(number), with_kwargs=True)
