"""One training run: batches, steps of the optimizer, looks at held-out queries, and its state."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from routehead_plugins.alignment.config import AlignmentConfig
from routehead_plugins.alignment.examples import AlignmentExample
from routehead_plugins.alignment.head_weights import HeadWeights, features
from routehead_plugins.alignment.losses import (
    attention_entropy,
    distillation,
    head_entropy,
    preference,
    spread,
)
from routehead_plugins.alignment.passes import Signals, late_signals, parallel_signals
from routehead_plugins.backbone import Adapter, FrozenLM, Gradients
from routehead_plugins.errors import InputError
from routehead_plugins.heads import HeadSet, Recipe
from routehead_plugins.signals import ndcg

_READERS: Mapping[str, Callable[..., list[Signals]]] = {
    "late": late_signals,
    "parallel": parallel_signals,
}
# Names of what the optimizer keeps of a parameter.
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class Look:
    """Losses and quality on some queries.

    Attributes:
        losses: Weighted sum of the losses, shape (queries,).
        ndcg: nDCG@10 by grades, shape (queries,); NaN where there are none.
        parts: Mean of each loss that is switched on, without its weight.
    """

    losses: Tensor
    ndcg: Tensor
    parts: Mapping[str, float]

    @property
    def loss(self) -> float:
        """Mean loss."""
        return float(self.losses.mean())

    @property
    def summary(self) -> dict[str, float]:
        """Figures for a record."""
        graded = self.ndcg[~self.ndcg.isnan()]
        quality = {"ndcg@10": float(graded.mean())} if len(graded) else {}
        return {"loss": self.loss, **self.parts, **quality}


class Trainer:
    """State of one run of ``align``.

    Attributes:
        llm: The LLM with the adapter that is trained.
        heads: Heads that are read.
        weights: Their weights.
        step: Number of finished steps.
        steps: Number of steps in all.
        tokens: Number of tokens run in training so far; shared documents count once, and padding
            is excluded.
    """

    def __init__(
        self,
        llm: FrozenLM,
        heads: HeadSet,
        examples: Sequence[AlignmentExample],
        config: AlignmentConfig,
    ) -> None:
        """Prepare a run.

        Args:
            llm: The LLM with a new adapter.
            heads: Heads to read.
            examples: Examples to learn from.
            config: Settings.
        """
        self.llm, self.heads, self.config = llm, heads, config
        self._groups = _by_documents(examples)
        self.weights = HeadWeights.equal(config.head_weights, len(heads), llm.device, config.scale)
        self.step = self.tokens = 0
        self._step_size = config.batch_queries * config.accumulate
        self._per_epoch = math.ceil(len(examples) / self._step_size)
        self.steps = self._per_epoch * config.epochs
        with llm.gradients() as passes:
            self._factors = passes.factors
        groups = [
            {
                "params": list(self._factors.values()),
                "lr": config.learning_rate,
                "weight_decay": config.weight_decay,
            },
            {
                "params": list(self.weights.tensors().values()),
                "lr": config.head_learning_rate,
                "weight_decay": 0.0,
            },
        ]
        self._optimizer = torch.optim.AdamW(groups)
        self._rates = [config.learning_rate, config.head_learning_rate]

    def start_from(self, heads: HeadSet | None) -> None:
        """Take over the weights of an earlier run's heads, if they are the same heads."""
        weights = None if heads is None else heads.recipe.weights
        if heads is None or weights is None or list(heads) != list(self.heads):
            return
        if self.config.head_weights == "softmax" and min(weights) <= 0:
            return
        self.weights.set(torch.tensor(weights, dtype=torch.float32))

    def run_step(self) -> dict[str, float]:
        """Make one step of the optimizer.

        Returns:
            Mean of each loss that is switched on, and their weighted sum as ``loss``.

        Raises:
            InputError: The loss is not finite.
        """
        chosen = self._chosen()
        size = self.config.batch_queries
        sums: dict[str, float] = {}
        for start in range(0, len(chosen), size):
            batch = chosen[start : start + size]
            with self.llm.gradients(checkpoints=self.config.checkpoints) as passes:
                loss, parts = self._batch_loss(passes, batch)
                (loss.sum() / len(chosen)).backward()
            for name, values in {"loss": loss, **parts}.items():
                sums[name] = sums.get(name, 0.0) + float(values.detach().sum()) / len(chosen)
        if not math.isfinite(sums["loss"]):
            raise InputError(
                f"the loss became {sums['loss']} in step {self.step + 1}; choose a lower "
                "learning_rate."
            )
        self._update()
        self.step += 1
        return sums

    @torch.no_grad()
    def look(self, examples: Sequence[AlignmentExample]) -> Look:
        """Compute losses and quality on all candidates of some queries."""
        totals: list[Tensor] = []
        quality: list[float] = []
        sums: dict[str, list[Tensor]] = {}
        size = self.config.batch_queries
        for start in range(0, len(examples), size):
            batch = examples[start : start + size]
            with self.llm.gradients() as passes:
                scored = self._scored(passes, batch)
            for example, (signals, scores) in zip(batch, scored, strict=True):
                parts = self._losses(example, signals, scores)
                totals.append(self._total(parts))
                quality.append(_ndcg(scores, example))
                for name, value in parts.items():
                    sums.setdefault(name, []).append(value)
        means = {name: float(torch.stack(values).mean()) for name, values in sums.items()}
        return Look(torch.stack(totals).cpu(), torch.tensor(quality), means)

    def adapter(self, name: str) -> Adapter:
        """Copy the adapter as it is now."""
        with self.llm.gradients() as passes:
            return passes.adapter(name)

    @torch.no_grad()
    def head_set(self) -> HeadSet:
        """Return the heads with their weights as they are now, to be read by a re-ranker."""
        aggregation = {"log": "log", "calibrated": "standardised"}[self.config.signal]
        recipe = Recipe(weights=self.weights.weights.cpu().tolist(), aggregation=aggregation)
        return HeadSet(
            self.heads.heads,
            model=self.llm.name,
            layout=self.config.layout,
            method="aligned",
            recipe=recipe,
        )

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return all trained parameters by their names in files."""
        return self._factors | self.weights.tensors()

    def load_parameters(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the values of all trained parameters."""
        with torch.no_grad():
            for name, parameter in self.parameters().items():
                parameter.copy_(tensors[name])

    def state(self) -> dict[str, Tensor]:
        """Return parameters and the optimizer's state, on the CPU, by their names in files."""
        tensors = {}
        for name, parameter in self.parameters().items():
            tensors[name] = parameter.detach()
            kept = self._optimizer.state.get(parameter, {})
            for moment in _MOMENTS:
                if moment in kept:
                    tensors[f"{moment}.{name}"] = torch.as_tensor(kept[moment])
        return {name: tensor.cpu().clone() for name, tensor in tensors.items()}

    def load_state(self, tensors: Mapping[str, Tensor], step: int, tokens: int) -> None:
        """Take over what ``state`` returned after some steps."""
        self.load_parameters(tensors)
        self.step, self.tokens = step, tokens
        for name, parameter in self.parameters().items():
            kept: dict[str, Any] = {
                moment: tensors[f"{moment}.{name}"].to(
                    "cpu" if moment == "step" else parameter.device
                )
                for moment in _MOMENTS
                if f"{moment}.{name}" in tensors
            }
            if kept:
                self._optimizer.state[parameter] = kept

    def _chosen(self) -> list[AlignmentExample]:
        """Return the examples of the next step; they depend on seed and step alone."""
        seed, (epoch, index) = self.config.seed, divmod(self.step, self._per_epoch)
        order = random.Random(f"order {seed} {epoch}").sample(self._groups, len(self._groups))
        # Groups of full size first, so that steps begin and end with them.
        order.sort(key=len, reverse=True)
        chance = random.Random(f"candidates {seed} {self.step}")
        every = [(example, len(group) > 1) for group in order for example in group]
        chosen = every[index * self._step_size : (index + 1) * self._step_size]
        return [
            example if shares else example.sample(self.config.candidates, chance)
            for example, shares in chosen
        ]

    def _batch_loss(
        self, passes: Gradients, batch: Sequence[AlignmentExample]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of each example, and its parts by name."""
        scored = self._scored(passes, batch, counts=True)
        totals: list[Tensor] = []
        parts: dict[str, list[Tensor]] = {}
        for example, (signals, scores) in zip(batch, scored, strict=True):
            own = self._losses(example, signals, scores)
            totals.append(self._total(own))
            for name, value in own.items():
                parts.setdefault(name, []).append(value)
        return torch.stack(totals), {name: torch.stack(values) for name, values in parts.items()}

    def _scored(
        self, passes: Gradients, batch: Sequence[AlignmentExample], *, counts: bool = False
    ) -> list[tuple[Signals, Tensor]]:
        """Run a batch; return signals and scores of each example's documents."""
        config = self.config
        prompts = [
            self.llm.encoder.pieces(
                example.query,
                example.documents,
                numbered=False,
                max_doc_tokens=config.max_doc_tokens,
            )
            for example in batch
        ]
        if counts:
            documents = {piece.ids for prompt in prompts for piece in prompt.documents}
            self.tokens += sum(map(len, documents)) + sum(prompt.tail_size for prompt in prompts)
        signals = _READERS[config.layout](
            self.llm, passes, prompts, self.heads, calibrate=config.signal == "calibrated"
        )
        return [
            (own, self.weights.scores(features(own, config.signal, standardise=config.standardise)))
            for own in signals
        ]

    def _losses(
        self, example: AlignmentExample, signals: Signals, scores: Tensor
    ) -> dict[str, Tensor]:
        """Compute the losses that are switched on and that the example has data for."""
        on, config = self.config.losses, self.config
        parts = {}
        if on.distillation and example.teacher is not None:
            teacher = torch.tensor(example.teacher, device=scores.device)
            parts["distillation"] = distillation(scores, teacher, config.temperature)
        if on.preference and example.grades is not None:
            grades = torch.tensor(example.grades, device=scores.device)
            parts["preference"] = preference(scores, grades, config.hard_share)
        if on.spread:
            parts["spread"] = spread(scores)
        if on.head_entropy:
            parts["head_entropy"] = head_entropy(self.weights.shares)
        if on.attention_entropy:
            parts["attention_entropy"] = attention_entropy(signals.mass, self.weights.shares)
        return parts

    def _total(self, parts: Mapping[str, Tensor]) -> Tensor:
        weighted = [getattr(self.config.losses, name) * value for name, value in parts.items()]
        return torch.stack(weighted).sum()

    def _update(self) -> None:
        """Make the step that the gradients ask for."""
        parameters = list(self.parameters().values())
        torch.nn.utils.clip_grad_norm_(list(self._factors.values()), self.config.max_gradient)
        factor = _schedule(self.step, self.steps, self.config)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self._optimizer.step()
        for parameter in parameters:
            parameter.grad = None


def _by_documents(examples: Sequence[AlignmentExample]) -> list[list[AlignmentExample]]:
    """Group examples that have the same documents, so that these run once."""
    groups: dict[tuple[str, ...], list[AlignmentExample]] = {}
    for example in examples:
        groups.setdefault(tuple(example.documents), []).append(example)
    return list(groups.values())


def _schedule(step: int, steps: int, config: AlignmentConfig) -> float:
    """Return the factor of the learning rate in a step, counted from 0."""
    warm = max(1, round(config.warmup * steps))
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2


def _ndcg(scores: Tensor, example: AlignmentExample) -> float:
    """Measure nDCG@10 of the scores; NaN without grades or without a relevant document."""
    if example.grades is None or max(example.grades) <= 0:
        return math.nan
    gains = torch.tensor(example.grades, dtype=torch.float64).clamp(min=0)
    return float(ndcg(scores.cpu()[None], gains, gains))
