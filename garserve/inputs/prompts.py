"""Assembling GAR's prompt as token ids, with the placeholders' places.

The strings are the authors': the chat template is Perception-LM's, the text before the question is GAR's inference
code's (single region) or its training data's (several). The rendered text starts with begin-of-text and is tokenised
with special tokens added, so every prompt starts with two of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from garserve.config import GARConfig
from garserve.inputs.request import RegionRequest
from garserve.inputs.tokenizer import GARTokenizer

DEFAULT_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
DESCRIBE = "Describe this masked region in detail."
CURIOUS = "There are some objects I am curious about: "

Span = tuple[int, int]  # half-open positions in the token ids


@dataclass(frozen=True)
class Prompt:
    """A prompt's token ids, and where the image's and each listed region's placeholders lie in them."""

    token_ids: list[int]
    image_span: Span
    region_spans: list[Span]  # in the order of RegionRequest.listed()


def region_preamble(names: Sequence[int], single: bool, tokenizer: GARTokenizer, config: GARConfig) -> list[str | int]:
    """Return the part of the user's turn between the image and the question, crop tokens once each, as parts.

    The single-region form has no space after its only semicolon; the multi-region form has one after each.
    """
    parts: list[str | int] = [CURIOUS]
    for name in names:
        parts += [tokenizer.special(f"<Prompt{name}>"), ";" if single else "; "]
    for name in names:
        parts += ["\n", tokenizer.special(f"<Prompt{name}>"), ": ", config.crop_token_ids[name]]
    return parts if single else [*parts, "\n\n"]


def stop_token_id(tokenizer: GARTokenizer) -> int:
    """Return the token that ends an answer; the authors stop at this one only."""
    return tokenizer.special("<|eot_id|>")


def assemble(request: RegionRequest, num_tiles: int, tokenizer: GARTokenizer, config: GARConfig) -> Prompt:
    """Assemble a checked request's prompt for an image of `num_tiles` tiles, the thumbnail counted."""
    single = request.question is None
    names = [request.described_as(config.prompt_count)] if single else request.listed()
    preamble = region_preamble(names, single, tokenizer, config)
    question = DESCRIBE if request.question is None else request.question.rstrip()
    system = DEFAULT_SYSTEM if request.system is None else request.system.strip()

    turns: list[tuple[str, list[str | int]]] = [("user", [config.image_token_id, *preamble, question])]
    turns += [(turn.role, [turn.text.strip()]) for turn in request.turns]
    begin = tokenizer.special("<|begin_of_text|>")
    parts = [begin, *chat_parts(system, turns, tokenizer)]
    return expand(tokenizer.encode_parts(parts), num_tiles, config)


def chat_parts(
    system: str, turns: Sequence[tuple[str, Sequence[str | int]]], tokenizer: GARTokenizer, *, reply: bool = True
) -> list[str | int]:
    """Render Perception-LM's chat template as texts and token ids; `reply` opens the assistant's turn."""
    end = tokenizer.special("<|eot_id|>")
    parts: list[str | int] = [tokenizer.special("<|begin_of_text|>")]
    for role, content in [("system", [system]), *turns]:
        parts += [*_header(role, tokenizer), *content, end]
    return [*parts, *_header("assistant", tokenizer)] if reply else parts


def _header(role: str, tokenizer: GARTokenizer) -> list[str | int]:
    return [tokenizer.special("<|start_header_id|>"), role, tokenizer.special("<|end_header_id|>"), "\n\n"]


def expand(token_ids: Sequence[int], num_tiles: int, config: GARConfig) -> Prompt:
    """Repeat the image token n² times a tile and each crop token n² times, and note where they lie.

    Expects the image token once, and each crop token at most once.
    """
    per_tile = config.tokens_per_tile
    crops = set(config.crop_token_ids)
    ids: list[int] = []
    image_span: Span = (0, 0)
    region_spans: list[Span] = []
    for token in token_ids:
        start = len(ids)
        if token == config.image_token_id:
            ids.extend([token] * (num_tiles * per_tile))
            image_span = (start, len(ids))
        elif token in crops:
            ids.extend([token] * per_tile)
            region_spans.append((start, len(ids)))
        else:
            ids.append(token)
    return Prompt(ids, image_span, region_spans)
