"""Engine streams made into ordered, repaired records; no Kafka client in here."""
