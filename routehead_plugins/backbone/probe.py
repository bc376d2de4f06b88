"""A check at wrapping: what is read of a model must be what its own eager attention gives.

A few tokens go both ways. Where the results differ, the model is refused by name, so that no family
is ever read wrongly in silence. What so short a prompt cannot show, such as a window of thousands
of tokens, is taken from transformers' own masks; see ``attention``.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from routehead_plugins.backbone.attention import decoder_of, layers_of, refusal
from routehead_plugins.backbone.kv_cache import KeyValues
from routehead_plugins.errors import RouteHeadError, UnsupportedModelError
from routehead_plugins.heads import HeadSet

# Settings that list the kinds of layers, and the kinds whose past is nothing but keys and values.
_LISTS_OF_KINDS = ("layer_types", "layers_block_type", "block_types")
_KINDS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
# Tokens of the prompt, and of each of the two tails, which share their first one.
_PREFIX, _TAIL = 9, 4
# Largest mean difference, as a share of how far attention is from uniform, and of its mean. Eager
# attention in bfloat16 and the tap were 0.009 apart, as a share, in the embedded LLM.
_FULL_PRECISION, _HALF_PRECISION = (0.01, 1e-5), (0.1, 0.01)

_Ids = tuple[int, ...]


class Reader(Protocol):
    """What a frozen LLM does in every query; see ``FrozenLM``."""

    def prefill(
        self,
        sequences: Sequence[tuple[int, ...]],
        *,
        last_layer: int,
        behind: KeyValues | None = None,
        length: int | None = None,
    ) -> list[KeyValues]:
        """Run sequences and return their keys and values."""

    def read(
        self,
        context: Callable[[], Sequence[KeyValues]],
        tails: Sequence[tuple[int, ...]],
        heads: HeadSet,
    ) -> Tensor:
        """Return the attention of tails, shape (tails, heads, tokens)."""


def check_is_decoder(model: nn.Module) -> None:
    """Check that a module is a model of transformers with a decoder, and without an encoder.

    Raises:
        UnsupportedModelError: It is not.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig) or not callable(
        getattr(model, "get_decoder", None)
    ):
        raise UnsupportedModelError(refusal(model, "it is not a model of transformers"))
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(refusal(model, "it is an encoder and a decoder"))


