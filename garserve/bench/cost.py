"""What a model has to compute and to move, counted from its config: the limits that times are held against.

A multiplication and an addition are two FLOPs. Norms, activations and rotations are left out; they are hundredths.
"""

from garserve.config import GARConfig


def tile_flops(config: GARConfig) -> float:
    """One tile through the tower and the projector."""
    vision = config.vision
    tokens = vision.grid**2 + int(vision.class_token)
    linear = 4 * vision.width**2 + 2 * vision.width * vision.mlp_width
    block = 2 * tokens * linear + 4 * tokens**2 * vision.width
    embedding = 2 * vision.grid**2 * 2 * 3 * vision.patch_size**2 * vision.width
    projector = 2 * vision.grid**2 * (vision.width * config.hidden_size + config.hidden_size**2)
    return float(vision.depth * block + embedding + projector)


def prefill_flops(config: GARConfig, tokens: int, cached: int = 0) -> float:
    """The decoder over a prompt of which the first `cached` tokens are known, and its head at the last position."""
    new = tokens - cached
    pairs = (tokens * (tokens + 1) - cached * (cached + 1)) / 2
    attention = 4 * pairs * _query_width(config) * _layers(config)
    return 2 * new * _layer_weights(config) + attention + 2 * config.hidden_size * config.vocab_size


def decode_bytes(config: GARConfig, context: int, element: int, together: int = 1) -> float:
    """What one step reads that gives `together` requests a token each: all weights once, and each one's KV cache."""
    head = config.hidden_size * config.vocab_size
    keys = 2 * _kv_width(config) * _layers(config) * context
    return float(element * (_layer_weights(config) + head + together * keys))


def replay_bytes(config: GARConfig, element: int) -> float:
    """The rows of one region, written once; what is read is less where the box is small."""
    return float(element * config.tokens_per_tile * config.hidden_size)


def _layers(config: GARConfig) -> int:
    return int(config.text["num_hidden_layers"])


def _head_width(config: GARConfig) -> int:
    return int(config.text.get("head_dim") or config.hidden_size // config.text["num_attention_heads"])


def _query_width(config: GARConfig) -> int:
    return int(config.text["num_attention_heads"]) * _head_width(config)


def _kv_width(config: GARConfig) -> int:
    heads = config.text.get("num_key_value_heads") or config.text["num_attention_heads"]
    return int(heads) * _head_width(config)


def _layer_weights(config: GARConfig) -> int:
    """Weights of all decoder layers, embeddings and head left out."""
    hidden = config.hidden_size
    attention = 2 * hidden * (_query_width(config) + _kv_width(config))
    return _layers(config) * (attention + 3 * hidden * int(config.text["intermediate_size"]))
