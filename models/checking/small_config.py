"""A small config of any architecture: its default one, with every size that is known by name cut.

Nothing here knows an architecture. What a field means is read off its name, as the configs of
transformers spell it; whatever is not known stays as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from itertools import cycle, islice
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedConfig

WIDTH, HEAD_DIM, LAYERS, VOCABULARY = 64, 16, 4, 512
_PATCH, _IMAGE = 8, 32
# Features of a head that turn with its position, where others do not.
_ROTATED = 8
# Codes of an image tokenizer, and the tokens that stand for them.
_CODES, _FIRST_CODE = 16, 410
# Special tokens that lie beyond the small vocabulary move to its end.
_FIRST_SPECIAL = 400


def _names(size: int, names: str) -> dict[str, int]:
    return dict.fromkeys(names.split(), size)


# What no size exceeds, by name.
_MOST = (
    _names(
        WIDTH,
        """hidden_size d_model n_embd n_embed dim embed_dim width hidden_dim model_dim emb_dim
        out_hidden_size output_hidden_size output_size projection_dim proj_dim projector_dim
        word_embed_proj_dim embedding_size text_hidden_size mm_hidden_size vision_hidden_size
        decoder_hidden_size qformer_hidden_size encoder_hidden_size vision_output_dim output_dim
        projection_hidden_size projector_hidden_size hidden_size_per_layer_input
        mamba_d_ssm lru_width
        vision_feature_dim image_embed_dim latent_dim out_dim lm_hidden_size conv_dim""",
    )
    | _names(
        96,
        """intermediate_size ffn_dim mlp_dim n_inner d_ff dim_feedforward encoder_ffn_dim
        decoder_ffn_dim ffn_hidden_size intermediate_dim block_ff_dim intermediate_size_mlp
        dense_intermediate_size inner_dim feed_forward_hidden_size d_inner_mlp""",
    )
    | _names(
        32,
        "moe_intermediate_size shared_expert_intermediate_size expert_dim expert_ffn_size "
        "moe_shared_expert_intermediate_size shared_intermediate_size moe_latent_size "
        "shared_experts_intermediate_size share_expert_dim",
    )
    | _names(
        LAYERS,
        """num_hidden_layers num_layers n_layer n_layers num_blocks decoder_layers encoder_layers
        num_decoder_layers num_encoder_layers depth""",
    )
    | _names(
        4,
        """num_attention_heads num_heads n_head n_heads num_key_value_heads encoder_attention_heads
        decoder_attention_heads kv_n_heads num_kv_heads attention_heads num_query_heads
        num_global_key_value_heads linear_num_value_heads linear_num_key_heads mamba_n_heads
        mamba_num_heads num_experts num_local_experts n_routed_experts moe_num_experts
        num_global_layers num_sliding_attention_heads index_n_heads""",
    )
    | _names(
        2,
        "num_experts_per_tok num_experts_per_token moe_k moe_topk moe_top_k top_k_experts "
        "num_selected_experts n_group n_groups_moe topk_group num_shared_experts n_shared_experts "
        "attn_layer_period expert_layer_period first_k_dense_replace "
        "mamba_n_groups n_groups num_kv_shared_layers",
    )
    | _names(
        LAYERS - 1,
        "intermediate_layers_indices deepstack_visual_indexes fullatt_block_indexes "
        "global_attn_indexes",
    )
    | _names(1, "attn_layer_offset expert_layer_offset expand mamba_expand")
    | _names(
        HEAD_DIM,
        """head_dim d_kv attention_head_dim global_head_dim v_head_dim qk_nope_head_dim
        linear_key_head_dim linear_value_head_dim mamba_d_head mamba_head_dim kv_channels
        ssm_state_size state_size mamba_d_state""",
    )
    | _names(32, "base_channels")
    | _names(_CODES, "codebook_size num_embeddings")
    | _names(_ROTATED, "qk_rope_head_dim rotary_dim index_head_dim")
    | _names(HEAD_DIM + _ROTATED, "qk_head_dim")
    | _names(24, "kv_lora_rank o_lora_rank")
    | _names(40, "q_lora_rank")
    | _names(VOCABULARY, "vocab_size vocab_size_per_layer_input text_vocab_size")
    | _names(_PATCH, "patch_size")
    | _names(3 * _PATCH**2, "patch_embed_hidden_size")
    | _names(_IMAGE, "image_size")
    | _names(
        256,
        "max_position_embeddings n_positions num_position_embeddings max_source_positions "
        "max_target_positions",
    )
    | _names(
        16,
        "mm_tokens_per_image image_seq_length num_image_tokens num_patches sliding_window "
        "chunk_size mamba_chunk_size image_seq_len vision_soft_tokens_per_image",
    )
)


_TOKEN = {"image_token_index": 400}
_MEDIA_TOKENS = {"vision_start_token_id": 408, "audio_start_token_id": 409}
_CODE_NAMES = {
    "chameleon": [f"IMGIMG{''.join(chr(65 + int(d)) for d in str(n))}Z" for n in range(_CODES)],
    "emu3": [f"<|visual token {n:06}|>" for n in range(_CODES)],
}
# What default configs leave open and transformers cannot build a model without, as every checkpoint
# says it; and what is out of step once sizes are cut.
_PARTICULAR: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "blip-2": _TOKEN,
        "instructblip": _TOKEN,
        "instructblipvideo": {"video_token_index": 400},
        **{
            model_type: {
                "vocabulary_map": {
                    "<image>": 400,
                    "<|extra_200|>": 401,
                    **{name: _FIRST_CODE + n for n, name in enumerate(names)},
                }
            }
            for model_type, names in _CODE_NAMES.items()
        },
        # Layers of both kinds, as every checkpoint has them.
        "bamba": {"attn_layer_indices": [1]},
        "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
        "cohere_compass": {
            "text_config": {
                "rope_parameters": {
                    kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}
                    for kind in ("full_attention", "sliding_attention")
                }
            }
        },
        "deepseek_ocr2": {
            "text_config": {
                "mlp_layer_types": ["dense", *["sparse"] * (LAYERS - 1)],
                "num_experts_per_tok": 2,
            }
        },
        "diffusion_gemma": {
            "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
        },
        "deepseek_v2": {"num_experts_per_tok": 2},
        "falcon_h1": {"mamba_d_head": HEAD_DIM},
        "granite4_vision": {
            "downsample_rate": "1/2",
            "deepstack_layer_map": [(-1, 0)],
            "spatial_target_layers": [0, 1, 2, 3],
        },
        "hunyuan_vl": {"text_config": {"head_dim": HEAD_DIM}},
        "llama4": {
            "vision_config": {
                "intermediate_size": 4 * WIDTH,
                "projector_input_dim": WIDTH,
                "projector_output_dim": WIDTH,
                "vision_output_dim": WIDTH,
            }
        },
        "mllama": {"vision_config": {"vision_output_dim": 6 * WIDTH}},
        "nemotron": {"num_key_value_heads": 2},
        "step3p7": {"text_config": {"sliding_window": 16}},
        "qwen2_5_omni_thinker": _MEDIA_TOKENS,
        "qwen3_omni_moe_thinker": _MEDIA_TOKENS,
        "qwen4_exp": {
            "text_config": {
                "indexer_n_heads": 2,
                "indexer_kv_heads": 1,
                "indexer_head_dim": 8,
                "indexer_compress_ratio": 2,
                "indexer_budget": 8,
            }
        },
    }
)


def default(model_type: str) -> Any:
    """The config that transformers has for a model type where nothing is said."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]()


