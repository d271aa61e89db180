"""A checkpoint's JSON files, checked and made into a GARConfig.

Nothing here runs code from a checkpoint: `auto_map` and everything else that is unknown is ignored.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from garserve.config.gar import ARCHITECTURES, BoxScale, GARConfig, VisionConfig
from garserve.errors import CheckpointError, first_line


class _Strict(BaseModel):
    model_config = ConfigDict(extra="ignore", protected_namespaces=())


_Size = Annotated[int, Field(gt=0, le=10_000_000)]
_Layers = Annotated[int, Field(gt=0, le=1000)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Spread = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Text(_Strict):
    """What garserve itself needs of the decoder's config; the rest is transformers' affair."""

    model_config = ConfigDict(extra="ignore", strict=True, protected_namespaces=())
    model_type: Literal["llama"]
    hidden_size: _Size
    intermediate_size: _Size
    vocab_size: _Size
    num_hidden_layers: _Layers
    num_attention_heads: _Size
    num_key_value_heads: _Size | None = None
    head_dim: _Size | None = None
    attention_bias: Literal[False] = False  # released models have none, and nothing here would read one
    mlp_bias: Literal[False] = False


class _ModelArgs(_Strict):
    embed_dim: _Size
    depth: _Layers
    img_size: tuple[_Size, _Size]
    num_heads: _Size | None = None
    mlp_ratio: float | None = Field(default=None, gt=0, le=100)
    patch_size: _Size | None = None
    init_values: float | None = None
    ref_feat_shape: tuple[_Size, _Size] | None = None
    use_post_transformer_norm: Literal[False]
    global_pool: Literal[""] = ""


class _Vision(_Strict):
    architecture: str
    model_args: _ModelArgs


class _Multimodal(_Strict):
    model_type: Literal["perception_lm"]
    image_token_id: int
    projector_pooling_ratio: int = Field(gt=0)
    vision_use_cls_token: bool
    vision_config: _Vision
    text_config: dict[str, Any]


class _File(_Strict):
    model_type: Literal["GAR"]
    mllm_config: _Multimodal
    crop_tokens_ids: list[int] = Field(min_length=1)
    prompt_numbers: int = Field(gt=0)
    patch_size_h: int = Field(gt=0)
    patch_size_w: int = Field(gt=0)
    mask_path_embedding_out_channels: int  # the authors' spelling
    replay_box_scale: BoxScale = "released"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    torch_dtype: Literal["float32", "bfloat16", "float16"] | None = None  # transformers before 4.56


class _Preprocessor(_Strict):
    max_num_tiles: int = Field(default=36, ge=1, le=36)
    tile_size: int = Field(default=448, gt=0)
    image_mean: tuple[_Finite, _Finite, _Finite] = (0.5, 0.5, 0.5)
    image_std: tuple[_Spread, _Spread, _Spread] = (0.5, 0.5, 0.5)
    vision_input_type: Literal["thumb+tile"] = "thumb+tile"


def read_json(path: Path) -> Any:
    """Read a JSON file of a checkpoint; CheckpointError names the file when it is missing, unreadable or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint file missing: {path}") from None
    except OSError as error:
        raise unreadable(path, error) from None
    except (ValueError, RecursionError) as error:  # syntax, encoding, numbers of thousands of digits
        raise CheckpointError(f"checkpoint file {path} is not JSON: {error}") from None


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """Return the error for a file of a checkpoint that is there and that the system does not let be read."""
    return CheckpointError(f"checkpoint file {path} cannot be read ({reason(error)})")


def reason(error: Exception) -> str:
    """Return the system's words for what it refused, "permission denied"; where there are none, the message."""
    words = getattr(error, "strerror", None)
    return words.lower() if words else first_line(error)


_Model = TypeVar("_Model", bound=BaseModel)


def _validated(model: type[_Model], data: Any, source: str) -> _Model:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "(whole file)"
        raise CheckpointError(
            f"{source}: field {where}: {first['msg']}, got {first.get('input')!r:.80}; "
            "expected the configuration of a GAR model"
        ) from None


