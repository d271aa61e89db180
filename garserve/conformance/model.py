"""Checks of what the model computes: features, replay, embeddings, logits, greedy tokens."""

from collections.abc import Iterator

import torch

from garserve.config import BoxScale
from garserve.conformance.case import SCALES, Case, Finding, count_different, largest_difference, relative_error
from garserve.engine import Engine
from garserve.generation import Report, Sampling
from garserve.inputs.processor import PreparedRequest
from garserve.model.reference import ReferenceGAR

FEATURE_LIMIT = 1e-4  # relative
LOGIT_LIMIT = 1e-3


def check_features(case: Case, model: ReferenceGAR, prepared: dict[BoxScale, PreparedRequest]) -> Iterator[Finding]:
    """Compare vision tower, features, replay and input embeddings of the reference with the recording."""
    arrays, encoder = case.arrays, model.encoder
    item = prepared["released"].items[0]

    def finding(check: str, ours: torch.Tensor, name: str) -> Finding:
        return Finding(case.name, check, relative_error(ours, arrays[name]), FEATURE_LIMIT, "relative")

    with torch.inference_mode():
        pixels, masks = encoder.normalise(item.tiles), encoder.unpack(item.masks)
        if "pixel_f32_sample" in arrays:
            error = largest_difference(pixels[..., 3::56, 3::56], arrays["pixel_f32_sample"])
            yield Finding(case.name, "normalised pixels", error, 2 / 255)
        if "mask_embeds_sample" in arrays:
            yield finding("mask embedding", encoder.tower.embed_mask(masks)[..., 1::8, 1::8], "mask_embeds_sample")
        if "vision_out_sample" in arrays:
            out = torch.cat([_tower(model, p, m) for p, m in zip(pixels.split(8), masks.split(8), strict=True)])
            yield finding("vision tower", out[:, ::41], "vision_out_sample")
        stride = case.data["sample_stride_tokens"]
        features = encoder.features(item.tiles, item.masks)
        if "image_features" in arrays:
            yield finding("image features", features, "image_features")
        else:
            yield finding("image features", features[:, ::stride], "image_features_sample")
        for scale in SCALES:
            one = prepared[scale]
            rows = encoder.encode(one.items)[1:]
            order = sorted(range(len(rows)), key=lambda i, one=one: one.token_ids[one.spans[i + 1][0]])  # type: ignore[misc]
            yield finding(f"replay {scale}", torch.stack([rows[i] for i in order]), f"replay_{scale}")
            embeddings = model.embed(one)
            if scale == "released":
                yield finding("input embeddings", embeddings[::stride], "inputs_embeds_sample")
            mean = "inputs_embeds_mean" if scale == "released" else "inputs_embeds_mean_geometric"
            if mean in arrays:
                yield finding(f"embeddings' mean {scale}", embeddings.mean(dim=0), mean)


def _tower(model: ReferenceGAR, pixels: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = model.encoder.tower(pixels, masks, keep_class_token=True)
    return out


def check_generation(case: Case, engine: Engine, prepared: dict[BoxScale, PreparedRequest]) -> Iterator[Finding]:
    """Compare first-step logits and greedy tokens of an engine with the recording, for both box scales."""
    for scale in SCALES:
        golden = case.arrays[f"tokens_{scale}"]
        tokens, logits = _decode(engine, prepared[scale], len(golden))
        recorded = case.arrays[f"logits_{scale}"]
        yield Finding(case.name, f"logits {scale}", largest_difference(logits, recorded), LOGIT_LIMIT)
        best = case.arrays.get(f"top5_ids_{scale}")
        if best is not None and len(logits) == len(recorded):
            error = largest_difference(logits[best[0].long()], case.arrays[f"top5_logits_{scale}"][0])
            yield Finding(case.name, f"five best logits {scale}", error, LOGIT_LIMIT, "first step")
        different = count_different(torch.tensor(tokens, dtype=torch.int32), golden)
        margin = min(case.data.get(f"greedy_margin_{scale}", [float("nan")]))
        yield Finding(case.name, f"greedy tokens {scale}", different, 0.0, f"{len(golden)} tokens, margin {margin:.3g}")


def _decode(engine: Engine, prepared: PreparedRequest, count: int) -> tuple[list[int], torch.Tensor]:
    import queue

    reports: queue.SimpleQueue[Report] = queue.SimpleQueue()
    engine.backend.submit(prepared, Sampling(engine.stop_id, count, first_logits=True), reports.put)
    report = reports.get()
    if isinstance(report, Exception):
        raise report
    return report.new_token_ids, torch.tensor(report.first_logits or [])
