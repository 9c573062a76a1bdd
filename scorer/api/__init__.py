"""The service's edges: gRPC, HTTP/JSON and llm-d's API, with security, limits, tracing and metrics."""
