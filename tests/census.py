"""Census of every causal LM class of transformers: is it read exactly, or refused by name?

A tiny model of each class is made from its own configuration, with windows and chunks shorter than
the prompt, and compared with its own eager attention. ``python tests/census.py`` writes the table
to docs/families.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import families
import reference
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from routehead_plugins import FrozenLM
from routehead_plugins.backbone import Pieces
from routehead_plugins.errors import UnsupportedModelError
from routehead_plugins.layouts import ParallelLayout, ReadOptions, SequentialLayout
from routehead_plugins.scoring import TokenAttention

MODEL_TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
TOLERANCE = 3e-6
PAGE = Path(__file__).parents[1] / "docs" / "families.md"
QUERY = "who ran?"
DOCUMENTS = ["a wolf ran over the hill", "rain", "seven grey stones, one of them wet"]

_LAYERS = 4
_WINDOW = 24  # tokens; the prompt is several times longer

# What makes a model tiny: names of settings, and the value that they all get.
_SIZES: list[tuple[str, Any]] = [
    ("vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size", 264),
    ("num_hidden_layers n_layer n_layers num_layers num_blocks depth", _LAYERS),
    ("decoder_layers encoder_layers num_encoder_layers num_decoder_layers", _LAYERS),
    ("conf_num_hidden_layers num_layers_per_stack num_global_layers", _LAYERS),
    ("hidden_size hidden_size_global d_model n_embd emb_dim dim embedding_dim", 32),
    ("embedding_size word_embed_proj_dim input_embedding_size output_embedding_size", 32),
    ("intermediate_size intermediate_size_mlp dense_intermediate_size mlp_dim n_inner", 48),
    ("ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size feed_forward_size", 48),
    ("d_inner d_ff dff dim_ff", 48),
    ("moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size", 16),
    ("expert_ffn_hidden_size moe_shared_expert_intermediate_size", 16),
    ("num_attention_heads n_head n_heads num_heads attention_heads swa_num_attention_heads", 4),
    ("decoder_attention_heads encoder_attention_heads conf_num_attention_heads", 4),
    ("num_encoder_attention_heads num_decoder_attention_heads", 4),
    ("num_key_value_heads num_kv_heads swa_num_key_value_heads num_query_groups", 2),
    ("head_dim swa_head_dim global_head_dim dim_head d_head kv_channels d_kv", 8),
    ("attention_head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim index_head_dim", 8),
    ("query_pre_attn_scalar", 8),
    ("qk_head_dim kv_lora_rank q_lora_rank o_lora_rank", 16),
    ("n_routed_experts num_experts num_local_experts moe_num_experts", 4),
    ("num_experts_per_tok num_experts_per_token moe_k moe_topk moe_top_k top_k_experts", 2),
    ("n_group topk_group num_expert_group", 1),
    ("sliding_window sliding_window_size window_size attention_window_size", _WINDOW),
    ("attention_chunk_size local_attention local_attention_window_len", _WINDOW),
    ("keep_window_size", _WINDOW),
    ("max_window_layers", 2),
    ("max_position_embeddings n_positions max_target_positions", 4096),
    ("shape_vocab_size pronunciation_vocab_size", 16),
    ("adapter_in_dim adapter_out_dim adapter_input_size", 32),
    ("initializer_range init_std initializer_std", 0.3),
    ("pad_token_id", 0),
    ("bos_token_id", 1),
    ("eos_token_id", 2),
]
_TINY = {name: value for names, value in _SIZES for name in names.split()}
# Set even where the configuration leaves them out, or switches them off.
_ALWAYS = {"sliding_window": _WINDOW, "use_sliding_window": True, "is_decoder": True}

# Settings that the rules above do not get right, by model type.
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8}
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_CONVOLUTION = {"layer_types": ["conv", "full_attention"] * 2}
_SHORT_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 16.0,
    "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.1,
}
_QUIRKS: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA,
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": _ALTERNATING
    | {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": _ALTERNATING
    | {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": _ALTERNATING | {"num_kv_shared_layers": 2},
    "granite_swa": {"attention_multiplier": 0.1},  # with more, float32 itself is inexact
    "granitemoe_swa": {"attention_multiplier": 0.1},
    "granitemoehybrid": _MAMBA,
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2": _CONVOLUTION,
    "lfm2_moe": _CONVOLUTION,
    "mamba2": {"head_dim": 16},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "index_block_size": 8,
        "index_topk_blocks": 1,
    },
    "ministral": {"head_dim": 8},
    "ministral3": {"rope_parameters": _SHORT_YARN},
    # Its window is for flash attention alone: the mask, and eager attention, have none.
    "moshi": {"sliding_window": 4096},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 8,
    },
    "reformer": {"axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
# Model types that no configuration alone makes a model of, and why.
_NOT_BUILT = {
    "gemma3n": "needs the package timm; see gemma3n_text",
    "gemma4_assistant": "a draft model, which continues the states of another model",
    "gemma4_unified_assistant": "a draft model, which continues the states of another model",
}


def _tiny_values(default: PreTrainedConfig) -> dict[str, Any]:
    """Return the settings that make a configuration tiny and keep every kind of its layers."""
    values: dict[str, Any] = {}
    settings = default.to_dict()
    depths = [settings.get(name) for name in ("num_hidden_layers", "n_layer", "num_layers")]
    depth = next((value for value in depths if isinstance(value, int)), 0)
    for name, value in settings.items():
        part = getattr(default, name, None) if isinstance(value, dict) else None
        if isinstance(part, PreTrainedConfig):
            values[name] = _tiny_values(part)
        elif isinstance(value, list) and len(value) == depth > 1:
            kinds = [entry for index, entry in enumerate(value) if entry not in value[:index]]
            values[name] = [kinds[i % len(kinds)] for i in range(max(_LAYERS, len(kinds)))]
        elif name in _ALWAYS:
            values[name] = _ALWAYS[name]
        elif name in _TINY and value is not None and not isinstance(value, list | dict):
            values[name] = _TINY[name]
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            values[name] = families.VOCABULARY - 1  # the tokenizer does not use it
    if "kv_lora_rank" in settings:  # latent attention: all heads have keys of their own
        values["num_key_value_heads"] = values["num_attention_heads"]
    return values | _QUIRKS.get(default.model_type, {})


def tiny_config(model_type: str) -> PreTrainedConfig:
    """Return a configuration of a few thousand weights for a model type."""
    kind = CONFIG_MAPPING[model_type]
    config = kind(**_tiny_values(kind()))
    # Of these, the causal LM is the decoder alone.
    return config.decoder if model_type.startswith("musicgen") else config


def tiny_causal_lm(model_type: str, seed: int = 0) -> PreTrainedModel:
    """Build a tiny model whose attention is far from uniform and whose every weight has a say."""
    config = tiny_config(model_type)
    torch.manual_seed(seed)
    if model_type.startswith("musicgen"):  # the automatic class expects the whole of it
        model = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])(config)
    else:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = float(parameter.std()) if parameter.numel() > 1 else 0.0
            if spread < 0.05:  # norms, biases, sinks and gates begin at zero or one
                parameter += 0.2 * torch.randn_like(parameter)
    return cast(PreTrainedModel, model.eval())


@dataclass(frozen=True)
class Entry:
    """What became of a model type.

    Attributes:
        model_type: Its name in configurations.
        class_name: Its causal LM class.
        status: "exact", "refused" or "not built".
        reason: Why it is refused or not built.
        sequential: Largest difference to eager attention in the sequential layout.
        parallel: The same in the parallel layout.
    """

    model_type: str
    class_name: str
    status: str
    reason: str = ""
    sequential: float = 0.0
    parallel: float = 0.0


def examine(model_type: str) -> Entry:
    """Wrap a tiny model and compare what is read with its own eager attention."""
    entry = Entry(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type], "exact")
    if model_type in _NOT_BUILT:
        return replace(entry, status="not built", reason=_NOT_BUILT[model_type])
    model = tiny_causal_lm(model_type)
    try:
        llm = FrozenLM(model, families.tiny_tokenizer())
    except UnsupportedModelError as error:
        reason = re.sub(r".* can be read \((.*)\); use a decoder such as .*", r"\1", str(error))
        return replace(entry, status="refused", reason=reason)
    twin = reference.eager_twin(model)
    return replace(entry, sequential=_sequential(llm, twin), parallel=_parallel(llm, twin))


def _sequential(llm: FrozenLM, twin: PreTrainedModel) -> float:
    read = SequentialLayout().read(llm, QUERY, DOCUMENTS, llm.heads, ReadOptions())
    pieces = llm.encoder.pieces(QUERY, DOCUMENTS[::-1], numbered=True)
    prefix = list(pieces.prefix)
    for document in pieces.documents:
        prefix += document.ids
    return _difference(read, pieces, lambda tail: reference.tail_attention(twin, prefix, tail))


def _parallel(llm: FrozenLM, twin: PreTrainedModel) -> float:
    read = ParallelLayout().read(llm, QUERY, DOCUMENTS, llm.heads, ReadOptions())
    pieces = llm.encoder.pieces(QUERY, DOCUMENTS, numbered=False)
    prefix, documents = list(pieces.prefix), [list(document.ids) for document in pieces.documents]
    return _difference(
        read,
        pieces,
        lambda tail: reference.parallel_attention(twin, prefix, documents, tail),
    )


def _difference(
    read: TokenAttention, pieces: Pieces, eager: Callable[[list[int]], Tensor]
) -> float:
    """Return the largest difference of query and calibration to eager attention."""
    differences = []
    for attention, tail in ((read.query, pieces.tail), (read.null, pieces.null_tail)):
        expected = eager(list(tail)).flatten(0, 1)
        assert attention is not None
        assert attention.shape == expected.shape
        assert expected.std() > TOLERANCE * 100  # or the comparison would pass on anything
        differences.append(float((attention - expected).abs().max()))
    return max(differences)


_INTRODUCTION = """# Model families

