"""GAR's `config.json` as the config object that transformers and vLLM pass around."""

from typing import Any

from transformers import LlamaConfig, PretrainedConfig

from garserve.config import BoxScale
from garserve.model.tile_cache import DEFAULT_GB


class GARHFConfig(PretrainedConfig):
    """Holds the authors' nested config; `text_config` is what vLLM sizes the decoder by.

    `replay_box_scale`, `tile_cache_gb`, and the exported tower `vision_model` (a path) with its `vision_provider` are
    garserve's own, and reach the engine's processes this way.
    """

    model_type = "GAR"
    sub_configs = {"text_config": LlamaConfig}

    def __init__(
        self,
        mllm_config: dict[str, Any] | None = None,
        replay_box_scale: BoxScale = "released",
        text_config: dict[str, Any] | LlamaConfig | None = None,
        tile_cache_gb: float = DEFAULT_GB,
        vision_model: str | None = None,
        vision_provider: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.mllm_config = dict(mllm_config or {})
        self.replay_box_scale = replay_box_scale
        self.tile_cache_gb = tile_cache_gb
        self.vision_model = vision_model
        self.vision_provider = vision_provider
        text = text_config if text_config is not None else self.mllm_config.get("text_config", {})
        if not isinstance(text, LlamaConfig):
            text = LlamaConfig(**{key: value for key, value in text.items() if key != "model_type"})
        self.text_config = text
        kwargs.setdefault("tie_word_embeddings", text.tie_word_embeddings)
        super().__init__(**kwargs)
