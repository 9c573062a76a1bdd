"""ZMQ in, Kafka out: engine events, our record formats and the bridge process."""
