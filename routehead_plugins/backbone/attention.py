"""The tap: attention of a few query rows, read while the model runs its own fast attention.

The caller's model is never changed. The tap works on a *view*, a second tree of modules over the
same parameters with a configuration of its own, so that hooks, configuration and attention
implementation of the original stay as they are. The request to read travels with each call, as a
keyword that transformers passes through to every attention layer.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from routehead_plugins.backbone.tail_queries import LayerQueries
from routehead_plugins.errors import UnsupportedModelError
from routehead_plugins.heads import HeadSet

# Names with "sdpa", "flash" or "flex_attention" in them trigger transformers' own support checks.
_TAP_NAMES = {"eager": "routehead_tap_additive", "sdpa": "routehead_tap_boolean"}

# Attention scores held at once, (heads, rows, keys): 256 MiB of float32.
_MAX_SCORES = 1 << 26


# Of transformers: whether a query sees a key, from the indices of sequence, head, query and key.
MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class StopForward(Exception):  # noqa: N818 - control flow, not an error
    """Signal that ends a forward inside the deepest layer needed, without any shared state."""


@dataclass
class Rows:
    """The tokens whose attention is read, and the keys that they may look back at.

    Transformers derives masks from indices in the cache. Where documents share their positions, or
    tails their first tokens, index and position differ; therefore the masks are built here.

    Attributes:
        weights: Weight of every row in each average, shape (averages, rows).
        positions: Position of every row, shape (rows,).
        sees: Mask of the rows that each row may look at, itself included, shape (rows, rows).
        past: Position of every key in the cache, shape (past keys,); a row sees all
            that its layer does not hide, as windows and chunks do.
        claimed: Number of past keys that the cache says it holds; ``None`` for those of ``past``.
    """

    weights: Tensor
    positions: Tensor
    sees: Tensor
    past: Tensor
    claimed: int | None = None
    _masks: dict[MaskFunction | None, Tensor] = field(default_factory=dict)

    def mask(self, function: MaskFunction | None) -> Tensor:
        """Return the mask of keys that each row may see, shape (1, 1, rows, past keys + rows).

        Args:
            function: The layer's own rule, such as a window, by which it masks; it is applied to
                positions. ``None``: the layer hides no key that comes before.
        """
        if function not in self._masks:
            seen = torch.cat([self.sees.new_ones(len(self.sees), len(self.past)), self.sees], dim=1)
            if function is not None:
                keys = torch.cat([self.past, self.positions])
                seen = seen & near(function, self.positions, keys)
            self._masks[function] = seen[None, None]
        return self._masks[function]


def near(function: MaskFunction, rows: Tensor, keys: Tensor) -> Tensor:
    """Apply a layer's own rule to positions of rows and of keys; a mask (rows, keys)."""
    keys = keys[None, None, None]
    first = keys.new_zeros((1, 1, 1, 1))  # the only sequence, and any head
    # A key that has a later position than its row is as near as can be.
    queries = torch.maximum(rows[None, None, :, None], keys)
    return function(first, first, queries, keys)[0, 0]


@dataclass
class Tap:
    """The request of one forward, and its result.

    Attributes:
        last_layer: The forward stops in this layer, as soon as its keys are in the cache.
        heads: Heads to read; empty to read none.
        rows: Tokens whose attention is read; ``None`` where nothing is read.
        states_before: The states that reach this layer are kept, and a forward that reads no heads
            stops there; ``None`` keeps none.
        keeps_queries: Whether to keep the rows' queries instead of reading attention.
        states: The states that were kept, shape (batch, tokens, width).
        read: Layer -> attention read there, shape (averages, heads of the layer, past keys).
        queries: Layer -> queries kept there.
    """

    last_layer: int
    heads: HeadSet = field(default_factory=lambda: HeadSet(()))
    rows: Rows | None = None
    states_before: int | None = None
    keeps_queries: bool = False
    states: Tensor | None = None
    read: dict[int, Tensor] = field(default_factory=dict)
    queries: dict[int, LayerQueries] = field(default_factory=dict)

    def __post_init__(self) -> None:
        device = None if self.rows is None else self.rows.weights.device
        self._indices = {
            layer: torch.tensor(indices, device=device)
            for layer, indices in self.heads.by_layer.items()
        }

    def visit(
        self, layer: int, query: Tensor, key: Tensor, mask: Tensor | None, options: _Options
    ) -> None:
        """Read this layer's heads, and stop the forward if no deeper layer is needed."""
        heads = self._indices.get(layer)
        if heads is not None and self.rows is not None and mask is not None:
            if self.keeps_queries:
                self.queries[layer] = _queries(query, key, heads, self.rows, mask, options)
            else:
                self.read[layer] = _mean_attention(query, key, heads, self.rows, mask, options)
        if layer >= self.last_layer:
            raise StopForward

    def result(self) -> Tensor:
        """Return the attention in the order of ``heads``, shape (averages, heads, past keys)."""
        by_layer = torch.cat([self.read[layer] for layer in self.heads.by_layer], dim=1)
        return by_layer[:, self.heads.indices_by_layer]


