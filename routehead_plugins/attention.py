"""The tap: attention of a few query rows, read while the model runs its own fast attention.

The only module that touches the insides of a model. It never changes the caller's model: it works
on a *view*, a second tree of modules over the same parameters that has its own configuration, so
that hooks, configuration and attention implementation of the original stay as they are, and two
threads can run the view at once. What a call wants read travels with the call, as a keyword that
transformers hands through to every attention layer.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from routehead_plugins.errors import UnsupportedModelError
from routehead_plugins.heads import HeadSet

_Attention = Callable[..., tuple[Tensor, Tensor | None]]

# Names with "sdpa", "flash" or "flex_attention" in them trigger transformers' own support checks.
_TAP_NAMES = {"eager": "routehead_tap_additive", "sdpa": "routehead_tap_boolean"}

# Attention scores held at once, (batch, heads, rows, keys): 256 MiB of float32.
_MAX_SCORES = 1 << 26


class _StopForward(Exception):  # noqa: N818 - control flow, not an error
    """Ends a forward inside the deepest layer that is needed.

    An exception is the one way out of a forward that needs no change to the shared configuration.
    """


@dataclass
class Tap:
    """What one forward is asked to read, and what it read.

    Attributes:
        heads: Heads to read; empty to read none.
        row_weights: Weight of every query row in the average, shape (batch, rows).
        keys: Number of leading key positions to keep.
        last_layer: The forward stops in this layer, as soon as its keys are in the cache.
        read: Filled by the forward: layer -> attention, shape (batch, heads of the layer, keys).
    """

    heads: HeadSet
    row_weights: Tensor | None
    keys: int
    last_layer: int
    read: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        device = None if self.row_weights is None else self.row_weights.device
        self._indices = {
            layer: torch.tensor(indices, device=device)
            for layer, indices in self.heads.by_layer.items()
        }

    def visit(
        self, layer: int, query: Tensor, key: Tensor, mask: Tensor | None, options: _Options
    ) -> None:
        """Read this layer's heads, and stop the forward where nothing deeper is wanted."""
        heads = self._indices.get(layer)
        if heads is not None and self.row_weights is not None:
            self.read[layer] = _mean_attention(
                query, key, mask, heads, self.row_weights, self.keys, options
            )
        if layer >= self.last_layer:
            raise _StopForward

    def result(self) -> Tensor:
        """Attention in the order of ``heads``, shape (batch, heads, keys)."""
        by_layer = torch.cat([self.read[layer] for layer in self.heads.by_layer], dim=1)
        return by_layer[:, self.heads.places_by_layer]


@dataclass(frozen=True)
class _Options:
    """How a layer turns products into probabilities; ``None`` where it does not."""

    scaling: float
    softcap: float | None
    sinks: Tensor | None
    sliding_window: int | None


