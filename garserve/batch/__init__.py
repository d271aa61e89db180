"""Batch inference: many requests from a file, one row of output for each (floor 6)."""
