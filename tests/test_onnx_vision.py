"""The exported tower: equal to the reference for any number of tiles in every dtype, and clear about bad input."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from garserve.export.fuse import fuse_operators
from garserve.export.quantise import quantise
from garserve.export.samples import Tiles, photo_tiles, random_tiles, relative_error
from garserve.export.source import load_encoder
from garserve.export.store_bf16 import store_bf16
from garserve.export.tower_graph import TowerGraph
from garserve.export.vision import TOLERANCES, export_vision, write_graph

from garserve.checkpoint import TINY, Checkpoint
from garserve.config import GARConfig, parse_config
from garserve.errors import OnnxError, RequestError
from garserve.inputs.tiles import pack_mask
from garserve.model.encoder import RegionEncoder
from garserve.model.fingerprint import vision_fingerprint, vision_settings
from garserve.model.onnx_file import ModelInfo, read_info
from garserve.model.onnx_vision import OnnxVision
from garserve.presets import preset
from tests.conftest import ROOT
from tests.onnx_models import tiny_encoder, tiny_models

onnx = pytest.importorskip("onnx", reason="ONNX is not installed (pip install garserve[onnx])")
pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed (pip install garserve[onnx])")

# What is promised; the tolerances that exports carry must not be wider.
LIMITS = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 2e-2, "int8": 5e-2}


def tiny_config() -> GARConfig:
    return tiny_encoder().config


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The float32 models in a folder that a test may damage."""
    return Path(shutil.copytree(tiny_models(), tmp_path / "models"))


@pytest.mark.parametrize("dtype", LIMITS)
def test_within_tolerance_of_the_reference(dtype: str) -> None:
    session = OnnxVision(tiny_models(dtype), provider="cpu")
    assert session.info.tolerance == TOLERANCES[dtype] <= LIMITS[dtype]
    for sample in (random_tiles(tiny_config(), 5), *photo_tiles(tiny_config())):
        wanted = sample.features(tiny_encoder())
        assert relative_error(session.run(sample.tiles, sample.masks), wanted) <= LIMITS[dtype]
        bits = pack_mask(sample.masks.bool())
        assert relative_error(session(sample.tiles, bits), wanted) <= LIMITS[dtype]


def test_one_session_takes_any_number_of_tiles() -> None:
    session, sample = OnnxVision(tiny_models(), provider="cpu"), random_tiles(tiny_config(), 37)
    wanted = sample.features(tiny_encoder())
    for count in range(1, 38):
        few = sample.first(count)
        assert relative_error(session.run(few.tiles, few.masks), wanted[:count]) <= LIMITS["fp32"], count
    none = sample.first(0)
    assert session.run(none.tiles, none.masks).shape == (0, *wanted.shape[1:])


def test_any_mark_is_a_mark() -> None:
    session, sample = OnnxVision(tiny_models(), provider="cpu"), random_tiles(tiny_config(), 1)
    assert torch.equal(session.run(sample.tiles, sample.masks * 255), session.run(sample.tiles, sample.masks))
    unmarked = session.run(sample.tiles, torch.zeros_like(sample.masks))
    assert relative_error(unmarked, session.run(sample.tiles, sample.masks)) > 0.01


def test_the_graph_is_whole_lean_and_says_what_it_is() -> None:
    folder, checkpoint = tiny_models(), Checkpoint.open(TINY)
    onnx.checker.check_model(str(folder / "vision.onnx"), full_check=True)
    model = onnx.load(str(folder / "vision.onnx"), load_external_data=False)
    counts, depth = Counter(node.op_type for node in model.graph.node), checkpoint.config.vision.depth
    assert (counts["Attention"], counts["RotaryEmbedding"], counts["Softmax"]) == (depth, 2 * depth, 0)
    assert {node.domain for node in model.graph.node} == {""}
    info = read_info(folder)
    assert (info.kind, info.dtype, info.opset, info.version) == ("vision", "fp32", 23, "0.1.0")
    assert info.checkpoint == vision_fingerprint(checkpoint)
    assert info.config == vision_settings(checkpoint.config)
    assert str(ROOT).encode() not in (folder / "vision.onnx").read_bytes(), "paths of this machine"


def sizes(dtype: str) -> int:
    return sum(path.stat().st_size for path in tiny_models(dtype).glob("vision.onnx*"))