Every causal LM class of transformers {version} is read exactly, or refused by name
(`UnsupportedModelError`) when it is wrapped. "Exactly" means: in float32, every number that is read
differs by less than {tolerance:.0e} from the class's own eager attention over the full prompt, in
the sequential and in the parallel layout, with windows and chunks shorter than the prompt. The
models are tiny, with random weights. `python tests/census.py` writes this page; a test compares it
with what the code does.

A model of any class, also of one that is not listed, is checked when it is wrapped: a few tokens go
through its own eager attention and through the tap, and it is refused where the two differ. Which
tokens a layer sees, within a window of any size or a chunk, is taken from transformers' own masks.
"""


def page(entries: Iterable[Entry]) -> str:
    """Write the page of the documentation."""
    by_status: dict[str, list[Entry]] = {"exact": [], "refused": [], "not built": []}
    for entry in sorted(entries, key=lambda entry: entry.model_type.lower()):
        by_status[entry.status].append(entry)
    exact, refused, not_built = by_status.values()
    lines = [
        _INTRODUCTION.format(version=transformers.__version__, tolerance=TOLERANCE),
        f"## Read exactly: {len(exact)}\n",
        "| model type | class | sequential | parallel |",
        "| --- | --- | --- | --- |",
        *(
            f"| `{entry.model_type}` | `{entry.class_name}` | {entry.sequential:.0e} "
            f"| {entry.parallel:.0e} |"
            for entry in exact
        ),
    ]
    for title, listed in (("Refused", refused), ("Not built", not_built)):
        lines += [
            f"\n## {title}: {len(listed)}\n",
            "| model type | class | reason |",
            "| --- | --- | --- |",
            *(f"| `{e.model_type}` | `{e.class_name}` | {e.reason} |" for e in listed),
        ]
    return "\n".join(lines) + "\n"


def entries_of(text: str) -> dict[str, Entry]:
    """Read the entries of a page back, by model type."""
    entries = {}
    for section in text.split("\n## ")[1:]:
        title = section.partition(":")[0]
        for line in section.splitlines():
            cells = [cell.strip("` ") for cell in line.strip("|").split(" | ")]
            if not line.startswith("| `"):
                continue
            if title == "Read exactly":
                entry = Entry(cells[0], cells[1], "exact", "", float(cells[2]), float(cells[3]))
            else:
                entry = Entry(cells[0], cells[1], title.lower(), cells[2])
            entries[entry.model_type] = entry
    return entries


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)  # further ones cost more than they save
    PAGE.write_text(page(map(examine, MODEL_TYPES)), encoding="utf-8")
