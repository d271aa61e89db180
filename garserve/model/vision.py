"""The Perception Encoder tower with GAR's mask embedding, and the projector to the decoder's width.

Parameter names are those of the checkpoint (timm's), so that weights load by prefix alone.
"""

import torch
from torch import nn
from torch.nn import functional

from garserve.config import GARConfig, VisionConfig

_NORM_EPS = 1e-5
_ROPE_BASE = 10000.0


class VisionTower(nn.Module):
    """Tiles and their masks to patch features [T, grid², width]. No norm at the end; the class token is dropped."""

    rope_cos: torch.Tensor
    rope_sin: torch.Tensor

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        patch = config.patch_size
        self.config = config
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, config.width, patch, patch, bias=False)})
        self.mask_patch_embedding = nn.Conv2d(3, config.width, patch, patch, bias=False)
        if config.class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid**2 + int(config.class_token), config.width))
        self.norm_pre = nn.LayerNorm(config.width, eps=_NORM_EPS)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.reset_rope()

    def reset_rope(self) -> None:
        """(Re)compute the rotary tables; they are constants, not weights, and get lost on the meta device."""
        cos, sin = rope_tables(self.config)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    def forward(self, pixels: torch.Tensor, masks: torch.Tensor, *, keep_class_token: bool = False) -> torch.Tensor:
        """Run normalised pixels [T, 3, S, S] with binary masks [T, S, S] (same dtype) through the tower."""
        tokens = self.patch_embed["proj"](pixels) + self.embed_mask(masks)
        return self.run(tokens.flatten(2).transpose(1, 2), keep_class_token=keep_class_token)

    def run(self, tokens: torch.Tensor, *, keep_class_token: bool = False) -> torch.Tensor:
        """Run embedded patches [T, grid², width] through positions and blocks."""
        if self.config.class_token:
            tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        tokens = self.norm_pre(tokens + self.pos_embed)
        cos, sin = self.rope_cos.to(tokens.dtype), self.rope_sin.to(tokens.dtype)
        for block in self.blocks:
            tokens = block(tokens, cos, sin)
        return tokens if keep_class_token or not self.config.class_token else tokens[:, 1:]

    def embed_mask(self, masks: torch.Tensor) -> torch.Tensor:
        """Embed binary masks [T, S, S] as three equal channels: [T, width, grid, grid]."""
        return self.mask_patch_embedding(masks[:, None].expand(-1, 3, -1, -1))


def rope_tables(config: VisionConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin [grid², head width]: x in the first half of a head, y in the second, each value twice
    (interleaved pairs). Positions are scaled to the reference grid, as timm does.
    """
    quarter = config.width // config.heads // 4
    frequencies = _ROPE_BASE ** -(torch.arange(quarter, dtype=torch.float32) / quarter)
    places = (
        (torch.arange(config.grid, dtype=torch.float32) + config.rope_offset) / config.grid * config.rope_reference_grid
    )
    angles = places[:, None] * frequencies  # [grid, quarter]
    grid = config.grid
    x = angles[None, :, :].expand(grid, grid, quarter)
    y = angles[:, None, :].expand(grid, grid, quarter)
    both = torch.cat([x, y], dim=-1).reshape(grid * grid, 2 * quarter).repeat_interleave(2, dim=-1)
    return both.cos(), both.sin()


def apply_rope(tokens: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate interleaved pairs of the last dimension of [..., grid², head width]."""
    even, odd = tokens[..., 0::2], tokens[..., 1::2]
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return tokens * cos + turned * sin


def turn(tokens: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate as `apply_rope` does; in float32 on a CPU pairs are multiplied as complex numbers, in one pass over them.

    The products and sums are the same ones (with AVX2 to the last bit).
    """
    if tokens.dtype != torch.float32 or tokens.device.type != "cpu":
        return apply_rope(tokens, cos, sin)
    pairs = torch.view_as_complex(tokens.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos[..., 0::2], sin[..., 0::2])).flatten(-2)


class Block(nn.Module):
    """Pre-norm transformer block with layer scale."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=_NORM_EPS)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, eps=_NORM_EPS)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(config.width, config.mlp_width), "fc2": nn.Linear(config.mlp_width, config.width)}
        )
        self.layer_scale = config.layer_scale
        if config.layer_scale:
            self.gamma_1 = nn.Parameter(torch.ones(config.width))
            self.gamma_2 = nn.Parameter(torch.ones(config.width))

    def forward(self, tokens: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Run tokens [T, N, width]."""
        attended = self.attn(self.norm1(tokens), cos, sin)
        tokens = tokens + (self.gamma_1 * attended if self.layer_scale else attended)
        lifted = self.mlp["fc2"](functional.gelu(self.mlp["fc1"](self.norm2(tokens))))
        return tokens + (self.gamma_2 * lifted if self.layer_scale else lifted)


class Attention(nn.Module):
    """Multi-head attention with rotary positions on the patch tokens only."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.prefix = int(config.class_token)
        self.turn = turn
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, tokens: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Attend within each tile: [T, N, width] to [T, N, width]."""
        count, length, width = tokens.shape
        qkv = self.qkv(tokens).reshape(count, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)  # [T, heads, N, head width]
        query, key = self._rotate(query, cos, sin), self._rotate(key, cos, sin)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(count, length, width))

    def _rotate(self, tokens: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        if not self.prefix:
            return self.turn(tokens, cos, sin)
        return torch.cat([tokens[:, :, : self.prefix], self.turn(tokens[:, :, self.prefix :], cos, sin)], dim=2)


class Projector(nn.Module):
    """Patch features to the decoder's width, then an average pool of the patch grid to n x n tokens."""

    def __init__(self, config: GARConfig) -> None:
        super().__init__()
        self.grid, self.pooling = config.vision.grid, config.pooling
        self.linear_1 = nn.Linear(config.vision.width, config.hidden_size)
        self.linear_2 = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Project [T, grid², width] to [T, n², C]."""
        projected = self.linear_2(functional.gelu(self.linear_1(features)))
        count, _, width = projected.shape
        grid = projected.transpose(1, 2).reshape(count, width, self.grid, self.grid)
        return functional.avg_pool2d(grid, self.pooling).flatten(2).transpose(1, 2)
