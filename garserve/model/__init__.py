"""The model itself in PyTorch: vision tower, replay, encoder, and the reference that everything else is held against (floor 3)."""