def _mean_attention(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    heads: Tensor,
    row_weights: Tensor,
    keys: int,
    options: _Options,
) -> Tensor:
    """Average the attention of the chosen heads over the query rows.

    Args:
        query: After rotary embedding, shape (batch, query heads, rows, dim).
        key: After rotary embedding, shape (batch, key heads, all keys, dim).
        mask: Boolean (true: may be seen) or additive, broadcast to (batch, 1, rows, all keys);
            ``None`` for plain causal attention.
        heads: Indices of the query heads to read, shape (heads,).
        row_weights: Shape (batch, rows).
        keys: Number of leading keys to keep.
        options: Scaling, soft cap, sinks, window of this layer.

    Returns:
        Attention in float32, shape (batch, heads, keys).
    """
    batch, query_heads, rows, _ = query.shape
    if mask is None or mask.ndim != 4:
        mask = _causal_mask(rows, key.shape[2], options.sliding_window, query.device)
    groups = query_heads // key.shape[1]
    # float32: a bfloat16 product rounds scores to three digits, more than heads differ by.
    keys_t = key.float().transpose(-1, -2)  # (batch, key heads, dim, all keys)
    chunk = max(1, _MAX_SCORES // max(1, batch * rows * key.shape[2]))
    parts = []
    for some in heads.split(chunk):
        rows_of = query[:, some].float() * options.scaling
        scores = rows_of @ keys_t[:, some // groups]  # (batch, heads, rows, all keys)
        probabilities = _softmax(scores, mask, options, some)
        parts.append(torch.einsum("bhrk,br->bhk", probabilities[..., :keys], row_weights))
    return torch.cat(parts, dim=1)


def _softmax(scores: Tensor, mask: Tensor, options: _Options, heads: Tensor) -> Tensor:
    """Soft-cap, mask and normalise scores as the layer itself does, in float32."""
    if options.softcap is not None:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    mask = mask[..., : scores.shape[-1]]
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if options.sinks is None:
        return scores.softmax(dim=-1)
    # A sink is one more key that takes its share of attention and is seen by nobody.
    sinks = options.sinks[heads].float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]


def _causal_mask(rows: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Let row i, the last ``rows`` of ``keys`` positions, see itself and what is before it."""
    own = torch.arange(keys - rows, keys, device=device)[:, None]
    other = torch.arange(keys, device=device)[None, :]
    allowed = other <= own
    if window is not None:
        allowed &= other > own - window
    return allowed[None, None]


def _make_tap(flavour: str) -> _Attention:
    """Wrap the attention function of a flavour: hand over to the tap, then attend as usual."""

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        routehead_tap: Tap | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if routehead_tap is not None:
            if not getattr(module, "is_causal", True):
                raise ValueError("it looks forward as well as back")
            read = _Options(
                scaling=options.get("scaling") or query.shape[-1] ** -0.5,
                softcap=options.get("softcap"),
                sinks=options.get("s_aux"),
                sliding_window=options.get("sliding_window"),
            )
            layer = cast(int, module.layer_idx)
            routehead_tap.visit(layer, query, key, attention_mask, read)
        if flavour == "eager":
            # Each family has its own, since soft caps and sinks differ between them.
            own = sys.modules[type(module).__module__].eager_attention_forward
            return own(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
        attention = ALL_ATTENTION_FUNCTIONS[flavour]
        return attention(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]

    return attend


def _register(flavour: str) -> str:
    """Make the tap known to transformers under a name of its own; idempotent."""
    name = _TAP_NAMES[flavour]
    if name not in AttentionInterface._global_mapping:
        # Without the mask, cached and padded passes would silently run unmasked.
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[flavour])
        AttentionInterface.register(name, _make_tap(flavour))
    return name


def tapped_view(model: PreTrainedModel) -> PreTrainedModel:
    """Build a second tree of modules over the same parameters, with the tap as its attention.

    Args:
        model: Any decoder of transformers; left as it is.

    Returns:
        The decoder without its vocabulary head, in evaluation mode.

    Raises:
        UnsupportedModelError: Its attention cannot be exchanged, so there is nothing to read.
    """
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    view: PreTrainedModel = copy.deepcopy(model.get_decoder(), shared).eval()
    for module in view.modules():
        # The caller's hooks are for the caller's own runs.
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    # Early releases of transformers 5 run capped models on SDPA, which leaves the cap out.
    capped = getattr(view.config.get_text_config(decoder=True), "attn_logit_softcapping", None)
    name = _register("sdpa" if view._supports_sdpa and not capped else "eager")
    if view._can_set_attn_implementation():
        view.set_attn_implementation(name)
    if view.config._attn_implementation != name:
        raise unsupported(model, "its code does not go through transformers' AttentionInterface")
    return view


def unsupported(model: PreTrainedModel, reason: str) -> UnsupportedModelError:
    """Say why a model cannot be used, and what can."""
    return UnsupportedModelError(
        f"{type(model).__name__!r} has no attention that can be read ({reason}); "
        "use a decoder such as Llama, Mistral, Qwen, Gemma, Phi-3, OLMo 2, Granite or GPT-OSS."
    )


def run(
    view: PreTrainedModel, ids: Tensor, positions: Tensor, cache: DynamicCache, tap: Tap
) -> None:
    """Run the view on some tokens, up to and not beyond the attention of ``tap.last_layer``.

    Args:
        view: From ``tapped_view``.
        ids: Token ids, shape (batch, tokens).
        positions: Position of every token, shape (batch, tokens).
        cache: What the tokens can look back at; their own keys and values are added to it.
        tap: What to read, and where to stop.
    """
    with contextlib.suppress(_StopForward):
        view(
            input_ids=ids,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            routehead_tap=tap,
        )


def fork(cache: DynamicCache, batch: int) -> DynamicCache:
    """Repeat a cache of batch 1 without copying it; what is added to the fork stays in the fork."""
    forked = DynamicCache()
    for layer in cast(list[DynamicLayer], cache.layers):
        twin = copy.copy(layer)
        twin.keys = cast(Tensor, layer.keys).expand(batch, -1, -1, -1)
        twin.values = cast(Tensor, layer.values).expand(batch, -1, -1, -1)
        forked.layers.append(twin)
    return forked


def readable_heads(view: PreTrainedModel, model: PreTrainedModel) -> HeadSet:
    """Find out which layers show their attention, by running one token through all of them.

    Args:
        view: From ``tapped_view``.
        model: What the view was made of, for the message.

    Raises:
        UnsupportedModelError: No layer, or not every layer's attention, came past the tap.
    """
    census = _Census()
    ids = torch.zeros((1, 1), dtype=torch.long, device=view.device)
    with torch.inference_mode():
        try:
            run(view, ids, torch.zeros_like(ids), DynamicCache(), cast(Tap, census))
        except (TypeError, AttributeError, IndexError, ValueError) as error:
            raise unsupported(model, f"a trial run failed: {error}") from error
    if not census.heads:
        raise unsupported(model, "none of its layers computes attention")
    return HeadSet(
        [(layer, index) for layer, heads in census.heads.items() for index in range(heads)]
    )


class _Census:
    """Stands where a tap would, and counts the heads that pass."""

    def __init__(self) -> None:
        self.heads: dict[int, int] = {}

    def visit(self, layer: int, query: Tensor, *_: object) -> None:
        self.heads[layer] = query.shape[1]
