"""The bridge process: engine streams in, Kafka records out, pods shared among bridges."""
