"""Sampling from a frozen causal LLM: several short continuations at once, behind one prefix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

Ids = tuple[int, ...]


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    prefix: Ids,
    prompts: Sequence[Ids],
    *,
    max_tokens: int,
    temperature: float,
    generator: torch.Generator,
    ended: Callable[[Ids], bool],
) -> list[Ids]:
    """Continue several prompts, all of them behind one prefix that is run once.

    Args:
        model: A causal LLM with its output projection; left as it is.
        prefix: Token ids that every prompt stands behind, not empty.
        prompts: Token ids, none of them empty. Where they differ in length, the shorter ones see by
            as much less through a sliding window.
        max_tokens: Length of a continuation, at most.
        temperature: Of the softmax; 0 takes the likeliest token.
        generator: Where chance comes from, on the CPU: the same on every device.
        ended: Told what a row has so far; whether that is all.

    Returns:
        What was sampled for each prompt, up to the token at which it ended.
    """
    if not prompts:
        return []
    cache = DynamicCache()
    rows, width = len(prompts), max(map(len, prompts))
    first = torch.tensor([prefix], device=model.device)
    model(input_ids=first, past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.batch_repeat_interleave(rows)
    # Padding stands between prefix and prompt, so that all prompts end in the same column.
    blanks = [width - len(prompt) for prompt in prompts]
    step = torch.tensor(
        [[prompt[0]] * blank + list(prompt) for prompt, blank in zip(prompts, blanks, strict=True)],
        device=model.device,
    )
    mask = torch.ones(rows, len(prefix) + width, dtype=torch.long, device=model.device)
    for row, blank in enumerate(blanks):
        mask[row, len(prefix) : len(prefix) + blank] = 0
    found: list[list[int]] = [[] for _ in prompts]
    done = [False] * rows
    for _ in range(max_tokens):
        positions = (mask.cumsum(dim=1) - 1)[:, -step.shape[1] :]
        output: Any = model(
            input_ids=step,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        tokens = _drawn(output.logits[:, -1].float().cpu(), temperature, generator)
        for row, token in enumerate(tokens.tolist()):
            if not done[row]:
                found[row].append(token)
                done[row] = ended(tuple(found[row]))
        if all(done):
            break
        step = tokens[:, None].to(model.device)
        mask = torch.cat([mask, mask.new_ones(rows, 1)], dim=1)
    return [tuple(ids) for ids in found]


def _drawn(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """One token per row, shape (rows,)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    chances = (logits / temperature).softmax(dim=-1)
    return torch.multinomial(chances, 1, generator=generator)[:, 0]
