"""Train an adapter and head weights so that the heads' attention ranks like labels or a teacher."""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from routehead_plugins.alignment.checkpoint import Checkpoint, State, open_checkpoint
from routehead_plugins.alignment.config import AlignmentConfig
from routehead_plugins.alignment.examples import AlignmentExample
from routehead_plugins.alignment.result import Alignment, Gain
from routehead_plugins.alignment.trainer import Look, Trainer
from routehead_plugins.backbone import Adapter, FrozenLM
from routehead_plugins.data import as_list
from routehead_plugins.errors import InputError, UnsupportedModelError, class_name
from routehead_plugins.files import StrPath

# Seconds between two writes of the state, apart from those after looks at the held-out queries.
_SAVE_SECONDS = 60.0
_BEST = "best."


@dataclass(frozen=True)
class Progress:
    """A finished step, for progress bars.

    Attributes:
        step: Number of finished steps.
        steps: Number of steps in all.
        losses: Means of the losses of this step; ``loss`` is their weighted sum.
        tokens: Number of tokens run so far.
        held_out: Figures of the last look at the held-out queries; empty without any.
        looked: Step of that look; -1 without any.
    """

    step: int
    steps: int
    losses: dict[str, float]
    tokens: int
    held_out: dict[str, float]
    looked: int


def align(
    llm: FrozenLM,
    examples: Sequence[AlignmentExample],
    config: AlignmentConfig | None = None,
    *,
    held_out: Sequence[AlignmentExample] | None = None,
    start: Adapter | None = None,
    folder: StrPath | None = None,
    name: str = "aligned",
    advance: Callable[[Progress], None] = lambda _: None,
) -> Alignment:
    """Train an adapter and head weights on queries with candidates.

    After HeadRank (arXiv 2604.17237). The LLM stays as it is. Training stops early when held-out
    queries no longer gain, and the parameters of the best look at them are returned.

    Args:
        llm: The LLM, without an adapter.
        examples: Examples to learn from.
        config: Settings.
        held_out: Examples to judge by; by default a share of ``examples``, which is then not
            learned from.
        start: An adapter to go on from, with its own rank, projections and weights of heads; a new
            one by default.
        folder: Folder for the state of the run, from which it resumes after an interruption.
        name: Name of the adapter.
        advance: Callback after every step.

    Raises:
        InputError: There are too few examples, the state in the folder is of another run, or the
            loss is not finite.
        HeadError: The LLM does not have the heads.
        UnsupportedModelError: The LLM has an adapter already.
        PromptTooLongError: An example does not fit the LLM's context.
        MissingExtraError: peft is not installed.
    """
    config = AlignmentConfig() if config is None else config
    learned, judged = _split(examples, held_out, config)
    trainer = _trainer(llm, learned, config, start)
    described = _described(config, start)
    settings = {
        **described,
        "llm": llm.fingerprint(trainer.heads.last_layer),
        "examples": _digest([*learned, *judged]),
    }
    with nullcontext() if folder is None else open_checkpoint(folder, settings) as checkpoint:
        run = _Run(trainer, judged, checkpoint, advance)
        run.to_the_end()
    adapter = trainer.adapter(name)
    return Alignment(
        adapter=adapter,
        heads=replace(trainer.head_set(), adapter=adapter.label),
        gain=run.gain(),
        history=tuple(run.history),
        settings=described,
        llm=llm.name,
        queries=len(learned),
    )


def _described(config: AlignmentConfig, start: Adapter | None) -> dict[str, Any]:
    """Return the settings of the run; an adapter to go on from has some of its own."""
    settings = config.settings()
    if start is None:
        return settings
    names = start.config["target_modules"]
    projections = [names] if isinstance(names, str) else sorted(names)
    own = {"start": start.label, "rank": start.config["r"], "projections": projections}
    return settings | own


def _trainer(
    llm: FrozenLM,
    learned: Sequence[AlignmentExample],
    config: AlignmentConfig,
    start: Adapter | None,
) -> Trainer:
    """Give the LLM a new adapter, or the one to go on from.

    Raises:
        UnsupportedModelError: The LLM has an adapter already.
    """
    if llm.adapter is not None:
        raise UnsupportedModelError(
            f"{llm.name!r} has the adapter {llm.adapter.name!r}; train with the LLM alone."
        )
    heads = config.chosen_heads(llm)
    if start is not None:
        trainer = Trainer(llm.with_adapter(start), heads, learned, config)
        trainer.start_from(start.heads)
        return trainer
    adapter = llm.new_adapter(
        range(heads.last_layer + 1),
        rank=config.rank,
        alpha=config.alpha,
        projections=config.projections,
        seed=config.seed,
    )
    return Trainer(llm.with_adapter(adapter), heads, learned, config)


