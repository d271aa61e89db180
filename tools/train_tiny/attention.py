"""Attention of sequences laid out as a Batch, where no branch sees another."""

import torch
from batches import Batch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import LlamaModel, rotate_half


def shared_prefix_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor, **_: object
) -> tuple[torch.Tensor, None]:
    """Attention of sequences laid out as a Batch: the prefix to itself, each row of branches to prefix and itself.

    `query` is [B, heads, L, head width], `key` and `value` have fewer heads, `seen` is [B, rows, W, P + W]: what each
    token of a row may attend to. Returns [B, L, heads, head width].
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    rows, row = seen.shape[1:3]
    prefix = seen.shape[3] - row
    parts = [part.split([prefix, rows * row], dim=2) for part in (query, key, value)]
    shared, own = zip(*parts, strict=True)
    first = functional.scaled_dot_product_attention(*shared, is_causal=True)
    own = [part.unflatten(2, (rows, row)).transpose(1, 2).flatten(0, 1) for part in own]  # [B·rows, heads, W, width]
    keys, values = (
        torch.cat([common.repeat_interleave(rows, dim=0), part], dim=2)
        for common, part in zip(shared[1:], own[1:], strict=True)
    )
    rest = functional.scaled_dot_product_attention(own[0], keys, values, attn_mask=seen.flatten(0, 1)[:, None])
    rest = rest.unflatten(0, (-1, rows)).transpose(1, 2).flatten(2, 3)
    return torch.cat([first, rest], dim=2).transpose(1, 2), None


AttentionInterface.register("shared_prefix", shared_prefix_attention)


def seen_by_rows(batch: Batch) -> torch.Tensor:
    """Return what each token of a row of branches may attend to: [B, rows, W, P + W]."""
    prefix, rows = batch.branch[:, : batch.prefix], batch.branch[:, batch.prefix :].unflatten(1, (-1, batch.row))
    same = rows[..., None] == rows[:, :, None]
    own = same & torch.ones(batch.row, batch.row, dtype=torch.bool).tril()  # padding sees padding: nothing reads it
    common = (prefix == 0)[:, None, None].expand(-1, rows.shape[1], batch.row, -1)
    return torch.cat([common, own], dim=-1)


def attention_scores(
    decoder: LlamaModel,
    number: int,
    batch: Batch,
    hidden: list[torch.Tensor],
    queries: tuple[torch.Tensor, torch.Tensor],
    heads: int | None = None,
) -> torch.Tensor:
    """Return how tokens (rows and columns [M]) attend to their sequences, before softmax: [M, groups, heads, L].

    Of layer `number`, counted from 0, whose input is `hidden[number]`; of each group the first `heads`, or all.
    What a token does not see is -inf.
    """
    layer, (rows, columns) = decoder.layers[number], queries
    inner = layer.input_layernorm(hidden[number])
    cos, sin = (part[:, :, None] for part in decoder.rotary_emb(inner, batch.positions))  # [B, L, 1, width]
    groups, width = decoder.config.num_key_value_heads, decoder.config.head_dim
    keys = layer.self_attn.k_proj(inner).unflatten(-1, (groups, width))
    keys = keys * cos + rotate_half(keys) * sin
    asking = layer.self_attn.q_proj(inner[rows, columns]).unflatten(-1, (groups, -1, width))[:, :, :heads]
    cos, sin = cos[rows, columns, None], sin[rows, columns, None]
    asking = asking * cos + rotate_half(asking) * sin
    pairs = zip(asking.split(per_example(rows, batch)), keys.unbind(), strict=True)
    scores = torch.cat([torch.einsum("mghd,lgd->mghl", few, own) for few, own in pairs]) / width**0.5
    branch = batch.branch[rows]
    seen = (branch == 0) | (branch == batch.branch[rows, columns][:, None])
    seen &= torch.arange(batch.ids.shape[1]) <= columns[:, None]
    return scores.masked_fill(~seen[:, None, None], -torch.inf)


def per_example(rows: torch.Tensor, batch: Batch) -> list[int]:
    """Count the tokens of each example among `rows` [M], which come example by example."""
    return rows.bincount(minlength=len(batch.ids)).tolist()
