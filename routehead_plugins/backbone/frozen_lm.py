"""The frozen LLM: run documents once, and read the attention of the tails behind them."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, Unpack, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from routehead_plugins.backbone.adapter import (
    PROJECTIONS,
    Adapter,
    inject,
    new_adapter,
    without_gradients,
)
from routehead_plugins.backbone.attention import (
    Rows,
    Tap,
    decoder_of,
    layers_of,
    readable_heads,
    run,
)
from routehead_plugins.backbone.device import pick_device, pick_dtype
from routehead_plugins.backbone.isolation import isolated
from routehead_plugins.backbone.kv_cache import KeyValues, added, joined
from routehead_plugins.backbone.loading import check_loaded, load
from routehead_plugins.backbone.model_state import ModelState, Weights, fingerprint
from routehead_plugins.backbone.probe import check_is_decoder, check_reading, refusing
from routehead_plugins.backbone.prompt import PromptEncoder
from routehead_plugins.backbone.rotary import PromptLength, longest_prompt
from routehead_plugins.backbone.tail_queries import KeyColumns, TailQueries
from routehead_plugins.backbone.text_tasks import TextTasks
from routehead_plugins.backbone.token_tree import token_tree
from routehead_plugins.backbone.view import recomputing, tapped_view
from routehead_plugins.data import check_text
from routehead_plugins.errors import InputError, UnsupportedModelError, short_repr
from routehead_plugins.heads import HeadSet
from routehead_plugins.options import LoadOptions, LoadValues, RerankerOptions


class FrozenLM(TextTasks):
    """A decoder whose weights, configuration and hooks stay as they are.

    One thread uses it at a time: one query already keeps the device busy, and the prefixes of
    sixteen at once would fill its memory. The lock is inside; callers take none.

    The model stays its owner's, who may change it between two calls, but not during one: merge,
    disable, exchange or scale an adapter, replace layers, set attributes, move it. The next call
    reads the model as it then is, apart from its hooks and its training mode, as if it had been
    wrapped then; or it raises ``UnsupportedModelError``.

    Attributes:
        name: Name under which the LLM was loaded.
        heads: Every head that can be read.
        encoder: Builder of its prompts.
        num_layers: Number of layers, loaded or not.
        width: Size of a hidden state.
        max_tokens: Longest sequence it accepts; ``None`` if its configuration sets no limit.
        adapter: The LoRA adapter that it is read with, as it was given; ``None`` for none.

    Where rotary factors depend on the length of the prompt (LongRoPE, dynamic NTK), all documents
    and tails of a prompt are rotated as its longest tail asks for.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        name: str | None = None,
        adapter: Adapter | str | os.PathLike[str] | None = None,
    ) -> None:
        """Wrap a model that is already loaded.

        Args:
            model: A decoder of transformers, on its device and in its dtype; left as it is.
            tokenizer: Its tokenizer; left as it is.
            name: Name to give it; the model's own ``name_or_path`` by default.
            adapter: A LoRA adapter to read it with, the adapter's folder, or its id on the Hub. It
                stays outside of the model, which others may read with other adapters.

        Raises:
            InputError: It is not a model or not a tokenizer.
            UnsupportedModelError: It has no attention to read, its weights are not all in the
                memory of one device, or the adapter is for another LLM.
            ModelLoadError: There is no such adapter.
            MissingExtraError: peft is needed for the adapter, and not installed.
        """
        check_loaded(model)
        check_is_decoder(model)
        self.name = name or model.name_or_path or type(model).__name__
        self._model = model
        self._lock = threading.RLock()
        self._wrap(adapter)
        vocabulary: int | None = None
        with suppress(NotImplementedError):  # some families have a table of another kind
            vocabulary = getattr(self._whole.get_input_embeddings(), "num_embeddings", None)
        self.encoder = PromptEncoder(tokenizer, vocabulary)

    def _wrap(self, adapter: Adapter | str | os.PathLike[str] | None) -> None:
        """Build the view for the first time."""
        if adapter is not None and not isinstance(adapter, Adapter):
            adapter = Adapter.from_pretrained(adapter)
        self.adapter = adapter
        self._factors: dict[str, nn.Parameter] = {}  # of the adapter
        self._entered = False  # whether a thread holds the lock
        self._state: ModelState | None = None
        with self._exclusive():
            pass

    def with_adapter(self, adapter: Adapter | str | os.PathLike[str] | None) -> FrozenLM:
        """Read the same model with another adapter, or with none; both share its memory.

        Args:
            adapter: The adapter, its folder, or its id on the Hub; ``None`` for none.

        Raises:
            InputError: It is neither.
            UnsupportedModelError: The adapter is for another LLM.
            ModelLoadError: There is no such adapter.
            MissingExtraError: peft is not installed.
        """
        other = copy.copy(self)  # with the lock: one query at a time runs in the memory of a model
        other._wrap(adapter)
        return other

    def new_adapter(
        self,
        layers: Sequence[int],
        *,
        rank: int = 16,
        alpha: float = 32.0,
        projections: Sequence[str] = PROJECTIONS,
        name: str = "new",
        seed: int = 0,
    ) -> Adapter:
        """Make an adapter of the LLM that changes nothing yet; see ``adapter.new_adapter``.

        Raises:
            UnsupportedModelError: These layers have no such projections.
        """
        with self._exclusive():
            adapter = new_adapter(
                name,
                tapped_view(self._model),
                layers=layers,
                rank=rank,
                alpha=alpha,
                projections=projections,
                seed=seed,
            )
        return replace(adapter, config={**adapter.config, "base_model_name_or_path": self.name})

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        layers: Callable[[int], int] | None = None,
        adapter: Adapter | str | os.PathLike[str] | None = None,
        **options: Unpack[LoadValues],
    ) -> FrozenLM:
        """Load an LLM and its tokenizer.

        Args:
            model: ``"embedded"``, a Hub id, a local directory, or a ``.gguf`` file; a path may be a
                ``pathlib.Path``.
            device: ``None`` picks cuda, then mps, then cpu.
            dtype: ``"auto"`` takes bfloat16 where the device is fast at it, float32 elsewhere.
            layers: Maps the model's depth to the number of leading layers to load; ``None``: all.
            adapter: A LoRA adapter, its folder, or its id on the Hub.
            **options: ``local_files_only``, ``revision``, ``token``, ``cache_dir``,
                ``trust_remote_code`` and ``model_kwargs``; see ``RerankerOptions``.

        Raises:
            ModelLoadError: No LLM of that name can be loaded.
            MissingExtraError: A package that this kind of file needs is not installed.
            UnsupportedModelError: It has no attention to read.
            InputError: An argument cannot be used.
        """
        model = os.fspath(model) if isinstance(model, os.PathLike) else model
        check_text("model", model)
        if layers is not None and not callable(layers):
            raise InputError(f"layers={short_repr(layers)} must be a function, or None.")
        if adapter is not None and not isinstance(adapter, Adapter):
            adapter = Adapter.from_pretrained(adapter, **LoadOptions(**options).hub)
        picked_device = pick_device(device)
        with isolated(picked_device):
            loaded, tokenizer = load(
                model,
                dtype=pick_dtype(dtype, picked_device),
                device=picked_device,
                layers=None if layers is None else partial(_at_most, layers),
                **options,
            )
        return cls(loaded, tokenizer, name=model, adapter=adapter)

    @classmethod
    def from_options(
        cls, options: RerankerOptions, layers: Callable[[int], int] | None = None
    ) -> FrozenLM:
        """Load the LLM that the options name; see ``from_pretrained``."""
        return cls.from_pretrained(
            options.model,
            device=options.device,
            dtype=options.dtype,
            layers=layers,
            adapter=options.adapter,
            local_files_only=options.local_files_only,
            revision=options.revision,
            token=options.token,
            cache_dir=options.cache_dir,
            trust_remote_code=options.trust_remote_code,
            model_kwargs=options.model_kwargs,
        )

    @property
    def adapter_label(self) -> str | None:
        """Label of the adapter, for records and messages; ``None`` for none."""
        return None if self.adapter is None else self.adapter.label

    @property
    def heads(self) -> HeadSet:
        """Every head that can be read."""
        # A thread that uses the LLM now has looked for changes of the model.
        if self._lock.acquire(blocking=False):
            try:
                with self._exclusive():
                    return self._heads
            finally:
                self._lock.release()
        return self._heads

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self._view.device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the parameters."""
        return self._view.dtype

    @property
    def cache_key(self) -> Hashable:
        """Cache key that changes whenever the model computes otherwise.

        Changes of modules, attributes and configuration are noticed, and of weights by any
        operation on them. Writing into ``.data`` is noticed where many values of a tensor change.
        """
        with self._exclusive():
            factors = [(tensor.data_ptr(), tensor._version) for tensor in self._factors.values()]
            return self._identity, self._weights.key(), tuple(factors)

    def fingerprint(self, last_layer: int) -> str:
        """Return a digest of the embeddings and the first layers, for records on disk.

        It does not depend on the number format in which the weights were loaded, nor on how many
        layers were. It is made from some values of every tensor.

        Args:
            last_layer: The deepest layer that counts.
        """
        with self._exclusive():
            parts: list[nn.Module] = list(layers_of(self._view)[: last_layer + 1])
            with suppress(NotImplementedError):  # some families have a table of another kind
                parts.insert(0, self._view.get_input_embeddings())
            own = {id(factor) for factor in self._factors.values()}
            tensors = (tensor for part in parts for tensor in part.parameters())
            digest = fingerprint(tensor for tensor in tensors if id(tensor) not in own)
            # All of the adapter counts, though it may reach deeper: it was trained as one.
            return digest if self.adapter is None else f"{digest}+{self.adapter.fingerprint}"

    @contextmanager
    def gradients(self, *, checkpoints: bool = False) -> Iterator[Gradients]:
        """Lend passes that gradients flow through, to one thread at a time.

        The adapter's factors get gradients, in float32 whatever the LLM's dtype; the LLM's weights
        are constants. Call ``backward`` before this ends.

        Args:
            checkpoints: Whether a layer's intermediate results are computed again for its
                gradients (arXiv 1604.06174), which takes a third more time and far less memory.

        Yields:
            The passes.
        """
        with self._exclusive(), without_gradients(self._whole), ExitStack() as stack:
            if checkpoints:
                stack.enter_context(recomputing(layers_of(self._view)))
            yield Gradients(self)

    @torch.inference_mode()
    def prefill(
        self,
        sequences: Sequence[tuple[int, ...]],
        *,
        last_layer: int,
        behind: KeyValues | None = None,
        length: int | None = None,
    ) -> list[KeyValues]:
        """Run sequences once, each on its own, and keep what later tokens need of them.

        Args:
            sequences: Token ids; run as one batch, padded to the longest.
            last_layer: The deepest layer to run and to keep keys and values of.
            behind: A prefix that every sequence follows and looks back at.
            length: Number of tokens of the prompt up to the end of its longest tail; ``None`` if
                the longest sequence ends it. See ``rotary_key``.

        Returns:
            Keys and values of each sequence, without those of the prefix.
        """
        return self._prefill(sequences, last_layer=last_layer, behind=behind, length=length)

    def _prefill(
        self,
        sequences: Sequence[tuple[int, ...]],
        *,
        last_layer: int,
        behind: KeyValues | None = None,
        length: int | None = None,
    ) -> list[KeyValues]:
        """The same, in the caller's mode."""
        with self._exclusive():
            ids = self._pad(sequences)
            start = 0 if behind is None else behind.end
            length = start + ids.shape[1] if length is None else length
            past = [] if behind is None else [behind]
            cache = joined(past, last_layer=last_layer, batch=len(sequences))
            positions = torch.arange(start, start + ids.shape[1], device=self.device)
            with self._length.set_to(length):
                run(self._view, ids, positions.expand(len(ids), -1), cache, Tap(last_layer))
            return added(cache, [len(sequence) for sequence in sequences], start=start)

    @torch.inference_mode()
    def read(
        self,
        context: Callable[[], Sequence[KeyValues]],
        tails: Sequence[tuple[int, ...]],
        heads: HeadSet,
        *,
        start: int | None = None,
    ) -> Tensor:
        """Read the attention of several tails to the tokens before them, in one pass.

        Args:
            context: Returns the pieces of keys and values to look back at. Called while no other
                thread uses the LLM, so that many threads hold the context of one query at a time.
            tails: Token ids of each tail; a tail sees the context and itself only.
            heads: Heads to read, none deeper than the context.
            start: Position of the tails' first token; ``None`` for the end of the context.

        Returns:
            Mean over a tail's tokens, float32, shape (tails, heads, tokens of all pieces).

        Raises:
            HeadError: The LLM does not have these heads.
        """
        return self._read(context, tails, heads, start=start)

    def _read(
        self,
        context: Callable[[], Sequence[KeyValues]],
        tails: Sequence[tuple[int, ...]],
        heads: HeadSet,
        *,
        start: int | None = None,
    ) -> Tensor:
        """The same, in the caller's mode."""
        with self._exclusive():
            heads.check_within(self._heads, self.name)
            tree = token_tree(tails)
            past = context()
            start = max(piece.end for piece in past) if start is None else start
            ids, depths = tree.ids.to(self.device)[None], (start + tree.depths).to(self.device)
            rows = Rows(
                weights=tree.weights.to(self.device),
                positions=depths,
                sees=tree.sees.to(self.device),
                past=torch.cat([torch.arange(p.start, p.end) for p in past]).to(self.device),
            )
            tap = Tap(heads.last_layer, heads, rows)
            cache = joined(past, last_layer=tap.last_layer)
            with self._length.set_to(start + max(map(len, tails))):
                run(self._view, ids, depths[None], cache, tap)
            return tap.result()

    @torch.inference_mode()
    def tail_queries(
        self,
        prefix: KeyValues,
        tail: tuple[int, ...],
        heads: HeadSet,
        *,
        start: int,
        length: int,
        states_before: int | None = None,
    ) -> TailQueries:
        """Run a tail behind a prefix alone, and keep what it asks of documents at some heads.

        Args:
            prefix: Keys and values of the prefix, as deep as the heads and ``states_before``.
            tail: Token ids.
            heads: Heads whose queries to keep.
            start: Position of the tail's first token, beyond the documents that may stand between.
            length: Number of tokens of the prompt, for rotary factors that depend on it.
            states_before: Layer before which the tail's hidden states are kept as well; ``None``
                keeps none.

        Raises:
            HeadError: The LLM does not have these heads.
        """
        return self._tail_queries(
            prefix, [tail], heads, start=start, length=length, states_before=states_before
        )

    def _tail_queries(
        self,
        prefix: KeyValues,
        tails: Sequence[tuple[int, ...]],
        heads: HeadSet,
        *,
        start: int,
        length: int,
        states_before: int | None = None,
    ) -> TailQueries:
        """The same for several tails in one pass, in the caller's mode."""
        with self._exclusive():
            heads.check_within(self._heads, self.name)
            tree = token_tree(tails)
            positions = (start + tree.depths).to(self.device)
            past = torch.arange(prefix.start, prefix.end, device=self.device)
            rows = Rows(
                weights=tree.weights.to(self.device),
                positions=positions,
                sees=tree.sees.to(self.device),
                past=past,
                claimed=start,
            )
            last_layer = max(heads.last_layer, states_before or 0)
            tap = Tap(last_layer, heads, rows, states_before, keeps_queries=True)
            # As if documents stood in between: a layer with a window says so only if they may be
            # beyond it.
            cache = joined([prefix], last_layer=tap.last_layer, past=start)
            ids = tree.ids.to(self.device)[None]
            with self._length.set_to(length):
                run(self._view, ids, positions[None], cache, tap)
            states = None if tap.states is None else tap.states[0].float()
            return TailQueries(tap.queries, rows.weights, states)

    def key_columns(self, heads: HeadSet) -> KeyColumns:
        """Return the keys of documents that some heads are compared with.

        Raises:
            HeadError: The LLM does not have these heads.
        """
        with self._exclusive():
            heads.check_within(self._heads, self.name)
            return KeyColumns.of(heads, self._heads, self._key_shapes)

    @torch.inference_mode()
    def hidden_states(
        self, sequences: Sequence[tuple[int, ...]], layer: int
    ) -> tuple[Tensor, Tensor]:
        """Run sequences, as one batch padded on the right, through the first layers only.

        Args:
            sequences: Token ids.
            layer: Number of layers to run.

        Returns:
            States of shape (sequences, tokens, width), and lengths of shape (sequences,).
        """
        with self._exclusive():
            groups = self.rotated_alike([len(ids) for ids in sequences])
            parts = [self._states([sequences[i] for i in group], layer) for group in groups]
            lengths = torch.tensor([len(ids) for ids in sequences], device=self.device)
            if len(parts) == 1:
                return parts[0], lengths
            shape = len(sequences), max(map(len, sequences)), self.width
            states = parts[0].new_zeros(shape)
            for group, part in zip(groups, parts, strict=True):
                states[group, : part.shape[1]] = part
            return states, lengths

    def _states(self, sequences: Sequence[tuple[int, ...]], layer: int) -> Tensor:
        """Run sequences that are rotated alike through the first layers."""
        ids = self._pad(sequences)
        with self._length.set_to(ids.shape[1]):
            if layer == self.num_layers:
                return cast(Tensor, self._view(input_ids=ids, use_cache=False).last_hidden_state)
            tap = Tap(last_layer=layer, states_before=layer)
            positions = torch.arange(ids.shape[1], device=self.device).expand(len(ids), -1)
            run(self._view, ids, positions, joined([], last_layer=layer), tap)
            return cast(Tensor, tap.states)

    def rotary_key(self, length: int) -> Hashable:
        """Return a key that is equal for prompts whose tokens are rotated alike.

        Keys and values that are kept for other prompts depend on it, beside ``cache_key``. It is
        ``None`` for nearly all LLMs; with LongRoPE it changes once, and with dynamic NTK at every
        length beyond the original one.

        Args:
            length: Number of tokens of the prompt up to the end of its longest tail.
        """
        if not self._length.matters:
            return None
        with self._exclusive():
            return self._length.key(length)

    @contextmanager
    def causal_lm(self, purpose: str, *, length: int | None = None) -> Iterator[PreTrainedModel]:
        """Lend the whole model, with its output projection, to one thread at a time.

        Args:
            purpose: What fails without it, for the error, such as ``"cannot write"``.
            length: Number of tokens that a sequence may reach over several forwards, for rotary
                factors that depend on it; ``None`` if each forward runs whole sequences.

        Yields:
            The model, while no other thread uses it.

        Raises:
            UnsupportedModelError: The last layers or the output projection were not loaded.
        """
        with self._exclusive(), self._length.set_to(length):
            deepest, projection = self._heads.last_layer, self._whole.get_output_embeddings()
            if deepest + 1 < self.num_layers or not projection:
                raise UnsupportedModelError(
                    f"{self.name!r} was loaded without its last layers or its output projection "
                    f"and {purpose}; load the whole causal LLM."
                )
            yield self._whole

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Keep other threads out, and the settings that this thread makes for other models.

        Whoever enters first sees the model as it is now.
        """
        with self._lock:
            first, self._entered = not self._entered, True
            try:
                if first:
                    self._follow()
                with isolated(self.device):
                    yield
            finally:
                if first:
                    self._entered = False

    def _follow(self) -> None:
        """Build the view, or build it anew if the model has changed since."""
        if self._state is not None and self._state.holds:
            return
        state = ModelState(self._model)
        if state != self._state:
            self._state = None  # until it is known that the model can be read
            self._identity = object()
            self._weights = Weights(self._model)
            with isolated(self._model.device), refusing(self._model):
                self._whole = tapped_view(self._model)
                if self.adapter is not None:
                    inject(self._whole, self.adapter, self._factors)
                self._view = decoder_of(self._whole)
                self._length = PromptLength(self._whole)
                self._heads, self._key_shapes = readable_heads(self._whole)
                config = self._whole.config.get_text_config(decoder=True)
                self.num_layers = int(config.num_hidden_layers)
                self.width = int(config.hidden_size)
                self.max_tokens = longest_prompt(config)
                check_reading(self._whole, self._heads, self)
        self._state = state

    def _pad(self, sequences: Sequence[tuple[int, ...]]) -> Tensor:
        """Pad on the right, where the causal mask alone keeps padding out of sight."""
        longest = max(map(len, sequences))
        rows = [ids + ids[-1:] * (longest - len(ids)) for ids in sequences]
        return torch.tensor(rows, device=self.device)


class Gradients:
    """Passes of a ``FrozenLM`` that gradients flow through; see ``FrozenLM.gradients``.

    Attributes:
        factors: Parameters of the adapter, float32, by their names in files.
    """

    def __init__(self, llm: FrozenLM) -> None:
        """Take the passes of an LLM; use ``FrozenLM.gradients``."""
        self._llm = llm
        self.factors = llm._factors

    def prefill(
        self,
        sequences: Sequence[tuple[int, ...]],
        *,
        last_layer: int,
        behind: KeyValues | None = None,
        length: int | None = None,
    ) -> list[KeyValues]:
        """Run sequences; see ``FrozenLM.prefill``."""
        return self._llm._prefill(sequences, last_layer=last_layer, behind=behind, length=length)

    def read(
        self, context: Sequence[KeyValues], tails: Sequence[tuple[int, ...]], heads: HeadSet
    ) -> Tensor:
        """Read the attention of tails to the tokens before them; see ``FrozenLM.read``."""
        return self._llm._read(lambda: context, tails, heads)

    def tail_queries(
        self,
        prefix: KeyValues,
        tails: Sequence[tuple[int, ...]],
        heads: HeadSet,
        *,
        start: int,
        length: int,
    ) -> TailQueries:
        """Run several tails in one pass, each of them behind the prefix alone.

        Tokens that tails share run once; see ``FrozenLM.tail_queries``.
        """
        return self._llm._tail_queries(prefix, tails, heads, start=start, length=length)

    def adapter(self, name: str) -> Adapter:
        """Copy the adapter as it is now, under a name of its own."""
        adapter = self._llm.adapter
        if adapter is None:
            raise UnsupportedModelError(f"{self._llm.name!r} has no adapter; give it one.")
        # Those of layers that were not loaded stay as they were.
        weights = dict(adapter.weights)
        weights |= {key: factor.detach().cpu().clone() for key, factor in self.factors.items()}
        return replace(adapter, name=name, weights=weights)


def _at_most(layers: Callable[[int], int], total: int) -> int:
    """Count layers, but no more than there are: ``HeadSet.check_within`` reports heads beyond."""
    count: Any = layers(total)
    return min(total, count) if isinstance(count, int) else count
