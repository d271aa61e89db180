"""Configurations of the released models and of a small one with the same parts (floor 1), as their JSON files."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Literal

PresetName = Literal["GAR-1B", "GAR-8B", "mini", "tiny"]

_LLAMA3_SCALING = {
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
# Ids of the released models: the Perception-LM list of special tokens on Llama 3's vocabulary, then GAR's names.
_RELEASED_BASE = 128000
_CROP_OFFSETS = (4, 5, 8, 10, 11)
_SPECIAL_TOKENS = 262  # 256 of Perception-LM's, <Prompt0> to <Prompt4>, <NO_Prompt>

_LARGE, _GIGANTIC = "vit_pe_core_large_patch14_336", "vit_pe_core_gigantic_patch14_448"
_RELEASED_TILE = {"img_size": [448, 448], "init_values": 0.1, "ref_feat_shape": [32, 32]}

# By name: architecture, shape of the tower, shape of the decoder, and what _files takes beside them.
_SHAPES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "GAR-1B": (
        _LARGE,
        {"embed_dim": 1024, "depth": 23, **_RELEASED_TILE},
        {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64},
        {"factor": 32.0, "tied": False, "max_num_tiles": 16},
    ),
    "GAR-8B": (
        _GIGANTIC,
        {"embed_dim": 1536, "depth": 47, **_RELEASED_TILE},
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128},
        {"factor": 8.0, "tied": True, "max_num_tiles": 8},
    ),
    "mini": (
        _LARGE,
        {
            "embed_dim": 64,
            "depth": 2,
            "num_heads": 4,
            "img_size": [112, 112],
            "init_values": 0.1,
            "ref_feat_shape": [8, 8],
        },
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "head_dim": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
        {"factor": 32.0, "tied": False, "max_num_tiles": 16, "base": 512, "dtype": "float32"},
    ),
    "tiny": (
        _LARGE,
        {
            "embed_dim": 128,
            "depth": 5,
            "num_heads": 4,
            "img_size": [168, 168],
            "init_values": 0.1,
            "ref_feat_shape": [21, 21],
        },
        {
            "hidden_size": 192,
            "intermediate_size": 384,
            "num_hidden_layers": 5,
            "head_dim": 32,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rope_theta": 10000.0,
            "rope_scaling": None,
        },
        {
            "factor": 32.0,
            "tied": True,
            "max_num_tiles": 1,
            "base": 640,
            "dtype": "float32",
            "patch": 8,
            "pooling": 3,
        },
    ),
}


def preset(name: PresetName) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return `config.json` and `preprocessor_config.json` of a model by name.

    "GAR-1B" and "GAR-8B" have the released shapes; "mini" has every part of GAR-1B at a size that a laptop runs in
    milliseconds (tiles of 112 pixels, 16 tokens a tile); "tiny" is the shape that
    tools/train_tiny trains (one tile of 168 pixels, 49 tokens).
    """
    if name not in _SHAPES:
        raise ValueError(f"preset: expected {', '.join(_SHAPES)}, got {name!r}")
    architecture, vision, text, options = _SHAPES[name]
    return _files(architecture, deepcopy(vision), text, **options)


def _files(
    architecture: str,
    vision: Mapping[str, Any],
    text: Mapping[str, Any],
    *,
    factor: float,
    tied: bool,
    max_num_tiles: int,
    base: int = _RELEASED_BASE,
    dtype: str = "bfloat16",
    patch: int = 14,
    pooling: int = 2,
) -> tuple[dict[str, Any], dict[str, Any]]:
    size = vision["img_size"][0]
    text_config = {
        "model_type": "llama",
        "vocab_size": base + _SPECIAL_TOKENS,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 11520,
        "rope_theta": 500000.0,
        "rope_scaling": {"factor": factor, **_LLAMA3_SCALING},
        "bos_token_id": base,
        "eos_token_id": [base + 1, base + 9],
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        **text,
    }
    config = {
        "model_type": "GAR",
        "architectures": ["GARModel"],
        "dtype": dtype,
        "crop_tokens_ids": [base + offset for offset in _CROP_OFFSETS],
        "prompt_numbers": len(_CROP_OFFSETS),
        "kernel_size": [patch, patch],
        "patch_size_h": patch,
        "patch_size_w": patch,
        "mask_path_embedding_out_channels": vision["embed_dim"],
        "mllm_config": {
            "model_type": "perception_lm",
            "image_token_id": base + 2,
            "video_token_id": base + 3,
            "projector_pooling_ratio": pooling,
            "vision_use_cls_token": architecture.startswith("vit_pe_core_large"),
            "text_config": text_config,
            "vision_config": {
                "model_type": "timm_wrapper",
                "architecture": architecture,
                "model_args": {**vision, "global_pool": "", "use_post_transformer_norm": False},
            },
        },
    }
    preprocessor = {
        "image_processor_type": "PerceptionLMImageProcessorFast",
        "max_num_tiles": max_num_tiles,
        "tile_size": size,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "vision_input_type": "thumb+tile",
    }
    return config, preprocessor
