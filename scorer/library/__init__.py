"""The index in a process of one's own (`kvatlas.scorer.Indexer`)."""
