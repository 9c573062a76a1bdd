"""KV offload: GPU memory, pinned host memory, file system."""
