"""The vision half of a checkpoint by itself: what is exported, and what exports are held against."""

import torch

from garserve.checkpoint import Checkpoint, module_name
from garserve.model.encoder import RegionEncoder
from garserve.model.fingerprint import VISION_PREFIXES


def load_encoder(checkpoint: Checkpoint) -> RegionEncoder:
    """Load tower, mask embedding and projector in float32 on the CPU; the decoder's weights are not read."""
    with torch.device("meta"):
        encoder = RegionEncoder(checkpoint.config)
    state = {
        module_name(name).removeprefix("encoder."): tensor.float()
        for name, tensor in checkpoint.tensors(VISION_PREFIXES)
    }
    encoder.load_state_dict(state, strict=True, assign=True)
    encoder.reset_buffers(torch.float32)
    return encoder.eval()
