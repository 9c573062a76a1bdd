"""Blocks in a directory: layout, checksums, segments, usage, capacity, eviction."""
