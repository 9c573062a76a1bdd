"""Faust processors that materialise the block index."""
