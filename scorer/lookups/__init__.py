"""Where a prompt's holders come from: workers over gRPC or in process, and what Kafka tells of pods and workers."""
