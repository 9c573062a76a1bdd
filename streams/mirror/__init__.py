"""The block index copied to Redis or Valkey."""
