"""A real Envoy before the picker: its configuration, and a process that runs it."""
