"""The block index, pure: packed holders, the kv-blocks record, and its application to a table."""
