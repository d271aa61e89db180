"""GAR checkpoints on disk: finding the folder, accounting for every tensor, reading weights (floor 2).

The authors' format: `config.json`, `preprocessor_config.json`, `tokenizer.json` and safetensors, in one file or
sharded with `model.safetensors.index.json`. Pickled weights are never opened.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

from garserve.config import GARConfig, VisionConfig, read_config
from garserve.config.files import read_json, reason
from garserve.config.weight_files import locate_tensors
from garserve.errors import CheckpointError, first_line

if TYPE_CHECKING:
    import torch

TINY = "tiny"  # the trained checkpoint inside the package
HEAD = "mllm.lm_head.weight"
EMBEDDINGS = "mllm.model.language_model.embed_tokens.weight"

# Where each part of the file goes in garserve's own modules; every name of the file has exactly one of these prefixes.
MODULE_PREFIXES: dict[str, str] = {
    "mask_patch_embedding.": "encoder.tower.mask_patch_embedding.",
    "mllm.model.vision_tower.timm_model.": "encoder.tower.",
    "mllm.model.multi_modal_projector.": "encoder.projector.",
    "mllm.model.language_model.": "language_model.model.",
    "mllm.lm_head.": "language_model.lm_head.",
}

_DTYPES = ("F32", "BF16", "F16")
_WANTED_FILES = ["*.json", "*.safetensors", "*.jinja"]


def module_name(tensor_name: str) -> str:
    """Translate a tensor's name in the file to its parameter's name in garserve's modules.

    Raises CheckpointError for a name that no part of GAR has.
    """
    for prefix, target in MODULE_PREFIXES.items():
        if tensor_name.startswith(prefix):
            return target + tensor_name.removeprefix(prefix)
    raise CheckpointError(f"tensor {tensor_name!r} belongs to no part of a GAR model")


def expected_tensors(config: GARConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor that a checkpoint with this config must hold."""
    tensors: dict[str, tuple[int, ...]] = {
        "mask_patch_embedding.weight": (config.vision.width, 3, config.vision.patch_size, config.vision.patch_size)
    }
    tower = "mllm.model.vision_tower.timm_model."
    tensors |= {tower + name: shape for name, shape in _tower_tensors(config.vision).items()}
    width, hidden = config.vision.width, config.hidden_size
    projector = "mllm.model.multi_modal_projector."
    tensors |= {
        projector + "linear_1.weight": (hidden, width),
        projector + "linear_1.bias": (hidden,),
        projector + "linear_2.weight": (hidden, hidden),
        projector + "linear_2.bias": (hidden,),
    }
    decoder = "mllm.model.language_model."
    tensors |= {decoder + name: shape for name, shape in _decoder_tensors(config).items()}
    if not config.tied_head:
        tensors[HEAD] = (config.vocab_size, hidden)
    return tensors


def _tower_tensors(vision: VisionConfig) -> dict[str, tuple[int, ...]]:
    width, mlp = vision.width, vision.mlp_width
    tensors: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (width, 3, vision.patch_size, vision.patch_size),
        "pos_embed": (1, vision.grid**2 + int(vision.class_token), width),
        "norm_pre.weight": (width,),
        "norm_pre.bias": (width,),
    }
    if vision.class_token:
        tensors["cls_token"] = (1, 1, width)
    for layer in range(vision.depth):
        block = f"blocks.{layer}."
        for norm in ("norm1", "norm2"):
            tensors |= {f"{block}{norm}.weight": (width,), f"{block}{norm}.bias": (width,)}
        for linear, (out, into) in {
            "attn.qkv": (3 * width, width),
            "attn.proj": (width, width),
            "mlp.fc1": (mlp, width),
            "mlp.fc2": (width, mlp),
        }.items():
            tensors |= {f"{block}{linear}.weight": (out, into), f"{block}{linear}.bias": (out,)}
        if vision.layer_scale:
            tensors |= {f"{block}gamma_1": (width,), f"{block}gamma_2": (width,)}
    return tensors


def _decoder_tensors(config: GARConfig) -> dict[str, tuple[int, ...]]:
    text, hidden = config.text, config.hidden_size
    heads = text["num_attention_heads"]
    head = text.get("head_dim") or hidden // heads
    kv, mlp = (text.get("num_key_value_heads") or heads) * head, text["intermediate_size"]
    tensors: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (config.vocab_size, hidden),
        "norm.weight": (hidden,),
    }
    for layer in range(text["num_hidden_layers"]):
        block = f"layers.{layer}."
        tensors |= {
            block + "input_layernorm.weight": (hidden,),
            block + "post_attention_layernorm.weight": (hidden,),
            block + "self_attn.q_proj.weight": (heads * head, hidden),
            block + "self_attn.k_proj.weight": (kv, hidden),
            block + "self_attn.v_proj.weight": (kv, hidden),
            block + "self_attn.o_proj.weight": (hidden, heads * head),
            block + "mlp.gate_proj.weight": (mlp, hidden),
            block + "mlp.up_proj.weight": (mlp, hidden),
            block + "mlp.down_proj.weight": (hidden, mlp),
        }
    return tensors


