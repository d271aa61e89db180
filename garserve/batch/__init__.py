"""Batch inference: every region of a data set answered once, whatever happens in between (floor 6)."""
