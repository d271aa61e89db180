"""The reference: a whole GAR in plain PyTorch and transformers' Llama. Slow, simple, and the oracle of every test."""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from garserve.checkpoint import Checkpoint
from garserve.config import GARConfig
from garserve.errors import CheckpointError
from garserve.inputs.processor import PreparedRequest
from garserve.model.encoder import RegionEncoder, TileFeatures
from garserve.tracing import span


class ReferenceGAR(nn.Module):
    """Encoder and decoder of one checkpoint, greedy decoding for one or many requests."""

    def __init__(self, config: GARConfig, *, vision: TileFeatures | None = None, tile_cache_gb: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.encoder = RegionEncoder(config, vision=vision, tile_cache_gb=tile_cache_gb)
        self.language_model = LlamaForCausalLM(llama_config(config))

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        dtype: torch.dtype = torch.float32,
        *,
        vision: TileFeatures | None = None,
        tile_cache_gb: float = 0.0,
    ) -> "ReferenceGAR":
        """Build the model on the CPU and load an opened checkpoint's weights; with `vision`, only the decoder's."""
        try:
            with torch.device("meta"):
                model = cls(checkpoint.config, vision=vision, tile_cache_gb=tile_cache_gb)
        except Exception as error:  # transformers checks the decoder's config in many ways
            raise CheckpointError(
                f"{checkpoint.folder}: the decoder's config is refused by transformers ({' '.join(str(error).split())})"
            ) from error
        state = {
            name: tensor.to(dtype)
            for name, tensor in checkpoint.module_state().items()
            if vision is None or not name.startswith("encoder.")
        }
        if checkpoint.config.tied_head:
            state["language_model.lm_head.weight"] = state["language_model.model.embed_tokens.weight"]
        model.load_state_dict(state, strict=True, assign=True)
        model.encoder.reset_buffers(dtype)
        # Rotary tables are computed buffers: build them anew where the meta device left none.
        decoder = model.language_model.model
        decoder.rotary_emb = type(decoder.rotary_emb)(config=model.language_model.config)
        return model.eval()

    @torch.inference_mode()
    def embed(self, prepared: PreparedRequest) -> torch.Tensor:
        """Return the decoder's input embeddings [L, C] of one request."""
        table = self.language_model.get_input_embeddings()
        embeddings = cast(torch.Tensor, table(torch.tensor(prepared.token_ids))).clone()
        for (start, end), rows in zip(prepared.spans, self.encoder.encode(prepared.items), strict=True):
            embeddings[start:end] = rows
        return embeddings

    @torch.inference_mode()
    def generate(
        self,
        prepared: Sequence[PreparedRequest],
        max_tokens: Sequence[int],
        stop_id: int,
        on_token: Callable[[int, int], bool] | None = None,
    ) -> tuple[list[list[int]], torch.Tensor]:
        """Decode requests together, taking the most probable token each time.

        Returns each request's tokens (with `stop_id` where it was reached) and the logits [B, V] of the first step.
        Shorter prompts are padded on the left; positions and attention leave the padding out. `on_token` is told of
        each request's new token, and ends that request by returning False.
        """
        rows = [self.embed(one) for one in prepared]
        longest = max(len(row) for row in rows)
        inputs = torch.zeros(len(rows), longest, rows[0].shape[1], dtype=rows[0].dtype)
        attention = torch.zeros(len(rows), longest, dtype=torch.long)
        for index, row in enumerate(rows):
            inputs[index, longest - len(row) :] = row
            attention[index, longest - len(row) :] = 1
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        with span("decoder"):
            out = self.language_model(
                inputs_embeds=inputs, attention_mask=attention, position_ids=positions, use_cache=True, logits_to_keep=1
            )
        first = out.logits[:, -1].float()
        tokens: list[list[int]] = [[] for _ in rows]
        running = [True] * len(rows)
        logits, position = first, positions[:, -1:]
        while True:
            chosen = logits.argmax(dim=-1)
            for index, token in enumerate(chosen.tolist()):
                if running[index]:
                    tokens[index].append(token)
                    running[index] = token != stop_id and len(tokens[index]) < max_tokens[index]
                    if on_token and not on_token(index, token):
                        running[index] = False
            if not any(running):
                return tokens, first
            attention = torch.cat([attention, attention.new_ones(len(rows), 1)], dim=1)
            position = position + 1
            with span("decoder"):
                out = self.language_model(
                    input_ids=chosen[:, None],
                    attention_mask=attention,
                    position_ids=position,
                    past_key_values=out.past_key_values,
                    use_cache=True,
                )
            logits = out.logits[:, -1].float()


def llama_config(config: GARConfig) -> LlamaConfig:
    """Return transformers' config of the decoder."""
    return LlamaConfig(**{key: value for key, value in config.text.items() if key != "model_type"})
