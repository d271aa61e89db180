"""HTTP on vLLM's API server: regions in chat messages, captions of regions, limits and operations (floor 6)."""
