"""The tiny GAR in training: garserve's own tower and projector, transformers' Llama, and heads that are dropped."""

import math
from dataclasses import dataclass

import torch
from attention import attention_scores, per_example, seen_by_rows
from batches import Batch
from hints import GUESSES, WORDS, attention_loss, compared, matched, mentions, name_places, options, shown_loss
from questions import HINTED
from sequences import UNKNOWN
from torch import nn
from torch.nn import functional
from transformers import LlamaForCausalLM

from garserve.config import GARConfig
from garserve.model.encoder import RegionEncoder
from garserve.model.reference import llama_config

# Layers of the decoder after which it is asked what it has found out (0: the embeddings).
_NAMED_AFTER, _FOUND_AFTER = 1, (2, 3)
_PLACE_GAIN = 3.0
_NAMING_LAYER, _POINTING_LAYER, _COMPARING_LAYER, _MATCHING_LAYER = (
    0,
    1,
    2,
    4,
)  # whose attention is taught, counted from 0
HEADS = ("squeeze", "hint", "named", "found", "compared", "true_word", "lettered")  # dropped after training
_EVERY = 7  # of the crop tokens, this one is asked whom it belongs to: they are many


@dataclass
class Losses:
    """Losses of one batch, and which questions were answered to the last token."""

    answers: torch.Tensor
    hints: torch.Tensor
    right: list[list[bool]]
    colour_right: float  # of the hint head: a first look at what the tower sees