def resolve(checkpoint: str | Path, revision: str | None = None) -> Path:
    """Return the folder of a checkpoint: a local folder, or a Hugging Face repo id, fetched without its code.

    The text "tiny" is the checkpoint that comes with garserve (`./tiny` is a folder of that name). `revision` is a
    branch, a tag or a commit of the repo, its main branch by default; a folder has none.
    Raises CheckpointError where it is none of these, or cannot be looked for.
    """
    if checkpoint == TINY:
        return Path(str(files("garserve") / "data" / TINY))
    name = str(checkpoint)
    try:
        folder = Path(checkpoint).expanduser()
        if folder.is_dir():
            return folder
    except (OSError, RuntimeError) as error:  # in a folder that may not be entered, or of a user that there is not
        raise CheckpointError(f"checkpoint {name!r:.200}: cannot be looked for ({reason(error)})") from None
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise CheckpointError(
            f"checkpoint {name!r}: no such folder, and neither {TINY!r} nor a Hugging Face repo id (owner/name)"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_WANTED_FILES))
    except Exception as error:  # the hub's client raises many kinds: network, not found, gated
        raise CheckpointError(
            f"checkpoint {name!r}: no such folder, and fetching it from the Hugging Face hub failed "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error


def _refuse_quantized(folder: Path) -> None:
    """Refuse weights that were quantized into the files: they have other names, shapes and dtypes than GAR's."""
    data = read_json(folder / "config.json")
    if data.get("quantization_config") or data.get("mllm_config", {}).get("quantization_config"):
        raise CheckpointError(
            f"{folder / 'config.json'}: quantization_config: expected weights as they were trained, got quantized "
            "files; vLLM quantizes such weights while it loads them (the option quantization), and plain `vllm serve` "
            "takes quantized files"
        )


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its folder, config, and which file holds each tensor. Nothing is loaded yet."""

    folder: Path
    config: GARConfig
    files: dict[str, Path]

    @classmethod
    def open(cls, checkpoint: str | Path) -> "Checkpoint":
        """Find a checkpoint, read its config and account for every tensor by name and shape (headers only).

        Raises CheckpointError naming the first missing, extra or misshapen tensor, a pickled weight file,
        or a config that is not GAR's.
        """
        folder = resolve(checkpoint)
        config = read_config(folder)
        _refuse_quantized(folder)
        if not (folder / "tokenizer.json").is_file():
            raise CheckpointError(f"checkpoint file missing: {folder / 'tokenizer.json'}")
        opened = cls(folder, config, locate_tensors(folder))
        opened._account()
        return opened

    def tensors(self, prefixes: tuple[str, ...] = ("",)) -> "Iterator[tuple[str, torch.Tensor]]":
        """Yield every tensor whose name in the file has one of the prefixes, reading one at a time."""
        for path in sorted(set(self.files.values())):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (safe_open is not a mapping)
                    if name.startswith(prefixes):
                        yield name, file.get_tensor(name)

    def module_state(self) -> "dict[str, torch.Tensor]":
        """Return all weights under the names of garserve's modules, the tied head left out."""
        return {
            module_name(name): tensor for name, tensor in self.tensors() if not (self.config.tied_head and name == HEAD)
        }

    def _account(self) -> None:
        expected = expected_tensors(self.config)
        with ExitStack() as stack:
            opened = {path: stack.enter_context(safe_open(path, framework="pt")) for path in set(self.files.values())}
            for name, shape in expected.items():
                if name not in self.files:
                    raise CheckpointError(f"{self.folder}: tensor {name} is missing; expected shape {list(shape)}")
                held = opened[self.files[name]].get_slice(name)
                if held.get_dtype() not in _DTYPES:
                    raise CheckpointError(
                        f"{self.folder}: tensor {name}: expected one of {', '.join(_DTYPES)}, got {held.get_dtype()}"
                    )
                came = tuple(held.get_shape())
                if came != shape:
                    raise CheckpointError(
                        f"{self.folder}: tensor {name}: expected shape {list(shape)}, got {list(came)}"
                    )
            extra = sorted(set(self.files) - set(expected))
            if extra == [HEAD] and self.config.tied_head:
                head, table = (opened[self.files[name]].get_tensor(name) for name in (HEAD, EMBEDDINGS))
                if head.shape == table.shape and bool((head == table).all()):
                    return
                raise CheckpointError(
                    f"{self.folder}: tensor {HEAD} differs from the embedding table, but the config ties them"
                )
            if extra:
                raise CheckpointError(
                    f"{self.folder}: tensor {extra[0]} is no part of this model (unexpected tensors: {len(extra)})"
                )
