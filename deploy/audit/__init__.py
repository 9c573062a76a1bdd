"""Comparison of a running index with what the log says it must be."""
