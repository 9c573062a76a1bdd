"""Generated code of the public API (scorer.proto)."""
