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
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from routehead_plugins.backbone.attention import decoder_of, layers_of, refusal
from routehead_plugins.backbone.kv_cache import KeyValues
from routehead_plugins.errors import InputError, RouteHeadError, UnsupportedModelError, short_repr
from routehead_plugins.heads import HeadSet

# Tokens of the prompt, and of each of the two tails, which share their first one.
_PREFIX, _TAIL = 9, 4
# Largest difference, as a share of how far attention is from uniform, and of its mean.
_FULL_PRECISION, _HALF_PRECISION = (0.01, 1e-4), (0.25, 0.02)


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


def check_is_decoder(model: object) -> None:
    """Check that an object is a model of transformers that generates text.

    Raises:
        InputError: It is not a model of transformers at all.
        UnsupportedModelError: It has an encoder, or no decoder.
    """
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not isinstance(config, PreTrainedConfig):
        raise InputError(
            f"model={short_repr(model)} is not a model of transformers; give a causal LLM "
            "such as AutoModelForCausalLM returns, or its name to from_pretrained."
        )
    if not callable(getattr(model, "get_decoder", None)):
        raise UnsupportedModelError(refusal(model, "it has no get_decoder()"))
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
        raise UnsupportedModelError(refusal(model, f"a trial run failed: {cause}")) from error


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
    layers = _layers_of_every_kind(decoder_of(view))
    compared = HeadSet([head for head in heads if head.layer < layers])
    if not compared:
        return
    ids = _ordinary_ids(view)
    prefix, ids = ids[:_PREFIX], ids[_PREFIX:]
    tails = [(ids[0], *ids[1:_TAIL]), (ids[0], *ids[_TAIL : 2 * _TAIL - 1])]
    with refusing(view):
        expected = _eager_attention(view, layers, [(*prefix, *tail) for tail in tails])
        context = reader.prefill(
            [prefix], last_layer=compared.last_layer, length=_PREFIX + _TAIL
        )
        read = reader.read(lambda: context, tails, compared)
    if expected.shape != read.shape:
        raise UnsupportedModelError(
            refusal(view, "its eager attention returns other heads than it computes")
        )
    _compare(view, read, expected, compared, "its eager attention differs from what is read")

    documents = [ids[-5:-2], ids[-2:]]
    with refusing(view):
        one, other = reader.prefill(
            documents, last_layer=compared.last_layer, behind=context[0], length=_PREFIX + 3 + _TAIL
        )
        read = reader.read(lambda: [*context, one, other], tails, compared)
        swapped = reader.read(lambda: [*context, other, one], tails, compared)
    order = [*range(_PREFIX), *range(_PREFIX + 2, _PREFIX + 5), _PREFIX, _PREFIX + 1]
    reason = "it takes positions from the cache, not from position_ids"
    _compare(view, swapped[..., order], read, compared, reason)


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
    shared = {id(tensor): tensor for tensor in chain(view.parameters(), view.buffers())}
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
    ids = torch.tensor(sequences, device=view.device)
    with torch.inference_mode():
        output = twin(input_ids=ids, use_cache=False, output_attentions=True)
    matrices = [matrix for matrix in output.attentions if matrix is not None]
    rows = [matrix[:, :, -_TAIL:, :-_TAIL].float().mean(dim=2) for matrix in matrices[:layers]]
    return torch.cat(rows, dim=1)


def _layers_of_every_kind(decoder: PreTrainedModel) -> int:
    """Count the leading layers that hold one of every kind, and two at least."""
    config = decoder.config.get_text_config(decoder=True).to_dict()
    layers = layers_of(decoder)
    kinds: set[object] = set()
    deepest = 1
    for index, layer in enumerate(layers):
        per_layer = [
            str(values[index])
            for values in config.values()
            if isinstance(values, list | tuple) and len(values) > index
        ]
        kind = (*per_layer, *_structure(layer, index))
        if kind not in kinds:
            kinds.add(kind)
            deepest = max(deepest, index)
    return min(deepest + 1, len(layers))


def _structure(layer: nn.Module, index: int) -> Iterator[object]:
    """Yield what decides which code a layer runs: its modules, their switches and their sizes."""
    for name, module in layer.named_modules():
        yield name, type(module)
        for attribute, value in sorted(vars(module).items()):
            if isinstance(value, str | int) or value is None:
                # Numbers of layers differ from layer to layer, and make no other kind.
                yield attribute, "its number" if value == index else value


def _ordinary_ids(view: PreTrainedModel) -> tuple[int, ...]:
    """Return ids of tokens, spread over the vocabulary, that have no meaning of their own."""
    special = set(_special_ids(view.config.to_dict()))
    size = int(view.get_input_embeddings().weight.shape[0])
    ordinary = [token for token in range(size) if token not in special]
    count = _PREFIX + 2 * _TAIL + 4
    return tuple(ordinary[(index * 7919) % len(ordinary)] for index in range(1, count + 1))


def _special_ids(config: dict[str, Any]) -> Iterator[int]:
    """Yield the ids that a configuration names, those of its parts included."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _special_ids(value)
        elif str(name).endswith(("_token_id", "_token_index", "_token_ids")):
            yield from value if isinstance(value, list) else [value]