@dataclass(frozen=True)
class _Options:
    """Options of a layer's softmax over products of queries and keys; ``None``: not used."""

    scaling: float
    softcap: float | None
    sinks: Tensor | None
    mask_function: MaskFunction | None


def _mean_attention(
    query: Tensor, key: Tensor, heads: Tensor, rows: Rows, mask: Tensor, options: _Options
) -> Tensor:
    """Average the attention of some query heads over the rows; (averages, heads, past keys).

    Queries, (1, query heads, rows, dim), and keys, (1, key heads, all keys, dim), come after rotary
    embedding; the mask is that of the rows. The result is float32.
    """
    groups = query.shape[1] // key.shape[1]
    chunk = max(1, _MAX_SCORES // (query.shape[2] * key.shape[2]))
    parts = []
    for subset in heads.split(chunk):
        # In float32, since bfloat16 rounds scores to three digits, and heads differ by less.
        keys = key[0, subset // groups].float()
        scores = (query[0, subset].float() * options.scaling) @ keys.transpose(-1, -2)
        probabilities = _softmax(scores, mask[0], options, subset)  # (heads, rows, all keys)
        parts.append(rows.weights @ probabilities[..., : len(rows.past)])
    return torch.cat(parts).transpose(0, 1)


def _queries(
    query: Tensor, key: Tensor, heads: Tensor, rows: Rows, mask: Tensor, options: _Options
) -> LayerQueries:
    """Keep what ``_mean_attention`` needs of the rows, apart from documents."""
    key_heads = heads // (query.shape[1] // key.shape[1])
    queries = query[0, heads].float() * options.scaling
    scores = queries @ key[0, key_heads].float().transpose(-1, -2)
    function = options.mask_function
    return LayerQueries(
        heads=tuple(heads.tolist()),
        key_heads=tuple(key_heads.tolist()),
        queries=queries,
        rest=_with_sinks(scores, mask[0], options, heads).logsumexp(dim=-1),
        softcap=options.softcap,
        sees=None if function is None else partial(near, function, rows.positions),
    )


def _softmax(scores: Tensor, mask: Tensor, options: _Options, heads: Tensor) -> Tensor:
    """Soft-cap, mask and normalise scores as the layer itself does, in float32."""
    keys = scores.shape[-1]
    return _with_sinks(scores, mask, options, heads).softmax(dim=-1)[..., :keys]


def _with_sinks(scores: Tensor, mask: Tensor, options: _Options, heads: Tensor) -> Tensor:
    """Soft-cap and mask scores, (heads, rows, keys), and append those of sinks if there are any."""
    if options.softcap is not None:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    scores = scores.masked_fill(~mask, -torch.inf)
    if options.sinks is None:
        return scores
    # A sink is one more key that takes a share of the attention and has no value.
    sinks = options.sinks[heads].float().view(-1, 1, 1).expand(*scores.shape[:2], 1)
    return torch.cat([scores, sinks], dim=-1)


def _packed_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float
) -> Tensor:
    """Attend with the query heads of a group as further rows, so that no key is copied."""
    batch, heads, rows, _ = query.shape
    groups = heads // key.shape[1]
    packed = query.reshape(batch, key.shape[1], groups * rows, -1)
    mask = mask[..., : key.shape[2]].repeat(1, 1, groups, 1)
    attended = scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scaling)
    attended = attended.view(batch, heads, rows, -1).transpose(1, 2)
    return attended.contiguous()  # (batch, rows, heads, dim); some families call view on it


