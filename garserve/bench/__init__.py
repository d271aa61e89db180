"""Measurements of a checkpoint on this machine, as `garserve bench` runs them (floor 7)."""
