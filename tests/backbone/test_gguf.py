"""GGUF files are parsed once per load, to the same result, and nobody else notices."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from routehead_plugins.backbone import conversions, loading
from routehead_plugins.backbone.gguf import parsed_once
from routehead_plugins.backbone.loading import load, load_model, load_tokenizer
from routehead_plugins.errors import ModelLoadError

CPU = torch.device("cpu")
USUAL = gguf.GGUFReader, gguf.get_tensor_name_map
WIDTH, INNER, LAYERS, HEADS, KEY_HEADS = 64, 96, 3, 4, 2
VOCABULARY = [*families.CONTROLS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "el"]
SHAPES = {
    "attn_norm": (WIDTH,),
    "attn_q": (WIDTH, WIDTH),
    "attn_k": (WIDTH // 2, WIDTH),
    "attn_v": (WIDTH // 2, WIDTH),
    "attn_output": (WIDTH, WIDTH),
    "ffn_norm": (WIDTH,),
    "ffn_gate": (INNER, WIDTH),
    "ffn_up": (INNER, WIDTH),
    "ffn_down": (WIDTH, INNER),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose products are quantized; not to be changed."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3 if token in families.CONTROLS else 1 for token in VOCABULARY])
    writer.add_token_merges(["h e", "e l"])  # a list of one is read as a text
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    add_weights(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_weights(writer: gguf.GGUFWriter) -> None:
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(VOCABULARY), WIDTH), "output_norm": (WIDTH,)}
    shapes |= {
        f"blk.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in SHAPES.items()
    }
    for name, shape in shapes.items():
        weight = random.normal(size=shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", weight)
            continue
        kind = Kind.Q8_0 if name == "token_embd" else Kind.Q4_1
        writer.add_tensor(f"{name}.weight", gguf.quantize(weight, kind), raw_dtype=kind)


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    yield
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == USUAL


def arguments(path: Path) -> dict[str, Any]:
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


def load_shallow(path: Path, layers: int) -> PreTrainedModel:
    return load_model(str(path), dtype=torch.float32, device=CPU, layers=lambda _: layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_weights_are_those_that_transformers_reads_by_itself(
    path: Path, dtype: torch.dtype
) -> None:
    plain: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # earlier releases always dequantize
        plain["quantization_config"] = transformers.GgufConfig(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(**arguments(path), dtype=dtype, **plain)
    ours = load_model(str(path), dtype=dtype, device=CPU)
    assert ours.config.to_dict() == theirs.config.to_dict()
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, weight in ours.state_dict().items():
        assert weight.dtype == dtype
        assert torch.equal(weight, expected[name])


def test_the_tokenizer_is_the_one_that_transformers_builds_by_itself(path: Path) -> None:
    theirs, ours = AutoTokenizer.from_pretrained(**arguments(path)), load_tokenizer(str(path))
    assert type(ours) is type(theirs)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.encode("he<s>h", add_special_tokens=False) == [
        VOCABULARY.index(token) for token in ("he", "<s>", "h")
    ]


def test_leading_layers_are_those_of_the_whole_llm(path: Path) -> None:
    whole = load_model(str(path), dtype=torch.float32, device=CPU).state_dict()
    shallow = load_shallow(path, 2)
    assert shallow.config.num_hidden_layers == LAYERS
    kept = {name for name in whole if "layers.2." not in name}
    assert set(shallow.state_dict()) == kept
    assert all(torch.equal(weight, whole[name]) for name, weight in shallow.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_converted_llm_is_the_same_to_the_last_bit(
    path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("ROUTEHEAD_CACHE_LIMIT", "0")
        direct, tokenizer = load(str(path), dtype=dtype, device=CPU)
    converts = load(str(path), dtype=dtype, device=CPU)
    monkeypatch.setattr(gguf, "GGUFReader", None)  # it is not parsed any more
    for model, kept in (converts, load(str(path), dtype=dtype, device=CPU)):
        expected = direct.state_dict()
        assert model.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
        assert {value.dtype for value in model.state_dict().values()} == {dtype}
        assert kept.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
        assert kept.special_tokens_map == tokenizer.special_tokens_map
    monkeypatch.setattr(gguf, "GGUFReader", USUAL[0])


def test_leading_layers_of_a_converted_llm_are_loaded(path: Path) -> None:
    load(str(path), dtype=torch.float32, device=CPU)
    model, _ = load(str(path), dtype=torch.float32, device=CPU, layers=lambda depth: depth - 1)
    assert model.config.num_hidden_layers == LAYERS
    assert sum("q_proj" in name for name in model.state_dict()) == LAYERS - 1


def test_a_conversion_is_made_without_the_arguments_of_one_caller(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "shared.gguf"
    copy.write_bytes(path.read_bytes() + b"  ")
    theirs, seen = AutoModelForCausalLM.from_pretrained, []

    def record(*args: Any, **kwargs: Any) -> Any:
        seen.append(("gguf_file" in kwargs, kwargs.get("use_safetensors")))
        return theirs(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", record)
    kwargs = {"use_safetensors": True}
    load(str(copy), dtype=torch.float32, device=CPU, model_kwargs=kwargs)
    assert seen == [(True, None), (False, True)]


def test_a_damaged_conversion_is_not_used(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "own.gguf"
    copy.write_bytes(path.read_bytes() + b" ")
    load(str(copy), dtype=torch.float32, device=CPU)
    (kept,) = (kept for kept in conversions() if kept.name == "own.gguf")
    weights = kept.folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    model, _ = load(str(copy), dtype=torch.float32, device=CPU)
    assert sum("q_proj" in name for name in model.state_dict()) == LAYERS
    kept.remove()


class Counted(gguf.GGUFReader):
    """A reader that counts how often it is built."""

    built = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        Counted.built += 1
        super().__init__(*args, **kwargs)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Counted]]:
    Counted.built = 0
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", Counted)
        yield Counted
        assert gguf.GGUFReader is Counted


def test_the_file_is_parsed_once_for_a_model(path: Path, counted: type[Counted]) -> None:
    load_model(str(path), dtype=torch.float32, device=CPU)
    assert counted.built == 1
    load_shallow(path, 1)
    assert counted.built == 2


def test_the_file_is_parsed_once_for_model_and_tokenizer(
    path: Path, counted: type[Counted], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROUTEHEAD_CACHE_LIMIT", "0")
    model, tokenizer = load(str(path), dtype=torch.float32, device=CPU, layers=lambda _: 1)
    assert counted.built == 1
    assert sum("q_proj" in name for name in model.state_dict()) == 1
    assert tokenizer.encode("he", add_special_tokens=False) == [VOCABULARY.index("he")]


def test_layers_may_load_the_same_file(path: Path, counted: type[Counted]) -> None:
    def one(total: int) -> int:
        ids = load_tokenizer(str(path)).encode("he", add_special_tokens=False)
        assert ids == [VOCABULARY.index("he")]
        return total - 2

    load_model(str(path), dtype=torch.float32, device=CPU, layers=one)
    assert counted.built == 1


def test_a_file_that_has_changed_is_parsed_again(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model.gguf"
    copy.write_bytes(path.read_bytes())
    load_tokenizer(str(copy))
    copy.write_bytes(b"GGUF")
    with pytest.raises(ModelLoadError):
        load_tokenizer(str(copy))


def test_an_error_leaves_the_package_as_it_was() -> None:
    def fail() -> None:
        with parsed_once(), parsed_once():
            assert USUAL[0] is not gguf.GGUFReader
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == USUAL


def test_other_threads_get_the_usual_reader_meanwhile(path: Path) -> None:
    readers: list[Any] = []

    def read() -> None:
        readers.append(gguf.GGUFReader(path))

    with parsed_once():
        ours = gguf.GGUFReader(path)
        assert gguf.GGUFReader(path) is ours
        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
    assert type(readers[0]) is USUAL[0]


def test_two_threads_that_load_at_once_leave_the_package_as_it_was() -> None:
    inside, leave = threading.Event(), threading.Event()

    def second() -> None:
        with parsed_once():
            inside.set()
            leave.wait(5)

    thread = threading.Thread(target=second)
    with parsed_once():
        thread.start()
        inside.wait(0.2)  # it may have to wait for the lock
    leave.set()
    thread.join()
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == USUAL


def test_the_package_is_left_alone_by_other_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    families.tiny_model("llama").save_pretrained(tmp_path)
    monkeypatch.setattr(loading, "parsed_once", None)
    load_model(str(tmp_path), dtype=torch.float32, device=CPU)


def test_verbosity_is_as_it_was_while_layers_is_asked(path: Path) -> None:
    before, seen = logging.get_verbosity(), []

    def all_of_them(total: int) -> int:
        seen.append(logging.get_verbosity())
        return total

    load_model(str(path), dtype=torch.float32, device=CPU, layers=all_of_them)
    assert seen == [before]
