"""The tensor path: GPU to pinned host memory to files, and back."""
