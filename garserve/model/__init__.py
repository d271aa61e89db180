"""The model in PyTorch: vision tower, replay, encoder, and the reference that all else is held against (floor 3)."""