@dataclass
class _Run:
    """The loop over steps, with early stop and resumption."""

    trainer: Trainer
    judged: Sequence[AlignmentExample]
    checkpoint: Checkpoint | None
    advance: Callable[[Progress], None]
    history: list[dict[str, Any]] = field(default_factory=list)
    looks_without_gain: int = 0

    def to_the_end(self) -> None:
        """Train until all steps are done or the held-out queries stop gaining."""
        trainer, patience = self.trainer, self.trainer.config.patience
        if not self._resume() and self.judged:
            self.first = self.best = trainer.look(self.judged)
            self._keep_best()
            self.history.append({"step": 0, "held_out": self.first.summary})
        saved = time.monotonic()
        while trainer.step < trainer.steps:
            if patience is not None and self.looks_without_gain >= patience:
                break
            losses = trainer.run_step()
            self.history.append({"step": trainer.step, "losses": losses})
            looked = self._look_if_due()
            if looked or time.monotonic() - saved > _SAVE_SECONDS:
                self._save()
                saved = time.monotonic()
            self.advance(self._progress(losses))
        if self.judged:
            trainer.load_parameters(self.best_parameters)

    def gain(self) -> Gain | None:
        """Return what the held-out queries gained; ``None`` if there are none."""
        if not self.judged:
            return None
        first, best = self.first, self.best
        graded = ~first.ndcg.isnan()
        if int(graded.sum()) > 1:
            return Gain.of("ndcg@10", first.ndcg[graded], best.ndcg[graded], sign=1)
        return Gain.of("loss", first.losses, best.losses, sign=-1)

    def _look_if_due(self) -> bool:
        trainer = self.trainer
        last = trainer.step == trainer.steps
        if not self.judged or (trainer.step % trainer.config.evaluate_every and not last):
            return False
        look = trainer.look(self.judged)
        self.history.append({"step": trainer.step, "held_out": look.summary})
        if look.loss < self.best.loss:
            self.best, self.looks_without_gain = look, 0
            self._keep_best()
        else:
            self.looks_without_gain += 1
        return True

    def _keep_best(self) -> None:
        self.best_parameters = {
            name: parameter.detach().clone()
            for name, parameter in self.trainer.parameters().items()
        }

    def _progress(self, losses: dict[str, float]) -> Progress:
        looks = [record for record in self.history if "held_out" in record]
        last: dict[str, Any] = looks[-1] if looks else {"held_out": {}, "step": -1}
        trainer = self.trainer
        return Progress(
            trainer.step, trainer.steps, losses, trainer.tokens, last["held_out"], last["step"]
        )

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        tensors = self.trainer.state()
        progress: dict[str, Any] = {
            "step": self.trainer.step,
            "tokens": self.trainer.tokens,
            "history": self.history,
            "looks_without_gain": self.looks_without_gain,
        }
        if self.judged:
            best = self.best_parameters.items()
            tensors |= {f"{_BEST}{name}": tensor for name, tensor in best}
            for name, look in (("first", self.first), ("best", self.best)):
                tensors |= {f"{name}.losses": look.losses, f"{name}.ndcg": look.ndcg}
                progress[name] = dict(look.parts)
        self.checkpoint.write(State(tensors, progress))

    def _resume(self) -> bool:
        """Take over the state on disk; false if there is none."""
        state = None if self.checkpoint is None else self.checkpoint.read()
        if state is None:
            return False
        progress = state.progress
        self.trainer.load_state(state.tensors, progress["step"], progress["tokens"])
        self.history = list(progress["history"])
        self.looks_without_gain = progress["looks_without_gain"]
        if self.judged:
            device = self.trainer.llm.device
            self.best_parameters = {
                name.removeprefix(_BEST): tensor.to(device)
                for name, tensor in state.tensors.items()
                if name.startswith(_BEST)
            }
            self.first, self.best = (_look_of(state, name) for name in ("first", "best"))
        return True


def _look_of(state: State, name: str) -> Look:
    tensors = state.tensors
    return Look(tensors[f"{name}.losses"], tensors[f"{name}.ndcg"], state.progress[name])


def _split(
    examples: Sequence[AlignmentExample],
    held_out: Sequence[AlignmentExample] | None,
    config: AlignmentConfig,
) -> tuple[list[AlignmentExample], list[AlignmentExample]]:
    """Return the examples to learn from and those to judge by.

    Raises:
        InputError: There are too few, or one has nothing that the losses can use.
    """
    given = as_list(examples, "examples", "AlignmentExamples")
    others = [] if held_out is None else as_list(held_out, "held_out", "AlignmentExamples")
    for example in [*given, *others]:
        if not isinstance(example, AlignmentExample):
            raise InputError(
                f"examples holds a {class_name(example)}; give AlignmentExample objects."
            )
        _check_usable(example, config)
    if held_out is None:
        random.Random(f"held out {config.seed}").shuffle(given)
        count = math.ceil(config.held_out * len(given))
        given, others = given[count:], given[:count]
    if not given:
        raise InputError("examples leaves no query to learn from; give more.")
    return given, others


def _check_usable(example: AlignmentExample, config: AlignmentConfig) -> None:
    losses = config.losses
    scored = losses.distillation and example.teacher is not None
    graded = losses.preference and example.grades is not None
    if not scored and not graded:
        raise InputError(
            f"query={example.query[:40]!r} has nothing to learn from with distillation="
            f"{losses.distillation:g} and preference={losses.preference:g}; give it teacher "
            "scores or grades."
        )


def _digest(examples: Sequence[AlignmentExample]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for example in examples:
        content = [example.query, example.documents, example.grades, example.teacher]
        digest.update(json.dumps(content).encode())
    return digest.hexdigest()
