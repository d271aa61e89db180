"""Checkpoints: every tensor is accounted for, configs of other models are refused, nothing is unpickled."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import garserve
from garserve.checkpoint import EMBEDDINGS, HEAD, Checkpoint, expected_tensors, module_name
from garserve.config import parse_config
from garserve.errors import CheckpointError
from garserve.model.encoder import RegionEncoder
from garserve.model.reference import ReferenceGAR, llama_config
from garserve.presets import preset


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, change: Callable[[dict], object], name: str = "config.json") -> None:
    data = json.loads((folder / name).read_text())
    change(data)
    (folder / name).write_text(json.dumps(data))


def shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    half = len(names) // 2
    parts = {"model-00001-of-00002.safetensors": names[:half], "model-00002-of-00002.safetensors": names[half:]}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {name: file for file, own in parts.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_sharded_equals_single(mini: Path, mini_copy: Path) -> None:
    shard(mini_copy)
    single, sharded = Checkpoint.open(mini).module_state(), Checkpoint.open(mini_copy).module_state()
    assert single.keys() == sharded.keys()
    assert all(torch.equal(single[name], sharded[name]) for name in single)


def test_index_that_lies(mini_copy: Path) -> None:
    shard(mini_copy)
    edit_config(
        mini_copy,
        lambda d: d["weight_map"].update({EMBEDDINGS: "model-00002-of-00002.safetensors"}),
        "model.safetensors.index.json",
    )
    with pytest.raises(CheckpointError, match="where the index puts it"):
        Checkpoint.open(mini_copy)


@pytest.mark.parametrize("data", [None, [], {}, {"weight_map": {"a": 5}}, {"weight_map": {}}])
def test_index_that_is_none(mini_copy: Path, data: object) -> None:
    (mini_copy / "model.safetensors.index.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError):
        Checkpoint.open(mini_copy)


def test_index_that_leaves_the_folder(mini_copy: Path) -> None:
    shard(mini_copy)
    edit_config(
        mini_copy,
        lambda d: d["weight_map"].update({EMBEDDINGS: "../secret.safetensors"}),
        "model.safetensors.index.json",
    )
    with pytest.raises(CheckpointError, match="expected a safetensors file beside it"):
        Checkpoint.open(mini_copy)


def test_missing_shard(mini_copy: Path) -> None:
    shard(mini_copy)
    (mini_copy / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint file missing: .*00002-of-00002"):
        Checkpoint.open(mini_copy)


@pytest.mark.parametrize("name", ["model_ema.safetensors", "adapter_model.safetensors", "a.safetensors"])
def test_weights_beside_the_models(mini_copy: Path, name: str) -> None:
    """vLLM would load all of them: the same names, and the last file's values."""
    tensors = load_file(mini_copy / "model.safetensors")
    save_file({key: tensor * 2 for key, tensor in tensors.items()}, mini_copy / name)
    with pytest.raises(CheckpointError, match=rf"{name}: expected no weights beside model.safetensors"):
        Checkpoint.open(mini_copy)
    (mini_copy / name).rename(mini_copy / f".{name}")
    (mini_copy / "old").mkdir()
    save_file(tensors, mini_copy / "old" / "model.safetensors")
    Checkpoint.open(mini_copy)


def test_weights_beside_an_index(mini_copy: Path) -> None:
    """vLLM loads what the index names, unless there is a file of Mistral's name for all of a model's weights."""
    tensors = load_file(mini_copy / "model.safetensors")
    shard(mini_copy)
    save_file(tensors, mini_copy / "model_ema.safetensors")
    assert set(Checkpoint.open(mini_copy).files.values()) == set(mini_copy.glob("model-*.safetensors"))
    save_file(tensors, mini_copy / "consolidated.safetensors")
    with pytest.raises(CheckpointError, match=r"consolidated.safetensors: expected no weights beside model-00001"):
        Checkpoint.open(mini_copy)


