"""Changes that the owner of a wrapped model makes: each is followed as if it were wrapped then."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import families
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from routehead_plugins import FrozenLM, HeadSet
from routehead_plugins.backbone.model_state import ModelState, Weights
from routehead_plugins.errors import HeadError, UnsupportedModelError
from routehead_plugins.layouts import ReadOptions, SequentialLayout, get_layout

QUERY = "who keeps the bees?"
DOCUMENTS = ["The nuns keep bees behind the wall.", "salt", "Nobody keeps goats in town."]


class Adapted(nn.Module):
    """A linear layer with adapters, switched by plain attributes, as adapter libraries have it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        sizes = {"one": 1, "two": 2}
        self.down = nn.ParameterDict(
            {name: torch.randn(rank, base.in_features) for name, rank in sizes.items()}
        )
        self.up = nn.ParameterDict(
            {name: torch.randn(base.out_features, rank) for name, rank in sizes.items()}
        )
        self.scaling = dict.fromkeys(sizes, 0.5)
        self.active = ["one"]
        self.merged: list[str] = []
        self.disabled = False

    def delta(self, name: str) -> Tensor:
        delta: Tensor = self.up[name] @ self.down[name] * self.scaling[name]
        return delta

    def merge(self) -> None:
        """Add the adapters to the weights, past their version counter."""
        for name in self.active:
            self.base.weight.data += self.delta(name)
            self.merged.append(name)

    def forward(self, states: Tensor) -> Tensor:
        output: Tensor = self.base(states)
        if not self.disabled and not self.merged:
            for name in self.active:
                output = output + states @ self.delta(name).T
        return output


def llama() -> Any:
    """A model with a configuration of its own, which tests may change."""
    return copy.deepcopy(families.tiny_model("llama"))


def adapted_model() -> Any:
    model = llama()
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.q_proj, attention.k_proj = Adapted(attention.q_proj), Adapted(attention.k_proj)
    return model


def adapters(model: Any) -> list[Adapted]:
    return [module for module in model.modules() if isinstance(module, Adapted)]


def wrap(model: Any) -> FrozenLM:
    return FrozenLM(model, families.tiny_tokenizer(), name="kept")


def cached() -> Any:
    """Documents are then run alone, so that all results are equal to the last digit."""
    return get_layout("parallel", document_cache="1MB")


def results(llm: FrozenLM, layout: Any) -> list[Tensor]:
    heads = HeadSet([head for head in llm.heads if head.layer < 2])
    attention = layout.read(llm, QUERY, DOCUMENTS, heads, ReadOptions())
    return [attention.query, attention.null, llm.embed(DOCUMENTS, layer=2)]


def assert_follows(model: Any, llm: FrozenLM, layout: Any) -> list[Tensor]:
    """Check that a model is read as if it had been wrapped now, and return what is read."""
    expected = results(wrap(model), cached())
    assert all(map(torch.equal, results(llm, layout), expected))
    return expected


def set_all(name: str, value: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for adapter in adapters(model):
            setattr(adapter, name, value)

    return change


def scale(model: Any) -> None:
    for adapter in adapters(model):
        adapter.scaling["one"] *= 3


def merge(model: Any) -> None:
    for adapter in adapters(model):
        adapter.merge()


def append(model: Any) -> None:
    for adapter in adapters(model):
        adapter.active.append("two")


def unwrap(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.q_proj = layer.self_attn.q_proj.base


def write_data(model: Any) -> None:
    model.model.layers[0].self_attn.v_proj.weight.data.mul_(1.5)
    model.model.layers[0].self_attn.q_proj.base.weight.data.mul_(1.5)


def replace_data(model: Any) -> None:
    weight = model.model.layers[0].self_attn.q_proj.base.weight
    weight.data = weight.data * 2


def replace_parameter(model: Any) -> None:
    base = model.model.layers[0].self_attn.q_proj.base
    base.weight = nn.Parameter(base.weight.detach() * 2)


def change_buffer(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.5)


def replace_buffer(model: Any) -> None:
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 0.5


def remove_first_layer(model: Any) -> None:
    model.model.layers = model.model.layers[1:]


def swap_layers(model: Any) -> None:
    model.model.layers = nn.ModuleList(list(model.model.layers)[::-1])


def set_attribute(model: Any) -> None:
    model.model.layers[1].self_attn.scaling = 0.9


CHANGES: dict[str, Callable[[Any], Any]] = {
    "disable": set_all("disabled", True),
    "exchange": set_all("active", ["two"]),
    "activate one more": append,
    "scale": scale,
    "remove": unwrap,
    "write into data": write_data,
    "replace data": replace_data,
    "replace a parameter": replace_parameter,
    "change a buffer": change_buffer,
    "replace a buffer": replace_buffer,
    "remove a layer": remove_first_layer,
    "swap layers": swap_layers,
    "set an attribute": set_attribute,
    "change the number format": lambda model: model.to(torch.bfloat16),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_followed(change: str) -> None:
    model = adapted_model()
    llm, layout = wrap(model), cached()
    before = assert_follows(model, llm, layout)
    with torch.no_grad():
        CHANGES[change](model)
    after = assert_follows(model, llm, layout)
    assert not torch.allclose(before[0], after[0], atol=1e-5)


def test_merging_an_adapter_changes_nothing_and_counts_it_once() -> None:
    model = adapted_model()
    llm, layout = wrap(model), get_layout("sequential")
    before = results(llm, layout)
    merge(model)
    for one, other in zip(results(llm, layout), before, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_a_model_that_is_changed_back_is_read_as_at_first() -> None:
    model = adapted_model()
    llm, layout = wrap(model), cached()
    before = results(llm, layout)
    for _ in range(2):
        set_all("disabled", True)(model)
        assert not torch.equal(results(llm, layout)[0], before[0])
        set_all("disabled", False)(model)
        assert all(map(torch.equal, results(llm, layout), before))


def test_what_concerns_the_caller_alone_builds_no_new_view() -> None:
    model = adapted_model()
    llm = wrap(model)
    view, key = llm._view, llm.cache_key
    model.train()
    model.register_forward_hook(lambda *_: None)
    model.set_attn_implementation("eager")
    model.requires_grad_(False)
    model.generation_config.max_length = 9
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7]]), output_attentions=True)
    model.model.layers[0].self_attn.layer_idx = int("0")
    assert llm.cache_key == key
    assert llm._view is view
    assert not any(module.training for module in llm._whole.modules())
    assert model.training