def parse_config(config: Any, preprocessor: Any, source: str = "config.json") -> GARConfig:
    """Build a GARConfig from the parsed `config.json` and `preprocessor_config.json`.

    Raises CheckpointError naming the field where the data is not a GAR configuration.
    """
    file = _validated(_File, config, source)
    pre = _validated(_Preprocessor, preprocessor, "preprocessor_config.json")
    mllm, arguments = file.mllm_config, file.mllm_config.vision_config.model_args
    vision = _vision_config(file, source)

    def expect(condition: bool, field: str, message: str) -> None:
        if not condition:
            raise CheckpointError(f"{source}: field {field}: {message}")

    expect(
        file.mask_path_embedding_out_channels == arguments.embed_dim,
        "mask_path_embedding_out_channels",
        f"expected the tower's width {arguments.embed_dim}, got {file.mask_path_embedding_out_channels}",
    )
    expect(
        file.prompt_numbers == len(file.crop_tokens_ids),
        "prompt_numbers",
        f"expected one per crop token ({len(file.crop_tokens_ids)}), got {file.prompt_numbers}",
    )
    expect(
        vision.grid % mllm.projector_pooling_ratio == 0,
        "projector_pooling_ratio",
        f"expected a divisor of the patch grid {vision.grid}, got {mllm.projector_pooling_ratio}",
    )
    expect(
        pre.tile_size == vision.image_size,
        "preprocessor tile_size",
        f"expected the tower's image size {vision.image_size}, got {pre.tile_size}",
    )
    text = _validated(_Text, mllm.text_config, f"{source}: mllm_config.text_config")
    placeholders = {mllm.image_token_id, *file.crop_tokens_ids}
    expect(
        len(placeholders) == 1 + len(file.crop_tokens_ids) and all(0 <= i < text.vocab_size for i in placeholders),
        "crop_tokens_ids",
        f"expected ids of the {text.vocab_size} tokens, all different and none of them image_token_id, "
        f"got {file.crop_tokens_ids} beside {mllm.image_token_id}",
    )
    return GARConfig(
        vision=vision,
        text=mllm.text_config,
        image_token_id=mllm.image_token_id,
        crop_token_ids=tuple(file.crop_tokens_ids),
        pooling=mllm.projector_pooling_ratio,
        replay_box_scale=file.replay_box_scale,
        max_num_tiles=pre.max_num_tiles,
        pixel_mean=pre.image_mean,
        pixel_std=pre.image_std,
        dtype=file.dtype or file.torch_dtype or "bfloat16",
    )


def _vision_config(file: _File, source: str) -> VisionConfig:
    mllm, arguments = file.mllm_config, file.mllm_config.vision_config.model_args
    name = mllm.vision_config.architecture
    traits = ARCHITECTURES.get(name)
    if traits is None:
        raise CheckpointError(
            f"{source}: field mllm_config.vision_config.architecture: "
            f"expected one of {sorted(ARCHITECTURES)}, got {name!r}"
        )
    if mllm.vision_use_cls_token != traits.class_token:
        raise CheckpointError(
            f"{source}: field mllm_config.vision_use_cls_token: {name} has class_token={traits.class_token}, "
            f"got {mllm.vision_use_cls_token}"
        )
    patch = arguments.patch_size or file.patch_size_h
    size, heads = arguments.img_size[0], arguments.num_heads or traits.heads
    if arguments.img_size[0] != arguments.img_size[1] or file.patch_size_h != file.patch_size_w or size % patch:
        raise CheckpointError(
            f"{source}: field img_size: expected a square made of square patches, "
            f"got {arguments.img_size} with patches of {file.patch_size_h}x{file.patch_size_w}"
        )
    if arguments.embed_dim % heads or (arguments.embed_dim // heads) % 4:
        raise CheckpointError(
            f"{source}: field embed_dim: {arguments.embed_dim} does not give {heads} heads of a width divisible by 4"
        )
    reference = arguments.ref_feat_shape or (size // patch, size // patch)
    return VisionConfig(
        architecture=name,
        width=arguments.embed_dim,
        depth=arguments.depth,
        heads=heads,
        mlp_width=int(arguments.embed_dim * (arguments.mlp_ratio or traits.mlp_ratio)),
        image_size=size,
        patch_size=patch,
        class_token=traits.class_token,
        rope_offset=traits.rope_offset,
        rope_reference_grid=reference[0],
        layer_scale=arguments.init_values is not None,
    )


def read_config(folder: Path) -> GARConfig:
    """Read `config.json` and `preprocessor_config.json` of a checkpoint folder.

    Raises CheckpointError where a file is missing or is not that of a GAR model.
    """
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint folder not found: {folder}")
    path = folder / "config.json"
    return parse_config(read_json(path), _read_preprocessor(folder), str(path))


def _read_preprocessor(folder: Path) -> Any:
    """Newer versions of transformers save the image processor's settings inside `processor_config.json`."""
    whole = folder / "processor_config.json"
    if not (folder / "preprocessor_config.json").is_file() and whole.is_file():
        inner = read_json(whole)
        if isinstance(inner, dict) and isinstance(inner.get("image_processor"), dict):
            return inner["image_processor"]
    return read_json(folder / "preprocessor_config.json")