def test_tied_head(mini_copy: Path) -> None:
    edit_config(mini_copy, lambda d: d["mllm_config"]["text_config"].update(tie_word_embeddings=True))
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from the embedding table"):
        Checkpoint.open(mini_copy)
    edit(mini_copy, lambda t: t.update({HEAD: t[EMBEDDINGS].clone()}))
    assert "language_model.lm_head.weight" not in Checkpoint.open(mini_copy).module_state()
    edit(mini_copy, lambda t: t.pop(HEAD))
    model = ReferenceGAR.load(Checkpoint.open(mini_copy))
    assert torch.equal(model.language_model.lm_head.weight, model.language_model.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("mask_patch_embedding.weight"), "tensor mask_patch_embedding.weight is missing"),
        (lambda t: t.update(extra=torch.zeros(2)), "tensor extra is no part of this model"),
        (
            lambda t: t.update({EMBEDDINGS: torch.zeros(3, 4)}),
            r"embed_tokens.weight: expected shape \[774, 64\], got \[3, 4\]",
        ),
        (
            lambda t: t.pop("mllm.model.vision_tower.timm_model.blocks.1.gamma_2"),
            r"timm_model.blocks.1.gamma_2 is missing; expected shape \[64\]",
        ),
    ],
)
def test_tensors_are_accounted_for(mini_copy: Path, change: Callable[[dict], object], message: str) -> None:
    edit(mini_copy, change)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(mini_copy)


class _Bomb:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("/tmp/garserve-was-unpickled"),))


def test_a_pickle_is_refused_and_never_opened(mini_copy: Path) -> None:
    (mini_copy / "model.safetensors").unlink()
    (mini_copy / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(CheckpointError, match=r"only pickled weights found \(pytorch_model.bin\)"):
        Checkpoint.open(mini_copy)
    (mini_copy / "model.safetensors").write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        Checkpoint.open(mini_copy)
    assert not Path("/tmp/garserve-was-unpickled").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(model_type="llama"), "field model_type"),
        (lambda d: d.pop("mllm_config"), "field mllm_config"),
        (lambda d: d["mllm_config"].update(model_type="llava"), "field mllm_config.model_type"),
        (lambda d: d["mllm_config"]["vision_config"].update(architecture="vit_x"), "expected one of .* got 'vit_x'"),
        (
            lambda d: d["mllm_config"]["text_config"].update(model_type="qwen2"),
            "text_config: field model_type: Input should be 'llama', got 'qwen2'",
        ),
        (lambda d: d["mllm_config"].update(vision_use_cls_token=False), "vision_use_cls_token"),
        (
            lambda d: d["mllm_config"]["vision_config"]["model_args"].update(use_post_transformer_norm=True),
            "use_post_transformer_norm",
        ),
        (lambda d: d["mllm_config"]["text_config"].pop("intermediate_size"), "text_config: field intermediate_size"),
        (
            lambda d: d["mllm_config"]["text_config"].update(num_hidden_layers=10**9),
            "text_config: field num_hidden_layers",
        ),
        (lambda d: d["mllm_config"]["vision_config"]["model_args"].update(depth=-1), "model_args.depth"),
        (
            lambda d: d["mllm_config"]["text_config"].update(num_hidden_layers="2"),
            "text_config: field num_hidden_layers",
        ),
        (
            lambda d: d.update(crop_tokens_ids=[516] * 5),
            "crop_tokens_ids: expected ids of the 774 tokens, all different",
        ),
        (lambda d: d.update(crop_tokens_ids=[1, 2, 3, 4, 10**9]), "crop_tokens_ids: expected ids"),
        (lambda d: d.update(prompt_numbers=4), "prompt_numbers: expected one per crop token"),
        (lambda d: d.update(replay_box_scale="other"), "field replay_box_scale"),
        (lambda d: d["mllm_config"]["text_config"].update(attention_bias=True), "field attention_bias"),
        (lambda d: d["mllm_config"]["text_config"].update(mlp_bias=True), "field mlp_bias"),
    ],
)
def test_configs_of_other_models(mini_copy: Path, change: Callable[[dict], object], message: str) -> None:
    edit_config(mini_copy, change)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(mini_copy)