def test_fewer_layers_leave_fewer_heads() -> None:
    model = llama()
    llm = wrap(model)
    assert llm.heads.last_layer == 3
    del model.model.layers[1:3]
    model.config.num_hidden_layers = 2
    assert (llm.heads.last_layer, llm.num_layers) == (1, 2)
    with pytest.raises(HeadError, match="3-0"):
        SequentialLayout().read(llm, QUERY, DOCUMENTS, HeadSet.parse("3-0"), ReadOptions())
    assert llm.heads == wrap(copy.deepcopy(model)).heads
    assert_follows(model, llm, cached())


def test_a_change_to_what_cannot_be_read_is_refused_until_it_is_undone() -> None:
    model = llama()
    llm, layout = wrap(model), get_layout("sequential")
    before = results(llm, layout)
    layers = model.model.layers
    model.model.layers = nn.ModuleList([layers[0], layers[0]])
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match=r"^'LlamaForCausalLM' has no attention"):
            results(llm, layout)
    model.model.layers = layers
    assert all(map(torch.equal, results(llm, layout), before))


def test_weights_that_hooks_compute_are_refused() -> None:
    model = llama().requires_grad_(False)
    llm = wrap(model)
    projection = model.model.layers[0].self_attn.q_proj
    prune.l1_unstructured(projection, "weight", amount=0.5)
    with pytest.raises(UnsupportedModelError, match="hooks compute weights of Linear; make them"):
        llm.embed(["salt"])
    prune.remove(projection, "weight")
    assert_follows(model, llm, cached())


def test_threads_that_read_while_others_look_at_the_heads_do_not_mix() -> None:
    model = adapted_model()
    llm, layout = wrap(model), get_layout("parallel")
    set_all("disabled", True)(model)

    with ThreadPoolExecutor(8) as pool:
        heads = [pool.submit(lambda: len(llm.heads)) for _ in range(8)]
        computed = list(pool.map(lambda _: results(llm, layout), range(8)))
    expected = results(wrap(model), get_layout("parallel"))
    assert all(torch.equal(*pair) for each in computed for pair in zip(each, expected, strict=True))
    assert {future.result() for future in heads} == {16}


def test_changes_of_the_configuration_are_noticed() -> None:
    model = llama()
    llm = wrap(model)
    key = llm.cache_key
    model.config.rope_parameters["rope_theta"] = 5.0
    assert llm.cache_key != key
    model.config.max_position_embeddings = 77
    assert llm.heads
    assert llm.max_tokens == 77


def test_states_are_equal_where_values_are() -> None:
    model = adapted_model()
    state = ModelState(model)
    held = [state.holds]
    for adapter in adapters(model):
        adapter.scaling = dict(adapter.scaling)
    held.append(state.holds)
    assert held == [True, False]  # another object
    assert state == ModelState(model)  # with the same values
    adapters(model)[0].scaling["two"] = 7.0
    assert state != ModelState(model)
    assert state != "another type"


def test_every_tensor_has_a_share_in_the_key_of_the_weights() -> None:
    model = families.tiny_model("gemma3")
    weights = Weights(model)
    keys = {weights.key()}
    assert keys == {weights.key()}
    tensors = [*model.parameters(), *model.buffers()]
    for tensor in tensors:
        tensor.data.add_(1)
        keys.add(weights.key())
    assert len(keys) == 1 + len(tensors)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapters_of_peft_are_followed() -> None:
    peft: Any = pytest.importorskip("peft")
    torch.manual_seed(0)

    def configuration() -> Any:
        targets = ["q_proj", "k_proj", "v_proj"]
        return peft.LoraConfig(r=2, lora_alpha=8, target_modules=targets, init_lora_weights=False)

    model = peft.get_peft_model(llama(), configuration()).eval()
    llm, layout = wrap(model), cached()
    first = assert_follows(model, llm, layout)
    model.merge_adapter()
    torch.testing.assert_close(assert_follows(model, llm, layout), first, atol=1e-5, rtol=0)
    model.unmerge_adapter()
    model.add_adapter("second", configuration())
    model.set_adapter("second")
    second = assert_follows(model, llm, layout)
    assert not torch.allclose(first[0], second[0], atol=1e-5)
    with model.disable_adapter():
        plain = assert_follows(model, llm, layout)
    bare = results(wrap(llama()), layout)
    # Merging and removing an adapter rounds the weights twice.
    torch.testing.assert_close(plain, bare, atol=3e-5, rtol=0)
    model.delete_adapter("default")
    torch.testing.assert_close(assert_follows(model, llm, layout), second, atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapters_that_add_tokens_are_refused() -> None:
    peft: Any = pytest.importorskip("peft")
    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(llama(), prefix)
    with pytest.raises(UnsupportedModelError, match="its adapter adds tokens to every prompt"):
        wrap(model)
