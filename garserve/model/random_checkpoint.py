"""Checkpoints with random weights, for demonstrations, tests and benchmarks: every part is there, the text is noise."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from garserve.checkpoint import HEAD, expected_tensors
from garserve.config import parse_config
from garserve.presets import PresetName, preset

# Llama 3's split pattern.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS = (
    "Describe this masked region in detail. There are some objects I am curious about: the region is on the left of, "
    "on the right of, above, below, inside; it is large, small, round, square, long, thin, plain, textured; its colour "
    "is black, white, grey, red, orange, yellow, green, blue, purple, pink, brown. A cup of coffee stands on a wooden "
    "table beside a spoon and a saucer; a cat, a dog, a person, a tree, a house and a car are seen in the picture."
)
# Sharp attention and strong values in the decoder: what it says depends on the picture, not on the last word alone.
_GAINS = {"q_proj.weight": 2.5, "k_proj.weight": 2.5, "v_proj.weight": 2.0, "o_proj.weight": 2.0}
CHAT_TEMPLATE = """\
{%- set ns = namespace(system='You are a helpful language and vision assistant. You are able to understand the visual \
content that the user provides, and assist the user with a variety of tasks using natural language.') -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set ns.system = messages[0]['content'] | trim -%}{%- set messages = messages[1:] -%}
{%- endif -%}
{{- bos_token ~ '<|start_header_id|>system<|end_header_id|>\\n\\n' ~ ns.system ~ '<|eot_id|>' -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\\n\\n' -}}
{%- for content in message['content'] if content['type'] == 'image' -%}{{- '<|image|>' -}}{%- endfor -%}
{%- for content in message['content'] if content['type'] == 'text' -%}{{- content['text'] | trim -}}{%- endfor -%}
{{- '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""


def write_random_checkpoint(
    folder: Path,
    model: PresetName = "mini",
    *,
    seed: int = 0,
    box_scale: str = "geometric",
    depth: int | None = None,
    dtype: str | None = None,
    **text_overrides: Any,
) -> Path:
    """Write a whole checkpoint with random weights into `folder` and return it; the same seed gives the same bytes.

    `text_overrides` replace fields of the decoder's config (`num_hidden_layers=2` makes a large model affordable),
    `depth` the tower's number of blocks, `dtype` that of the weights.
    """
    config, preprocessor = preset(model)
    config["replay_box_scale"] = box_scale
    config["mllm_config"]["text_config"] |= text_overrides
    if depth is not None:
        config["mllm_config"]["vision_config"]["model_args"]["depth"] = depth
    if dtype is not None:
        config["dtype"] = dtype
    parsed = parse_config(config, preprocessor)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, parsed.dtype)
    tensors = {name: _random(name, shape, generator).to(dtype) for name, shape in expected_tensors(parsed).items()}
    base = config["mllm_config"]["image_token_id"] - 2
    if HEAD in tensors:
        tensors[HEAD][base:] = 0  # noise reads better without control tokens
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_files(folder, config, preprocessor, _WORDS)
    return folder


def write_files(folder: Path, config: dict[str, Any], preprocessor: dict[str, Any], words: str) -> None:
    """Write everything but the weights: configs, chat template, and a tokenizer that knows the words of a text."""
    _write_json(folder / "config.json", config)
    _write_json(folder / "preprocessor_config.json", preprocessor)
    _write_tokenizer(folder, config["mllm_config"]["image_token_id"] - 2, words)


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(shape, generator=generator)
    if "norm" in name:
        return 1.0 + 0.1 * values if name.endswith("weight") else 0.1 * values
    if "gamma" in name:
        return 0.3 * values
    if len(shape) == 1:
        return 0.1 * values
    gain = next((gain for end, gain in _GAINS.items() if name.endswith(end)), 1.0)
    return gain * values * torch.Size(shape[1:]).numel() ** -0.5


def special_tokens() -> list[str]:
    """Return the 262 special tokens in the order of their ids: Perception-LM's list, then GAR's names of regions."""
    named = ["<|begin_of_text|>", "<|end_of_text|>", "<|image|>", "<|video|>"]
    named += [
        "<|reserved_special_token_2|>",
        "<|reserved_special_token_3|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
    ]
    named += ["<|reserved_special_token_4|>", "<|eot_id|>"]
    named += [f"<|reserved_special_token_{number}|>" for number in range(5, 5 + 256 - len(named))]
    return [*named, *(f"<Prompt{number}>" for number in range(5)), "<NO_Prompt>"]


def _write_tokenizer(folder: Path, base: int, words: str) -> None:
    """Byte-level BPE of `base` ordinary tokens: bytes, merges of some words, and unused ones up to the size."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(base, 1024),
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([words], trainer)
    missing = base - tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"\u2063{number}" for number in range(missing)])
    tokenizer.add_special_tokens(special_tokens())
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", base)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|end_of_text|>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    _write_json(folder / "tokenizer_config.json", {**settings, **tokens, "model_max_length": 11520})
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
