"""RoI-aligned feature replay on plain tensors: knows nothing of GAR, imports nothing of garserve (floor 1)."""
