"""Loading the leading layers only: they do what they did, and nothing of the others is touched."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Gemma3nTextConfig,
    GPT2Config,
    PreTrainedConfig,
    PreTrainedModel,
    modeling_utils,
)

from routehead_plugins.backbone.loading import load_model
from routehead_plugins.errors import InputError, ModelLoadError

CPU = torch.device("cpu")
OTHERS: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(  # its layers have another name
        vocab_size=families.VOCABULARY, n_embd=32, n_layer=4, n_head=4, n_positions=128
    ),
    "gemma3n": Gemma3nTextConfig(  # the last layers share keys; embeddings are per layer
        vocab_size=families.VOCABULARY,
        vocab_size_per_layer_input=families.VOCABULARY,
        hidden_size=32,
        intermediate_size=[48] * 4,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        head_dim=16,
        sliding_window=24,
        num_kv_shared_layers=2,
        activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
}
FAMILIES = [*families.CONFIGS, *OTHERS]


def build(family: str) -> PreTrainedModel:
    if family in families.CONFIGS:
        return families.tiny_model(family)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(OTHERS[family]).eval()
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directories written by ``save_pretrained``, one per family; not to be changed."""
    root = tmp_path_factory.mktemp("saved")

    def folder(family: str) -> Path:
        if not (root / family).is_dir():
            build(family).save_pretrained(root / family)
        return root / family

    return folder


@pytest.fixture
def llama(saved: Callable[[str], Path], tmp_path: Path) -> Path:
    """A Llama of four layers, to be changed."""
    return Path(shutil.copytree(saved("llama"), tmp_path / "llama"))


def load(name: str | Path, layers: int) -> PreTrainedModel:
    return load_model(str(name), dtype=torch.float32, device=CPU, layers=lambda _: layers)


def stack(model: PreTrainedModel) -> nn.ModuleList:
    decoder = model.get_decoder()
    layers = decoder.h if hasattr(decoder, "h") else decoder.layers
    assert isinstance(layers, nn.ModuleList)
    return layers


@torch.inference_mode()
def states(model: PreTrainedModel, layer: int) -> Tensor:
    """What a layer hands on, before the final norm."""
    seen: list[Any] = []
    handle = stack(model)[layer].register_forward_hook(lambda *call: seen.append(call[2]))
    ids = torch.randint(families.VOCABULARY, (1, 60), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, use_cache=False)
    handle.remove()
    (state,) = seen
    state = state[0] if isinstance(state, tuple) else state
    assert isinstance(state, Tensor)
    return state


def is_kept_of_two(weight: str) -> bool:
    """Tell whether a weight belongs to an LLM of which two layers are left."""
    return re.search(r"\b(layers|h)\.[23]\.", weight) is None


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_leading_layers_do_what_they_do_in_the_whole_llm(
    family: str, layers: int, saved: Callable[[str], Path]
) -> None:
    expected = states(build(family), layers - 1)
    assert expected.std() > 1e-2
    assert torch.equal(states(load(saved(family), layers), layers - 1), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_of_the_deeper_layers_is_in_memory(
    family: str, saved: Callable[[str], Path]
) -> None:
    whole, shallow = build(family).state_dict(), load(saved(family), 2).state_dict()
    assert set(shallow) == set(filter(is_kept_of_two, whole))
    assert len(shallow) < len(whole)
    assert all(value.device == CPU for value in shallow.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_class_and_configuration_are_those_of_the_whole_llm(
    family: str, saved: Callable[[str], Path]
) -> None:
    whole = load_model(str(saved(family)), dtype=torch.float32, device=CPU)
    shallow = load(saved(family), 1)
    assert type(shallow) is type(whole)
    assert shallow.config.to_dict() == whole.config.to_dict()
    assert shallow.config.num_hidden_layers == 4
    assert not shallow.training


class Watched:
    """A weights file that notes which of its tensors are read."""

    read: set[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._file: Any = safe_open(*args, **kwargs)

    def get_slice(self, key: str) -> Any:
        return WatchedSlice(self._file.get_slice(key), key, self.read)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)


class WatchedSlice:
    def __init__(self, inner: Any, key: str, read: set[str]) -> None:
        self._inner, self._key, self._read = inner, key, read

    def __getitem__(self, place: Any) -> Any:
        self._read.add(self._key)
        return self._inner[place]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_of_the_deeper_layers_is_read_from_the_disk(
    family: str, saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(family)
    monkeypatch.setattr(Watched, "read", set(), raising=False)
    monkeypatch.setattr(modeling_utils, "safe_open", Watched)
    load(folder, 2)
    written = set(load_file(folder / "model.safetensors"))
    assert Watched.read == set(filter(is_kept_of_two, written))
    assert len(Watched.read) < len(written)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_deeper_layers_need_not_even_be_sound(llama: Path) -> None:
    def spoil(weights: dict[str, Tensor]) -> None:
        weights["model.layers.2.self_attn.q_proj.weight"] = torch.zeros(3)
        del weights["model.layers.3.self_attn.q_proj.weight"]

    rewrite(llama, spoil)
    with pytest.raises(ModelLoadError):
        load(llama, 4)
    assert torch.equal(states(load(llama, 2), 1), states(build("llama"), 1))


def test_a_missing_weight_of_a_leading_layer_is_refused(llama: Path) -> None:
    rewrite(llama, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelLoadError) as error:
        load(llama, 2)
    assert str(error.value) == (
        f"model {str(llama)!r} lacks 1 of its weights, such as "
        "'model.layers.1.mlp.up_proj.weight'; download or save it again."
    )
    load(llama, 1)


def test_layers_is_told_how_many_there_are(saved: Callable[[str], Path]) -> None:
    told = []

    def half(total: int) -> int:
        told.append(total)
        return total // 2

    model = load_model(str(saved("llama")), dtype=torch.float32, device=CPU, layers=half)
    assert told == [4]
    assert len(stack(model)) == 2


@pytest.mark.parametrize("layers", [-1, 0, 5])
def test_a_number_of_layers_that_there_is_not_is_refused(
    layers: int, saved: Callable[[str], Path]
) -> None:
    with pytest.raises(InputError) as error:
        load(saved("llama"), layers)
    assert str(error.value) == (
        f"layers={layers} is not a number that {str(saved('llama'))!r} can be cut to; give 1 to 4."
    )


def test_what_layers_raises_is_passed_on(saved: Callable[[str], Path]) -> None:
    def refuse(total: int) -> int:
        raise KeyError(total)

    with pytest.raises(KeyError, match=r"^4$"):
        load_model(str(saved("llama")), dtype=torch.float32, device=CPU, layers=refuse)


def test_an_llm_whose_layers_stand_elsewhere_is_loaded_whole(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = BertConfig(**sizes, vocab_size=99, num_hidden_layers=4, is_decoder=True)
    whole: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    whole.save_pretrained(tmp_path)
    assert set(load(tmp_path, 2).state_dict()) == set(whole.state_dict())


def test_nothing_is_printed_about_the_deeper_layers(
    saved: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    load(saved("llama"), 1)
    assert tuple(capfd.readouterr()) == ("", "")


def test_random_numbers_go_on_where_they_were(saved: Callable[[str], Path]) -> None:
    before = torch.get_rng_state()
    load(saved("llama"), 1)
    assert torch.equal(torch.get_rng_state(), before)