def test_smaller_dtypes_are_smaller_files() -> None:
    assert sizes("bf16") < 0.55 * sizes("fp32")
    assert sizes("fp16") < 0.55 * sizes("fp32")
    assert sizes("int8") < 0.4 * sizes("fp32")


@pytest.mark.parametrize("opset", [18, 23])
def test_bfloat16_is_for_matrices_of_weights_alone(mini: Path, tmp_path: Path, opset: int) -> None:
    """Equal to a tower with its matrices rounded: pixels, positions and rotary tables keep all of their bits."""
    encoder = load_encoder(Checkpoint.open(mini))
    info = replace(info_for(encoder.config, opset), dtype="bf16")
    write_graph(encoder, tmp_path / "vision.onnx", info)
    rounded = TowerGraph(encoder, fused=opset == 23)
    for name, weight in rounded.named_parameters():
        if weight.ndim > 1 and name != "cls":
            weight.copy_(weight.bfloat16().float())
    sample = random_tiles(encoder.config, 3)
    ours = OnnxVision(tmp_path, provider="cpu").run(sample.tiles, sample.masks)
    assert relative_error(ours, rounded(sample.tiles, sample.masks)) < 1e-5
    model = onnx.load(str(tmp_path / "vision.onnx"), load_external_data=False)
    stored = [one for one in model.graph.initializer if one.data_type == onnx.TensorProto.BFLOAT16]
    assert len(stored) == 4 * encoder.config.vision.depth + 3  # and the patches, and two layers of the projector


def test_a_weight_is_one_also_where_it_is_transposed() -> None:
    onnx_ir = pytest.importorskip("onnx_ir")
    text = """<ir_version: 10, opset_import: ["" : 18]>
        graph (float[2, 2] x) => (float[2, 2] y)
        <float[2, 2] weight = {1, 2, 3, 4}, float[2, 2] table = {1, 2, 3, 4}, float[2, 2] both = {1, 2, 3, 4}> {
            turned = Transpose (weight)
            a = MatMul (x, turned)
            b = MatMul (a, both)
            c = Add (b, both)
            y = Add (c, table)
        }"""
    model = onnx_ir.from_onnx_text(text)
    store_bf16(model)
    assert set(model.graph.initializers) == {"weight.bf16", "table", "both"}


def random_encoder(config: GARConfig) -> RegionEncoder:
    torch.manual_seed(0)
    encoder = RegionEncoder(config).eval()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            spread = 0.3 if "gamma" in name else parameter[0].numel() ** -0.5
            parameter.normal_(0, 0.02 if parameter.ndim == 1 and "gamma" not in name else spread)
    return encoder


def info_for(config: GARConfig, opset: int) -> ModelInfo:
    return ModelInfo("vision", "0", "f", "fp32", opset, 1e-4, vision_settings(config))


def test_without_a_class_token_and_without_layer_scale() -> None:
    config = parse_config(*preset("mini"))
    config = replace(config, vision=replace(config.vision, class_token=False, rope_offset=0, layer_scale=False))
    encoder, sample = random_encoder(config), random_tiles(config, 3)
    wanted = sample.features(encoder)
    for fused in (True, False):
        ours = TowerGraph(encoder, fused=fused)(sample.tiles, sample.masks)
        assert relative_error(ours, wanted) < 1e-5, fused


def test_the_shape_of_a_released_model_at_one_block(tmp_path: Path) -> None:
    config = parse_config(*preset("GAR-1B"))
    config = replace(config, vision=replace(config.vision, depth=1))
    encoder, sample = random_encoder(config), random_tiles(config, 2)
    write_graph(encoder, tmp_path / "vision.onnx", info_for(config, 23))
    onnx.checker.check_model(str(tmp_path / "vision.onnx"), full_check=True)
    session, wanted = OnnxVision(tmp_path, provider="cpu"), sample.features(encoder)
    assert wanted.shape == (2, 256, 2048)
    assert relative_error(session.run(sample.tiles, sample.masks), wanted) <= 1e-4
    assert relative_error(session.run(sample.tiles[1:], sample.masks[1:]), wanted[1:]) <= 1e-4


