"""Choosing an endpoint for a request: cost, load, affinity, roles. Pure; clocks and randomness are passed in."""
