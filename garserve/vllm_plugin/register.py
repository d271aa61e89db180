"""Entry point `vllm.general_plugins`: tells each of vLLM's processes where GAR's classes are. Cheap, idempotent."""

ARCHITECTURE = "GARModel"
MODEL_CLASS = "garserve.vllm_plugin.model:GARForRegions"


def register() -> None:
    """Register GAR's config type and model class by name; nothing heavy is imported before vLLM needs it."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from garserve.vllm_plugin.hf_config import GARHFConfig

    AutoConfig.register(GARHFConfig.model_type, GARHFConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, MODEL_CLASS)
