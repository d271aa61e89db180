"""The authors' algorithm as published: a whole vision pass, a replay and a batch-1 `generate` for every region.

Written from a description of what their code does, and equal to what it gave (tests/test_peers.py). Where the authors'
stack leaves a choice, the faster one is taken: fused attention in the tower (timm's own) and in the decoder (theirs is
eager), and the region align as two small matrix products, which take less time than torchvision's loop. Tower and
decoder are the modules of garserve's reference, so peers differ in what they compute and hardly in how a block is
written: only the rotary positions are turned as timm turns them, where garserve takes one pass.
"""

from collections.abc import Sequence

import torch
from transformers import GenerationConfig

from garserve.checkpoint import Checkpoint
from garserve.inputs.prompts import stop_token_id
from garserve.inputs.tokenizer import GARTokenizer
from garserve.model.reference import ReferenceGAR
from garserve.model.vision import apply_rope
from peers.upstream_inputs import Inputs, Question, UpstreamInputs

_SAMPLES = 2  # of a bin, along each side


class UpstreamGAR:
    """One checkpoint, answering one question at a time."""

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, max_num_tiles: int | None = None
    ) -> None:
        self.config = checkpoint.config
        self.inputs = UpstreamInputs(checkpoint.folder, checkpoint.config, max_num_tiles)
        self.stop_id = stop_token_id(GARTokenizer(checkpoint.folder / "tokenizer.json", checkpoint.config))
        held = ReferenceGAR.load(checkpoint, dtype)
        self.tower, self.projector, self.decoder = held.encoder.tower, held.encoder.projector, held.language_model
        for block in self.tower.blocks:
            block.attn.turn = apply_rope

    def answer(self, question: Question, max_tokens: int) -> list[int]:
        """Return the greedy tokens of one answer, the stop token with them where it was reached."""
        return self.generate([self.embed(self.inputs(question))], max_tokens)[0]

    def without_stop(self, tokens: list[int]) -> list[int]:
        """Leave out the stop token at the end, as garserve's answers do."""
        return tokens[:-1] if tokens and tokens[-1] == self.stop_id else tokens

    def embed(self, inputs: Inputs) -> torch.Tensor:
        """Return the decoder's input embeddings [L, C]."""
        return self.fill(inputs, self.features(inputs.pixels, inputs.numbers))

    @torch.inference_mode()
    def fill(self, inputs: Inputs, features: torch.Tensor) -> torch.Tensor:
        """Put the features [T, n², C] and each region's replay in the places of the placeholders."""
        embeddings = self.decoder.get_input_embeddings()(inputs.ids)
        image = inputs.ids == self.config.image_token_id
        embeddings = embeddings.masked_scatter(image[:, None], features.to(embeddings.dtype))
        for name, box in zip(inputs.names, inputs.boxes, strict=True):
            replayed = self.replay(features, inputs.grid, box)
            places = (inputs.ids == self.config.crop_token_ids[name]).nonzero()[:, 0]
            first, last = int(places[0]), int(places[-1])
            embeddings = torch.cat([embeddings[:first], replayed, embeddings[last + 1 :]])
        return embeddings

    @torch.inference_mode()
    def features(self, pixels: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Run all tiles [T, 3, S, S] with their region numbers through tower and projector: [T, n², C]."""
        dtype, none = self.tower.pos_embed.dtype, self.config.prompt_count
        marked = ((numbers + 1) / 2 * 255).round().clamp(0, none) != none
        return self.projector(self.tower(pixels.to(dtype), marked[:, 0].to(dtype)))

    @torch.inference_mode()
    def replay(self, features: torch.Tensor, grid: tuple[int, int], box: Sequence[float]) -> torch.Tensor:
        """Merge the tiles to one map of floats, and align one box of it: [n², C]."""
        (across, down), side = grid, self.config.tokens_per_side
        tiles = features[1:].reshape(down, across, side, side, -1)
        merged = tiles.permute(4, 0, 2, 1, 3).reshape(-1, down * side, across * side).float()
        scale = 1.0
        if self.config.replay_box_scale == "released":
            scale = 1 / (self.config.vision.patch_size * self.config.pooling)
        sides = (across * side, down * side)
        x1, y1, x2, y2 = (float(torch.tensor(edge * sides[axis % 2])) * scale for axis, edge in enumerate(box))
        rows, columns = _bins(y1, y2, sides[1], side), _bins(x1, x2, sides[0], side)
        aligned = (rows @ merged) @ columns.T  # [C, n, n]
        return aligned.flatten(1).T.to(features.dtype)

    @torch.inference_mode()
    def generate(self, prompts: Sequence[torch.Tensor], max_tokens: int) -> list[list[int]]:
        """Decode greedily by transformers' generate, prompts [L, C] padded on the left where they differ."""
        longest = max(len(prompt) for prompt in prompts)
        embeddings = prompts[0].new_zeros(len(prompts), longest, prompts[0].shape[1])
        attention = torch.zeros(len(prompts), longest, dtype=torch.long)
        for index, prompt in enumerate(prompts):
            embeddings[index, longest - len(prompt) :] = prompt
            attention[index, longest - len(prompt) :] = 1
        settings = GenerationConfig(
            max_new_tokens=max_tokens, do_sample=False, eos_token_id=self.stop_id, pad_token_id=self.stop_id
        )
        out = self.decoder.generate(inputs_embeds=embeddings, attention_mask=attention, generation_config=settings)
        return [_until(row, self.stop_id) for row in out.tolist()]


def _until(tokens: list[int], stop: int) -> list[int]:
    return tokens[: tokens.index(stop) + 1] if stop in tokens else tokens


def _bins(low: float, high: float, cells: int, count: int) -> torch.Tensor:
    """Weights [count, cells] of an axis: the mean of two linear samples a bin, half a cell shifted (aligned)."""
    step = (high - low) / count
    places = low - 0.5 + (torch.arange(count * _SAMPLES) + 0.5) * (step / _SAMPLES)
    places = places.clamp(0, cells - 1)
    below = places.floor().long()
    above = (below + 1).clamp(max=cells - 1)
    share = places - below
    weights = torch.zeros(count * _SAMPLES, cells)
    rows = torch.arange(count * _SAMPLES)
    weights[rows, below] = 1 - share
    weights[rows, above] += share
    return weights.reshape(count, _SAMPLES, cells).mean(dim=1)
