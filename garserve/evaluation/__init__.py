"""Accuracy of a checkpoint on questions whose true answers are known (floor 7)."""