def test_an_older_opset_spells_attention_out(mini: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(mini)
    done = export_vision(checkpoint, tmp_path / "deep" / "er", opset=18, fuse=False)
    assert done.error <= 1e-4
    model = onnx.load(str(tmp_path / "deep" / "er" / "vision.onnx"), load_external_data=False)
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["Softmax"] == checkpoint.config.vision.depth
    assert not {"Attention", "RotaryEmbedding"} & set(kinds)


def test_onnx_runtimes_own_operators_where_they_hit(copy: Path) -> None:
    assert fuse_operators(copy / "vision.onnx") == {"BiasGelu": tiny_config().vision.depth + 1}
    onnx.checker.check_model(str(copy / "vision.onnx"), full_check=True)
    sample = random_tiles(tiny_config(), 3, seed=5)
    ours = OnnxVision(copy, provider="cpu").run(sample.tiles, sample.masks)
    assert relative_error(ours, sample.features(tiny_encoder())) <= LIMITS["fp32"]


def test_int8_calibrated_keeps_the_nearer_of_two(copy: Path) -> None:
    sample = next(photo_tiles(tiny_config())).first(3)
    before = {path.name for path in copy.iterdir()}
    info = quantise(copy / "vision.onnx", read_info(copy), calibration=[sample])
    errors = info.config["calibration_errors"]
    assert set(errors) == {"dynamic", "static"}
    assert info.config["activations"] == min(errors, key=errors.get)
    assert read_info(copy) == info
    ours = OnnxVision(copy, provider="cpu").run(sample.tiles, sample.masks)
    assert relative_error(ours, sample.features(tiny_encoder())) == pytest.approx(min(errors.values()), rel=0.05)
    assert {path.name for path in copy.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "fp8"}, "dtype: expected fp32, fp16, bf16, int8, got 'fp8'"),
        ({"opset": 24}, "opset: expected 18 to 23, got 24"),
        ({"calibration": [None]}, "calibration: only int8 is calibrated, got dtype fp32"),
    ],
)
def test_exports_that_there_are_not(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        export_vision(Checkpoint.open(TINY), tmp_path, **change)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tiles", "masks", "message"),
    [
        ((2, 3, 112, 112), (2, 168, 168), r"tiles: expected uint8 \[T, 3, 168, 168\], got .* \[2, 3, 112, 112\]"),
        ((2, 3, 168, 168), (1, 168, 168), r"masks: expected uint8 \[T, 168, 168\], got .* \[1, 168, 168\]"),
        ((3, 168, 168), (168, 168), "tiles: expected uint8"),
    ],
)
def test_wrong_sizes(tiles: tuple[int, ...], masks: tuple[int, ...], message: str) -> None:
    session = OnnxVision(tiny_models(), provider="cpu")
    with pytest.raises(OnnxError, match=message):
        session.run(torch.zeros(tiles, dtype=torch.uint8), torch.zeros(masks, dtype=torch.uint8))


def test_wrong_dtype() -> None:
    session, sample = OnnxVision(tiny_models(), provider="cpu"), random_tiles(tiny_config(), 1)
    with pytest.raises(OnnxError, match=r"tiles: expected uint8 .*, got torch.float32"):
        session.run(sample.tiles.float(), sample.masks)
    with pytest.raises(OnnxError, match=r"masks: expected uint8 .*, got torch.bool"):
        session.run(sample.tiles, sample.masks.bool())
    with pytest.raises(OnnxError, match=r"masks: expected uint8 \[T, 168, 21\]"):
        session(sample.tiles, sample.masks)


def test_missing_external_data(copy: Path) -> None:
    (copy / "vision.onnx.data").unlink()
    with pytest.raises(OnnxError, match=r"vision.onnx: its external data file vision.onnx.data is missing"):
        OnnxVision(copy)


def test_truncated_external_data(copy: Path) -> None:
    data = copy / "vision.onnx.data"
    data.write_bytes(data.read_bytes()[:-1000])
    with pytest.raises(OnnxError, match=r"vision.onnx.data: truncated; expected at least \d+ bytes, got \d+"):
        OnnxVision(copy)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_truncated_graph(copy: Path, share: float) -> None:
    graph = copy / "vision.onnx"
    whole = graph.read_bytes()
    graph.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(
        OnnxError, match=r"vision.onnx: (not an ONNX model, or a truncated one|expected a model export)"
    ):
        OnnxVision(copy)