def _make_tap(flavour: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Wrap the attention function of a flavour: call the tap, then attend as usual."""

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
        scaling = options.get("scaling") or query.shape[-1] ** -0.5
        if routehead_tap is not None:
            if not getattr(module, "is_causal", True):
                raise ValueError("its attention is not causal")
            function = None
            if routehead_tap.rows is not None:
                query = _tempered(module, query, routehead_tap.rows)
                function = _mask_function(attention_mask)
                attention_mask = routehead_tap.rows.mask(function)
            read = _Options(scaling, options.get("softcap"), options.get("s_aux"), function)
            routehead_tap.visit(cast(int, module.layer_idx), query, key, attention_mask, read)
        if flavour == "eager":  # each family's own: soft caps and sinks differ
            own = sys.modules[type(module).__module__].eager_attention_forward
            mask = _additive(attention_mask, query)
            return own(module, query, key, value, mask, **options)  # type: ignore[no-any-return]
        if attention_mask is not None and attention_mask.ndim == 4:
            return _packed_attention(query, key, value, attention_mask, scaling), None
        attention = ALL_ATTENTION_FUNCTIONS[flavour]
        return attention(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]

    return attend


def _make_mask(flavour: str) -> Callable[..., Tensor | None]:
    """Wrap the mask maker of a flavour: a mask carries the function that it was made from."""
    make = ALL_MASK_ATTENTION_FUNCTIONS[flavour]

    def make_mask(
        *sizes: Any, mask_function: Any = causal_mask_function, **options: Any
    ) -> Tensor | None:
        mask: Tensor | None = make(*sizes, mask_function=mask_function, **options)
        if mask is not None:
            mask.routehead_mask_function = mask_function  # type: ignore[attr-defined]
        return mask

    return make_mask


def _mask_function(mask: Tensor | None) -> MaskFunction | None:
    """Return the function that a layer's mask was made from."""
    if mask is None:  # all keys are nearer than any window, or chunk, reaches
        return None
    function: MaskFunction | None = getattr(mask, "routehead_mask_function", None)
    if function is None:
        raise ValueError("its layers change the masks that transformers makes")
    return function


def _tempered(module: Any, query: Tensor, rows: Rows) -> Tensor:
    """Scale the queries of Llama 4 by position; the layer itself goes by index in the cache.

    The two differ where documents or tails share positions (arXiv 2501.19399).
    """
    if not getattr(module, "attn_temperature_tuning", False) or module.use_rope:
        return query
    past = len(rows.past) if rows.claimed is None else rows.claimed
    indices = torch.arange(query.shape[2], device=query.device) + past
    scaled, wanted = (
        torch.log1p(torch.floor((at + 1.0) / module.floor_scale)) * module.attn_scale + 1.0
        for at in (indices, rows.positions)
    )
    tempered: Tensor = query * (wanted / scaled).to(query.dtype)[:, None]
    return tempered


def _additive(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """Turn a boolean mask into one that is added to the scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    least = torch.finfo(query.dtype).min
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, least)


def register(flavour: str) -> str:
    """Register the tap with transformers under a name of its own; idempotent."""
    name = _TAP_NAMES[flavour]
    if name not in AttentionInterface._global_mapping:
        # Without the mask, cached and padded passes would silently run unmasked.
        AttentionMaskInterface.register(name, _make_mask(flavour))
        AttentionInterface.register(name, _make_tap(flavour))
    return name


def refusal(model: object, reason: str) -> str:
    """Write why a model cannot be read, for an ``UnsupportedModelError``."""
    return (
        f"{type(model).__name__!r} has no attention that can be read ({reason}); "
        "use a decoder such as Llama, Mistral, Qwen, Gemma, Phi-3, OLMo 2, Granite or GPT-OSS."
    )


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part of a model that holds its layers.

    Raises:
        UnsupportedModelError: There is none.
    """
    # Where an output projection is called "decoder", transformers returns that.
    for module in chain([model.get_decoder()], islice(model.modules(), 1, None)):
        if isinstance(module, PreTrainedModel) and len(layers_of(module)):
            return module
    raise UnsupportedModelError(refusal(model, "it has no list of layers"))


def layers_of(decoder: nn.Module) -> nn.ModuleList:
    """Return the layers of a decoder; empty if it has none."""
    stacks = (module for module in decoder.modules() if isinstance(module, nn.ModuleList))
    return next(stacks, nn.ModuleList())


def run(
    view: PreTrainedModel, ids: Tensor, positions: Tensor, cache: DynamicCache, tap: Tap
) -> None:
    """Run the view on some tokens, up to the attention of ``tap.last_layer`` and no further.

    Args:
        view: The decoder of a ``tapped_view``.
        ids: Token ids, shape (batch, tokens).
        positions: Position of every token, shape (batch, tokens).
        cache: Keys and values to look back at; those of the tokens are added to it.
        tap: Heads to read, and the layer to stop in.
    """
    with contextlib.suppress(StopForward):
        view(
            input_ids=ids,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            routehead_tap=tap,
        )


def readable_heads(view: PreTrainedModel) -> tuple[HeadSet, dict[int, tuple[int, int]]]:
    """List the heads that can be read, by running one token through all layers of a view.

    Returns:
        Every head, and by layer the number of key heads and the width of a key.

    Raises:
        UnsupportedModelError: None of its layers computes attention through the tap.
    """
    census = _Census()
    ids = torch.zeros((1, 1), dtype=torch.long, device=view.device)
    with torch.inference_mode():
        run(decoder_of(view), ids, torch.zeros_like(ids), DynamicCache(), cast(Tap, census))
    if not census.heads:
        reason = "none of its layers computes attention that passes keywords on"
        raise UnsupportedModelError(refusal(view, reason))
    heads = HeadSet(
        [(layer, index) for layer, heads in census.heads.items() for index in range(heads)]
    )
    return heads, census.keys


class _Census:
    """A tap that reads nothing and counts the heads of each layer."""

    rows = states_before = None

    def __init__(self) -> None:
        self.heads: dict[int, int] = {}
        self.keys: dict[int, tuple[int, int]] = {}

    def visit(self, layer: int, query: Tensor, key: Tensor, *_: object) -> None:
        # One layer may attend twice with the same weights, as those of DiffLlama do.
        if layer in self.heads and layer != next(reversed(self.heads)):
            raise ValueError("its layers run more than once")
        self.heads[layer] = query.shape[1]
        self.keys[layer] = key.shape[1], key.shape[3]
