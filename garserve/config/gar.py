"""The shape of a GAR model and what its processor needs to know, in one object."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

BoxScale = Literal["released", "geometric"]


@dataclass(frozen=True)
class TowerTraits:
    """What a vision architecture's name implies; timm keeps these in code, not in the config."""

    heads: int
    mlp_ratio: float
    class_token: bool
    rope_offset: int  # added to the patch positions 0..grid-1 of the rotary embedding


ARCHITECTURES: Mapping[str, TowerTraits] = {
    "vit_pe_core_large_patch14_336": TowerTraits(heads=16, mlp_ratio=4.0, class_token=True, rope_offset=1),
    "vit_pe_core_gigantic_patch14_448": TowerTraits(heads=16, mlp_ratio=8960 / 1536, class_token=False, rope_offset=0),
}


@dataclass(frozen=True)
class VisionConfig:
    """Shape of the PE vision tower. Sizes in pixels unless named otherwise."""

    architecture: str
    width: int
    depth: int
    heads: int
    mlp_width: int
    image_size: int
    patch_size: int
    class_token: bool
    rope_offset: int
    rope_reference_grid: int
    layer_scale: bool

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class GARConfig:
    """Everything garserve reads from a checkpoint's configuration files."""

    vision: VisionConfig
    text: dict[str, Any]  # arguments of transformers' LlamaConfig
    image_token_id: int
    crop_token_ids: tuple[int, ...]
    pooling: int
    replay_box_scale: BoxScale
    max_num_tiles: int
    pixel_mean: tuple[float, float, float]  # of values in 0..1
    pixel_std: tuple[float, float, float]
    dtype: str  # in which the weights were saved: "float32", "bfloat16" or "float16"

    @property
    def prompt_count(self) -> int:
        """How many regions one request may name: <Prompt0> .. <Prompt{count-1}>."""
        return len(self.crop_token_ids)

    @property
    def tile_size(self) -> int:
        """Side of a tile in pixels."""
        return self.vision.image_size

    @property
    def tokens_per_side(self) -> int:
        """Side n of a tile's token grid after pooling; also the output side of the replay."""
        return self.vision.grid // self.pooling

    @property
    def tokens_per_tile(self) -> int:
        """Tokens of one tile, of the thumbnail, and of one replayed region: n²."""
        return self.tokens_per_side**2

    @property
    def hidden_size(self) -> int:
        """Width C of the decoder's embeddings."""
        return int(self.text["hidden_size"])

    @property
    def vocab_size(self) -> int:
        """Rows of the decoder's embedding table."""
        return int(self.text["vocab_size"])

    @property
    def tied_head(self) -> bool:
        """True where the output layer is the embedding table, and the file holds no lm_head."""
        return bool(self.text.get("tie_word_embeddings", False))

    def with_box_scale(self, scale: BoxScale) -> "GARConfig":
        """Return the same config with the other definition of the replayed box."""
        return replace(self, replay_box_scale=scale)
