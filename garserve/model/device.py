"""Whether this machine has a GPU."""

import os

import torch


def has_gpu() -> bool:
    """Say whether torch sees a GPU, without asking CUDA itself, after which no forked process could use it any more.

    That is vLLM's way, too; it sets the same variable, but only when it is imported.
    """
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    return torch.cuda.is_available()
