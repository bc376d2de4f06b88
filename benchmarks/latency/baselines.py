"""Baselines of the re-ranker, each as one would write it with transformers."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.latency.memory import available_bytes
from benchmarks.latency.subject import (
    LONG_QUERY,
    Method,
    Prompt,
    Subject,
    UnavailableError,
    timed,
)
from routehead_plugins.backbone import batches
from routehead_plugins.scoring import document_signals

# Window and stride of RankGPT (arXiv 2304.09542).
_WINDOW, _STRIDE = 20, 10
# Wording of UPR (arXiv 2204.07496), documents first.
_ASK_FOR_QUERY = "\n\nPlease write a question based on this passage.\nQuestion:"
_ASK_FOR_RANKING = (
    "Search query: {query}\n\nRank the {count} passages above by their relevance to the search "
    "query, most relevant first, as [2] > [1] and so on. Name all of them; only give the ranking."
)
_BATCHES = (1, 4, 16, 64)


def shared_twin(model: PreTrainedModel, attention: str) -> PreTrainedModel:
    """Make a second tree of modules over the same weights, with another attention."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    twin: PreTrainedModel = copy.deepcopy(model, shared).eval()
    twin.set_attn_implementation(attention)
    return twin


def handwritten(subject: Subject, documents: Sequence[str]) -> Method:
    """ICR written by hand: all attention matrices of two full passes, summed over heads.

    Favours the baseline: logits are computed for one token only, and the first pass is summed up
    and dropped before the second begins. If the matrices of all layers do not fit into memory, each
    is summed up and dropped at once, and the notes say so.

    Raises:
        UnavailableError: The prompt is longer than the context, or a matrix than the memory.
    """
    limit, tokens = subject.llm.max_tokens, subject.pieces("who", documents).size
    if subject.window(documents) is not None:
        raise UnavailableError(f"its prompt is longer than the context of {limit:,} tokens")
    available = 0.9 * available_bytes(subject.device)
    one, needed = attention_bytes(subject, tokens)
    if one > available:
        raise UnavailableError(
            f"its attention matrices take {one / 1e9:.0f} GB in one layer, and "
            f"{available / 1e9:.0f} GB are free"
        )
    twin = shared_twin(subject.model, "eager")
    fits = needed <= available
    attend = _summed_attention if fits else _summed_by_layer
    notes = {"gigabytes": needed / 1e9, "kept": "all layers" if fits else "one layer"}

    def score(query: str) -> list[float]:
        prompt = subject.prompt(query, documents)
        mass = attend(twin, prompt, prompt.tail, subject.device)
        null_mass = attend(twin, prompt, prompt.null_tail, subject.device)
        scores: list[float] = document_signals(mass, null_mass, prompt.spans)[0].tolist()
        return scores

    return Method(score, notes=notes)


def attention_bytes(subject: Subject, tokens: int) -> tuple[int, int]:
    """Return the bytes of one layer's attention matrices during work, and of a whole pass."""
    entries = subject.config.num_attention_heads * tokens**2
    working = 3 * entries * torch.float32.itemsize
    results = entries * subject.config.num_hidden_layers * subject.llm.dtype.itemsize
    return int(working), int(working + results)


@torch.inference_mode()
def _summed_attention(
    twin: PreTrainedModel, prompt: Prompt, tail: tuple[int, ...], device: torch.device
) -> Tensor:
    """Attention of the tail to the prefix, mean over its tokens, sum over heads; (1, prefix)."""
    ids = torch.tensor([prompt.prefix + tail], device=device)
    output: Any = twin(input_ids=ids, output_attentions=True, use_cache=False, logits_to_keep=1)
    end = len(prompt.prefix)
    total = torch.zeros(1, end, device=device)
    for matrix in output.attentions:  # (1, heads, tokens, tokens)
        total += matrix[0, :, end:, :end].float().mean(dim=1).sum(dim=0)
    return total


