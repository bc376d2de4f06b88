"""The LLM that all methods share, with its heads and prompts, and the interface of a method."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.initialization import no_init_weights

from benchmarks.latency.memory import available_bytes
from benchmarks.latency.options import BYTES, Options
from benchmarks.latency.shapes import SHAPES
from routehead_plugins import FrozenLM, HeadSet
from routehead_plugins.backbone import (
    Pieces,
    TokenCache,
    load,
    load_tokenizer,
    pick_device,
    pick_dtype,
)
from routehead_plugins.data import Span
from routehead_plugins.errors import InputError
from routehead_plugins.selection import as_selector

_HEADS = 16  # as many as QRHead reads in LLMs below ten billion parameters
# Longer than the queries that are used, so that all of them fit the same windows.
LONG_QUERY = "who " * 40


class UnavailableError(Exception):
    """A method cannot be run here; the message says why and goes into the results."""


@dataclass(frozen=True)
class Prompt:
    """One window of the sequential layout.

    Attributes:
        prefix: Token ids before the tail.
        spans: Token span of each document in the prefix, in the order of the candidates.
        tail: Token ids of instruction and query.
        null_tail: Token ids of instruction and content-free query.
    """

    prefix: tuple[int, ...]
    spans: tuple[Span, ...]
    tail: tuple[int, ...]
    null_tail: tuple[int, ...]


@dataclass(frozen=True)
class Subject:
    """A loaded LLM and everything else that all methods share.

    Attributes:
        model: The LLM as transformers loads it, with its vocabulary head.
        tokenizer: Tokenizer of the LLM.
        llm: The same LLM, wrapped; shares the weights.
        heads: Head set of all methods that choose heads.
        doc_tokens: Length of every document, in tokens.
    """

    model: PreTrainedModel
    tokenizer: Any
    llm: FrozenLM
    heads: HeadSet
    doc_tokens: int

    @property
    def device(self) -> torch.device:
        """Device of the LLM."""
        return self.llm.device

    @cached_property
    def config(self) -> Any:
        """Configuration of the decoder."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        given = getattr(self.config, "head_dim", None)
        return int(given or self.config.hidden_size // self.config.num_attention_heads)

    def pieces(self, query: str, texts: Sequence[str]) -> Pieces:
        """Tokenize a query and documents as the sequential layout does, best candidate last."""
        return self.llm.encoder.pieces(
            query, texts[::-1], numbered=True, max_doc_tokens=self.doc_tokens
        )

    def prompts(self, query: str, texts: Sequence[str]) -> list[Prompt]:
        """Build the prompts of the sequential layout, several if the context is too short."""
        return [
            self.prompt(query, texts[start:end])
            for start, end in window_ranges(len(texts), self.window(texts))
        ]

    def prompt(self, query: str, texts: Sequence[str]) -> Prompt:
        """Build one prompt, however long it is."""
        pieces = self.pieces(query, texts)
        prefix, spans = list(pieces.prefix), []
        for document in pieces.documents:
            spans.append(Span(len(prefix) + document.text.start, len(prefix) + document.text.end))
            prefix += document.ids
        return Prompt(tuple(prefix), tuple(spans[::-1]), pieces.tail, pieces.null_tail)

    def forget_tokens(self) -> None:
        """Empty the encoder's cache of tokenized documents, so that the next query is cold."""
        encoder = self.llm.encoder
        encoder._documents = TokenCache(encoder.encode)

    def window(self, texts: Sequence[str]) -> int | None:
        """Return the number of documents to read at once; ``None`` if the context holds all.

        Raises:
            UnavailableError: The context does not hold a single document.
        """
        limit, pieces = self.llm.max_tokens, self.pieces(LONG_QUERY, texts)
        if limit is None or pieces.size <= limit:
            return None
        longest = max(len(document.ids) for document in pieces.documents)
        around = pieces.size - sum(len(document.ids) for document in pieces.documents)
        fitting = (limit - around) // longest
        if fitting < 1:
            raise UnavailableError(f"the context of {limit:,} tokens is too short for a document")
        return fitting // 10 * 10 or fitting  # round windows read better in a table


def window_ranges(documents: int, window: int | None) -> Iterator[tuple[int, int]]:
    """Yield the ranges of documents that are read at once: full windows, half a window apart."""
    size = documents if window is None else min(window, documents)
    for start in range(0, documents - size, max(1, size // 2)):
        yield start, start + size
    yield documents - size, documents


@dataclass
class Method:
    """A way to rank documents whose time per query is measured.

    Attributes:
        run: Ranks the documents for one query; the only part that is timed.
        prepare: Called before every run, for example to empty a cache.
        trial: Called once before the first round; warms up, chooses settings, and returns the
            expected seconds per query. ``None`` for one run.
        notes: Chosen settings, for the results.
        remembers: Whether the documents' token ids are known from an earlier query.
    """

    run: Callable[[str], Any]
    prepare: Callable[[str], object] = lambda _: None
    trial: Callable[[str], float] | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    remembers: bool = False


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a call takes, until the device is done."""
    backend: Any = getattr(torch, device.type)
    backend.synchronize()
    start = time.perf_counter()
    call()
    backend.synchronize()
    return time.perf_counter() - start


def load_subject(options: Options) -> Subject:
    """Load an LLM by name, or make one of random weights in a published shape.

    Raises:
        RouteHeadError: The LLM, shape, device or head does not exist, or memory is too small.
    """
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    if options.shape is None:
        model, tokenizer = load(options.model, dtype=dtype, device=device)
    else:
        model = _random_model(options.shape, dtype, device)
        tokenizer = _byte_tokenizer() if options.tokenizer == BYTES else None
        tokenizer = tokenizer or load_tokenizer(options.tokenizer)
    llm = FrozenLM(model, tokenizer, name=options.label)
    return Subject(model, tokenizer, llm, choose_heads(options.heads, llm), options.doc_tokens)


def choose_heads(heads: str, llm: FrozenLM) -> HeadSet:
    """Read ``--heads``; ``"spread"`` is 16 heads evenly over the middle third of the layers.

    The last of them lies at two thirds of the depth, as deep as published head sets go.
    """
    if heads != "spread":
        return as_selector(heads).select("", llm)
    middle = sorted(as_selector("layers").select("", llm))
    count = min(_HEADS, len(middle))
    return HeadSet([middle[(index + 1) * len(middle) // count - 1] for index in range(count)])


def _random_model(shape: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    if shape not in SHAPES:
        raise InputError(f"--shape={shape!r} is unknown; give one of: {', '.join(SHAPES)}.")
    with torch.device("meta"):
        weights = AutoModelForCausalLM.from_config(SHAPES[shape]).num_parameters()
    needed, available = weights * dtype.itemsize, available_bytes(device)
    if needed > 0.8 * available:
        raise InputError(
            f"--shape={shape!r} needs {needed / 1e9:.1f} GB for its weights, but {device.type} has "
            f"{available / 1e9:.1f} GB; give a smaller shape or another device."
        )
    # Initialising billions of weights properly takes minutes, and time does not depend on them.
    with no_init_weights(), torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(SHAPES[shape], dtype=dtype)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.fill_(1.0)
    model.eval()
    return model


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of one token per byte, for machines without a real one."""
    alphabet = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")