@pytest.mark.parametrize("std", [[0.5, 0, 0.5], [0.5, float("nan"), 0.5], [-1, 1, 1]])
def test_pixels_cannot_be_divided_by_nothing(mini_copy: Path, std: list[float]) -> None:
    path = mini_copy / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_std": std}))
    with pytest.raises(CheckpointError, match=r"preprocessor_config.json: field image_std"):
        Checkpoint.open(mini_copy)


def test_preprocessor_inside_the_processors_config(mini: Path, mini_copy: Path) -> None:
    inner = json.loads((mini_copy / "preprocessor_config.json").read_text())
    (mini_copy / "preprocessor_config.json").unlink()
    (mini_copy / "processor_config.json").write_text(json.dumps({"image_processor": inner}))
    assert Checkpoint.open(mini_copy).config == Checkpoint.open(mini).config


def test_a_decoder_that_transformers_refuses(mini_copy: Path) -> None:
    edit_config(mini_copy, lambda d: d["mllm_config"]["text_config"].update(hidden_act="nope"))
    with pytest.raises(CheckpointError, match="refused by transformers"):
        garserve.load(mini_copy, "reference")


@pytest.mark.parametrize("within", [None, "mllm_config"])
def test_quantized_files_are_told_as_such(mini_copy: Path, within: str | None) -> None:
    method = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    edit_config(mini_copy, lambda d: (d if within is None else d[within]).update(method))
    with pytest.raises(CheckpointError, match=r"config\.json: quantization_config: expected weights as they were"):
        Checkpoint.open(mini_copy)


def test_weights_of_another_kind(mini_copy: Path) -> None:
    edit(mini_copy, lambda t: t.update({EMBEDDINGS: t[EMBEDDINGS].to(torch.int8)}))
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight: expected one of F32, BF16, F16, got I8"):
        Checkpoint.open(mini_copy)


def test_default_box_scale_is_the_released_one() -> None:
    assert parse_config(*preset("GAR-1B")).replay_box_scale == "released"


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer.json", "model.safetensors"])
def test_missing_and_broken_files(mini_copy: Path, name: str) -> None:
    (mini_copy / name).write_text("{")
    with pytest.raises(CheckpointError, match=name):
        garserve.load(mini_copy, "reference")
    (mini_copy / name).unlink()
    with pytest.raises(CheckpointError, match=rf"checkpoint file missing: .*{name}"):
        garserve.load(mini_copy, "reference")


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder, and neither 'tiny' nor a Hugging Face repo id"):
        Checkpoint.open(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="fetching it from the Hugging Face hub failed"):
        Checkpoint.open("nobody/nothing-of-this-name")


@pytest.mark.parametrize("name", ["GAR-1B", "GAR-8B", "mini"])
def test_names_cover_every_parameter_exactly_once(name: str) -> None:
    """Released shapes on the meta device: each tensor of the file is one parameter of the same shape, and back."""
    config = parse_config(*preset(name))  # type: ignore[arg-type]
    with torch.device("meta"):
        model = ReferenceGAR(config)
    parameters = {key: tuple(value.shape) for key, value in model.named_parameters(remove_duplicate=False)}
    expected = expected_tensors(config)
    mapped = {module_name(key): shape for key, shape in expected.items()}
    assert len(mapped) == len(expected)
    if config.tied_head:
        parameters.pop("language_model.lm_head.weight", None)
    assert mapped == parameters


def test_released_shapes() -> None:
    one, eight = parse_config(*preset("GAR-1B")), parse_config(*preset("GAR-8B"))
    assert (one.vision.width, one.vision.depth, one.vision.mlp_width, one.vision.class_token) == (1024, 23, 4096, True)
    assert (eight.vision.width, eight.vision.depth, eight.vision.mlp_width, eight.vision.class_token) == (
        1536,
        47,
        8960,
        False,
    )
    assert one.tokens_per_tile == eight.tokens_per_tile == 256
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in RegionEncoder(c).parameters()) for c in (one, eight)]
    assert 0.28e9 < sizes[0] < 0.32e9
    assert 1.7e9 < sizes[1] < 1.95e9
    assert llama_config(eight).num_key_value_heads == 8


def test_a_name_of_no_part() -> None:
    with pytest.raises(CheckpointError, match="belongs to no part"):
        module_name("visual.proj")
