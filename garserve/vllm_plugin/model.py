"""GAR as a vLLM model: our encoder in front of vLLM's own Llama."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMultiModal, SupportsPP
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sequence import IntermediateTensors

from garserve.checkpoint import MODULE_PREFIXES, Checkpoint
from garserve.config import read_config
from garserve.model.encoder import RegionEncoder
from garserve.model.fingerprint import VISION_PREFIXES, vision_fingerprint
from garserve.model.onnx_vision import OnnxVision
from garserve.tracing import span
from garserve.vllm_plugin.cpu_kernels import use_cpu_kernels
from garserve.vllm_plugin.items import items_from_kwargs
from garserve.vllm_plugin.multimodal import (
    IMAGE_TOKEN,
    GARDummyInputs,
    GARMultiModalProcessor,
    GARProcessingInfo,
    checkpoint_folder,
    engine_max_num_tiles,
)


@MULTIMODAL_REGISTRY.register_processor(GARMultiModalProcessor, info=GARProcessingInfo, dummy_inputs=GARDummyInputs)
class GARForRegions(nn.Module, SupportsMultiModal, SupportsPP):
    """Vision tower, projector and replay (replicated on every rank), and the decoder on paged attention."""

    hf_to_vllm_mapper = WeightsMapper(orig_to_new_prefix=dict(MODULE_PREFIXES))

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """Return the text that stands for an image in a chat prompt."""
        return IMAGE_TOKEN

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        hf_config = vllm_config.model_config.hf_config
        self.gar_config = read_config(checkpoint_folder(vllm_config.model_config))
        self.configure_mm_token_handling(
            vocab_size=self.gar_config.vocab_size,
            mm_token_ids=[self.gar_config.image_token_id, *self.gar_config.crop_token_ids],
        )
        with self._mark_tower_model(vllm_config, "image"):
            # One pass through the tower is never larger than the image that vLLM profiles its memory with.
            most = engine_max_num_tiles(vllm_config.model_config) or self.gar_config.max_num_tiles
            self.encoder = RegionEncoder(
                self.gar_config,
                vision=_exported_vision(vllm_config),
                tiles_at_once=1 + most,
                tile_cache_gb=hf_config.tile_cache_gb,
            )
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=hf_config.text_config,
                prefix=maybe_prefix(prefix, "language_model"),
                architectures=["LlamaForCausalLM"],
            )
        use_cpu_kernels(self.language_model, vllm_config)
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def embed_multimodal(
        self,
        *,
        tiles: torch.Tensor | None = None,
        masks: torch.Tensor | None = None,
        keys: torch.Tensor | None = None,
        plan: torch.Tensor | None = None,
        box: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
        row_bytes: torch.Tensor | None = None,
        **_: object,
    ) -> list[torch.Tensor]:
        """Embed all image and region items of a step: one tensor [tokens, C] each, in their order."""
        if tiles is None or masks is None or keys is None or plan is None or box is None:
            return []
        if rows is None or row_bytes is None:
            return []
        width, dtype = self.gar_config.hidden_size, getattr(torch, self.gar_config.dtype)
        return self.encoder(items_from_kwargs(tiles, masks, keys, plan, box, rows, row_bytes, width, dtype))

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **_: object,
    ) -> torch.Tensor | IntermediateTensors:
        """Run the decoder on one step's tokens or embeddings."""
        if intermediate_tensors is not None:
            inputs_embeds = None
        with span("decoder"):
            return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Return the logits of hidden states [N, C]."""
        with span("decoder"):
            return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint's tensors by name; vLLM refuses unknown ones and missing ones.

        Tiles that were computed with other weights are forgotten. The cache is allocated here, so that vLLM counts it
        among the model's memory.
        """
        if self.encoder.vision is not None:
            weights = ((name, tensor) for name, tensor in weights if not name.startswith(VISION_PREFIXES))
        loaded = AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)
        if not self.encoder.like.is_meta:  # as it is while vLLM loads other weights into a running engine
            self.encoder.allocate()
        self.encoder.tile_cache.clear()
        return loaded


def _exported_vision(vllm_config: VllmConfig) -> OnnxVision | None:
    """Open the exported tower that the engine was told to use; None where it is to compute its own."""
    model_config = vllm_config.model_config
    hf_config = model_config.hf_config
    if hf_config.vision_model is None:
        return None
    fingerprint = vision_fingerprint(Checkpoint.open(checkpoint_folder(model_config)))
    return OnnxVision(Path(hf_config.vision_model), provider=hf_config.vision_provider, fingerprint=fingerprint)
