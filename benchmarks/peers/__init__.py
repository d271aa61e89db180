"""What others do with the same checkpoints, written down as carefully as our own, so that ratios mean something."""
