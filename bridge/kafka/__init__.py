"""What every Kafka client here has: configuration, producer, follower of a topic."""
