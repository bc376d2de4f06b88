"""Signals with gradients: those of the re-ranker, of a pass for every layer, and differences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import families
import lora
import pytest
import reference
import torch
from torch import Tensor

from routehead_plugins import FrozenLM, HeadRoutedAttentionReranker
from routehead_plugins.alignment import passes as module
from routehead_plugins.alignment.passes import late_signals, parallel_signals
from routehead_plugins.errors import PromptTooLongError
from routehead_plugins.layouts import LateLayout

QUERY = "which wolf ran?"
DOCUMENTS = ["a wolf ran over the hill", "rain", "seven grey stones by a river, one of them wet"]
OTHERS = ("rain in may", ["rain", "a hat"])  # one document is shared
LAYOUT = LateLayout(document_room=16)  # within the windows of some families


def adapted(family: str, layers: Sequence[int] = range(3)) -> FrozenLM:
    llm = FrozenLM(families.tiny_model(family), families.tiny_tokenizer(), name=family)
    return llm.with_adapter(lora.random_adapter(llm, layers))


def prompts(llm: FrozenLM, **options: Any) -> list[Any]:
    given = ((QUERY, DOCUMENTS), OTHERS)
    return [llm.encoder.pieces(*one, numbered=False, **options) for one in given]


def read(llm: FrozenLM, passes: Any, layout: str, given: list[Any], **options: Any) -> list[Any]:
    if layout == "late":
        return late_signals(llm, passes, given, llm.heads, layout=LAYOUT, **options)
    return parallel_signals(llm, passes, given, llm.heads, **options)


@pytest.mark.parametrize("layout", ["late", "parallel"])
@pytest.mark.parametrize("family", families.CONFIGS)
def test_signals_equal_those_of_the_reranker(family: str, layout: str) -> None:
    llm = adapted(family)
    with llm.gradients() as passes:
        signals = read(llm, passes, layout, prompts(llm))
    for calibrate in (True, False):
        reranker = HeadRoutedAttentionReranker(
            llm,
            layout=LAYOUT if layout == "late" else layout,
            calibrate=calibrate,
            drop_outliers=False,
        )
        for one, (query, documents) in zip(signals, ((QUERY, DOCUMENTS), OTHERS), strict=True):
            expected = reranker.signals(query, documents)
            actual = one.calibrated if calibrate else one.mass
            torch.testing.assert_close(actual.detach(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt-oss", "phimoe"])
def test_mass_equals_that_of_a_pass_for_every_layer_of_merged_weights(family: str) -> None:
    llm = adapted(family)
    assert llm.adapter is not None
    twin = reference.eager_twin(lora.merged(families.tiny_model(family), llm.adapter))
    pieces, start = prompts(llm)[0], LAYOUT.frame(llm).start
    documents = [list(document.ids) for document in pieces.documents]
    read = reference.late_attention(twin, list(pieces.prefix), documents, list(pieces.tail), start)
    spans, at = [], len(pieces.prefix)
    for document in pieces.documents:
        spans.append((at + document.text.start, at + document.text.end))
        at += len(document.ids)
    expected = reference.signals(read, None, spans, list(llm.heads), drop_outliers=False)
    with llm.gradients() as passes:
        (one,) = late_signals(llm, passes, [pieces], llm.heads, calibrate=False, layout=LAYOUT)
    torch.testing.assert_close(one.mass.detach(), torch.tensor(expected), atol=1e-5, rtol=0)
    assert one.null_mass is None


def total(llm: FrozenLM, passes: Any, *, calibrate: bool, layout: str = "late") -> Tensor:
    """One number that depends on every signal."""
    signals = read(llm, passes, layout, prompts(llm), calibrate=calibrate)
    tables = [one.calibrated if calibrate else one.mass.clamp(min=1e-9).log() for one in signals]
    signs = [torch.arange(table.numel()).view(table.shape).cos() for table in tables]
    return torch.stack(
        [(table * sign).sum() for table, sign in zip(tables, signs, strict=True)]
    ).sum()


@pytest.mark.parametrize("layout", ["late", "parallel"])
@pytest.mark.parametrize("calibrate", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt-oss", "mistral"])
def test_gradients_equal_finite_differences(family: str, calibrate: bool, layout: str) -> None:
    # The choice of experts jumps, so that differences through it show nothing.
    llm = adapted(family, [3] if family == "gpt-oss" else range(3))
    with llm.gradients() as passes:
        total(llm, passes, calibrate=calibrate, layout=layout).backward()
        # Nothing reads what the deepest layer does with its values.
        without = [key for key, factor in passes.factors.items() if factor.grad is None]
        assert all(".layers.3.self_attn.v_proj." in key for key in without)
        factors = [factor for factor in passes.factors.values() if factor.grad is not None]
        generator = torch.Generator().manual_seed(0)
        for factor in factors:
            direction = torch.randn(factor.shape, generator=generator)
            slope = float((cast(Tensor, factor.grad) * direction).sum())
            with torch.no_grad():
                values = []
                for step in (1e-3, -1e-3):
                    factor.add_(direction, alpha=step)
                    values.append(float(total(llm, passes, calibrate=calibrate, layout=layout)))
                    factor.sub_(direction, alpha=step)
            measured = (values[0] - values[1]) / 2e-3
            assert measured == pytest.approx(slope, rel=0.03, abs=0.03)


@pytest.mark.parametrize("layout", ["late", "parallel"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss"])
def test_gradients_are_the_same_when_results_are_computed_again(family: str, layout: str) -> None:
    llm = adapted(family)
    gradients = []
    for checkpoints in (False, True):
        with llm.gradients(checkpoints=checkpoints) as passes:
            total(llm, passes, calibrate=True, layout=layout).backward()
        gradients.append([factor.grad for factor in passes.factors.values()])
        for factor in passes.factors.values():
            factor.grad = None
    torch.testing.assert_close(gradients[0], gradients[1])
    # The view is as it was.
    with llm.gradients() as passes:
        assert not [m for m in llm._view.modules() if "forward" in vars(m)]


def test_a_batch_gives_what_its_queries_give_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = adapted("llama")
    with llm.gradients() as passes:
        together = late_signals(llm, passes, prompts(llm), llm.heads)
        monkeypatch.setattr(module, "BATCH_TOKENS", 1)  # every document in a forward of its own
        for one, pieces in zip(together, prompts(llm), strict=True):
            (alone,) = late_signals(llm, passes, [pieces], llm.heads)
            torch.testing.assert_close(alone.mass, one.mass)
            torch.testing.assert_close(alone.null_mass, one.null_mass)


def test_documents_that_several_queries_share_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = adapted("llama")
    with llm.gradients() as passes:
        run, ran = passes.prefill, list[tuple[int, ...]]()

        def counted(sequences: Any, **options: Any) -> Any:
            ran.extend(sequences)
            return run(sequences, **options)

        monkeypatch.setattr(passes, "prefill", counted)
        late_signals(llm, passes, prompts(llm), llm.heads)
    assert len(ran) == 1 + 4  # the prefix, and four different documents


def test_a_document_that_does_not_fit_is_refused() -> None:
    llm = adapted("llama")
    long = llm.encoder.pieces(QUERY, ["wolf " * 1000, "rain"], numbered=False)
    with llm.gradients() as passes:
        for layout in ("late", "parallel"):
            with pytest.raises(PromptTooLongError, match="the longest document makes a prompt"):
                read(llm, passes, layout, [long])


def test_a_tail_that_does_not_fit_is_refused() -> None:
    llm = adapted("llama")
    long = llm.encoder.pieces("wolf " * 500, DOCUMENTS, numbered=False)
    with llm.gradients() as passes, pytest.raises(PromptTooLongError, match="shorten the query"):
        late_signals(llm, passes, [long], llm.heads)
