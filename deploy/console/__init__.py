"""Console: a web page over what gRPC, Kafka and the history already tell; read-only."""
