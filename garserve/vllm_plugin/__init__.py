"""GAR in vLLM: registration, model class, multimodal inputs, and a driver of the engine (floor 4)."""
