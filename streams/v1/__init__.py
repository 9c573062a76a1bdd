"""Generated code of the lookup service (block_index.proto)."""
