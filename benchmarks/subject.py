"""What is measured: an LLM with its heads and prompts, and how a method is called."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from memory import available_bytes
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)
from transformers.initialization import no_init_weights

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

BYTES = "bytes"
_HEADS = 16  # as many as QRHead reads in LLMs below ten billion parameters

_QWEN3: dict[str, Any] = {
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
# Shapes of published LLMs; rotary bases are left out, since time does not depend on them.
SHAPES: dict[str, PreTrainedConfig] = {
    "smollm2-135m": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "qwen3-0.6b": Qwen3Config(
        **_QWEN3,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
    ),
    "qwen3-4b": Qwen3Config(
        **_QWEN3,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
    ),
    "llama-3.1-8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
    ),
}


class UnavailableError(Exception):
    """A method cannot be run here; the message says why and goes into the results."""


@dataclass(frozen=True)
class SubjectOptions:
    """What to load, as on the command line; device and dtype as picked."""

    model: str
    shape: str | None
    tokenizer: str
    device: str
    dtype: str
    heads: str
    doc_tokens: int

    @property
    def label(self) -> str:
        """A name for files."""
        return self.shape or Path(self.model).name


@dataclass(frozen=True)
class Prompt:
    """One window of the sequential layout.

    Attributes:
        prefix: Tokens up to the tail.
        spans: Tokens of the documents in the prefix, in the order of the candidates.
        tail: Instruction and query.
        null_tail: The same for the query without content.
    """

    prefix: tuple[int, ...]
    spans: tuple[Span, ...]
    tail: tuple[int, ...]
    null_tail: tuple[int, ...]


@dataclass(frozen=True)
class Subject:
    """A loaded LLM with what all methods share.

    Attributes:
        model: As transformers loads it, with its vocabulary head.
        tokenizer: Its tokenizer.
        llm: The same model, wrapped; shares the weights.
        heads: The head set of all methods that choose heads.
        doc_tokens: Length of every document.
    """

    model: PreTrainedModel
    tokenizer: Any
    llm: FrozenLM
    heads: HeadSet
    doc_tokens: int

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.llm.device

    @cached_property
    def config(self) -> Any:
        """Of the decoder."""
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
        """Build the prompts of the sequential layout, several where the context is too short."""
        return [
            self.prompt(query, texts[start:end])
            for start, end in window_ranges(len(texts), self.window(texts))
        ]

    def prompt(self, query: str, texts: Sequence[str]) -> Prompt:
        """Build one prompt, however long."""
        pieces = self.pieces(query, texts)
        prefix, spans = list(pieces.prefix), []
        for document in pieces.documents:
            spans.append(Span(len(prefix) + document.text.start, len(prefix) + document.text.end))
            prefix += document.ids
        return Prompt(tuple(prefix), tuple(spans[::-1]), pieces.tail, pieces.null_tail)

    def forget_tokens(self) -> None:
        """Empty the encoder's memory of tokenized documents, for queries that are to be cold."""
        encoder = self.llm.encoder
        encoder._documents = TokenCache(encoder.encode)

    def window(self, texts: Sequence[str]) -> int | None:
        """How many documents are read at once; ``None`` where the context holds them all.

        Raises:
            UnavailableError: It does not hold a single one.
        """
        limit, pieces = self.llm.max_tokens, self.pieces(_LONG_QUERY, texts)
        if limit is None or pieces.size <= limit:
            return None
        longest = max(len(document.ids) for document in pieces.documents)
        around = pieces.size - sum(len(document.ids) for document in pieces.documents)
        fitting = (limit - around) // longest
        if fitting < 1:
            raise UnavailableError(f"the context of {limit:,} tokens is too short for a document")
        return fitting // 10 * 10 or fitting  # round windows read better in a table


# Longer than the queries that are used, so that every one of them fits the same windows.
_LONG_QUERY = "who " * 40


def window_ranges(documents: int, window: int | None) -> Iterator[tuple[int, int]]:
    """Ranges of documents read at once: full windows, half a window apart."""
    size = documents if window is None else min(window, documents)
    for start in range(0, documents - size, max(1, size // 2)):
        yield start, start + size
    yield documents - size, documents


@dataclass
class Method:
    """Something whose time per query is measured.

    Attributes:
        run: One query; the only part that is timed.
        prepare: Called before every run, such as to empty a cache.
        trial: Called once before the first round; warms up, chooses settings, and returns how many
            seconds a query will take. By default one run.
        notes: What was chosen, for the results.
        remembers: Whether the documents' token ids are known from an earlier query.
    """

    run: Callable[[str], object]
    prepare: Callable[[str], object] = lambda _: None
    trial: Callable[[str], float] | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    remembers: bool = False


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes, until the device is done."""
    backend: Any = getattr(torch, device.type)
    backend.synchronize()
    start = time.perf_counter()
    call()
    backend.synchronize()
    return time.perf_counter() - start


def load_subject(options: SubjectOptions) -> Subject:
    """Load an LLM by name, or make one of random weights in a published shape.

    Raises:
        RouteHeadError: There is no such LLM, shape, device or head, or memory does not suffice.
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
    """Read ``--heads``; ``"spread"`` is sixteen heads evenly over the middle third of the layers.

    The last of them lies at two thirds of the depth, as deep as published head sets go.
    """
    if heads != "spread":
        return as_selector(heads).select("", llm)
    middle = sorted(as_selector("layers").select("", llm))
    count = min(_HEADS, len(middle))
    return HeadSet([middle[(place + 1) * len(middle) // count - 1] for place in range(count)])


def _random_model(shape: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    if shape not in SHAPES:
        raise InputError(f"--shape={shape!r} is unknown; give one of: {', '.join(SHAPES)}.")
    with torch.device("meta"):
        weights = AutoModelForCausalLM.from_config(SHAPES[shape]).num_parameters()
    needed, there = weights * dtype.itemsize, available_bytes(device)
    if needed > 0.8 * there:
        raise InputError(
            f"--shape={shape!r} needs {needed / 1e9:.1f} GB for its weights, but {device.type} has "
            f"{there / 1e9:.1f} GB; give a smaller shape or another device."
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
    """One token per byte, for machines on which no real tokenizer is installed."""
    alphabet = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")