class TrainedGAR(nn.Module):
    """Forward pass over padded sequences. Names of encoder and language_model are those of the reference.

    Six kinds of heads give hints while it learns, and are no part of the checkpoint: what a region's replayed tokens
    show (colour, shape, texture, box, area); at each crop token inside the decoder, whose region it is; at each name of
    a region in a question, again what that region shows; where an answer is written, what the first and the last region
    named in its question show, and which word is true; and at the right option of a multiple choice, its letter. The
    attention of four layers is taught, too: of crop tokens to their names, of names in questions to their crop tokens,
    of answers to the names in their questions, and to the word, the option or the name there that decides. Without all
    this, a decoder of this size takes hours to find out which tokens a name belongs to, and longer to compare regions.
    """

    def __init__(self, config: GARConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = RegionEncoder(config)
        self.language_model = LlamaForCausalLM(llama_config(config))
        self.language_model.config._attn_implementation = "shared_prefix"
        width, shown = config.hidden_size, GUESSES
        self.squeeze = nn.Linear(width, 24)
        self.hint = nn.Sequential(nn.Linear(24 * config.tokens_per_tile, 128), nn.GELU(), nn.Linear(128, shown))
        self.named = nn.Linear(width, config.prompt_count)
        self.found = nn.ModuleList(nn.Linear(width, shown) for _ in _FOUND_AFTER)
        self.reset()
        self.compared = nn.Linear(width, 2 * shown)
        self.true_word = nn.Linear(width, len(HINTED))
        self.lettered = nn.Linear(width, 4)
        for head in (self.compared, self.true_word, self.lettered):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def reset(self) -> None:
        """Draw the first weights."""
        for name, weight in self.named_parameters():
            if weight.ndim >= 2 and "pos_embed" not in name and "cls_token" not in name:
                fan_in = weight[0].numel()
                nn.init.normal_(weight, std=0.02 if "embed_tokens" in name else fan_in**-0.5)
            elif "gamma" in name:
                nn.init.constant_(weight, 0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)
        for name, weight in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.data *= 0.5
        self._reserve_places()

    @torch.no_grad()
    def _reserve_places(self) -> None:
        """Let the tower begin with clear places: in channels of their own, into which nothing else writes yet."""
        tower = self.encoder.tower
        nn.init.normal_(tower.cls_token, std=0.3)
        places = _PLACE_GAIN * _places(self.config.vision.grid)
        channels = places.shape[1]
        tower.pos_embed.zero_()
        tower.pos_embed[0, 1:, :channels] = places
        writers = [tower.patch_embed["proj"].weight, tower.mask_patch_embedding.weight, tower.cls_token[0, 0]]
        for block in tower.blocks:
            writers += [block.attn.proj.weight, block.mlp["fc2"].weight]
        for writer in writers:
            writer[:channels] = 0

    def forward(self, batch: Batch, *, decoder: bool, frozen: bool = False) -> Losses:
        """Compute a batch's losses: the tower's hints alone, or with the `decoder`. A `frozen` tower stays."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            features, regions = self._encode(batch)
        guessed = self.hint(self.squeeze(regions).flatten(1))
        everything = torch.arange(len(guessed))
        hints = shown_loss(guessed, batch, everything)
        colours = batch.labels[:, 0]
        known = colours != UNKNOWN
        colour_right = float((guessed[known, : WORDS[0]].argmax(-1) == colours[known]).float().mean())
        if not decoder:
            return Losses(hints * 0, hints, [], colour_right)
        answers, more, right = self._answer(batch, features, regions)
        return Losses(answers, hints + more, right, colour_right)

    def _encode(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tiles' features [B, n², C] and the regions' replayed ones [R, n², C]."""
        tower, projector = self.encoder.tower, self.encoder.projector
        features = projector(tower(self.encoder.normalise(batch.tiles), batch.masks.float()))
        n = self.config.tokens_per_side
        maps = features.unflatten(1, (n, n))[batch.owner]
        mixed = torch.einsum("rby,ryxc->rbxc", batch.down, maps)
        return features, torch.einsum("rax,rbxc->rbac", batch.across, mixed).flatten(1, 2)

    def _answer(
        self, batch: Batch, features: torch.Tensor, regions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, list[list[bool]]]:
        hidden = self._decode(batch, features, regions)
        learnt = batch.answers.bool()
        rows, columns = functional.pad(learnt[:, 1:], (0, 1)).nonzero(as_tuple=True)
        logits = self.language_model.lm_head(self._last(batch, hidden, rows, columns))
        targets = batch.ids[learnt]
        loss = functional.cross_entropy(logits, targets)
        right = _whole_answers(batch, learnt, logits.argmax(-1) == targets)
        return loss, self._inner_hints(batch, hidden), right

    def _decode(self, batch: Batch, features: torch.Tensor, regions: torch.Tensor) -> list[torch.Tensor]:
        """Return what each layer of the decoder is given [B, L, C]: features at their placeholders in the first."""
        decoder = self.language_model.model
        embeddings = decoder.embed_tokens(batch.ids)
        image = batch.ids == self.config.image_token_id
        embeddings = embeddings.masked_scatter(image[..., None], torch.cat([features, features], dim=1))
        hidden = [embeddings.masked_scatter(self._crops(batch)[..., None], regions)]
        seen, places = seen_by_rows(batch), decoder.rotary_emb(embeddings, batch.positions)
        for layer in decoder.layers[:-1]:
            hidden.append(layer(hidden[-1], attention_mask=seen, position_embeddings=places))
        return hidden

    def _last(
        self, batch: Batch, hidden: list[torch.Tensor], rows: torch.Tensor, columns: torch.Tensor
    ) -> torch.Tensor:
        """Return what the decoder says at tokens (rows and columns [M]): [M, C]. Its last layer takes only those."""
        decoder = self.language_model.model
        layer, number = decoder.layers[-1], len(decoder.layers) - 1
        looks = attention_scores(decoder, number, batch, hidden, (rows, columns)).softmax(-1)  # [M, groups, heads, L]
        values = layer.self_attn.v_proj(layer.input_layernorm(hidden[number]))
        values = values.unflatten(-1, (looks.shape[1], -1))
        pairs = zip(looks.split(per_example(rows, batch)), values.unbind(), strict=True)
        found = torch.cat([torch.einsum("mghl,lgd->mghd", few, own) for few, own in pairs]).flatten(1)
        chosen = hidden[number][rows, columns] + layer.self_attn.o_proj(found)
        return decoder.norm(chosen + layer.mlp(layer.post_attention_layernorm(chosen)))

    def _crops(self, batch: Batch) -> torch.Tensor:
        return torch.isin(batch.ids, torch.tensor(self.config.crop_token_ids))

    def _inner_hints(self, batch: Batch, hidden: list[torch.Tensor]) -> torch.Tensor:
        """Ask inside the decoder: of crop tokens whose they are, of names in questions what their regions show."""
        decoder, tokens, crops = self.language_model.model, self.config.tokens_per_tile, self._crops(batch)
        loss = functional.cross_entropy(
            self.named(hidden[_NAMED_AFTER][crops]), batch.numbers.repeat_interleave(tokens)
        )
        places = torch.arange(batch.ids.shape[1])
        owner = torch.full_like(batch.ids, -1)  # which of all regions a crop token belongs to
        owner[crops] = torch.arange(len(batch.owner)).repeat_interleave(tokens)
        rows, columns = crops.nonzero(as_tuple=True)
        some = slice(None, None, _EVERY)
        names = name_places(batch, owner)[owner[rows, columns]]
        loss = loss + attention_loss(
            decoder, _NAMING_LAYER, batch, hidden, (rows[some], columns[some]), places == names[some, None]
        )
        rows, columns, region = mentions(batch)
        if len(rows):
            own = owner[rows] == region[:, None]
            loss = loss + attention_loss(decoder, _POINTING_LAYER, batch, hidden, (rows, columns), own)
            for head, layer in zip(self.found, _FOUND_AFTER, strict=True):
                loss = loss + 0.5 * shown_loss(head(hidden[layer][rows, columns]), batch, region)
        return loss + self._comparing_hints(batch, hidden)

    def _comparing_hints(self, batch: Batch, hidden: list[torch.Tensor]) -> torch.Tensor:
        """Ask where answers are written what the first and the last region named in the question show."""
        decoder, asked = self.language_model.model, compared(batch)
        if not len(asked):
            return hidden[0].new_zeros(())
        rows, columns = asked[:, 0], asked[:, 1]
        named = asked[:, 2:4, None] == torch.arange(batch.ids.shape[1])  # [M, 2, L]
        loss = attention_loss(decoder, _COMPARING_LAYER, batch, hidden, (rows, columns), named)
        guesses = self.compared(hidden[_COMPARING_LAYER + 1][rows, columns]).chunk(2, dim=-1)
        for guess, region in zip(guesses, asked[:, 4:].unbind(1), strict=True):
            loss = loss + 0.5 * shown_loss(guess, batch, region)
        return loss + self._matching_hints(batch, hidden)

    def _matching_hints(self, batch: Batch, hidden: list[torch.Tensor]) -> torch.Tensor:
        """Ask where an answer begins what is true, and teach it to look at the word or the option that decides.

        An option is asked for its letter.
        """
        decoder = self.language_model.model
        rows, columns = (batch.words != UNKNOWN).nonzero(as_tuple=True)
        loss = hidden[0].new_zeros(())
        if len(rows):
            guess = self.true_word(hidden[_MATCHING_LAYER][rows, columns - 1])
            loss = loss + functional.cross_entropy(guess, batch.words[rows, columns])
        rows, columns, wanted = matched(batch)
        if len(rows):
            loss = loss + attention_loss(decoder, _MATCHING_LAYER, batch, hidden, (rows, columns), wanted)
        rows, columns, letters = options(batch)
        if len(rows):
            loss = loss + functional.cross_entropy(self.lettered(hidden[_MATCHING_LAYER][rows, columns]), letters)
        return loss


def _whole_answers(batch: Batch, learnt: torch.Tensor, right: torch.Tensor) -> list[list[bool]]:
    """Say of each question whether all tokens of its answer were right (then greedy decoding gives that answer)."""
    results: list[list[bool]] = []
    place = 0
    flags = right.tolist()
    for row, asked in zip(learnt.tolist(), batch.asked, strict=True):
        runs: list[bool] = []
        for index, flag in enumerate(row):
            if not flag:
                continue
            if not row[index - 1]:
                runs.append(True)
            runs[-1] = runs[-1] and flags[place]
            place += 1
        if len(runs) != len(asked):
            raise ValueError(f"expected {len(asked)} answers in the sequence, got {len(runs)}")
        results.append(runs)
    return results


def _places(grid: int) -> torch.Tensor:
    """Return waves of a few lengths along both axes of a grid of patches: [grid², 18], values of -1..1."""
    line = (torch.arange(grid) + 0.5) / grid
    waves = [line * 2 - 1]
    for cycles in (0.25, 0.5, 1.0, 2.0):
        waves += [torch.sin(2 * math.pi * cycles * line), torch.cos(2 * math.pi * cycles * line)]
    one = torch.stack(waves, dim=1)  # [grid, 9]
    return torch.cat([one[None].expand(grid, -1, -1), one[:, None].expand(-1, grid, -1)], dim=-1).flatten(0, 1)