@contextlib.contextmanager
def refusing(model: nn.Module) -> Iterator[None]:
    """Turn any error of a model's own code into an ``UnsupportedModelError``."""
    try:
        yield
    except (RouteHeadError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        cause = " ".join(str(error).split())[:160] or type(error).__name__
        others = sorted(_kinds_of_layers(model) - _KINDS)
        reason = (
            f"it has layers of kind {others[0]!r}" if others else f"a trial run failed: {cause}"
        )
        raise UnsupportedModelError(refusal(model, reason)) from error


def _kinds_of_layers(model: nn.Module) -> set[str]:
    """Return the kinds of layers that a configuration names; empty where it names none."""
    config = cast(PreTrainedConfig, model.config).get_text_config(decoder=True)
    lists = (getattr(config, name, None) for name in _LISTS_OF_KINDS)
    return {str(kind) for kinds in lists for kind in kinds or ()}


def check_reading(view: PreTrainedModel, heads: HeadSet, reader: Reader) -> None:
    """Compare what is read of a model with its own eager attention, on a few tokens.

    Layers of one kind run the same code. Hence only the leading layers are compared, down to the
    first layer of the last kind.

    Args:
        view: The model, with the tap in it; left as it is.
        heads: Every head that can be read.
        reader: Reads the view.

    Raises:
        UnsupportedModelError: They differ, or there is nothing to compare with.
    """
    with refusing(view):
        layers = _layers_of_every_kind(decoder_of(view))
        compared = HeadSet([head for head in heads if head.layer < layers])
        if len(compared):
            _compare_with_eager(view, layers, compared, reader)
            _compare_orders(view, compared, reader)


def _compare_with_eager(view: PreTrainedModel, layers: int, heads: HeadSet, reader: Reader) -> None:
    """Check that two tails behind a prefix are read as the model itself reads them."""
    prefix, tails, _ = _pieces(view)
    expected = _eager_attention(view, layers, [(*prefix, *tail) for tail in tails])
    context = reader.prefill([prefix], last_layer=heads.last_layer, length=_PREFIX + _TAIL)
    read = reader.read(lambda: context, tails, heads)
    if expected.shape != read.shape:
        raise UnsupportedModelError(refusal(view, "its eager attention has other heads"))
    _compare(view, read, expected, heads, "its eager attention differs from what is read")


def _compare_orders(view: PreTrainedModel, heads: HeadSet, reader: Reader) -> None:
    """Check that documents which share their positions are read alike in any order."""
    prefix, tails, (one, other) = _pieces(view)
    last, length = heads.last_layer, _PREFIX + len(one) + _TAIL
    (before,) = reader.prefill([prefix], last_layer=last, length=length)
    documents = reader.prefill([one, other], last_layer=last, behind=before, length=length)
    read = reader.read(lambda: [before, *documents], tails, heads)
    swapped = reader.read(lambda: [before, *documents[::-1]], tails, heads)
    parts = swapped.split([_PREFIX, len(other), len(one)], dim=-1)
    swapped = torch.cat([parts[0], parts[2], parts[1]], dim=-1)
    reason = "it takes positions from the cache, not from position_ids"
    _compare(view, swapped, read, heads, reason)


def _compare(
    view: PreTrainedModel, read: Tensor, expected: Tensor, heads: HeadSet, reason: str
) -> None:
    """Compare attention layer by layer, in terms of its distance to uniform attention."""
    if not (read.isfinite().all() and expected.isfinite().all()):
        return  # the weights are at fault, not the family
    full = view.dtype in (torch.float32, torch.float64)
    share, least = _FULL_PRECISION if full else _HALF_PRECISION
    error, spread = (read - expected).abs(), (expected - expected.mean(-1, keepdim=True)).abs()
    sizes = [len(indices) for indices in heads.by_layer.values()]
    by_layer = (values.split(sizes, dim=1) for values in (error, spread, expected))
    for off, far, level in zip(*by_layer, strict=True):
        if off.mean() > share * far.mean() + least * level.mean():
            raise UnsupportedModelError(refusal(view, reason))


def _eager_attention(
    view: PreTrainedModel, layers: int, sequences: Sequence[tuple[int, ...]]
) -> Tensor:
    """Run whole sequences with the model's own eager attention, in leading layers only.

    Returns:
        Mean over a sequence's last tokens, float32, shape (sequences, heads, first tokens).
    """
    deeper = layers_of(decoder_of(view))[layers:]  # not run, and so not copied
    kept = chain(view.parameters(), view.buffers(), deeper)
    shared = {id(item): item for item in kept}
    twin: Any = copy.deepcopy(view, shared)
    twin.set_attn_implementation("eager")
    for module in twin.modules():
        # The hooks that collect attention stay with the original; without this, none are added.
        vars(module).pop("_output_capturing_hooks_installed", None)
    stack = layers_of(decoder_of(twin))
    for module in list(twin.modules()):
        for name, child in list(module.named_children()):
            if child is stack:
                setattr(module, name, stack[:layers])
    attention = []
    for sequence in sequences:
        ids = torch.tensor([sequence], device=view.device)
        with torch.inference_mode():
            output = twin(input_ids=ids, use_cache=False, output_attentions=True)
        matrices = [matrix for matrix in output.attentions if matrix is not None]
        rows = [matrix[0, :, -_TAIL:, :-_TAIL].float().mean(dim=1) for matrix in matrices]
        attention.append(torch.cat(rows[:layers]))
    return torch.stack(attention)


def _layers_of_every_kind(decoder: PreTrainedModel) -> int:
    """Count the leading layers that hold one of every kind, and two at least."""
    config = decoder.config.get_text_config(decoder=True).to_dict()
    layers = layers_of(decoder)
    kinds: set[object] = set()
    deepest = 1
    for index, layer in enumerate(layers):
        # Lists with an entry for every layer; some list numbers of layers instead.
        per_layer = [
            str(values[index])
            for values in config.values()
            if isinstance(values, list | tuple) and index < len(values) and values[index] != index
        ]
        kind = (*per_layer, *_structure(layer))
        if kind not in kinds:
            kinds.add(kind)
            deepest = max(deepest, index)
    return min(deepest + 1, len(layers))


def _structure(layer: nn.Module) -> Iterator[object]:
    """Yield what decides which code a layer runs: its modules, their switches and their sizes."""
    for name, module in layer.named_modules():
        yield name, type(module)
        for attribute, value in sorted(vars(module).items()):
            # The number of a layer makes no other kind.
            number = "layer" in attribute and isinstance(value, int) and not isinstance(value, bool)
            if isinstance(value, str | int | None) and not number:
                yield attribute, value


def _pieces(view: PreTrainedModel) -> tuple[_Ids, list[_Ids], list[_Ids]]:
    """Return a prefix, two tails and two documents of ids that have no meaning of their own."""
    special = set(_special_ids(view.config.to_dict()))
    size = len(cast(Tensor, view.get_input_embeddings().weight))
    ordinary = [token for token in range(size) if token not in special]
    ids = [ordinary[(index * 7919) % len(ordinary)] for index in range(1, _PREFIX + 2 * _TAIL + 4)]
    first, rest = ids[_PREFIX], ids[_PREFIX + 1 :]
    tails = [(first, *rest[: _TAIL - 1]), (first, *rest[_TAIL - 1 : 2 * _TAIL - 2])]
    return tuple(ids[:_PREFIX]), tails, [tuple(ids[-5:-2]), tuple(ids[-2:])]


def _special_ids(config: dict[str, Any]) -> Iterator[int]:
    """Yield the ids that a configuration names, those of its parts included."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _special_ids(value)
        elif str(name).endswith(("_token_id", "_token_index", "_token_ids")):
            yield from value if isinstance(value, list) else [value]
