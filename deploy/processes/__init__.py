"""Processes of a deployment: launcher, children, a scorer inside a worker, the demo."""
