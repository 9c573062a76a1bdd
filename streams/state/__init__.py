"""Local state of a partition and its changelog: RocksDB, cache, claims, restore; no Faust."""
