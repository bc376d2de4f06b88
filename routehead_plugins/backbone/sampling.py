"""Sample several short continuations at once from a causal LLM, behind one shared prefix."""

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
    """Continue several prompts behind one prefix, which is run once; see ``TextTasks.write``.

    Where lengths differ, a shorter prompt sees that many fewer tokens through a sliding window. The
    generator is on the CPU, so that samples do not depend on the device. A continuation ends
    with the token for which ``ended`` returns true.
    """
    if not prompts:
        return []
    cache = DynamicCache()
    first = torch.tensor([prefix], device=model.device)
    model(input_ids=first, past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.batch_repeat_interleave(len(prompts))
    step, mask = _padded_prompts(prompts, len(prefix), model.device)
    continuations: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
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
        tokens = _draw(output.logits[:, -1].float().cpu(), temperature, generator)
        for row, token in enumerate(tokens.tolist()):
            if not done[row]:
                continuations[row].append(token)
                done[row] = ended(tuple(continuations[row]))
        if all(done):
            break
        step = tokens[:, None].to(model.device)
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
    return [tuple(ids) for ids in continuations]


def _padded_prompts(
    prompts: Sequence[Ids], prefix: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Pad between prefix and prompt, so that all prompts end in the same column.

    Ids have shape (prompts, width), the attention mask has (prompts, prefix + width).
    """
    width = max(map(len, prompts))
    ids = []
    mask = torch.ones(len(prompts), prefix + width, dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        padding = width - len(prompt)
        ids.append([prompt[0]] * padding + list(prompt))
        mask[row, prefix : prefix + padding] = 0
    return torch.tensor(ids, device=device), mask


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Draw one token per row."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = (logits / temperature).softmax(dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
