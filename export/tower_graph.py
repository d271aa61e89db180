"""The tower as it is exported: uint8 tiles and masks in, features out, everything between in one module."""

import torch
from torch import nn
from torch.nn import functional

from garserve.config import GARConfig
from garserve.model.encoder import RegionEncoder
from garserve.model.vision import Block, apply_rope, rope_tables

FUSED_OPSET = 23  # the first with Attention and RotaryEmbedding


class TowerGraph(nn.Module):
    """Computes what `RegionEncoder.features` computes, in fewer and larger operations.

    Equal up to rounding: layer scales are part of the linear layers before them, the mask's three equal channels are
    one, both patch convolutions are one over four channels, and the pool comes before the projector's last layer,
    which it commutes with. With `fused`, attention and rotary positions are one operator of ONNX opset 23 each; the
    class token turns by an angle of zero.
    """

    position: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, encoder: RegionEncoder, *, fused: bool) -> None:
        """Copy an encoder's weights, as float32."""
        super().__init__()
        tower, projector, config = encoder.tower, encoder.projector, encoder.config
        self.config, self.fused = config, fused
        pixel, mask = tower.patch_embed["proj"].weight.float(), tower.mask_patch_embedding.weight.float()
        self.patches = nn.Parameter(torch.cat([pixel, mask.sum(1, keepdim=True)], dim=1))
        position = tower.pos_embed.detach().float().clone()
        prefix = int(config.vision.class_token)
        if prefix:
            self.cls = nn.Parameter(tower.cls_token.float() + position[:, :1])
        self.register_buffer("position", position[:, prefix:])
        self.norm_pre = _copy(tower.norm_pre)
        self.blocks = nn.ModuleList(_BlockGraph(block, config, fused=fused) for block in tower.blocks)
        self.linear_1, self.linear_2 = _copy(projector.linear_1), _copy(projector.linear_2)
        cos, sin = rope_tables(config.vision)
        if fused:
            cos = torch.cat([torch.ones(prefix, cos.shape[1]), cos])[:, ::2]
            sin = torch.cat([torch.zeros(prefix, sin.shape[1]), sin])[:, ::2]
        self.register_buffer("cos", cos.contiguous())
        self.register_buffer("sin", sin.contiguous())
        mean, std = (torch.tensor(values)[:, None, None] * 255.0 for values in (config.pixel_mean, config.pixel_std))
        self.register_buffer("scale", 1.0 / std)
        self.register_buffer("shift", -mean / std)
        self.requires_grad_(requires_grad=False)

    def forward(self, tiles: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Compute uint8 tiles [T, 3, S, S] with uint8 masks [T, S, S] (0: unmarked) to float32 features [T, n², C]."""
        dtype, vision, pooling = self.patches.dtype, self.config.vision, self.config.pooling
        pixels = tiles.float() * self.scale.float() + self.shift.float()
        planes = torch.cat([pixels, masks.bool().float()[:, None]], dim=1).to(dtype)
        tokens = functional.conv2d(planes, self.patches, stride=vision.patch_size).flatten(2).transpose(1, 2)
        tokens = tokens + self.position
        if vision.class_token:
            tokens = torch.cat([self.cls.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        tokens = self.norm_pre(tokens)
        for block in self.blocks:
            tokens = block(tokens, self.cos, self.sin)
        tokens = functional.gelu(self.linear_1(tokens[:, 1:] if vision.class_token else tokens))
        side, width = self.config.tokens_per_side, self.config.hidden_size
        cells = tokens.reshape(-1, side, pooling, side, pooling, width).mean(dim=(2, 4))
        return self.linear_2(cells.reshape(-1, side * side, width)).float()


class _BlockGraph(nn.Module):
    def __init__(self, block: Block, config: GARConfig, *, fused: bool) -> None:
        super().__init__()
        self.fused, self.heads, self.prefix = fused, config.vision.heads, int(config.vision.class_token)
        self.norm1, self.norm2, self.qkv = _copy(block.norm1), _copy(block.norm2), _copy(block.attn.qkv)
        self.proj = _scaled(block.attn.proj, block.gamma_1 if block.layer_scale else None)
        self.fc1 = _copy(block.mlp["fc1"])
        self.fc2 = _scaled(block.mlp["fc2"], block.gamma_2 if block.layer_scale else None)

    def forward(self, tokens: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        attend = self._attend_fused if self.fused else self._attend
        tokens = tokens + self.proj(attend(self.qkv(self.norm1(tokens)), cos, sin))
        return tokens + self.fc2(functional.gelu(self.fc1(self.norm2(tokens))))

    def _attend_fused(self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Attend by ONNX's operators on [T, N, width], which split the heads themselves."""
        operators, heads = torch.onnx.ops, self.heads
        places = torch.arange(cos.shape[0]).expand(qkv.shape[0], -1)
        query, key, value = qkv.chunk(3, dim=-1)
        query, key = (
            operators.rotary_embedding(x, cos, sin, places, interleaved=True, num_heads=heads) for x in (query, key)
        )
        return operators.attention(query, key, value, q_num_heads=heads, kv_num_heads=heads)[0]

    def _attend(self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        length, width = qkv.shape[1], qkv.shape[2] // 3
        parts = qkv.reshape(-1, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        prefix = self.prefix
        if prefix:
            query, key = (
                torch.cat([x[:, :, :prefix], apply_rope(x[:, :, prefix:], cos, sin)], dim=2) for x in (query, key)
            )
        else:
            query, key = apply_rope(query, cos, sin), apply_rope(key, cos, sin)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return mixed.transpose(1, 2).reshape(-1, length, width)


def _copy(layer: nn.Module) -> nn.Module:
    """The same layer with float32 weights of its own."""
    twin = (
        nn.LayerNorm(layer.normalized_shape, eps=layer.eps)
        if isinstance(layer, nn.LayerNorm)
        else nn.Linear(layer.in_features, layer.out_features)
    )
    twin.load_state_dict({name: value.float() for name, value in layer.state_dict().items()}, assign=True)
    return twin


def _scaled(layer: nn.Linear, gamma: torch.Tensor | None) -> nn.Module:
    """A linear layer whose outputs are scaled by `gamma` [out]."""
    twin = _copy(layer)
    if gamma is not None:
        weight, bias = layer.weight.float() * gamma.float()[:, None], layer.bias.float() * gamma.float()
        twin.load_state_dict({"weight": weight, "bias": bias}, assign=True)
    return twin
