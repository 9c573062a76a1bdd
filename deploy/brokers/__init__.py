"""Kafka brokers for one machine: the embedded one in RAM, a real node from jars, and the topics on either."""
