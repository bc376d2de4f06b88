"""Adapters: in a view only, as peft reads them, and never in the model."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import lora
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from routehead_plugins import FrozenLM, HeadRoutedAttentionReranker, HeadSet
from routehead_plugins.backbone import Adapter
from routehead_plugins.errors import (
    InputError,
    MissingExtraError,
    ModelLoadError,
    UnsupportedModelError,
)
from routehead_plugins.layouts import LateLayout

QUERY = "which wolf ran?"
DOCUMENTS = ["a wolf ran over the hill", "rain", "seven grey stones by a river, one of them wet"]
# Of peft, which uses an old name of transformers'.
OLD_NAME = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
FAMILIES = ["llama", "qwen3", "gemma2", "phi3", "gpt-oss"]


def frozen(family: str = "llama", **options: Any) -> FrozenLM:
    model, tokenizer = families.tiny_model(family), families.tiny_tokenizer()
    return FrozenLM(model, tokenizer, name=family, **options)


def signals(llm: FrozenLM, layout: str = "late") -> torch.Tensor:
    near = LateLayout(document_room=16)  # within the windows of some families
    chosen = near if layout == "late" else layout
    return HeadRoutedAttentionReranker(llm, layout=chosen).signals(QUERY, DOCUMENTS)


@pytest.fixture
def llm() -> FrozenLM:
    return frozen()


@pytest.mark.parametrize("layout", ["sequential", "parallel", "late"])
@pytest.mark.parametrize("family", FAMILIES)
def test_signals_equal_those_of_merged_weights(family: str, layout: str) -> None:
    llm = frozen(family)
    adapter = lora.random_adapter(llm)
    twin = lora.merged(families.tiny_model(family), adapter)
    expected = signals(FrozenLM(twin, families.tiny_tokenizer(), name=family), layout)
    actual = signals(llm.with_adapter(adapter), layout)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert not torch.allclose(actual, signals(llm, layout), atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_stays_bit_for_bit_as_it_is(family: str) -> None:
    model = families.tiny_model(family)
    next(model.parameters()).requires_grad_(False)  # as its owner has set it
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    asked = {name: tensor.requires_grad for name, tensor in model.named_parameters()}
    modules = [(name, id(module)) for name, module in model.named_modules()]
    base = FrozenLM(model, families.tiny_tokenizer(), name=family)
    plain = signals(base)
    adapted = base.with_adapter(lora.random_adapter(base))
    signals(adapted)
    with adapted.gradients() as passes:
        (keys,) = passes.prefill([(5, 6, 7)], last_layer=2)
        sum(key.sum() + value.sum() for key, value in keys.layers).backward()  # type: ignore[union-attr]
    assert any(factor.grad is not None for factor in passes.factors.values())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {name: tensor.requires_grad for name, tensor in model.named_parameters()} == asked
    assert [(name, id(module)) for name, module in model.named_modules()] == modules
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(signals(base), plain)


def test_several_adapters_share_one_model(llm: FrozenLM) -> None:
    one, other = (llm.with_adapter(lora.random_adapter(llm, seed=seed)) for seed in (1, 2))
    first = signals(one)
    assert not torch.allclose(first, signals(other), atol=1e-3)
    assert torch.equal(signals(one), first)
    assert torch.equal(signals(one.with_adapter(None)), signals(llm))
    # Caches of keys and records on disk tell them apart.
    lms = [llm, one, other]
    assert len({lm.cache_key for lm in lms}) == 3
    assert len({lm.fingerprint(2) for lm in lms}) == 3


def test_a_new_adapter_changes_nothing_yet(llm: FrozenLM) -> None:
    new = llm.with_adapter(llm.new_adapter(range(4)))
    assert torch.equal(signals(new), signals(llm))


def test_the_fingerprint_depends_on_weights_and_scale(llm: FrozenLM) -> None:
    adapter = lora.random_adapter(llm)
    other = replace(adapter, config={**adapter.config, "lora_alpha": 7.0})
    renamed = replace(adapter, name="other")
    assert adapter.fingerprint != other.fingerprint
    assert adapter.fingerprint == renamed.fingerprint
    assert llm.with_adapter(adapter).fingerprint(1) == llm.with_adapter(renamed).fingerprint(1)


def test_the_view_follows_changes_of_the_model_and_keeps_its_adapter() -> None:
    model = families.tiny_model("llama")
    base = FrozenLM(model, families.tiny_tokenizer(), name="llama")
    adapter = lora.random_adapter(base)
    adapted = base.with_adapter(adapter)
    before, key = signals(adapted), adapted.cache_key
    with torch.no_grad():
        model.get_parameter("model.layers.0.self_attn.q_proj.weight").mul_(2)
    model.config.rms_norm_eps *= 2  # makes the view anew
    twin = lora.merged(model, adapter)
    expected = signals(FrozenLM(twin, families.tiny_tokenizer(), name="llama"))
    torch.testing.assert_close(signals(adapted), expected, atol=1e-5, rtol=0)
    assert not torch.allclose(before, expected, atol=1e-3)
    assert adapted.cache_key != key


@OLD_NAME
def test_peft_reads_the_folder_and_computes_the_same(llm: FrozenLM, tmp_path: Path) -> None:
    adapter = lora.random_adapter(llm)
    adapter.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(families.tiny_model("llama"), tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    twin = lora.merged(families.tiny_model("llama"), adapter)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, twin(ids).logits, atol=1e-4, rtol=1e-4)
    again = Adapter.from_pretrained(tmp_path)
    assert again.fingerprint == adapter.fingerprint
    assert torch.equal(signals(frozen(adapter=tmp_path)), signals(llm.with_adapter(adapter)))


@OLD_NAME
def test_an_adapter_that_peft_wrote_is_read(llm: FrozenLM, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=False)
    theirs: Any = get_peft_model(families.tiny_model("llama"), config)
    theirs.save_pretrained(tmp_path)
    expected = FrozenLM(theirs.merge_and_unload(), families.tiny_tokenizer(), name="llama")
    actual = signals(llm.with_adapter(tmp_path))
    torch.testing.assert_close(actual, signals(expected), atol=1e-5, rtol=0)


def test_an_adapter_is_loaded_with_the_model(model: str, tmp_path: Path) -> None:
    llm = FrozenLM.from_pretrained(model, dtype="float32")
    lora.random_adapter(llm).save_pretrained(tmp_path)
    for adapter in (tmp_path, str(tmp_path), Adapter.from_pretrained(tmp_path)):
        loaded = FrozenLM.from_pretrained(model, dtype="float32", adapter=adapter)
        assert loaded.adapter is not None
        assert torch.equal(signals(loaded), signals(llm.with_adapter(tmp_path)))
    # Factors of layers that are not loaded are left out.
    shallow = FrozenLM.from_pretrained(model, dtype="float32", adapter=tmp_path, layers=lambda _: 2)
    torch.testing.assert_close(signals(shallow), signals(loaded)[: len(shallow.heads)])


def test_factors_stay_float32_beside_a_bfloat16_llm() -> None:
    model = families.tiny_model("llama").bfloat16()
    base = FrozenLM(model, families.tiny_tokenizer(), name="half")
    adapted = base.with_adapter(lora.random_adapter(base))
    with adapted.gradients() as passes:
        (keys,) = passes.prefill([(5, 6, 7)], last_layer=2)
        keys.layers[2][0].float().sum().backward()
    assert keys.layers[2][0].dtype == torch.bfloat16
    assert {factor.dtype for factor in passes.factors.values()} == {torch.float32}
    grads = [factor.grad for factor in passes.factors.values() if factor.grad is not None]
    assert grads
    assert {grad.dtype for grad in grads} == {torch.float32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"peft_type": "LOHA"}}, "its type is 'LOHA', not LORA"),
        ({"config": {"use_dora": True}}, "it sets use_dora, which is not read"),
        ({"config": {"modules_to_save": ["lm_head"]}}, "it sets modules_to_save"),
        ({"config": {"bias": "all"}}, "it changes biases"),
        ({"weights": {"strange": torch.zeros(1)}}, "it holds strange"),
        ({"text": "[]"}, "adapter_config.json is not an object"),
        ({"text": "{"}, "cannot be read"),
    ],
)
def test_other_kinds_of_adapters_are_refused(
    llm: FrozenLM, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    lora.random_adapter(llm).save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    if "config" in change:
        config.write_text(json.dumps(json.loads(config.read_text()) | change["config"]))
    if "text" in change:
        config.write_text(change["text"])
    weights = tmp_path / "adapter_model.safetensors"
    if "weights" in change:
        save_file(load_file(weights) | change["weights"], weights)
    with pytest.raises(ModelLoadError, match=message) as caught:
        Adapter.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nowhere", ModelLoadError, "adapter='nowhere' is not a folder"),
        ("", ModelLoadError, "is not a folder"),
        (7, InputError, "adapter=7 is a int; give an Adapter"),
    ],
)
def test_names_that_are_no_adapters_are_refused(
    llm: FrozenLM, name: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        llm.with_adapter(name)


def test_an_adapter_is_fetched_from_the_hub(
    llm: FrozenLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora.random_adapter(llm).save_pretrained(tmp_path)
    asked: list[Any] = []

    def fetch(name: str, **options: Any) -> str:
        asked.append((name, options["local_files_only"], sorted(options["allow_patterns"])))
        return str(tmp_path)

    monkeypatch.setattr("routehead_plugins.backbone.adapter.snapshot_download", fetch)
    adapter = Adapter.from_pretrained("somebody/aligned", local_files_only=True)
    files = ["adapter_config.json", "adapter_model.safetensors", "heads.json"]
    assert asked == [("somebody/aligned", True, files)]
    assert adapter.label.startswith("aligned-")

    def fail(*_: Any, **__: Any) -> str:
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr("routehead_plugins.backbone.adapter.snapshot_download", fail)
    with pytest.raises(ModelLoadError, match="cannot be fetched from the Hub") as caught:
        Adapter.from_pretrained("somebody/aligned")
    assert "\n" not in str(caught.value)


def test_heads_are_written_and_read_with_the_adapter(llm: FrozenLM, tmp_path: Path) -> None:
    heads = HeadSet.parse("1-2,0-1")
    adapter = replace(lora.random_adapter(llm), heads=heads)
    adapter.save_pretrained(tmp_path, {"README.md": "a card"})
    assert Adapter.from_pretrained(tmp_path).heads == heads
    assert (tmp_path / "README.md").read_text() == "a card"


def test_a_missing_library_is_named(llm: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = lora.random_adapter(llm)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r'pip install "routehead-plugins\[align\]"'):
        llm.with_adapter(adapter)


def test_an_adapter_of_another_llm_is_refused(llm: FrozenLM) -> None:
    other = frozen("qwen3")  # of other widths
    with pytest.raises(UnsupportedModelError, match="adapter 'random' does not fit 'Qwen3"):
        other.with_adapter(lora.random_adapter(llm))
    deep = lora.random_adapter(llm, [3])
    strange = {key.replace("q_proj", "o_proj"): value for key, value in deep.weights.items()}
    with pytest.raises(UnsupportedModelError, match="does not fit"):
        llm.with_adapter(replace(deep, weights=strange))


@OLD_NAME
def test_a_model_with_an_adapter_of_its_own_is_refused() -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"])
    theirs: Any = get_peft_model(families.tiny_model("llama"), config)
    model: PreTrainedModel = theirs.base_model.model
    llm = FrozenLM(model, families.tiny_tokenizer(), name="theirs")
    adapter = lora.random_adapter(frozen())
    with pytest.raises(UnsupportedModelError, match="has an adapter of peft already; merge it"):
        llm.with_adapter(adapter)


def test_projections_that_do_not_exist_are_refused(llm: FrozenLM) -> None:
    with pytest.raises(UnsupportedModelError, match="no linear projections called query"):
        llm.new_adapter(range(3), projections=["query"])
