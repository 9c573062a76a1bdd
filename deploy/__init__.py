"""Command line, launcher, brokers, simulated fleet, operations."""
