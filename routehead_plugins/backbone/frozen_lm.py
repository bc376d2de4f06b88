"""The frozen LLM: what of it is run, and what is read from it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from routehead_plugins.backbone.attention import Rows, Tap, readable_heads, run, tapped_view
from routehead_plugins.backbone.batching import batches
from routehead_plugins.backbone.device import pick_device, pick_dtype
from routehead_plugins.backbone.embedding import check_pooling, pooled
from routehead_plugins.backbone.generation import sample
from routehead_plugins.backbone.kv_cache import KeyValues, added, joined
from routehead_plugins.backbone.loading import load
from routehead_plugins.backbone.prompt import PromptEncoder
from routehead_plugins.backbone.token_tree import token_tree
from routehead_plugins.data import check_text
from routehead_plugins.errors import InputError, UnsupportedModelError
from routehead_plugins.heads import HeadSet

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
        self._identity = object()
        self._whole = tapped_view(model)
        self._view = cast(PreTrainedModel, self._whole.get_decoder())
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
        layers: Callable[[int], int] | None = None,
    ) -> FrozenLM:
        """Load an LLM and its tokenizer.

        Args:
            model: ``"embedded"``, a Hub id such as ``"Qwen/Qwen3-0.6B"``, a local directory, or a
                ``.gguf`` file.
            device: ``None`` picks cuda, then mps, then cpu.
            dtype: ``"auto"`` takes bfloat16 where the device is measured to be fast at it and
                float32 elsewhere.
            local_files_only: Never ask the Hub, use what is in its local cache.
            layers: Told how many layers the LLM has, says how many of the leading ones are needed;
                no deeper one is loaded, nor can be read.

        Raises:
            ModelLoadError: Nothing of that name can be loaded.
            MissingExtraError: A package that this kind of file needs is not installed.
            UnsupportedModelError: It has no attention to read.
            InputError: The device or dtype does not exist.
        """
        check_text("model", model)
        place = pick_device(device)
        number_format = pick_dtype(dtype, place)
        loaded, tokenizer = load(
            model,
            dtype=number_format,
            device=place,
            local_files_only=local_files_only,
            # Heads beyond the last layer are for ``HeadSet.check_within`` to complain of.
            layers=None if layers is None else lambda total: min(total, layers(total)),
        )
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
        self,
        texts: Sequence[str],
        *,
        layer: int | None = None,
        pooling: str = "mean",
        max_tokens: int | None = 512,
    ) -> Tensor:
        """Embed texts for a dense first stage, or for a router: a layer's states, pooled.

        A few coordinates of an LLM's states are tens of times larger than the others, in every text
        alike: shift and scale every coordinate by its mean and deviation over the corpus
        (``Standardiser``) before comparing.

        Args:
            texts: What to embed; a blank text gives zeros.
            layer: After how many layers to look; ``None`` for four fifths of them.
            pooling: The ``"mean"`` of all tokens but the first, or the ``"last"`` token's state.
            max_tokens: Longer texts are cut here.

        Returns:
            Shape (texts, width), float32, on the CPU, not normalised.

        Raises:
            InputError: There is no such layer or pooling.
        """
        check_pooling(pooling)
        layer = round(0.8 * self.num_layers) if layer is None else layer
        loaded = self.heads.last_layer + 1
        # States behind the last layer that was loaded are normalised, others are not.
        deepest = loaded if loaded == self.num_layers else loaded - 1
        if not 0 <= layer <= deepest:
            raise InputError(f"layer={layer} is not a layer of {self.name!r}; give 0 to {deepest}.")
        encoded = self.encoder.plain([text.strip() for text in texts], max_tokens)
        found: list[Tensor | None] = [None] * len(texts)
        for batch in batches([len(ids) for ids in encoded], _BATCH_TOKENS):
            ids, lengths = self._padded([encoded[place] for place in batch])
            with self.turn:
                embedded = pooled(self._states(ids, layer), lengths, pooling).cpu()
            for place, each in zip(batch, embedded, strict=True):
                found[place] = each
        width = int(self._view.config.get_text_config(decoder=True).hidden_size)
        return torch.stack(cast(list[Tensor], found)) if found else torch.empty(0, width)

    def _states(self, ids: Tensor, layer: int) -> Tensor:
        """States after so many layers, shape (batch, tokens, width); no deeper layer is run."""
        if layer == self.num_layers:
            last: Tensor = self._view(input_ids=ids, use_cache=False).last_hidden_state
            return last
        tap = Tap(last_layer=layer, states_before=layer)
        positions = torch.arange(ids.shape[1], device=self.device).expand(len(ids), -1)
        run(self._view, ids, positions, joined([], last_layer=layer), tap)
        return cast(Tensor, tap.states)

    def _padded(self, sequences: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        """Pad on the right, where the causal mask keeps padding out of sight by itself."""
        width = max(len(ids) for ids in sequences)
        rows = [list(ids) + [ids[-1]] * (width - len(ids)) for ids in sequences]
        lengths = torch.tensor([len(ids) for ids in sequences], device=self.device)
        return torch.tensor(rows, device=self.device), lengths

    @torch.inference_mode()
    def log_likelihoods(
        self, contexts: Sequence[tuple[int, ...]], target: tuple[int, ...]
    ) -> Tensor:
        """How likely the same continuation is behind each of several contexts.

        Args:
            contexts: Token ids, none of them empty.
            target: Token ids of the continuation.

        Returns:
            Sum over the target's tokens of the natural logarithm, shape (contexts,), on the CPU.

        Raises:
            UnsupportedModelError: Its last layers or its output projection were not loaded.
        """
        self._check_whole("cannot tell likelihoods")
        found = torch.empty(len(contexts))
        lengths = [len(context) + len(target) for context in contexts]
        for batch in batches(lengths, _BATCH_TOKENS):
            with self.turn:
                found[batch] = self._log_likelihoods([contexts[p] for p in batch], target)
        return found

    def _check_whole(self, failing: str) -> None:
        if self.heads.last_layer + 1 < self.num_layers or not self._whole.get_output_embeddings():
            raise UnsupportedModelError(
                f"{self.name!r} was loaded without its last layers or its output projection and "
                f"{failing}; load all of a causal LLM."
            )

    def write(
        self,
        prefix: str,
        prompts: Sequence[str],
        *,
        max_tokens: int,
        temperature: float,
        seed: int,
    ) -> list[str]:
        """Continue several texts behind one prefix to the end of the line, all in one batch.

        Args:
            prefix: What every prompt stands behind, such as examples.
            prompts: None of them empty.
            max_tokens: Length of what is written, at most.
            temperature: Of the softmax; 0 takes the likeliest token.
            seed: The same one gives the same texts.

        Returns:
            One line per prompt, maybe empty; cut where it became too long.

        Raises:
            UnsupportedModelError: Its last layers or its output projection were not loaded.
        """
        self._check_whole("cannot write")
        decode, ends = self.encoder.decode, self.encoder.control_ids
        with self.turn:
            found = sample(
                self._whole,
                self.encoder.plain([prefix])[0],
                self.encoder.encode(prompts),
                max_tokens=max_tokens,
                temperature=temperature,
                generator=torch.Generator().manual_seed(seed),
                ended=lambda ids: ids[-1] in ends or "\n" in decode(ids).lstrip(),
            )
        return [decode(ids).strip().partition("\n")[0].strip() for ids in found]

    def _log_likelihoods(
        self, contexts: Sequence[tuple[int, ...]], target: tuple[int, ...]
    ) -> Tensor:
        """Pad on the left, so that the target stands in the same columns of every row."""
        width = max(map(len, contexts))
        blanks = [width - len(context) for context in contexts]
        rows = [
            [context[0]] * blank + [*context, *target[:-1]]
            for context, blank in zip(contexts, blanks, strict=True)
        ]
        columns = torch.arange(len(rows[0]), device=self.device)[None]
        unpadded = columns - torch.tensor(blanks, device=self.device)[:, None]
        output = self._whole(
            input_ids=torch.tensor(rows, device=self.device),
            attention_mask=(unpadded >= 0).long(),
            position_ids=unpadded.clamp(min=0),
            use_cache=False,
            logits_to_keep=len(target),
        )
        logs = output.logits[:, -len(target) :].float().log_softmax(dim=-1)
        wanted = torch.tensor(target, device=self.device)[None, :, None].expand(len(rows), -1, -1)
        sums: Tensor = logs.gather(2, wanted).sum(dim=(1, 2))
        return sums.cpu()

    @property
    def state(self) -> Hashable:
        """Something that is different once the weights are: what keys and values are kept under.

        Optimizers, ``load_state_dict`` and ``to`` are noticed, writing into ``.data`` is not.
        """
        weights = self._view.parameters()
        # Tensors made in inference mode count no versions.
        versions = ((w.data_ptr(), -1 if w.is_inference() else w._version) for w in weights)
        return self._identity, tuple(versions)

    @torch.inference_mode()
    def prefill(
        self,
        sequences: Sequence[tuple[int, ...]],
        *,
        last_layer: int,
        behind: KeyValues | None = None,
    ) -> list[KeyValues]:
        """Run sequences once, each on its own, and keep what later tokens need of them.

        Args:
            sequences: Token ids; run as one batch, padded to the longest.
            last_layer: Keys and values are kept up to this layer; no deeper layer is run.
            behind: What every sequence stands behind and looks back at.

        Returns:
            One per sequence; without what they stand behind.
        """
        ids, _ = self._padded(sequences)
        start = 0 if behind is None else behind.end
        past = [] if behind is None else [behind]
        cache = joined(past, last_layer=last_layer, batch=len(sequences))
        positions = torch.arange(start, start + ids.shape[1], device=self.device)
        run(self._view, ids, positions.expand(len(ids), -1), cache, Tap(last_layer))
        return added(cache, [len(sequence) for sequence in sequences], start=start)

    @torch.inference_mode()
    def read(
        self,
        past: Sequence[KeyValues],
        tails: Sequence[tuple[int, ...]],
        heads: HeadSet,
        *,
        start: int,
    ) -> Tensor:
        """Attention of several tails to the tokens before them, in one pass.

        Args:
            past: From ``prefill``, in any number of pieces; left as they are.
            tails: Token ids of each tail; every tail sees what is past and itself only.
            heads: The heads to read, none deeper than what is past.
            start: Position of the tails' first token.

        Returns:
            Mean over a tail's tokens, float32, shape (tails, heads, tokens of all pieces).
        """
        tree = token_tree(tails)
        ids, positions = tree.ids.to(self.device)[None], (start + tree.depths).to(self.device)
        places = [torch.arange(piece.start, piece.end) for piece in past]
        rows = Rows(
            weights=tree.weights.to(self.device),
            positions=positions,
            sees=tree.sees.to(self.device),
            past=torch.cat(places).to(self.device),
        )
        tap = Tap(heads.last_layer, heads, rows)
        run(self._view, ids, positions[None], joined(past, last_layer=tap.last_layer), tap)
        return tap.result()