def test_external_data_elsewhere_is_not_read(copy: Path) -> None:
    model = onnx.load(str(copy / "vision.onnx"), load_external_data=False)
    entry = next(one for tensor in model.graph.initializer for one in tensor.external_data if one.key == "location")
    entry.value = "../vision.onnx.data"
    (copy / "vision.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(OnnxError, match="expected a file beside the model"):
        OnnxVision(copy)


@pytest.mark.parametrize(
    ("dtype", "said", "tower"),
    [
        ("fp32", {}, ""),
        ("fp16", {}, "fp16"),
        ("bf16", {}, "bf16"),
        ("int8", {"activations": "dynamic", "calibration_errors": {"dynamic": 0.01, "static": 0.02}}, "int8 dynamic"),
        ("int8", {"activations": "dynamic", "calibration_errors": {}}, "int8 dynamic"),
        ("int8", {"activations": "static", "calibration_errors": {"static": 0.0125}}, "int8 static 0.0125"),
    ],
)
def test_a_tower_is_told_by_what_its_features_depend_on(dtype: str, said: dict[str, Any], tower: str) -> None:
    assert ModelInfo("vision", "0", "f", dtype, 23, 1e-4, said).tower == tower


def test_no_model_at_all(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(OnnxError, match=r"vision.onnx: no such file; expected a model written by `garserve export"):
        OnnxVision(tmp_path)
    with pytest.raises(OnnxError, match="expected a vision model, got a replay model"):
        OnnxVision(copy / "replay.onnx")


def test_a_provider_that_is_not_installed() -> None:
    with pytest.raises(OnnxError, match=r"onnx:Abacus: this ONNX Runtime has no such provider; installed: .*CPU"):
        OnnxVision(tiny_models(), provider="Abacus")


def test_another_checkpoints_model(mini: Path) -> None:
    fingerprint = vision_fingerprint(Checkpoint.open(mini))
    with pytest.raises(
        OnnxError, match=f"exported from another checkpoint: expected the vision half {fingerprint}, got"
    ):
        OnnxVision(tiny_models(), fingerprint=fingerprint)


def test_the_fingerprint_is_of_the_vision_half(mini_copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    before, tensors = vision_fingerprint(Checkpoint.open(mini_copy)), load_file(mini_copy / "model.safetensors")

    def fingerprint_with(name: str, change: float) -> str:
        save_file({**tensors, name: tensors[name] + change}, mini_copy / "model.safetensors")
        return vision_fingerprint(Checkpoint.open(mini_copy))

    assert fingerprint_with("mllm.model.language_model.norm.weight", 1.0) == before
    assert fingerprint_with("mask_patch_embedding.weight", 1e-3) != before
    assert fingerprint_with("mllm.model.multi_modal_projector.linear_2.bias", 1e-3) != before
    save_file(tensors, mini_copy / "model.safetensors")
    settings = json.loads((mini_copy / "preprocessor_config.json").read_text())
    (mini_copy / "preprocessor_config.json").write_text(json.dumps(settings | {"image_mean": [0.4, 0.5, 0.5]}))
    assert vision_fingerprint(Checkpoint.open(mini_copy)) != before


@pytest.mark.parametrize("name", ["gar-tiny-random", "gar-tiny-random-nocls"])
def test_golden_tiles(golden: Path, tmp_path: Path, name: str) -> None:
    """Within tolerance of the features that the authors' code recorded, and of the reference."""
    from garserve.conformance.case import Case
    from garserve.inputs.processor import Processor

    checkpoint = Checkpoint.open(golden / name)
    export_vision(checkpoint, tmp_path)
    session, encoder = OnnxVision(tmp_path, provider="cpu"), load_encoder(checkpoint)
    processor, compared = Processor(checkpoint.folder, checkpoint.config), 0
    for path in sorted(golden.glob("s*.json")):
        case = Case.read(path)
        if case.data["checkpoint"] != name or case.data["num_tiles_with_thumbnail"] > 9:
            continue
        item = case.prepare(processor, "released").items[0]
        ours = session(item.tiles, item.masks)
        sample = Tiles(item.tiles, encoder.unpack(item.masks).to(torch.uint8))
        assert relative_error(ours, sample.features(encoder)) <= LIMITS["fp32"]
        whole = "image_features" in case.arrays
        recorded = case.arrays["image_features" if whole else "image_features_sample"]
        stride = 1 if whole else case.data["sample_stride_tokens"]
        assert relative_error(ours[:, ::stride], recorded) <= LIMITS["fp32"], case.name
        compared += 1
    assert compared >= 1