@torch.inference_mode()
def _summed_by_layer(
    twin: PreTrainedModel, prompt: Prompt, tail: tuple[int, ...], device: torch.device
) -> Tensor:
    """Like ``_summed_attention``, but drop every layer's matrix before the next layer runs."""
    end = len(prompt.prefix)
    total = torch.zeros(1, end, device=device)

    def take(_: nn.Module, __: object, output: tuple[Tensor, Tensor]) -> tuple[Tensor, None]:
        attended, matrix = output
        total.add_(matrix[0, :, end:, :end].float().mean(dim=1).sum(dim=0))
        return attended, None

    attentions = [module for name, module in twin.named_modules() if name.endswith("self_attn")]
    hooks = [module.register_forward_hook(take) for module in attentions]
    try:
        ids = torch.tensor([prompt.prefix + tail], device=device)
        twin(input_ids=ids, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return total


def likelihood(subject: Subject, documents: Sequence[str]) -> Method:
    """Query likelihood: the mean log-probability of the query after each document.

    One forward per document, several in a batch, logits for the query's tokens alone. Favours the
    baseline: there is no chat template, and the best of several batch sizes is chosen.
    """
    encoder, device = subject.llm.encoder, subject.device
    (instruction,) = encoder.encode([_ASK_FOR_QUERY])
    notes: dict[str, Any] = {}

    def score(query: str, size: int | None = None) -> list[float]:
        passages = [
            piece.ids[piece.text.start : piece.text.end] + instruction
            for piece in subject.pieces(query, documents).documents[::-1]
        ]
        (tail,) = encoder.encode([f" {query}"])
        return [
            value
            for batch in _chunks(passages, size or notes["batch"])
            for value in _log_probabilities(subject.model, batch, tail, device)
        ]

    def trial(query: str) -> float:
        sizes = sorted({min(size, len(documents)) for size in (*_BATCHES, len(documents))})
        runs = {size: partial(score, query, size) for size in sizes}
        # The second run of two, since the first one of a size includes its warm-up.
        seconds = {size: [timed(run, device) for _ in range(2)][-1] for size, run in runs.items()}
        notes["batch"] = min(sizes, key=lambda size: seconds[size])
        notes["seconds_by_batch"] = seconds
        return seconds[notes["batch"]]

    return Method(score, trial=trial, notes=notes)


def _chunks(items: Sequence[tuple[int, ...]], size: int) -> Iterator[Sequence[tuple[int, ...]]]:
    """Split items into parts of nearly equal size, none above the size given."""
    parts = -(-len(items) // size)
    edges = [part * len(items) // parts for part in range(parts + 1)]
    for start, end in pairwise(edges):
        yield items[start:end]


@torch.inference_mode()
def _log_probabilities(
    model: PreTrainedModel,
    passages: Sequence[tuple[int, ...]],
    tail: tuple[int, ...],
    device: torch.device,
) -> list[float]:
    width = max(map(len, passages))
    inputs: dict[str, Any] = {}
    if min(map(len, passages)) < width:
        mask = torch.ones(len(passages), width + len(tail), dtype=torch.long, device=device)
        for row, passage in enumerate(passages):
            mask[row, : width - len(passage)] = 0
        inputs = {
            "attention_mask": mask,
            "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0),
        }
    # Padding is on the left, so that the query's logits are the last ones in every row.
    rows = [(0,) * (width - len(passage)) + passage + tail for passage in passages]
    output: Any = model(
        input_ids=torch.tensor(rows, device=device),
        use_cache=False,
        logits_to_keep=len(tail) + 1,
        **inputs,
    )
    logs = output.logits[:, :-1].float().log_softmax(dim=-1)
    wanted = torch.tensor(tail, device=device).expand(len(passages), -1)[..., None]
    values: list[float] = logs.gather(-1, wanted)[..., 0].mean(dim=1).tolist()
    return values


def listwise(subject: Subject, documents: Sequence[str]) -> Method:
    """RankGPT: the LLM writes a permutation of numbers, over sliding windows from the end.

    Exactly as many tokens are generated as a permutation has, since a small LLM that stops early
    would only look fast.

    Raises:
        UnavailableError: A window is longer than the context.
    """
    ends = range(len(documents), min(_WINDOW, len(documents)) - 1, -_STRIDE)
    windows = [(max(0, end - _WINDOW), end) for end in ends]
    if windows[-1][0] > 0:
        windows.append((0, min(_WINDOW, len(documents))))
    numbers = " > ".join(f"[{number}]" for number in range(1, windows[0][1] - windows[0][0] + 1))
    new_tokens = len(subject.llm.encoder.encode([numbers])[0])
    longest = len(_ranking_prompt(subject, LONG_QUERY, documents[slice(*windows[0])])) + new_tokens
    limit = subject.llm.max_tokens
    if limit is not None and longest > limit:
        raise UnavailableError(f"a window is longer than the context of {limit:,} tokens")

    def rank_window(query: str, order: list[int]) -> list[int]:
        prompt = _ranking_prompt(subject, query, [documents[index] for index in order])
        text = _generated(subject, prompt, new_tokens)
        return [order[index] for index in permutation(text, len(order))]

    def rank(query: str) -> list[int]:
        order = list(range(len(documents)))
        for start, end in windows:
            order[start:end] = rank_window(query, order[start:end])
        return order

    def trial(query: str) -> float:
        first = list(range(*windows[0]))
        start = time.perf_counter()
        rank_window(query, first)
        return (time.perf_counter() - start) * len(windows)

    return Method(rank, trial=trial, notes={"windows": len(windows), "new_tokens": new_tokens})


def _ranking_prompt(subject: Subject, query: str, texts: Sequence[str]) -> tuple[int, ...]:
    pieces = subject.llm.encoder.pieces(
        query, texts, numbered=True, max_doc_tokens=subject.doc_tokens
    )
    request = _ASK_FOR_RANKING.format(query=query, count=len(texts))
    documents = chain.from_iterable(piece.ids for piece in pieces.documents)
    return (*pieces.prefix, *documents, *subject.llm.encoder.encode([request])[0])


@torch.inference_mode()
def _generated(subject: Subject, prompt: tuple[int, ...], new_tokens: int) -> str:
    """Generate greedily, with a cache of keys and values."""
    ids = torch.tensor([prompt], device=subject.device)
    model: Any = subject.model
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        pad_token_id=subject.tokenizer.pad_token_id or 0,
    )
    return str(subject.tokenizer.decode(output[0, len(prompt) :]))


def permutation(text: str, count: int) -> list[int]:
    """Read the permutation in a text such as ``"[2] > [1]"``; missing indices follow in order."""
    named = [int(number) - 1 for number in re.findall(r"\d{1,9}", text)]
    return list(dict.fromkeys([*(n for n in named if 0 <= n < count), *range(count)]))


def floor(subject: Subject, documents: Sequence[str]) -> Method:
    """A bare forward over prefix and tail, the minimum for any method of this depth.

    SDPA, no cache, no logits, every layer down to the deepest head; tokenized beforehand.
    """
    decoder = truncated_decoder(subject)
    inputs: list[Tensor] = []

    def prepare(query: str) -> None:
        inputs[:] = [
            torch.tensor([prompt.prefix + prompt.tail], device=subject.device)
            for prompt in subject.prompts(query, documents)
        ]

    @torch.inference_mode()
    def forward(_: str) -> None:
        for ids in inputs:
            decoder(input_ids=ids, use_cache=False)

    return Method(forward, prepare)


def tail_alone(subject: Subject, documents: Sequence[str]) -> Method:  # noqa: ARG001
    """A bare forward over the query's tail, the minimum where documents are run beforehand."""
    decoder = truncated_decoder(subject)
    inputs: list[Tensor] = []

    def prepare(query: str) -> None:
        pieces = subject.pieces(query, [])
        inputs[:] = [torch.tensor([pieces.tail], device=subject.device)]

    @torch.inference_mode()
    def forward(_: str) -> None:
        decoder(input_ids=inputs[0], use_cache=False)

    return Method(forward, prepare)


@torch.inference_mode()
def bare_forwards(subject: Subject, documents: Sequence[tuple[int, ...]]) -> None:
    """Run documents through the layers down to the deepest head, in batches of 4,096 tokens."""
    decoder = truncated_decoder(subject)
    for indices in batches([len(ids) for ids in documents], 4096):
        longest = max(len(documents[index]) for index in indices)
        rows = [documents[index] + (0,) * (longest - len(documents[index])) for index in indices]
        decoder(input_ids=torch.tensor(rows, device=subject.device), use_cache=False)


def truncated_decoder(subject: Subject) -> PreTrainedModel:
    """Return the layers down to the deepest head, without the vocabulary head."""
    sdpa = "sdpa" if subject.model._supports_sdpa else "eager"
    decoder: Any = shared_twin(subject.model, sdpa).get_decoder()
    decoder.layers = decoder.layers[: subject.heads.last_layer + 1]
    return decoder  # type: ignore[no-any-return]


def forward_flops(subject: Subject, lengths: Iterable[int]) -> int:
    """Count the floor's operations: two per weight and token, and causal attention."""
    decoder = truncated_decoder(subject)
    weights = sum(m.weight.numel() for m in decoder.modules() if isinstance(m, nn.Linear))
    width = subject.config.num_attention_heads * subject.head_dim
    layers = subject.heads.last_layer + 1
    # Scores and mixed values: two operations each per pair of tokens, half of which are masked.
    return sum(2 * weights * n + 2 * width * layers * n**2 for n in lengths)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure operations per second of large square products, the best of several."""
    best = 0.0
    for size in (512, 1024, 2048) if device.type == "cpu" else (4096, 8192):
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        left @ right
        seconds = min(timed(partial(torch.matmul, left, right), device) for _ in range(5))
        best = max(best, 2 * size**3 / seconds)
    return best