def small_default(model_type: str) -> Any:
    """The default config, small and with what it lacks; see `small`."""
    config = small(default(model_type))
    _set(config, _PARTICULAR.get(model_type, {}))
    return config


def _set(config: Any, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        known = getattr(config, name, None)
        if isinstance(known, PreTrainedConfig):
            _set(known, value)
        else:
            object.__setattr__(config, name, value)


def small(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same architecture, a few layers deep and a few dozen features wide.

    `config`: left as it is. Returns a config that keeps what is peculiar of the architecture: its
    kinds of layers, whether heads share keys and values, what it does with special tokens.
    """
    config = copy.deepcopy(config)
    parts = list(_parts(config))
    moved: dict[int, int] = {}
    for part in parts:
        is_vision = part is not config and "vision" in str(part.model_type)
        before = dict(vars(part))
        for name, value in before.items():
            if (new := _cut(name, value, before)) is not value:
                object.__setattr__(part, name, new)
        rope = getattr(part, "rope_parameters", None)
        if len(parts) > 1 and not is_vision and rope and not _is_sectioned(rope):
            half = int(_head_dim(before) * rope.get("partial_rotary_factor", 1.0)) // 2
            # Time, height and width share a head; what has another default reads this.
            rope["mrope_section"] = [(half + 1) // 3, (half + 1) // 3, half - (half + 1) // 3 * 2]
        for name, value in before.items():
            if name.endswith(("_token_id", "_token_index", "_token_ids", "_idx")):
                object.__setattr__(part, name, _moved(value, moved))
        if is_vision and "patch_size" in before and "image_size" not in before:
            # It takes images of any size.
            object.__setattr__(part, "image_size", _IMAGE)
    return config


def _head_dim(before: dict[str, Any]) -> int:
    """Of the small heads; latent attention means the features that turn by it."""
    is_latent = before.get("head_dim", 0) == before.get("qk_rope_head_dim", -1)
    return _ROTATED if is_latent else HEAD_DIM


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A config and the configs inside it."""
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)


def _is_sectioned(rope: dict[str, Any]) -> bool:
    """Whether it says how positions share a head, or differs by kind of layer."""
    return "mrope_section" in rope or any(isinstance(entry, dict) for entry in rope.values())


def _cut(name: str, value: Any, before: dict[str, Any]) -> Any:
    """A setting of a part with these settings, cut."""
    if isinstance(value, bool):
        return value
    most = _MOST.get(name)
    new = value
    if most is not None and isinstance(value, int):
        new = min(value, _head_dim(before) if name == "head_dim" else most)
        if name == "num_key_value_heads" and 1 < value < before.get("num_attention_heads", value):
            new = 2
    elif most is not None and isinstance(value, list | tuple) and value:
        if all(isinstance(v, int) for v in value):
            new = type(value)(min(v, most) for v in value)
    elif name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        new = _some_of_each(value)
    elif name == "per_layer_config" and value:
        new = {
            layer: {
                name: _cut(name, value, {**before, **changes}) for name, value in changes.items()
            }
            for layer, changes in value.items()
        }
    elif name in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
        new = _rope(value, before)
    return new


def _some_of_each(kinds: Any) -> Any:
    """Kinds of layers in turn, for as many layers as there are."""
    if not isinstance(kinds, list | tuple) or len(kinds) <= LAYERS:
        return kinds
    return type(kinds)(islice(cycle(dict.fromkeys(kinds)), LAYERS))


def _rope(value: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """Rotations of as many dimensions as are left in a head."""
    width = before.get("head_dim") or (
        (before.get("hidden_size") or WIDTH) // (before.get("num_attention_heads") or 4)
    )
    new = dict(value)
    for name, entry in value.items():
        if isinstance(entry, dict):
            new[name] = _rope(entry, before)
        elif name == "mrope_section" and isinstance(entry, list | tuple):
            total = sum(entry) * _head_dim(before) // width or sum(entry)
            rest = [max(1, e * _head_dim(before) // width) for e in entry[1:]]
            new[name] = [max(1, total - sum(rest)), *rest]
    return new


def _moved(value: Any, moved: dict[int, int]) -> Any:
    """A special token, where the small vocabulary has it."""
    if isinstance(value, list | tuple):
        return type(value)(_moved(v, moved) for v in value)
    if not isinstance(value, int) or isinstance(value, bool) or value < _FIRST_SPECIAL:
        return value
    return moved.setdefault(value, _FIRST_SPECIAL + len(moved))
