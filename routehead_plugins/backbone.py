"""The frozen LLM: what of it is run, and what is read from it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from routehead_plugins.attention import Tap, fork, readable_heads, run, tapped_view
from routehead_plugins.data import check_text
from routehead_plugins.errors import InputError
from routehead_plugins.heads import HeadSet
from routehead_plugins.loading import load_model, load_tokenizer
from routehead_plugins.precision import pick_device, pick_dtype
from routehead_plugins.prompt import PromptEncoder

# Tokens embedded at once, padding included.
_BATCH_TOKENS = 4096


class FrozenLM:
    """A decoder whose weights, configuration and hooks stay as they are.

    Attributes:
        name: What it was loaded as.
        heads: Every head that can be read.
        encoder: Builds prompts for it.
        turn: To be held while a query is read: one already keeps the device busy, and sixteen
            prefixes at once would fill its memory.
        max_tokens: Longest sequence it accepts; ``None`` when it names no limit.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, *, name: str | None = None) -> None:
        """Wrap a model that is already loaded.

        Args:
            model: A decoder of transformers, on its device and in its dtype; left as it is.
            tokenizer: Its tokenizer; left as it is.
            name: What to call it; the model's own ``name_or_path`` by default.

        Raises:
            UnsupportedModelError: It has no attention to read.
        """
        self.name = name or model.name_or_path or type(model).__name__
        self.turn = threading.Lock()
        self._view = tapped_view(model)
        self.heads = readable_heads(self._view, model)
        self.encoder = PromptEncoder(tokenizer)
        config = model.config.get_text_config(decoder=True)
        self.max_tokens: int | None = getattr(config, "max_position_embeddings", None)

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        local_files_only: bool = False,
    ) -> FrozenLM:
        """Load an LLM and its tokenizer.

        Args:
            model: ``"embedded"``, a Hub id such as ``"Qwen/Qwen3-0.6B"``, a local directory, or a
                ``.gguf`` file.
            device: ``None`` picks cuda, then mps, then cpu.
            dtype: ``"auto"`` takes bfloat16 where the device is measured to be fast at it and
                float32 elsewhere.
            local_files_only: Never ask the Hub, use what is in its local cache.

        Raises:
            ModelLoadError: Nothing of that name can be loaded.
            MissingExtraError: A package that this kind of file needs is not installed.
            UnsupportedModelError: It has no attention to read.
            InputError: The device or dtype does not exist.
        """
        check_text("model", model)
        place = pick_device(device)
        number_format = pick_dtype(dtype, place)
        loaded = load_model(
            model, dtype=number_format, device=place, local_files_only=local_files_only
        )
        tokenizer = load_tokenizer(model, local_files_only=local_files_only)
        return cls(loaded, tokenizer, name=model)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._view.device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of its parameters."""
        return self._view.dtype

    @property
    def num_layers(self) -> int:
        """How many layers the LLM has, readable or not."""
        return int(self._view.config.get_text_config(decoder=True).num_hidden_layers)

    @torch.inference_mode()
    def embed(
        self, texts: Sequence[str], *, layer: int | None = None, max_tokens: int | None = 512
    ) -> Tensor:
        """Embed texts for a dense first stage: the mean of a layer's states over the tokens.

        A few coordinates of an LLM's states are tens of times larger than the others, in every text
        alike: shift and scale every coordinate by its mean and deviation over the corpus
        (``Standardiser``) before comparing.

        Args:
            texts: What to embed; a blank text gives zeros.
            layer: After how many layers to look; ``None`` for four fifths of them.
            max_tokens: Longer texts are cut here.

        Returns:
            Shape (texts, width), float32, on the CPU, not normalised.

        Raises:
            InputError: There is no such layer.
        """
        layer = round(0.8 * self.num_layers) if layer is None else layer
        if not 0 <= layer <= self.num_layers:
            raise InputError(
                f"layer={layer} is not a layer of {self.name!r}; give 0 to {self.num_layers}."
            )
        encoded = self.encoder.plain([text.strip() for text in texts], max_tokens)
        # Longest first, so that a batch is padded little and the largest comes before all others.
        order = sorted(range(len(texts)), key=lambda place: -len(encoded[place]))
        found: list[Tensor | None] = [None] * len(texts)
        while order:
            size = max(1, _BATCH_TOKENS // len(encoded[order[0]]))
            batch, order = order[:size], order[size:]
            with self.turn:
                means = self._means([encoded[place] for place in batch], layer)
            for place, mean in zip(batch, means, strict=True):
                found[place] = mean
        width = int(self._view.config.get_text_config(decoder=True).hidden_size)
        return torch.stack(cast(list[Tensor], found)) if found else torch.empty(0, width)

    def _means(self, sequences: list[tuple[int, ...]], layer: int) -> Tensor:
        """Mean state of every sequence but for its first token, which all others lean on."""
        ids, lengths = self._padded(sequences)
        states = self._view(input_ids=ids, output_hidden_states=True, use_cache=False)
        kept = torch.arange(ids.shape[1], device=self.device)[None]
        kept = ((kept > 0) & (kept < lengths[:, None])).to(torch.float32)
        sums = (states.hidden_states[layer].float() * kept[..., None]).sum(dim=1)
        means: Tensor = sums / kept.sum(dim=1, keepdim=True).clamp(min=1)
        return means.cpu()

    def _padded(self, sequences: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        """Pad on the right, where the causal mask keeps padding out of sight by itself."""
        width = max(len(ids) for ids in sequences)
        rows = [list(ids) + [ids[-1]] * (width - len(ids)) for ids in sequences]
        lengths = torch.tensor([len(ids) for ids in sequences], device=self.device)
        return torch.tensor(rows, device=self.device), lengths

    @torch.inference_mode()
    def prefill(self, ids: Tensor, *, last_layer: int) -> DynamicCache:
        """Run tokens once and keep what later tokens need of them.

        Args:
            ids: Token ids, shape (1, tokens).
            last_layer: Keys and values are kept up to this layer; no deeper layer is run.
        """
        # Without a configuration every layer keeps all keys, also where a window hides some of
        # them: the tail's masks do the hiding.
        cache = DynamicCache()
        tap = Tap(HeadSet(()), row_weights=None, keys=0, last_layer=last_layer)
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        run(self._view, ids, positions, cache, tap)
        return cache

    @torch.inference_mode()
    def read(
        self, cache: DynamicCache, tails: list[tuple[int, ...]], heads: HeadSet, *, start: int
    ) -> Tensor:
        """Attention of several tails to the tokens in a cache, in one batched pass.

        Args:
            cache: From ``prefill``; left as it is.
            tails: Token ids of each tail; every tail sees the cache and itself only.
            heads: The heads to read, none deeper than the cache.
            start: Position of the tails' first token.

        Returns:
            Mean over a tail's tokens, float32, shape (tails, heads, tokens in the cache).
        """
        ids, lengths = self._padded(tails)
        columns = torch.arange(ids.shape[1], device=self.device)[None]
        row_weights = (columns < lengths[:, None]) / lengths[:, None]
        tap = Tap(heads, row_weights, keys=cache.get_seq_length(), last_layer=heads.last_layer)
        positions = (start + columns).expand(len(tails), -1)
        run(self._view, ids, positions, fork(cache, len(tails)), tap)
        return tap.result()
